# SPDX-License-Identifier: Apache-2.0
"""Run commands without their imports, which take most of a short run: a server that imported everything forks them.

`Server.python` is `python SCRIPT ...`, and `Server.launch` is `accelerate launch ...`. The launcher reads the YAML and
sets the environment as usual; only torchrun's agent, which would start each worker as a new Python, is replaced by
forks of this one. Each command has processes of its own, with the environment that was asked for and no other. One
real command of each kind stays in the suite; the others are forked.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNNING = 1000  # no exit status
PATIENCE = 15  # seconds that the other workers have after one failed; torchrun's are 30
MOST_SECONDS = 500  # of a launch; pytest ends a test after 600

# What the interpreter or a library that the server imports reads once: a fork cannot be given another value.
READ_AT_IMPORT = ("HOME", "LANG", "LC_", "LD_", "PYTHON", "XDG_", "HF_HOME", "HF_TOKEN", "HUGGINGFACE_", "TRITON_")
READ_AT_IMPORT += ("TRANSFORMERS_", "HF_HUB_CACHE", "TORCHINDUCTOR_", "TORCH_LOGS", "DS_BUILD_", "DS_SKIP_", "MLFLOW_")
LATER = ("datasets", "matplotlib", "wandb")  # which read their variables in the fork that imports them


class Server:
    """The client's side: `python` and `launch` run a command to its end, `start_python` and `start` only start it."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self.environment, self.folder, self.process, self.started = environment, folder, None, 0

    def open(self) -> None:
        """Start the server, without waiting for its imports."""
        if not self.process:
            options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
            self.process = subprocess.Popen([sys.executable, __file__], env=self.environment, cwd=ROOT, **options)

    def python(self, words: list, *, timeout: float = MOST_SECONDS, **options) -> subprocess.CompletedProcess:
        """Run `python WORDS`, the first of which is a script; takes start_python's options too."""
        return self.start_python(words, **options).wait(timeout)

    def launch(self, words: list, *, timeout: float = MOST_SECONDS, **options) -> subprocess.CompletedProcess:
        """Run `accelerate launch WORDS`; takes start's options too."""
        return self.start(words, **options).wait(timeout)

    def start_python(self, words: list, **options) -> "Launch":
        """Start `python WORDS`, with stderr apart; see _start."""
        return self._start("python", words, ("output", "errors"), **options)

    def start(self, words: list, *, apart: bool = False, **options) -> "Launch":
        """Start `accelerate launch WORDS`, with stdout and stderr in one file, or apart; see _start."""
        return self._start("launch", words, ("output", "errors" if apart else "output"), **options)

    def _start(self, kind: str, words: list, names: tuple[str, str], *, cwd: Path = ROOT, env: dict | None = None):
        """Let the server fork a command. env: the command's whole environment; None is the server's."""
        env = self.environment if env is None else env
        changed = {name for name, _ in env.items() ^ self.environment.items() if name.startswith(READ_AT_IMPORT)}
        assert not changed, f"only a new interpreter reads another {', '.join(sorted(changed))}: use conftest.python"
        self.open()
        self.started += 1
        files = [self.folder / f"{name}-{self.started}.txt" for name in names]
        for file in files:
            file.touch()
        words = [*map(str, words)]
        request = {"kind": kind, "words": words, "cwd": str(cwd), "environment": env, "files": [*map(str, files)]}
        return Launch(self, words, *files, self.ask(request))

    def ask(self, request: dict) -> int:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return int(self.process.stdout.readline())
        except BaseException:  # a timeout of pytest: the launch hangs, and the next test wants a server that does not
            self.close()
            raise

    def close(self) -> None:
        """End the server and all that it has forked."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Launch:
    """A command that runs by itself: `pid` is its process, of a launcher whose children are the workers."""

    def __init__(self, server: Server, words: list[str], output: Path, errors: Path, pid: int):
        self.server, self.words, self.output, self.errors, self.pid = server, words, output, errors, pid
        self.status = None

    @property
    def workers(self) -> list[int]:
        """Return the workers that are still alive, by rank."""
        return children(self.pid)

    @property
    def ended(self) -> bool:
        if self.status is None:
            answer = self.server.ask({"pid": self.pid})
            self.status = None if answer == RUNNING else answer
        return self.status is not None

    def wait(self, timeout: float = MOST_SECONDS) -> subprocess.CompletedProcess:
        """Wait until the command ends; workers may outlive a launcher that was killed."""
        if self.status is None:
            self._wait(timeout)
        output, errors = self.output.read_text(), self.errors.read_text() if self.errors != self.output else ""
        return subprocess.CompletedProcess(self.words, self.status, output, errors)

    def _wait(self, timeout: float) -> None:
        descriptor = os.pidfd_open(self.pid)
        try:
            if not select.select([descriptor], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.words, timeout, self.output.read_text(), self.errors.read_text())
            assert self.ended
        except BaseException:  # a timeout of pytest's too
            self.kill([*self.workers, self.pid])
            raise
        finally:
            os.close(descriptor)

    def kill(self, pids: list[int], number: int = signal.SIGKILL) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Return a process's children, in the order in which they were made."""
    with contextlib.suppress(FileNotFoundError):
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    return []


class Worker(BaseException):
    """Raised in a forked worker to leave the launcher's code; carries what the launcher gave it."""

    def __init__(self, environment: dict[str, str], words: list[str]):
        self.environment, self.words = environment, words


def serve(answers: int) -> dict:
    """Fork for each request; returns in the forks, with the request."""
    for line in sys.stdin:
        request = json.loads(line)
        if "words" in request:
            answer = os.fork()
            if answer == 0:
                os.close(answers)
                return request
        else:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else RUNNING
        os.write(answers, f"{answer}\n".encode())
    os._exit(0)


def fork_workers(arguments) -> None:
    """Fork the workers in place of torchrun; where one fails, stop the others, as torchrun does."""
    count = int(arguments.nproc_per_node)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        address["TORCHELASTIC_RUN_ID"] = "none"  # torchrun's own default
    workers = set()
    for rank in map(str, range(count)):
        pid = os.fork()
        if pid == 0:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            words = [arguments.training_script, *arguments.training_script_args]
            raise Worker({**os.environ, **address, **ranks, "OMP_NUM_THREADS": "1"}, words)
        workers.add(pid)
    failed = False
    while workers:
        pid, status = os.wait()
        workers.discard(pid)
        if status and not failed:
            failed = True
            for other in workers:
                os.kill(other, signal.SIGTERM)
            signal.signal(signal.SIGALRM, lambda *_: [os.kill(other, signal.SIGKILL) for other in workers])
            signal.alarm(PATIENCE)
    os._exit(int(failed))


def launch(words: list[str]) -> None:
    """Run `accelerate launch WORDS`; the forks that it makes run the script."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    try:
        launch_command(launch_command_parser().parse_args(words))
    except Worker as worker:
        os.environ.update(worker.environment)
        words = worker.words
    if (Path(words[0]).parent / "shared").exists():
        python(words)
    else:  # a test's script, which imports a recipe and changes it
        run_script(words)


def python(words: list[str]) -> None:
    """Run `python WORDS` to its end, with the modules of the script's own project and of no other."""
    folder = Path(words[0]).resolve().parent
    kept = {"__main__"} | ({"shared"} if (folder / "shared").resolve() == ROOT / "shared" else set())
    for name, module in [*sys.modules.items()]:
        file = getattr(module, "__file__", None) or ""
        if file.startswith(f"{ROOT}/") and not file.startswith(sys.prefix) and name.split(".")[0] not in kept:
            del sys.modules[name]
    sys.path[:2] = [str(folder)]
    run_script(words)


def run_script(words: list[str]) -> None:
    """Run a script as Python does: runpy would change sys.argv, and end the module before its atexit functions."""
    sys.argv, main = words, types.ModuleType("__main__")
    main.__file__ = os.path.abspath(words[0])
    sys.modules["__main__"] = main
    exec(compile(Path(words[0]).read_bytes(), main.__file__, "exec"), main.__dict__)


def end(run: Callable, *arguments) -> None:
    """Run, and end this process as an interpreter does, but for the clearing of its modules, which takes seconds."""
    status = signalled = 0
    try:
        run(*arguments)
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if exit.code is not None and not isinstance(exit.code, int):
            print(exit.code, file=sys.stderr)
    except BaseException as error:
        trace = error.__traceback__
        while trace.tb_next and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        status, signalled = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = 120
    ctypes.CDLL(None).fflush(None)  # what libraries in C have printed
    if signalled:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries greet on it
    sys.path.insert(0, str(ROOT / "recipes"))
    import accelerate.commands.launch  # noqa: F401
    import deepspeed  # noqa: F401
    import llm  # noqa: F401
    import numpy
    import sklearn.datasets  # noqa: F401
    import torch._dynamo
    import torch.distributed.run
    import torch.utils.tensorboard
    import vit_pp  # noqa: F401  every recipe's libraries and shared/
    import vit_zero  # noqa: F401
    from huggingface_hub import constants

    assert not sys.modules.keys() & {*LATER}
    gc.freeze()  # or each collection in a fork would touch, and so copy, all that was imported
    request = serve(answers)
    for stream, file in zip((0, 1, 2), (os.devnull, *request["files"]), strict=True):
        os.dup2(os.open(file, os.O_RDWR | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES
    numpy.random.seed()  # an interpreter of its own would have drawn one
    torch.distributed.run.run = fork_workers
    end({"python": python, "launch": launch}[request["kind"]], request["words"])


if __name__ == "__main__":
    main()

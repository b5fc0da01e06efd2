# SPDX-License-Identifier: Apache-2.0
"""Launches without their imports, which take most of a short run: a server that imported everything forks them.

`accelerate launch` reads the YAML and sets the environment as ever; only torchrun's agent, which would start each
worker as a new Python, is replaced by forks of this one. Each launch is processes of its own, as always. It serves the
tests that compare many strategies or start one run many times; all others, of commands, errors and smoke, start the
launcher itself.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNNING = 1000  # no exit status
PATIENCE = 15  # seconds that the other workers have after one failed; torchrun's are 30


class Server:
    """The client's side: `launch` runs the words after `accelerate launch` to their end, `start` only starts them."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self.environment, self.folder, self.process, self.started = environment, folder, None, 0

    def launch(self, words: list[str]) -> subprocess.CompletedProcess:
        return self.start(words).wait()

    def start(self, words: list[str]) -> "Launch":
        if not self.process:
            options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
            self.process = subprocess.Popen([sys.executable, __file__], env=self.environment, cwd=ROOT, **options)
        self.started += 1
        output = self.folder / f"output-{self.started}.txt"
        output.touch()
        return Launch(self, words, output, self.ask({"words": words, "output": str(output)}))

    def ask(self, request: dict) -> int:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return int(self.process.stdout.readline())
        except BaseException:  # a timeout of pytest: the launch hangs, and the next test wants a server that does not
            self.close()
            raise

    def close(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Launch:
    """A launch that goes on by itself: `pid` is its launcher's, whose children are the training processes."""

    def __init__(self, server: Server, words: list[str], output: Path, pid: int):
        self.server, self.words, self.output, self.pid, self.status = server, words, output, pid, None

    @property
    def workers(self) -> list[int]:
        """By rank; those that still live."""
        return children(self.pid)

    @property
    def ended(self) -> bool:
        if self.status is None:
            answer = self.server.ask({"pid": self.pid, "options": os.WNOHANG})
            self.status = None if answer == RUNNING else answer
        return self.status is not None

    def wait(self) -> subprocess.CompletedProcess:
        """Until the launcher ends; workers may outlive one that was killed."""
        if self.status is None:
            self.status = self.server.ask({"pid": self.pid, "options": 0})
        return subprocess.CompletedProcess(self.words, self.status, self.output.read_text(), "")

    def kill(self, pids: list[int], number: int = signal.SIGKILL) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


def children(pid: int) -> list[int]:
    """In the order of their making."""
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
                return request
        else:
            pid, status = os.waitpid(request["pid"], request["options"])
            answer = os.waitstatus_to_exitcode(status) if pid else RUNNING
        os.write(answers, f"{answer}\n".encode())
    sys.exit()


def fork_workers(arguments) -> None:
    """In the place of torchrun: one fork a process; where one fails the others are stopped, as torchrun does."""
    count = int(arguments.nproc_per_node)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
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
    os._exit(int(failed))  # an interpreter of so many modules takes seconds to end


def main() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries greet on it
    sys.path.insert(0, str(ROOT / "recipes"))
    import deepspeed  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch._dynamo
    import torch.distributed.run
    import vit_pp  # noqa: F401  every recipe's libraries and shared/
    import vit_zero  # noqa: F401
    from accelerate.commands.launch import launch_command, launch_command_parser

    request = serve(answers)
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(file, stream)
    torch.distributed.run.run = fork_workers
    try:
        launch_command(launch_command_parser().parse_args(request["words"]))
    except Worker as worker:
        os.environ.update(worker.environment)
        sys.argv = worker.words
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""How a process begins and ends: its words and streams, and one line for what a user got wrong."""

import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path


class UserError(ValueError):
    """What the person at the keyboard can put right: printed as one line, without a traceback."""

    alone = False  # whether only this process has seen it: rank 0 will not report it


class _Stream(io.FileIO):
    """Where words cannot be written (`| head -1`, a terminal that is gone, a full disk) they are lost, and the run
    continues."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def begin() -> None:
    """Prepare a program's process: from here on no print fails, an uncaught UserError ends it with one `error:` line
    from rank 0 and exit status 1, and an interrupt before there is a run to save with status 130."""
    sys.excepthook = one_line
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by the caller: the next file that is opened would be taken for it
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):  # else pytest's
            stream = _unfailing(number, getattr(sys, name))
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)


def _unfailing(number: int, former: io.TextIOWrapper | None) -> io.TextIOWrapper:
    with contextlib.suppress(OSError, AttributeError):  # Python's None for a stream that was closed
        former.flush()
    options = {"encoding": getattr(former, "encoding", "utf-8"), "errors": "backslashreplace"}
    options["line_buffering"] = getattr(former, "line_buffering", number == 2)
    options["write_through"] = getattr(former, "write_through", False)
    return io.TextIOWrapper(io.BufferedWriter(_Stream(number, "wb", closefd=False)), **options)


def expand_home(words: list[str]) -> list[str]:
    """Return the command line with `--flag=~/x` as a shell expands `~/x`.

    Raises UserError where no home is known, and for a path that is no UTF-8, which trackers and caches cannot write.
    """
    expanded = [_expand_home(word) for word in words]
    for text in (*expanded, os.getcwd()):
        if text != text.encode(errors="replace").decode():
            shown = text.encode("ascii", "backslashreplace").decode()
            raise UserError(f"{shown} is not UTF-8. Rename it (mv), or give a symbolic link to it.")
    return expanded


def _expand_home(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        raise UserError(f"{value}: this home folder is not known. Set HOME, or give the whole path (or ./{value}).")
    return flag + equals + expanded


def say(line: str, stream=None) -> None:
    """Print at once, on standard output or the stream."""
    print(line, file=stream or sys.stdout, flush=True)


def job_folder() -> Path | None:
    """Where slurm/launch.sh and the processes that it started tell each other what they know."""
    return Path(os.environ["RECIPES_JOB_FOLDER"]) if "RECIPES_JOB_FOLDER" in os.environ else None


def tell_job(name: str, text: str) -> None:
    """Into a file of job_folder(), for slurm/launch.sh."""
    if folder := job_folder():
        with contextlib.suppress(OSError):  # the folder goes with the job
            (folder / name).write_text(text, errors="backslashreplace")


def _tell_launcher(text: str) -> None:
    """Into torchrun's file, so that what it prints of a worker that failed ends with the reason."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}))


def one_line(kind, error, trace) -> None:
    """For sys.excepthook."""
    rank = os.environ.get("RANK") or "0"
    if isinstance(error, UserError):
        tell_job(f"error-{rank}.txt", f"error: {error}\n")
        if rank != "0" and not error.alone:
            # A launcher ends every worker at the first one that fails: leave rank 0 the time to speak.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing to save any more
            time.sleep(20)
        end_at_once(error)
    elif isinstance(error, KeyboardInterrupt):
        print("\ninterrupted", file=sys.__stderr__, flush=True)
        end_workers()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the end that a shell's loop of commands looks for
        os.kill(os.getpid(), signal.SIGINT)
    else:
        tell_job(f"error-{rank}.txt", "".join(traceback.format_exception(kind, error, trace)))
        _tell_launcher(traceback.format_exception_only(kind, error)[-1].strip())
        sys.__excepthook__(kind, error, trace)


def end_at_once(error: UserError) -> None:
    """Print the line and exit, from any thread."""
    _tell_launcher(f"error: {error}")
    # sys.stderr is a buffer here: init_process_group wraps the hook, to prefix what it prints with the rank.
    print(f"error: {error}", file=sys.__stderr__, flush=True)
    sys.stdout.flush()
    end_workers()  # they may be so new that they would not notice
    # Threads of a half-made process group could abort a normal exit and print over the line.
    os._exit(1)


def end_workers() -> None:
    """Of this process's loaders, by force."""
    for worker in multiprocessing.active_children():
        worker.kill()


def die_with_parent(number: int = signal.SIGTERM, parent: int | None = None) -> None:
    """Let the kernel send this process the signal when its parent ends, however it does. For a child, as Popen's
    preexec_fn or a worker's first line. A launcher needs SIGTERM, to end its own workers.

    parent: if it is not the parent any more, the process ends now.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if parent not in (None, os.getppid()):
            os._exit(1)

# SPDX-License-Identifier: Apache-2.0
"""Begin and end a process: guard its streams, print an error as one line, end when its parent dies."""

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
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError, say, tell_job
from .launch import error_file, launched, never_met, rank, under_torchrun, world_size

PATIENCE = 60  # seconds in which processes must meet where no launcher watches them


class _Stream(io.FileIO):
    """A stream that drops what it cannot write (`| head -1`, a closed terminal, a full disk); the run continues."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def begin() -> None:
    """Prepare a program's process. From here on no print fails. An uncaught UserError ends it with one `error:` line
    from rank 0 and exit status 1; an interrupt, before there is a run to save, ends it with status 130."""
    sys.excepthook = one_line
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by the caller: the next file to be opened would get this number
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


def one_line(kind, error, trace) -> None:
    """Report what ended the program; used as sys.excepthook."""
    if isinstance(error, UserError):
        tell_job(f"error-{rank()}.txt", f"error: {error}\n")
        if rank() and not error.alone:
            # A launcher ends every worker when the first one fails: leave rank 0 time to speak.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing left to save
            time.sleep(20)
        end_at_once(error)
    elif isinstance(error, KeyboardInterrupt):
        say("\ninterrupted", sys.__stderr__)
        end_workers()
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a loop in a shell stops only for a death by signal
        os.kill(os.getpid(), signal.SIGINT)
    else:
        tell_job(f"error-{rank()}.txt", "".join(traceback.format_exception(kind, error, trace)))
        _tell_launcher(traceback.format_exception_only(kind, error)[-1].strip())
        sys.__excepthook__(kind, error, trace)


def end_at_once(error: UserError) -> None:
    """Print the error's line and exit with status 1, from any thread."""
    _tell_launcher(f"error: {error}")
    # sys.stderr is a buffer here: init_process_group wraps the hook to prefix its output with the rank.
    say(f"error: {error}", sys.__stderr__)
    sys.stdout.flush()
    end_workers()  # those that have just started might not notice
    # Threads of a half-made process group could abort a normal exit and print over the line.
    os._exit(1)


def end_workers() -> None:
    """Kill the workers of this process's loaders. torch's handler of SIGCHLD would raise an error for each of them."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def _tell_launcher(text: str) -> None:
    """Write into torchrun's file, so that its report of a failed worker ends with the reason."""
    if path := error_file():
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}))


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Limit the time in which the processes of a launch meet. torchrun watches over its own; without it some may never
    arrive, and after PATIENCE seconds this process ends with an `error:` line."""
    timer = threading.Timer(PATIENCE, end_at_once, [never_met(PATIENCE)])
    timer.daemon = True
    if world_size() > 1 and not under_torchrun():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def die_with_parent(number: int = signal.SIGTERM, parent: int | None = None) -> None:
    """Ask the kernel to send this process a signal when its parent ends. Call it in the child: as Popen's preexec_fn,
    or first in a worker. A launcher needs SIGTERM, to end its own workers.

    parent: the process ends at once if this is no longer its parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # 1: PR_SET_PDEATHSIG
        if parent not in (None, os.getppid()):
            os._exit(1)


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def ignore_signals() -> None:
    """Ignore SIGNALS in a loader's worker: they reach its whole process group, and the training process acts."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


GRACE = 45  # seconds for a last checkpoint; a new start waits 60 for the folder's lock


def die_with_launcher() -> None:
    """End this worker when its launcher ends: by SIGTERM, with a checkpoint, and GRACE seconds later by force, since
    it may wait for a peer that is gone."""
    if launched() and sys.platform == "linux":
        die_with_parent()
        init = os.path.realpath("/proc/1/exe") if os.access("/proc/1/exe", os.R_OK) else ""  # "": another user's
        if os.getppid() == 1 and init != os.path.realpath("/proc/self/exe"):
            sys.exit(1)  # the launcher died while this process imported its libraries
        threading.Thread(target=_end_by_force, args=(os.getppid(),), daemon=True).start()


def _end_by_force(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)

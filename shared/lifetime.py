# SPDX-License-Identifier: Apache-2.0
"""Begin and end a process: its streams, one line for an error, a parent that died. End a run before its time: by a
signal, a STOP file or a deadline; all processes leave at the same step."""

import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from .errors import UserError, job_folder, tell_job
from .launch import error_file, launched, never_met, rank, under_torchrun, world_size

PATIENCE = 60  # seconds for processes that no launcher watches to meet


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


def one_line(kind, error, trace) -> None:
    """For sys.excepthook."""
    if isinstance(error, UserError):
        tell_job(f"error-{rank()}.txt", f"error: {error}\n")
        if rank() and not error.alone:
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
        tell_job(f"error-{rank()}.txt", "".join(traceback.format_exception(kind, error, trace)))
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


def _tell_launcher(text: str) -> None:
    """Into torchrun's file, so that what it prints of a worker that failed ends with the reason."""
    if path := error_file():
        more = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}))


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Within it the processes of a launch meet. Without torchrun, which watches over its own, some may never come:
    PATIENCE seconds later this one ends with an `error:` line."""
    timer = threading.Timer(PATIENCE, end_at_once, [never_met(PATIENCE)])
    timer.daemon = True
    if world_size() > 1 and not under_torchrun():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


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


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REASONS = ("", "signal", "stop_file", "deadline")  # in summary.json
CHECK_SECONDS = 1.0  # between two agreements; a message costs up to 0.8 ms, and a step is to wait for 0.1 % at most
WATCH_SECONDS = 1.0  # between two looks at the STOP file, which lies on a parallel file system
# Seconds before a job's end that its launcher and Slurm keep for themselves. The first save, which nothing has
# measured yet, has them too: 12 GB at 200 MB/s.
MARGIN = 60


class Interruption:
    """Each process notes what it alone can see; `agreed` gives all of them the same answer at the same step.

    A handler only sets a flag, so that no signal, nor a second one, can harm a save. The processes exchange one small
    message through gloo about every CHECK_SECONDS; it travels while they train, and is read a step later.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, time_limit: float):
        """time_limit: seconds from now; 0 is the end of Slurm's job, where there is one."""
        self.stop_file = folder / "STOP"
        self.job_stop_file = (job_folder() or folder) / "STOP"  # slurm/launch.sh's, for a signal; new in each start
        self.watches, self.watched = accelerator.is_main_process, 0.0  # the file and the clock; when it last did
        self.seen, self.steps_between, self.next_check = 0, 1, 0
        self.asked: tuple[float, int] | None = None  # when, and after which step
        self.reserve = 0.0  # seconds that a save and an evaluation took, at most
        self.deadline = _deadline(time_limit) if self.watches else 0
        # A group of its own: no other message may come between.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.flags = torch.zeros(2, dtype=torch.float64)
        self.message = None
        if self.watches:
            self.stop_file.unlink(missing_ok=True)  # it was meant for a former start
        # torchrun handles SIGHUP even under nohup: it passes the signal to its workers, and kills them 30 s later.
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not under_torchrun()
        for number in SIGNALS:
            if number != signal.SIGHUP or not nohup:
                signal.signal(number, self._note_signal)

    def note(self, reason: str) -> None:
        """To be agreed on; of several reasons the last one of the list wins."""
        self.seen = max(self.seen, REASONS.index(reason))

    def _note_signal(self, number: int, frame) -> None:
        first = not self.seen
        self.note("signal")
        if self.watches and first:
            line = f"\n{signal.Signals(number).name}: a checkpoint comes after this step, then the end\n"
            with contextlib.suppress(OSError):  # Ctrl-C ends a `2>&1 | tee log` first
                os.write(2, line.encode())

    def _watch(self) -> None:
        if time.monotonic() - self.watched < WATCH_SECONDS:
            return
        self.watched = time.monotonic()
        if self.job_stop_file.exists():
            self.note("signal")
        if self.stop_file.exists():
            self.note("stop_file")
        if self.deadline and time.time() + 1.5 * self.reserve + WATCH_SECONDS > self.deadline:
            self.note("deadline")

    def noted(self) -> str:
        """The reason to stop that this process can see, or an empty string; for who waits between two steps."""
        self._watch()
        return REASONS[self.seen]

    def agreed(self, step: int) -> str:
        """The reason to stop after this step, or an empty string; every process must call it after every step."""
        if self.watches:
            self._watch()
        if self.group is None:
            return REASONS[self.seen]
        answer = self._answer()
        if not answer and step >= self.next_check:
            self._ask(step)
            self.next_check = step + self.steps_between
        return answer

    def _ask(self, step: int) -> None:
        now = time.monotonic()
        seconds_per_step = (now - self.asked[0]) / (step - self.asked[1]) if self.asked else 0.0
        self.asked = now, step
        self.flags[0], self.flags[1] = self.seen, seconds_per_step
        maximum = torch.distributed.ReduceOp.MAX
        self.message = torch.distributed.all_reduce(self.flags, maximum, group=self.group, async_op=True)

    def _answer(self) -> str:
        if self.message is None:
            return ""
        self.message.wait()
        self.message = None
        seen, seconds_per_step = self.flags.tolist()
        if seconds_per_step:
            self.steps_between = max(1, int(CHECK_SECONDS / seconds_per_step))
        return REASONS[int(seen)]

    def close(self) -> None:
        """Read the last message, so that no process leaves before its peers have it."""
        self._answer()
        if self.watches:
            self.stop_file.unlink(missing_ok=True)


def _deadline(time_limit: float) -> float:
    """In Unix time; 0 is none. A shell keeps the end of a job that is over; a job without a limit has no number."""
    if time_limit:
        return time.time() + time_limit
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    end = int(text) if text.isdecimal() else 0
    # slurm/launch.sh has looked at it; a process that starts slowly may find that it has just passed.
    ours = job_folder() or (end > time.time() and _job_runs())
    return end - MARGIN if end and ours else 0


def _job_runs() -> bool:
    """Whether SLURM_JOB_ID is a job that runs, as Slurm says; where it does not answer, the variable is believed."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={os.environ['SLURM_JOB_ID']}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return True
    return "RUNNING" in answer.stdout or (answer.returncode != 0 and "Invalid job id" not in answer.stderr)


def ignore_signals() -> None:
    """For a loader's worker: the signals reach a whole process group, and the training process answers them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


GRACE = 45  # seconds for a last checkpoint; a new start waits 60 for the folder's lock


def die_with_launcher() -> None:
    """Workers end when their launcher does: at first as if by SIGTERM, with a checkpoint; GRACE seconds later by
    force, for one may wait for a peer that is gone."""
    if launched() and sys.platform == "linux":
        die_with_parent()
        if os.getppid() == 1 and os.path.realpath("/proc/1/exe") != os.path.realpath("/proc/self/exe"):
            sys.exit(1)  # it died while this process imported its libraries, and init took this one over
        threading.Thread(target=_end_by_force, args=(os.getppid(),), daemon=True).start()


def _end_by_force(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)

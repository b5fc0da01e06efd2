# SPDX-License-Identifier: Apache-2.0
"""End a run early, on a signal, a STOP file or a deadline; all processes stop after the same step."""

import contextlib
import os
import signal
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from ..errors import job_folder
from ..launch import under_torchrun
from ..lifetime import SIGNALS

REASONS = ("", "signal", "stop_file", "deadline")  # in summary.json
CHECK_SECONDS = 1.0  # between two agreements: a message costs up to 0.8 ms, and may take 0.1 % of the time
WATCH_SECONDS = 1.0  # between two looks at the STOP file, which lies on a parallel file system
# Seconds before a job's end, for its launcher and Slurm. They also cover the first save, whose duration is not known
# yet: 12 GB at 200 MB/s.
MARGIN = 60


class Interruption:
    """The reasons to stop: each process notes what only it can see; `agreed` returns the same on all, after each step.

    A signal handler only sets a flag, so that no signal, not even a second one, damages a save. The processes exchange
    one small message through gloo about every CHECK_SECONDS; it travels while they train, and is read a step later.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, time_limit: float):
        """time_limit: seconds from now; 0 is the end of Slurm's job, where there is one."""
        self.stop_file = folder / "STOP"
        self.job_stop_file = (job_folder() or folder) / "STOP"  # slurm/launch.sh makes it on a signal
        self.watches, self.watched = accelerator.is_main_process, 0.0  # whether it watches files and clock; last time
        self.seen, self.steps_between, self.next_check = 0, 1, 0
        self.asked: tuple[float, int] | None = None  # when the last message was sent, and after which step
        self.reserve = 0.0  # seconds that a save and an evaluation took, at most
        self.deadline = _deadline(time_limit) if self.watches else 0
        # A group of its own, so that no other message comes in between.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
        self.flags = torch.zeros(2, dtype=torch.float64)
        self.message = None
        if self.watches:
            self.stop_file.unlink(missing_ok=True)  # it was meant for a previous start
        # torchrun handles SIGHUP even under nohup: it passes the signal to its workers, and kills them 30 s later.
        nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and not under_torchrun()
        for number in SIGNALS:
            if number != signal.SIGHUP or not nohup:
                signal.signal(number, self._note_signal)

    def note(self, reason: str) -> None:
        """Note a reason to agree on; of several, the last one in REASONS wins."""
        self.seen = max(self.seen, REASONS.index(reason))

    def _note_signal(self, number: int, frame) -> None:
        first = not self.seen
        self.note("signal")
        if self.watches and first:
            line = f"\n{signal.Signals(number).name}: the run saves a checkpoint after this step and ends\n"
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
        """Return the reason to stop that this process can see, or an empty string; for a loader that waits between
        steps."""
        self._watch()
        return REASONS[self.seen]

    def agreed(self, step: int) -> str:
        """Return the reason to stop after this step, or an empty string; every process must call it after every
        step."""
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
        """Read the last message, so that no process leaves before its peers have it; remove the STOP file."""
        self._answer()
        if self.watches:
            self.stop_file.unlink(missing_ok=True)


def _deadline(time_limit: float) -> float:
    """Return the deadline in Unix time, 0 for none.

    A shell may keep the SLURM_JOB_END_TIME of a job that is over; in a job without a limit it is not a number.
    """
    if time_limit:
        return time.time() + time_limit
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    end = int(text) if text.isdecimal() else 0
    # In a job slurm/launch.sh has checked it: it can only have passed while this process was starting.
    ours = job_folder() or ("SLURM_JOB_ID" in os.environ and end > time.time())
    return end - MARGIN if end and ours else 0

# SPDX-License-Identifier: Apache-2.0
"""Trace, for --profile, the last training steps before the first evaluation, and its first batches."""

import contextlib
from collections.abc import Iterator

from accelerate.utils import ProfileKwargs

from .position import Position

TRACED = 3  # training steps, and evaluation batches, in the trace


@contextlib.contextmanager
def tracing(run, evaluation_batches: int) -> Iterator[None]:
    """Set the Run's `profiler`, whose `step` the loops call, within the block; then say where the trace is."""
    traced, window = schedule(run, evaluation_batches)
    folder = str(run.folder / "profile")
    with run.accelerator.profile(ProfileKwargs(schedule_option=window, output_trace_dir=folder)) as run.profiler:
        yield
    run.say(f"trace of {traced} training steps and the evaluation: {folder}/profile_0.json")


def schedule(position: Position, evaluation_batches: int) -> tuple[int, dict]:
    """Return the number of training steps in the trace, and torch.profiler's schedule for it."""
    steps = min(position.epoch_steps - position.step % position.epoch_steps, position.last_step - position.step)
    traced = min(TRACED, steps)
    window = {"skip_first": max(steps - traced - 1, 0), "wait": 0, "warmup": min(1, steps - traced)}
    return traced, window | {"active": traced + min(TRACED, evaluation_batches), "repeat": 1}

# SPDX-License-Identifier: Apache-2.0
"""Measure a start's time: in training steps, in waits for data and in evaluations."""

import time


class Ledger:
    """A start's times. Training time runs from the end of one step to the end of the next, less saves and evaluations.

    The first step of a start does not count: it waits for the first batch, compiles and tunes kernels.
    """

    def __init__(self):
        self.launched = self.step_end = time.perf_counter()
        self.train_steps, self.train_seconds = 0, 0.0
        self.window = 0, 0.0  # train_steps and train_seconds at the last line
        self.wait_seconds = 0.0  # for batches, since the last line
        self.evaluation_seconds = 0.0  # of the longest one

    def end_step(self, first: bool) -> None:
        now = time.perf_counter()
        if first:
            self.wait_seconds = 0.0
        else:
            self.train_steps, self.train_seconds = self.train_steps + 1, self.train_seconds + now - self.step_end
        self.step_end = now

    def end_save(self, seconds: float) -> None:
        self.step_end += seconds

    def end_evaluation(self) -> None:
        """Count the time since the last step as an evaluation."""
        now = time.perf_counter()
        self.evaluation_seconds, self.step_end = max(self.evaluation_seconds, now - self.step_end), now

    def close_window(self, batch: int, wait_seconds: float) -> dict[str, float]:
        """Return the speed since the last line, and begin the next window; {} where no step was done.

        wait_seconds: the mean over the data-parallel processes.
        """
        steps, seconds = self.train_steps - self.window[0], self.train_seconds - self.window[1]
        self.window, self.wait_seconds = (self.train_steps, self.train_seconds), 0.0
        if not steps:
            return {}
        rate = round(steps * batch / seconds, 1)
        return {"samples_per_second": rate, "data_wait_fraction": round(wait_seconds / seconds, 4)}

    def rate(self, batch: int) -> float:
        """Return samples per second over this start's training time, 0 before its second step."""
        return self.train_steps * batch / max(self.train_seconds, 1e-9)

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.launched

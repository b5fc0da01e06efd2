# SPDX-License-Identifier: Apache-2.0
"""Count global steps, and say what is due at each."""

from ..config import RunConfig
from ..errors import UserError


class Position:
    """The place of a run: `step` counts the global batches done, `last_step` is where this start ends."""

    def __init__(self, run_config: RunConfig, steps_per_epoch: int, epochs: int):
        """Raises UserError for --checkpointing_steps that are no steps."""
        self.epoch_steps, self.total_steps = steps_per_epoch, steps_per_epoch * epochs
        self.last_step = min(self.total_steps, run_config.max_steps or self.total_steps)
        self.checkpoint_steps = checkpoint_steps(run_config.checkpointing_steps, steps_per_epoch)
        self.logging_steps = run_config.logging_steps
        self.step = self.first_step = 0
        self.interrupted = ""  # or the reason, the same one on every process

    @property
    def epoch(self) -> int:
        """Number of the epoch of the step that was done last."""
        return (self.step - 1) // self.epoch_steps

    @property
    def at_epoch_end(self) -> bool:
        return self.step % self.epoch_steps == 0

    @property
    def stopping(self) -> bool:
        return self.step >= self.last_step or bool(self.interrupted)

    @property
    def will_log(self) -> bool:
        """Tell whether the step that is being computed gets a line in metrics.jsonl."""
        return (self.step + 1) % self.logging_steps == 0 or self.step + 1 >= self.last_step

    @property
    def evaluation_due(self) -> bool:
        """True at the end of an epoch or of the run: an interruption within an epoch leaves no trace in metrics."""
        return self.at_epoch_end or self.step >= self.last_step

    @property
    def checkpoint_due(self) -> bool:
        """True within an epoch. At its end the evaluation comes first, so that a resume cannot skip it."""
        return not (self.stopping or self.at_epoch_end) and self.step % self.checkpoint_steps == 0


def checkpoint_steps(value: str, epoch_steps: int) -> int:
    """Return the steps between two checkpoints; raises UserError for what is neither a number nor the word epoch."""
    if value == "epoch":
        return epoch_steps
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"--checkpointing_steps {value} is neither the word epoch nor a number of steps from 1 on.")
    return int(value)

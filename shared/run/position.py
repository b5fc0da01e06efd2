# SPDX-License-Identifier: Apache-2.0
"""Count global steps, and say what is due at each."""

from ..config import RunConfig
from ..errors import UserError


class Position:
    """A run's position: `step` counts the finished global batches, `last_step` is where this start ends."""

    def __init__(self, run_config: RunConfig, steps_per_epoch: int, epochs: int):
        """Raises UserError for an invalid --checkpointing_steps."""
        self.epoch_steps, self.total_steps = steps_per_epoch, steps_per_epoch * epochs
        self.last_step = min(self.total_steps, run_config.max_steps or self.total_steps)
        self.checkpoint_steps = checkpoint_steps(run_config.checkpointing_steps, steps_per_epoch)
        self.logging_steps = run_config.logging_steps
        self.step = self.first_step = 0
        self.interrupted = ""  # or the reason, the same one on every process

    @property
    def epoch(self) -> int:
        """Return the number of the last step's epoch, counted from 0."""
        return (self.step - 1) // self.epoch_steps

    @property
    def at_epoch_end(self) -> bool:
        return self.step % self.epoch_steps == 0

    @property
    def stopping(self) -> bool:
        return self.step >= self.last_step or bool(self.interrupted)

    @property
    def will_log(self) -> bool:
        """Return whether the step being computed gets a line in metrics.jsonl."""
        return (self.step + 1) % self.logging_steps == 0 or self.step + 1 >= self.last_step

    @property
    def evaluation_due(self) -> bool:
        """Return whether an epoch or the run ends here: an interruption within an epoch leaves no trace in metrics."""
        return self.at_epoch_end or self.step >= self.last_step

    @property
    def checkpoint_due(self) -> bool:
        """Return whether a save is due within an epoch. At its end the evaluation comes first: a resume cannot skip
        it."""
        return not (self.stopping or self.at_epoch_end) and self.step % self.checkpoint_steps == 0


def checkpoint_steps(value: str, epoch_steps: int) -> int:
    """Return the steps between two checkpoints; raises UserError for what is neither a number nor the word epoch."""
    if value == "epoch":
        return epoch_steps
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"--checkpointing_steps {value} is neither the word epoch nor 1 or more steps. Change it.")
    return int(value)

# SPDX-License-Identifier: Apache-2.0
"""Save within a run: what goes wrong with one checkpoint is said, and the next one is tried."""

from datetime import UTC, datetime

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..checkpoint import Checkpoints, SaveError
from ..errors import UserError
from .folder import Folder
from .log import Log
from .position import Position


class Saves:
    """A run's checkpoints. Every process makes one and calls every method."""

    def __init__(self, checkpoints: Checkpoints, files: Folder, log: Log, origin: dict):
        """origin: what each manifest says of where it came from."""
        self.checkpoints, self.files, self.log, self.origin = checkpoints, files, log, origin
        self.saved_step = 0

    def save(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, state: dict, metric: dict, at_end: bool
    ) -> None:
        """Write a checkpoint of state["step"]. metric: what its manifest says of the evaluation.

        Raises UserError where it cannot be written and the run is at its end.
        """
        self.say_unsaved(self.checkpoints.wait())
        try:
            self.checkpoints.agreed(self.log.metrics.to_disk, on_main=True)
            manifest = {"saved": datetime.now(UTC).isoformat(timespec="seconds"), **self.origin, **metric}
            self.checkpoints.save(model, optimizer, scheduler, state, manifest)
            if at_end and (error := self.checkpoints.wait()):
                raise error
            self.saved_step = state["step"]
        except SaveError as error:
            if at_end:
                line = f"no checkpoint of step {state['step']}: {error}; {self._newest()}. Start again."
                raise UserError(line) from error
            self.say_unsaved(error)

    def say_unsaved(self, error: SaveError | None) -> None:
        if error:
            line = f"warning: no checkpoint: {error}; {self._newest()}; training goes on, the next comes as planned"
            self.log.say(line)

    def check_interrupted(self, position: Position) -> None:
        """Raise UserError where a run ends before its time without a checkpoint: it is not one to resume."""
        if position.interrupted and self.saved_step != position.step:
            raise UserError(f"interrupted at step {position.step}, and this recipe keeps no checkpoints. Start again.")

    @property
    def reserve(self) -> float:
        """Seconds that a last save may take: it waits for the one in the background that is at work then."""
        return self.checkpoints.seconds * (1 + self.checkpoints.background)

    def _newest(self) -> str:
        newest = self.files.newest_checkpoint
        return f"the newest one is {newest}" if newest else "there is none yet"

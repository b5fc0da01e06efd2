# SPDX-License-Identifier: Apache-2.0
"""Sum the losses and samples of a step's micro-batches, on this process and over all."""

import torch
from accelerate import Accelerator
from torch import Tensor

from ..collectives import all_reduce_sum
from ..contracts import Batch


class Tally:
    """The sums of a global step: loss, samples and their digest; and of the epoch so far: rejected samples."""

    def __init__(self):
        self.rejected = 0
        self.end_step(at_epoch_end=False)

    def end_step(self, at_epoch_end: bool) -> None:
        self.losses: list[Tensor] = []  # each a micro-batch's share of the step's loss, a scalar on the device
        self.samples: list[Tensor] = []
        self.digest = 0
        self.rejected *= not at_epoch_end

    def add(self, batch: Batch, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        self.samples.append(batch.indices)
        self.digest += batch.digest
        self.rejected += len(batch.rejected)

    def loss(self) -> float:
        """Return this process's share of the step's loss; waits for the device."""
        return torch.stack(self.losses).sum().item()

    def over_all(self, accelerator: Accelerator, wait_seconds: float) -> tuple[float, str, float, int]:
        """Return loss, digest, seconds of waiting and rejected samples, summed over the data-parallel processes."""
        # The digest in two halves: float64 adds 32-bit numbers exactly.
        halves = [self.digest >> 32 & 0xFFFFFFFF, self.digest & 0xFFFFFFFF]
        sums = all_reduce_sum(accelerator, [self.loss(), *halves, wait_seconds, self.rejected])
        digest = ((int(sums[1]) << 32) + int(sums[2])) % 2**64
        return sums[0], f"{digest:016x}", sums[3], int(sums[4])

# SPDX-License-Identifier: Apache-2.0
"""Order the samples as a function of the seed.

Global step k of an epoch takes the samples [k*G, (k+1)*G) of the epoch's permutation, whatever the number of
processes, workers or accumulation steps; a process takes its slice of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .draws import random_bits
from .errors import UserError


class Blocks(NamedTuple):
    """A shuffle that reads few files at a time: the shards in a random order, then the samples of each `size` of them,
    one window after the other. The samples of a shard always meet within one window: harmless where shards were filled
    at random, as tools/pack.py does, and not where each holds one class."""

    shard: np.ndarray  # (samples,): the shard of each sample
    size: int


def micro_batch_size(config, size: int) -> int:
    """Samples per forward of one of `size` data-parallel processes.

    config holds global_batch_size and gradient_accumulation_steps. Raises UserError where they do not divide.
    """
    batch, parts = config.global_batch_size, size * config.gradient_accumulation_steps
    if batch % parts:
        near = (batch // parts * parts, -(-batch // parts) * parts)
        raise UserError(
            f"--global_batch_size {batch} does not divide by {size} data-parallel processes x "
            f"{config.gradient_accumulation_steps} accumulation steps. "
            f"Give {' or '.join(str(value) for value in near if value)}."
        )
    return batch // parts


class TrainingOrder:
    """A batch sampler: yields this process's micro-batches, as lists of (epoch, sample index), from `step` to the end
    of its epoch.

    Raises UserError where an epoch would hold no whole global batch.
    """

    def __init__(
        self,
        samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        size: int,
        seed: int,
        blocks: Blocks | None = None,
        weights: np.ndarray | None = None,
    ):
        """rank, size: data-parallel. weights: (samples,), each one's in a step's loss, such as its counted tokens;
        None is 1 each."""
        if samples < global_batch_size:
            raise UserError(
                f"{samples} training images do not fill one global batch. "
                f"Give --global_batch_size {samples} or less (it is {global_batch_size})."
            )
        self.samples, self.global_batch_size, self.micro_batch_size = samples, global_batch_size, micro_batch_size
        self.share = global_batch_size // size
        self.first = rank * self.share
        self.seed, self.blocks, self.weights = seed, blocks, weights
        self.step = 0
        self.drawn: tuple[int, np.ndarray] | None = None  # the last epoch's permutation

    @property
    def steps_per_epoch(self) -> int:
        """The incomplete global batch at the end of an epoch is dropped."""
        return self.samples // self.global_batch_size

    @property
    def parts(self) -> int:
        """Micro-batches of a global step, over accumulation and data-parallel processes."""
        return self.global_batch_size // self.micro_batch_size

    def step_weight(self, step: int) -> float:
        """Return W, the sum of the weights of a global step's samples."""
        if self.weights is None:
            return float(self.global_batch_size)
        epoch, number = divmod(step, self.steps_per_epoch)
        if self.drawn is None or self.drawn[0] != epoch:
            self.drawn = epoch, self.permutation(epoch)
        begin = number * self.global_batch_size
        return float(self.weights[self.drawn[1][begin : begin + self.global_batch_size]].sum())

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.step % self.steps_per_epoch) * (self.share // self.micro_batch_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """(samples,): the order in which an epoch takes the samples; its last, incomplete global batch included."""
        draws = random_bits(self.samples, self.seed, epoch)
        if self.blocks is None:
            return np.argsort(draws, kind="stable")
        shard, size = self.blocks
        place = np.argsort(np.argsort(random_bits(int(shard.max()) + 1, self.seed, epoch, 1), kind="stable"))
        return np.lexsort((draws, place[shard] // size))

    def following(self, epoch: int, index: int) -> Iterator[int]:
        """The samples that may take the place of one that is rejected: what follows it in the epoch's order, on any
        topology."""
        permutation = self.permutation(epoch)
        (place,) = np.flatnonzero(permutation == index)
        yield from np.roll(permutation, -place)[1:].tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = divmod(self.step, self.steps_per_epoch)
        permutation = self.permutation(epoch)
        for begin in range(
            step * self.global_batch_size, self.steps_per_epoch * self.global_batch_size, self.global_batch_size
        ):
            mine = permutation[begin + self.first : begin + self.first + self.share].tolist()
            for offset in range(0, self.share, self.micro_batch_size):
                yield [(epoch, index) for index in mine[offset : offset + self.micro_batch_size]]


class EvaluationOrder:
    """A batch sampler over every sample once. All processes yield equally many full batches, or a collective in the
    forward would wait for ever: index -1 pads the last ones."""

    def __init__(self, samples: int, batch_size: int, rank: int, size: int):
        self.samples, self.micro_batch_size, self.rank, self.size = samples, batch_size, rank, size

    def following(self, epoch: int, index: int) -> Iterator[int]:
        """A rejected sample is left out."""
        return iter(())

    def __len__(self) -> int:
        return -(-self.samples // (self.micro_batch_size * self.size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(len(self)):
            first = (batch * self.size + self.rank) * self.micro_batch_size
            yield [(0, index if index < self.samples else -1) for index in range(first, first + self.micro_batch_size)]

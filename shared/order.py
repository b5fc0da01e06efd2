# SPDX-License-Identifier: Apache-2.0
"""Order the samples as a function of the seed.

Global step k of an epoch takes the samples [k*G, (k+1)*G) of the epoch's permutation, whatever the number of
processes, workers or accumulation steps; each process takes its slice of them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .draws import random_bits
from .errors import UserError


class Blocks(NamedTuple):
    """A shuffle that reads few files at a time: the shards in random order, then the samples of each `size` shards
    together. Harmless where shards were filled at random, as by tools/pack.py; harmful where each holds one class."""

    shard: np.ndarray  # (samples,): each sample's shard
    size: int


def micro_batch_size(config, size: int) -> int:
    """Return the number of samples in one forward of each of `size` data-parallel processes.

    config holds global_batch_size and gradient_accumulation_steps. Raises UserError where the batch does not divide.
    """
    batch, parts = config.global_batch_size, size * config.gradient_accumulation_steps
    if batch % parts:
        near = " or ".join(str(value) for value in (batch // parts * parts, -(-batch // parts) * parts) if value)
        raise UserError(
            f"--global_batch_size {batch} does not divide by {size} data-parallel processes x "
            f"{config.gradient_accumulation_steps} accumulation steps. Give {near}."
        )
    return batch // parts


class TrainingOrder:
    """A batch sampler that yields this process's micro-batches, lists of (epoch, sample index), from `step` to the
    end of its epoch. Raises UserError where there are fewer samples than one global batch."""

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
        repeats: int = 1,
    ):
        """rank, size: as collectives.data_parallel returns them. weights: (samples,), of each sample in a step's
        loss, such as its number of tokens; None is 1 each. repeats: how often a step has each sample (Hoffer et al.,
        arXiv:1901.09335), each time under an epoch number of its own, which decides its augmentation."""
        if samples < global_batch_size:
            remedy = f"Give --global_batch_size {samples} or less (it is {global_batch_size})."
            raise UserError(f"{samples} training samples do not fill one global batch. {remedy}")
        if global_batch_size % repeats:
            raise UserError(f"--repeats {repeats} does not divide --global_batch_size {global_batch_size}. Change it.")
        self.samples, self.global_batch_size, self.micro_batch_size = samples, global_batch_size, micro_batch_size
        self.repeats, self.different = repeats, global_batch_size // repeats  # samples of a step
        self.share, self.first = global_batch_size // size, rank * (global_batch_size // size)
        self.seed, self.blocks, self.weights = seed, blocks, weights
        self.step = 0
        self.drawn: tuple[int, np.ndarray] | None = None  # the epoch and permutation that step_weight drew last

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of whole global batches; an incomplete last one is dropped."""
        return self.samples // self.global_batch_size

    @property
    def parts(self) -> int:
        """Return the number of micro-batches in a global step, over accumulation and data-parallel processes."""
        return self.global_batch_size // self.micro_batch_size

    def step_weight(self, step: int) -> float:
        """Return W, the sum of the weights of a global step's samples."""
        if self.weights is None:
            return float(self.global_batch_size)
        epoch, number = divmod(step, self.steps_per_epoch)
        if self.drawn is None or self.drawn[0] != epoch:
            self.drawn = epoch, self.permutation(epoch)
        samples = self.drawn[1][number * self.different : (number + 1) * self.different]
        return float(self.weights[samples].sum()) * self.repeats

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.step % self.steps_per_epoch) * (self.share // self.micro_batch_size)

    def permutation(self, epoch: int) -> np.ndarray:
        """Return (samples,): the order of an epoch, including its incomplete last batch."""
        draws = random_bits(self.samples, self.seed, epoch)
        if self.blocks is None:
            return np.argsort(draws, kind="stable")
        shard, size = self.blocks
        place = np.argsort(np.argsort(random_bits(int(shard.max()) + 1, self.seed, epoch, 1), kind="stable"))
        return np.lexsort((draws, place[shard] // size))

    def following(self, epoch: int, index: int) -> Iterator[int]:
        """Yield what may replace a rejected sample: those after it in the epoch's order, the same on any topology."""
        permutation = self.permutation(epoch // self.repeats)
        (place,) = np.flatnonzero(permutation == index)
        yield from np.roll(permutation, -place)[1:].tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, step = divmod(self.step, self.steps_per_epoch)
        permutation = self.permutation(epoch)
        for number in range(step, self.steps_per_epoch):
            samples = permutation[number * self.different : (number + 1) * self.different].tolist()
            for first in range(self.first, self.first + self.share, self.micro_batch_size):
                places = (divmod(place, self.different) for place in range(first, first + self.micro_batch_size))
                yield [(epoch * self.repeats + copy, samples[place]) for copy, place in places]


class EvaluationOrder:
    """A batch sampler over every sample once. Index -1 pads the last batches, so that all processes yield equally
    many full ones: a collective in the forward would wait forever otherwise."""

    def __init__(self, samples: int, batch_size: int, rank: int, size: int):
        self.samples, self.micro_batch_size, self.rank, self.size = samples, batch_size, rank, size

    def following(self, epoch: int, index: int) -> Iterator[int]:
        """Yield nothing: a rejected sample is left out."""
        return iter(())

    def __len__(self) -> int:
        return -(-self.samples // (self.micro_batch_size * self.size))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in range(len(self)):
            first = (batch * self.size + self.rank) * self.micro_batch_size
            yield [(0, index if index < self.samples else -1) for index in range(first, first + self.micro_batch_size)]

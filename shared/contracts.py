# SPDX-License-Identifier: Apache-2.0
"""What a modality, images or text, gives to the loop, to `Run` and to the checkpoints: a loader of batches.

The order (order.py) decides which samples a step takes, the metric (metrics.py) what is better.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from .order import EvaluationOrder, TrainingOrder


class Description(NamedTuple):
    """What a loader says of its part of the data, for the run's first lines, its identity and config.json."""

    unit: str  # of what is counted: images, or sequences
    samples: int
    fingerprint: str  # of the samples' content and names
    summary: str  # such as: 1,437 images, 10 classes, 8 x 8 pixels
    notes: tuple[str, ...]  # more lines, of which the first says what the network sees
    identity: dict  # what a resume must find unchanged, such as the class names in their order
    record: dict  # what else config.json says, such as the decoder


class Batch(Protocol):
    """One micro-batch: the model's inputs, and what the run counts.

    A step's loss is the sum of its samples' losses over `step_weight`. Each process gives `backward` its own sum over
    step_weight, times `parts`: that undoes the means which accumulation and replicas take.
    """

    indices: Tensor  # (B,) int64 on the host: which samples these are; -1 is none
    seeds: Tensor  # (B,) int64: each sample's augmentation seed, from which the model may draw as well
    digest: int  # of indices and seeds; those of disjoint parts add up
    rejected: tuple[str, ...]  # samples that could not be used, each with the reason
    wait_seconds: float  # that the training loop stood still for this batch
    step_weight: float  # W: of the whole global step; images weigh 1 each, text counts tokens
    parts: int  # micro-batches of a global step, over accumulation and data-parallel processes


class Loader(Protocol):
    """Batches on the device, of this process's share of each step."""

    order: TrainingOrder | EvaluationOrder
    rejects: str  # what a rejected sample is called in metrics.jsonl: undecodable

    def starting_at(self, step: int) -> "Loader":
        """Iterate next from this global step to the end of its epoch."""

    def __iter__(self) -> Iterator[Batch]: ...

    def describe(self) -> Description:
        """Rank 0 calls it once, before the first batch."""

    def check_rejected(self, rejected: int, samples: int) -> None:
        """Raise UserError where so many of the samples are too many."""

    def on_wait(self, noted) -> None:
        """Take a function that gives the reason to stop, or an empty string: for waits between two batches."""

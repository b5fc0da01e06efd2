# SPDX-License-Identifier: Apache-2.0
"""Say what a modality, images or text, gives to the loop, to `Run` and to the checkpoints: a loader of batches.

The order (order.py) decides which samples a step takes, the metric (metrics.py) what is better.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from .order import EvaluationOrder, TrainingOrder


class Description(NamedTuple):
    """A loader's words on its part of the data, for the run's first lines, its identity and config.json."""

    unit: str  # of what is counted: images, or sequences
    samples: int
    fingerprint: str  # of the samples' content and names
    summary: str  # such as: 1,437 images, 10 classes, 8 x 8 pixels
    notes: tuple[str, ...]  # more lines, of which the first says what the network sees
    identity: dict  # what a resume must find unchanged, such as the class names in their order
    record: dict  # what else config.json says, such as the decoder


class Batch(Protocol):
    """One micro-batch: the model's inputs, and what the run counts. A step's loss is the sum of its samples' losses
    over step_weight; `backward` takes this process's share times parts, which undoes the means of accumulation and
    replicas."""

    indices: Tensor  # (B,) int64 on the host: which samples these are; -1 is none
    seeds: Tensor  # (B,) int64: each sample's augmentation seed, from which the model may draw as well
    digest: int  # of indices and seeds; those of disjoint parts add up
    rejected: tuple[str, ...]  # samples that could not be used, each with the reason
    wait_seconds: float  # that the training loop stood still for this batch
    step_weight: float  # W: of the whole global step; images weigh 1 each, text counts tokens
    parts: int  # micro-batches of a global step, over accumulation and data-parallel processes


class Loader(Protocol):
    """Batches of this process's share of each step, on the device. `starting_at(step)` lets it iterate from there."""

    order: TrainingOrder | EvaluationOrder
    rejects: str  # what a rejected sample is called in metrics.jsonl: undecodable
    noted: Callable[[], str]  # set by the run: the reason to stop, or an empty string, for waits between two batches
    starting_at: Callable[[int], "Loader"]
    describe: Callable[[], Description]  # rank 0 calls it once, before the first batch
    compare: Callable[[dict], str]  # of a former config.json: a line on what differs, or an empty string
    check_rejected: Callable[[int, int], None]  # raises UserError where so many of the samples are too many

    def __iter__(self) -> Iterator[Batch]: ...

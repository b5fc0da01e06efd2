# SPDX-License-Identifier: Apache-2.0
"""Define what the loop, `Run` and the checkpoints expect of a modality (images, text): a loader of batches."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from torch import Tensor

from .order import EvaluationOrder, TrainingOrder


class Description(NamedTuple):
    """A loader's description of its part of the data, for the run's first lines, its identity and config.json."""

    unit: str  # what is counted: images, or sequences
    samples: int
    fingerprint: str  # a hash of the samples' content and names
    summary: str  # such as: 1,437 images, 10 classes, 8 x 8 pixels
    notes: tuple[str, ...]  # more lines; the first says what the network sees
    identity: dict  # what a resume must find unchanged, such as the class names in their order
    record: dict  # further entries of config.json, such as the decoder
    files: tuple[tuple[str, str], ...] = ()  # (name, text) for the run's folder, such as the tokenizer


class Batch(Protocol):
    """One micro-batch: the model's inputs, and what the run counts. A step's loss is the sum of its samples' losses
    divided by step_weight; `backward` takes this process's share times parts, which undoes the averaging over
    accumulation steps and data-parallel processes."""

    indices: Tensor  # (B,) int64 on the host: which samples these are; -1 for none
    seeds: Tensor  # (B,) int64: each sample's augmentation seed; the model may draw from it too
    digest: int  # a hash of indices and seeds; digests of disjoint parts add up
    rejected: tuple[str, ...]  # samples that could not be used, each with the reason
    wait_seconds: float  # how long the training loop waited for this batch
    step_weight: float  # W, the weight of the whole global step: an image weighs 1, text counts tokens
    parts: int  # micro-batches of a global step, over accumulation and data-parallel processes


class Loader(Protocol):
    """Batches of this process's share of each step, on the device, from the step given to `starting_at`."""

    order: TrainingOrder | EvaluationOrder
    rejects: str  # the name of rejected samples in metrics.jsonl, such as undecodable
    noted: Callable[[], str]  # set by the run, called while waiting for a batch: returns the reason to stop, or ""
    starting_at: Callable[[int], "Loader"]
    describe: Callable[[], Description]  # called once, by rank 0, before the first batch
    check_rejected: Callable[[int, int], None]  # (rejected, samples): raises UserError where they are too many

    def __iter__(self) -> Iterator[Batch]: ...

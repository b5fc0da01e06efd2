# SPDX-License-Identifier: Apache-2.0
"""Decode in worker processes, cross to the device as uint8, normalise there.

The loaders are already this process's own: they must not go through `accelerator.prepare`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .order import EvaluationOrder, TrainingOrder, augmentation_seed, digest
from .sources import Source

# Mean and standard deviation of ImageNet's pixels, of [0, 255].
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

View = Callable[[Image.Image, int, int], Image.Image]


class Batch(NamedTuple):
    """One micro-batch of B samples. From a worker: images (B, H, W, 3) uint8. From a Loader: (B, 3, H, W) float,
    normalised, on the device."""

    images: Tensor
    labels: Tensor
    valid: Tensor  # (B,) bool: False where a sample only pads an evaluation batch
    seeds: Tensor  # (B,) int64: each sample's augmentation seed, from which the model may draw as well
    digest: int  # of sample indices and augmentation seeds, see order.digest
    wait_seconds: float = 0.0  # that the training loop stood still for this batch


@dataclass(frozen=True)
class Views(Dataset):
    """The images of a source as the network sees them; indexed by (epoch, sample index), a batch at a time."""

    source: Source
    view: View
    image_size: int
    seed: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, samples: list[tuple[int, int]]) -> Batch:
        indices = [index for _, index in samples]
        seeds = [augmentation_seed(self.seed, epoch, index) for epoch, index in samples]
        valid = np.array(indices) >= 0
        images = np.zeros((len(samples), self.image_size, self.image_size, 3), dtype=np.uint8)
        for row in np.flatnonzero(valid):
            images[row] = self.view(self.source.image(indices[row]), self.image_size, seeds[row])
        labels = np.where(valid, self.source.labels[indices], 0)
        signed = np.array(seeds, dtype=np.uint64).view(np.int64)
        tensors = (torch.from_numpy(array) for array in (images, labels, valid, signed))
        return Batch(*tensors, digest=digest(indices, seeds))


class Loader:
    """Batches on the device; for training, from any global step to the end of that step's epoch."""

    def __init__(
        self,
        dataset: Views,
        order: TrainingOrder | EvaluationOrder,
        device: torch.device,
        num_workers: int,
        memory_format: torch.memory_format = torch.contiguous_format,
        statistics: tuple[list[float], list[float]] | None = None,
    ):
        """statistics: mean and standard deviation of each channel, of [0, 255]; None is ImageNet's."""
        self.dataset, self.order, self.device, self.memory_format = dataset, order, device, memory_format
        self.mean, self.std = (
            torch.tensor(value, device=device).view(1, 3, 1, 1) for value in statistics or (MEAN, STD)
        )
        self.loader = DataLoader(
            dataset,
            batch_sampler=order,
            collate_fn=_as_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=device.type == "cuda",
            # Its own: a draw from the global state would make initial weights depend on the number of workers.
            generator=torch.Generator(),
            # Forked workers start at once; Python 3.14's default imports torch anew in each.
            multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        )
        if num_workers:
            # Workers start now, while no other thread computes: a lock that one held would stay locked in a fork.
            iter(self.loader)

    def __len__(self) -> int:
        return len(self.order)

    def starting_at(self, step: int) -> "Loader":
        """Iterate next from this global step on; what came before is not decoded."""
        self.order.step = step
        return self

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            yield self._to_device(batch)._replace(wait_seconds=time.perf_counter() - begin)

    def _to_device(self, batch: Batch) -> Batch:
        images, labels, valid, seeds = (tensor.to(self.device, non_blocking=True) for tensor in batch[:4])
        # (B, H, W, 3) seen as (B, 3, H, W) is channels-last already: that layout costs no copy.
        images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=self.memory_format)
        images = images.sub_(self.mean).div_(self.std)
        return batch._replace(images=images, labels=labels, valid=valid, seeds=seeds)


def _as_is(batch: Batch) -> Batch:
    return batch

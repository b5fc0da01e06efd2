# SPDX-License-Identifier: Apache-2.0
"""Shards read from end to end by any number of readers, so that each global step has the same images.

The epoch's shards, in an order drawn from the seed, are cut at any image into equal pieces, one for each of a fixed
number of streams. Each stream gives an equal share of every global batch; processes and their workers divide the
streams. (MosaicML's streaming keeps an order on any number of GPUs by such canonical readers.)
"""

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..config import UserError
from .loaders import Batch, Candidate, Views, shared_number, start_workers, worker_options
from .order import TrainingOrder, hash64, random_bits
from .sources import Source

# (sample index, what reads it) of each image of a source in some shards, from their first byte to their last.
Images = Iterator[tuple[int, Callable[[], bytes]]]


class Streams(IterableDataset):
    """Parts of batches: what one reader, a worker or a process without workers, makes of its streams."""

    def __init__(
        self,
        views: Views,
        rank: int,
        size: int,
        num_workers: int,
        num_streams: int,
        read_shards: Callable[[Source, Iterable[int]], Images],
        shuffle: Callable[[Iterator, random.Random], Iterator],
    ):
        """Raises UserError where the streams do not divide among the readers, or the batch among the streams."""
        self.views, self.order, self.num_streams = views, views.order, num_streams
        self.read_shards, self.shuffle = read_shards, shuffle
        workers = max(1, num_workers)
        self.readers, self.first = size * workers, rank * workers
        self.step = shared_number(num_workers)  # set by the process, seen by its workers
        index = getattr(views.source.images, "index", None)
        if index is None:
            raise UserError("--data has no tar shards, which streams read. Pack it: python tools/pack.py --help.")
        self.counts = np.bincount(index.shard, minlength=len(index.shards))  # images of each shard
        if isinstance(self.order, TrainingOrder):
            self._check(size, workers)

    def _check(self, size: int, workers: int) -> None:
        if self.order.blocks is not None:
            raise UserError("--shuffle_block has no use: streams shuffle what lies together. Leave it out.")
        if len(self.counts) < self.readers:
            raise UserError(
                f"{len(self.counts)} shards are fewer than {size} processes x {workers} workers, which read each its "
                "own. Pack with a smaller --shard_size, or give fewer --num_workers."
            )
        if self.num_streams % self.readers:
            raise UserError(
                f"--num_streams {self.num_streams} does not divide among {size} processes x {workers} workers. "
                f"Give a multiple of {self.readers}; with it the order of the images changes."
            )
        micro_step = self.order.micro_batch_size * size
        if micro_step % self.num_streams:
            raise UserError(
                f"--num_streams {self.num_streams} does not divide the {micro_step} images of a micro-step (global "
                "batch over the accumulation steps). Change one of them."
            )

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        reader = self.first + (worker.id if worker else 0)
        return self._train(reader) if isinstance(self.order, TrainingOrder) else self._evaluate(reader)

    def _train(self, reader: int) -> Iterator[Batch]:
        """Equally many images of each of the reader's streams, from the step on."""
        order = self.order
        epoch, step = divmod(int(self.step), order.steps_per_epoch)
        share = order.global_batch_size // self.num_streams
        numbers = range(reader, self.num_streams, self.readers)
        streams = [_places(itertools.islice(self._stream(epoch, number), step * share, None)) for number in numbers]
        micro_steps = order.share // order.micro_batch_size
        for _ in range((order.steps_per_epoch - step) * micro_steps):
            yield self.views.fill([next(places) for places in streams for _ in range(share // micro_steps)])

    def _stream(self, epoch: int, number: int) -> Iterator[Candidate]:
        """The shuffled piece of one stream, then the images that lie behind it."""
        views = self.views
        shards = np.argsort(random_bits(len(self.counts), views.seed, epoch), kind="stable")
        ends = np.cumsum(self.counts[shards])
        length = views.order.steps_per_epoch * views.order.global_batch_size // self.num_streams
        first = int(np.searchsorted(ends, number * length, side="right"))  # the shard in which the piece begins
        skipped = int(number * length - (ends[first] - self.counts[shards[first]]))
        images = self.read_shards(views.source, np.roll(shards, -first).tolist())
        candidates = (Candidate(epoch, *image) for image in itertools.islice(images, skipped, None))
        rng = random.Random(hash64(views.seed, epoch, number))
        yield from self.shuffle(itertools.islice(candidates, length), rng)
        yield from candidates

    def _evaluate(self, reader: int) -> Iterator[Batch]:
        """The reader's shards, each image once; then empty places, until every reader is done."""
        size = -(-self.order.batch_size * self.order.size // self.readers)
        batches = max(-(-int(self.counts[first :: self.readers].sum()) // size) for first in range(self.readers))
        images = self.read_shards(self.views.source, range(reader, len(self.counts), self.readers))
        candidates = (Candidate(0, *image) for image in images)
        for _ in range(batches):
            yield self.views.fill([itertools.islice(candidates, 1) for _ in range(size)])


def _places(stream: Iterator[Candidate]) -> Iterator[Iterator[Candidate]]:
    """For each image of a stream the candidates for its place: itself and, should it be torn, those that follow."""
    (stream,) = itertools.tee(stream, 1)
    while True:
        ahead = copy.copy(stream)  # reads on from here, while the stream stays where it is
        others = (other._replace(counts=False) for other in itertools.islice(ahead, 1, None))
        yield itertools.chain([next(stream)], others)


class _Joined:
    """Whole batches on the device, from the parts of this process's readers."""

    def __init__(self, streams: Streams, num_workers: int, device: torch.device):
        self.streams, self.workers, self.device = streams, max(1, num_workers), device
        self.parts = DataLoader(streams, batch_size=None, **worker_options(num_workers, device))
        start_workers(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        self.streams.step.fill_(getattr(self.streams.order, "step", 0))
        parts = iter(self.parts)
        for batch in zip(*[parts] * self.workers, strict=True):
            columns = list(zip(*batch, strict=True))
            tensors = (torch.cat([part.to(self.device, non_blocking=True) for part in parts]) for parts in columns[:5])
            indices = torch.cat(columns[8])
            yield Batch(*tensors, digest=sum(columns[5]), torn=sum(columns[6], ()), indices=indices)


def read_streams(
    views: Views,
    num_workers: int,
    device: torch.device,
    rank: int,
    size: int,
    num_streams: int,
    read_shards: Callable[[Source, Iterable[int]], Images],
    shuffle: Callable[[Iterator, random.Random], Iterator],
) -> Iterable[Batch]:
    """Batches of the streams, for a Loader's `read`.

    read_shards: gives the images of a source in shards of these numbers. shuffle: gives the items of an iterator in
    another order, by what it draws from the random state alone. rank, size: data-parallel.
    """
    return _Joined(Streams(views, rank, size, num_workers, num_streams, read_shards, shuffle), num_workers, device)

# SPDX-License-Identifier: Apache-2.0
"""Decode in worker processes, send batches to the device as uint8, and normalise them there.

Each loader already has only this process's share: it must not go through `accelerator.prepare`.
"""

import atexit
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..collectives import data_parallel
from ..config import RunConfig
from ..contracts import Description
from ..draws import augmentation_seed, digest
from ..errors import UserError, say
from ..launch import rank
from ..lifetime import end_workers, ignore_signals, one_line
from ..metrics import IGNORED
from ..order import EvaluationOrder, TrainingOrder, micro_batch_size
from .augment import augment
from .decode import View, decoder, render
from .description import describe
from .native import library
from .settings import ImageConfig
from .sources import Source
from .views import evaluation_view, training_view

# Mean and standard deviation of ImageNet's pixels, in [0, 255].
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
PREFETCH = 2  # batches that each worker has ready: PyTorch's own default
MOST_TRIES = 2000  # undecodable images in a row, as many as a lost shard of tools/pack.py holds
SLOT_ALIGNMENT = 64  # bytes
LIMIT = 600  # seconds without a batch, as long as NCCL waits for its peers
PATIENCE = 20  # seconds without a batch once the run is to stop: torchrun's workers are killed after 30


class Batch(NamedTuple):
    """One micro-batch of B samples. From a worker: images (B, H, W, 3) uint8. From a Loader: (B, 3, H, W) float,
    normalised, on the device."""

    images: Tensor
    labels: Tensor
    valid: Tensor  # (B,) bool: False where a sample only pads an evaluation batch
    seeds: Tensor  # (B,) int64: each sample's augmentation seed, from which the model may draw as well
    mirrored: Tensor  # (B,) bool: which images a Loader has yet to mirror, on the device
    digest: int  # of sample indices and augmentation seeds, see draws.digest
    rejected: tuple[str, ...] = ()  # images that could not be decoded, each with the reason
    wait_seconds: float = 0.0  # that the training loop waited for this batch
    indices: Tensor = torch.empty(0, dtype=torch.int64)  # (B,): which samples these are, on the host; -1 is none
    step_weight: float = 0.0  # W: images of the global step, each of weight 1 (contracts.py)
    parts: int = 1  # micro-batches of the global step, on all data-parallel processes
    keys: Tensor = torch.empty(0, dtype=torch.int64)  # seeds, on the host


class _Whole(Batch):
    """A batch in one piece of memory, as a worker sends it: sending each tensor by itself would cost 0.5 ms."""

    def __reduce__(self):
        if _slots.memory is None:
            return Batch, tuple(self)
        where = _slots.key, self.images.storage_offset(), *self.images.shape[:2]
        return _received, (*where, self.digest, self.rejected)


SMALL = 3 * 8 + 2  # bytes of a sample's five numbers


def _whole(small: Tensor, images: Tensor, rows: int, digest: int = 0, rejected: tuple[str, ...] = ()) -> _Whole:
    """Return the batch whose tensors lie in these bytes."""
    numbers, flags = small.split([3 * 8 * rows, 2 * rows])
    labels, seeds, indices = numbers.view(torch.int64).split(rows)
    valid, mirrored = flags.view(torch.bool).split(rows)
    size = math.isqrt(len(images) // rows // 3)
    return _Whole(images.view(rows, size, size, 3), labels, valid, seeds, mirrored, digest, rejected, indices=indices)


def _received(key: int, offset: int, rows: int, size: int, digest: int, rejected: tuple[str, ...]) -> _Whole:
    """Return the batch whose images lie at this offset of the memory that a worker shares with its parent."""
    memory = _shared[key].view(-1)[offset - SMALL * rows : offset + rows * 3 * size**2]
    small = memory[: SMALL * rows].clone()  # the worker overwrites its memory; the Loader copies images
    return _whole(small, memory[SMALL * rows :], rows, digest, rejected)


class Candidate(NamedTuple):
    """A sample for a place in a batch."""

    epoch: int
    index: int
    read: Callable[[], bytes | np.ndarray]  # raises OSError
    counts: bool = True  # whether it counts as rejected if undecodable; a substitute counts at its own place


@dataclass(frozen=True)
class Views(Dataset):
    """The images of a source as the network sees them; indexed by (epoch, sample index), a batch at a time.

    An undecodable image is named in the batch. In training the order's next decodable sample takes its place, the same
    one on any topology; in an evaluation the place stays empty and is not counted.
    """

    source: Source
    view: View
    order: TrainingOrder | EvaluationOrder
    image_size: int
    seed: int
    max_undecodable: float = 0.0  # share of images that may be left out
    render: Callable[[bytes | np.ndarray, View, int, Tensor], bool] = render

    def __len__(self) -> int:
        return len(self.source)

    @property
    def batch_bytes(self) -> int:
        return self.order.micro_batch_size * (SMALL + 3 * self.image_size**2)

    def __getitems__(self, samples: list[tuple[int, int]]) -> Batch:
        return self.fill([self._candidates(*sample) for sample in samples])

    def _candidates(self, epoch: int, index: int) -> Iterator[Candidate]:
        images = self.source.images
        if index >= 0:
            yield Candidate(epoch, index, partial(images.__getitem__, index))
            for other in self.order.following(epoch, index):
                yield Candidate(epoch, other, partial(images.__getitem__, other), counts=False)

    def fill(self, places: Sequence[Iterator[Candidate]]) -> Batch:
        """Fill each place of a batch with the first of its candidates that can be decoded, or leave it empty.

        Raises UserError where MOST_TRIES images in a row, or all that there are, are undecodable.
        """
        rows, size = len(places), self.image_size
        batch = _whole(*_slots.take(rows * (SMALL + 3 * size**2)).tensor_split([rows * SMALL]), rows)
        labels, valid, seeds, mirrored, indices = (tensor.numpy() for tensor in (*batch[1:5], batch.indices))
        seeds = seeds.view(np.uint64)
        for array, value in ((labels, 0), (seeds, 0), (mirrored, False), (indices, -1)):
            array.fill(value)
        rejected = []
        for row, candidates in enumerate(places):
            for tries, (epoch, index, read, counts) in enumerate(candidates):
                seed = augmentation_seed(self.seed, epoch, index)
                try:
                    mirrored[row] = self._render(index, read, seed, batch.images[row])
                    indices[row], labels[row], seeds[row] = index, self.source.labels[index], seed
                    break
                except (OSError, ValueError) as error:
                    labels[row] = IGNORED
                    if counts:
                        rejected.append(f"{self.source.images.name(index)}: {error}")
                    if tries + 1 >= min(len(self), MOST_TRIES):
                        raise UserError(
                            f"{tries + 1} images in a row cannot be decoded, such as {rejected[-1]}. Fix the data."
                        ) from error
            else:
                batch.images[row] = 0
        np.greater_equal(indices, 0, out=valid)
        return batch._replace(digest=digest(indices.tolist(), seeds.tolist()), rejected=tuple(rejected))

    def _render(self, index: int, read: Callable[[], bytes | np.ndarray], seed: int, out: Tensor) -> bool:
        if self.source.labels[index] < 0:
            raise ValueError("it has no label, or one that names no class")
        return self.render(read(), self.view, seed, out)


def build_views(accelerator: Accelerator, run_config: RunConfig, images: ImageConfig, config, sources) -> list[Views]:
    """Return this process's share of the training and of the held-out images, as the network sees them.

    sources: training, held-out. config: a recipe's own, with global_batch_size and gradient_accumulation_steps. Raises
    UserError where the batch does not divide among the processes.
    """
    seed, share = run_config.seed, data_parallel(accelerator)
    train, held_out = sources[0].first(images.train_images, seed), sources[1]
    batch, repeats = micro_batch_size(config, share[1]), getattr(images, "repeats", 1)
    orders = (
        TrainingOrder(len(train), config.global_batch_size, batch, *share, seed, train.blocks, repeats=repeats),
        EvaluationOrder(len(held_out), batch, *share),
    )
    views = (
        partial(training_view, min_crop_area=images.min_crop_area, horizontal_flip=images.horizontal_flip),
        partial(evaluation_view, eval_crop_ratio=images.eval_crop_ratio),
    )
    parts = zip((train, held_out), views, orders, strict=True)
    return [Views(*part, images.image_size, seed, images.max_undecodable) for part in parts]


class _Slots:
    """A worker's slots in the memory that it shares with its parent, filled in turn. New memory would cost a page
    fault for every 4 KiB of each batch, and half a millisecond to send."""

    def __init__(self, key: int = 0, memory: Tensor | None = None, used: Tensor | None = None):
        """memory: (slots, bytes), the parent's _shared[key]. used: (), shared: the parent has used all batches
        below this number; None: it has used all but the last ones."""
        self.key, self.memory, self.used = key, memory, used
        self.holds = [-1] * (0 if memory is None else len(memory))  # numbers of batches
        self.batch, self.slot = -1, 0  # what is being written, and where

    def take(self, size: int) -> Tensor:
        """Return `size` bytes: in a worker, of its next slot, once the batch there is used; else new memory."""
        if self.memory is None:
            return torch.empty(size, dtype=torch.uint8)
        self.slot = (self.slot + 1) % len(self.memory)
        while self.used is not None and self.holds[self.slot] >= self.used:
            if not multiprocessing.parent_process().is_alive():
                os._exit(1)
            time.sleep(0.001)
        self.holds[self.slot] = self.batch
        return self.memory[self.slot, :size]


_slots = _Slots()
_shared: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()  # by address, while a loader lives


def _shared_memory(*shape: int) -> Tensor:
    """Return a uint8 tensor of this shape in memory that workers share."""
    try:
        memory = torch.UntypedStorage._new_shared(math.prod(shape))
    except RuntimeError as error:
        raise UserError(
            f"loader workers get no {math.prod(shape)} bytes of /dev/shm: {str(error).splitlines()[0]}. Give fewer "
            "--num_workers (0 needs none), a smaller batch or --image_size, or the container more of it (docker "
            "--shm-size)."
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(memory).view(shape)


def shared_number(num_workers: int) -> Tensor:
    """Return a number, 0 at first, whose changes workers see."""
    return _shared_memory(8).view(torch.int64)[0] if num_workers else torch.zeros((), dtype=torch.int64)


def _begin_worker(key: int, memory: Tensor, used: Tensor | None, parent: int, worker: int) -> None:
    """Prepare a worker process of a DataLoader. memory: (workers, slots, bytes)."""
    _slots.__init__(key, memory[worker], used)
    ignore_signals()
    if os.getppid() != parent:  # the parent is gone; torch, from now on, would watch another process instead
        os._exit(1)


def worker_options(
    views: Views, num_workers: int, device: torch.device, prefetch_factor: int = PREFETCH, used: Tensor | None = None
) -> dict:
    """Return the options of every DataLoader here; raises UserError where workers could not send their batches.

    used: see _Slots; without it, a worker's batch is valid until its next but one.
    """
    begin = None
    if num_workers:
        # Runs before multiprocessing waits for the workers: it sends SIGTERM, which they ignore. Two calls do no harm.
        atexit.unregister(end_workers)
        atexit.register(end_workers)
        # Besides the ready batches, one is in use and one is being written; out of order, as many again wait.
        slots = (1 if used is None else 2) * prefetch_factor + 2
        memory = _shared_memory(num_workers, slots, -(-views.batch_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT)
        _shared[memory.data_ptr()] = memory
        begin = partial(_begin_worker, memory.data_ptr(), memory, used, os.getpid())
    return {
        "collate_fn": _as_is,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": device.type == "cuda",
        # Its own: a draw from the global state would make initial weights depend on the number of workers.
        "generator": torch.Generator(),
        "worker_init_fn": begin,
        "prefetch_factor": prefetch_factor if num_workers else None,
        # Forked workers start at once; Python 3.14's default imports torch again in each.
        "multiprocessing_context": "fork" if num_workers and sys.platform == "linux" else None,
    }


def _as_is(batch: Batch) -> Batch:
    return batch


def start_workers(loader: DataLoader) -> None:
    """Start the workers now, while no other thread computes: a lock that one held would stay locked in a fork."""
    if not loader.num_workers:
        return
    try:
        iter(loader)
    except OSError as error:  # no more processes, descriptors or memory
        raise UserError(f"a loader worker cannot start: {error}. Give fewer --num_workers.") from error
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise anywhere in the program when a worker dies; the wait for its batch notices it.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class _Numbered(Dataset):
    """The views' batches, numbered in the order in which they were requested, in all passes."""

    def __init__(self, views: Views):
        self.views, self.order, self.asked = views, (), 0

    def __iter__(self) -> Iterator[tuple[int, list]]:
        """Yield numbered batches of samples: the data set is its own batch sampler."""
        for samples in self.order:
            self.asked += 1
            yield self.asked - 1, samples

    def __getitems__(self, task: tuple[int, list]) -> tuple[int, Batch]:
        _slots.batch, samples = task
        return _slots.batch, self.views.__getitems__(samples)


class WorkerLoader:
    """Host batches of the views, in their order. The first free worker renders the next one: if workers took turns,
    all would go at the pace of the slowest."""

    def __init__(
        self, views: Views, num_workers: int, device: torch.device, prefetch_factor: int = PREFETCH, **options
    ):
        """options: further ones of torch's DataLoader."""
        self.numbered, self.used = _Numbered(views), shared_number(num_workers)
        options = (
            worker_options(views, num_workers, device, prefetch_factor, self.used) | {"in_order": False} | options
        )
        self.loader = DataLoader(self.numbered, batch_sampler=self.numbered, **options)
        start_workers(self.loader)
        self.numbered.order = views.order  # after start_workers, which must not prefetch: the first step is not known

    def __iter__(self) -> Iterator[Batch]:
        early, number = {}, self.numbered.asked
        self.used.fill_(number)  # no worker waits for what an earlier pass left unread
        try:
            for other, batch in self.loader:
                early[other] = batch
                while number in early:
                    yield early.pop(number)
                    number += 1
                    self.used.fill_(number)
        finally:
            if self.used == number:  # else a later pass has begun
                self.used.fill_(self.numbered.asked)  # workers that wait need not


class _Watch(threading.Thread):
    """A watch over one pass: it ends the program with one line where a batch does not come for LIMIT seconds, or for
    PATIENCE once the run is to stop. It is a thread, because the wait may be inside any library."""

    def __init__(self, images: str, noted: Callable[[], str]):
        super().__init__(daemon=True)
        self.images, self.noted = images, noted
        self.batch, self.waiting, self.over = 0, False, threading.Event()

    def wait(self, function: Callable, *arguments):
        """Call the function and return its result. Raises UserError where a worker raised it, or died."""
        self.batch, self.waiting = self.batch + 1, True
        try:
            return function(*arguments)
        except UserError as error:  # torch has put the worker's traceback before the line
            raise _failed(str(error).strip().rpartition("UserError: ")[2]) from None
        except (RuntimeError, OSError, EOFError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith(("DataLoader worker", "Pin memory")):
                raise
            raise _failed(
                f"a loader worker died, perhaps for lack of memory ({str(error) or type(error).__name__}). "
                "Give fewer --num_workers, or more memory."
            ) from error
        finally:
            self.waiting = False

    def run(self) -> None:
        batch, seconds, asked = 0, 0, 0
        while not self.over.wait(1):  # count seconds: a process that was suspended has not waited
            if not self.waiting or batch != self.batch:
                batch, seconds, asked = self.batch, 0, 0
                continue
            reason = self.noted()
            seconds, asked = seconds + 1, asked + bool(reason)
            if asked >= PATIENCE or seconds >= LIMIT:
                _end(f"batch {batch - 1} of the {self.images} images did not come for {seconds} s", reason)


def _end(line: str, reason: str) -> None:
    """End the program, from any thread, with status 1."""
    if reason:
        line += f", so the run stops ({reason}) without a checkpoint of its last steps; the same command resumes it"
    line += ". The loader hangs: check that the storage of --data responds, and look at the workers with py-spy dump"
    one_line(UserError, _failed(f"{line}."), None)


def _failed(line: str) -> UserError:
    """Return an error that only this process has seen: its message names the rank."""
    error = UserError(f"rank {rank()}: {line}" if rank() else line)
    error.alone = True
    return error


class Loader:
    """Batches on the device; for training, from any global step to the end of that step's epoch."""

    rejects = "undecodable"

    def __init__(
        self,
        dataset: Views,
        device: torch.device,
        num_workers: int,
        memory_format: torch.memory_format = torch.contiguous_format,
        statistics: tuple[list[float], list[float]] | None = None,
        read: Callable[[Views, int, torch.device], Iterable[Batch]] = WorkerLoader,
        augmentation: str = "none",
    ):
        """statistics: mean and standard deviation of each channel, in [0, 255]; None: ImageNet's. read: makes the
        host batches; each pass over what it returns begins at `dataset.order.step`. augmentation: see augment.py."""
        library()  # before workers are forked
        self.dataset, self.order, self.device, self.memory_format = dataset, dataset.order, device, memory_format
        self.mean, self.std = (
            torch.tensor(value, device=device).view(1, 3, 1, 1) for value in statistics or (MEAN, STD)
        )
        self.batches, self.augmentation = read(dataset, num_workers, device), augmentation
        self.decoder = getattr(self.batches, "decoder", decoder())  # for the run's record
        self.noted: Callable[[], str] = str  # returns why the run is to stop; a Run sets it

    def __len__(self) -> int:
        return len(self.order)

    def starting_at(self, step: int) -> "Loader":
        """Start the next pass at this global step; earlier samples are not decoded."""
        self.order.step = step
        return self

    def __iter__(self) -> Iterator[Batch]:
        watch = _Watch("training" if isinstance(self.order, TrainingOrder) else "held-out", self.noted)
        watch.start()
        try:
            number = 0
            begin, batches = time.perf_counter(), watch.wait(iter, self.batches)
            while batch := watch.wait(next, batches, None):
                for name in batch.rejected:
                    say(f"undecodable image: {name}", sys.stderr)
                waited = time.perf_counter() - begin
                yield self._to_device(batch)._replace(wait_seconds=waited, **self._of_step(number))
                number += 1
                begin = time.perf_counter()
        finally:
            watch.over.set()

    def _of_step(self, number: int) -> dict:
        """Return step_weight and parts of the global step that this pass's micro-batch `number` belongs to."""
        order = self.order
        if not isinstance(order, TrainingOrder):
            return {}
        step = order.step + number // (order.share // order.micro_batch_size)
        return {"step_weight": order.step_weight(step), "parts": order.parts}

    def sample(self) -> Tensor:
        """Return a batch of one black image, as the network takes it."""
        size = self.dataset.image_size
        return torch.zeros(1, 3, size, size, device=self.device)

    def describe(self) -> Description:
        return describe(self.dataset.source, self.dataset.image_size, self.decoder)

    def check_rejected(self, rejected: int, samples: int) -> None:
        """Raise UserError where more than the share max_undecodable of the images was rejected."""
        most = self.dataset.max_undecodable
        if rejected > most * samples:
            raise UserError(
                f"{rejected} of {samples} images cannot be decoded; each is named above. Fix the data, or accept "
                f"more: --max_undecodable {rejected / samples * 1.5:.2g} (it is {most:g})."
            )

    def _to_device(self, batch: Batch) -> Batch:
        images, labels, valid, seeds, mirrored = (tensor.to(self.device, non_blocking=True) for tensor in batch[:5])
        images = images.permute(0, 3, 1, 2)
        if self.device.type == "cuda" or batch.mirrored.any():  # on a GPU the test itself would wait
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
        if self.augmentation != "none":
            images = augment(images, batch.seeds.tolist(), self.augmentation)
        # (B, H, W, 3) seen as (B, 3, H, W) is channels-last already: that layout costs no copy.
        images = images.to(torch.float32, memory_format=self.memory_format)
        images = images.sub_(self.mean).div_(self.std)
        moved = {"images": images, "labels": labels, "valid": valid, "seeds": seeds, "mirrored": mirrored}
        return batch._replace(**moved, keys=batch.seeds)

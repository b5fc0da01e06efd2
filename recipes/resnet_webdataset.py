# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=4.57", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18", "webdataset>=1.0",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Train a ResNet on tar shards that webdataset streams: each process reads its files from beginning to end.

Base: resnet.py. Changes: Streams, places, Joined, read_streams, read_shards, shuffle, write_digits, build_loaders,
check.
Longer than 250 lines: the readers, which keep a step's samples the same on any number of processes, are the lesson.

    python recipes/resnet_webdataset.py                                       # a laptop, the digits
    L="accelerate launch --config_file accelerate_configs/local_ddp.yaml"
    $L recipes/resnet_webdataset.py --data SHARDS                             # one GPU, or the CPU without one
    $L --num_processes 8 recipes/resnet_webdataset.py --data SHARDS --num_streams 64        # a node of eight GPUs
    $L --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 --num_processes 32 \\
        recipes/resnet_webdataset.py --data SHARDS --num_streams 256          # on each of four nodes, R = 0 to 3

SHARDS holds train/*.tar and val/*.tar, from tools/pack.py or in webdataset's convention. The epoch's shards, in an
order drawn from the seed, are cut at any image into `--num_streams` equal pieces. A stream reads its piece through
webdataset, shuffles it within a buffer of SHUFFLE_BUFFER images, and gives an equal share of each global batch. The
processes and their workers divide the streams. So each step has the same images on any number of processes x workers
that divides --num_streams, all processes have equally many steps, and an epoch takes each image at most once. A
resumed run reads its streams again up to its step, without decoding.

The order is not that of the other loaders, and changes with --num_streams. Images that lie in one shard meet in nearby
steps, so shards must have been filled at random, as tools/pack.py does.

When: the file system is slow at random reads: here each shard is read from beginning to end. Measured on 2 CPU cores,
one worker, images/s per core at 224 px: 877, against 1,165 for random reads of these shards from the page cache,
and 240 for webdataset with PIL, as in its examples (benchmarks/results/loaders_cpu2_2026-11-29.json).
"""

import copy
import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision import models
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator, settle_buckets
from shared.collectives import data_parallel, on_main_process
from shared.config import Fraction, NonNegative, Positive, RunConfig, parse
from shared.draws import hash64, random_bits
from shared.errors import UserError
from shared.files import make_once
from shared.images import (
    Batch,
    ImageConfig,
    Loader,
    Source,
    Views,
    build_views,
    open_data,
)
from shared.images.index import cache_folder
from shared.images.loader import Candidate, shared_number, start_workers, worker_options
from shared.images.shards import image_kind
from shared.launch import this_launch
from shared.metrics import Evaluation
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups, zero_momentum
from shared.order import TrainingOrder
from shared.run import Run

SHUFFLE_BUFFER = 256  # encoded images of each stream, among which the next one is drawn

# (sample index, function that reads it) of each image of a source in some shards, in the order in which they lie.
Images = Iterator[tuple[int, Callable[[], bytes]]]
MODELS = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@dataclass
class Config:
    """The hyper-parameters; the defaults are those of the digits demonstration."""

    model: MODELS = HfArg(default="resnet18", help="the network, by torchvision's name")
    norm: Literal["batch", "group"] = HfArg(default="batch", help="group: the same statistics on any topology")
    sync_batch_norm: bool = HfArg(default=False, help="share batch norm's statistics among the GPUs")
    epochs: Positive = HfArg(default=10, help="passes over the training images")
    global_batch_size: Positive = HfArg(default=64, help="images per step, over all processes and accumulation steps")
    gradient_accumulation_steps: Positive = HfArg(default=1, help="backward passes per step")
    learning_rate: NonNegative = HfArg(default=0.1, help="peak learning rate, at the end of the warmup")
    schedule: Literal["one_cycle", "cosine"] = HfArg(default="one_cycle", help="shape of the learning rate curve")
    warmup_epochs: NonNegative = HfArg(default=3.0, help="epochs in which the learning rate rises")
    momentum: Fraction = HfArg(default=0.9, help="Nesterov momentum of SGD")
    weight_decay: NonNegative = HfArg(default=5e-4, help="L2 penalty; norms and biases have none")
    max_grad_norm: NonNegative = HfArg(default=0.0, help="clip the gradient's norm to this; 0 = only log it")
    label_smoothing: Fraction = HfArg(default=0.1, help="probability mass spread over all classes")
    channels_last: bool = HfArg(default=False, help="NHWC layout in memory: for tensor cores")
    compile: bool = HfArg(default=False, help="torch.compile the model")
    num_streams: Positive = HfArg(default=8, help="pieces of the shards that all processes together read in parallel")


class Streams(IterableDataset):
    """The parts of batches that one reader (a worker, or a process without workers) makes from its streams."""

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
            raise UserError("--shuffle_block has no effect: streams already shuffle what lies together. Leave it out.")
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
        """Yield batches with equally many images of each of the reader's streams, from the step to its epoch's end."""
        order = self.order
        epoch, step = divmod(int(self.step), order.steps_per_epoch)
        share = order.global_batch_size // self.num_streams
        numbers = range(reader, self.num_streams, self.readers)
        streams = [places(itertools.islice(self._stream(epoch, number), step * share, None)) for number in numbers]
        micro_steps = order.share // order.micro_batch_size
        for _ in range((order.steps_per_epoch - step) * micro_steps):
            yield self.views.fill([next(places) for places in streams for _ in range(share // micro_steps)])

    def _stream(self, epoch: int, number: int) -> Iterator[Candidate]:
        """Yield the shuffled piece of one stream, then the images after it, which may replace undecodable ones."""
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
        """Yield each image of the reader's shards once, then empty places until every reader is done."""
        size = -(-self.order.micro_batch_size * self.order.size // self.readers)
        batches = max(-(-int(self.counts[first :: self.readers].sum()) // size) for first in range(self.readers))
        images = self.read_shards(self.views.source, range(reader, len(self.counts), self.readers))
        candidates = (Candidate(0, *image) for image in images)
        for _ in range(batches):
            yield self.views.fill([itertools.islice(candidates, 1) for _ in range(size)])


def places(stream: Iterator[Candidate]) -> Iterator[Iterator[Candidate]]:
    """Yield, for each image of a stream, the candidates for its place: itself and, if undecodable, those that
    follow."""
    (stream,) = itertools.tee(stream, 1)
    while True:
        ahead = copy.copy(stream)  # reads on from here, while the stream stays where it is
        others = (other._replace(counts=False) for other in itertools.islice(ahead, 1, None))
        yield itertools.chain([next(stream)], others)


class Joined:
    """Whole batches on the device, joined from the parts of this process's readers."""

    def __init__(self, streams: Streams, num_workers: int, device: torch.device):
        self.streams, self.workers, self.device = streams, max(1, num_workers), device
        self.parts = DataLoader(streams, batch_size=None, **worker_options(streams.views, num_workers, device))
        start_workers(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        self.streams.step.fill_(getattr(self.streams.order, "step", 0))
        parts = iter(self.parts)
        for batch in zip(*[parts] * self.workers, strict=True):
            columns = list(zip(*batch, strict=True))
            tensors = (torch.cat([part.to(self.device, non_blocking=True) for part in parts]) for parts in columns[:5])
            indices = torch.cat(columns[8])
            yield Batch(*tensors, digest=sum(columns[5]), rejected=sum(columns[6], ()), indices=indices)


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
    """Return batches of the streams, for a Loader's `read`.

    read_shards: yields the images of a source in the shards of these numbers. shuffle: yields the items of an iterator
    in an order that depends on the random state alone. rank, size: as data_parallel returns them.
    """
    return Joined(Streams(views, rank, size, num_workers, num_streams, read_shards, shuffle), num_workers, device)


def read_shards(source, shards):
    """Yield (sample index, function that reads it) of the source's images in these shards, as they lie there; after
    each shard, those that a truncation has cut off."""
    import webdataset as wds

    index = source.images.index
    for shard in shards:
        rows = np.flatnonzero(index.shard == shard)
        waiting = {os.fsdecode(index.names[row]): int(row) for row in rows[np.argsort(index.offset[rows])]}
        paths = wds.SimpleShardList([os.path.join(source.images.folder, index.shards[shard])])
        # A sample is a dictionary of bytes. Nothing is decoded here, so that no pickle in a shard is ever loaded.
        for sample in wds.DataPipeline(paths, wds.tarfile_to_samples(handler=wds.ignore_and_stop)):
            kind = image_kind(sample)
            if kind and sample["__key__"] in waiting:
                yield waiting.pop(sample["__key__"]), partial(bytes, sample[kind])
        for row in waiting.values():
            yield row, partial(source.images.__getitem__, row)


def shuffle(samples, random_state, buffer):
    """Shuffle with webdataset: draw each sample from a buffer of this many."""
    import webdataset as wds

    return wds.shuffle(buffer, rng=random_state)(samples)


def write_digits(folder):
    """Write the embedded digits in shards, as a user would write any images."""
    import webdataset as wds

    for name, part in zip(("train", "val"), open_data("digits", 0, 0), strict=True):
        (folder / name).mkdir(parents=True)
        with wds.ShardWriter(f"{folder}/{name}/%06d.tar", maxcount=100, verbose=0) as shards:
            for key, (pixels, label) in enumerate(zip(part.images.pixels, part.labels, strict=True)):
                shards.write({"__key__": f"{key:06d}", "png": pixels, "cls": int(label)})


def build_loaders(accelerator, run_config, images, config):
    """Return the training and evaluation loaders of this process's share; samples depend on seed, step, streams."""
    if images.data == "digits":
        folder = on_main_process(accelerator, make_once, cache_folder() / "digits-in-shards", write_digits)
        images = replace(images, data=str(folder))
    views = build_views(accelerator, run_config, images, config, open_data(*images.source(run_config.seed)))
    (rank, size), streams = data_parallel(accelerator), config.num_streams
    read = partial(read_streams, rank=rank, size=size, num_streams=streams, read_shards=read_shards)
    read = partial(read, shuffle=partial(shuffle, buffer=SHUFFLE_BUFFER))
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return [Loader(each, accelerator.device, run_config.num_workers, layout, read=read) for each in views]


def build_model(images, config, num_classes, seed):
    """Return torchvision's network; residual branches start at zero (Goyal et al., arXiv:1706.02677, section 5.1)."""
    # Group norm with 32 groups: Wu & He, arXiv:1803.08494.
    norm_layer = nn.BatchNorm2d if config.norm == "batch" else partial(nn.GroupNorm, 32)
    model = models.get_model(config.model, num_classes=num_classes, norm_layer=norm_layer, zero_init_residual=True)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if config.sync_batch_norm else model


def build_optimizer(model, config, steps_per_epoch):
    """Return SGD with Nesterov momentum and its learning rate scheduler, which counts global steps."""
    groups, nesterov = parameter_groups(model, config.weight_decay), config.momentum > 0
    # fused: one pass over weights, gradients and momenta instead of one for each operation.
    optimizer = torch.optim.SGD(groups, config.learning_rate, config.momentum, nesterov=nesterov, fused=True)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return zero_momentum(optimizer), build_scheduler(optimizer, config.schedule, steps, warmup)


def parallelize(accelerator, model, optimizer, config):
    """Apply the device, precision and data parallelism of the YAML with `accelerator.prepare`."""
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model, optimizer = accelerator.prepare(model, optimizer)
    if config.compile:
        model.compile()
    return model, optimizer


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run):
    """Train from the run's step to the end of its epoch, or until the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            logits = model(batch.images)
            loss = cross_entropy(logits.float(), batch.labels, label_smoothing=config.label_smoothing, reduction="sum")
            loss = loss / batch.step_weight  # this process's share of the step's loss
            run.observe(batch, loss)
            # parts undoes averaging; the last factor, 1 or nan, shows every process a loss that is not finite.
            accelerator.backward(loss * batch.parts * (1 + 0 * loss.detach()))
            if accelerator.sync_gradients:
                grad_norm = clip_grad_norm(accelerator, model, config.max_grad_norm)
                if not run.skips(grad_norm):  # --on_nonfinite skip decides here, and waits for the device
                    optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            run.check_finite()  # --on_nonfinite stop ends the run here if the step before was not finite
            run.end_step(scheduler.get_last_lr()[0], grad_norm)
            run.profiler.step()
            scheduler.step()
            if run.checkpoint_due:
                run.save(model, optimizer, scheduler)
            if run.stopping:
                return


def evaluate(accelerator, model, loader, run):
    """Log top-1 accuracy and loss over the held-out images, each counted once."""
    model.eval()
    evaluation = Evaluation()
    with torch.no_grad():
        for batch in loader:
            evaluation.add(model(batch.images), batch.labels, batch.valid)
            run.profiler.step()
    run.log_evaluation(evaluation.result(accelerator, len(loader.dataset)))


def check(run_config, images, config, launch):
    """Raise UserError for settings that cannot work, before the processes connect."""
    if images.train_images:
        raise UserError("--train_images has no effect: streams read whole shards. Leave it out.")
    if config.sync_batch_norm and (not launch.on_gpu or config.norm != "batch"):
        raise UserError("--sync_batch_norm needs GPUs and --norm batch. Leave it out; --norm group needs no sync.")
    if images.image_size <= 16 and launch.precision == "bf16" and not launch.on_gpu:  # layer4 sees 1 x 1 pixels
        raise UserError("bf16 gradients of such small images are wrong on CPUs (oneDNN 3.13). Give --image_size 32.")


def main(run_config, images, config):
    check(run_config, images, config, this_launch())
    accelerator = build_accelerator(run_config.seed, config)
    train_loader, eval_loader = build_loaders(accelerator, run_config, images, config)
    classes, steps_per_epoch = train_loader.dataset.source.classes, train_loader.order.steps_per_epoch
    run = Run(accelerator, run_config, images, config, train_loader, eval_loader)
    if not run.finished:
        model = build_model(images, config, len(classes), run_config.seed)
        optimizer, scheduler = build_optimizer(model, config, steps_per_epoch)
        model, optimizer = parallelize(accelerator, model, optimizer, config)
        settle_buckets(model, train_loader.sample())
        if run.checkpoint:
            run.resume(model, optimizer, scheduler)
        with run.profiling(len(eval_loader)):
            while not run.stopping:
                train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, config, run)
                if run.evaluation_due:
                    evaluate(accelerator, model, eval_loader, run)
                run.save(model, optimizer, scheduler)
    run.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


CONFIGS = (RunConfig, ImageConfig, Config)

if __name__ == "__main__":
    main(*parse(*CONFIGS))

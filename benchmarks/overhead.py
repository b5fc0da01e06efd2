# SPDX-License-Identifier: Apache-2.0
"""Measure what the recipe's loop costs over a bare PyTorch loop with the same model, data and batch.

    python benchmarks/overhead.py [--epochs 8] [any flag of recipes/resnet.py]

The loops take steps in turn, so that a drift of the machine's speed affects all alike; each step waits for the device.
The bare loop has no metrics, digest, gradient norm or trackers, and runs in a process of its own, as a script would.
Two more run in the recipe's process, where on a CPU glibc keeps freed memory (shared/accelerator.py): a bare loop, and
one that takes the gradient's norm, which the recipe logs and by which it finds a step that is not finite. Prints
seconds a step of each and the ratios step by step, and writes benchmarks/results/overhead_<hardware>_<date>.json. The
goal is at most 2 % over the bare loop.
"""

import argparse
import contextlib
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from report import median_and_spread, table, write
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))
import resnet

from shared.accelerator import build_accelerator, settle_buckets
from shared.config import RunConfig, parse
from shared.images import ImageConfig
from shared.images.loader import MEAN, STD, Views
from shared.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8, help="epochs of steps, after one that warms up")
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        more = ["--epochs", str(arguments.epochs + 1), "--output_dir", folder]
        steps = measure(*parse(*resnet.CONFIGS, arguments=[*flags, *more]))
    here = "in the recipe's process"
    names = ("recipe", "bare loop", f"bare loop {here}", f"bare loop with the gradient's norm {here}")
    by_loop = zip(names, zip(*steps, strict=True), strict=True)
    rows = [{"what": f"{name}, seconds a step", **median_and_spread(times)} for name, times in by_loop]
    for number, name in enumerate(names[1:], 1):
        ratios = [times[0] / times[number] for times in steps]
        rows.append({"what": f"recipe / {name}, step by step", **median_and_spread(ratios), **quartiles(ratios)})
    print(table([{name: row[name] for name in ("what", "median", "min", "max", "n")} for row in rows]))
    for row in rows[len(names) :]:
        low, high = row["quartiles"]
        print(f"{row['what']}: {row['median'] - 1:+.2%} (half of the steps: {low - 1:+.2%} to {high - 1:+.2%})")
    print(write("overhead", rows))


def quartiles(values: list[float]) -> dict:
    low, _, high = statistics.quantiles(values, n=4)
    return {"quartiles": [round(low, 5), round(high, 5)]}


class Turns:
    """The recipe's loader; after each of the recipe's steps the other loops take one."""

    def __init__(self, loader, others: list[Callable[[], float]]):
        """others: each takes a step and returns its seconds."""
        self.loader, self.others = loader, others
        self.seconds: list[tuple[float, ...]] = []  # of the recipe's step and of each other's

    def starting_at(self, step: int) -> Iterator:
        batches = iter(self.loader.starting_at(step))
        while True:
            begin = time.perf_counter()
            if not (batch := next(batches, None)):
                return
            yield batch
            synchronize()
            recipe = time.perf_counter() - begin
            self.seconds.append((recipe, *(other() for other in self.others)))


def measure(run_config: RunConfig, images: ImageConfig, config: resnet.Config) -> list[tuple[float, ...]]:
    """Return the seconds of each step of (recipe, bare loop, the two in this process) after the first epoch."""
    accelerator = build_accelerator(run_config.seed, config)
    loader, eval_loader = resnet.build_loaders(accelerator, run_config, images, config)
    steps = loader.order.steps_per_epoch
    run = Run(accelerator, run_config, images, config, loader, eval_loader)
    model, optimizer, scheduler = build(config, steps)
    model, optimizer = resnet.parallelize(accelerator, model, optimizer, config)
    settle_buckets(model, loader.sample())
    bare = accelerator.device, run_config, config, loader.dataset, steps
    here = [partial(seconds, bare_steps(*bare, with_norm)) for with_norm in (False, True)]
    turns = Turns(loader, [apart(*bare), *here])
    while not run.stopping:
        resnet.train_one_epoch(accelerator, model, turns, optimizer, scheduler, config, run)
    accelerator.end_training()
    return turns.seconds[steps:]


def build(config: resnet.Config, steps: int) -> tuple:
    torch.manual_seed(0)
    model = resnet.build_model(None, config, 10, seed=0)
    return model, *resnet.build_optimizer(model, config, steps)


def bare_steps(
    device, run_config: RunConfig, config: resnet.Config, dataset: Views, steps: int, with_norm: bool
) -> Iterator[None]:
    """Train as the PyTorch tutorial does, on the same decoded images, one step for each `next`."""
    model, optimizer, scheduler = build(config, steps)
    model.to(device, memory_format=torch.channels_last if config.channels_last else torch.contiguous_format)
    mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (MEAN, STD))
    samples = [(0, index) for index in range(len(dataset))]
    loader = DataLoader(
        dataset,
        batch_sampler=EpochZero(BatchSampler(RandomSampler(samples), config.global_batch_size, drop_last=True)),
        collate_fn=lambda batch: batch,
        num_workers=run_config.num_workers,
        persistent_workers=run_config.num_workers > 0,
        multiprocessing_context="fork" if run_config.num_workers else None,
        pin_memory=device.type == "cuda",
    )

    model.train()
    while True:
        for images, labels, *_ in loader:
            images = (images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() - mean) / std
            if not config.channels_last:
                images = images.contiguous()
            logits = model(images)
            loss = cross_entropy(logits, labels.to(device, non_blocking=True), label_smoothing=config.label_smoothing)
            loss.backward()
            if with_norm:
                clip_grad_norm_(model.parameters(), math.inf)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            yield


def apart(*bare) -> Callable[[], float]:
    """Start a process that takes a step of `bare_steps(*bare)` at each call."""
    mine, its = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    context.Process(target=answer, args=(its, torch.get_num_threads(), *bare)).start()
    its.close()

    def step() -> float:
        mine.send(None)
        return mine.recv()

    return step


def answer(connection: Connection, threads: int, *bare) -> None:
    """Take a step at each message, and send back its seconds, until the other end is closed."""
    torch.set_num_threads(threads)
    steps = bare_steps(*bare, with_norm=False)
    with contextlib.suppress(EOFError):
        while True:
            connection.recv()
            connection.send(seconds(steps))


class EpochZero:
    """Batches of samples as the dataset takes them: pairs of an epoch, always 0, and an index."""

    def __init__(self, batches: BatchSampler):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return ([(0, index) for index in batch] for batch in self.batches)


def seconds(steps: Iterator[None]) -> float:
    """Return the seconds of the next step."""
    begin = time.perf_counter()
    next(steps)
    synchronize()
    return time.perf_counter() - begin


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

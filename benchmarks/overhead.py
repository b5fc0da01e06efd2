# SPDX-License-Identifier: Apache-2.0
"""What the recipe's loop costs over a bare PyTorch loop with the same model, data and batch.

    python benchmarks/overhead.py [--pairs 8] [any flag of recipes/resnet.py]

The two train in turn, an epoch each, in one process, so that the machine's drift meets both. The bare loop has
neither metrics, digest, gradient norm nor trackers. Prints seconds a step of each and the ratio pair by pair, and
writes benchmarks/results/overhead_<hardware>_<date>.json. The goal is at most 2 %.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import median_and_spread, table, write
from torch.nn.functional import cross_entropy
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
    parser.add_argument("--pairs", type=int, default=8, help="epochs of each loop, after one pair that warms up")
    arguments, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        more = ["--epochs", str(arguments.pairs + 1), "--output_dir", folder]
        pairs = measure(*parse(*resnet.CONFIGS, arguments=[*flags, *more]))
    rows = [
        {"what": "recipe, seconds a step", **median_and_spread([recipe for recipe, _ in pairs])},
        {"what": "bare loop, seconds a step", **median_and_spread([bare for _, bare in pairs])},
        {"what": "recipe / bare, pair by pair", **median_and_spread([recipe / bare for recipe, bare in pairs])},
    ]
    print(table(rows))
    overhead = statistics.median(recipe / bare for recipe, bare in pairs) - 1
    print(f"overhead of the recipe's loop: {overhead:+.2%} (goal: at most +2 %)")
    print(write("overhead", rows, pairs=pairs))


def measure(run_config: RunConfig, images: ImageConfig, config: resnet.Config) -> list[tuple[float, float]]:
    """Seconds a step of (recipe, bare loop) in each pair of epochs but the first."""
    accelerator = build_accelerator(run_config.seed, config)
    loader, eval_loader = resnet.build_loaders(accelerator, run_config, images, config)
    steps = loader.order.steps_per_epoch
    run = Run(accelerator, run_config, images, config, loader, eval_loader)
    model, optimizer, scheduler = build(config, steps)
    model, optimizer = resnet.parallelize(accelerator, model, optimizer, config)
    settle_buckets(model, loader.sample())
    bare = bare_epoch(accelerator.device, run_config, config, loader.dataset, steps)

    def recipe() -> None:
        resnet.train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run)

    pairs = [tuple(seconds(loop) / steps for loop in (recipe, bare)) for _ in range(config.epochs)]
    accelerator.end_training()
    return pairs[1:]


def build(config: resnet.Config, steps: int) -> tuple:
    torch.manual_seed(0)
    model = resnet.build_model(None, config, 10, seed=0)
    return model, *resnet.build_optimizer(model, config, steps)


def bare_epoch(device, run_config: RunConfig, config: resnet.Config, dataset: Views, steps: int) -> Callable[[], None]:
    """A function that trains one epoch the way a page of the PyTorch tutorial does, on the same decoded images."""
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
        pin_memory=device.type == "cuda",
    )

    def epoch() -> None:
        model.train()
        for images, labels, *_ in loader:
            images = (images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() - mean) / std
            if not config.channels_last:
                images = images.contiguous()
            logits = model(images)
            loss = cross_entropy(logits, labels.to(device, non_blocking=True), label_smoothing=config.label_smoothing)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    return epoch


class EpochZero:
    """Batches of indices as the dataset takes them: pairs of an epoch and an index."""

    def __init__(self, batches: BatchSampler):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return ([(0, index) for index in batch] for batch in self.batches)


def seconds(function: Callable[[], None]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()

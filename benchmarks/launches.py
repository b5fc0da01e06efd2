# SPDX-License-Identifier: Apache-2.0
"""Launch the Vision Transformer's recipes for the benchmarks of memory and communication: for each strategy the
recipe, its YAML and its sizes; two steps of the recipe's own loop on made-up images, the second watched."""

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from report import ROOT
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(ROOT / "recipes"))
sys.path.insert(0, str(ROOT / "tools"))  # for memory_estimate

from shared.accelerator import build_accelerator, settle_buckets
from shared.collectives import data_parallel
from shared.config import RunConfig
from shared.images import Batch, ImageConfig, Loader, Source, Views
from shared.images.storage import Pixels
from shared.launch import strategy
from shared.lifetime import die_with_parent
from shared.models.vit import SIZES, VisionTransformer, vit_config
from shared.order import TrainingOrder
from shared.run import Run

CLASSES, STEPS, BATCH = 1000, 1000, 4
REPLICAS = 2  # of local_hsdp.yaml
MIB = 2**20


class Strategy(NamedTuple):
    """The recipe, the YAML of its launch, real ranks, the recipe's sizes for a number of ranks, the launch's flags."""

    recipe: str
    config: str
    ranks: tuple[int, ...]
    sizes: Callable[[int], dict] = lambda ranks: {}
    flags: tuple[str, ...] = ()


STRATEGIES = {
    "ddp": Strategy("vit", "ddp", (1, 2, 4)),
    "fsdp": Strategy("vit_fsdp", "fsdp", (2, 4)),
    "hsdp": Strategy("vit_fsdp", "hsdp", (4,)),
    "zero1": Strategy("vit_zero", "zero1", (2, 4)),
    "zero2": Strategy("vit_zero", "zero2", (2, 4)),
    "zero3": Strategy("vit_zero", "zero3", (2, 4)),
    "tp": Strategy("vit_tp", "tp", (2, 4), lambda ranks: {"tensor_parallel_size": ranks}),
    "tp_fsdp": Strategy("vit_tp", "fsdp", (4,), lambda ranks: {"tensor_parallel_size": 2}),
    "pp": Strategy("vit_pp", "pp", (2, 4), lambda ranks: {"pipeline_parallel_size": ranks, "pipeline_chunks": 4}),
}
SIDES = {"demo": (32, 8), "H": (224, 14), "g": (224, 14), "G": (224, 14)}  # of image and patch; else (224, 16)


# How the networks are cut


def image_of(model: str) -> dict[str, int]:
    return dict(zip(("image_size", "patch_size"), SIDES.get(model, (224, 16)), strict=True))


def configs_of(recipe, model: str, **values) -> tuple[ImageConfig, object]:
    """Return the image settings and the recipe's own."""
    image_size, patch_size = image_of(model).values()
    return ImageConfig(image_size=image_size), recipe.Config(model=model, patch_size=patch_size, **values)


def shapes_of(model: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network = VisionTransformer(vit_config(model, **image_of(model), num_classes=CLASSES, drop_path=0.0))
    return {name: parameter.shape for name, parameter in network.named_parameters()}


# One process of a launch


def recipe_and_config(arguments: argparse.Namespace, strategies: dict[str, Strategy]) -> tuple:
    """Return the recipe and the settings of a worker's one strategy and model."""
    model, strategy = arguments.models[0], strategies[arguments.strategies[0]]
    recipe, sizes = importlib.import_module(strategy.recipe), strategy.sizes(int(os.environ["WORLD_SIZE"]))
    return recipe, *configs_of(recipe, model, global_batch_size=BATCH, **sizes)


def build(recipe, accelerator, images: ImageConfig, config) -> tuple:
    """Build as the recipe's main does: the model, what else the loop of a pipeline takes, the optimizer, the
    scheduler."""
    builders = recipe.build_model, recipe.build_optimizer
    last = [[accelerator] * ("accelerator" in signature(each).parameters) for each in builders]
    model = recipe.build_model(images, config, CLASSES, 0, *last[0])
    if "optimizer" in signature(recipe.parallelize).parameters:
        optimizer, scheduler = recipe.build_optimizer(model, config, STEPS, *last[1])
        model, optimizer = recipe.parallelize(accelerator, model, optimizer, config)
        if isinstance(model, DistributedDataParallel):
            settle_buckets(model, torch.zeros(1, 3, images.image_size, images.image_size, device=accelerator.device))
        return model, (), optimizer, scheduler
    seed = [0] * ("seed" in signature(recipe.parallelize).parameters)
    model = recipe.parallelize(accelerator, model, config, *seed)
    model, *pipeline = model if isinstance(model, tuple) else (model,)
    optimizer, scheduler = recipe.build_optimizer(model, config, STEPS)
    return model, pipeline, accelerator.prepare_optimizer(optimizer), scheduler


def blank_images(accelerator, images: ImageConfig, config) -> Loader:
    """Return a loader of as much data as a run looks at: black images, all one piece of memory."""
    batch, size, (rank, processes) = config.global_batch_size, images.image_size, data_parallel(accelerator)
    count = STEPS * batch
    pixels = np.broadcast_to(np.zeros((1, size, size, 3), np.uint8), (count, size, size, 3))
    classes = [str(number) for number in range(CLASSES)]
    order = TrainingOrder(count, batch, batch // processes, rank, processes, seed=0)
    source = Source(Pixels(pixels), np.arange(count) % CLASSES, classes)
    return Loader(Views(source, None, order, size, seed=0), accelerator.device, num_workers=0)


def train(
    recipe,
    settings: ImageConfig,
    config,
    folder: Path,
    watch: AbstractContextManager,
    before_update: Callable | None = None,
) -> int:
    """Run two steps of the recipe's own loop on made-up images, the second watched; return this process's rank."""
    accelerator = build_accelerator(0, config, getattr(recipe, "STRATEGIES", ("ddp",)))
    model, pipeline, optimizer, scheduler = build(recipe, accelerator, settings, config)
    flags = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "resume_from_checkpoint": "never"}
    run_config = RunConfig(output_dir=str(folder / "run"), **flags)
    data = blank_images(accelerator, settings, config)
    run = Run(accelerator, run_config, settings, config, data, data)
    images = config.global_batch_size // data_parallel(accelerator)[1]
    size, device = settings.image_size, accelerator.device
    ones = [
        torch.ones(images, dtype=kind, device=device) for kind in (torch.int64, torch.bool, torch.int64, torch.bool)
    ]
    batch, stack = Batch(torch.randn(images, 3, size, size, device=device), *ones, digest=0), ExitStack()
    batch = batch._replace(step_weight=data.order.step_weight(0), parts=data.order.parts)
    loader = SimpleNamespace(starting_at=lambda step: itertools.repeat(batch))
    # The loop calls it after every step.
    run.profiler = SimpleNamespace(step=lambda: stack.enter_context(watch) if run.step == 1 else stack.close())
    updating = model if strategy().startswith("zero") else optimizer  # DeepSpeed's engine updates within the backward
    update = updating.step

    def noted_update() -> None:
        if run.step == 1 and before_update:
            before_update(model, optimizer)
        update()

    updating.step = noted_update
    recipe.train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run, *pipeline)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return accelerator.process_index


# The launches


def real_cases(arguments: argparse.Namespace, strategies: dict[str, Strategy]) -> Iterator[tuple[dict, dict, list]]:
    """Yield the case, the recipe's sizes, and what each rank wrote."""
    for model, name in itertools.product(arguments.models, arguments.strategies):
        possible = strategies[name].ranks
        for ranks in [each for each in possible if each in (arguments.ranks[model] or possible[-1:])]:
            sizes = strategies[name].sizes(ranks)
            heads_divide = SIZES[model][2] % sizes.get("tensor_parallel_size", 1) == 0  # ViT-S has 6
            if heads_divide and has_devices(ranks):
                case = {"model": model, "strategy": name, "ranks": ranks, **tensor_of(sizes)}
                yield case, sizes, launch(strategies[name], ranks, ["--models", model, "--strategies", name])


def has_devices(ranks: int) -> bool:
    return not torch.cuda.is_available() or ranks <= torch.cuda.device_count()


def tensor_of(sizes: dict) -> dict:
    return {"tensor": sizes["tensor_parallel_size"]} if "tensor_parallel_size" in sizes else {}


def launch(strategy: Strategy, ranks: int, flags: list[str]) -> list:
    """Run the worker of this benchmark on these ranks; return what each of them wrote."""
    config = str(ROOT / "accelerate_configs" / f"local_{strategy.config}.yaml")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        command += ["--num_processes", str(ranks), *strategy.flags, sys.argv[0], *flags, "--worker", folder]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600, preexec_fn=die_with_parent)
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        if not all(file.exists() for file in files):
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-8000:]}")
        return [json.loads(file.read_text()) for file in files]


def parse(description: str, strategies: dict[str, Strategy], default_ranks: dict[str, tuple]) -> argparse.Namespace:
    """Parse the command line; `ranks` becomes a dict of each model's. Default ranks of () are the most that a strategy
    has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = (
        parser.add_argument,
        "; ".join(f"{model}: {ranks or 'most'}" for model, ranks in default_ranks.items()),
    )
    add("--models", type=words, default=",".join(default_ranks), help=f"some of {','.join(SIZES)} (%(default)s)")
    add("--strategies", type=words, default=",".join(strategies), help="some of %(default)s (all)")
    add("--ranks", type=words, help=f"numbers of processes ({default})")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name, known in (("models", SIZES), ("strategies", strategies)):
        unknown = set(getattr(arguments, name)) - set(known)
        if unknown:
            parser.error(f"--{name} {unknown.pop()} is unknown. Known: {', '.join(known)}.")
    asked = tuple(map(int, arguments.ranks)) if arguments.ranks else ()
    arguments.ranks = {model: asked or default_ranks.get(model, (4,)) for model in arguments.models}
    return arguments


def words(text: str) -> list[str]:
    return text.split(",")


def results_name(benchmark: str) -> str:
    """Return the name of the results: a run of selected cases does not replace that day's whole one."""
    return benchmark if len(sys.argv) == 1 else f"{benchmark}_part"

# SPDX-License-Identifier: Apache-2.0
"""Bytes that a rank holds under each strategy, counted, beside the arithmetic.

    python benchmarks/memory.py                                             # all: 25 launches, then fake ranks
    python benchmarks/memory.py --models S --ranks 2 --strategies fsdp      # one launch: under 30 s
    python benchmarks/memory.py --models B --ranks 1,2,4                    # real processes only

Up to 4 ranks are real processes (on GPUs, or gloo on a CPU): each case is a launch that takes two steps of the
recipe's own loop on made-up images. In the second, just before the optimizer updates, the bytes are counted of the
storages of parameters, gradients and optimizer state; `other` is what else lives then (buckets, the batch). The peak
is CUDA's; on a CPU it is the greatest sum of live tensors during that step. From 8 ranks on, one rank of a fake
process group is cut from meta tensors by the recipe's `parallelize`: exact shards, but no step. ZeRO cannot be had so
and stands there by formula, as `"measured": false`.

The formula, for P parameters in fp32: 4 P for weights, 4 P for gradients, 8 P for Adam. (The ZeRO paper,
arXiv:1910.02054, has 2 P, 2 P and 12 P in mixed precision, where the optimizer keeps an fp32 copy of the weights: 16 P
in both.) Writes benchmarks/results/memory_<hardware>_<date>.json (memory_part_... where flags select cases), and its
chart beside it as .png.
"""

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from report import ROOT, table, write
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(ROOT / "recipes"))

from shared.accelerator import MESH, build_accelerator, data_parallel
from shared.config import RunConfig
from shared.data import Batch
from shared.tracking import Run
from shared.vit import SIZES, VisionTransformer, vit_config

CLASSES, STEPS, BATCH = 1000, 1000, 4
REPLICAS = 2  # of local_hsdp.yaml
KINDS, MIB, GIB = ("parameters", "gradients", "optimizer"), 2**20, 2**30


class Strategy(NamedTuple):
    """The recipe, the YAML of its launch, real ranks, and the recipe's sizes for a number of ranks."""

    recipe: str
    config: str
    ranks: tuple[int, ...]
    sizes: Callable[[int], dict] = lambda ranks: {}


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
FAKE_RANKS = (8, 64, 256, 1024)
RANKS = {"S": (1, 2, 4), "B": (4, *FAKE_RANKS), "L": FAKE_RANKS, "G": FAKE_RANKS}  # those measured by default
WHY = {
    "zero1": "DeepSpeed drops the other ranks' gradients at the end of the backward; the paper's stage 1 keeps them",
    "zero2": "DeepSpeed keeps the whole gradient of a weight that two ranks share",
}
SIDES = {"demo": (32, 8), "H": (224, 14), "g": (224, 14), "G": (224, 14)}  # of image and patch; else (224, 16)


# The arithmetic


def image_of(model: str) -> dict[str, int]:
    return dict(zip(("image_size", "patch_size"), SIDES.get(model, (224, 16)), strict=True))


def shapes_of(model: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network = VisionTransformer(vit_config(model, **image_of(model), num_classes=CLASSES, drop_path=0.0))
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def formula(strategy: str, shapes: dict, ranks: int, rank: int, sizes: dict) -> dict[str, float]:
    """Bytes of parameters, gradients and optimizer state on this rank."""
    tensor = sizes.get("tensor_parallel_size", 1)
    if strategy == "pp":
        shapes = {name: shape for name, shape in shapes.items() if stage_of(name, shapes, ranks) == rank}
    local = [tensor_shard(name, shape, tensor) for name, shape in shapes.items()]
    whole = sum(map(math.prod, local))
    if strategy.startswith("zero"):
        stage, share = int(strategy[-1]), whole / ranks
        # DeepSpeed keeps the paper's copy of the weights in fp32 training too: 12 P beside 4 P and 4 P.
        return by_kind(4 * (share if stage == 3 else whole), 4 * (share if stage > 1 else whole), 12 * share)
    shards = {"fsdp": ranks, "hsdp": ranks // REPLICAS, "tp_fsdp": ranks // tensor}.get(strategy, 1)
    index, padded, mine = rank // tensor % shards, 0, 0
    for rows, *row in local:
        # FSDP2 cuts rows, and allocates ceil(rows / shards) on every rank; Adam has state for those that exist.
        most = -(-rows // shards)
        padded += most * math.prod(row)
        mine += min(max(rows - index * most, 0), most) * math.prod(row)
    return by_kind(4 * padded, 4 * padded, 8 * mine)


def by_kind(*figures) -> dict:
    return dict(zip(KINDS, figures, strict=True))


def tensor_shard(name: str, shape: torch.Size, size: int) -> tuple[int, ...]:
    """Columns of the first products, rows of the second ones (torch stores weights transposed); the rest is whole."""
    if name.rsplit(".", 2)[-2] in ("q_proj", "k_proj", "v_proj", "fc1"):
        return shape[0] // size, *shape[1:]
    if name.endswith(("o_proj.weight", "fc2.weight")):
        return shape[0], shape[1] // size
    return tuple(shape)


def stage_of(name: str, shapes: dict, stages: int) -> int:
    """Stage s of p ends before block L (s + 1) / p, rounded down; the first has the embeddings, the last the head."""
    blocks = 1 + max(int(each.split(".")[2]) for each in shapes if each.startswith("vit.layers."))
    if not name.startswith("vit.layers."):
        return 0 if name.startswith("vit.embeddings.") else stages - 1
    return next(s for s in range(stages) if int(name.split(".")[2]) < blocks * (s + 1) // stages)


# What a tensor takes


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of each storage below these tensors, by its address."""
    found = (local_part(tensor).untyped_storage() for tensor in tensors if tensor is not None)
    return {storage._cdata: storage.nbytes() for storage in found}


def count(model, optimizer) -> dict[str, int]:
    """Bytes by kind, each storage once; of DeepSpeed its flat partitions, with the copy of the weights as state."""
    weights = list(model.parameters())
    parameters = storages(weights) | storages(getattr(weight, "ds_tensor", None) for weight in weights)
    gradients, state = storages(weight.grad for weight in weights), {}
    while hasattr(optimizer, "optimizer"):  # Accelerate's wrapper, then DeepSpeed's
        optimizer = optimizer.optimizer
        for parts in (getattr(optimizer, "averaged_gradients", None) or {}).values():
            gradients |= storages(parts)
        gradients |= storages([getattr(optimizer, "grad_partitions_flat_buffer", None)])
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            state |= storages(getattr(optimizer, name, ()))
    values = itertools.chain.from_iterable(values.values() for values in optimizer.state.values())
    state |= storages(value for value in values if torch.is_tensor(value))
    own = [{key: kind[key] for key in kind if key not in parameters} for kind in (gradients, state)]
    return by_kind(*(sum(kind.values()) for kind in (parameters, *own)))


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that are alive, now and at most.

    torch.distributed._tools.mem_tracker.MemTracker had the same peaks to the byte under ddp, fsdp and zero3, but took
    three times as long there, and refuses a second forward of the same module (a pipeline's chunks).
    """

    def __init__(self):
        super().__init__()
        self.sizes, self.total, self.peak = {}, 0, 0

    def __enter__(self):
        gc.collect()
        for tensor in [each for each in gc.get_objects() if isinstance(each, Tensor)]:
            self.note(local_part(tensor))
        resize = self.resize = torch.UntypedStorage.resize_

        def noted(storage, size: int) -> None:  # FSDP2 frees by it, past the dispatcher
            resize(storage, size)
            self.note_storage(storage)

        torch.UntypedStorage.resize_ = noted
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if DTensor in types:
            return NotImplemented  # it calls again with the local tensors
        result = function(*arguments, **keywords or {})
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return result

    def note(self, tensor: Tensor) -> None:
        if not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu":
            self.note_storage(tensor.untyped_storage())

    def note_storage(self, storage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0
            weakref.finalize(storage, self.forget, key)
        self.total += storage.nbytes() - self.sizes[key]
        self.sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.total)

    def forget(self, key: int) -> None:
        self.total -= self.sizes.pop(key)


# Real ranks


def build(recipe, accelerator, config) -> tuple:
    """As the recipe's main does: the model, what else its loop takes of a pipeline, the optimizer, the scheduler."""
    name = recipe.__name__
    first = (accelerator,) if name == "vit_zero" else ()
    model = recipe.build_model(*first, config, CLASSES, 0)
    if name in ("vit", "vit_zero"):
        optimizer, scheduler = recipe.build_optimizer(*first, model, config, STEPS)
        model, optimizer = recipe.parallelize(accelerator, model, optimizer, config)
        return model, (), optimizer, scheduler
    model = recipe.parallelize(accelerator, model, config, *((0,) if name == "vit_fsdp" else ()))
    model, *pipeline = model if name == "vit_pp" else (model,)
    optimizer, scheduler = recipe.build_optimizer(model, config, STEPS)
    return model, pipeline, accelerator.prepare_optimizer(optimizer), scheduler


def train(recipe, config, folder: Path, watch: AbstractContextManager, before_update: Callable | None = None) -> int:
    """Two steps of the recipe's own loop on made-up images, the second watched; returns this process's rank."""
    accelerator = build_accelerator(0, config, getattr(recipe, "STRATEGIES", ("ddp",)))
    model, pipeline, optimizer, scheduler = build(recipe, accelerator, config)
    flags = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "resume_from_checkpoint": "never"}
    run_config = RunConfig(output_dir=str(folder / "run"), **flags)
    run = Run(accelerator, run_config, config, [str(number) for number in range(CLASSES)], STEPS)
    images = config.global_batch_size // data_parallel(accelerator)[1]
    size, device = config.image_size, accelerator.device
    ones = [torch.ones(images, dtype=kind, device=device) for kind in (torch.int64, torch.bool, torch.int64)]
    batch, stack = Batch(torch.randn(images, 3, size, size, device=device), *ones, digest=0), ExitStack()
    loader = SimpleNamespace(starting_at=lambda step: itertools.repeat(batch))
    # The loop calls it after every step.
    run.profiler = SimpleNamespace(step=lambda: stack.enter_context(watch) if run.step == 1 else stack.close())
    updating = model if recipe.__name__ == "vit_zero" else optimizer  # DeepSpeed's engine updates within the backward
    update = updating.step

    def noted_update() -> None:
        if run.step == 1 and before_update:
            before_update(model, optimizer)
        update()

    updating.step = noted_update
    recipe.train_one_epoch(accelerator, model, *pipeline, loader, optimizer, scheduler, config, run)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return accelerator.process_index


@contextlib.contextmanager
def cuda_peak() -> Iterator[SimpleNamespace]:
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()


def worker(arguments: argparse.Namespace) -> None:
    """One process of a launch: count, and write what this rank held."""
    recipe, config = recipe_and_config(arguments, STRATEGIES)
    counted, on_gpu = {}, torch.cuda.is_available()
    watch = cuda_peak() if on_gpu else LiveTensors()

    def before_update(model, optimizer) -> None:
        counted.update(count(model, optimizer))
        live = torch.cuda.memory_allocated() if on_gpu else watch.total
        counted["other"] = live - sum(counted.values())

    rank = train(recipe, config, arguments.worker, watch, before_update)
    counted["peak"] = torch.cuda.max_memory_allocated() if on_gpu else watch.peak
    (arguments.worker / f"{rank}.json").write_text(json.dumps(counted))


def recipe_and_config(arguments: argparse.Namespace, strategies: dict[str, Strategy]) -> tuple:
    """Of a worker's one strategy and model."""
    model, strategy = arguments.models[0], strategies[arguments.strategies[0]]
    recipe, sizes = importlib.import_module(strategy.recipe), strategy.sizes(int(os.environ["WORLD_SIZE"]))
    return recipe, recipe.Config(model=model, global_batch_size=BATCH, **image_of(model), **sizes)


def launch(strategy: Strategy, ranks: int, flags: list[str]) -> list:
    """What each rank of the worker, in the benchmark that runs, wrote."""
    config = str(ROOT / "accelerate_configs" / f"local_{strategy.config}.yaml")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        command += ["--num_processes", str(ranks), sys.argv[0], *flags, "--worker", folder]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        files = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        if not all(file.exists() for file in files):
            raise RuntimeError(f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-8000:]}")
        return [json.loads(file.read_text()) for file in files]


def real_cases(arguments: argparse.Namespace, strategies: dict[str, Strategy]) -> Iterator[tuple[dict, dict, list]]:
    """The case, the recipe's sizes, and what each rank wrote."""
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


def row(case: dict, how: str, counted: dict, expected: dict) -> dict:
    """Of one rank; `off` where a kind of bytes, or their sum, is not within 5 % of the formula's."""
    line = case | {"measured": bool(counted), "how": how}
    line |= {f"{kind}_bytes": counted.get(kind) for kind in (*KINDS, "other", "peak")}
    line |= {f"formula_{kind}_bytes": round(expected[kind]) for kind in KINDS}
    if not counted:
        return line
    ratio = held(line) / held(line, "formula_")
    off = any(abs(each - 1) > 0.05 for each in (ratio, *(counted[kind] / expected[kind] for kind in KINDS)))
    return line | {"ratio": round(ratio, 4), "off": off, "why": WHY.get(case["strategy"], "") if off else ""}


def real_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    for case, sizes, ranks in real_cases(arguments, STRATEGIES):
        for rank, counted in enumerate(ranks):
            expected = formula(case["strategy"], shapes_of(case["model"]), len(ranks), rank, sizes)
            yield row(case | {"rank": rank}, "step", counted, expected)


# One rank of many


def fake_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """Rank 0 and the last, which has fewer rows under FSDP2; ZeRO by formula alone."""
    for model, ranks, name in itertools.product(arguments.models, FAKE_RANKS, arguments.strategies):
        if ranks not in arguments.ranks[model]:
            continue
        shapes = shapes_of(model)
        # Tensor parallelism alone holds the same on any number of ranks.
        wanted = (name, ranks) in (("tp", FAKE_RANKS[0]), ("tp_fsdp", FAKE_RANKS[-1]))
        sizes = [{"tensor_parallel_size": size} for size in (2, 4, 8) if wanted and SIZES[model][2] % size == 0]
        for each, rank in itertools.product(sizes or [{}], (0, ranks - 1)):
            case = {"model": model, "strategy": name, "ranks": ranks, **tensor_of(each), "rank": rank}
            expected = formula(name, shapes, ranks, rank, each)
            if name.startswith("zero"):
                yield row(case, "formula", {}, expected)
            elif name in ("fsdp", "hsdp") or each:
                yield row(case, "fake", fake_rank(name, model, ranks, rank, each), expected)


def fake_rank(strategy: str, model: str, ranks: int, rank: int, sizes: dict) -> dict[str, int]:
    """The recipe's shards on this rank, without memory. Gradients take as much; Adam twice the rows that exist, and a
    4-byte count of steps for each parameter."""
    import vit_fsdp
    import vit_tp
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    tensor, names = sizes.get("tensor_parallel_size", 1), ("dp_replicate", "dp_shard")
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", parallelism_config=None)
    accelerator.mesh = init_device_mesh("cpu", (1, ranks // tensor, tensor), mesh_dim_names=MESH)
    if strategy == "hsdp":
        accelerator.parallelism_config = SimpleNamespace(fsdp_dim_names=names)
        accelerator.torch_device_mesh = init_device_mesh("cpu", (REPLICAS, ranks // REPLICAS), mesh_dim_names=names)
    recipe = vit_tp if sizes else vit_fsdp
    config = recipe.Config(model=model, **image_of(model), **sizes)
    network = vit_fsdp.build_model(config, CLASSES, 0)
    network.to = network.to_empty = lambda device: network  # no memory, and no values
    vit_fsdp.init_weights = lambda *_: None
    vit_tp.strategy = lambda: "ddp" if strategy == "tp" else "fsdp"  # the YAML's to say, for launched ones
    recipe.parallelize(accelerator, network, config, *(() if sizes else (0,)))
    weights = list(network.parameters())
    torch.distributed.destroy_process_group()
    shards = sum(storages(weights).values())
    state = sum(8 * weight.to_local().numel() + 4 for weight in weights)
    return by_kind(shards, shards, state)


# What a reader sees


def held(row: dict, which: str = "") -> int:
    """Bytes of all kinds; which = `formula_`: by the formula."""
    return sum(row[f"{which}{kind}_bytes"] for kind in KINDS)


def shown(row: dict) -> dict:
    """A line of the printed table, MiB."""
    line = {name: row.get(name) for name in ("model", "strategy", "ranks", "tensor", "rank", "how")}
    for name in (*KINDS, "other", "peak"):
        line[f"{name}_MiB"] = None if row[f"{name}_bytes"] is None else row[f"{name}_bytes"] / MIB
    return line | {
        "formula_MiB": held(row, "formula_") / MIB,
        "ratio": row.get("ratio"),
        "": "off" * row.get("off", False),
    }


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    real, fake = (
        [row for row in rows if row["how"] == how and row["strategy"] in some]
        for how, some in (("step", STRATEGIES), ("fake", ("fsdp",)))
    )
    for panel, function, part in ((left, plot_strategies, real), (right, plot_ranks, fake)):
        function(panel, part) if part else panel.set_axis_off()
    figure.savefig(path, dpi=150)


def plot_strategies(axes, rows: list[dict]) -> None:
    """The fullest rank under each strategy, of the case with most ranks and of its largest model."""
    ranks, _, model = max((row["ranks"], list(SIZES).index(row["model"]), row["model"]) for row in rows)
    chosen = sorted((row for row in rows if (row["ranks"], row["model"]) == (ranks, model)), key=held)
    fullest = {row["strategy"]: row for row in chosen}  # a later row of a strategy replaces a former
    fullest = {name: fullest[name] for name in STRATEGIES if name in fullest}
    bottom, colours = [0.0] * len(fullest), ("#4477AA", "#EE6677", "#CCBB44", "#CCCCCC")
    labels = (*KINDS[:2], "optimizer state", "other: buckets, batch")
    for kind, label, colour in zip((*KINDS, "other"), labels, colours, strict=True):
        heights = [row[f"{kind}_bytes"] / GIB for row in fullest.values()]
        axes.bar(list(fullest), heights, bottom=bottom, color=colour, label=label)
        bottom = list(map(sum, zip(bottom, heights, strict=True)))
    expected = [held(row, "formula_") / GIB for row in fullest.values()]
    axes.plot(list(fullest), expected, "_", color="black", markersize=28, label="formula, without other")
    peaks = [row["peak_bytes"] / GIB for row in fullest.values()]
    axes.plot(list(fullest), peaks, "kD", markersize=5, label="peak of the step")
    axes.set(title=f"ViT-{model}, {ranks} ranks, {BATCH} images a step: the fullest rank", ylabel="GiB per rank")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(ncols=2)


def plot_ranks(axes, rows: list[dict]) -> None:
    """FSDP2's rank 0 and last rank over the number of ranks, beside the formula and an even share."""
    models = dict.fromkeys(row["model"] for row in rows)
    for model, colour in zip(models, ("#4477AA", "#EE6677", "#228833"), strict=False):
        whole = 16 * sum(map(math.prod, shapes_of(model).values())) / MIB
        first, last = ([row for row in rows if row["model"] == model and (row["rank"] > 0) == up] for up in (0, 1))
        ranks, sizes = [row["ranks"] for row in first], [held(row) / MIB for row in first]
        others = [held(row) / MIB for row in last]
        axes.plot(ranks, sizes, "o", color=colour, label=f"ViT-{model}, rank 0, counted")
        axes.plot(ranks, others, "o", color=colour, fillstyle="none", label="last rank, counted")
        axes.plot(ranks, [held(row, "formula_") / MIB for row in first], color=colour, label="rank 0, formula")
        axes.plot(ranks, [whole / number for number in ranks], ":", color=colour, label="even share, 16 P / ranks")
        for number, size in zip(ranks, sizes, strict=True):
            excess = f"+{size * number / whole - 1:.0%}"
            axes.annotate(excess, (number, size), (6, 6), textcoords="offset points", fontsize=8, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(FAKE_RANKS, map(str, FAKE_RANKS))
    axes.set_xlim(FAKE_RANKS[0] / 1.5, FAKE_RANKS[-1] * 2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(title="FSDP2, all three kinds (+ %: rank 0 over an even share)", xlabel="ranks", ylabel="MiB per rank")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 10, 1.5 * high)  # room for the legend
    axes.legend(fontsize=8, loc="lower center", ncols=len(models))


def parse(description: str, strategies: dict[str, Strategy], default_ranks: dict[str, tuple]) -> argparse.Namespace:
    """The command line; `ranks` becomes those of each model. Default ranks of () are the most that a strategy has."""
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


def results_name(benchmark: str) -> str:
    """A run of selected cases does not replace the whole one of that day."""
    return benchmark if len(sys.argv) == 1 else f"{benchmark}_part"


def words(text: str) -> list[str]:
    return text.split(",")


def main() -> None:
    arguments = parse(__doc__, STRATEGIES, RANKS)
    if arguments.worker:
        return worker(arguments)
    rows = []
    for each in itertools.chain(real_rows(arguments), fake_rows(arguments)):
        rows.append(each)
        print(table([shown(each)]).splitlines()[-1], flush=True)
    for line in sorted({f"off: {each['strategy']}: {each['why']}" for each in rows if each.get("off")}):
        print(line)
    print(table([shown(each) for each in rows if each["rank"] in (0, each["ranks"] - 1) or each["strategy"] == "pp"]))
    path = write(results_name("memory"), rows, sides=SIDES, classes=CLASSES, global_batch_size=BATCH)
    plot(rows, ROOT / path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()

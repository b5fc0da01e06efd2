# SPDX-License-Identifier: Apache-2.0
"""Count the bytes that a rank holds under each strategy, beside the arithmetic.

    python benchmarks/memory.py                                             # all: 33 launches, then fake ranks
    python benchmarks/memory.py --models S --ranks 2 --strategies fsdp      # one launch: under 30 s
    python benchmarks/memory.py --models B --ranks 1,2,4                    # real processes only

Up to 4 ranks are real processes (on GPUs, or gloo on a CPU): each case is a launch that takes two steps of the
recipe's own loop on made-up images. In the second, just before the optimizer updates, the bytes are counted of the
storages of parameters, gradients and optimizer state; `other` is what else lives then (buckets, the batch). The peak
is CUDA's; on a CPU it is the greatest sum of live tensors during that step. From 8 ranks on, one rank of a fake
process group is cut from meta tensors by the recipe's `parallelize`: exact shards, but no step. ZeRO cannot be cut so
and is given by the formula, as `"measured": false`.

The formula, for P parameters in fp32: 4 P for weights, 4 P for gradients, 8 P for Adam. (The ZeRO paper,
arXiv:1910.02054, has 2 P, 2 P and 12 P in mixed precision, where the optimizer keeps an fp32 copy of the weights: 16 P
in both.) Writes benchmarks/results/memory_<hardware>_<date>.json (memory_part_... where flags select cases), and its
chart beside it as .png.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import launches
import torch
from launches import BATCH, CLASSES, MIB, REPLICAS, SIDES, shapes_of, tensor_of
from memory_estimate import KINDS, by_kind, held
from report import ROOT, table, write
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from shared.accelerator import MESH
from shared.models.vit import SIZES

GIB = 2**30
STRATEGIES = launches.STRATEGIES | {"zero3_offload": launches.STRATEGIES["zero3"]._replace(config="zero3_offload")}
STRATEGIES |= {
    f"{name}_bf16": each._replace(ranks=(2,), flags=("--mixed_precision", "bf16"))
    for name, each in STRATEGIES.items()
    if 2 in each.ranks
}
FAKE_RANKS = (8, 64, 256, 1024)
RANKS = {"S": (1, 2, 4), "B": (1, 2, 4, *FAKE_RANKS), "L": FAKE_RANKS, "G": FAKE_RANKS}  # those measured by default
WHY = {
    "zero1": "DeepSpeed drops the other ranks' gradients at the end of the backward; the paper's stage 1 keeps them",
}


# The arithmetic


def formula(strategy: str, shapes: dict, ranks: int, rank: int, sizes: dict) -> dict[str, float]:
    """Return the bytes of parameters, gradients and optimizer state on this rank; zero1 as in its paper."""
    half, strategy = strategy.endswith("_bf16"), strategy.removesuffix("_bf16")
    kind = {"tp": "ddp", "pp": "ddp", "tp_fsdp": "fsdp", "zero3_offload": "zero3"}.get(strategy, strategy)
    split = {"weight_bytes": 2 if half and kind.startswith("zero") else 4, "offloads": strategy == "zero3_offload"}
    split |= {"tensor": sizes.get("tensor_parallel_size", 1), "stages": ranks if strategy == "pp" else 1}
    return held(kind, shapes, ranks, rank, **split, replicas=REPLICAS if kind == "hsdp" else 1, accumulates=True)


# What a tensor takes


def local_part(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def storages(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Return the bytes of each storage below these tensors, by its address."""
    found = (local_part(tensor).untyped_storage() for tensor in tensors if tensor is not None)
    return {storage._cdata: storage.nbytes() for storage in found}


def count(model, optimizer) -> dict[str, int]:
    """Return the bytes by kind, each storage once; DeepSpeed's are its flat partitions, its copy of the weights is
    state."""
    weights = list(model.parameters())
    parameters = storages(weights) | storages(getattr(weight, "ds_tensor", None) for weight in weights)
    gradients, state = storages(weight.grad for weight in weights), {}
    while hasattr(optimizer, "optimizer"):  # Accelerate's wrapper, then DeepSpeed's
        optimizer = optimizer.optimizer
        for parts in (getattr(optimizer, "averaged_gradients", None) or {}).values():
            gradients |= storages(parts)
        gradients |= storages(each.grad for each in getattr(optimizer, "fp32_partitioned_groups_flat", ()))
        gradients |= storages([getattr(optimizer, "grad_partitions_flat_buffer", None)])
        for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
            state |= storages(getattr(optimizer, name, ()))
    values = itertools.chain.from_iterable(values.values() for values in optimizer.state.values())
    state |= storages(value for value in values if torch.is_tensor(value))
    own = [{key: kind[key] for key in kind if key not in parameters} for kind in (gradients, state)]
    return by_kind(*(sum(kind.values()) for kind in (parameters, *own)))


class LiveTensors(TorchDispatchMode):
    """The bytes of the storages that are alive, now and at most.

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


@contextlib.contextmanager
def cuda_peak() -> Iterator[SimpleNamespace]:
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.synchronize()


def worker(arguments: argparse.Namespace) -> None:
    """Run one process of a launch: count, and write what this rank held."""
    recipe, images, config = launches.recipe_and_config(arguments, STRATEGIES)
    counted, on_gpu = {}, torch.cuda.is_available()
    watch = cuda_peak() if on_gpu else LiveTensors()

    def before_update(model, optimizer) -> None:
        counted.update(count(model, optimizer))
        live = torch.cuda.memory_allocated() if on_gpu else watch.total
        counted["other"] = live - sum(counted.values())

    rank = launches.train(recipe, images, config, arguments.worker, watch, before_update)
    counted["peak"] = torch.cuda.max_memory_allocated() if on_gpu else watch.peak
    (arguments.worker / f"{rank}.json").write_text(json.dumps(counted))


def row(case: dict, how: str, counted: dict, expected: dict) -> dict:
    """Return one rank's row; `off` where a kind of bytes, or their sum, is not within 5 % of the formula's."""
    line = case | {"measured": bool(counted), "how": how}
    line |= {f"{kind}_bytes": counted.get(kind) for kind in (*KINDS, "other", "peak")}
    line |= {f"formula_{kind}_bytes": round(expected[kind]) for kind in KINDS}
    if not counted:
        return line
    ratio = bytes_of(line) / bytes_of(line, "formula_")
    off = any(abs(each - 1) > 0.05 for each in (ratio, *(counted[kind] / expected[kind] for kind in KINDS)))
    why = WHY.get(case["strategy"].removesuffix("_bf16"), "") if off else ""
    return line | {"ratio": round(ratio, 4), "off": off, "why": why}


def real_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    for case, sizes, ranks in launches.real_cases(arguments, STRATEGIES):
        for rank, counted in enumerate(ranks):
            expected = formula(case["strategy"], shapes_of(case["model"]), len(ranks), rank, sizes)
            yield row(case | {"rank": rank}, "step", counted, expected)


# One rank of many


def fake_rows(arguments: argparse.Namespace) -> Iterator[dict]:
    """Yield rows of rank 0 and of the last, which has fewer rows under FSDP2; those of ZeRO by formula alone."""
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
    """Return the bytes of the recipe's shards on this rank, made without memory. Gradients take as much; Adam twice
    the rows that exist, and a 4-byte count of steps for each parameter."""
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
    images, config = launches.configs_of(recipe, model, **sizes)
    network = vit_fsdp.build_model(images, config, CLASSES, 0)
    network.to = network.to_empty = lambda device: network  # no memory, and no values
    vit_fsdp.init_weights = lambda *_: None
    vit_tp.strategy = lambda: "ddp" if strategy == "tp" else "fsdp"  # in a launch, the YAML decides
    recipe.parallelize(accelerator, network, config, *(() if sizes else (0,)))
    weights = list(network.parameters())
    torch.distributed.destroy_process_group()
    shards = sum(storages(weights).values())
    state = sum(8 * weight.to_local().numel() + 4 for weight in weights)
    return by_kind(shards, shards, state)


# What a reader sees


def bytes_of(row: dict, which: str = "") -> int:
    """Return the bytes of all kinds; which = `formula_`: by the formula."""
    return sum(row[f"{which}{kind}_bytes"] for kind in KINDS)


def shown(row: dict) -> dict:
    """Return a line of the printed table, in MiB."""
    line = {name: row.get(name) for name in ("model", "strategy", "ranks", "tensor", "rank", "how")}
    for name in (*KINDS, "other", "peak"):
        line[f"{name}_MiB"] = None if row[f"{name}_bytes"] is None else row[f"{name}_bytes"] / MIB
    return line | {
        "formula_MiB": bytes_of(row, "formula_") / MIB,
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
    """Plot the fullest rank under each strategy, of the case with most ranks and of its largest model."""
    ranks, _, model = max((row["ranks"], list(SIZES).index(row["model"]), row["model"]) for row in rows)
    chosen = sorted((row for row in rows if (row["ranks"], row["model"]) == (ranks, model)), key=bytes_of)
    fullest = {row["strategy"]: row for row in chosen}  # a later row of a strategy replaces an earlier one
    fullest = {name: fullest[name] for name in STRATEGIES if name in fullest}
    bottom, colours = [0.0] * len(fullest), ("#4477AA", "#EE6677", "#CCBB44", "#CCCCCC")
    labels = (*KINDS[:2], "optimizer state", "other: buckets, batch")
    for kind, label, colour in zip((*KINDS, "other"), labels, colours, strict=True):
        heights = [row[f"{kind}_bytes"] / GIB for row in fullest.values()]
        axes.bar(list(fullest), heights, bottom=bottom, color=colour, label=label)
        bottom = list(map(sum, zip(bottom, heights, strict=True)))
    expected = [bytes_of(row, "formula_") / GIB for row in fullest.values()]
    axes.plot(list(fullest), expected, "_", color="black", markersize=28, label="formula, without other")
    peaks = [row["peak_bytes"] / GIB for row in fullest.values()]
    axes.plot(list(fullest), peaks, "kD", markersize=5, label="peak of the step")
    axes.set_xticks(range(len(fullest)), [name.replace("_", "\n") for name in fullest])
    axes.set(title=f"ViT-{model}, {ranks} ranks, {BATCH} images a step: the fullest rank", ylabel="GiB per rank")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(ncols=2)


def plot_ranks(axes, rows: list[dict]) -> None:
    """Plot FSDP2's rank 0 and last rank over the number of ranks, beside the formula and an even share."""
    models = dict.fromkeys(row["model"] for row in rows)
    for model, colour in zip(models, ("#4477AA", "#EE6677", "#228833"), strict=False):
        whole = 16 * sum(map(math.prod, shapes_of(model).values())) / MIB
        first, last = ([row for row in rows if row["model"] == model and (row["rank"] > 0) == up] for up in (0, 1))
        ranks, sizes = [row["ranks"] for row in first], [bytes_of(row) / MIB for row in first]
        others = [bytes_of(row) / MIB for row in last]
        axes.plot(ranks, sizes, "o", color=colour, label=f"ViT-{model}, rank 0, counted")
        axes.plot(ranks, others, "o", color=colour, fillstyle="none", label="last rank, counted")
        axes.plot(ranks, [bytes_of(row, "formula_") / MIB for row in first], color=colour, label="rank 0, formula")
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


def main() -> None:
    arguments = launches.parse(__doc__, STRATEGIES, RANKS)
    if arguments.worker:
        return worker(arguments)
    rows = []
    for each in itertools.chain(real_rows(arguments), fake_rows(arguments)):
        rows.append(each)
        print(table([shown(each)]).splitlines()[-1], flush=True)
    for line in sorted({f"off: {each['strategy']}: {each['why']}" for each in rows if each.get("off")}):
        print(line)
    print(table([shown(each) for each in rows if each["rank"] in (0, each["ranks"] - 1) or each["strategy"] == "pp"]))
    path = write(launches.results_name("memory"), rows, sides=SIDES, classes=CLASSES, global_batch_size=BATCH)
    plot(rows, ROOT / path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()

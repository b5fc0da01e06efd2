# SPDX-License-Identifier: Apache-2.0
"""Count the collectives and bytes of one training step under each strategy, beside the arithmetic.

    python benchmarks/communication.py                                             # all: 22 launches
    python benchmarks/communication.py --models demo --ranks 2 --strategies fsdp   # one launch: under 30 s

Each case is a launch of real processes (on GPUs, or gloo on a CPU) that takes two steps of the recipe's own loop; in
the second each call of a collective is noted where PyTorch's dispatcher passes it on to c10d. DDP's reducer, FSDP2,
DTensor, the pipeline and DeepSpeed's wrappers all call these operations, so one counter serves them all, and what gloo
makes of them below (a reduce-scatter as an all-reduce) does not enter.

payload: the whole tensor that the collective works on, on one rank: the input of an all-reduce, reduce-scatter or
send, the output of an all-gather. ring: what one rank of n then sends by a ring: 2 (n - 1) / n of the payload for an
all-reduce, (n - 1) / n for a reduce-scatter or all-gather, all for a send. Calls of at most 64 bytes stand apart as
`scalars`: the gradient's norm, DeepSpeed's overflow flag, the mean loss and what else a logged step adds up.
Writes benchmarks/results/communication_<hardware>_<date>.json (communication_part_... where flags select cases), and
its chart beside it as .png.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import launches
from launches import BATCH, MIB, REPLICAS, SIDES, Strategy, image_of, shapes_of
from memory_estimate import stage_of, tensor_shard
from report import ROOT, table, write
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.models.vit import SIZES

STRATEGIES = launches.STRATEGIES | {
    "tp": Strategy("vit_tp", "tp", (2,), lambda ranks: {"tensor_parallel_size": 2}),
    "tp_sp": Strategy("vit_tp", "tp", (2,), lambda ranks: {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pp_dp": Strategy("vit_pp", "pp", (4,), lambda _: {"pipeline_parallel_size": 2, "pipeline_chunks": 2}),
}
CUTS, SCALARS = ("tensor", "pipeline"), 64  # bytes
COLOURS = {"all-reduce": "#4477AA", "all-gather": "#66CCEE", "reduce-scatter": "#EE6677", "send": "#CCBB44"}
NORM = "the gradient's norm: a number for each parameter"
TO_ALL = "DeepSpeed's use_multi_rank_bucket_allreduce: all gradients to all, then each keeps its part"
WHY = {
    ("ddp", "broadcast"): "once a run, in the second step: the order of DDP's rebuilt buckets",
    ("fsdp", "all-reduce"): NORM,
    **{(strategy, "all-reduce"): f"with {NORM}" for strategy in ("hsdp", "tp", "tp_sp")},
    ("tp_fsdp", "all-reduce"): f"with {NORM}, over each dimension of the mesh",
    **{(strategy, "all-reduce"): TO_ALL for strategy in ("zero1", "zero2")},
    **{(strategy, "reduce-scatter"): "an all-reduce instead" for strategy in ("zero1", "zero2")},
    # With both at 0, ViT-S came to 2 P less the 126 weights below 1e5 that always stay whole.
    ("zero3", "all-gather"): "DeepSpeed's stage3_max_reuse_distance, 1e9, and stage3_prefetch_bucket_size, 5e7: "
    "a smaller model stays whole until its backward",
    ("zero3", "broadcast"): "once a run, in the second step: that all ranks ran the same modules",
}

# c10d's operation: our name, and which of its arguments are the whole tensor (None: its result) and the group.
COLLECTIVES = {
    "c10d::allreduce_": ("all-reduce", 0, 1),
    "c10d::allreduce_coalesced_": ("all-reduce", 0, 1),
    "c10d::allgather_": ("all-gather", 0, 2),
    "c10d::_allgather_base_": ("all-gather", 0, 2),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 0, 2),
    "c10d::reduce_scatter_": ("reduce-scatter", 1, 2),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1, 2),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1, 2),
    "c10d::broadcast_": ("broadcast", 0, 1),
    "c10d::reduce_": ("reduce", 0, 1),
    "c10d::send": ("send", 0, 1),
    "_c10d_functional::all_reduce": ("all-reduce", 0, 2),
    "_c10d_functional::all_reduce_": ("all-reduce", 0, 2),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", None, 2),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0, 3),
}
# A receive is another rank's send; the rest sends nothing of ours.
UNCOUNTED = {
    "c10d::recv_",
    "c10d::barrier",
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
}


class Collectives(TorchDispatchMode):
    """A record of each collective called within this context: name, bytes of its whole tensor, size of its group."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if DTensor in types:
            return NotImplemented  # it calls again with the local tensors
        result = function(*arguments, **keywords or {})
        name = function._schema.name
        if name in COLLECTIVES:
            collective, tensors, group = COLLECTIVES[name]
            whole = tree_leaves(result if tensors is None else arguments[tensors])
            self.calls.append((collective, sum(tensor.nbytes for tensor in whole), group_size(arguments[group])))
        else:
            assert "c10d" not in name or name in UNCOUNTED, name
        return result


def group_size(group) -> int:
    """Return the size of a group that is given by name (functional collectives) or boxed by the dispatcher."""
    group = _resolve_process_group(group) if isinstance(group, str) else group
    return (group if isinstance(group, ProcessGroup) else ProcessGroup.unbox(group)).size()


def worker(arguments: argparse.Namespace) -> None:
    """Run one process of a launch: note the calls of a step, and write them."""
    recipe, images, config = launches.recipe_and_config(arguments, STRATEGIES)
    watch = Collectives()
    rank = launches.train(recipe, images, config, arguments.worker, watch)
    (arguments.worker / f"{rank}.json").write_text(json.dumps(watch.calls))


# The arithmetic


def formula(strategy: str, model: str, ranks: int, rank: int, sizes: dict) -> dict[str, tuple[float, int]]:
    """Return, for each collective, the payload bytes of a step on this rank and the size of the group."""
    shapes, tensor, stages = shapes_of(model), *(sizes.get(f"{kind}_parallel_size", 1) for kind in CUTS)
    whole, data = 4 * sum(map(math.prod, shapes.values())), ranks // (tensor * stages)
    images = BATCH // data
    if strategy == "ddp":
        return {"all-reduce": (whole, ranks)}
    if strategy.startswith("zero"):
        # An all-reduce's two halves: gradients to their owner, new weights back. ZeRO-3 gathers the weights for the
        # forward and again for the backward instead (arXiv:1910.02054, section 7).
        return {"reduce-scatter": (whole, ranks), "all-gather": ((1 + (strategy == "zero3")) * whole, ranks)}
    if strategy.startswith("pp"):
        # Activations of all chunks to the next stage, their gradients to the previous one.
        stage = rank // data
        mine = [shape for name, shape in shapes.items() if stage_of(name, shapes, stages) == stage]
        sent = {"send": (((stage < stages - 1) + (stage > 0)) * activations(model, images), stages)}
        return sent | ({"all-reduce": (4 * sum(map(math.prod, mine)), data)} if data > 1 else {})
    # Each block multiplies two pairs of matrices; each pair adds up its output in the forward, and the gradient of its
    # input in the backward (arXiv:1909.08053, figure 3).
    crossings = 4 * SIZES[model][1] * activations(model, images, tensor if strategy == "tp_sp" else 1)
    if strategy == "tp_sp":
        # Each of these sums as a reduce-scatter and an all-gather (arXiv:2205.05198, section 4.2). All-gathers at both
        # ends: the last norm's input, and the embeddings' gradient. And a process sees only its tokens, so each block
        # sums the gradients of two norms' weight and bias.
        ends, norms = 2 * activations(model, images, tensor), 4 * SIZES[model][1] * 4 * SIZES[model][0]
        found = {"reduce-scatter": crossings, "all-gather": crossings + ends, "all-reduce": norms}
        return {name: (size, tensor) for name, size in found.items()}
    found = {"all-reduce": (crossings, tensor)} if tensor > 1 else {}
    return found if strategy == "tp" else found | of_fsdp(strategy, shapes, ranks, tensor)


def activations(model: str, images: int, multiple: int = 1) -> int:
    """Return the bytes between two blocks: images x tokens x width in fp32, the tokens rounded up to a multiple."""
    image_size, patch_size = image_of(model).values()
    tokens = (image_size // patch_size) ** 2 + 1
    return 4 * images * -(-tokens // multiple) * multiple * SIZES[model][0]


def of_fsdp(strategy: str, shapes: dict, ranks: int, tensor: int) -> dict[str, tuple[float, int]]:
    """Return FSDP2's collectives. Blocks are gathered for the forward and again for the backward; the root's
    weights (embeddings, last norm, head) once, since they stay. Rows are rounded up to a multiple of the shards."""
    replicas = REPLICAS if strategy == "hsdp" else 1
    shards, blocks, root = ranks // (tensor * replicas), 0, 0
    for name, shape in shapes.items():
        rows, *row = tensor_shard(name, shape, tensor)
        size = 4 * -(-rows // shards) * shards * math.prod(row)
        blocks, root = (blocks + size, root) if ".layers." in name else (blocks, root + size)
    found = {"all-gather": (2 * blocks + root, shards), "reduce-scatter": (blocks + root, shards)}
    return found | ({"all-reduce": ((blocks + root) / shards, replicas)} if replicas > 1 else {})


def rows_of(case: dict, calls: list, expected: dict) -> Iterator[dict]:
    """Yield a row for each collective of one rank; `off` where its payload is not within 5 % of the formula's, or
    where the formula has none and it is more than 1 % of what the rank sends."""
    by_name = defaultdict(list)
    for collective, size, group in calls:
        if group > 1:  # vit_tp.py's FSDP2 also calls for groups of one process, which send nothing
            by_name["scalars" if size <= SCALARS else collective].append((collective, size, group))
    rings = {name: sum(size * ring_share(what, group) for what, size, group in by_name[name]) for name in [*by_name]}
    for name in sorted({*expected, *by_name}):
        payload, (size, group) = sum(size for _, size, _ in by_name[name]), expected.get(name, (0, 1))
        line = {"collective": name, "calls": len(by_name[name]), "payload_bytes": payload}
        line |= {"ring_bytes": round(rings.get(name, 0)), "formula_bytes": round(size)}
        line |= {"formula_ring_bytes": round(size * ring_share(name, group))}
        line |= {"ratio": round(payload / size, 4) if size else None}
        off = abs(payload / size - 1) > 0.05 if size else rings[name] > 0.01 * sum(rings.values())
        yield case | line | {"off": off, "why": WHY.get((case["strategy"], name), "")}


def ring_share(collective: str, group: int) -> float:
    """Return the bytes that a rank sends per byte of the payload."""
    return 1 if collective == "send" else (2 if collective == "all-reduce" else 1) * (group - 1) / group


def plot(rows: list[dict], path: Path) -> None:
    """Plot, for each model, what the rank that sends most sends by rings in a step; broadcasts and scalars are too
    small."""
    from matplotlib import pyplot

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(models), figsize=(7 * len(models), 5.5), layout="constrained", squeeze=False)
    for model, panel in zip(models, axes[0], strict=True):
        of_model = [row for row in rows if row["model"] == model]
        plot_model(panel, model, of_model)
    figure.savefig(path, dpi=150)


def plot_model(axes, model: str, rows: list[dict]) -> None:
    by_rank = defaultdict(dict)
    for row in rows:
        by_rank[row["strategy"], row["ranks"], row["rank"]][row["collective"]] = row
    order = sorted(by_rank, key=lambda case: sum(row["ring_bytes"] for row in by_rank[case].values()))
    most = {(strategy, ranks): by_rank[strategy, ranks, rank] for strategy, ranks, rank in order}
    cases = sorted(most, key=lambda case: (list(STRATEGIES).index(case[0]), case[1]))
    names, bottom = [f"{strategy}\n{ranks}" for strategy, ranks in cases], [0.0] * len(cases)
    for collective, colour in COLOURS.items():
        heights = [most[case].get(collective, {"ring_bytes": 0})["ring_bytes"] / MIB for case in cases]
        if any(heights):
            axes.bar(names, heights, bottom=bottom, color=colour, label=collective)
        bottom = [sum(pair) for pair in zip(bottom, heights, strict=True)]
    expected = [sum(row["formula_ring_bytes"] for row in most[case].values()) / MIB for case in cases]
    axes.plot(names, expected, "_", color="black", markersize=26, label="formula")
    title = f"ViT-{model}, {image_of(model)['image_size']} px, {BATCH} images a step"
    below = "strategy, ranks (tp and pp send in proportion to the images, the others to the weights)"
    axes.set(title=title, xlabel=below, ylabel="MiB sent by a rank in a step, by rings")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(ncols=2)


def shown(row: dict) -> dict:
    """Return a line of the printed table, in MiB."""
    line = {name.replace("_bytes", "_MiB"): value for name, value in row.items() if name not in ("off", "why")}
    for name in ("payload", "ring", "formula", "formula_ring"):
        line[f"{name}_MiB"] = row[f"{name}_bytes"] / MIB
    return line | {"": "off" if row["off"] else "", "why": row["why"]}


def main() -> None:
    arguments = launches.parse(__doc__, STRATEGIES, {"demo": (), "S": ()})
    if arguments.worker:
        return worker(arguments)
    rows = []
    for case, sizes, ranks in launches.real_cases(arguments, STRATEGIES):
        for rank, calls in enumerate(ranks):
            expected = formula(case["strategy"], case["model"], len(ranks), rank, sizes)
            rows += rows_of(case | {"rank": rank}, calls, expected)
        print(table([shown(row) for row in rows if row.items() >= case.items() and row["rank"] in (0, 1)]))
    path = write(launches.results_name("communication"), rows, sides=SIDES, global_batch_size=BATCH)
    plot(rows, ROOT / path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()

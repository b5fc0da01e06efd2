# SPDX-License-Identifier: Apache-2.0
"""Collectives and bytes of one training step under each strategy, counted, beside the arithmetic.

    python benchmarks/communication.py                                             # all; about 6 minutes on 2 cores
    python benchmarks/communication.py --models demo --ranks 2 --strategies fsdp   # one launch: under 30 s

Each case is a launch of real processes (on GPUs, or gloo on a CPU) that takes two steps of the recipe's own loop; in
the second each call of a collective is noted where PyTorch's dispatcher passes it on to c10d. DDP's reducer, FSDP2,
DTensor, the pipeline and DeepSpeed's wrappers all call these operations, so one counter serves them all, and what gloo
makes of them below (a reduce-scatter as an all-reduce) does not enter.

payload: the whole tensor that the collective works on, on one rank: the input of an all-reduce, reduce-scatter or
send, the output of an all-gather. ring: what one rank of n then sends by a ring: 2 (n - 1) / n of the payload for an
all-reduce, (n - 1) / n for a reduce-scatter or all-gather, all for a send. Calls of at most 64 bytes stand apart as
`scalars`: the gradient's norm, DeepSpeed's overflow flag, the mean loss and what else a logged step adds up.
Writes benchmarks/results/communication_<hardware>_<date>.json, and its chart beside it as .png.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import memory
from memory import Strategy
from report import ROOT, table, write
from torch.distributed.distributed_c10d import ProcessGroup, _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.vit import SIZES

STRATEGIES = memory.STRATEGIES | {
    "tp": Strategy("vit_tp", "tp", (2,), lambda ranks: {"tensor_parallel_size": 2}),
    "tp_sp": Strategy("vit_tp", "tp", (2,), lambda ranks: {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pp_ddp": Strategy("vit_pp", "pp", (4,), lambda ranks: {"pipeline_parallel_size": 2, "pipeline_chunks": 2}),
}
CUTS, SCALARS = ("tensor", "pipeline"), 64  # bytes
COLOURS = {"all-reduce": "#4477AA", "all-gather": "#66CCEE", "reduce-scatter": "#EE6677", "send": "#CCBB44"}
COLOURS |= {"broadcast": "#228833", "reduce": "#AA3377", "scalars": "#BBBBBB"}
WHY = {}

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
# A receive is another rank's send.
UNCOUNTED = {"c10d::recv_", "c10d::barrier", "_c10d_functional::wait_tensor"}


class Collectives(TorchDispatchMode):
    """Each call of a collective within this context: name, bytes of its whole tensor, size of its group."""

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
    return _resolve_process_group(group).size() if isinstance(group, str) else ProcessGroup.unbox(group).size()


def worker(arguments: argparse.Namespace) -> None:
    """One process of a launch: note the calls of a step, and write them."""
    recipe, config = memory.recipe_and_config(arguments, STRATEGIES)
    watch = Collectives()
    rank = memory.train(recipe, config, arguments.worker, watch)
    (arguments.worker / f"{rank}.json").write_text(json.dumps(watch.calls))


# The arithmetic


def formula(strategy: str, model: str, ranks: int, rank: int, sizes: dict) -> dict[str, tuple[float, int]]:
    """Payload bytes of a step on this rank, and the size of the group, of each collective."""
    shapes, tensor, stages = memory.shapes_of(model), *(sizes.get(f"{kind}_parallel_size", 1) for kind in CUTS)
    whole, data = 4 * sum(map(math.prod, shapes.values())), ranks // (tensor * stages)
    if strategy == "ddp":
        return {"all-reduce": (whole, ranks)}
    if strategy.startswith("zero"):
        # An all-reduce's two halves: gradients to their owner, new weights back. ZeRO-3 gathers the weights for the
        # forward and again for the backward instead (arXiv:1910.02054, section 7).
        return {"reduce-scatter": (whole, ranks), "all-gather": ((1 + (strategy == "zero3")) * whole, ranks)}
    if strategy.startswith("pp"):
        # Activations of all chunks to the next stage, their gradients to the former one.
        stage = rank // data
        mine = [shape for name, shape in shapes.items() if memory.stage_of(name, shapes, stages) == stage]
        sent = {"send": (((stage < stages - 1) + (stage > 0)) * activations(model, data), stages)}
        return sent | ({"all-reduce": (4 * sum(map(math.prod, mine)), data)} if data > 1 else {})
    # Each block multiplies two pairs of matrices; each pair adds up its output in the forward, and the gradient of its
    # input in the backward (arXiv:1909.08053, figure 3).
    crossings = 4 * SIZES[model][1] * activations(model, data, tensor if strategy == "tp_sp" else 1)
    if strategy == "tp_sp":  # each of these sums as a reduce-scatter and an all-gather (arXiv:2205.05198, section 4.2)
        return {"reduce-scatter": (crossings, tensor), "all-gather": (crossings, tensor)}
    found = {"all-reduce": (crossings, tensor)} if tensor > 1 else {}
    return found if strategy == "tp" else found | of_fsdp(strategy, shapes, ranks, tensor)


def activations(model: str, data: int, multiple: int = 1) -> int:
    """Bytes between two blocks of the images of one of `data` replicas: images x tokens x width in fp32, the tokens
    rounded up to a multiple."""
    image_size, patch_size = memory.image_of(model).values()
    tokens = (image_size // patch_size) ** 2 + 1
    return 4 * memory.BATCH // data * -(-tokens // multiple) * multiple * SIZES[model][0]


def of_fsdp(strategy: str, shapes: dict, ranks: int, tensor: int) -> dict[str, tuple[float, int]]:
    """Blocks are gathered for the forward and again for the backward; the root's weights (embeddings, last norm, head)
    once, since they stay. Rows are rounded up to a multiple of the shards."""
    replicas = memory.REPLICAS if strategy == "hsdp" else 1
    shards, blocks, root = ranks // (tensor * replicas), 0, 0
    for name, shape in shapes.items():
        rows, *row = memory.tensor_shard(name, shape, tensor)
        size = 4 * -(-rows // shards) * shards * math.prod(row)
        blocks, root = (blocks + size, root) if ".layers." in name else (blocks, root + size)
    found = {"all-gather": (2 * blocks + root, shards), "reduce-scatter": (blocks + root, shards)}
    return found | ({"all-reduce": ((blocks + root) / shards, replicas)} if replicas > 1 else {})


def rows_of(case: dict, calls: list, expected: dict) -> Iterator[dict]:
    """A row for each collective of one rank; `off` where its payload is not within 5 % of the formula's."""
    by_name = defaultdict(list)
    for collective, size, group in calls:
        by_name["scalars" if size <= SCALARS else collective].append((collective, size, group))
    for name in sorted({*expected, *by_name}):
        payload, found = sum(size for _, size, _ in by_name[name]), by_name[name]
        ring = round(sum(size * ring_share(collective, group) for collective, size, group in found))
        line = {"collective": name, "calls": len(found), "payload_bytes": payload, "ring_bytes": ring}
        size, group = expected.get(name, (0, 1))
        line |= {"formula_bytes": round(size), "formula_ring_bytes": round(size * ring_share(name, group))}
        ratio = round(payload / size, 4) if size else None
        line |= {"ratio": ratio, "off": name != "scalars" and (not ratio or abs(ratio - 1) > 0.05)}
        yield case | line | {"why": WHY.get((case["strategy"], name), "")}


def ring_share(collective: str, group: int) -> float:
    return {"all-reduce": 2, "send": group / (group - 1)}.get(collective, 1) * (group - 1) / group


def plot(rows: list[dict], path: Path) -> None:
    """For each model, what the rank that sends most sends by rings in a step, under each strategy."""
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
        heights = [most[case].get(collective, {"ring_bytes": 0})["ring_bytes"] / memory.MIB for case in cases]
        if any(heights):
            axes.bar(names, heights, bottom=bottom, color=colour, label=collective)
        bottom = [sum(pair) for pair in zip(bottom, heights, strict=True)]
    expected = [sum(row["formula_ring_bytes"] for row in most[case].values()) / memory.MIB for case in cases]
    axes.plot(names, expected, "_", color="black", markersize=26, label="formula")
    title = f"ViT-{model}, {memory.image_of(model)['image_size']} px, {memory.BATCH} images a step"
    axes.set(title=title, xlabel="strategy, ranks", ylabel="MiB sent by a rank in a step, by rings")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(ncols=2)


def shown(row: dict) -> dict:
    """A line of the printed table, MiB."""
    line = {name.replace("_bytes", "_MiB"): value for name, value in row.items() if name not in ("off", "why")}
    for name in ("payload", "ring", "formula", "formula_ring"):
        line[f"{name}_MiB"] = row[f"{name}_bytes"] / memory.MIB
    return line | {"": "off" if row["off"] else "", "why": row["why"]}


def main() -> None:
    arguments = memory.parse(__doc__, STRATEGIES, {"demo": (), "S": ()})
    if arguments.worker:
        return worker(arguments)
    rows = []
    for case, sizes, ranks in memory.real_cases(arguments, STRATEGIES):
        for rank, calls in enumerate(ranks):
            expected = formula(case["strategy"], case["model"], len(ranks), rank, sizes)
            rows += rows_of(case | {"rank": rank}, calls, expected)
            if __import__("os").environ.get("DEBUG") and (rank == 0 or case["strategy"].startswith("pp")):
                from collections import Counter

                print(rank, sorted(Counter(map(tuple, calls)).items())[:20], len(set(map(tuple, calls))), flush=True)
        print(
            table([shown(row) for row in rows if row["strategy"] == case["strategy"] and row["rank"] == 0]), flush=True
        )
    path = write("communication", rows, sides=memory.SIDES, global_batch_size=memory.BATCH)
    plot(rows, ROOT / path.with_suffix(".png"))
    print(path)


if __name__ == "__main__":
    main()

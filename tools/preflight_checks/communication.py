# SPDX-License-Identifier: Apache-2.0
"""Estimate how long the all-reduce of a step's gradients takes."""

import json
from collections.abc import Iterator

from .plan import Plan, Task
from .recipe import network


def all_reduce(plan: Plan, task: Task) -> Iterator[str]:
    """Yield a line on the time of an all-reduce that nothing hides: a ring sends the gradients 2 (n - 1) / n times."""
    tensor, stages, size = plan.sizes(task)
    count = sum(weight.numel() for weight in network(plan, task).parameters())
    half = plan.kind.startswith("zero") and plan.precision != "no"
    sent, (rate, source) = count // (tensor * stages) * (2 if half else 4), bandwidth(plan)
    if size > 1 and rate:
        cost = f"{2 * (size - 1) / size * sent / 1e9 / rate:.2g} s a step by all-reduce at {rate:.3g} GB/s"
        yield f"Gradients of {sent / 1e6:,.0f} MB: about {cost} on the bus ({source})."
    elif size > 1:
        what = f"no bandwidth {'between nodes' if plan.nodes > 1 else 'inside a node'} of {plan.machine} is known"
        yield f"Gradients of {sent / 1e6:,.0f} MB: {what}. Run benchmarks/allreduce.py there."


def bandwidth(plan: Plan) -> tuple[float | None, str]:
    """Return GB/s on the bus and its source: the newest measurement of such GPUs, in a node or across, else the
    table's."""
    across = plan.nodes > 1
    results = plan.root.glob(f"benchmarks/results/allreduce_{plan.facts.gpu}_*.json")
    for path in sorted(results, key=lambda path: path.stem[-10:], reverse=True):
        result = json.loads(path.read_text())
        if (result["processes"] > result["processes_per_node"]) == across:
            return result["rows"][-1]["bus, GB/s"]["median"], path.name
    return (plan.facts.network, "reports of users") if across else (plan.facts.nvlink, "NVLink's peak")

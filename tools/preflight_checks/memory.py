# SPDX-License-Identifier: Apache-2.0
"""Estimate the bytes of a GPU by tools/memory_estimate.py, and find flags that fit."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from .communication import all_reduce
from .plan import Plan, Task
from .recipe import network

GIGA = 2**30
# Kind of bytes that may wait in the host's memory, and the key of the YAML that says so.
OFFLOADS = {"parameters": "offload_param", "gradients": "offload_optimizer", "optimizer": "offload_optimizer"}


class Network(NamedTuple):
    """The recipe's model in figures."""

    shapes: dict  # of the weights by name
    saved: NamedTuple  # by a forward: memory_estimate.Activations
    state_bytes: float  # of the optimizer, for each parameter
    logits: float  # bytes of a language model's, which exist for CHUNK tokens at a time


def memory(plan: Plan) -> Iterator[str]:
    """Note the memory of a GPU for the first task; refuse what is too much, with flags that fit."""
    task, flag = plan.tasks[0], "activation_checkpointing"
    totals = partial(estimate, plan, task, measure(plan, task))
    recompute = getattr(task.config, flag, bool(plan.section("fsdp").get(f"fsdp_{flag}")))
    parts = totals(1, recompute)
    most, host = parts.pop("total") / GIGA, parts.pop("host")
    limit = 0.98 * plan.gigabytes - 1  # CUDA and NCCL take one
    line = " + ".join(f"{value / GIGA:.1f} {name}" for name, value in parts.items())
    line = f"{line}: at most {most:.1f} GiB at once of {limit:.1f}"
    plan.notes += [f"Memory of a GPU, estimated: {line}.", *offloaded(plan, host)]
    choices = {"": recompute}
    if hasattr(task.config, flag) and not recompute:
        choices[f"--{flag} "] = True
        plan.notes.append(f"  With --{flag} at most {totals(1, True)['total'] / GIGA:.1f} GiB.")
    plan.notes += all_reduce(plan, task)
    if most > limit:
        fitting = " or ".join(remedies(plan, task, totals, choices, limit))
        yield f"{line}. Give {fitting or 'more GPUs, or a strategy that shards more: see the parts'}."


def offloaded(plan: Plan, host: float) -> Iterator[str]:
    """Yield lines on each GPU's bytes that wait in the host's memory, which the job's GPUs of a node share."""
    asked, share = host * plan.gpus / GIGA, plan.gpus / plan.facts.gpus * plan.facts.memory * 10**9 / GIGA
    if asked:
        line = f"{asked:.1f} GiB of {share:.1f} that the job has there"
        yield f"Memory of a node for what is offloaded, estimated: {line}."
    if asked > share:
        yield "warning: that is too much, beside loaders. Give more nodes, or no offload."


def remedies(plan: Plan, task: Task, totals: Callable, choices: dict[str, bool], limit: float) -> Iterator[str]:
    """Yield flags, each with the fewest accumulation steps that fit. choices: flag and whether it recomputes."""
    images, steps = plan.micro_batch(task), task.config.gradient_accumulation_steps
    for flag, recompute in choices.items():
        for factor in (factor for factor in range(1, images + 1) if images % factor == 0):
            if (total := totals(factor, recompute)["total"] / GIGA) < limit:
                more = f"--gradient_accumulation_steps {steps * factor} " * (factor > 1)
                yield f"{flag}{more}({total:.1f} GiB)"
                break


def measure(plan: Plan, task: Task) -> Network:
    """Build the recipe's model and optimizer, and count their bytes."""
    import memory_estimate

    model = network(plan, task)
    for module in model.modules():  # --activation_checkpointing's bytes are derived from those without it
        module.recompute = module.gradient_checkpointing = False
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    saved = memory_estimate.activations(model, memory_estimate.inputs_of(task.data), plan.precision != "no")
    if getattr(task.config, "sequence_parallel", False):
        saved = saved._replace(split=saved.block)
    optimizer, *_ = plan.module.build_optimizer(model, task.config, 100)
    tokens = min(getattr(plan.module, "CHUNK", 0), plan.micro_batch(task) * getattr(task.data, "sequence_length", 0))
    logits = 3 * 4 * tokens * model.config.vocab_size if tokens else 0  # in fp32, with log-softmax and gradient
    return Network(shapes, saved, memory_estimate.state_bytes(optimizer), logits)


def estimate(plan: Plan, task: Task, model: Network, factor: int, recompute: bool) -> dict[str, float]:
    """Return bytes of a GPU by kind, with `total` for the greatest sum, and `host` for what is offloaded.

    factor: how many times the accumulation steps. recompute: with activation checkpointing.
    """
    import memory_estimate

    config, yaml = task.config, plan.section("deepspeed") | plan.section("fsdp")
    tensor, stages, _ = plan.sizes(task)
    split = {"tensor": tensor, "stages": stages, "accumulates": factor * config.gradient_accumulation_steps > 1}
    waiting = {name for name, key in OFFLOADS.items() if yaml.get(f"{key}_device") == "cpu"}
    kept = held(plan, model, "optimizer" in waiting, split)
    host = sum(kept[name] for name in waiting)
    kept |= dict.fromkeys(waiting, 0)
    how = {"half": plan.precision != "no", "recompute": recompute}
    how["reshard"] = yaml.get("fsdp_reshard_after_forward", True) and getattr(config, "reshard_after_forward", True)
    if getattr(config, "pipeline_schedule", "") == "1f1b":
        how["waiting"] = min(1, stages / config.pipeline_chunks)
    images = plan.micro_batch(task) // factor
    peak = memory_estimate.peak(plan.kind, model.shapes, plan.world_size, kept, model.saved, images, **split, **how)
    if model.logits:
        peak |= {"logits": model.logits, "total": peak["total"] + model.logits}
    return peak | {"host": host}


def held(plan: Plan, model: Network, offloads: bool, split: dict) -> dict[str, float]:
    """Return the bytes that stay, by kind, of the rank that holds most. It looks at one rank of each stage, and at
    all ranks of ZeRO 1 and 2, which differ by the weights on their borders."""
    import memory_estimate

    kind, size = plan.kind, plan.world_size
    how = {"weight_bytes": 2 if plan.precision != "no" and "zero" in kind else 4, "state_bytes": model.state_bytes}
    how |= {"replicas": plan.nodes if kind == "hsdp" else 1, "offloads": offloads}
    ranks = range(0, size, 1 if kind in ("zero1", "zero2") else size // split["stages"])
    each = [memory_estimate.held(kind, model.shapes, size, rank, **split, **how) for rank in ranks]
    return max(each, key=lambda kinds: sum(kinds.values()))

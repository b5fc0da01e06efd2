# SPDX-License-Identifier: Apache-2.0
"""Print the resolved configuration, each value with its origin, and what a crash costs."""

import math
from collections.abc import Collection
from dataclasses import fields

from .data import steps_per_epoch
from .plan import Plan, Task

Row = tuple[str, str, str]  # name, value, origin
SHOWN = {"data", "image_size", "sequence_length", "model", "epochs", "learning_rate"}  # even where nobody gave them
IN_OTHER_ROWS = {"global_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "output_dir"}


def report(plan: Plan, task: Task) -> list[str]:
    """Return the lines, aligned."""
    rows = [*job_rows(plan), *parallel_rows(plan, task), *(run_rows(plan, task) if task.run_config else ())]
    names = (SHOWN | task.given) - IN_OTHER_ROWS - {*plan.splits}
    for owner in filter(None, (task.data, task.config, task.run_config)):
        rows += settings(plan, task, owner, names)
    rows += queue_rows(plan)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:{widths[0]}}  {value:{widths[1]}}  {origin}" for name, value, origin in rows]
    if len(plan.tasks) > 1:
        lines.append(f"This is {task.name}; all {len(plan.tasks)} lines of the array passed.")
    return [*lines, crash_cost(plan, task)]


def job_rows(plan: Plan) -> list[Row]:
    rows = [
        ("machine", f"{plan.machine}, {plan.facts.gpus} GPUs of {plan.gigabytes} GB a node", "command line"),
        ("strategy", plan.strategy, "command line"),
        ("recipe", str(plan.recipe), "command line"),
        option(plan, "nodes", "1"),
        ("GPUs a node", str(plan.gpus), plan.origins["gpus"]),
        ("world size", f"{plan.world_size} = {plan.nodes} nodes x {plan.gpus}", "nodes, GPUs a node"),
        ("precision", plan.precision, plan.origins["precision"]),
    ]
    return rows + [("replicas", f"{plan.nodes}, each sharded over a node", "nodes")] * (plan.kind == "hsdp")


def parallel_rows(plan: Plan, task: Task) -> list[Row]:
    tensor, pipeline, size = plan.sizes(task)
    sharding = plan.section("fsdp") | plan.section("deepspeed")
    rows = [(name, str(value), plan.yaml) for name, value in sharding.items()]
    rows += settings(plan, task, task.config, plan.splits)
    return [*rows, ("data-parallel size", str(size), "world size" + " / the sizes above" * (tensor * pipeline > 1))]


def run_rows(plan: Plan, task: Task) -> list[Row]:
    run, config = task.run_config, task.config
    batch, steps = config.global_batch_size, config.gradient_accumulation_steps
    product = (
        f"{plan.sizes(task)[2]} (data-parallel) x {plan.micro_batch(task)} ({plan.unit}) x {steps} (accumulation)"
    )
    every = "" if run.checkpointing_steps == "epoch" else f"each {run.checkpointing_steps} steps and "
    folder = origin(plan, task, "output_dir") if run.output_dir else "hash of all values"
    return [
        ("batch", f"{batch} = {product}", origin(plan, task, "global_batch_size", "gradient_accumulation_steps")),
        ("checkpoints", f"{every}each epoch", origin(plan, task, "checkpointing_steps")),
        ("output", str(plan.output(task)), folder),
    ]


def queue_rows(plan: Plan) -> list[Row]:
    hours, minutes = divmod(plan.facts.default_minutes, 60)
    return [
        option(plan, "time", "unknown" if plan.in_job else f"{hours:02}:{minutes:02}:00"),
        option(plan, "qos", plan.facts.default_qos or "none"),
        option(plan, "account", "the job's"),
    ]


def option(plan: Plan, name: str, default: str) -> Row:
    return name, *plan.options.get(name, (default, "default"))


def settings(plan: Plan, task: Task, owner: object, names: Collection[str]) -> list[Row]:
    """Return the rows of those of the owner's fields that have these names."""
    own = (each.name for each in fields(owner) if each.name in names)
    return [(name, str(getattr(owner, name)), origin(plan, task, name)) for name in own]


def origin(plan: Plan, task: Task, *names: str) -> str:
    """Return where the recipe's fields of these names have their values from."""
    each = [(task.name or "command line") if name in task.given else plan.recipe.name for name in names]
    return ", ".join(dict.fromkeys(each))


def crash_cost(plan: Plan, task: Task) -> str:
    """Return what a crash just before a checkpoint costs; the end of an epoch writes one too."""
    hours = plan.seconds / 3600 * plan.world_size
    limit = f"; never more than the job's {hours:,.1f} GPU-hours." if hours < math.inf else "."
    if not task.run_config:
        return f"There are no checkpoints: a crash costs all that was done{limit}"
    what, share = lost(task, steps_per_epoch(plan, task))
    if share is None:
        return f"A crash between checkpoints costs at most {what}; the {plan.unit} are not counted yet{limit}"
    cost = f" ({share * hours:,.2f} GPU-hours if the run fills the job)" if hours < math.inf else ""
    return f"A crash between checkpoints costs at most {what}, {share:.1%} of the run{cost}{limit}"


def lost(task: Task, epoch: int | None) -> tuple[str, float | None]:
    """Return the most that lies between two checkpoints, and its share of the run, None where it is unknown.

    epoch: its steps, None where the images are not counted.
    """
    run, epochs = task.run_config, task.config.epochs
    every = None if run.checkpointing_steps == "epoch" else int(run.checkpointing_steps)
    if not epoch:
        return f"{every} steps or an epoch" if every else "an epoch", None if run.max_steps else 1 / epochs
    steps = min(epoch, every or epoch)
    return f"{steps} steps", min(1, steps / min(epoch * epochs, run.max_steps or math.inf))

# SPDX-License-Identifier: Apache-2.0
"""Import the recipe, and ask it and its parts about each task: a line of flags."""

import contextlib
import importlib.util
import io
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from .data import data
from .plan import Plan, Task, nearest


def read_recipe(plan: Plan) -> Iterator[str]:
    """Import the recipe's file as `accelerate launch` would: with its own folder first."""
    if not plan.recipe.is_file():
        recipes = [str(path.relative_to(plan.root)) for path in plan.root.glob("recipes/*.py")]
        yield f"no recipe {plan.recipe}. Give its path; the nearest is {nearest(str(plan.recipe), recipes)}."
        return
    sys.path[:] = [str(plan.recipe.resolve().parent), *sys.path, str(plan.root)]
    spec = importlib.util.spec_from_file_location(plan.recipe.stem, plan.recipe)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's own file does
        what = f"{plan.recipe} cannot be imported: {type(error).__name__}: {error}"
        yield f"{what}. Install what it needs, and copy shared/ beside it."
        return
    if not (hasattr(module, "parse") and hasattr(module, "CONFIGS")):
        yield f"{plan.recipe} is no recipe: it has no CONFIGS or no parse. Give a file like those of recipes/."
        return
    plan.module, code = module, plan.strategy.split("_")[0]
    if (code if code in ("tp", "pp") else plan.kind) not in plan.takes:
        yield f"{plan.recipe.name} does not run under {plan.strategy}. Give {' or '.join(plan.takes)}."


def read_tasks(plan: Plan) -> Iterator[str]:
    """Let the recipe parse the flags: once, or for each line of `@FILE` that the array asks for."""
    file = next((Path(word[1:]) for word in plan.words if word.startswith("@")), None)
    if not plan.module:
        return
    if not file:
        yield from read_task(plan, "", plan.words)
        return
    lines = file.read_text().splitlines() if file.is_file() else []
    if not lines or not plan.option("array"):
        yield f"@{file} needs a line of flags for each task of an array. Give --array=1-{len(lines) or 'N'}."
    for number in array(plan.option("array")) if lines else ():
        if not 0 < number <= len(lines) or not lines[number - 1].strip():
            yield f"--array asks for line {number} of {file}, which has {len(lines)}. Give --array=1-{len(lines)}."
            continue
        try:
            line = shlex.split(lines[number - 1])
        except ValueError as error:
            yield f"{file} line {number} cannot be split into words: {error}. Close its quotes."
            continue
        words = itertools.chain(*(line if word == f"@{file}" else [word] for word in plan.words))
        yield from read_task(plan, f"{file} line {number}", [*words])


def array(text: str) -> list[int]:
    """Return the numbers of sbatch's --array: 1-4, 0,2,5 or 1-9:2, then perhaps % and how many run at once."""
    numbers = []
    for first, last, step in re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", text.split("%")[0]):
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return numbers


def read_task(plan: Plan, name: str, words: list[str]) -> Iterator[str]:
    """Add a task to the plan, or yield why the recipe refuses its words."""

    def read() -> None:
        *shared, config = plan.module.parse(*plan.module.CONFIGS, arguments=words)
        plan.tasks.append(Task(name, words, *(shared or (None, None)), config))

    with contextlib.redirect_stderr(io.StringIO()) as said:
        problems = list(refusals(plan, read))
    plan.notes += said.getvalue().splitlines()
    yield from (f"{name}: {problem}" if name else problem for problem in problems)


def refusals(plan: Plan, function: Callable, *arguments) -> Iterator[str]:
    """Yield what the function yields, and what one of the recipe's parts raises in it."""
    try:
        yield from function(*arguments) or ()
    except plan.shared("errors").UserError as error:
        yield str(error)


def tasks(plan: Plan) -> Iterator[str]:
    """Check each task's words, sizes, batch, data and network, and that no two write to one folder."""
    folders = {}
    for task in plan.tasks:
        for check in (variables, cut, start, data, wrapped):
            for problem in refusals(plan, check, plan, task):
                asks = re.search("--data /.* does not exist|--pretrained .* was not found", problem)
                hint = " $DSDIR is not set: log in again, or export it." * bool(asks and "DSDIR" not in os.environ)
                yield (f"{task.name}: " if task.name else "") + problem + hint
        folder = plan.output(task) if task.run_config else task.name
        if folder in folders:
            yield f"{folders[folder]} and {task.name} write to the same {folder}. Let their lines differ."
        folders[folder] = task.name


def variables(plan: Plan, task: Task) -> Iterator[str]:
    """Refuse a path that begins with $DSDIR, in single quotes or in a file: nothing expands it."""
    for word in (word for word in task.words if "$" in word):
        if "$DSDIR" in word and "DSDIR" not in os.environ:
            yield f"$DSDIR is not set, and {word} needs it. Log in again, or export it."
        else:
            yield f"{word} was not expanded. Take the single quotes away; in a file, write the path out."


def cut(plan: Plan, task: Task) -> Iterator[str]:
    """Check the sizes of tensor and pipeline parallelism, and ask the recipe itself."""
    tensor, pipeline, size = plan.sizes(task)
    if plan.gpus % tensor:
        remedy = f"Give a divisor of {plan.gpus}"
        yield f"--{plan.splits[0]} {tensor} does not fit into a node of {plan.gpus} GPUs. {remedy}."
    elif not size:
        flags = (f"--{name} {getattr(task.config, name)}" for name in plan.splits if hasattr(task.config, name))
        gpus = f"{plan.world_size} GPUs ({plan.nodes} nodes x {plan.gpus})"
        yield f"{' x '.join(flags)} does not divide the {gpus}. Change it or --nodes."
    if hasattr(plan.module, "check"):
        launch = plan.shared("launch").Launch(plan.kind, plan.precision, plan.world_size, on_gpu=True)
        plan.module.check(task.run_config, task.data, task.config, launch)
    blocks = number_of_blocks(network(plan, task)) if pipeline > 1 else 0
    if blocks % pipeline:
        plan.notes.append(f"warning: {blocks} blocks over {pipeline} stages: the larger ones keep the others waiting.")


def number_of_blocks(model) -> int:
    """Return the length of the model's longest list of modules."""
    import torch

    return max(len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def start(plan: Plan, task: Task) -> None:
    """Refuse what a run refuses when it starts: its batch, trackers, checkpoints, what DeepSpeed cannot do."""
    if task.run_config:
        run, config = task.run_config, task.config
        plan.shared("run.log").known_trackers(run.report_to)
        plan.shared("run.nonfinite").refuse_pairs(run, config, plan.kind)
        plan.shared("run.position").checkpoint_steps(run.checkpointing_steps, 1)
        plan.shared("order").micro_batch_size(config, plan.sizes(task)[2] or 1)


def wrapped(plan: Plan, task: Task) -> Iterator[str]:
    """Refuse class names of blocks for FSDP to wrap that the recipe's model does not have."""
    settings = plan.section("fsdp")
    if settings.get("fsdp_auto_wrap_policy") == "TRANSFORMER_BASED_WRAP" and plan.kind in plan.takes:
        model, key = network(plan, task), "fsdp_transformer_layer_cls_to_wrap"
        there = {type(module).__name__ for module in model.modules()}
        own = ",".join(getattr(model, "_no_split_modules", None) or ["nothing"])
        for name in str(settings.get(key, own)).split(","):
            if name.strip() not in there:
                what = f"no module of {plan.recipe.name}'s model is a {name.strip()}, {key} of {plan.yaml}"
                yield f"{what}. The nearest is {nearest(name.strip(), there)}."


def network(plan: Plan, task: Task):
    """Return the recipe's model without memory: of 1,000 classes unless the data is a demonstration's, or of
    --vocabulary_size tokens unless it is pretrained."""
    import torch

    size = 10 if task.data.data in ("digits", "fashion") else 1000
    if hasattr(task.data, "vocabulary_size"):
        size = 0 if task.config.pretrained else task.data.vocabulary_size
    with torch.device("meta"):
        return plan.module.build_model(task.data, task.config, size, 0)

# SPDX-License-Identifier: Apache-2.0
"""Make a plan from the words on the command line."""

import argparse
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from machines import Machine, read_machines

from .options import gpus_of, resolve, unknown_options
from .plan import Plan, nearest
from .topology import read_topology

OWN = ("--memory", "--in_job")  # options that are not sbatch's


def read_command(words: list[str], root: Path) -> tuple[Plan | None, list[str]]:
    """Return the plan, and what is wrong with the words themselves."""
    end = words.index("--") if "--" in words else len(words)
    if end < 2 or not words[end + 1 :]:
        return None, ["machine, strategy and recipe are needed. Give MACHINE STRATEGY [options] -- RECIPE [flags]."]
    (machine, strategy, *front), (recipe, *flags), in_job = words[:end], words[end + 1 :], "--in_job" in words[:end]
    try:
        facts = read_machine(root, machine)
        settings = read_topology(root, facts.topologies or machine, machine, strategy)
        given = [word for word in front if word not in OWN]
        options, others = resolve(root / f"slurm/{machine}.slurm", given, in_job)
    except ValueError as error:
        return None, [str(error)]
    except argparse.ArgumentError as error:
        return None, [f"sbatch's {error}. Give it, or leave the option out."]
    plan = Plan(root, machine, facts, strategy, in_job, Path(recipe), flags, options, settings)
    return plan, [*unknown_options(others), *read_values(plan)]


def read_machine(root: Path, name: str) -> Machine:
    """Return the machine's entry in the table; raises ValueError where it or its script is missing."""
    known = read_machines(root)
    if name not in known:
        raise ValueError(f"no machine {name}. The nearest is {nearest(name, known)}; there are {', '.join(known)}.")
    if not (root / f"slurm/{name}.slurm").is_file():
        raise ValueError(f"{name} has no slurm/{name}.slurm. Write one as docs/other_clusters.md shows.")
    return known[name]


def read_values(plan: Plan) -> Iterator[str]:
    """Set nodes, GPUs of a node, precision and seconds; yield what is wrong with them."""
    nodes = plan.option("nodes") or "1"
    if re.fullmatch("[1-9][0-9]*", nodes):
        plan.nodes = int(nodes)
    else:
        yield f"--nodes {nodes} is not a single number. Give how many nodes the job has."
    yield from read_gpus(plan)
    flag = re.search(r"--mixed_precision[ =](\S+)", os.environ.get("RECIPES_LAUNCH_FLAGS", ""))
    plan.precision = flag[1] if flag else str(plan.topology.get("mixed_precision", "no"))
    plan.origins["precision"] = "$RECIPES_LAUNCH_FLAGS" if flag else plan.yaml
    yield from read_time(plan)


def read_gpus(plan: Plan) -> Iterator[str]:
    """Set the GPUs of a node: --gres, or in a job what slurm/launch.sh follows."""
    text, plan.origins["gpus"] = plan.options.get("gres", (f"gpu:{plan.facts.gpus}", "the machine"))
    plan.gpus = gpus_of(text)
    if not 0 < plan.gpus <= plan.facts.gpus:
        what = "exceeds a node" if plan.gpus else "gives no GPU"
        yield f"--gres={text} {what} of {plan.machine}. Give --gres=gpu:N, with N from 1 to {plan.facts.gpus}."
    for name in ("SLURM_GPUS_ON_NODE",) * plan.in_job + ("RECIPES_PROCESSES_PER_NODE",):
        if os.environ.get(name):
            plan.gpus, plan.origins["gpus"] = int(os.environ[name]), f"${name}"


def read_time(plan: Plan) -> Iterator[str]:
    """Set the job's seconds; note where the machine's default ends it."""
    time, minutes = plan.option("time"), plan.facts.default_minutes
    if time and (seconds := seconds_of(time)) is None:
        yield f"--time {time} is not a Slurm time. Give hours:minutes:seconds, as 20:00:00."
    elif time:
        plan.seconds = seconds
    elif plan.in_job:
        plan.seconds = math.inf
    else:
        plan.seconds, end = 60 * minutes, f"after {minutes} minutes"
        plan.notes.append(f"warning: without --time the machine ends a job {end}. Give --time=HH:MM:SS.")


def seconds_of(time: str) -> int | None:
    """Read a time of Slurm: minutes[:seconds], hours:minutes:seconds or days-hours[:minutes[:seconds]]."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part]
    if days is None and len(numbers) < 3:
        numbers.insert(0, 0)  # hours
    return 86400 * int(days or 0) + sum(number * 60 ** (2 - place) for place, number in enumerate(numbers))

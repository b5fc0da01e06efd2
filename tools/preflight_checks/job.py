# SPDX-License-Identifier: Apache-2.0
"""Refuse what Slurm would not give, and options that change what slurm/launch.sh starts."""

import getpass
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from machines import read_machines

from .options import gpus_of
from .plan import Plan, nearest

LEAVE_OUT = "Leave it out: one launcher a node starts a process on each of its GPUs."
USE_GRES = "Give --gres=gpu:N, N GPUs a node."
# Option: the values that leave alone what slurm/launch.sh starts, what other values do, and the remedy.
FIXED = {
    "ntasks-per-node": ("1", "starts several launchers on a node", LEAVE_OUT),
    "ntasks-per-core": ("1", "starts several launchers on a node", LEAVE_OUT),
    "ntasks-per-socket": ("1", "starts several launchers on a node", LEAVE_OUT),
    "ntasks-per-gpu": ("", "starts several launchers on a node", LEAVE_OUT),
    "gpus-per-task": ("", "gives the launcher of a node other GPUs than --gres", USE_GRES),
    "gpus-per-socket": ("", "gives a node other GPUs than --gres", USE_GRES),
    "tres-per-task": ("", "gives the launcher of a node other GPUs or cores than --gres", USE_GRES),
    "gpu-bind": ("none", "hides GPUs of a node from its launcher", LEAVE_OUT),
    "tres-bind": ("", "hides GPUs of a node from its launcher", LEAVE_OUT),
    "cpus-per-gpu": ("", "excludes --cpus-per-task", "Give --cpus-per-task, all cores of a node that the job needs."),
    "distribution": ("(?!arb).*", "changes the order of the nodes", "Leave it out."),
    "export": ("ALL(,.*)?", "leaves your environment behind", "Give --export=ALL, perhaps with ,NAME=VALUE."),
    "open-mode": ("a(ppend)?", "loses what the former starts of a job wrote", "Leave it out."),
    "signal": (
        "([BR]+:)?(SIG)?(USR1|USR2|CONT|10|12|18)(@[0-9]+)?",
        "ends a job in another way than by a checkpoint and a requeue",
        "Give --signal=B:USR1@SECONDS.",
    ),
    "container": ("", "runs slurm/launch.sh where there is no srun", "Leave it out."),
}


def launching(plan: Plan) -> Iterator[str]:
    """Refuse options that change what slurm/launch.sh starts, or where; a running job already has place and log."""
    for name, (harmless, what, remedy) in FIXED.items():
        value, origin = plan.options.get(name, ("", ""))
        if value and not re.fullmatch(harmless, value) and (name == "ntasks-per-node" or not plan.in_job):
            yield f"--{name}={value} ({origin}) {what}. {remedy}"
    if not plan.in_job:
        yield from counts(plan)
        yield from places(plan)


def counts(plan: Plan) -> Iterator[str]:
    """Refuse a number of tasks or GPUs that is not the one of --nodes and --gres."""
    total = plan.nodes * gpus_of(plan.option("gres") or f"gpu:{plan.facts.gpus}")
    for name, wanted in (("ntasks", plan.nodes), ("gpus", total), ("gpus-per-node", total // plan.nodes)):
        value = plan.option(name)
        if value and value.rpartition(":")[2] != str(wanted):
            remedy = "--nodes=N alone" if name == "ntasks" else "--nodes=N and --gres=gpu:N, N GPUs a node"
            yield f"--{name}={value} is not the {wanted} that the other options ask for. Give {remedy}."


def places(plan: Plan) -> Iterator[str]:
    """Change to the folder of --chdir; refuse a log whose folder is missing: Slurm ends such a job silently."""
    folder = plan.option("chdir")
    if folder and not Path(folder).is_dir():
        yield f"--chdir={folder} is not a folder. Make it, or leave the option out."
    elif folder:
        os.chdir(folder)
    known = {"x": plan.option("job-name"), "u": getpass.getuser(), "%": "%"}
    for name in ("output", "error"):
        pattern, origin = plan.options.get(name, ("", ""))
        log = Path(re.sub("%([xu%])", lambda match: known[match[1]], pattern))
        if pattern and (not log.parent.is_dir() or log.is_dir()):
            yield f"--{name}={pattern} ({origin}) is not in an existing folder, and Slurm creates none. Make it."


def cores(plan: Plan) -> Iterator[str]:
    """Refuse more cores than a node has, and name a share that is too small for the launcher's processes."""
    value, facts = plan.option("cpus-per-task"), plan.facts
    most, share = facts.cores * facts.gpus, facts.cores * min(plan.gpus, facts.gpus)
    if value and (not value.isdigit() or not 0 < int(value) <= most):
        yield f"--cpus-per-task={value} does not fit into the {most} cores of a node. Give at most {most}."
    elif value and int(value) < share:
        of_all = f"is for all {plan.gpus} processes of a node, whose share is {share} cores"
        plan.notes.append(f"warning: --cpus-per-task={value} {of_all}. Give --cpus-per-task={share}.")


def accounts(plan: Plan) -> Iterator[str]:
    """Check the account, and the options that select the nodes; a running job has been accepted."""
    account, own = plan.option("account"), plan.facts.account
    if plan.in_job:
        return
    if own and not account:
        yield f"no account is given. Add -A PROJECT@{own}."
    elif own and "@" in account and account.split("@")[1] != own:
        yield f"the account {account} has no hours on {plan.machine}. Give the one that ends in @{own}."
    for name, short in (("constraint", "-C"), ("partition", "-p")):
        yield from selection(plan, name, short)


def selection(plan: Plan, name: str, short: str) -> Iterator[str]:
    """Refuse a constraint or a partition that selects other nodes than the machine's."""
    words, wanted = plan.words_of(name), plan.facts.select.get(name)
    if wanted and not plan.facts.selectors & {*words}:
        yield f"--{name} {plan.option(name)} does not select {plan.machine}. Give {short} {wanted}."
        return
    for word in words:
        others = [other for other, facts in read_machines(plan.root).items() if word in facts.selectors]
        if others and plan.machine not in others:
            other = " or ".join(others)
            yield f"--{name} {word} selects {other}, not {plan.machine}. Leave it out, or name that machine."


OUT_OF_DATE = "or RECIPES_PREFLIGHT_SKIP=limits where this is out of date"


def limits(plan: Plan) -> Iterator[str]:
    """Refuse an option for memory where the machine takes none, an unknown QoS, and more than the QoS gives."""
    facts, qos = plan.facts, plan.option("qos") or plan.facts.default_qos
    if plan.in_job:
        return
    asked = [name for name in ("mem", "mem-per-cpu", "mem-per-gpu") if plan.option(name) not in ("", "0")]
    if asked and facts.memory_option_refused:
        what = f"--{asked[0]}={plan.option(asked[0])}: {facts.memory_option_refused}"
        yield f"{what}. Leave it out, and give --cpus-per-task, {OUT_OF_DATE}."
    if qos and facts.qos and qos not in facts.qos:
        yield f"no QoS {qos} of {plan.machine} is known. The nearest is {nearest(qos, facts.qos)}, {OUT_OF_DATE}."
    else:
        yield from too_much(plan, qos)


def too_much(plan: Plan, qos: str) -> Iterator[str]:
    """Refuse more hours than the machine gives, more hours or GPUs than the QoS; name a QoS that gives enough."""
    facts, time, hours, gpus = plan.facts, plan.option("time"), plan.seconds / 3600, plan.world_size
    shown = qos if plan.option("qos") else f"{qos}, the default QoS"
    roomy = (each for each, most in facts.qos.items() if most["hours"] >= hours and most["gpus"] >= gpus)
    other = next((f"--qos={each}" for each in roomy), None)
    most = facts.qos.get(qos, {"hours": math.inf, "gpus": math.inf})
    if hours > facts.hours:
        yield f"--time {time} exceeds the {facts.hours} h of {plan.machine}. Give less: a job that is cut off resumes."
    elif hours > most["hours"]:
        remedy = other or "a shorter --time: a job that is cut off resumes"
        yield f"--time {time} exceeds the {most['hours']} h of {shown}. Give {remedy}, {OUT_OF_DATE}."
    if gpus > most["gpus"]:
        remedy = f"{other}, fewer --nodes" if other else "fewer --nodes"
        yield f"{gpus} GPUs exceed the {most['gpus']} of {shown}. Give {remedy}, {OUT_OF_DATE}."

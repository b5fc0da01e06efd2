# SPDX-License-Identifier: Apache-2.0
"""Refuse what cannot work before it waits in a queue; print what a job would be, and where each value comes from.

    python tools/preflight.py MACHINE STRATEGY [sbatch options] -- RECIPE [flags]
    python tools/preflight.py h100 fsdp --nodes=4 --time=20:00:00 -A PROJECT@h100 -- recipes/vit.py \\
        --data '$DSDIR/imagenet' --model L --image_size 224 --patch_size 16 --global_batch_size 4096
    python tools/preflight.py a100 ddp --array=1-4 -A PROJECT@a100 -- recipes/resnet.py @sweep.txt

On a login node, without GPU or network. A value comes from the command line, else the environment, the #SBATCH headers
of slurm/MACHINE.slurm, accelerate_configs/MACHINE_STRATEGY.yaml, the recipe's flags, its defaults. `@FILE` stands for
a line of FILE for each task of an array. --memory estimates the bytes per GPU and the seconds of an all-reduce too;
--in_job, which slurm/launch.sh gives, asks for the job that runs here. Exits with 1 and a line `error: <what>.
<remedy>` for each problem.

RECIPES_PREFLIGHT_SKIP=accounts,limits,caches,versions,quotas leaves those checks out: they rest on what users of Jean
Zay wrote down, and on this machine.
"""

import argparse
import contextlib
import difflib
import functools
import getpass
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import yaml
from machines import Machine, read_machines
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
FULL = 0.95  # of a quota
ROOM = {"disk": 10 * 10**9, "inodes": 10_000}  # bytes and files that a run may need; more is never too little

# sbatch option: its short form, and the variables that stand for it, those of a job last.
OPTIONS = {
    "nodes": ("-N", "SLURM_JOB_NUM_NODES"),
    "time": ("-t", "SBATCH_TIMELIMIT"),
    "account": ("-A", "SBATCH_ACCOUNT", "SLURM_JOB_ACCOUNT"),
    "qos": ("-q", "SBATCH_QOS", "SLURM_JOB_QOS"),
    "constraint": ("-C", "SBATCH_CONSTRAINT"),
    "partition": ("-p", "SBATCH_PARTITION", "SLURM_JOB_PARTITION"),
    "array": ("-a", "SBATCH_ARRAY_INX", "SLURM_ARRAY_TASK_ID"),
    "gres": ("--gres", "SBATCH_GRES"),
    "gpus-per-node": ("--gpus-per-node", "SBATCH_GPUS_PER_NODE"),
    "gpus": ("-G", "SBATCH_GPUS"),
    "ntasks": ("-n",),
    "cpus-per-task": ("-c", "SLURM_CPUS_PER_TASK"),
    "chdir": ("-D",),
    "job-name": ("-J", "SBATCH_JOB_NAME"),
    "output": ("-o", "SBATCH_OUTPUT"),
    "error": ("-e", "SBATCH_ERROR"),
    "mem": ("--mem", "SBATCH_MEM_PER_NODE"),
    "mem-per-cpu": ("--mem-per-cpu", "SBATCH_MEM_PER_CPU"),
    "mem-per-gpu": ("--mem-per-gpu", "SBATCH_MEM_PER_GPU"),
    "ntasks-per-node": ("--ntasks-per-node", "SLURM_NTASKS_PER_NODE"),
    "ntasks-per-core": ("--ntasks-per-core",),
    "ntasks-per-socket": ("--ntasks-per-socket",),
    "ntasks-per-gpu": ("--ntasks-per-gpu",),
    "gpus-per-task": ("--gpus-per-task", "SBATCH_GPUS_PER_TASK"),
    "gpus-per-socket": ("--gpus-per-socket",),
    "tres-per-task": ("--tres-per-task",),
    "gpu-bind": ("--gpu-bind", "SBATCH_GPU_BIND"),
    "tres-bind": ("--tres-bind",),
    "cpus-per-gpu": ("--cpus-per-gpu", "SBATCH_CPUS_PER_GPU"),
    "distribution": ("-m", "SBATCH_DISTRIBUTION"),
    "export": ("--export", "SBATCH_EXPORT"),
    "open-mode": ("--open-mode", "SBATCH_OPEN_MODE"),
    "signal": ("--signal", "SBATCH_SIGNAL"),
    "container": ("--container", "SBATCH_CONTAINER"),
}
# Of these only such values leave alone what slurm/launch.sh starts; what the others do, and what to do instead.
LEAVE_OUT = "Leave it out: one launcher a node starts a process on each of its GPUs."
USE_GRES = "Give --gres=gpu:N, N GPUs a node."
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
# The others that sbatch has, which change nothing here: with a value, with one that may be missing, without one.
OTHERS = (
    "acctg-freq batch bb bbf begin,-b cluster-constraint clusters,-M comment container-id core-spec,-S "
    "cores-per-socket cpu-freq deadline delay-boot dependency,-d exclude,-x export-file extra extra-node-info,-B gid "
    "gpu-freq gres-flags hint input,-i kill-on-invalid-dep licenses,-L mail-type mail-user mcs-label mem-bind mincpus "
    "network nodefile,-F nodelist,-w power prefer priority profile reservation segment sockets-per-node switches "
    "thread-spec threads-per-core time-min tmp uid wait-all-nodes wckey",
    "exclusive get-user-env nice no-kill,-k propagate",
    "contiguous hold,-H ignore-pbs no-requeue overcommit,-O oversubscribe,-s parsable quiet,-Q reboot requeue "
    "spread-job stepmgr test-only use-min-nodes verbose,-v wait,-W",
)
# Keys that a machine's YAML must not hold, and why.
MISPLACED = {
    key: reason
    for keys, reason in {
        "rdzv_backend same_network enable_cpu_affinity max_restarts use_cpu": "accelerate ignores it there",
        "num_machines num_processes machine_rank": "Slurm and slurm/launch.sh say it",
        "main_process_ip main_process_port gpu_ids": "Slurm and slurm/launch.sh say it",
        "gradient_accumulation_steps": "the recipe's --gradient_accumulation_steps says it",
        "gradient_clipping": "the recipe's --max_grad_norm says it",
        "train_batch_size train_micro_batch_size_per_gpu": "the recipe's --global_batch_size says it",
    }.items()
    for key in keys.split()
}


class Task(NamedTuple):
    """One run of the recipe: where its flags stand ("" or "sweep.txt line 2"), the flags, and what they parse to."""

    name: str
    words: list[str]
    run_config: object  # None where the recipe has none, nor images
    images: object
    config: object


@dataclass
class Plan:
    """A job, as its command line, environment, headers and YAML say."""

    machine: str
    facts: Machine
    strategy: str
    memory: bool
    in_job: bool  # of slurm/launch.sh: Slurm's variables are those of this job
    recipe: Path
    words: list[str]
    options: dict[str, tuple[str, str]]  # sbatch option: value, origin
    topology: dict
    nodes: int = 1
    gpus: tuple[int, str] = (0, "")  # of a node; origin
    precision: tuple[str, str] = ("", "")
    seconds: float = 0
    module: ModuleType | None = None
    tasks: list[Task] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # printed below a sound job

    @property
    def yaml(self) -> str:
        return f"accelerate_configs/{self.facts.topologies or self.machine}_{self.strategy}.yaml"

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus[0]

    @property
    def kind(self) -> str:
        """The strategy as a worker sees it: tp and pp are ddp, with code of the recipe."""
        kind = str(self.topology.get("distributed_type"))
        if kind == "DEEPSPEED":
            return f"zero{self.section('deepspeed').get('zero_stage', 2)}"
        return ("hsdp" if "parallelism_config" in self.topology else "fsdp") if kind == "FSDP" else "ddp"

    @property
    def gigabytes(self) -> int:
        """Of a GPU."""
        known = self.facts.gpu_memory_by_constraint
        return next((known[word] for word in self.words_of("constraint") if word in known), self.facts.gpu_memory)

    @property
    def takes(self) -> list[str]:
        """Strategies of the recipe."""
        names = {each.name for each in fields(self.module.Config)}
        in_code = [name for name, size in zip(("tp", "pp"), self.splits, strict=True) if size in names]
        return [*getattr(self.module, "STRATEGIES", ("ddp",)), *in_code]

    def shared(self, name: str) -> ModuleType:
        """A module of the `shared` that the recipe imports: a copied recipe may have its own."""
        return importlib.import_module(f"{self.module.parse.__module__.rpartition('.')[0]}.{name}")

    @property
    def splits(self) -> tuple[str, str]:
        """Fields of the recipes that split a network in code: tensor, pipeline."""
        return self.shared("config").SIZES

    def section(self, name: str) -> dict:
        """Of the YAML."""
        return self.topology.get(f"{name}_config") or {}

    def option(self, name: str) -> str:
        return self.options.get(name, ("", ""))[0]

    def words_of(self, name: str) -> list[str]:
        """Features or partitions in an option, as in `a100&long`."""
        return re.split(r"[,&|]", self.option(name))

    def sizes(self, task: Task) -> tuple[int, int, int]:
        """(tensor, pipeline, data) parallel sizes; the last is 0 where they do not divide the processes."""
        tensor, pipeline = (getattr(task.config, name, 1) for name in self.splits)
        return tensor, pipeline, 0 if self.world_size % (tensor * pipeline) else self.world_size // tensor // pipeline

    def images(self, task: Task) -> int:
        """Of one forward of one process."""
        return task.config.global_batch_size // self.sizes(task)[2] // task.config.gradient_accumulation_steps

    @property
    def launch(self):
        """What a worker of this job would find, for the recipe's own checks."""
        return self.shared("launch").Launch(self.kind, self.precision[0], self.world_size, on_gpu=True)


def main(words: list[str]) -> int:
    """Print the job, or every problem that it has; the exit status."""
    plan, problems = read_command(words)
    skipped = os.environ.get("RECIPES_PREFLIGHT_SKIP", "").split(",")
    optional = [check for check in (accounts, limits, caches, versions, quotas) if check.__name__ not in skipped]
    for check in [] if problems else [launching, cores, topology, read_recipe, read_tasks, tasks, *optional]:
        problems += check(plan)
    if not problems and plan.memory and plan.tasks[0].run_config:
        problems += memory(plan)
    for problem in dict.fromkeys(problems):
        print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    if not problems:
        print("\n".join([*report(plan, plan.tasks[0]), *dict.fromkeys(plan.notes)]))
    return 1 if problems else 0


def nearest(word: str, known) -> str:
    return difflib.get_close_matches(word, list(known), 1, 0)[0]


# The command


def read_command(words: list[str]) -> tuple[Plan | None, list[str]]:
    """The plan, and what is wrong with the words themselves."""
    end = words.index("--") if "--" in words else len(words)
    if {"-h", "--help"} & {*words[:end]}:
        print(__doc__)
        sys.exit(0)
    if end < 2 or not words[end + 1 :]:
        return None, ["machine, strategy and recipe are needed. Give MACHINE STRATEGY [options] -- RECIPE [flags]."]
    machine, strategy, *front = words[:end]
    try:
        facts = read_machine(machine)
        settings = read_topology(facts.topologies or machine, machine, strategy)
    except ValueError as error:
        return None, [str(error)]
    own = {"--memory": False, "--in_job": False} | {word: True for word in front if word in ("--memory", "--in_job")}
    try:
        options, others = resolve(machine, [word for word in front if word not in own], own["--in_job"])
    except argparse.ArgumentError as error:
        return None, [f"sbatch's {error}. Give it, or leave the option out."]
    recipe, *flags = words[end + 1 :]
    plan = Plan(machine, facts, strategy, *own.values(), Path(recipe), flags, options, settings)
    return plan, [*unknown_options(others), *read_values(plan)]


def read_machine(name: str) -> Machine:
    known = read_machines(ROOT)
    if name not in known:
        raise ValueError(f"no machine {name}. The nearest is {nearest(name, known)}; there are {', '.join(known)}.")
    if not (ROOT / f"slurm/{name}.slurm").is_file():
        raise ValueError(f"{name} has no slurm/{name}.slurm. Write one as docs/other_clusters.md shows.")
    return known[name]


def read_topology(prefix: str, machine: str, strategy: str) -> dict:
    """Return what accelerate_configs/{prefix}_{strategy}.yaml holds."""
    found = sorted(path.stem.split("_", 1)[1] for path in ROOT.glob(f"accelerate_configs/{prefix}_*.yaml"))
    if not found:
        raise ValueError(f"no accelerate_configs/{prefix}_STRATEGY.yaml. Copy one, or see docs/other_clusters.md.")
    if strategy not in found:
        close = f"The nearest is {nearest(strategy, found)}; there are {', '.join(found)}."
        raise ValueError(f"{machine} has no strategy {strategy}. {close}")
    try:
        return yaml.safe_load((ROOT / f"accelerate_configs/{prefix}_{strategy}.yaml").read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"accelerate_configs/{prefix}_{strategy}.yaml cannot be read: {error}.") from error


def parse_options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options of sbatch that matter here, and the words that are no option of it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, (short, *_) in OPTIONS.items():
        parser.add_argument(*dict.fromkeys((short, f"--{name}")), dest=name)
    for names, how in zip(OTHERS, ({}, {"nargs": "?"}, {"action": "store_true"}), strict=True):
        for name in names.split():
            parser.add_argument(*f"--{name}".split(","), dest=f"other {name}", **how)
    found, others = parser.parse_known_args(words)
    return {name: value for name, value in vars(found).items() if name in OPTIONS and value is not None}, others


def unknown_options(words: list[str]) -> Iterator[str]:
    known = [*OPTIONS, *(name.split(",")[0] for names in OTHERS for name in names.split())]
    for word in words:
        name = word.split("=")[0].lstrip("-")
        if not word.startswith("-"):
            yield f"{word} belongs to no option of sbatch. The recipe and its flags come after --."
        else:
            close = next((each for each in known if each.startswith(name)), nearest(name, known))
            yield f"sbatch has no option {word.split('=')[0]} in full. The nearest is --{close}."


def resolve(machine: str, words: list[str], in_job: bool) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Each option's value and origin: the command line, else the environment, else the script's headers."""
    options = {name: (value, f"slurm/{machine}.slurm") for name, value in headers(machine).items()}
    if in_job:
        options.pop("time", None)  # sbatch may have been given another
    for name, (_, *variables) in OPTIONS.items():
        for variable in filter(os.environ.get, variables):
            if in_job or not variable.startswith("SLURM_"):  # of an interactive job that one submits from
                options[name] = os.environ[variable], f"${variable}"
    given, others = parse_options(words)
    return options | {name: (value, "command line") for name, value in given.items()}, others


def headers(machine: str) -> dict[str, str]:
    """Return the options in the #SBATCH lines of the machine's script."""
    lines = (ROOT / f"slurm/{machine}.slurm").read_text().splitlines()
    words = (shlex.split(line[8:], comments=True) for line in lines if line.startswith("#SBATCH "))
    return parse_options([*itertools.chain(*words)])[0]


def gpus_of(gres: str) -> int:
    """GPUs of a node in --gres, as in `gpu:a100:4,lscratch:10`; 0 where there are none."""
    parts = [part.split("(")[0].removeprefix("gres/").split(":") for part in gres.split(",")]
    counts = [words[-1] for words in parts if words[0] == "gpu"]
    return sum(int(count) if count.isdigit() else 1 for count in counts)


def read_values(plan: Plan) -> Iterator[str]:
    """Nodes, GPUs of a node, precision and seconds."""
    nodes, time = plan.option("nodes") or "1", plan.option("time")
    if not re.fullmatch("[1-9][0-9]*", nodes):
        yield f"--nodes {nodes} is not one number. Give how many nodes the job has."
    else:
        plan.nodes = int(nodes)
    text, origin = plan.options.get("gres", (f"gpu:{plan.facts.gpus}", "the machine"))
    plan.gpus = gpus_of(text), origin
    if not 0 < plan.gpus[0] <= plan.facts.gpus:
        what = "exceeds a node" if plan.gpus[0] else "gives no GPU"
        yield f"--gres={text} {what} of {plan.machine}. Give --gres=gpu:N, with N from 1 to {plan.facts.gpus}."
    # Of slurm/launch.sh.
    if plan.in_job and os.environ.get("SLURM_GPUS_ON_NODE"):
        plan.gpus = int(os.environ["SLURM_GPUS_ON_NODE"]), "$SLURM_GPUS_ON_NODE"
    if os.environ.get("RECIPES_PROCESSES_PER_NODE"):
        plan.gpus = int(os.environ["RECIPES_PROCESSES_PER_NODE"]), "$RECIPES_PROCESSES_PER_NODE"
    flag = re.search(r"--mixed_precision[ =](\S+)", os.environ.get("RECIPES_LAUNCH_FLAGS", ""))
    plan.precision = (
        (flag[1], "$RECIPES_LAUNCH_FLAGS") if flag else (str(plan.topology.get("mixed_precision", "no")), plan.yaml)
    )
    if time and (match := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)):
        days, *parts = (int(part) for part in match.groups() if part is not None)
        if match[1] is None:  # minutes, minutes:seconds, hours:minutes:seconds; else days-hours[:minutes[:seconds]]
            days, parts = 0, [*([0] if match[4] is None else []), days, *parts]
        plan.seconds = 86400 * days + sum(part * 60 ** (2 - place) for place, part in enumerate(parts))
    elif time:
        yield f"--time {time} is no time of Slurm. Give hours:minutes:seconds, as 20:00:00."
    elif plan.in_job:
        plan.seconds = float("inf")
    else:
        plan.seconds, end = 60 * plan.facts.default_minutes, f"after {plan.facts.default_minutes} minutes"
        plan.notes.append(f"warning: without --time the machine ends a job {end}. Give --time=HH:MM:SS.")


# What the machine asks for


def launching(plan: Plan) -> Iterator[str]:
    """Refuse options that change what slurm/launch.sh starts, or where; a job that runs has its place and its log."""
    for name, (harmless, what, remedy) in FIXED.items():
        value, origin = plan.options.get(name, ("", ""))
        if value and not re.fullmatch(harmless, value) and (name == "ntasks-per-node" or not plan.in_job):
            yield f"--{name}={value} ({origin}) {what}. {remedy}"
    if plan.in_job:
        return
    total = plan.nodes * gpus_of(plan.option("gres") or f"gpu:{plan.facts.gpus}")
    for name, wanted in (("ntasks", plan.nodes), ("gpus", total), ("gpus-per-node", total // plan.nodes)):
        value = plan.option(name)
        if value and value.rpartition(":")[2] != str(wanted):
            remedy = "--nodes=N alone" if name == "ntasks" else "--nodes=N and --gres=gpu:N, N GPUs a node"
            yield f"--{name}={value} is not the {wanted} that the other options ask for. Give {remedy}."
    yield from places(plan)


def places(plan: Plan) -> Iterator[str]:
    """Go where --chdir leads; refuse a log whose folder is not there: Slurm ends such a job without a word."""
    folder = plan.option("chdir")
    if folder and not Path(folder).is_dir():
        yield f"--chdir={folder} is no folder. Make it, or leave the option out."
    elif folder:
        os.chdir(folder)
    known = {"x": plan.option("job-name"), "u": getpass.getuser(), "%": "%"}
    for name in ("output", "error"):
        pattern, origin = plan.options.get(name, ("", ""))
        log = Path(re.sub("%([xu%])", lambda match: known[match[1]], pattern))
        if pattern and (not log.parent.is_dir() or log.is_dir()):
            yield f"--{name}={pattern} ({origin}) is no file in a folder that exists, and Slurm makes none. Make it."


def cores(plan: Plan) -> Iterator[str]:
    """Refuse more cores than a node has, and name a share that is too small for the launcher's processes."""
    value, facts = plan.option("cpus-per-task"), plan.facts
    most = facts.cores * facts.gpus
    if not value:
        return
    if not value.isdigit() or not 0 < int(value) <= most:
        yield f"--cpus-per-task={value} does not fit into the {most} cores of a node. Give at most {most}."
    elif int(value) < (share := facts.cores * min(plan.gpus[0], facts.gpus)):
        of_all = f"is for all {plan.gpus[0]} processes of a node, whose share is {share} cores"
        plan.notes.append(f"warning: --cpus-per-task={value} {of_all}. Give --cpus-per-task={share}.")


def accounts(plan: Plan) -> Iterator[str]:
    """Account, and the options that select the nodes; a job that runs has been let in."""
    account, own = plan.option("account"), plan.facts.account
    if plan.in_job:
        return
    if own and not account:
        yield f"no account is given. Add -A PROJECT@{own}."
    elif own and "@" in account and account.split("@")[1] != own:
        yield f"the account {account} has no hours on {plan.machine}. Give the one that ends in @{own}."
    for name in ("constraint", "partition"):
        words, wanted = plan.words_of(name), plan.facts.select.get(name)
        if wanted and not plan.facts.selectors & {*words}:
            yield f"--{name} {plan.option(name)} does not select {plan.machine}. Give {OPTIONS[name][0]} {wanted}."
            continue
        for word in words:
            others = [other for other, facts in read_machines(ROOT).items() if word in facts.selectors]
            if others and plan.machine not in others:
                other = " or ".join(others)
                yield f"--{name} {word} selects {other}, not {plan.machine}. Leave it out, or name that machine."


def limits(plan: Plan) -> Iterator[str]:
    """Time and GPUs of the partition and the QoS."""
    facts, time, hours, gpus = plan.facts, plan.option("time"), plan.seconds / 3600, plan.world_size
    asked = [name for name in ("mem", "mem-per-cpu", "mem-per-gpu") if plan.option(name) not in ("", "0")]
    name = plan.option("qos") or facts.default_qos
    shown = name if plan.option("qos") else f"{name}, the default QoS"
    out_of_date = "or RECIPES_PREFLIGHT_SKIP=limits where this is out of date"
    if plan.in_job:
        return
    if asked and facts.memory_option_refused:
        what = f"--{asked[0]}={plan.option(asked[0])}: {facts.memory_option_refused}"
        yield f"{what}. Leave it out, and give --cpus-per-task, {out_of_date}."
    if name and facts.qos and name not in facts.qos:
        yield f"no QoS {name} of {plan.machine} is known. The nearest is {nearest(name, facts.qos)}, {out_of_date}."
        return
    roomy = (each for each, most in facts.qos.items() if most["hours"] >= hours and most["gpus"] >= gpus)
    other = next((f"--qos={each}" for each in roomy), None)
    most = facts.qos.get(name, {"hours": math.inf, "gpus": math.inf})
    if hours > facts.hours:
        yield f"--time {time} exceeds the {facts.hours} h of {plan.machine}. Give less: a job that is cut off goes on."
    elif hours > most["hours"]:
        remedy = other or "a shorter --time: a job that is cut off goes on"
        yield f"--time {time} exceeds the {most['hours']} h of {shown}. Give {remedy}, {out_of_date}."
    if gpus > most["gpus"]:
        remedy = f"{other}, fewer --nodes" if other else "fewer --nodes"
        yield f"{gpus} GPUs exceed the {most['gpus']} of {shown}. Give {remedy}, {out_of_date}."


def caches(plan: Plan) -> Iterator[str]:
    """In a small home folder, where there is room elsewhere. slurm/launch.sh moves those that nobody placed."""
    given, home = os.environ.get, Path.home()
    cache = Path(given("XDG_CACHE_HOME") or home / ".cache")
    places = {
        "HF_HOME": given("HF_HOME") or given("WORK") or cache / "huggingface",
        "TORCH_HOME": given("TORCH_HOME") or given("WORK") or cache / "torch",
        "TRITON_CACHE_DIR": given("TRITON_CACHE_DIR") or given("SCRATCH") or given("TRITON_HOME") or home / ".triton",
    }
    inside = [name for name, place in places.items() if Path(place).resolve().is_relative_to(home.resolve())]
    small = f"in $HOME, which holds {plan.facts.home} GB"
    built = given("TORCH_EXTENSIONS_DIR")  # else slurm/launch.sh gives each kind of machine and environment its own
    first = {"HF_HOME": "WORK", "TORCH_HOME": "WORK", "TRITON_CACHE_DIR": "SCRATCH"}
    names = {"HF_HOME": "huggingface", "TORCH_HOME": "torch", "TRITON_CACHE_DIR": "triton"}  # as in slurm/launch.sh
    elsewhere = [name for name in ("WORK", "SCRATCH") if given(name) and plan.facts.home]
    if built and elsewhere and Path(built).resolve().is_relative_to(home.resolve()):
        yield f"TORCH_EXTENSIONS_DIR lies {small}. Unset it: slurm/launch.sh places it."
    if inside and elsewhere:
        folders = {name: first[name] if first[name] in elsewhere else elsewhere[0] for name in inside}
        exports = " ".join(f"{name}=${folder}/.cache/{names[name]}" for name, folder in folders.items())
        yield f"{', '.join(inside)} lie {small}. Write into ~/.bashrc: export {exports}"


def versions(plan: Plan) -> Iterator[str]:
    """The bounds of the block at the recipe's head (PEP 723), and of nothing else: each recipe has its own."""
    text = plan.recipe.read_text() if plan.recipe.is_file() else ""
    block = re.search(r"^# /// script\n((?:#.*\n)*?)# ///$", text, re.M)
    needs = tomllib.loads(re.sub("^# ?", "", block[1], flags=re.M)) if block else {}
    python, bounds = platform.python_version(), needs.get("requires-python", "")
    if not SpecifierSet(bounds).contains(python):
        yield f"Python {python} is not {bounds}. Load another module."
    lines = {*needs.get("dependencies", [])}
    for need in map(Requirement, sorted(lines | ({"deepspeed"} if plan.kind.startswith("zero") else set()))):
        if need.marker and not need.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{need.name} is not installed. Load a module that has it, or pip install '{need.name}'."
            continue
        if not need.specifier.contains(version, prereleases=True):
            yield f"{need.name} {version} is not {need.specifier}. Load a newer module, or pip install '{need}'."


def quotas(plan: Plan) -> Iterator[str]:
    """Of the file systems that are written to, by the system itself and by Lustre. Of 1 PB a twentieth is enough."""
    folders = (output(plan, task).absolute() for task in plan.tasks if task.run_config)
    places = {next(each for each in (folder, *folder.parents) if each.exists()) for folder in folders}
    known = {}  # by file system, owner
    for there in sorted(places):
        figures = [*system(there), *(lustre(plan, there, known) if shutil.which("lfs") else ())]
        for what, used, most in figures:
            if most and used > FULL * most and most - used < ROOM[what.split()[0]]:
                share = f"{used / most:.0%} of the {what} of {there} is used, and a run may need more than the rest"
                yield f"{share}. Remove files, change --output_dir, or RECIPES_PREFLIGHT_SKIP=quotas."


def system(folder: Path) -> Iterator[tuple[str, int, int]]:
    """What, used and most, in bytes and files, as df counts."""
    state = os.statvfs(folder)
    blocks, files = state.f_blocks - state.f_bfree, state.f_files - state.f_ffree
    yield "disk", blocks * state.f_frsize, (blocks + state.f_bavail) * state.f_frsize
    yield "inodes", files, files + state.f_favail


def lustre(plan: Plan, folder: Path, known: dict) -> list[tuple[str, int, int]]:
    """The same of its quotas: of the user, the group and the folder's project; what `known` has is not asked again."""
    figures, state = [], folder.stat()
    try:
        project = (lfs("project", "-d", str(folder)) or "0")[0]
        for kind, owner in (("-u", str(os.getuid())), ("-g", str(state.st_gid)), ("-p", project)):
            if (state.st_dev, kind, owner) not in known:
                known[state.st_dev, kind, owner] = [*quota(kind, owner, folder)]
                figures += known[state.st_dev, kind, owner]
    except (OSError, subprocess.SubprocessError) as error:
        plan.notes.append(f"warning: lfs does not tell the quotas of {folder}: {type(error).__name__}.")
    return figures


def quota(kind: str, owner: str, folder: Path) -> Iterator[tuple[str, int, int]]:
    # The path; kilobytes, soft and hard limit, grace; the same of files. `*` marks what exceeds.
    words = [word.rstrip("*") for word in lfs("quota", "-q", kind, owner, str(folder))[1:]]
    for what, unit, values in (("disk", 1024, words[:3]), ("inodes", 1, words[4:7])):
        if len(values) == 3 and all(map(str.isdigit, values)):
            used, soft, hard = (unit * int(value) for value in values)
            yield f"{what} quota ({kind[1:]} {owner})", used, hard or soft


def lfs(*words: str) -> list[str]:
    return subprocess.run(["lfs", *words], capture_output=True, text=True, timeout=5).stdout.split()


# The YAML


def topology(plan: Plan) -> Iterator[str]:
    """Precision, replicas, and keys that have no effect or another home."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    (precision, origin), known = plan.precision, plan.facts.precisions
    if precision not in known:
        yield f"{plan.machine} has no {precision} in hardware. Set mixed_precision to {known[1:][-1]} in {origin}."
    if plan.kind == "hsdp" and plan.nodes == 1:
        yield "hsdp replicates the model over nodes, and there is one. Use fsdp, or give more --nodes."
    if plan.kind in ("fsdp", "hsdp") and plan.section("fsdp").get("fsdp_version") != 2:
        yield f"{plan.yaml} asks for the first FSDP. Set fsdp_version: 2 in its fsdp_config."
    flags = {action.dest for action in launch_command_parser()._actions}
    keys = [(key, key, ClusterConfig.__dataclass_fields__) for key in plan.topology]
    for section, values in plan.topology.items():
        prefix = section.replace("config", "") * (section in ("fsdp_config", "fp8_config", "dynamo_config"))
        for key in values if isinstance(values, dict) else ():
            keys.append((key, key if key.startswith(prefix) else prefix + key, flags))
    for key, name, known in keys:
        if key in MISPLACED:
            yield f"{key} stands in {plan.yaml}: {MISPLACED[key]}. Remove it."
        elif name not in known:
            yield f"accelerate knows no key {key} of {plan.yaml}. The nearest is {nearest(name, known)}."


# The recipe


def read_recipe(plan: Plan) -> Iterator[str]:
    """Import its file, as `accelerate launch` would: with its own folder first."""
    if not plan.recipe.is_file():
        recipes = [str(path.relative_to(ROOT)) for path in ROOT.glob("recipes/*.py")]
        yield f"no recipe {plan.recipe}. Give its path; the nearest is {nearest(str(plan.recipe), recipes)}."
        return
    sys.path[:] = [str(plan.recipe.resolve().parent), *sys.path, str(ROOT)]
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
    """Parse the flags by the recipe itself: once, or for each line of `@FILE`."""
    file = next((Path(word[1:]) for word in plan.words if word.startswith("@")), None)
    if plan.module is None or not file:
        yield from read_task(plan, "", plan.words) if plan.module else ()
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
    """The numbers of sbatch's --array: 1-4, 0,2,5 or 1-9:2, then perhaps % and how many run at once."""
    numbers = []
    for first, last, step in re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", text.split("%")[0]):
        numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return numbers


def read_task(plan: Plan, name: str, words: list[str]) -> Iterator[str]:
    def read() -> None:
        *shared, config = plan.module.parse(*plan.module.CONFIGS, arguments=words)
        plan.tasks.append(Task(name, words, *(shared or (None, None)), config))

    with contextlib.redirect_stderr(io.StringIO()) as said:
        problems = list(refusals(plan, read))
    plan.notes += said.getvalue().splitlines()
    yield from (f"{name}: {problem}" if name else problem for problem in problems)


def refusals(plan: Plan, function, *arguments) -> Iterator[str]:
    """What it yields, and what one of the recipe's parts raises in it."""
    try:
        yield from function(*arguments) or ()
    except plan.shared("errors").UserError as error:
        yield str(error)


def tasks(plan: Plan) -> Iterator[str]:
    """Each task's sizes, batch, data and network."""
    folders = {}
    for task in plan.tasks:
        for check in (variables, cut, start, data, wrapped):
            for problem in refusals(plan, check, plan, task):
                asks = re.search("--data /.* does not exist|--pretrained .* was not found", problem)
                hint = " $DSDIR is not set: log in anew, or export it." * bool(asks and "DSDIR" not in os.environ)
                yield (f"{task.name}: " if task.name else "") + problem + hint
        folder = output(plan, task) if task.run_config else task.name
        if folder in folders:
            yield f"{folders[folder]} and {task.name} write to the same {folder}. Let their lines differ."
        folders[folder] = task.name


def variables(plan: Plan, task: Task) -> Iterator[str]:
    """A path that begins with $DSDIR, in single quotes or in a file: nothing expands it."""
    for word in (word for word in task.words if "$" in word):
        if "$DSDIR" in word and "DSDIR" not in os.environ:
            yield f"$DSDIR is not set, and {word} needs it. Log in anew, or export it."
        else:
            yield f"{word} was not expanded. Take the single quotes away; in a file, write the path out."


def cut(plan: Plan, task: Task) -> Iterator[str]:
    """The sizes of tensor and pipeline parallelism, and what the recipe itself says to them."""
    (tensor, pipeline, size), recipe = plan.sizes(task), plan.module
    flags = " x ".join(f"--{name} {getattr(task.config, name)}" for name in plan.splits if hasattr(task.config, name))
    if tensor > plan.gpus[0] or plan.gpus[0] % tensor:
        gpus = plan.gpus[0]
        yield f"--{plan.splits[0]} {tensor} does not fit into a node of {gpus} GPUs. Give a divisor of {gpus}."
    elif not size:
        gpus = f"{plan.world_size} GPUs ({plan.nodes} nodes x {plan.gpus[0]})"
        yield f"{flags} does not divide the {gpus}. Change it or --nodes."
    if hasattr(recipe, "check"):
        recipe.check(task.run_config, task.images, task.config, plan.launch)
    blocks = number_of_blocks(network(plan, task)) if pipeline > 1 else 0
    if blocks % pipeline:
        plan.notes.append(f"warning: {blocks} blocks over {pipeline} stages: the larger ones keep the others waiting.")


def number_of_blocks(model) -> int:
    """Those of its longest list of modules."""
    import torch

    return max(len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def start(plan: Plan, task: Task) -> None:
    """What a run refuses when it starts: its batch, trackers, checkpoints, what DeepSpeed cannot."""
    size = plan.sizes(task)[2]
    if task.run_config:
        run, config = task.run_config, task.config
        plan.shared("run.log").known_trackers(run.report_to)
        plan.shared("run.nonfinite").refuse_pairs(run, config, plan.kind)
        plan.shared("run.position").checkpoint_steps(run.checkpointing_steps, 1)
        plan.shared("order").micro_batch_size(config, size or 1)


def data(plan: Plan, task: Task) -> Iterator[str]:
    """That it is there, that a batch does not exceed it, and that nobody forgot it on several nodes."""
    given = any(word.split("=")[0] == "--data" for word in task.words)
    if task.images and task.images.data == "digits" and plan.nodes > 1 and not given:
        what = f"without --data the {plan.nodes} nodes train on 1,797 embedded digits"
        yield f"{what}. Give --data FOLDER, or --data digits where you mean them."
    if task.images and "$" not in task.images.data:
        steps_per_epoch(plan, task)


def steps_per_epoch(plan: Plan, task: Task) -> int | None:
    """None where there are no images, or they are not counted yet: class folders without an index take long."""
    read, images = getattr(plan.module, "open_data", None), task.images
    if not read or not images:
        return None
    if Path(images.data).exists() and not Path(images.data, "train/index.safetensors").exists():
        return None
    batch, seed = task.config.global_batch_size, task.run_config.seed
    count = count_images(read, *images.source(seed))
    return plan.shared("order").TrainingOrder(count, batch, batch, 0, 1, seed).steps_per_epoch


@functools.cache
def count_images(read, *arguments) -> int:
    return len(read(*arguments)[0])


def wrapped(plan: Plan, task: Task) -> Iterator[str]:
    """The blocks that FSDP wraps, in the recipe's model."""
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
    """The recipe's model without memory; 1,000 classes where the data is not looked at."""
    import torch

    with torch.device("meta"):
        return plan.module.build_model(task.images, task.config, 10 if task.images.data == "digits" else 1000, 0)


def memory(plan: Plan) -> Iterator[str]:
    """Of a GPU, estimated for the first task; what to change where it is too little."""
    task, giga = plan.tasks[0], 2**30
    totals, config = memory_of(plan, task), task.config
    settings = plan.section("fsdp")
    recompute = bool(getattr(config, "activation_checkpointing", settings.get("fsdp_activation_checkpointing")))
    # CUDA and NCCL take one.
    room = (0.98 * plan.gigabytes - 1) * giga
    parts = totals(1, recompute)
    most, host = parts.pop("total"), parts.pop("host") * plan.gpus[0] / giga  # of what is offloaded
    share = plan.gpus[0] / plan.facts.gpus * plan.facts.memory * 10**9 / giga
    line = " + ".join(f"{value / giga:.1f} {name}" for name, value in parts.items())
    line = f"{line}: at most {most / giga:.1f} GiB at once of {room / giga:.1f}"
    plan.notes.append(f"Memory of a GPU, estimated: {line}.")
    if host:
        line_of_host = f"{host:.1f} GiB of {share:.1f} that the job has there"
        plan.notes.append(f"Memory of a node for what is offloaded, estimated: {line_of_host}.")
    if host > share:
        plan.notes.append("warning: that is too much, beside loaders. Give more nodes, or no offload.")
    choices = [(recompute, "")]
    if hasattr(config, "activation_checkpointing") and not recompute:
        choices.append((True, "--activation_checkpointing "))
        plan.notes.append(f"  With {choices[1][1]}at most {totals(1, True)['total'] / giga:.1f} GiB.")
    plan.notes += all_reduce(plan, task)
    images, steps, remedies = plan.images(task), config.gradient_accumulation_steps, []
    for again, flag in choices if most > room else ():
        factors = [factor for factor in range(1, images + 1) if images % factor == 0]
        factor = next((each for each in factors if totals(each, again)["total"] < room), 0)
        if factor:
            flag += f"--gradient_accumulation_steps {steps * factor} " * (factor > 1)
            remedies.append(f"{flag}({totals(factor, again)['total'] / giga:.1f} GiB)")
    if most > room:
        yield f"{line}. Give {' or '.join(remedies) or 'more GPUs, or a strategy that shards more: see the parts'}."


def all_reduce(plan: Plan, task: Task) -> Iterator[str]:
    """How long a step's gradients travel, where nothing hides it: a ring sends them 2 (n - 1) / n times."""
    tensor, stages, size = plan.sizes(task)
    count = sum(weight.numel() for weight in network(plan, task).parameters())
    half = plan.kind.startswith("zero") and plan.precision[0] != "no"
    sent, (rate, source) = count // (tensor * stages) * (2 if half else 4), bandwidth(plan)
    if size > 1 and rate:
        cost = f"{2 * (size - 1) / size * sent / 1e9 / rate:.2g} s a step by all-reduce at {rate:.3g} GB/s"
        yield f"Gradients of {sent / 1e6:,.0f} MB: about {cost} on the bus ({source})."
    elif size > 1:
        what = f"no bandwidth {'between nodes' if plan.nodes > 1 else 'inside a node'} of {plan.machine} is known"
        yield f"Gradients of {sent / 1e6:,.0f} MB: {what}. Run benchmarks/allreduce.py there."


def bandwidth(plan: Plan) -> tuple[float | None, str]:
    """GB/s on the bus and its source: the newest measurement of such GPUs, in a node or across, else the table's."""
    across = plan.nodes > 1
    results = ROOT.glob(f"benchmarks/results/allreduce_{plan.facts.gpu}_*.json")
    for path in sorted(results, key=lambda path: path.stem[-10:], reverse=True):
        result = json.loads(path.read_text())
        if (result["processes"] > result["processes_per_node"]) == across:
            return result["rows"][-1]["bus, GB/s"]["median"], path.name
    return (plan.facts.network, "reports of users") if across else (plan.facts.nvlink, "NVLink's peak")


def memory_of(plan: Plan, task: Task):
    """A function of (times the accumulation steps, activation checkpointing) to bytes by kind."""
    import memory_estimate as estimate

    config, kind, (tensor, stages, _), recipe = task.config, plan.kind, plan.sizes(task), plan.module
    model = network(plan, task)
    for module in model.modules():
        module.recompute = False  # --activation_checkpointing; its bytes follow from the whole ones
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    half = plan.precision[0] != "no"
    yaml = plan.section("deepspeed") | plan.section("fsdp")
    saved = estimate.activations(model, task.images.image_size, half)
    if getattr(config, "sequence_parallel", False):
        saved = saved._replace(split=saved.block)
    held = {"replicas": plan.nodes if kind == "hsdp" else 1, "weight_bytes": 2 if half and "zero" in kind else 4}
    held["state_bytes"] = estimate.state_bytes(recipe.build_optimizer(model, config, 100)[0])
    how = {"half": half, "tensor": tensor, "stages": stages}
    how["reshard"] = yaml.get("fsdp_reshard_after_forward", True) and getattr(config, "reshard_after_forward", True)
    if getattr(config, "pipeline_schedule", "") == "1f1b":
        how["waiting"] = min(1, stages / config.pipeline_chunks)
    waits = {"parameters": "param", "gradients": "optimizer", "optimizer": "optimizer"}  # in the host's memory
    waits = {name for name, what in waits.items() if yaml.get(f"offload_{what}_device") == "cpu"}
    held["offloads"] = "optimizer" in waits
    # One of each stage; of ZeRO's ranks, which differ by the weights on their borders, the one that holds most.
    some = range(0, plan.world_size, 1 if kind in ("zero1", "zero2") else plan.world_size // stages)

    def totals(factor: int, recompute: bool) -> dict[str, float]:
        more = factor * config.gradient_accumulation_steps > 1
        split = {"tensor": tensor, "stages": stages, "accumulates": more, **held}
        ranks = [estimate.held(kind, shapes, plan.world_size, rank, **split) for rank in some]
        kept = max(ranks, key=lambda each: sum(each.values()))
        host = sum(kept[name] for name in waits)
        kept |= dict.fromkeys(waits, 0)
        images = plan.images(task) // factor
        passing = {"accumulates": more, "recompute": recompute, **how}
        return estimate.peak(kind, shapes, plan.world_size, kept, saved, images, **passing) | {"host": host}

    return totals


# What is printed


def output(plan: Plan, task: Task) -> Path:
    """The run's folder."""
    config = plan.shared("run.identity")
    values = config.identity(plan.recipe.stem, plan.precision[0], task.run_config, task.images, task.config)
    return Path(task.run_config.output_dir or f"runs/{plan.recipe.stem}-{config.identity_hash(values)}")


def report(plan: Plan, task: Task) -> list[str]:
    """The resolved configuration, aligned, each value with its origin."""
    tensor, pipeline, size = plan.sizes(task)
    given = {word.split("=")[0].replace("--no_", "--") for word in task.words}

    def flags(*names: str) -> str:
        origins = [(task.name or "command line") if f"--{name}" in given else plan.recipe.name for name in names]
        return ", ".join(dict.fromkeys(origins))

    def option(name: str, default: str) -> tuple[str, str, str]:
        return name, *plan.options.get(name, (default, "default"))

    def settings(owner, names) -> list[tuple[str, str, str]]:
        return [(name, str(getattr(owner, name)), flags(name)) for name in names if hasattr(owner, name)]

    rows = [
        ("machine", f"{plan.machine}, {plan.facts.gpus} GPUs of {plan.gigabytes} GB a node", "command line"),
        ("strategy", plan.strategy, "command line"),
        ("recipe", str(plan.recipe), "command line"),
        option("nodes", "1"),
        ("GPUs a node", str(plan.gpus[0]), plan.gpus[1]),
        ("world size", f"{plan.world_size} = {plan.nodes} nodes x {plan.gpus[0]}", "nodes, GPUs a node"),
        ("precision", *plan.precision),
    ]
    if plan.kind == "hsdp":
        rows.append(("replicas", f"{plan.nodes}, each sharded over a node", "nodes"))
    sharding = plan.section("fsdp") | plan.section("deepspeed")
    rows += [(name, str(value), plan.yaml) for name, value in sharding.items()]
    rows += settings(task.config, plan.splits)
    rows.append(("data-parallel size", str(size), "world size" + " / the sizes above" * (tensor * pipeline > 1)))
    if task.run_config:
        config, run = task.config, task.run_config
        batch, steps = config.global_batch_size, config.gradient_accumulation_steps
        product = f"{size} (data-parallel) x {plan.images(task)} (images) x {steps} (accumulation)"
        every = "" if run.checkpointing_steps == "epoch" else f"each {run.checkpointing_steps} steps and "
        rows += [
            ("batch", f"{batch} = {product}", flags("global_batch_size", "gradient_accumulation_steps")),
            *settings(task.images, ["data", "image_size"]),
            *settings(config, ["model", "epochs", "learning_rate"]),
            ("checkpoints", f"{every}each epoch", flags("checkpointing_steps")),
            ("output", str(output(plan, task)), flags("output_dir") if run.output_dir else "hash of all values"),
        ]
    shown = {*(name for name, *_ in rows), *plan.splits, "global_batch_size", "gradient_accumulation_steps"}
    shown |= {"checkpointing_steps", "output_dir"}
    for owner in filter(None, (task.run_config, task.images, task.config)):  # what else was given
        rows += settings(
            owner, [each.name for each in fields(owner) if f"--{each.name}" in given and each.name not in shown]
        )
    hours, minutes = divmod(plan.facts.default_minutes, 60)
    rows.append(option("time", "unknown" if plan.in_job else f"{hours:02}:{minutes:02}:00"))
    rows += [option("qos", plan.facts.default_qos or "none"), option("account", "the job's")]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:{widths[0]}}  {value:{widths[1]}}  {origin}" for name, value, origin in rows]
    if len(plan.tasks) > 1:
        lines.append(f"This is {task.name}; all {len(plan.tasks)} lines of the array are sound.")
    return [*lines, crash_cost(plan, task)]


def crash_cost(plan: Plan, task: Task) -> str:
    """Of a crash just before a checkpoint; the end of an epoch writes one too."""
    run, config, hours = task.run_config, task.config, plan.seconds / 3600 * plan.world_size
    known, limit = (
        hours < math.inf,
        f"; never more than the job's {hours:,.1f} GPU-hours." if hours < math.inf else ".",
    )
    if not run:
        return f"There are no checkpoints: a crash costs all that was done{limit}"
    steps, every = steps_per_epoch(plan, task), run.checkpointing_steps
    numbers = [number for number in (steps, None if every == "epoch" else int(every)) if number]
    what = f"{min(numbers)} steps" if numbers else ""
    what = what if steps else f"{what} or an epoch".removeprefix(" or ")
    if not steps and run.max_steps:
        return f"A crash between checkpoints costs at most {what}; the images are not counted yet{limit}"
    total = min(steps * config.epochs, run.max_steps or math.inf) if steps else config.epochs
    share = min(1, (min(numbers) if steps else 1) / total)
    cost = f" ({share * hours:,.2f} GPU-hours if the run fills the job)" * known
    return f"A crash between checkpoints costs at most {what}, {share:.1%} of the run{cost}{limit}"


if __name__ == "__main__":
    # As in the job: slurm/launch.sh.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if os.environ.get("WORK"):
        os.environ.setdefault("HF_HOME", f"{os.environ['WORK']}/.cache/huggingface")
    sys.exit(main(sys.argv[1:]))

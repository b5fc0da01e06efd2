# SPDX-License-Identifier: Apache-2.0
"""Read the options of sbatch: the command line's, the environment's and a script's #SBATCH lines."""

import argparse
import itertools
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from .plan import nearest

# All options of sbatch: those with a value, with an optional value, and without one.
OPTIONS = (
    "account,-A acctg-freq array,-a batch bb bbf begin,-b chdir,-D cluster-constraint clusters,-M comment "
    "constraint,-C container container-id core-spec,-S cores-per-socket cpu-freq cpus-per-gpu cpus-per-task,-c "
    "deadline delay-boot dependency,-d distribution,-m error,-e exclude,-x export export-file extra "
    "extra-node-info,-B gid gpu-bind gpu-freq gpus,-G gpus-per-node gpus-per-socket gpus-per-task gres gres-flags "
    "hint input,-i job-name,-J kill-on-invalid-dep licenses,-L mail-type mail-user mcs-label mem mem-bind "
    "mem-per-cpu mem-per-gpu mincpus network nodefile,-F nodelist,-w nodes,-N ntasks,-n ntasks-per-core "
    "ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output,-o partition,-p power prefer priority profile "
    "qos,-q reservation segment signal sockets-per-node switches thread-spec threads-per-core time,-t time-min tmp "
    "tres-bind tres-per-task uid wait-all-nodes wckey",
    "exclusive get-user-env nice no-kill,-k propagate",
    "contiguous hold,-H ignore-pbs no-requeue overcommit,-O oversubscribe,-s parsable quiet,-Q reboot requeue "
    "spread-job stepmgr test-only use-min-nodes verbose,-v wait,-W",
)
# Options that sbatch also reads from a variable, SBATCH_ and the name; then other variables that stand for an option.
NAMED = (
    "account constraint container cpus-per-gpu distribution error export gpu-bind gpus gpus-per-node gpus-per-task "
    "gres job-name mem-per-cpu mem-per-gpu open-mode output partition qos signal"
)
VARIABLES = {
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_TIMELIMIT": "time",
    "SLURM_ARRAY_TASK_ID": "array",
    "SLURM_CPUS_PER_TASK": "cpus-per-task",
    "SLURM_JOB_ACCOUNT": "account",
    "SLURM_JOB_NUM_NODES": "nodes",
    "SLURM_JOB_PARTITION": "partition",
    "SLURM_JOB_QOS": "qos",
    "SLURM_NTASKS_PER_NODE": "ntasks-per-node",
}


def resolve(script: Path, words: list[str], in_job: bool) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Return each option's value and origin, and the words that are no option of sbatch.

    A value comes from the command line, else the environment, the script's headers. Raises argparse.ArgumentError.
    """
    options = {name: (value, f"slurm/{script.name}") for name, value in headers(script).items()}
    if in_job:
        options.pop("time", None)  # sbatch may have been given another
    variables = {f"SBATCH_{name.upper().replace('-', '_')}": name for name in NAMED.split()} | VARIABLES
    for variable, name in variables.items():  # outside the job, SLURM_* are of an interactive one you submit from
        if os.environ.get(variable) and (in_job or variable.startswith("SBATCH_")):
            options[name] = os.environ[variable], f"${variable}"
    given, others = parse_options(words)
    return options | {name: (value, "command line") for name, value in given.items()}, others


def headers(script: Path) -> dict[str, str]:
    """Return the options in the #SBATCH lines of a machine's script."""
    lines = (line[8:] for line in script.read_text().splitlines() if line.startswith("#SBATCH "))
    return parse_options([*itertools.chain(*(shlex.split(line, comments=True) for line in lines))])[0]


def parse_options(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return the values of options, and the words that are no option of sbatch."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names, how in zip(OPTIONS, ({}, {"nargs": "?"}, {"action": "store_true"}), strict=True):
        for name in names.split():
            parser.add_argument(*reversed(f"--{name}".split(",")), **how)
    found, others = parser.parse_known_args(words)
    return {name.replace("_", "-"): value for name, value in vars(found).items() if isinstance(value, str)}, others


def unknown_options(words: list[str]) -> Iterator[str]:
    """Refuse words that are no option of sbatch."""
    known = [name.split(",")[0] for names in OPTIONS for name in names.split()]
    for word in words:
        flag = word.split("=")[0]
        if not word.startswith("-"):
            yield f"{word} belongs to no option of sbatch. The recipe and its flags come after --."
        else:
            name = flag.lstrip("-")
            close = nearest(name, [each for each in known if each.startswith(name)] or known)
            yield f"sbatch has no option {flag} in full. The nearest is --{close}."


def gpus_of(gres: str) -> int:
    """Return the GPUs of a node in --gres, as in `gpu:a100:4,lscratch:10`; 0 where there are none."""
    parts = [part.split("(")[0].removeprefix("gres/").split(":") for part in gres.split(",")]
    counts = [words[-1] for words in parts if words[0] == "gpu"]
    return sum(int(count) if count.isdigit() else 1 for count in counts)

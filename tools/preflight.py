# SPDX-License-Identifier: Apache-2.0
"""Refuse what cannot work before it waits in a queue; print what a job would be, and where each value comes from.

    python tools/preflight.py MACHINE STRATEGY [sbatch options] -- RECIPE [flags]
    python tools/preflight.py h100 fsdp --nodes=4 --time=20:00:00 -A PROJECT@h100 -- recipes/vit.py \\
        --data '$DSDIR/imagenet' --model L --image_size 224 --patch_size 16 --global_batch_size 4096
    python tools/preflight.py a100 ddp --array=1-4 -A PROJECT@a100 -- recipes/resnet.py @sweep.txt

On a login node, without GPU or network. A value comes from the command line, else the environment, the #SBATCH headers
of slurm/MACHINE.slurm, accelerate_configs/MACHINE_STRATEGY.yaml, the recipe's flags, its defaults. `@FILE` stands for
a line of FILE for each task of an array. --memory estimates the bytes per GPU and the seconds of an all-reduce too;
--in_job, which slurm/launch.sh gives, checks the job that is running here. Exits with 1 and a line `error: <what>.
<remedy>` for each problem.

RECIPES_PREFLIGHT_SKIP=accounts,limits,caches,versions,quotas leaves those checks out: they rest on what users of Jean
Zay wrote down, and on this machine.
"""

import os
import sys
from pathlib import Path

from preflight_checks.command import read_command
from preflight_checks.environment import caches, quotas, versions
from preflight_checks.job import accounts, cores, launching, limits
from preflight_checks.memory import memory
from preflight_checks.recipe import read_recipe, read_tasks, tasks
from preflight_checks.report import report
from preflight_checks.topology import topology

ROOT = Path(__file__).resolve().parent.parent
CHECKS = (launching, cores, topology, read_recipe, read_tasks, tasks)
OPTIONAL = (accounts, limits, caches, versions, quotas)


def main(words: list[str]) -> int:
    """Print the job, or every problem that it has; return the exit status."""
    own = words[: words.index("--")] if "--" in words else words
    if {"-h", "--help"} & {*own}:
        print(__doc__)
        return 0
    plan, problems = read_command(words, ROOT)
    skipped = os.environ.get("RECIPES_PREFLIGHT_SKIP", "").split(",")
    optional = [check for check in OPTIONAL if check.__name__ not in skipped]
    for check in [] if problems else [*CHECKS, *optional]:
        problems += check(plan)
    if not problems and "--memory" in own and plan.tasks[0].run_config:
        problems += memory(plan)
    for problem in dict.fromkeys(problems):
        print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    if not problems:
        print("\n".join([*report(plan, plan.tasks[0]), *dict.fromkeys(plan.notes)]))
    return 1 if problems else 0


if __name__ == "__main__":
    # As in the job: slurm/launch.sh.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if os.environ.get("WORK"):
        os.environ.setdefault("HF_HOME", f"{os.environ['WORK']}/.cache/huggingface")
    sys.exit(main(sys.argv[1:]))

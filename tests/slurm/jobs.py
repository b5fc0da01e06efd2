# SPDX-License-Identifier: Apache-2.0
"""Jobs that train a copy of recipes/vit.py, whose pace a test sets while it runs."""

import os
import sys
import time
from pathlib import Path

from conftest import ROOT, SHORT, Result

from shared.run.interruption import WATCH_SECONDS
from slurm.cluster import ENDED, Cluster, Job, wait_for

FLAGS = [*SHORT, "--data", "digits", "--num_workers", "0", "--checkpointing_steps", "4"]


ODD = 'it\'s "a run" of  * two'  # a folder's name that every shell on the way would like to change


OPTIONS = ["--account=project@h100", "--time=30"]


# What an interactive job, or a step of it, leaves in its shell; and what sbatch is told of tasks.
LEFT = {
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_NTASKS": "5",
    "SLURM_CPU_BIND": "mask_cpu:0x1",
    "SLURM_GPU_BIND": "map_gpu:1",
}


LEFT |= {"SLURM_GPUS_PER_NODE": "1", "SLURM_JOB_END_TIME": "1000000000"}


TASKS = ["--ntasks-per-node=4", "--cpus-per-task=24"]


# Into a copy of vit.py: what a process sees, a pace that a test sets while it runs, and a failure.
HEAD = """
import os, pathlib, resource, time
seen = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURMD_NODENAME", "WANDB_MODE")]
print(" ".join(map(str, ["process", *seen])))  # in one write: torchrun puts its prefix before each
others = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "TORCH_HOME", "TRITON_CACHE_DIR")
others = [os.environ.get(name) for name in (*others, "TORCHINDUCTOR_CACHE_DIR", "TMPDIR", "MASTER_ADDR")]
print(" ".join(map(str, ["others", *others])))
more = ("SLURM_NTASKS", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "SLURM_CPU_BIND", "TORCH_EXTENSIONS_DIR")
more = [*map(os.environ.get, more), resource.getrlimit(resource.RLIMIT_NOFILE)]
print(" ".join(map(str, ["more", *more])))
if seen[0] == os.environ.get("FAIL_EARLY", "none"):
    import no_such_library


def pace(step):
    while (pathlib.Path(__file__).parent / f"stop-at-{step}").exists():
        if seen[0] == "0":
            (pathlib.Path(__file__).parent / f"stopped-at-{step}").touch()
        time.sleep(0.1)
    if (seen[0], str(step)) == (os.environ.get("FAIL_ON"), "2"):
        raise RuntimeError("planted failure")
"""


class Jobs:
    """Submits copies of recipes/vit.py that lie, with their runs, in a folder outside the project."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        self.recipe = folder / "my recipe.py"
        text = (ROOT / "recipes/vit.py").read_text()
        text = text.replace("\nfrom dataclasses import", f"{HEAD}\nfrom dataclasses import", 1)
        observed = "            run.observe(batch, loss)\n"
        assert text.count(observed) == 1
        self.recipe.write_text(text.replace(observed, f"{observed}            pace(run.step)\n"))

    def submit(
        self, name: str, *options: str, flags: tuple = (), strategy: str = "ddp", machine: str = "h100", **variables
    ) -> Job:
        words = ["sbatch", *OPTIONS, *options, str(ROOT / f"slurm/{machine}.slurm"), strategy, self.recipe.name]
        variables = {**self.variables, "RECIPES_PREFLIGHT": "off", **variables}
        return self.cluster.sbatch(*words, *self.flags(name), *flags, cwd=self.folder, **variables)

    # Fake nodes have no GPUs, no bf16 to compare losses in, and names that do not resolve.
    variables = {  # noqa: RUF012
        "RECIPES_ROOT": str(ROOT),
        "RECIPES_PROCESSES_PER_NODE": "1",
        "RECIPES_LAUNCH_FLAGS": "--mixed_precision no",
        "MASTER_ADDR": "127.0.0.1",
        "OMP_WAIT_POLICY": "passive",  # more processes than cores
    }

    def flags(self, name: str) -> list[str]:
        return [*FLAGS, "--output_dir", f"{ODD}/{name}"]

    def result(self, name: str) -> Result:
        return Result(None, self.folder / ODD / name)

    def stop_at(self, step: int) -> Path:
        """Training waits before this step's backward until the file is gone."""
        path = self.folder / f"stop-at-{step}"
        (self.folder / f"stopped-at-{step}").unlink(missing_ok=True)
        path.touch()
        return path

    def interrupt(self, job: Job, pause: Path, *options: str, task: str = "") -> None:
        """Signal the run in its pause, so that it ends with the step that waits."""
        job.cluster.output("scancel", *options, f"{job.number}{task}")
        wait_for((self.folder / f".recipes-{job.number}{task}/STOP").exists, "the shell that had the signal")
        time.sleep(WATCH_SECONDS)
        pause.unlink()

    def wait_for_step(self, step: int, job: Job) -> None:
        """Wait until stop_at(step) holds rank 0. Its line in metrics.jsonl comes before the run looks for reasons to
        end."""
        stopped = self.folder / f"stopped-at-{step}"
        wait_for(lambda: stopped.exists() or job.state in ENDED, f"step {step} of job {job.number}")
        assert stopped.exists(), job.log


def two_pythons(folder: Path) -> dict[str, str]:
    """Make an active environment, and a module that was loaded after it and whose python comes first in PATH; return
    their variables."""
    for name, line in (("venv", f'exec {sys.executable} "$@"'), ("module", "echo the python of the module; exit 3")):
        (folder / name / "bin").mkdir(parents=True)
        (folder / name / "bin/python").write_text(f"#!/bin/bash\n{line}\n")
        (folder / name / "bin/python").chmod(0o755)
    left = {"VIRTUAL_ENV": f"{folder}/venv", "LOADEDMODULES": "arch/h100:pytorch-gpu/py3/2.8.0"}
    return left | {
        "BASH_FUNC_module%%": '() { echo "module $*"; }',
        "PATH": f"{folder}/module/bin:{os.environ['PATH']}",
    }

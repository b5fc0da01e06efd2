# SPDX-License-Identifier: Apache-2.0
"""Measure what a job adds to a launch, from its start to the first step; and what the preflight takes by itself.

    python benchmarks/job_start.py [--rounds 3]

On a Slurm of this machine (tests/slurm/cluster.py; needs Debian's slurm-wlm and munge), with one CPU process on one
node, in turn: `accelerate launch` by hand; a job by slurm/submit.sh, which has run the preflight before; a job by
plain sbatch, which runs the preflight itself. Each has a folder of its own. A job starts with the first line of its
script; the step is done when metrics.jsonl has it. The seconds to the launcher are what the job's script adds, even on
a machine that is busy with other things. Prints a table and writes
benchmarks/results/job_start_<hardware>_<date>.json.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from report import ROOT, median_and_spread, table, write

sys.path += [str(ROOT), str(ROOT / "tests")]

from conftest import environment
from slurm.cluster import Cluster, Job, missing

from shared.lifetime import die_with_parent

FLAGS = ["--max_steps", "1", "--logging_steps", "1", "--num_workers", "0", "--report_to", "none"]
RECIPE = str(ROOT / "recipes/vit.py")
SCRIPT = ["--account=project@h100", "--time=30"]
JOB = {
    "RECIPES_ROOT": str(ROOT),
    "RECIPES_PROCESSES_PER_NODE": "1",
    "RECIPES_LAUNCH_FLAGS": "--mixed_precision no",
    "RECIPES_SETUP": "begin.sh",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each kind (%(default)s)")
    rounds = parser.parse_args().rounds
    if missing():
        print(f"error: no {', '.join(missing())}. Install slurm-wlm and munge.", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), environment())
        try:
            cluster.start()
            rows = measure(cluster, Path(folder) / "runs", rounds)
        finally:
            cluster.stop()
    print(table(rows))
    print(write("job_start", rows))
    return 0


def measure(cluster: Cluster, folder: Path, rounds: int) -> list[dict]:
    ways = {
        "accelerate launch": lambda run: local(cluster, run),
        "job after submit.sh": lambda run: job(cluster, run, RECIPES_PREFLIGHT="off"),
        "job by sbatch": lambda run: job(cluster, run),
        "preflight": lambda run: preflight(cluster, run),
        "preflight --memory": lambda run: preflight(cluster, run, "--memory"),
    }
    times = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            run = folder / f"{number} {name.replace('/', ' ')}"
            run.mkdir(parents=True)
            times[name].append(way(run))
            print(name, times[name][-1], file=sys.stderr, flush=True)
    base = [seconds for seconds, *_ in times["accelerate launch"]]
    return [row(name, values, base) for name, values in times.items()]


def row(name: str, values: list[tuple[float, float | None]], base: list[float]) -> dict:
    """Return a row of seconds; what a job adds is the difference within each round."""
    seconds, launchers, waits = zip(*values, strict=True)
    result = {"what": name, "seconds": median_and_spread(seconds)}
    if name.startswith("job"):
        added = [one - other for one, other in zip(seconds, base, strict=True)]
        result |= {"more than by hand, s": median_and_spread(added)}
        result |= {"to the launcher, s": median_and_spread(launchers), "in the queue, s": median_and_spread(waits)}
    return result


def local(cluster: Cluster, run: Path) -> tuple[float, None, None]:
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--config_file"]
    words += [str(ROOT / "accelerate_configs/local_ddp.yaml"), RECIPE, *FLAGS, "--output_dir", "run"]
    begin = time.time()
    options = {"cwd": run, "env": cluster.environment, "stdout": subprocess.DEVNULL, "preexec_fn": die_with_parent}
    process = subprocess.Popen(words, **options)
    seconds = first_step(run, lambda: process.poll()) - begin
    process.wait()
    return seconds, None, None


def job(cluster: Cluster, run: Path, **variables: str) -> tuple[float, float, float]:
    """Return the seconds from the job's start to the step, from its start to the launcher's, and from its
    submission to its start."""
    (run / "begin.sh").write_text("date +%s.%N >begin\nexport PATH=$PWD:$PATH\n")
    note = "[[ $2 == accelerate.commands.launch ]] && date +%s.%N >launcher"
    (run / "python").write_text(f'#!/bin/bash\n{note}\nexec {sys.executable} "$@"\n')
    (run / "python").chmod(0o755)
    words = ["sbatch", *SCRIPT, str(ROOT / "slurm/h100.slurm"), "ddp", RECIPE, *FLAGS, "--output_dir", "run"]
    job: Job = cluster.sbatch(*words, cwd=run, **JOB, **variables)
    submitted = time.time()
    end = first_step(run, lambda: job.state in ("FAILED", "CANCELLED"))
    begin, launcher = (float((run / name).read_text()) for name in ("begin", "launcher"))
    job.wait_completed()
    return end - begin, launcher - begin, begin - submitted


def first_step(run: Path, failed: Callable) -> float:
    """Return when metrics.jsonl had its first line."""
    metrics, looked = run / "run/metrics.jsonl", 0
    while not (metrics.exists() and metrics.stat().st_size):
        looked += 1
        assert looked % 100 or not failed(), f"{run} has failed"
        time.sleep(0.01)
    return time.time()


def preflight(cluster: Cluster, run: Path, *options: str) -> tuple[float, None, None]:
    words = [sys.executable, str(ROOT / "tools/preflight.py"), "h100", "ddp", "--account=project@h100", *options, "--"]
    begin = time.time()
    options = {"cwd": run, "env": cluster.environment, "stdout": subprocess.DEVNULL, "preexec_fn": die_with_parent}
    subprocess.run([*words, RECIPE, *FLAGS], check=True, **options)
    return time.time() - begin, None, None


if __name__ == "__main__":
    sys.exit(main())

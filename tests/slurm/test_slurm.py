# SPDX-License-Identifier: Apache-2.0
"""The scripts of slurm/ in jobs of a real Slurm, on fake nodes of one CPU process each (gloo)."""

import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SHORT, Result, train

from shared.interruption import WATCH_SECONDS
from slurm.cluster import ENDED, Cluster, Job, wait_for

FLAGS = [*SHORT, "--image_size", "16", "--num_workers", "0", "--checkpointing_steps", "4"]
ODD = 'it\'s "a run" of  * two'  # a folder's name that every shell on the way would like to change
OPTIONS = ["--account=project@h100", "--time=30"]

# Into a copy of vit.py: what a process sees, a pace that a test sets while it runs, and a failure.
HEAD = """
import os, pathlib, time
seen = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURMD_NODENAME", "WANDB_MODE")]
print("process", *seen)


def pace(step):
    while (pathlib.Path(__file__).parent / f"stop-at-{step}").exists():
        time.sleep(0.1)
    if (seen[0], str(step)) == (os.environ.get("FAIL_ON"), "2"):
        raise RuntimeError("planted failure")
"""


@pytest.fixture(scope="module")
def local(runs) -> Result:
    """What all of these jobs compute, on one process without Slurm."""
    return train(runs / "local", *FLAGS, recipe=ROOT / "recipes/vit.py")


class Jobs:
    """Submits copies of recipes/vit.py that lie, with their runs, in a folder that knows nothing of the project."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        self.recipe = folder / "my recipe.py"
        text = (ROOT / "recipes/vit.py").read_text()
        text = text.replace("\nfrom dataclasses import", f"{HEAD}\nfrom dataclasses import", 1)
        observed = "            run.observe(batch, loss)\n"
        assert text.count(observed) == 1
        self.recipe.write_text(text.replace(observed, f"{observed}            pace(run.step)\n"))

    def submit(self, name: str, *options: str, flags: tuple = (), strategy: str = "ddp", **variables: str) -> Job:
        words = ["sbatch", *OPTIONS, *options, str(ROOT / "slurm/h100.slurm"), strategy, self.recipe.name]
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
        path.touch()
        return path

    def interrupt(self, job: Job, pause: Path, *options: str) -> None:
        """By a signal that reaches the run in its pause, so that it ends with the step that waits."""
        job.cluster.output("scancel", *options, str(job.number))
        wait_for((self.folder / f".recipes-{job.number}/STOP").exists, "the shell that had the signal")
        time.sleep(WATCH_SECONDS)
        pause.unlink()

    def wait_for_step(self, name: str, step: int, job: Job) -> None:
        metrics = self.folder / ODD / name / "metrics.jsonl"

        def reached() -> bool:
            return metrics.exists() and len(metrics.read_text().splitlines()) >= step

        wait_for(lambda: reached() or job.state in ENDED, f"step {step} of job {job.number}")
        assert reached(), job.log


@pytest.fixture
def jobs(cluster, tmp_path) -> Jobs:
    return Jobs(cluster, tmp_path)


@pytest.fixture(scope="module")
def topologies(cluster, tmp_path_factory) -> SimpleNamespace:
    """The same training on one node of two processes, by plain sbatch; on two nodes with the port taken; on four
    nodes by submit.sh."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("topologies"))
    two = jobs.submit("2 nodes", "--hold", "--nodes=2")
    with socket.socket() as taken:
        taken.bind(("", port := 10000 + two.number % 20000))
        taken.listen()
        cluster.output("scontrol", "release", str(two.number))
        one = jobs.submit("1 nodes", RECIPES_PROCESSES_PER_NODE="2", RECIPES_PREFLIGHT="")
        submit = [ROOT / "slurm/submit.sh", "h100", "ddp", *OPTIONS, "--nodes=4", "--", jobs.recipe.name]
        four = cluster.sbatch(*submit, *jobs.flags("4 nodes"), cwd=jobs.folder, **jobs.variables)
        two.wait_completed()
    return SimpleNamespace(jobs=jobs, port=port, of={1: one.wait_completed(), 2: two, 4: four.wait_completed()})


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_same_losses_as_without_slurm(topologies, local, nodes):
    result = topologies.jobs.result(f"{nodes} nodes")
    assert result.summary["status"] == "finished"
    assert result.summary["world_size"] == result.summary["data_parallel_size"] == (2 if nodes == 1 else nodes)
    assert result.series("samples_digest") == local.series("samples_digest")
    assert result.series("loss") == pytest.approx(local.series("loss"), rel=1e-5)
    assert result.config["shared"] == str(ROOT / "shared/__init__.py")


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_ranks_follow_the_nodes(topologies, nodes):
    """Line by line of the log: task, node and local rank, then what the process said of itself."""
    log = topologies.of[nodes].log
    host = topologies.of[nodes].fields["BatchHost"]
    names = topologies.jobs.cluster.output("scontrol", "show", "hostnames", topologies.of[nodes].fields["NodeList"])
    processes = [(0, rank) for rank in range(2)] if nodes == 1 else [(node, 0) for node in range(nodes)]
    assert names.split()[0] == host
    for rank, (node, local_rank) in enumerate(processes):
        name = names.split()[node]
        line = f"{node}: [{name}:{local_rank}]:process {rank} {len(processes)} {local_rank} {name} offline"
        assert log.count(line) == 1, log


def test_taken_port_is_passed_over(topologies):
    launcher = topologies.jobs.result("2 nodes").config["launcher"]
    assert launcher["MASTER_PORT"] == str(topologies.port + 1)


def test_hsdp_shards_inside_a_node(jobs, local):
    jobs.submit("hsdp", "--nodes=2", strategy="hsdp", RECIPES_PROCESSES_PER_NODE="2").wait_completed()
    config = jobs.result("hsdp").config
    assert config["strategy"] == "hsdp"
    assert config["launcher"]["PARALLELISM_CONFIG_DP_REPLICATE_SIZE"] == "2"
    assert jobs.result("hsdp").series("loss") == pytest.approx(local.series("loss"), rel=1e-4)


def test_nothing_is_left_in_the_submit_folder(topologies):
    assert {path.name for path in topologies.jobs.folder.iterdir()} == {
        ODD,
        "my recipe.py",
        *(Path(job.fields["StdOut"]).name for job in topologies.of.values()),
    }


def test_finished_job_requeued_ends_at_once(topologies):
    job, result = topologies.of[1], topologies.jobs.result("1 nodes")
    before = result.lines
    job.cluster.output("scontrol", "requeue", str(job.number))
    job.wait_requeued(1)
    job.go_on()
    assert "already finished" in job.wait_completed().log
    assert result.lines == before


def test_time_limit_hit_twice(jobs, topologies):
    """Two requeued starts of a minute's limit, then one that may go on: bitwise an uninterrupted run's losses."""
    job = jobs.submit("2 nodes", "--nodes=2", "--time=1")
    job.wait_requeued(1)
    job.go_on()
    job.wait_requeued(2)
    assert jobs.result("2 nodes").summary["stop_reason"] == "deadline"
    assert jobs.result("2 nodes").summary["steps"] < 12
    job.go_on("TimeLimit=30")
    log = job.wait_completed().log
    assert log.count("interrupted (deadline); requeued for restart") == 2
    for name in ("loss", "samples_digest", "accuracy"):
        assert jobs.result("2 nodes").series(name) == topologies.jobs.result("2 nodes").series(name)


def test_signals(jobs, local):
    """To the steps, then to the batch shell alone."""
    pause = jobs.stop_at(5)
    job = jobs.submit("signals")
    jobs.wait_for_step("signals", 5, job)
    jobs.interrupt(job, pause, "--signal=USR1")
    job.wait_requeued(1)
    assert jobs.result("signals").summary["stop_reason"] == "signal"
    assert jobs.result("signals").summary["steps"] == 6
    pause = jobs.stop_at(8)
    job.go_on()
    jobs.wait_for_step("signals", 8, job)
    jobs.interrupt(job, pause, "--batch", "--signal=USR2")
    job.wait_requeued(2)
    assert jobs.result("signals").summary["steps"] == 9
    job.go_on()
    assert job.wait_completed().log.count("interrupted (signal); requeued for restart") == 2
    assert jobs.result("signals").series("loss") == pytest.approx(local.series("loss"), rel=1e-5)


def test_cancelled_job_saves_and_its_chain_goes_on(jobs, local):
    """Where requeue is not allowed: jobs of one name, each after the other."""
    chain = ["--no-requeue", "--job-name=chain", "--dependency=singleton"]
    pause = jobs.stop_at(5)
    first, second, third = (jobs.submit("chain", *chain) for _ in range(3))
    jobs.wait_for_step("chain", 5, first)
    later = jobs.stop_at(9)
    jobs.interrupt(first, pause, "--signal=USR1")
    assert "the next job of the chain goes on" in first.wait_completed().log
    jobs.wait_for_step("chain", 9, second)
    second.cluster.output("scancel", str(second.number))
    time.sleep(1)  # SIGTERM goes by two shells and a launcher
    later.unlink()
    second.wait_until("CANCELLED")
    wait_for(lambda: "ended by Slurm; the same command goes on" in second.log, "the end of a cancelled job")
    assert "interrupted (signal) at step 10" in second.log
    assert "resumed at step 10" in third.wait_completed().log
    assert jobs.result("chain").series("loss") == pytest.approx(local.series("loss"), rel=1e-5)


def test_lost_node(jobs, local):
    """All processes of one of three nodes are killed: the others name the peer, and the run goes on elsewhere."""
    pause = jobs.stop_at(6)
    job = jobs.submit("lost", "--nodes=3", flags=("--global_batch_size", "63"))
    jobs.wait_for_step("lost", 6, job)
    nodes = job.cluster.output("scontrol", "show", "hostnames", job.fields["NodeList"]).split()
    job.cluster.kill_node(nodes[1])
    pause.unlink()
    job.wait_requeued(1)
    assert re.search(r"\[rank[02]\].* error \[\S+\]:\d+: Connection (reset|closed) by peer", job.log)
    job.go_on()
    log = job.wait_completed().log
    job.cluster.start_node(nodes[1])
    assert "resumed at step 4" in log
    result = jobs.result("lost")
    assert result.summary["status"] == "finished"
    assert result.series("step")[:12] == list(range(1, 13))


def test_crash_is_not_repeated(jobs):
    """The traceback of the rank that failed first ends the log."""
    job = jobs.submit("crash", "--nodes=2", RECIPES_PROCESSES_PER_NODE="2", FAIL_ON="3")
    job.wait_until("FAILED")
    *before, last = job.log.rstrip().splitlines()
    assert last == "RuntimeError: planted failure"
    assert [line for line in before if line.startswith("The first process")] == [
        "The first process that failed is rank 3:"
    ]
    assert jobs.result("crash").summary["status"] == "running"
    assert job.fields["Restarts"] == "0"
    assert job.fields["ExitCode"] != "0:0"


def test_sweep(jobs):
    """One line of a file for each task of an array, with quotes."""
    lines = [f"--seed {seed} --max_steps 1 --output_dir '{ODD.replace(chr(39), '')}/{seed}'" for seed in range(1, 5)]
    (jobs.folder / "my sweep.txt").write_text("\n".join(lines) + "\n")
    job = jobs.submit("sweep", "--array=1-4", flags=("@my sweep.txt",))
    wait_for(lambda: not job.cluster.output("squeue", "-h", "-j", str(job.number)), "the array")
    for seed in range(1, 5):
        result = Result(None, jobs.folder / ODD.replace("'", "") / str(seed))
        assert result.summary["status"] == "finished"
        assert result.config["identity"]["seed"] == seed
    assert not (jobs.folder / ODD).exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["h100", "ddp"], "give slurm/submit.sh MACHINE STRATEGY [sbatch options] -- RECIPE [flags]"),
        (["h100", "ddp", "--nodes=2", "--"], "no recipe follows --"),
        (["h200", "ddp", "--", "recipes/vit.py"], "no machine h200. There are: a100 h100 v100 v100x8."),
    ],
)
def test_submit_explains_itself(words, error):
    process = subprocess.run([ROOT / "slurm/submit.sh", *words], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert error in process.stderr


def test_dry_run_prints_the_line_that_sbatch_gets(cluster, jobs):
    words = [ROOT / "slurm/submit.sh", "h100", "ddp", *OPTIONS, "--dry_run", "--", "my recipe.py", *jobs.flags("dry")]
    process = cluster.command(*map(str, words), cwd=jobs.folder, env={**cluster.environment, **jobs.variables})
    assert process.returncode == 0, process.stderr
    printed = subprocess.run(["bash", "-c", f"printf '%s\n' {process.stdout.splitlines()[-1]}"], capture_output=True)
    script = ROOT / "slurm/h100.slurm"
    expected = ["sbatch", "--job-name=my_recipe-ddp", *OPTIONS, script, "ddp", "my recipe.py", *jobs.flags("dry")]
    assert printed.stdout.decode().splitlines() == [*map(str, expected)]
    assert "Submitted" not in process.stdout


def test_slurm_refuses_what_idris_refuses(cluster, jobs):
    """The fake cluster does its part: hours of one GPU are not spent on another, and not without a project."""
    script = str(ROOT / "slurm/a100.slurm")
    for options in (["--account=project@h100"], []):
        process = cluster.command("sbatch", *options, script, "ddp", "x.py", cwd=jobs.folder)
        assert process.returncode == 1
        assert "give --" in process.stderr


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["ddp"], "give STRATEGY RECIPE [flags] after h100.slurm."),
        (["ddq", "my recipe.py"], "no strategy ddq for h100"),
        (["ddp", "your recipe.py"], "no recipe your recipe.py in"),
        (["ddp", "my recipe.py", "@sweep.txt"], "@sweep.txt needs --array=1-N"),
    ],
)
def test_job_explains_itself(jobs, words, error):
    job = jobs.cluster.sbatch(
        "sbatch", *OPTIONS, str(ROOT / "slurm/h100.slurm"), *words, cwd=jobs.folder, **jobs.variables
    )
    job.wait_until("FAILED")
    assert job.log.startswith("error: ")
    assert error in job.log
    assert job.log.count("\n") == 1


def test_submitted_from_elsewhere(jobs):
    job = jobs.cluster.sbatch("sbatch", *OPTIONS, str(ROOT / "slurm/h100.slurm"), "ddp", "x.py", cwd=jobs.folder)
    job.wait_until("FAILED")
    assert job.log == (
        f"error: no slurm/launch.sh in {jobs.folder}. Use slurm/submit.sh, or: export RECIPES_ROOT=FOLDER_OF_slurm\n"
    )


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck on this machine: apt-get install shellcheck")
    scripts = [str(path) for path in sorted((ROOT / "slurm").iterdir())]
    process = subprocess.run(["shellcheck", "-x", "-P", "slurm", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout

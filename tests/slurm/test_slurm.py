# SPDX-License-Identifier: Apache-2.0
"""The scripts of slurm/ in jobs of a real Slurm, on fake nodes of one CPU process each (gloo)."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, SHORT, Result, add_made_up_machine, blocks, environment, train

from shared.run.interruption import WATCH_SECONDS
from slurm.cluster import ENDED, NODES, Cluster, Job, wait_for

MACHINES = tomllib.loads((ROOT / "slurm/machines.toml").read_text())
FLAGS = [*SHORT, "--data", "digits", "--num_workers", "0", "--checkpointing_steps", "4"]
ODD = 'it\'s "a run" of  * two'  # a folder's name that every shell on the way would like to change
OPTIONS = ["--account=project@h100", "--time=30"]

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
        """By a signal that reaches the run in its pause, so that it ends with the step that waits."""
        job.cluster.output("scancel", *options, f"{job.number}{task}")
        wait_for((self.folder / f".recipes-{job.number}{task}/STOP").exists, "the shell that had the signal")
        time.sleep(WATCH_SECONDS)
        pause.unlink()

    def wait_for_step(self, step: int, job: Job) -> None:
        """Until rank 0 waits where stop_at(step) stops it: a line of metrics.jsonl comes before the run has looked for
        reasons to end."""
        stopped = self.folder / f"stopped-at-{step}"
        wait_for(lambda: stopped.exists() or job.state in ENDED, f"step {step} of job {job.number}")
        assert stopped.exists(), job.log


@pytest.fixture
def jobs(cluster, tmp_path) -> Jobs:
    return Jobs(cluster, tmp_path)


@pytest.fixture(scope="module")
def limited(cluster, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A run that waits at step 3 for the real limit of a minute, on a node of its own, while other tests run."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("limited"))
    pause = jobs.stop_at(3)
    end = str(int(time.time()) + 7200)  # so that the run itself sees no deadline
    options = ["--account=project@v100", "--time=1", "--signal=B:CONT@1"]  # no other signal before
    job = jobs.submit("limited", *options, machine="v100", SLURM_JOB_END_TIME=end)

    def end_the_pause() -> str:
        """Within KillWait, whichever test runs then; the run's status when it waits for its next start."""
        log = jobs.folder / f"recipes-{job.number}.log"
        wait_for(lambda: log.exists() and "DUE TO TIME LIMIT" in log.read_text(), "the limit")
        time.sleep(1)
        pause.unlink()
        job.wait_requeued(1)
        job.cluster.output("scancel", str(job.number))
        return jobs.result("limited").summary["status"]

    with ThreadPoolExecutor(1) as pool:
        yield SimpleNamespace(job=job, status=pool.submit(end_the_pause))


# What an interactive job, or a step of it, leaves in its shell; and what sbatch was told of tasks.
LEFT = {
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_NTASKS": "5",
    "SLURM_CPU_BIND": "mask_cpu:0x1",
    "SLURM_GPU_BIND": "map_gpu:1",
}
LEFT |= {"SLURM_GPUS_PER_NODE": "1", "SLURM_JOB_END_TIME": "1000000000"}
TASKS = ["--ntasks-per-node=4", "--cpus-per-task=24"]


def two_pythons(folder: Path) -> dict[str, str]:
    """An environment that is active, and a module that was loaded after it, whose python stands before its own."""
    for name, line in (("venv", f'exec {sys.executable} "$@"'), ("module", "echo the python of the module; exit 3")):
        (folder / name / "bin").mkdir(parents=True)
        (folder / name / "bin/python").write_text(f"#!/bin/bash\n{line}\n")
        (folder / name / "bin/python").chmod(0o755)
    left = {"VIRTUAL_ENV": f"{folder}/venv", "LOADEDMODULES": "arch/h100:pytorch-gpu/py3/2.8.0"}
    return left | {
        "BASH_FUNC_module%%": '() { echo "module $*"; }',
        "PATH": f"{folder}/module/bin:{os.environ['PATH']}",
    }


@pytest.fixture(scope="module")
def topologies(cluster, tmp_path_factory, limited) -> SimpleNamespace:
    """The same training on one node of two processes, by plain sbatch; on two nodes with the port taken; on four
    nodes by submit.sh."""
    jobs, pythons = Jobs(cluster, tmp_path_factory.mktemp("topologies")), tmp_path_factory.mktemp("pythons")
    two = jobs.submit("2 nodes", "--hold", "--nodes=2", *TASKS, **LEFT)
    with socket.socket() as taken:
        taken.bind(("", port := 10000 + two.number % 20000))
        taken.listen()
        cluster.output("scontrol", "release", str(two.number))
        one = jobs.submit("1 nodes", RECIPES_PROCESSES_PER_NODE="2", RECIPES_PREFLIGHT="", **two_pythons(pythons))
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


def test_one_launcher_a_node_whatever_the_shell_has_left(topologies):
    """With all GPUs of the node and a gloo interface that leads to the first node; the soft limit is the hard one."""
    lines = re.findall(r":more (\S+) (\S+) (\S+) (.*) \S+ \((\d+), (\d+)\)", topologies.of[2].log)
    assert [line[:3] for line in lines] == [("2", "0,1,2,3", "lo")] * 2, lines
    assert not any("0x1" in bound for *_, bound, soft, hard in lines)
    assert all(soft == hard for *_, soft, hard in lines)


def test_the_active_environment_runs_whatever_module_is_loaded(topologies):
    log = topologies.of[1].log
    assert re.search(r"^python: \S+/venv/bin/python$", log, re.M)
    assert "module " not in log
    assert "the python of the module" not in log


def test_taken_port_is_passed_over(topologies):
    launcher = topologies.jobs.result("2 nodes").config["launcher"]
    assert launcher["MASTER_PORT"] == str(topologies.port + 101)


def test_hsdp_shards_inside_a_node(jobs, local):
    own = {"HF_HUB_OFFLINE": "0", "WANDB_MODE": "disabled", "TORCH_EXTENSIONS_DIR": "/my ops"}
    job = jobs.submit("hsdp", "--nodes=2", strategy="hsdp", RECIPES_PROCESSES_PER_NODE="2", **own).wait_completed()
    # What the user has set stays.
    assert job.log.count(" disabled\n") == job.log.count(":others 0 0 ") == job.log.count(" /my ops (") == 4
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
    jobs.wait_for_step(5, job)
    jobs.interrupt(job, pause, "--signal=USR1")
    job.wait_requeued(1)
    assert jobs.result("signals").summary["stop_reason"] == "signal"
    assert jobs.result("signals").summary["steps"] == 6
    pause = jobs.stop_at(8)
    job.go_on()
    jobs.wait_for_step(8, job)
    jobs.interrupt(job, pause, "--batch", "--signal=USR2")
    job.wait_requeued(2)
    assert jobs.result("signals").summary["steps"] == 9
    jobs.recipe.write_text("raise SystemExit('edited while the job waits')\n")
    job.go_on()
    assert job.wait_completed().log.count("interrupted (signal); requeued for restart") == 2
    assert "edited since the first start of this job, whose sources are run again" in job.log
    assert jobs.result("signals").series("loss") == pytest.approx(local.series("loss"), rel=1e-5)


def test_cancelled_job_saves_and_its_chain_goes_on(jobs, local):
    """Where requeue is not allowed: jobs of one name, each after the other."""
    chain = ["--no-requeue", "--job-name=chain", "--dependency=singleton"]
    pause = jobs.stop_at(5)
    first, second, third = (jobs.submit("chain", *chain) for _ in range(3))
    jobs.wait_for_step(5, first)
    later = jobs.stop_at(9)
    jobs.interrupt(first, pause, "--signal=USR1")
    assert "the next job of the chain goes on" in first.wait_completed().log
    jobs.wait_for_step(9, second)
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
    jobs.wait_for_step(6, job)
    nodes = job.cluster.output("scontrol", "show", "hostnames", job.fields["NodeList"]).split()
    job.cluster.kill_node(nodes[1])
    try:
        pause.unlink()
        job.wait_requeued(1)
        # gloo names the peer in one of two ways, by chance.
        lost = r"\S+ \[\S+\]:\d+: Connection reset by peer|Connection closed by peer \[\S+\]:\d+"
        assert re.search(rf"\[rank[02]\].* ({lost})", job.log), job.log
        job.go_on()
        log = job.wait_completed().log
    finally:
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
    wait_for(job.gone, "the array")
    for seed in range(1, 5):
        result = Result(None, jobs.folder / ODD.replace("'", "") / str(seed))
        assert result.summary["status"] == "finished"
        assert result.config["identity"]["seed"] == seed
    assert not (jobs.folder / ODD).exists()


def test_a_process_that_is_killed_is_named(jobs):
    """And not its peer, which has left the only traceback; there is no restart."""
    pause = jobs.stop_at(3)
    job = jobs.submit("killed", "--nodes=2")
    jobs.wait_for_step(3, job)
    for pid in job.cluster.processes("RANK=1", f"SLURM_JOB_ID={job.number}"):
        os.kill(pid, signal.SIGKILL)
    pause.unlink()
    job.wait_until("FAILED")
    log = job.log.rstrip().splitlines()
    assert log[-1] == "error: rank 1 was killed by SIGKILL, by the system where memory was short."
    assert "The first process that failed is rank 1:" in log
    assert job.fields["Restarts"] == "0"


def test_ends_without_a_restart(jobs, local):
    """No restart is left; a crash before the run opens, beside the summary of that interruption; a STOP file."""
    pause = jobs.stop_at(3)
    job = jobs.submit("ends", RECIPES_MAX_RESTARTS="0")
    jobs.wait_for_step(3, job)
    jobs.interrupt(job, pause, "--signal=USR1")
    job.wait_until("FAILED")
    assert job.log.rstrip().endswith(
        "error: interrupted (signal) after 0 restarts, RECIPES_MAX_RESTARTS. Submit it again: it goes on."
    )
    job = jobs.submit("ends", FAIL_EARLY="0")
    job.wait_until("FAILED")
    assert jobs.result("ends").summary["status"] == "interrupted"
    log = job.log.rstrip().splitlines()
    assert "The first process that failed is rank 0:" in log
    assert log[-1] == "ModuleNotFoundError: No module named 'no_such_library'"
    pause = jobs.stop_at(5)
    last = jobs.submit("ends")
    jobs.wait_for_step(5, last)
    (jobs.folder / ODD / "ends/STOP").touch()
    time.sleep(WATCH_SECONDS)
    pause.unlink()
    assert "stopped by a STOP file; the same command goes on" in last.wait_completed().log
    assert jobs.result("ends").summary["stop_reason"] == "stop_file"
    assert [each.fields["Restarts"] for each in (job, last)] == ["0", "0"]
    assert jobs.result("ends").series("loss") == pytest.approx(local.series("loss")[:6], rel=1e-5)


def test_chain_by_an_array(jobs, local):
    """As docs/jean_zay.md gives it: tasks one after the other, of one run."""
    pause = jobs.stop_at(5)
    job = jobs.submit("array", "--no-requeue", "--array=1-2%1")
    jobs.wait_for_step(5, job)
    jobs.interrupt(job, pause, "--signal=USR1", task="_1")
    wait_for(job.gone, "the array")
    logs = "".join(path.read_text() for path in sorted(jobs.folder.glob("recipes-*.log")))
    assert logs.count("the next job of the chain goes on") == 1
    assert "resumed at step 6" in logs
    assert jobs.result("array").summary["status"] == "finished"
    assert jobs.result("array").series("loss") == pytest.approx(local.series("loss"), rel=1e-5)


def test_plain_sbatch_with_no_variable_but_a_setup(cluster, tmp_path):
    """One GPU of a node; Slurm's signal comes before launch.sh has a trap, in a job too short to heed it; the
    preflight in the job counts the GPUs that sbatch was given, and refuses."""
    jobs = Jobs(cluster, tmp_path)
    for name in ("slurm", "tools", "shared", "accelerate_configs", "recipes", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    places = {name: tmp_path / name.lower() for name in ("WORK", "SCRATCH", "JOBSCRATCH")}
    for place in places.values():
        place.mkdir()
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text(f'#!/bin/bash\ntouch used\nexec {sys.executable} "$@"\n')
    (tmp_path / "venv/bin/python").chmod(0o755)
    (tmp_path / "setup.sh").write_text('kill -USR1 $$\nexport PATH=$PWD/venv/bin:$PATH\necho "unpacked $UNSET"\n')
    words = [
        "sbatch",
        "--account=project@h100",
        "--gres=gpu:1",
        "--time=10",
        "slurm/h100.slurm",
        "ddp",
        "my recipe.py",
    ]
    places |= {"RECIPES_SETUP": "setup.sh"}
    batch = ["--global_batch_size", "63", "--max_steps", "2"]
    job = cluster.sbatch(*words, *jobs.flags("plain"), *batch, cwd=tmp_path, **{k: str(v) for k, v in places.items()})
    log = job.wait_completed().log
    assert re.match(r"unpacked \n.*^machine  ", log, re.S | re.M)
    assert (tmp_path / "used").exists()
    assert re.search(r"^GPUs a node +1 +\$SLURM_GPUS_ON_NODE$", log, re.M)
    assert "process 0 1 0 r1i0n0 offline" in log
    caches = [tmp_path / name for name in ("work/.cache/huggingface", "work/.cache/torch")]
    caches += [tmp_path / name for name in ("scratch/.cache/triton", "scratch/.cache/inductor", "jobscratch")]
    assert " ".join(["others 1 1", *map(str, caches), "127.0.0.1"]) in log
    assert re.search(
        rf":more .* {re.escape(str(tmp_path))}/scratch/.cache/torch_extensions/h100-torch\d\S+-\w{{8}} ", log
    )
    assert jobs.result("plain").summary["status"] == "finished"
    assert jobs.result("plain").config["identity"]["mixed_precision"] == "bf16"
    assert list((tmp_path / "jobscratch").iterdir()) == []
    refused = cluster.sbatch(*words, *jobs.flags("no"), "--lr", "1", cwd=tmp_path, RECIPES_SETUP="setup.sh")
    refused.wait_until("FAILED")
    assert refused.log.splitlines()[-1].startswith("error: unknown flag --lr.")
    assert not jobs.result("no").folder.exists()
    # What the recipe itself would not refuse: rank 0 waits for the preflight, which takes as long as it does.
    cached = {"RECIPES_SETUP": "setup.sh", "WORK": places["WORK"], "HF_HOME": str(Path.home() / "hugging")}
    refused = cluster.sbatch(*words, *jobs.flags("no"), *batch, cwd=tmp_path, **{k: str(v) for k, v in cached.items()})
    refused.wait_until("FAILED")
    assert re.match(r"error: HF_HOME.* lie in \$HOME", refused.log.splitlines()[-1]), refused.log
    assert "error: the preflight refuses this job." in refused.log
    assert not jobs.result("no").folder.exists()


def test_requeued_at_the_real_limit(limited):
    """Slurm's SIGTERM: the run saves within KillWait, and the job is requeued."""
    assert limited.status.result() == "interrupted"
    assert "interrupted (the time limit); requeued for restart 1" in limited.job.log


@pytest.mark.parametrize(
    ("machine", "nodes", "partition"),
    [("v100", 1, "gpu_p13"), ("v100x8", 1, "gpu_p2"), ("a100", 1, "gpu_p5"), ("h100", 4, "gpu_p6")],
)
def test_headers_fit_the_nodes(cluster, jobs, machine, nodes, partition):
    """Each script as it is asks for whole nodes of its machine, and for no other ones."""
    account, script = MACHINES[machine]["account"], ROOT / f"slurm/{machine}.slurm"
    command = ["sbatch", "--test-only", f"--account=project@{account}", f"--nodes={nodes}", str(script), "ddp", "x.py"]
    process = cluster.command(*command, cwd=jobs.folder)
    assert process.returncode == 0, process.stderr
    (own,) = {own for own in NODES.values() if own[3] == partition}
    assert own[:2] == (MACHINES[machine]["gpus"], MACHINES[machine]["gpus"] * MACHINES[machine]["cores"])
    assert f"using {nodes * own[1]} processors on nodes " in process.stderr
    assert process.stderr.rstrip().endswith(f" in partition {partition}")


def test_a_machine_is_added_as_the_page_says(cluster, tmp_path):
    """In a copy of the project: the commands of docs/other_clusters.md look up, write and submit; the job loads the
    entry's modules and finishes."""
    for name in ("slurm", "tools", "shared", "recipes", "accelerate_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    add_made_up_machine(tmp_path)
    look_up, _, submit = blocks(ROOT / "docs/other_clusters.md")
    assert "gpu gpu:2 32 4000 2-00:00:00 a30" in cluster.output("bash", "-euc", look_up)
    modules = {"BASH_FUNC_module%%": '() { echo "module $*"; }', "VIRTUAL_ENV": ""}
    job = cluster.sbatch("bash", "-euc", submit, cwd=tmp_path, **Jobs.variables, **modules)
    log = job.wait_completed().log
    assert log.startswith("module purge\nmodule load python/3.12 cuda/12.8\n")
    assert job.fields["Partition"] == "gpu"
    (summary,) = tmp_path.glob("runs/resnet-*/summary.json")
    assert json.loads(summary.read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["h100", "ddp"], "give slurm/submit.sh MACHINE STRATEGY [sbatch options] -- RECIPE [flags]"),
        (["h100", "ddp", "--nodes=2", "--"], "no recipe follows --"),
        (["h200", "ddp", "--", "recipes/vit.py"], "no machine h200. There are: a100 h100 "),
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


def test_submit_stops_where_the_preflight_refuses(jobs):
    """With --memory for the preflight alone."""
    words = [ROOT / "slurm/submit.sh", "h100", "ddp", *OPTIONS, "--memory", "--", "my recipe.py"]
    environment = {**jobs.cluster.environment, **jobs.variables}
    for flags, status in (["--global_batch_size", "65"], 0), (["--lr", "1"], 1):
        command = [*map(str, words[:-2]), "--dry_run" if status == 0 else "--quiet", "--", words[-1], *flags]
        process = jobs.cluster.command(*command, cwd=jobs.folder, env=environment)
        assert process.returncode == status, process.stderr
        assert "Submitted" not in process.stdout
        assert ("sbatch " in process.stdout) == (status == 0)
        assert ("Memory of a GPU, estimated" in process.stdout) == (status == 0)
        assert "--memory" not in process.stdout
    assert process.stderr.startswith("error: unknown flag --lr.")
    assert jobs.cluster.output("squeue", "-h", "--name=my_recipe-ddp") == ""


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


# Without Slurm: what the scripts decide, by programs that answer as Slurm's would


@pytest.fixture
def alone(tmp_path) -> Callable[..., str]:
    """Runs slurm/h100.slurm in this shell's place; what it printed, in a log that may have lines before."""
    answers = {
        "srun": "exit 1",
        "squeue": "exit 1",
        "scontrol": 'case $2 in hostnames) echo a; echo b ;; job) echo " Requeue=1 " ;; *) echo "$@" ;; esac',
    }
    (tmp_path / "bin").mkdir()
    for name, answer in answers.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{answer}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_JOB_NODELIST": "a,b", "SLURM_GPUS_ON_NODE": "4", "RECIPES_ROOT": str(ROOT)}
    programs = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(*words: str, before: str = "", **variables: str) -> str:
        log = tmp_path / "log"
        log.write_text(before)
        base = {name: value for name, value in environment().items() if not name.startswith(("VIRTUAL", "CONDA"))}
        with log.open("a") as output:
            command = ["bash", "-c", MODULE + 'source "$0" "$@"', str(ROOT / "slurm/h100.slurm"), *words]
            variables = {**base, **slurm, "PATH": programs, "RECIPES_PREFLIGHT": "off", **variables}
            subprocess.run(command, stdout=output, stderr=output, env=variables, cwd=tmp_path, timeout=300)
        return log.read_text()

    return run


MODULE = 'module() { if [[ $1 == show ]]; then echo "${SHOWN:-}" >&2; else echo "module $*"; fi; }; '


def test_a_lost_node_requeues_a_job_twice_and_no_more(alone):
    line = "interrupted (a node does not answer); requeued for restart 1\n"
    words = ["ddp", str(ROOT / "recipes/vit.py")]
    for times, requeued in ((0, True), (1, True), (2, False)):
        log = alone(*words, before=line * times, RECIPES_MODULES="")
        assert log.count("requeue 7") == requeued, log
        assert ("no process has left a traceback" in log) != requeued


def test_a_requeued_start_runs_the_sources_of_the_first(alone, tmp_path):
    recipe, kept = tmp_path / "my recipe.py", tmp_path / ".recipes-7-source"
    (tmp_path / "bin/srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit 1\n')
    recipe.write_text("first = 1\n")
    assert "requeue 7" in alone("ddp", recipe.name)
    assert (kept / "my recipe.py").read_text() == "first = 1\n"
    assert (kept / "shared/optim.py").read_text() == (ROOT / "shared/optim.py").read_text()
    log = alone("ddp", recipe.name, SLURM_RESTART_COUNT="1")
    assert "\nmy recipe.py\n" in log
    assert "edited" not in log
    recipe.write_text("first = 2\n")
    log = alone("ddp", recipe.name, SLURM_RESTART_COUNT="1")
    assert f"whose sources are run again: {kept}\n" in log
    assert f"\n{kept}/my recipe.py\n" in log
    assert f"\n{kept}/topology.yaml\n" in log
    # A start that ends for good leaves nothing.
    recipe.write_text("first = 3\n")
    alone("ddp", recipe.name, SLURM_JOB_NUM_NODES="1")
    assert not kept.exists()


def test_a_signal_before_the_trap_is_heeded_in_a_long_job(alone, tmp_path):
    (tmp_path / "bin/srun").write_text('#!/bin/bash\nls "$RECIPES_JOB_FOLDER"\nexit 1\n')
    (tmp_path / "setup.sh").write_text("kill -USR1 $$\n")
    for seconds in (600, 7200):
        end = str(int(time.time()) + seconds)
        log = alone("ddp", str(ROOT / "recipes/vit.py"), RECIPES_SETUP="setup.sh", SLURM_JOB_END_TIME=end)
        assert ("STOP" in log.split()) == (seconds == 7200)
        assert "started" in log.split()


def test_an_active_environment_wins_over_the_module(alone, tmp_path):
    loaded = f"module purge\nmodule load {MACHINES['h100']['modules']}\n"
    assert alone().startswith(loaded)
    own = tmp_path / "own/bin/python"
    own.parent.mkdir(parents=True)
    own.symlink_to("/bin/false")
    assert alone(VIRTUAL_ENV=str(tmp_path / "own")).startswith(loaded)  # without accelerate: conda's base, say
    own.unlink()
    own.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    own.chmod(0o755)
    words = ["ddp", str(ROOT / "recipes/vit.py")]
    modules = {"LOADEDMODULES": "a/1:pytorch-gpu/py3/2.8.0"}  # of the login shell, perhaps for other GPUs
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        for more in ({}, modules):
            assert alone(*words, **{name: str(tmp_path / "own")}, **more).startswith(f"python: {own}\n")
    # A module may be such an environment itself.
    shown = {"CONDA_PREFIX": str(tmp_path / "own"), "SHOWN": f"prepend-path PATH {own.parent}"}
    assert alone(**shown, **modules).startswith(loaded)
    assert "module" not in alone(**shown, **modules, VIRTUAL_ENV=str(tmp_path / "own"))
    assert "module" not in alone(RECIPES_MODULES="")
    assert alone(RECIPES_MODULES="one two").startswith("module purge\nmodule load one two\n")


def test_gloo_takes_the_interface_on_the_way_to_the_first_node(alone, tmp_path):
    """This machine's own addresses stand for other nodes'; a name that leads nowhere, or no further than this node, as
    the first node's own may, is passed over."""
    (tmp_path / "bin/srun").write_text(
        "#!/bin/bash\nfor address in 127.0.0.1 $(hostname -I); do echo way $address $(interface_to $address); done\n"
        'echo "after $(interface_to no.such.host.invalid 127.0.0.1) <$(interface_to localhost)>"\nexit 1\n'
    )
    log = alone("ddp", str(ROOT / "recipes/vit.py"), RECIPES_MODULES="")
    ways = dict(re.findall(r"^way ([\d.]+) (\S*)$", log, re.M))
    assert ways.pop("127.0.0.1") == "lo"
    assert {*ways.values()} <= {*os.listdir("/sys/class/net")} - {"lo"}, log
    assert "after lo <>\n" in log


def test_words_are_split_as_the_preflight_splits_them(alone, tmp_path):
    """A backslash in quotes, which xargs keeps."""
    (tmp_path / "sweep.txt").write_text('--model "a\\"b" \'c d\'\n--model "a\n')
    words = ["ddp", str(ROOT / "recipes/vit.py"), "@sweep.txt"]
    (tmp_path / "bin/srun").write_text("#!/bin/bash\nprintf '<%s>' \"${@: -3}\"\nexit 1\n")
    assert '<--model><a"b><c d>' in alone(*words, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1", RECIPES_MODULES="")
    assert 'error: cannot split: --model "a' in alone(
        *words, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2", RECIPES_MODULES=""
    )


def test_submit_without_python_says_so(tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    process = subprocess.run(
        ["/bin/bash", ROOT / "slurm/submit.sh", "h100", "ddp", "--", "x.py"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: no python to check the job with.")


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck on this machine: apt-get install shellcheck")
    scripts = [str(path) for path in sorted((ROOT / "slurm").glob("*.s*"))]
    process = subprocess.run(["shellcheck", "-x", "-P", "slurm", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, Result, add_made_up_machine, blocks, train

from shared.run.interruption import WATCH_SECONDS
from slurm.cluster import NODES, wait_for
from slurm.jobs import FLAGS, LEFT, ODD, OPTIONS, TASKS, Jobs, two_pythons

MACHINES = tomllib.loads((ROOT / "slurm/machines.toml").read_text())


@pytest.fixture(scope="module")
def local(server, runs) -> Result:
    """Train what all of these jobs train, by one process without Slurm."""
    return train(runs / "local", *FLAGS, recipe=ROOT / "recipes/vit.py", server=server)


@pytest.fixture
def jobs(cluster, tmp_path) -> Jobs:
    return Jobs(cluster, tmp_path)


@pytest.fixture(scope="module")
def limited(cluster, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Start a run that waits at step 3 for the real limit of a minute, on a node of its own, while other tests run."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("limited"))
    pause = jobs.stop_at(3)
    end = str(int(time.time()) + 7200)  # so that the run itself sees no deadline
    options = ["--account=project@v100", "--time=1", "--signal=B:CONT@1"]  # no other signal before
    job = jobs.submit("limited", *options, machine="v100", SLURM_JOB_END_TIME=end)

    def end_the_pause() -> str:
        """End the pause within KillWait, whichever test runs then; return the run's status when it is requeued."""
        log = jobs.folder / f"recipes-{job.number}.log"
        wait_for(lambda: log.exists() and "DUE TO TIME LIMIT" in log.read_text(), "the limit")
        time.sleep(1)
        pause.unlink()
        job.wait_requeued(1)
        job.cluster.output("scancel", str(job.number))
        return jobs.result("limited").summary["status"]

    with ThreadPoolExecutor(1) as pool:
        yield SimpleNamespace(job=job, status=pool.submit(end_the_pause))


@pytest.fixture(scope="module")
def topologies(cluster, tmp_path_factory, limited) -> SimpleNamespace:
    """Run the same training on one node of two processes, by plain sbatch; on two nodes whose port is taken; on two
    nodes, by submit.sh."""
    jobs, pythons = Jobs(cluster, tmp_path_factory.mktemp("topologies")), tmp_path_factory.mktemp("pythons")
    two = jobs.submit("2 nodes", "--hold", "--nodes=2", *TASKS, **LEFT)
    with socket.socket() as taken:
        taken.bind(("", port := 10000 + two.number % 20000))
        taken.listen()
        cluster.output("scontrol", "release", str(two.number))
        one = jobs.submit("1 nodes", RECIPES_PROCESSES_PER_NODE="2", RECIPES_PREFLIGHT="", **two_pythons(pythons))
        submit = [ROOT / "slurm/submit.sh", "h100", "ddp", *OPTIONS, "--nodes=2", "--", jobs.recipe.name]
        submitted = cluster.sbatch(*submit, *jobs.flags("submitted"), cwd=jobs.folder, **jobs.variables)
        two.wait_completed()
    return SimpleNamespace(
        jobs=jobs,
        port=port,
        of={"1 nodes": one.wait_completed(), "2 nodes": two, "submitted": submitted.wait_completed()},
    )


@pytest.mark.parametrize("name", ["1 nodes", "2 nodes", "submitted"])
def test_same_losses_as_without_slurm(topologies, local, name):
    result = topologies.jobs.result(name)
    assert result.summary["status"] == "finished"
    assert result.summary["world_size"] == result.summary["data_parallel_size"] == 2
    assert result.series("samples_digest") == local.series("samples_digest")
    assert result.series("loss") == pytest.approx(local.series("loss"), rel=1e-5)
    assert result.config["shared"] == str(ROOT / "shared/__init__.py")


@pytest.mark.parametrize("name", ["1 nodes", "2 nodes", "submitted"])
def test_ranks_follow_the_nodes(topologies, name):
    """A line of the log has task, node and local rank, then what the process said of itself."""
    log = topologies.of[name].log
    host = topologies.of[name].fields["BatchHost"]
    names = topologies.jobs.cluster.output("scontrol", "show", "hostnames", topologies.of[name].fields["NodeList"])
    processes = [(0, 0), (0, 1)] if name == "1 nodes" else [(0, 0), (1, 0)]
    assert names.split()[0] == host
    for rank, (node, local_rank) in enumerate(processes):
        place = names.split()[node]
        line = f"{node}: [{place}:{local_rank}]:process {rank} {len(processes)} {local_rank} {place} offline"
        assert log.count(line) == 1, log


def test_one_launcher_a_node_whatever_the_shell_has_left(topologies):
    """It has all GPUs of its node, a gloo interface that leads to the first node, and the hard limit as soft limit."""
    lines = re.findall(r":more (\S+) (\S+) (\S+) (.*) \S+ \((\d+), (\d+)\)", topologies.of["2 nodes"].log)
    assert [line[:3] for line in lines] == [("2", "0,1,2,3", "lo")] * 2, lines
    assert not any("0x1" in bound for *_, bound, soft, hard in lines)
    assert all(soft == hard for *_, soft, hard in lines)


def test_the_active_environment_runs_whatever_module_is_loaded(topologies):
    log = topologies.of["1 nodes"].log
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
    job, result = topologies.of["1 nodes"], topologies.jobs.result("1 nodes")
    before = result.lines
    job.cluster.output("scontrol", "requeue", str(job.number))
    job.wait_requeued(1)
    job.go_on()
    assert "already finished" in job.wait_completed().log
    assert result.lines == before


def test_time_limit_hit_twice(jobs, topologies):
    """Two requeued starts with a limit of a minute, then one with time: bitwise the losses of an uninterrupted run."""
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
    """Without requeueing: jobs of one name run one after the other."""
    chain = ["--no-requeue", "--job-name=chain", "--dependency=singleton"]
    pause = jobs.stop_at(5)
    first, second, third = (jobs.submit("chain", *chain) for _ in range(3))
    jobs.wait_for_step(5, first)
    later = jobs.stop_at(9)
    jobs.interrupt(first, pause, "--signal=USR1")
    assert "the next job of the chain resumes" in first.wait_completed().log
    jobs.wait_for_step(9, second)
    second.cluster.output("scancel", str(second.number))
    time.sleep(5)  # SIGTERM goes by two shells and a launcher
    later.unlink()
    second.wait_until("CANCELLED")
    wait_for(lambda: "ended by Slurm; the same command resumes" in second.log, "the end of a cancelled job")
    assert "interrupted (signal) at step 10" in second.log
    assert "resumed at step 10" in third.wait_completed().log
    assert jobs.result("chain").series("loss") == pytest.approx(local.series("loss"), rel=1e-5)


def test_lost_node(jobs, local):
    """All processes of one of two nodes are killed: the other names the peer, and the run resumes elsewhere."""
    pause = jobs.stop_at(6)
    job = jobs.submit("lost", "--nodes=2")
    jobs.wait_for_step(6, job)
    nodes = job.cluster.output("scontrol", "show", "hostnames", job.fields["NodeList"]).split()
    job.cluster.kill_node(nodes[1])
    try:
        pause.unlink()
        job.wait_requeued(1)
        # gloo names the peer in one of two ways, at random.
        lost = r"\S+ \[\S+\]:\d+: Connection reset by peer|Connection closed by peer \[\S+\]:\d+"
        assert re.search(rf"\[rank0\].* ({lost})", job.log), job.log
        job.go_on()
        log = job.wait_completed().log
    finally:
        job.cluster.start_node(nodes[1])
    assert "resumed at step 4" in log
    result = jobs.result("lost")
    assert result.summary["status"] == "finished"
    assert result.series("step")[:12] == list(range(1, 13))


def test_crash_is_not_repeated(jobs):
    """The log ends with the traceback of the rank that failed first."""
    job = jobs.submit("crash", "--nodes=2", FAIL_ON="1")
    job.wait_until("FAILED")
    *before, last = job.log.rstrip().splitlines()
    assert last == "RuntimeError: planted failure"
    assert [line for line in before if line.startswith("The first process")] == [
        "The first process that failed is rank 1:"
    ]
    assert jobs.result("crash").summary["status"] == "running"
    assert job.fields["Restarts"] == "0"
    assert job.fields["ExitCode"] != "0:0"


def test_sweep(jobs):
    """Each task of an array takes one line of a file, with quotes."""
    lines = [f"--seed {seed} --max_steps 1 --output_dir '{ODD.replace(chr(39), '')}/{seed}'" for seed in (1, 2)]
    (jobs.folder / "my sweep.txt").write_text("\n".join(lines) + "\n")
    job = jobs.submit("sweep", "--array=1-2", flags=("@my sweep.txt",))
    wait_for(job.gone, "the array")
    for seed in (1, 2):
        result = Result(None, jobs.folder / ODD.replace("'", "") / str(seed))
        assert result.summary["status"] == "finished"
        assert result.config["identity"]["seed"] == seed
    assert not (jobs.folder / ODD).exists()


def test_a_process_that_is_killed_is_named(jobs):
    """Its peer, which left the only traceback, is not; there is no restart."""
    pause = jobs.stop_at(3)
    job = jobs.submit("killed", "--nodes=2")
    jobs.wait_for_step(3, job)
    for pid in job.cluster.processes("RANK=1", f"SLURM_JOB_ID={job.number}"):
        os.kill(pid, signal.SIGKILL)
    pause.unlink()
    job.wait_until("FAILED")
    log = job.log.rstrip().splitlines()
    assert log[-1] == "error: rank 1 was killed by SIGKILL, probably because the node ran out of memory."
    assert "The first process that failed is rank 1:" in log
    assert job.fields["Restarts"] == "0"


def test_ends_without_a_restart(jobs, local):
    """Without restarts left; by a crash before the run opens, with the summary of that interruption there; by a STOP
    file."""
    pause = jobs.stop_at(3)
    job = jobs.submit("ends", RECIPES_MAX_RESTARTS="0")
    jobs.wait_for_step(3, job)
    jobs.interrupt(job, pause, "--signal=USR1")
    job.wait_until("FAILED")
    assert job.log.rstrip().endswith(
        "error: interrupted (signal) after 0 restarts, RECIPES_MAX_RESTARTS. Submit it again: it resumes."
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
    assert "stopped by a STOP file; the same command resumes" in last.wait_completed().log
    assert jobs.result("ends").summary["stop_reason"] == "stop_file"
    assert [each.fields["Restarts"] for each in (job, last)] == ["0", "0"]
    assert jobs.result("ends").series("loss") == pytest.approx(local.series("loss")[:6], rel=1e-5)


def test_chain_by_an_array(jobs, local):
    """Tasks one after the other, of one run, as docs/jean_zay.md gives them."""
    pause = jobs.stop_at(5)
    job = jobs.submit("array", "--no-requeue", "--array=1-2%1")
    jobs.wait_for_step(5, job)
    jobs.interrupt(job, pause, "--signal=USR1", task="_1")
    wait_for(job.gone, "the array")
    logs = "".join(path.read_text() for path in sorted(jobs.folder.glob("recipes-*.log")))
    assert logs.count("the next job of the chain resumes") == 1
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
    # The recipe itself would not refuse this: rank 0 waits for the preflight, which takes as long as it does.
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
    """The flag --memory is for the preflight alone."""
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
    """The fake cluster refuses hours of one GPU for another, and a job without a project."""
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

# SPDX-License-Identifier: Apache-2.0
"""Law 2: a run that is stopped, by a signal, a STOP file or a deadline, leaves a checkpoint and resumes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import vits
from conftest import ROOT, environment, launch_command
from forked import Launch, Server
from kills import BEGINS, VIT, difference, steps, wait_for, words
from vits import VIT_RECIPE, same_until

from shared.checkpoint import checkpoints, damage
from shared.lifetime import SIGNALS

data, whole, planted = vits.data, vits.whole, vits.planted


def stopped(launch: Launch, folder: Path, reason: str) -> int:
    """Wait for the end, check that the newest checkpoint is intact, and return the step at which the run stopped."""
    process = launch.wait()
    assert process.returncode == 0, process.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["stop_reason"]) == ("interrupted", reason)
    newest = checkpoints(folder / "checkpoints")[-1]
    assert newest.name == f"step-{summary['steps']:08d}"
    assert damage(newest) is None
    return summary["steps"]


def at_step(launch: Launch, folder: Path, more: int) -> None:
    """Wait until this start has made so many more steps."""
    wait_for(lambda: launch.ended or BEGINS in launch.output.read_text(), launch)
    begin = steps(folder)
    wait_for(lambda: launch.ended or steps(folder) >= begin + more, launch)
    assert not launch.ended, launch.output.read_text()


def test_each_way_to_stop_leaves_a_checkpoint_and_the_run_resumes(server: Server, runs, data, whole):
    """One run of one process is stopped in all of them; the launcher's exit status is its worker's."""
    folder = runs / "stopped"
    start = words(folder, *data, *VIT, "--checkpointing_steps", "4", recipe="vit")
    for number in SIGNALS:
        launch = server.start(start)
        at_step(launch, folder, 1)
        launch.kill(launch.workers, number)
        stopped(launch, folder, "signal")
        assert launch.output.read_text().count(f"{number.name}: the run saves a checkpoint after this step") == 1
    launch = server.start(start)
    at_step(launch, folder, 1)
    (folder / "STOP").touch()
    stopped(launch, folder, "stop_file")
    assert not (folder / "STOP").exists()
    stopped(server.start([*start, "--time_limit", "1.2"]), folder, "deadline")
    # Within a save, twice
    launch, before = server.start(start), set(folder.glob("checkpoints/*"))
    wait_for(lambda: launch.ended or set(folder.glob("checkpoints/tmp-*")) - before, launch)
    launch.kill(launch.workers, signal.SIGTERM)
    time.sleep(0.01)
    launch.kill(launch.workers, signal.SIGTERM)
    stopped(launch, folder, "signal")
    last = server.launch(start)
    assert last.returncode == 0, last.stdout
    assert difference(folder, whole.folder) is None


SIGNALLED = """
evaluate = recipe.evaluate
def signalled(*arguments):
    os.kill(os.getpid(), {number})
    print("in the evaluation", flush=True)
    evaluate(*arguments)
recipe.evaluate = signalled
"""


def test_a_signal_within_the_evaluation_waits_for_its_end(planted, whole, tmp_path):
    process = planted(SIGNALLED.format(number=int(signal.SIGUSR1)), tmp_path / "run")
    assert process.returncode == 0, process.stdout
    said = process.stdout
    assert said.index("SIGUSR1: the run saves") < said.index("in the evaluation") < said.index("accuracy")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["stop_reason"], summary["steps"]) == ("interrupted", "signal", 13)
    assert same_until(tmp_path / "run", 13, whole)


TWICE = """
write = tensors.TensorWriter.write_data
def write_data(self, *arguments):
    if rank == 1:
        os.kill(os.getpid(), 15)
        os.kill(os.getpid(), 15)
    return write(self, *arguments)
tensors.TensorWriter.write_data = write_data
"""


def test_two_signals_within_a_save_of_two_processes_do_not_harm_it(planted, tmp_path):
    """They come in the thread that writes, or in the training loop."""
    for flags in ([], ["--async_checkpoint"]):
        folder = tmp_path / f"run{len(flags)}"
        process = planted(TWICE, folder, *flags, num_processes=2)
        assert process.returncode == 0, process.stdout
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["status"], summary["stop_reason"]) == ("interrupted", "signal")
        there = checkpoints(folder / "checkpoints")
        assert there[-1].name == f"step-{summary['steps']:08d}"
        assert not [damage(path) for path in there if damage(path)]


def test_a_signal_to_one_rank_stops_both_at_the_same_step(server: Server, runs, data, whole):
    folder = runs / "one-rank"
    launch = server.start(words(folder, *data, *VIT, recipe="vit", num_processes=2))
    at_step(launch, folder, 2)
    launch.kill(launch.workers[1:], signal.SIGUSR1)
    step = stopped(launch, folder, "signal")
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert len(losses) == step
    np.testing.assert_allclose(losses, whole.series("loss")[:step], rtol=1e-5)


def test_a_real_launcher_and_its_group_pass_signals_on(runs, data, whole):
    """SIGTERM to torchrun's agent alone; then SIGINT to its process group, as Ctrl-C sends it. The exit status is 0
    without a launcher; torchrun makes it 1."""
    folder = runs / "real"
    flags = [str(VIT_RECIPE), "--output_dir", str(folder), *data, *VIT, "--epochs", "30"]
    for processes, number, send in (
        (1, signal.SIGTERM, os.kill),
        (2, signal.SIGINT, os.killpg),
        (0, signal.SIGINT, os.killpg),
    ):
        command = [*launch_command(num_processes=processes), *flags] if processes else flags
        output = runs / f"real-{processes}-{number}.txt"
        with open(output, "w") as out:
            pipes = {"stdout": out, "stderr": out, "start_new_session": True}
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(), **pipes)
        begin = steps(folder)
        wait_for(lambda: process.poll() is not None or BEGINS in output.read_text())  # noqa: B023
        wait_for(lambda: process.poll() is not None or steps(folder) > begin)  # noqa: B023
        send(process.pid, number)
        process.wait(timeout=300)
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["status"], summary["stop_reason"]) == ("interrupted", "signal"), output.read_text()
        newest = checkpoints(folder / "checkpoints")[-1]
        assert newest.name == f"step-{summary['steps']:08d}"
        assert damage(newest) is None
        assert process.returncode == (1 if processes else 0)
        text = output.read_text()
        assert text.count("The same command resumes from there.") == 1
        assert text.count("Traceback") == (1 if processes else 0)
        assert f"got signal: {number:d}" in text.splitlines()[-1] or not processes


ORPHAN = """
import os
import time
begin = time.monotonic()
while os.getppid() == {parent} and time.monotonic() < begin + 60:
    time.sleep(0.01)
from shared.lifetime import die_with_launcher
print("parent", os.getppid(), flush=True)
die_with_launcher()
print("lives on", flush=True)
"""


def test_a_worker_whose_launcher_died_while_it_imported_ends():
    """No signal tells it: it is init's child by then, and would hold the folder's lock to the end of the run."""
    code = (
        "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1].format(parent=os.getpid())])"
    )
    options = {"cwd": ROOT, "env": environment(LOCAL_RANK="0"), "capture_output": True, "text": True}
    process = subprocess.run([sys.executable, "-c", code, ORPHAN], check=True, **options)  # until the orphan has ended
    if "parent 1\n" not in process.stdout:
        pytest.skip("orphans are not init's here")
    assert (process.stdout, process.stderr) == ("parent 1\n", "")

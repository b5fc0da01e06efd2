# SPDX-License-Identifier: Apache-2.0
"""Law 2: killed at any instant, stopped in every way, damaged, out of disk: a run goes on as if nothing had been."""

import contextlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Result, environment, flip, launch_command, train
from forked import Launch, Server
from kills import (
    BEGINS,
    IN_BACKGROUND,
    KILLED,
    QUIET,
    VIT,
    curve,
    difference,
    kill_often,
    kill_once,
    steps,
    wait_for,
    words,
)
from torch.distributed.checkpoint.api import CheckpointException

from shared.checkpoint import (
    Checkpoints,
    checkpoint_to_resume,
    checkpoints,
    damage,
    load_checkpoint,
    read_manifest,
    read_weights,
    tensors,
)
from shared.checkpoint.retention import checksum
from shared.lifetime import SIGNALS

VIT_RECIPE = ROOT / "recipes/vit.py"


@pytest.fixture(scope="module")
def data(image_folder) -> list[str]:
    return ["--data", str(image_folder)]


# Kills


@pytest.mark.parametrize("name", KILLED)
def test_a_run_killed_anywhere_ends_bitwise_as_one_that_was_not(server: Server, runs, data, name):
    kills, recipe, flags, launch = KILLED[name]
    flags = [*data, *flags, "--checkpointing_steps", "4"]
    background = ["--async_checkpoint"] if name in IN_BACKGROUND else []  # the reference saves in the loop
    folder, path = runs / f"killed-{name.replace(' ', '-')}", ROOT / f"recipes/{recipe}.py"
    reference = train(runs / f"whole-{folder.name}", *flags, recipe=path, server=server, **launch)
    chance = random.Random(name)
    start = words(folder, *flags, *background, recipe=recipe, **launch)
    counts = kill_often(server, start, folder, kills, chance, print)
    assert counts.total() == kills
    assert difference(folder, reference.folder) is None


@pytest.mark.parametrize("recipe", ["resnet_webdataset", "resnet_torchdata"])
def test_other_loaders_go_on_where_they_were_killed(server: Server, runs, recipe):
    flags = [*QUIET, "--learning_rate", "0.001", "--norm", "group", "--image_size", "16", "--global_batch_size", "32"]
    flags += ["--max_steps", "9", "--checkpointing_steps", "3"]
    folder = runs / f"killed-{recipe}"
    reference = train(runs / f"whole-{folder.name}", *flags, recipe=ROOT / f"recipes/{recipe}.py", server=server)
    start, chance = words(folder, *flags, recipe=recipe), random.Random(recipe)
    assert kill_once(server, start, folder, "all workers", "tmp-00000006", chance)
    assert server.launch(start).returncode == 0
    assert difference(folder, reference.folder) is None


def test_a_run_goes_on_through_every_topology(server: Server, runs, data, whole):
    """To rounding the uninterrupted run of one process; sums of many orders grow apart, as in test_strategies.py."""
    folder = runs / "topologies"
    chain = {10: ("ddp", 2), 20: ("ddp", 1), 30: ("fsdp", 4), 40: ("fsdp", 2)}
    for step, (strategy, processes) in chain.items():
        launch = {"num_processes": processes, "config_file": f"local_{strategy}.yaml", "recipe": VIT_RECIPE}
        run = train(folder, *data, *VIT, "--max_steps", str(step), server=server, **launch)
        assert run.summary["world_size"] == processes
    losses = [line["loss"] for line in whole.lines if "loss" in line][:40]
    np.testing.assert_allclose(run.series("loss"), losses, rtol=1e-5)
    assert run.series("samples_digest") == whole.series("samples_digest")[:40]


# Signals


@pytest.fixture(scope="module")
def whole(server, runs, data) -> Result:
    """Sixty steps of the small Vision Transformer by one process, with every numbered checkpoint."""
    flags = [*data, *VIT, "--checkpointing_steps", "4", "--keep_checkpoints", "100"]
    return train(runs / "vit-whole", *flags, recipe=VIT_RECIPE, server=server)


def stopped(launch: Launch, folder: Path, reason: str) -> int:
    """Wait for the end; the step at which the run stopped by itself, with a whole checkpoint."""
    process = launch.wait()
    assert process.returncode == 0, process.stdout
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["stop_reason"]) == ("interrupted", reason)
    newest = checkpoints(folder / "checkpoints")[-1]
    assert newest.name == f"step-{summary['steps']:08d}"
    assert damage(newest) is None
    return summary["steps"]


def at_step(launch: Launch, folder: Path, more: int) -> None:
    """Wait until this start has made so many steps."""
    wait_for(lambda: launch.ended or BEGINS in launch.output.read_text(), launch)
    begin = steps(folder)
    wait_for(lambda: launch.ended or steps(folder) >= begin + more, launch)
    assert not launch.ended, launch.output.read_text()


def test_each_way_to_stop_leaves_a_checkpoint_and_the_run_goes_on(server: Server, runs, data, whole):
    """One run of one process through all of them; the launcher's status is its worker's."""
    folder = runs / "stopped"
    start = words(folder, *data, *VIT, "--checkpointing_steps", "4", recipe="vit")
    for number in SIGNALS:
        launch = server.start(start)
        at_step(launch, folder, 1)
        launch.kill(launch.workers, number)
        stopped(launch, folder, "signal")
        assert launch.output.read_text().count(f"{number.name}: a checkpoint comes after this step") == 1
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
    assert said.index("SIGUSR1: a checkpoint comes") < said.index("in the evaluation") < said.index("accuracy")
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
    """They come in the thread that writes, or in the loop."""
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
    """torchrun's agent: SIGTERM to it alone, then SIGINT to its whole process group, as Ctrl-C sends it, on two
    processes and on one. Without a launcher that is status 0; torchrun makes it 1."""
    folder = runs / "real"
    flags = [str(VIT_RECIPE), "--output_dir", str(folder), *data, *VIT, "--epochs", "30"]
    ways = ((2, signal.SIGTERM, os.kill), (2, signal.SIGINT, os.killpg), (1, signal.SIGINT, os.killpg))
    for processes, number, send in (*ways, (0, signal.SIGINT, os.killpg)):
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
_die_with_launcher()
print("lives on", flush=True)
"""


def test_a_worker_whose_launcher_died_while_it_imported_ends(tmp_path):
    """No signal tells it: it is init's child by then, and would hold the folder's lock to the run's end."""
    code = (
        "import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1].format(parent=os.getpid())])"
    )
    output = tmp_path / "output.txt"
    with open(output, "w") as out:
        streams = {"stdout": out, "stderr": out, "env": environment(LOCAL_RANK="0")}
        subprocess.run([sys.executable, "-c", code, ORPHAN], cwd=ROOT, check=True, **streams)
    wait_for(lambda: "parent" in output.read_text())
    if "parent 1\n" not in output.read_text():
        pytest.skip("orphans are not init's here")
    time.sleep(1)
    assert "lives on" not in output.read_text()


# Damage


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """The first 24 steps of the uninterrupted run, with the checkpoints of steps 16, 20 and 24."""
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(whole.folder / name, tmp_path / name)
    for step in (16, 20, 24):
        name = f"checkpoints/step-{step:08d}"
        shutil.copytree(whole.folder / name, tmp_path / name)
    return tmp_path


def same_until(folder: Path, step: int, whole: Result) -> bool:
    return curve(folder) == [line for line in curve(whole.folder) if line[0] <= step]


def vit_words(folder: Path, data: list[str], *flags: str, **launch) -> list[str]:
    return words(folder, *data, *VIT, "--checkpointing_steps", "4", *flags, recipe="vit", **launch)


def one_error(process: subprocess.CompletedProcess) -> str:
    assert process.returncode, process.stdout
    assert "Traceback" not in process.stdout, process.stdout
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("error: ")]
    return line


def test_damage_is_named_and_the_one_before_it_taken(server: Server, data, whole, copied):
    folder = copied / "checkpoints"
    flip(folder / "step-00000024/tensors-00000.safetensors")
    (folder / "step-00000020/manifest.json").unlink()
    for name in ("config.json", "summary.json"):  # as a loss of power leaves them
        (copied / name).write_text("")
    process = server.launch(vit_words(copied, data, "--max_steps", "32"))
    assert process.returncode == 0, process.stdout
    assert "step-00000024 is damaged: tensors-00000.safetensors is not what was written" in process.stdout
    assert "step-00000020 is damaged: manifest.json is missing; the one before it is taken" in process.stdout
    assert "resumed at step 16" in process.stdout
    kept = [f"aside-{step:08d}" for step in (20, 24)] + [f"step-{step:08d}" for step in (24, 28, 32)]  # 24: the best
    assert sorted(path.name for path in folder.iterdir()) == kept
    twice = server.launch(vit_words(copied, data, "--max_steps", "40"))
    assert "resumed at step 32" in twice.stdout, twice.stdout
    # The end of --max_steps adds an evaluation, which the uninterrupted run has not.
    ours = [line for line in curve(copied) if line[3] is not None]
    assert ours == [line for line in curve(whole.folder) if line[3] is not None and line[0] <= 40]
    for path in folder.glob("step-*/manifest.json"):
        path.write_text("{")
    error = one_error(server.launch(vit_words(copied, data)))
    assert "manifest.json cannot be read" in error
    assert "no other is whole" in error


def test_from_a_path_and_under_other_values(server: Server, data, whole, copied, tmp_path_factory):
    path = copied / "checkpoints/step-00000020"
    other = tmp_path_factory.mktemp("other") / "run"
    process = server.launch(vit_words(other, data, "--resume_from_checkpoint", str(path), "--max_steps", "24"))
    assert "resumed at step 20" in process.stdout
    assert curve(other) == [line for line in curve(whole.folder) if 20 < line[0] <= 24]
    # Back within its own folder, then started again by the same command, then by one without a path
    back = shutil.copytree(copied, other.with_name("back"))
    path = back / "checkpoints/step-00000016"
    for begin, end, flags in ((16, 20, [str(path)]), (20, 24, [str(path)]), (24, 28, ["auto"])):
        flags = ["--resume_from_checkpoint", *flags, "--max_steps", str(end)]
        process = server.launch(vit_words(back, data, *flags))
        assert f"resumed at step {begin}" in process.stdout, process.stdout
        ours, theirs = ([line for line in curve(run) if line[3] is not None] for run in (back, whole.folder))
        assert ours == theirs[:end]
    assert {path.name for path in (back / "checkpoints").glob("aside-*")} == {"aside-00000020", "aside-00000024"}
    changed = ["--learning_rate", "5e-4", "--max_steps", "28"]
    error = one_error(server.launch(vit_words(copied, data, *changed)))
    assert "learning_rate was 0.001, is 0.0005" in error
    error = one_error(server.launch(vit_words(copied, data, *changed, "--resume_override", "nonsense")))
    assert "--resume_override nonsense" in error
    assert same_until(copied, 60, whole)  # nothing has changed yet
    process = server.launch(vit_words(copied, data, *changed, "--resume_override", "learning_rate"))
    assert "resumed at step 24" in process.stdout, process.stdout
    ours, theirs = ([line[5] for line in curve(run) if line[5] is not None] for run in (copied, whole.folder))
    np.testing.assert_allclose(ours, theirs[:24] + [rate / 2 for rate in theirs[24:28]], rtol=1e-12)


DECODES = """
from shared.images import loader as loaders
seen, render, evaluate = 0, loaders.Views._render, recipe.evaluate
def counted(*arguments):
    global seen
    seen += 1
    return render(*arguments)
def told(*arguments):
    print(f"decoded: {seen}", flush=True)
    evaluate(*arguments)
loaders.Views._render, recipe.evaluate = counted, told
"""


def test_a_resume_decodes_no_sample_that_it_skips(planted, copied):
    """From step 20, eight steps of 20 images into an epoch, to step 22."""
    shutil.rmtree(copied / "checkpoints/step-00000024")
    process = planted(DECODES, copied, "--max_steps", "22", "--num_workers", "0")
    assert "resumed at step 20" in process.stdout, process.stdout
    assert 40 <= int(re.search(r"decoded: (\d+)", process.stdout)[1]) <= 60


def test_other_images_in_the_same_folder_are_refused_by_name(server: Server, data, tmp_path):
    """They would be another order of samples, without a word."""
    images = shutil.copytree(data[1], tmp_path / "images")
    start = vit_words(tmp_path / "run", ["--data", str(images)])
    assert server.launch([*start, "--max_steps", "1"]).returncode == 0
    shutil.copy(images / "train/digit-3/001.png", images / "train/digit-3/new.png")
    error = one_error(server.launch([*start, "--max_steps", "2"]))
    assert "training_images was 240, is 241" in error
    assert "held_out" not in error


# The disk


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root, to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_costs_checkpoints_and_not_the_run(server: Server, data, whole, tmp_path):
    """A save fails: that is said, training goes on. There is room again: the next one is written. None at the end."""
    with mounted(tmp_path / "disk", "size=60m") as disk:
        folder = disk / "run"
        launch = server.start(vit_words(folder, data, "--max_steps", "36"))
        checkpoint = folder / "checkpoints/step-00000004"
        wait_for(lambda: launch.ended or checkpoint.exists(), launch)
        fill(disk)
        wait_for(lambda: launch.ended or "warning: no checkpoint: " in launch.output.read_text(), launch)
        there = checkpoints(folder / "checkpoints")
        assert there
        assert not [damage(path) for path in there if damage(path)]
        (disk / "filler").unlink()
        process = launch.wait()
        assert process.returncode == 0, process.stdout
        assert "No space left on device" in process.stdout
        assert checkpoints(folder / "checkpoints")[-1].name == "step-00000036"
        ours = [line for line in curve(folder) if line[3] is not None]
        assert ours == [line for line in curve(whole.folder) if line[3] is not None and line[0] <= 36]
        fill(disk)
        error = one_error(server.launch(vit_words(folder, data, "--max_steps", "38")))
        assert "no checkpoint of step 38" in error
        assert "the newest one is" in error
        assert damage(checkpoints(folder / "checkpoints")[-1]) is None


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_without_a_byte_does_not_end_the_run(server: Server, data, whole, tmp_path, processes):
    """Lines of metrics.jsonl wait in memory; summaries and TensorBoard go without. Then there is room again."""
    with mounted(tmp_path / "disk", "size=60m") as disk:
        folder, flags = disk / "run", ["--report_to", "tensorboard", "--max_steps", "40"]
        launch = server.start(vit_words(folder, data, *flags, num_processes=processes))
        wait_for(lambda: launch.ended or steps(folder) >= 2, launch)
        said = []
        with open(disk / "filler", "wb", buffering=0) as filler:
            while not launch.ended and len(said) < 3:
                for size in (1 << 20, 4096):  # at once, and then what the run gives back
                    with contextlib.suppress(OSError):
                        while filler.write(bytes(size)) == size:
                            pass
                said = [name for name in FILES if f"warning: {name} cannot be written" in launch.output.read_text()]
        (disk / "filler").unlink()
        process = launch.wait()
        assert process.returncode == 0, process.stdout
        assert [process.stdout.count(f"warning: {name} cannot be written") for name in FILES] == [1, 1, 1]
        losses = [line for line in curve(folder) if line[3] is not None]
        assert [line[0] for line in losses] == [*range(1, 41)]
        np.testing.assert_allclose([line[3] for line in losses], whole.series("loss")[:40], rtol=1e-5)
        assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
        assert checkpoints(folder / "checkpoints")[-1].name == "step-00000040"


FILES = ("metrics.jsonl", "summary.json", "the trackers' log")


def fill(disk: Path) -> None:
    """All but two million bytes: lines of metrics.jsonl have room, a checkpoint has not. The run writes meanwhile."""
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while (free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 2_000_000) > 0:
            filler.write(bytes(min(free, 1_000_000)))


def test_a_folder_that_cannot_be_written_is_one_line(server: Server, data, tmp_path):
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        error = one_error(server.launch(vit_words(disk / "run", data)))
    assert "cannot write to" in error
    assert "Read-only file system. Give another --output_dir." in error


PLANTED = """
import os
import sys
import torch
import {recipe} as recipe
from shared.checkpoint import retention, tensors
from shared.checkpoint import save as saving
from shared.config import parse
rank = int(os.environ["RANK"])
{code}
if __name__ == "__main__":
    recipe.main(*parse(*recipe.CONFIGS))
"""


@pytest.fixture
def planted(server: Server, data, tmp_path):
    """Run vit.py with lines of Python before its `main`."""

    def launched(code: str, folder: Path, *flags: str, recipe: str = "vit", **launch) -> subprocess.CompletedProcess:
        script = tmp_path / f"{recipe}.py"
        script.write_text(PLANTED.format(recipe=recipe, code=code))
        start = vit_words(folder, data, *flags, "--resume_override", "source", **launch)
        return server.launch([str(script) if word == str(VIT_RECIPE) else word for word in start])

    return launched


FAILING = """
write, failures = tensors.TensorWriter.write_data, {number}
def write_data(self, *arguments):
    global failures
    failures -= rank == {rank}
    if rank == {rank} and failures >= 0:
        raise OSError(28, "No space left on device")
    return write(self, *arguments)
tensors.TensorWriter.write_data = write_data
"""


def test_a_save_that_fails_on_one_rank_fails_on_all(planted, tmp_path):
    folder = tmp_path / "run"
    process = planted(FAILING.format(rank=1, number=1), folder, "--max_steps", "8", num_processes=2)
    assert process.returncode == 0, process.stdout
    (warning,) = [line for line in process.stdout.splitlines() if "warning: no checkpoint" in line]
    assert "No space left on device" in warning
    assert "(process 1)" in warning
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000008"]
    process = planted(FAILING.format(rank=1, number=9), folder, "--max_steps", "10", num_processes=2)
    assert "no checkpoint of step 10: " in one_error(process)


FAILING_MAIN = """
failures = []
def failing(module, name, step):
    right = getattr(module, name)
    def called(place, *arguments):
        if not failures.count(step) and f"tmp-{step:08d}" in str(place):
            failures.append(step)
            raise OSError(122, "Disk quota exceeded")
        return right(place, *arguments)
    setattr(module, name, called)
failing(saving, "_finish", 4)
failing(saving, "_publish", 8)
failing(retention.os, "rename", 12)
"""


def test_a_save_that_fails_at_its_end_leaves_no_part_of_it(planted, whole, tmp_path):
    """At state.json, at the manifest, at the name: only rank 0 does these."""
    folder = tmp_path / "run"
    flags = ["--max_steps", "16", "--async_checkpoint"]
    process = planted(FAILING_MAIN, folder, *flags, num_processes=2)
    assert process.returncode == 0, process.stdout
    assert process.stdout.count("Disk quota exceeded (process 0)") == 3
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000016"]
    losses = [line[3] for line in curve(folder) if line[3] is not None]
    np.testing.assert_allclose(losses, whole.series("loss")[:16], rtol=1e-5)


FAILING_ZERO = """
save, failures = torch.save, 0
def full(*arguments, **keywords):
    global failures
    failures += 1
    if rank == 1 and failures == 1:
        raise OSError(28, "No space left on device")
    return save(*arguments, **keywords)
torch.save = full
"""


def test_a_save_of_deepspeed_that_fails_on_one_rank_leaves_none_waiting(planted, tmp_path):
    """Both its own files and the next save, which is whole."""
    folder, launch = tmp_path / "run", {"num_processes": 2, "config_file": "local_zero2.yaml"}
    process = planted(FAILING_ZERO, folder, "--max_steps", "6", **launch)
    assert process.returncode == 0, process.stdout
    assert "warning: no checkpoint: [Errno 28] No space left on device (process 1)" in process.stdout
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000006"]
    assert damage(folder / "checkpoints/step-00000006") is None


# Malice


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["tensors-00000.safetensors", "index.json", "state.json", "manifest.json"])
def test_no_file_of_a_checkpoint_can_run_code(server: Server, data, copied, name):
    """A pickle in its place, with the checksum that belongs to it."""
    marker, path = copied / "marker", copied / "checkpoints/step-00000024"
    (path / name).write_bytes(pickle.dumps(Evil(marker)))
    if name != "manifest.json":
        manifest = read_manifest(path)
        manifest["files"][name] = checksum(path / name)
        (path / "manifest.json").write_text(json.dumps(manifest))
    assert (damage(path) is None) == (name != "manifest.json")
    process = server.launch(vit_words(copied, data, "--max_steps", "28"))
    if name == "manifest.json":
        assert process.returncode == 0
        assert "step-00000024 is damaged: manifest.json cannot be read" in process.stdout
        assert "resumed at step 20" in process.stdout
    else:
        assert str(path) in one_error(process)
    with contextlib.suppress(Exception, CheckpointException):
        read_weights(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()  # it would have


def test_a_pickle_of_deepspeed_is_compared_before_it_is_opened(copied):
    """Where its checksum is another, the checkpoint is passed over before DeepSpeed, which unpickles, sees it."""
    path, marker = copied / "checkpoints/step-00000024", copied / "marker"
    shard = path / "zero/zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.parent.mkdir()
    torch.save({"step": 24}, shard)
    manifest = read_manifest(path)
    manifest["files"]["zero/" + shard.name] = checksum(shard)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert damage(path) is None
    shard.write_bytes(pickle.dumps(Evil(marker)).ljust(shard.stat().st_size, b"."))
    assert "SHA-256 differs" in damage(path)
    found, (line,) = checkpoint_to_resume(path.parent, "auto")
    assert found.name == "step-00000020"
    assert shard.name in line
    assert not marker.exists()


# Numbers that are none

NAN = """
count, right = 0, recipe.cross_entropy
def cross_entropy(logits, labels, **options):
    global count
    count += torch.is_grad_enabled()
    loss = right(logits, labels, **options)
    print(f"forward {count}", flush=True)
    return loss {spoilt} if count == 6 and rank == 1 else loss
recipe.cross_entropy = cross_entropy
"""


def test_a_loss_that_is_no_number_stops_before_the_update(planted, runs, whole, tmp_path):
    """Here its gradients would be finite, as with the logarithm of a constant, and it is the run's last step."""
    folder = tmp_path / "run"
    error = one_error(planted(NAN.replace("{spoilt}", '+ float("nan")'), folder, "--max_steps", "6", num_processes=2))
    record = json.loads((folder / "nonfinite.json").read_text())
    newest = checkpoints(folder / "checkpoints")[-1]
    samples = record["processes"][1]["samples"]
    assert record["step"] == 6
    assert [len(one["samples"]) for one in record["processes"]] == [10, 10]
    assert "error: step 6 has" in error
    assert ", ".join(map(str, sorted(samples))) in error
    assert str(newest) in error
    assert newest.name == "step-00000004"
    assert all(tensor.isfinite().all() for tensor in read_weights(newest).values())
    again = planted("", folder, "--max_steps", "8", num_processes=2)  # with the reason mended
    assert "resumed at step 4" in again.stdout, again.stdout
    losses = [line[3] for line in curve(folder) if line[3] is not None]
    np.testing.assert_allclose(losses, whole.series("loss")[:8], rtol=1e-5)


def test_the_loop_reads_a_step_when_it_has_begun_the_next(planted, tmp_path):
    """No step but 12 is logged: the loop does not wait for the device at 6, and stops on both processes after 7."""
    folder, flags = tmp_path / "run", ["--max_steps", "12", "--logging_steps", "12"]
    process = planted(NAN.replace("{spoilt}", '+ float("nan")'), folder, *flags, num_processes=2)
    assert "error: step 6 has the losses nan and the gradient norm nan, from samples" in one_error(process)
    assert [process.stdout.count(f"forward {step}\n") for step in (6, 7, 8)] == [2, 2, 0]
    newest = checkpoints(folder / "checkpoints")[-1]
    assert newest.name == "step-00000004"
    assert all(tensor.isfinite().all() for tensor in read_weights(newest).values())


def test_a_pipelines_loss_that_is_no_number_stops_all_stages(planted, tmp_path):
    """Only the last stage computes it."""
    flags = ["--max_steps", "6", "--pipeline_chunks", "5"]
    launch = {"num_processes": 2, "config_file": "local_pp.yaml", "recipe": "vit_pp"}
    error = one_error(planted(NAN.replace("{spoilt}", '+ float("nan")'), tmp_path / "run", *flags, **launch))
    assert re.search(r"error: step [12] has the losses nan and the gradient norm nan", error)


WATCHED = """
models, weights = [], []
parallelize, end_step = recipe.parallelize, recipe.Run.end_step
def kept(*arguments):
    models[:] = parallelize(*arguments)
    return models
def compared(run, *arguments):
    end_step(run, *arguments)
    weights.append([parameter.detach().clone() for parameter in models[0].parameters()])
    if rank == 0:
        print(f"step {run.step} unchanged: {len(weights) > 1 and all(map(torch.equal, *weights[-2:]))}", flush=True)
recipe.parallelize, recipe.Run.end_step = kept, compared
"""


def test_a_step_that_is_skipped_leaves_the_weights_alone(planted, tmp_path):
    folder = tmp_path / "run"
    flags = ["--max_steps", "8", "--on_nonfinite", "skip"]
    process = planted(NAN.replace("{spoilt}", '* float("nan")') + WATCHED, folder, *flags, num_processes=2)
    assert process.returncode == 0, process.stdout
    assert "step 6 unchanged: True" in process.stdout
    assert "step 5 unchanged: False" in process.stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (skipped,) = [line for line in lines if line.get("skipped")]
    assert skipped["step"] == 6
    assert skipped["loss"] is None
    assert skipped["grad_norm"] is None
    assert [line["step"] for line in lines if line.get("loss")] == [1, 2, 3, 4, 5, 7, 8]
    assert all(tensor.isfinite().all() for tensor in read_weights(folder / "checkpoints/step-00000008").values())


# In the background


def test_checkpoints_in_the_background_are_the_same(server: Server, runs, data, whole):
    """And a kill within a write leaves the one before it the newest."""
    folder = runs / "background"
    start = vit_words(folder, data, "--async_checkpoint")
    assert kill_once(server, start, folder, "all workers", "tmp-*", random.Random(1))
    assert not [damage(path) for path in checkpoints(folder / "checkpoints") if damage(path)]
    assert kill_once(server, start, folder, "launcher", "tmp-*/tensors-*", random.Random(2))
    process = server.launch(start)
    assert process.returncode == 0, process.stdout
    assert difference(folder, whole.folder) is None


def test_weights_that_change_after_a_save_do_not_reach_its_file(tmp_path, monkeypatch):
    model = torch.nn.Linear(500, 500)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    model(torch.ones(1, 500)).sum().backward()
    optimizer.step()
    alone = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, scaler=None, mesh=None)
    alone.device = torch.device("cpu")
    written, go = tensors.TensorWriter.write_data, threading.Event()
    monkeypatch.setattr(tensors.TensorWriter, "write_data", lambda *given: go.wait() and written(*given))
    saved = Checkpoints(tmp_path, alone, {}, 2, background=True)
    right = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    momentum = optimizer.state[model.weight]["momentum_buffer"].clone()
    saved.save(model, optimizer, scheduler, {"step": 1}, {})
    with torch.no_grad():
        for tensor in (*model.parameters(), optimizer.state[model.weight]["momentum_buffer"]):
            tensor.fill_(9)
    assert not checkpoints(tmp_path)
    go.set()
    saved.wait()
    (path,) = checkpoints(tmp_path)
    assert damage(path) is None
    torch.testing.assert_close(read_weights(path), right, rtol=0, atol=0)
    load_checkpoint(path, alone, model, optimizer, scheduler)
    torch.testing.assert_close(dict(model.state_dict()), right, rtol=0, atol=0)
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], momentum)


def test_what_goes_wrong_in_the_background_is_said_at_the_next_step(planted, tmp_path):
    folder = tmp_path / "run"
    process = planted(FAILING.format(rank=0, number=1), folder, "--max_steps", "8", "--async_checkpoint")
    assert process.returncode == 0, process.stdout
    (warning,) = [line for line in process.stdout.splitlines() if "warning: no checkpoint" in line]
    assert "No space left on device" in warning
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000008"]


def test_the_background_is_refused_where_deepspeed_writes(server: Server, data, tmp_path):
    launch = {"num_processes": 2, "config_file": "local_zero2.yaml"}
    error = one_error(server.launch(vit_words(tmp_path / "run", data, "--async_checkpoint", **launch)))
    assert "--async_checkpoint" in error

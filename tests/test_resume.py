# SPDX-License-Identifier: Apache-2.0
"""Law 2, as far as epoch ends and numbered checkpoints carry it: a run resumes as if nothing had happened."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, Result, environment, launch_command, python, train, wait_for

from shared.checkpoint import checkpoint_to_resume, checkpoints, damage, read_state
from shared.errors import UserError
from shared.run.identity import identity_hash

# Twelve steps an epoch of 240 small images. The rate is small: at 0.003 rounding turns a tie of ReLU or max pooling in
# step 18, which then grows ten-fold every few steps.
EPOCHS = [
    "--learning_rate",
    "0.001",
    "--epochs",
    "3",
    "--global_batch_size",
    "20",
    "--logging_steps",
    "1",
    "--image_size",
    "24",
]


@pytest.fixture(scope="module")
def flags(image_folder):
    return ["--data", str(image_folder), *EPOCHS, "--norm", "group", "--report_to", "none", "--num_workers", "1"]


@pytest.fixture(scope="module")
def uninterrupted(server, runs, flags):
    return train(runs / "uninterrupted", *flags, server=server)


@pytest.fixture(scope="module")
def contest(server, runs):
    """A training that holds its folder and stands still, and a second start, which waits while other tests run."""
    folder = runs / "held"
    command = ["recipes/resnet.py", "--output_dir", folder, "--report_to", "none"]
    holder = server.start_python(command)
    wait_for(lambda: (folder / "summary.json").exists())
    holder.kill([holder.pid], signal.SIGSTOP)
    second = server.start_python(command)
    yield folder, holder, second
    for process in (second, holder):
        process.kill([] if process.ended else [process.pid])
        process.wait()


def test_a_run_holds_its_folder(contest):
    folder, holder, _ = contest
    assert json.loads((folder / "summary.json").read_text())["pid"] == holder.pid


def curve(run: Result) -> list[tuple]:
    """All that a step or an evaluation says of the training, timings left out."""
    names = (
        "step",
        "epoch",
        "samples",
        "loss",
        "samples_digest",
        "learning_rate",
        "grad_norm",
        "accuracy",
        "eval_loss",
    )
    return [tuple(line.get(name) for name in names) for line in run.lines]


@pytest.mark.quick
def test_resume_at_an_epoch_end_is_bitwise_the_same(server, runs, flags, uninterrupted):
    first = train(runs / "resumed", *flags, "--max_steps", "12", server=server)
    before = first.summary
    assert before["stop_reason"] == "max_steps"
    second = train(runs / "resumed", *flags, "--num_workers", "0", "--logging_steps", "1", server=server)
    assert "resumed at step 12 of 36" in second.text
    assert curve(second) == curve(uninterrupted)
    assert second.summary["stop_reason"] == "epochs"
    assert second.summary["seconds"] > before["seconds"]


# timm's Lamb counts its steps in its parameter groups; its bias correction depends on them.
LAMB = """
import resnet as recipe
from shared.config import parse
from timm.optim import Lamb
class Counting(Lamb):
    def __init__(self, groups, lr, *_, **__):
        super().__init__(groups, lr, weight_decay=0.01, max_grad_norm=None)
recipe.torch.optim.SGD, recipe.zero_momentum = Counting, lambda optimizer: optimizer
recipe.main(*parse(*recipe.CONFIGS))
"""


def test_an_optimizer_that_counts_in_its_groups_resumes_bitwise(server, runs, flags, tmp_path):
    script = tmp_path / "resnet.py"
    script.write_text(LAMB)
    options = {"recipe": script, "server": server}
    whole = train(runs / "lamb", *flags, "--max_steps", "8", **options)
    assert read_state(checkpoints(whole.folder / "checkpoints")[-1])["optimizer"]["step"] == 8
    train(runs / "lamb-resumed", *flags, "--max_steps", "4", **options)
    resumed = train(runs / "lamb-resumed", *flags, "--max_steps", "8", **options)
    assert "resumed at step 4 of 36" in resumed.text
    assert resumed.series("loss") == whole.series("loss")


def test_resume_on_two_processes_is_the_same_to_rounding(server, runs, flags, uninterrupted):
    """From the last checkpoint but one, by its path, in a folder of its own."""
    checkpoint = uninterrupted.folder / "checkpoints/step-00000024"
    second = train(runs / "wider", *flags, "--resume_from_checkpoint", str(checkpoint), num_processes=2, server=server)
    np.testing.assert_allclose(second.series("loss"), uninterrupted.series("loss")[24:], rtol=1e-5)
    assert second.series("samples_digest") == uninterrupted.series("samples_digest")[24:]
    assert second.summary["world_size"] == 2


def test_workers_die_with_their_launcher_and_the_run_resumes(server, runs, flags, uninterrupted):
    """SIGKILL of the launcher in mid-epoch, with numbered checkpoints; the next start drops what lay past the last."""
    folder = runs / "killed"
    command = [*launch_command(num_processes=2), "recipes/resnet.py", "--output_dir", str(folder), *flags]
    command += ["--checkpointing_steps", "5"]
    launcher = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and '"step": 6' in (folder / "metrics.jsonl").read_text())
    worker = json.loads((folder / "summary.json").read_text())["pid"]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not alive(worker))
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "loss": 0.1}\n{"step": 18, "lo')  # past the checkpoint, and partial
    second = train(folder, *flags, num_processes=2, server=server)
    assert int(re.search(r"resumed at step (\d+) of 36", second.text)[1]) >= 5
    assert [line["step"] for line in second.lines if "loss" in line] == list(range(1, 37))
    assert second.series("samples_digest") == uninterrupted.series("samples_digest")
    np.testing.assert_allclose(second.series("loss"), uninterrupted.series("loss"), rtol=1e-5)


def test_a_finished_run_says_so_and_changes_nothing(server, demo, tmp_path):
    folder = shutil.copytree(demo.folder, tmp_path / "demo")
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = train(folder, "--logging_steps", "1", server=server)
    assert "already finished: top-1 accuracy" in again.text
    assert f"To start again: rm -r {folder}" in again.text
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == kept


def test_only_two_checkpoints_are_kept_and_none_is_half(uninterrupted):
    folder = uninterrupted.folder / "checkpoints"
    accuracy = {line["step"]: line["accuracy"] for line in uninterrupted.lines if "accuracy" in line}
    best = max(accuracy, key=lambda step: (accuracy[step], step))
    assert [int(path.name[5:]) for path in checkpoints(folder)] == sorted({24, 36, best})
    assert sorted(os.listdir(folder)) == [path.name for path in checkpoints(folder)]
    assert [damage(path) for path in checkpoints(folder)] == [None] * len(checkpoints(folder))


def test_what_resume_from_checkpoint_means(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted.folder / "checkpoints", tmp_path / "checkpoints")
    folder = tmp_path / "checkpoints"
    (folder / "tmp-00000099").mkdir()
    (folder / "step-00000099").mkdir()
    newest, passed = checkpoint_to_resume(folder, "auto")
    assert newest.name == "step-00000036"
    assert passed == [f"{folder / 'step-00000099'} is damaged: manifest.json is missing"]
    assert checkpoint_to_resume(folder, str(folder / "step-00000024"))[0].name == "step-00000024"
    assert checkpoint_to_resume(tmp_path / "none", "auto") == (None, [])
    assert checkpoint_to_resume(tmp_path / "none", "never") == (None, [])
    for wrong in ("never", "no/such", str(folder / "tmp-00000099"), str(folder / "step-00000099"), str(folder)):
        with pytest.raises(UserError):
            checkpoint_to_resume(folder, wrong)


def test_a_second_start_in_a_folder_in_use_is_refused(contest):
    folder, holder, second = contest
    process = second.wait()
    waiting, error = process.stderr.splitlines()
    assert process.returncode == 1
    assert f"in use by process {holder.pid} on {socket.gethostname()}" in waiting
    assert error.startswith("error: ")
    assert f"process {holder.pid} on {socket.gethostname()}" in error
    assert "--output_dir" in error
    assert json.loads((folder / "summary.json").read_text())["pid"] == holder.pid


def test_the_folder_is_named_after_what_decides_the_training(server, tmp_path):
    """The same command finds its run again; only what changes the curve changes the name."""
    flags = ["--max_steps", "1", "--global_batch_size", "256", "--report_to", "none"]
    recipe = ROOT / "recipes/resnet.py"
    first = python(recipe, *flags, cwd=tmp_path, server=server)
    flags += ["--num_workers", "0", "--max_steps", "2"]
    other_limits = python(recipe, *flags, cwd=tmp_path, server=server)
    name = first.stdout.splitlines()[0]
    assert other_limits.stdout.splitlines()[0] == name
    assert "resumed at step 1 of" in other_limits.stdout
    assert os.listdir(tmp_path / "runs") == [name.removeprefix("runs/")]
    identity = json.loads((tmp_path / name / "config.json").read_text())["identity"]
    of_data = ("training_images", "held_out_images", "class_names", "data_fingerprint")
    assert [identity.pop(name) for name in of_data][:3] == [1437, 360, list("0123456789")]
    assert "train_one_epoch" in identity.pop("source")
    assert name == f"runs/resnet-{identity_hash(identity)}"
    assert name != f"runs/resnet-{identity_hash(identity | {'seed': 1})}"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

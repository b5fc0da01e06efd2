# SPDX-License-Identifier: Apache-2.0
"""Law 2, as far as epoch ends and numbered checkpoints carry it: a run goes on as if nothing had happened."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, Result, environment, launch_command, train

from shared.checkpoint import checkpoint_to_resume, complete_checkpoints
from shared.config import UserError

# Twelve steps an epoch of 240 small images.
EPOCHS = ["--epochs", "3", "--global_batch_size", "20", "--logging_steps", "1", "--image_size", "24"]


@pytest.fixture(scope="module")
def flags(image_folder):
    return ["--data", str(image_folder), *EPOCHS, "--norm", "group", "--report_to", "none", "--num_workers", "1"]


@pytest.fixture(scope="module")
def uninterrupted(runs, flags):
    return train(runs / "uninterrupted", *flags)


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


def test_resume_at_an_epoch_end_is_bitwise_the_same(runs, flags, uninterrupted):
    first = train(runs / "resumed", *flags, "--max_steps", "12")
    before = first.summary
    assert before["stop_reason"] == "max_steps"
    second = train(runs / "resumed", *flags, "--num_workers", "0", "--logging_steps", "1")
    assert "resumed at step 12 of 36" in second.text
    assert curve(second) == curve(uninterrupted)
    assert second.summary["stop_reason"] == "epochs"
    assert second.summary["seconds"] > before["seconds"]


def test_resume_on_two_processes_is_the_same_to_rounding(runs, flags, uninterrupted):
    train(runs / "wider", *flags, "--max_steps", "24")
    second = train(runs / "wider", *flags, num_processes=2)
    np.testing.assert_allclose(second.series("loss"), uninterrupted.series("loss"), rtol=2e-3)
    assert second.series("samples_digest") == uninterrupted.series("samples_digest")
    assert second.summary["world_size"] == 2


def test_workers_die_with_their_launcher_and_the_run_goes_on(runs, flags, uninterrupted):
    """SIGKILL of the launcher in mid-epoch, with numbered checkpoints; the next start drops what lay past the last."""
    folder = runs / "killed"
    command = [*launch_command(num_processes=2), "recipes/resnet.py", "--output_dir", str(folder), *flags]
    command += ["--checkpointing_steps", "5"]
    launcher = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and '"step": 17' in (folder / "metrics.jsonl").read_text())
    worker = json.loads((folder / "summary.json").read_text())["pid"]
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not alive(worker))
    assert json.loads((folder / "summary.json").read_text())["status"] == "running"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "loss": 0.1}\n{"step": 18, "lo')  # past the checkpoint, and torn
    second = train(folder, *flags, num_processes=2)
    assert int(re.search(r"resumed at step (\d+) of 36", second.text)[1]) >= 15
    assert [line["step"] for line in second.lines if "loss" in line] == list(range(1, 37))
    assert second.series("samples_digest") == uninterrupted.series("samples_digest")
    np.testing.assert_allclose(second.series("loss"), uninterrupted.series("loss"), rtol=2e-3)


def test_a_finished_run_says_so_and_changes_nothing(demo):
    kept = {path: path.read_bytes() for path in demo.folder.rglob("*") if path.is_file()}
    again = train(demo.folder, "--logging_steps", "1")
    assert "already finished: top-1 accuracy" in again.text
    assert f"To start afresh: rm -r {demo.folder}" in again.text
    assert {path: path.read_bytes() for path in demo.folder.rglob("*") if path.is_file()} == kept


def test_only_two_checkpoints_are_kept_and_none_is_half(uninterrupted):
    names = [path.name for path in complete_checkpoints(uninterrupted.folder / "checkpoints")]
    assert names == ["step-00000024", "step-00000036"]
    assert sorted(os.listdir(uninterrupted.folder / "checkpoints")) == names


def test_what_resume_from_checkpoint_means(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-00000010", "step-00000009", "tmp-00000020"):
        (folder / name).mkdir(parents=True)
        (folder / name / "state.json").write_text("{}")
    assert checkpoint_to_resume(folder, "auto").name == "step-00000010"
    assert checkpoint_to_resume(folder, str(folder / "step-00000009")).name == "step-00000009"
    assert checkpoint_to_resume(tmp_path / "none", "auto") is None
    assert checkpoint_to_resume(tmp_path / "none", "never") is None
    for wrong in ("never", "no/such", str(folder / "tmp-00000020"), str(folder)):
        with pytest.raises(UserError):
            checkpoint_to_resume(folder, wrong)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

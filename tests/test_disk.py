# SPDX-License-Identifier: Apache-2.0
"""Law 2: a full disk, and a save that fails anywhere, cost a checkpoint and not the run."""

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vits
from forked import Server
from kills import curve, steps, wait_for
from vits import FAILING, one_error, vit_words

from shared.checkpoint import Checkpoints, checkpoints, damage, load_checkpoint, read_weights, tensors

data, whole, planted = vits.data, vits.whole, vits.planted


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
    """A failed save is a warning, and the next one succeeds when there is room. At the end it is an error."""
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
    """Lines of metrics.jsonl wait in memory until there is room again; those of summaries and TensorBoard are lost."""
    with mounted(tmp_path / "disk", "size=60m") as disk:
        folder, flags = disk / "run", ["--report_to", "tensorboard", "--max_steps", "40"]
        launch = server.start(vit_words(folder, data, *flags, num_processes=processes))
        wait_for(lambda: launch.ended or steps(folder) >= 2, launch)
        said = []
        with open(disk / "filler", "wb", buffering=0) as filler:
            while not launch.ended and len(said) < 3:
                for size in (1 << 20, 4096):  # first all, then what the run frees
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
    """Fill all but two million bytes, while the run writes: metrics.jsonl has room, a checkpoint does not."""
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while (free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 2_000_000) > 0:
            filler.write(bytes(min(free, 1_000_000)))


def test_a_folder_that_cannot_be_written_is_one_line(server: Server, data, tmp_path):
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        error = one_error(server.launch(vit_words(disk / "run", data)))
    assert "cannot write to" in error
    assert "Read-only file system. Give another --output_dir." in error


# Saves that fail


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
    """It fails at state.json, at the manifest and at the rename, which are rank 0's alone."""
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
    """Neither in DeepSpeed's own files nor in the next save, which is complete."""
    folder, launch = tmp_path / "run", {"num_processes": 2, "config_file": "local_zero2.yaml"}
    process = planted(FAILING_ZERO, folder, "--max_steps", "6", **launch)
    assert process.returncode == 0, process.stdout
    assert "warning: no checkpoint: [Errno 28] No space left on device (process 1)" in process.stdout
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000006"]
    assert damage(folder / "checkpoints/step-00000006") is None


# In the background


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

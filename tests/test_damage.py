# SPDX-License-Identifier: Apache-2.0
"""Law 2: a damaged checkpoint is named and the one before it taken; none can run code; other values are refused."""

import contextlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import vits
from conftest import flip
from forked import Server
from kills import curve
from torch.distributed.checkpoint.api import CheckpointException
from vits import one_error, same_until, vit_words

from shared.checkpoint import checkpoint_to_resume, damage, read_manifest, read_weights
from shared.checkpoint.retention import checksum

data, whole, copied, planted = vits.data, vits.whole, vits.copied, vits.planted


def test_damage_is_named_and_the_one_before_it_taken(server: Server, data, whole, copied):
    folder = copied / "checkpoints"
    flip(folder / "step-00000024/tensors-00000.safetensors")
    (folder / "step-00000020/manifest.json").unlink()
    for name in ("config.json", "summary.json"):  # as a power cut leaves them
        (copied / name).write_text("")
    process = server.launch(vit_words(copied, data, "--max_steps", "32"))
    assert process.returncode == 0, process.stdout
    assert "step-00000024 is damaged: tensors-00000.safetensors is not what was written" in process.stdout
    assert "step-00000020 is damaged: manifest.json is missing; trying the one before it" in process.stdout
    assert "resumed at step 16" in process.stdout
    kept = [f"quarantined-{step:08d}" for step in (20, 24)]
    kept += [f"step-{step:08d}" for step in (24, 28, 32)]  # 24: the best
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
    # Back within its own folder, then the same command again, then one without a path
    back = shutil.copytree(copied, other.with_name("back"))
    path = back / "checkpoints/step-00000016"
    for begin, end, flags in ((16, 20, [str(path)]), (20, 24, [str(path)]), (24, 28, ["auto"])):
        flags = ["--resume_from_checkpoint", *flags, "--max_steps", str(end)]
        process = server.launch(vit_words(back, data, *flags))
        assert f"resumed at step {begin}" in process.stdout, process.stdout
        ours, theirs = ([line for line in curve(run) if line[3] is not None] for run in (back, whole.folder))
        assert ours == theirs[:end]
    aside = {path.name for path in (back / "checkpoints").glob("quarantined-*")}
    assert aside == {"quarantined-00000020", "quarantined-00000024"}
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
    """It resumes at step 20, eight steps of 20 images into an epoch, and ends at step 22."""
    shutil.rmtree(copied / "checkpoints/step-00000024")
    process = planted(DECODES, copied, "--max_steps", "22", "--num_workers", "0")
    assert "resumed at step 20" in process.stdout, process.stdout
    assert 40 <= int(re.search(r"decoded: (\d+)", process.stdout)[1]) <= 60


def test_other_images_in_the_same_folder_are_refused_by_name(server: Server, data, tmp_path):
    """They would silently change the order of samples."""
    images = shutil.copytree(data[1], tmp_path / "images")
    start = vit_words(tmp_path / "run", ["--data", str(images)])
    assert server.launch([*start, "--max_steps", "1"]).returncode == 0
    shutil.copy(images / "train/digit-3/001.png", images / "train/digit-3/new.png")
    error = one_error(server.launch([*start, "--max_steps", "2"]))
    assert "training_images was 240, is 241" in error
    assert "held_out" not in error


# Malice


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["tensors-00000.safetensors", "index.json", "state.json", "manifest.json"])
def test_no_file_of_a_checkpoint_can_run_code(server: Server, data, copied, name):
    """A pickle takes its place, with the matching checksum in the manifest."""
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
    """Where its checksum differs, the checkpoint is passed over before DeepSpeed, which would unpickle it, sees it."""
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

# SPDX-License-Identifier: Apache-2.0
"""Runs of the small Vision Transformer that tests stop, damage and resume, and the one that was not interrupted."""

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Result, digits_folder, train
from forked import Server
from kills import VIT, curve, words

VIT_RECIPE = ROOT / "recipes/vit.py"


@pytest.fixture(scope="module")
def data(made_once) -> list[str]:
    """Return the flags of images that lie in one folder for all processes of the suite: a resume asks for the same."""

    def make(folder: Path) -> Result:
        return Result(subprocess.CompletedProcess([], 0, "", ""), digits_folder(folder))

    return ["--data", str(made_once("vit-images", make).folder)]


@pytest.fixture(scope="module")
def whole(server, made_once, data) -> Result:
    """Train sixty steps by one process, without a break, and keep every numbered checkpoint. Change a copy."""
    flags = [*data, *VIT, "--checkpointing_steps", "4", "--keep_checkpoints", "100"]
    return made_once("vit-whole", lambda folder: train(folder, *flags, recipe=VIT_RECIPE, server=server))


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """Return a folder with the checkpoints of steps 16, 20 and 24 of the uninterrupted run, and its curve."""
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(whole.folder / name, tmp_path / name)
    for step in (16, 20, 24):
        name = f"checkpoints/step-{step:08d}"
        shutil.copytree(whole.folder / name, tmp_path / name)
    return tmp_path


def vit_words(folder: Path, data: list[str], *flags: str, **launch) -> list[str]:
    """Return the command of these runs, as the server takes it."""
    return words(folder, *data, *VIT, "--checkpointing_steps", "4", *flags, recipe="vit", **launch)


def same_until(folder: Path, step: int, whole: Result) -> bool:
    """Return whether a run's curve is the uninterrupted one's up to this step."""
    return curve(folder) == [line for line in curve(whole.folder) if line[0] <= step]


def one_error(process: subprocess.CompletedProcess) -> str:
    """Return the only error line of a command that failed, without a traceback."""
    assert process.returncode, process.stdout
    assert "Traceback" not in process.stdout, process.stdout
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("error: ")]
    return line


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


# The first saves fail on one rank.
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

# SPDX-License-Identifier: Apache-2.0
"""Share the fixtures and command lines of the tests of tools/preflight.py."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, environment

sys.path.append(str(ROOT / "tools"))

import preflight
from machines import read_machines

MACHINES = read_machines(ROOT)
RECIPES = {path.stem: path for path in (ROOT / "recipes").glob("*.py")}
VIT = "-A abc@h100 -- recipes/vit.py"
CLUSTER = ("SLURM_", "SBATCH_", "RECIPES_", "DSDIR", "WORK", "SCRATCH", "HF_", "TORCH_", "TRITON_", "XDG_")


@pytest.fixture(autouse=True)
def login_node(monkeypatch):
    """Take away what a cluster sets, and give sys.path back."""
    for name in list(os.environ):
        if name.startswith(CLUSTER):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def run(capsys):
    """Return a function of a command's words, or of its one string: its exit status, output, errors and rows."""

    def run(*words: str) -> SimpleNamespace:
        words = words[0].split() if len(words) == 1 else words
        status = preflight.main(list(words))
        out, err = capsys.readouterr()
        assert all(line.startswith("error: ") for line in err.splitlines()), err
        return SimpleNamespace(status=status, out=out, errors=err.splitlines(), rows=rows(out))

    return run


@pytest.fixture
def collection(tmp_path, monkeypatch) -> Path:
    """Let the preflight look at a copy of what a user may edit."""
    for name in ("accelerate_configs", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    for name in ("recipes", "pyproject.toml"):
        (tmp_path / "copy" / name).symlink_to(ROOT / name)
    monkeypatch.setattr(preflight, "ROOT", tmp_path / "copy")
    return tmp_path / "copy"


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Return name -> value, origin."""
    parts = [re.split(r" {2,}", line) for line in text.splitlines()]
    return {part[0]: tuple(part[1:]) for part in parts if len(part) == 3}


def command_line(words: list[str], cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Start the program as a user does."""
    kept = {name: value for name, value in environment().items() if not name.startswith(CLUSTER)}
    command = [sys.executable, str(ROOT / "tools/preflight.py"), *words]
    return subprocess.run(command, cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=300)


def sound(machine: str, strategy: str, recipe: str, *flags: str, nodes: int = 2) -> list[str]:
    """Return the words of a job that nothing is wrong with."""
    account = f"abc@{MACHINES[machine].account}"
    own = "python" if recipe.startswith("llm") else "digits"
    data = [] if recipe == "allreduce_pi" or "--data" in flags else ["--data", own]
    return [machine, strategy, "-A", account, "--nodes", str(nodes), "--", str(RECIPES[recipe]), *data, *flags]

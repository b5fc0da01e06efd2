# SPDX-License-Identifier: Apache-2.0
"""One run per output folder; the folder's name."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment, python

from shared.config import identity_hash


@pytest.fixture
def stopped_run(tmp_path):
    """A training that holds its folder and stands still."""
    command = [sys.executable, "recipes/resnet.py", "--output_dir", str(tmp_path), "--report_to", "none"]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=out, stderr=out)
    while not (tmp_path / "summary.json").exists():
        assert process.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGSTOP)
    yield tmp_path, process
    process.kill()
    process.wait()


def test_a_second_start_in_a_folder_in_use_is_refused(stopped_run):
    folder, process = stopped_run
    before = (folder / "summary.json").read_text()
    second = python("recipes/resnet.py", "--output_dir", folder, "--report_to", "none")
    assert second.returncode == 1
    waiting, error = second.stderr.splitlines()
    assert f"in use by process {process.pid} on {socket.gethostname()}" in waiting
    assert error.startswith("error: ")
    assert f"process {process.pid} on {socket.gethostname()}" in error
    assert "--output_dir" in error
    assert (folder / "summary.json").read_text() == before


def test_the_folder_is_named_after_what_decides_the_training(tmp_path):
    """The same command finds its run again; only a flag that changes the curve changes the name."""
    flags = ["--max_steps", "1", "--global_batch_size", "256", "--report_to", "none"]
    recipe = ROOT / "recipes/resnet.py"
    first = python(recipe, *flags, cwd=tmp_path)
    other_limits = python(recipe, *flags, "--num_workers", "0", "--max_steps", "2", cwd=tmp_path)
    other_seed = python(recipe, *flags, "--seed", "1", cwd=tmp_path)
    names = [process.stdout.splitlines()[0] for process in (first, other_limits, other_seed)]
    assert names[0] == names[1] != names[2]
    assert sorted(os.listdir(tmp_path / "runs")) == sorted(name.removeprefix("runs/") for name in set(names))
    config = json.loads((tmp_path / names[0] / "config.json").read_text())
    assert names[0] == f"runs/resnet-{identity_hash(config['identity'])}"
    assert "resumed at step 1 of" in other_limits.stdout

# SPDX-License-Identifier: Apache-2.0
"""Decisions of the scripts of slurm/, without Slurm: by programs that answer as Slurm's would."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, environment

MACHINES = tomllib.loads((ROOT / "slurm/machines.toml").read_text())


MODULE = 'module() { if [[ $1 == show ]]; then echo "${SHOWN:-}" >&2; else echo "module $*"; fi; }; '


@pytest.fixture
def alone(tmp_path) -> Callable[..., str]:
    """Return a function that runs slurm/h100.slurm as Slurm's shell would, and returns its log, which may have lines
    before."""
    answers = {
        "srun": "exit 1",
        "squeue": "exit 1",
        "scontrol": 'case $2 in hostnames) echo a; echo b ;; job) echo " Requeue=1 " ;; *) echo "$@" ;; esac',
    }
    (tmp_path / "bin").mkdir()
    for name, answer in answers.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{answer}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_JOB_NODELIST": "a,b", "SLURM_GPUS_ON_NODE": "4", "RECIPES_ROOT": str(ROOT)}
    programs = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(*words: str, before: str = "", **variables: str) -> str:
        log = tmp_path / "log"
        log.write_text(before)
        base = {name: value for name, value in environment().items() if not name.startswith(("VIRTUAL", "CONDA"))}
        with log.open("a") as output:
            command = ["bash", "-c", MODULE + 'source "$0" "$@"', str(ROOT / "slurm/h100.slurm"), *words]
            variables = {**base, **slurm, "PATH": programs, "RECIPES_PREFLIGHT": "off", **variables}
            subprocess.run(command, stdout=output, stderr=output, env=variables, cwd=tmp_path, timeout=300)
        return log.read_text()

    return run


def test_a_lost_node_requeues_a_job_twice_and_no_more(alone):
    line = "interrupted (a node does not answer); requeued for restart 1\n"
    words = ["ddp", str(ROOT / "recipes/vit.py")]
    for times, requeued in ((0, True), (1, True), (2, False)):
        log = alone(*words, before=line * times, RECIPES_MODULES="")
        assert log.count("requeue 7") == requeued, log
        assert ("no process has left a traceback" in log) != requeued


def test_a_requeued_start_runs_the_sources_of_the_first(alone, tmp_path):
    recipe, kept = tmp_path / "my recipe.py", tmp_path / ".recipes-7-source"
    (tmp_path / "bin/srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit 1\n')
    recipe.write_text("first = 1\n")
    assert "requeue 7" in alone("ddp", recipe.name)
    assert (kept / "my recipe.py").read_text() == "first = 1\n"
    assert (kept / "shared/optim.py").read_text() == (ROOT / "shared/optim.py").read_text()
    log = alone("ddp", recipe.name, SLURM_RESTART_COUNT="1")
    assert "\nmy recipe.py\n" in log
    assert "edited" not in log
    recipe.write_text("first = 2\n")
    log = alone("ddp", recipe.name, SLURM_RESTART_COUNT="1")
    assert f"whose sources are run again: {kept}\n" in log
    assert f"\n{kept}/my recipe.py\n" in log
    assert f"\n{kept}/topology.yaml\n" in log
    # A start that ends for good leaves nothing.
    recipe.write_text("first = 3\n")
    alone("ddp", recipe.name, SLURM_JOB_NUM_NODES="1")
    assert not kept.exists()


def test_a_signal_before_the_trap_is_heeded_in_a_long_job(alone, tmp_path):
    (tmp_path / "bin/srun").write_text('#!/bin/bash\nls "$RECIPES_JOB_FOLDER"\nexit 1\n')
    (tmp_path / "setup.sh").write_text("kill -USR1 $$\n")
    for seconds in (600, 7200):
        end = str(int(time.time()) + seconds)
        log = alone("ddp", str(ROOT / "recipes/vit.py"), RECIPES_SETUP="setup.sh", SLURM_JOB_END_TIME=end)
        assert ("STOP" in log.split()) == (seconds == 7200)
        assert "started" in log.split()


def test_an_active_environment_wins_over_the_module(alone, tmp_path):
    loaded = f"module purge\nmodule load {MACHINES['h100']['modules']}\n"
    assert alone().startswith(loaded)
    own = tmp_path / "own/bin/python"
    own.parent.mkdir(parents=True)
    own.symlink_to("/bin/false")
    assert alone(VIRTUAL_ENV=str(tmp_path / "own")).startswith(loaded)  # without accelerate: conda's base, say
    own.unlink()
    own.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    own.chmod(0o755)
    words = ["ddp", str(ROOT / "recipes/vit.py")]
    modules = {"LOADEDMODULES": "a/1:pytorch-gpu/py3/2.8.0"}  # of the login shell, perhaps for other GPUs
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        for more in ({}, modules):
            assert alone(*words, **{name: str(tmp_path / "own")}, **more).startswith(f"python: {own}\n")
    # A module may be such an environment itself.
    shown = {"CONDA_PREFIX": str(tmp_path / "own"), "SHOWN": f"prepend-path PATH {own.parent}"}
    assert alone(**shown, **modules).startswith(loaded)
    assert "module" not in alone(**shown, **modules, VIRTUAL_ENV=str(tmp_path / "own"))
    assert "module" not in alone(RECIPES_MODULES="")
    assert alone(RECIPES_MODULES="one two").startswith("module purge\nmodule load one two\n")


def test_gloo_takes_the_interface_on_the_way_to_the_first_node(alone, tmp_path):
    """This machine's own addresses stand for those of other nodes. A name that leads nowhere, or to this node, as the
    first node's own may, is passed over."""
    (tmp_path / "bin/srun").write_text(
        "#!/bin/bash\nfor address in 127.0.0.1 $(hostname -I); do echo way $address $(interface_to $address); done\n"
        'echo "after $(interface_to no.such.host.invalid 127.0.0.1) <$(interface_to localhost)>"\nexit 1\n'
    )
    log = alone("ddp", str(ROOT / "recipes/vit.py"), RECIPES_MODULES="")
    ways = dict(re.findall(r"^way ([\d.]+) (\S*)$", log, re.M))
    assert ways.pop("127.0.0.1") == "lo"
    assert {*ways.values()} <= {*os.listdir("/sys/class/net")} - {"lo"}, log
    assert "after lo <>\n" in log


def test_words_are_split_as_the_preflight_splits_them(alone, tmp_path):
    """xargs would keep a backslash in quotes."""
    (tmp_path / "sweep.txt").write_text('--model "a\\"b" \'c d\'\n--model "a\n')
    words = ["ddp", str(ROOT / "recipes/vit.py"), "@sweep.txt"]
    (tmp_path / "bin/srun").write_text("#!/bin/bash\nprintf '<%s>' \"${@: -3}\"\nexit 1\n")
    assert '<--model><a"b><c d>' in alone(*words, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1", RECIPES_MODULES="")
    assert 'error: cannot split: --model "a' in alone(
        *words, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="2", RECIPES_MODULES=""
    )


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["h100", "ddp"], "give slurm/submit.sh MACHINE STRATEGY [sbatch options] -- RECIPE [flags]"),
        (["h100", "ddp", "--nodes=2", "--"], "no recipe follows --"),
        (["h200", "ddp", "--", "recipes/vit.py"], "no machine h200. There are: a100 h100 "),
    ],
)
def test_submit_explains_itself(words, error):
    process = subprocess.run([ROOT / "slurm/submit.sh", *words], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert error in process.stderr


def test_submit_without_python_says_so(tmp_path):
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    process = subprocess.run(
        ["/bin/bash", ROOT / "slurm/submit.sh", "h100", "ddp", "--", "x.py"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: no python to check the job with.")


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck on this machine: apt-get install shellcheck")
    scripts = [str(path) for path in sorted((ROOT / "slurm").glob("*.s*"))]
    process = subprocess.run(["shellcheck", "-x", "-P", "slurm", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout

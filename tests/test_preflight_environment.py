# SPDX-License-Identifier: Apache-2.0
"""Check what tools/preflight.py says of the place: data, caches, full file systems, versions of libraries."""

import importlib.metadata
import os
import subprocess
import sys
from types import SimpleNamespace

import preflights
import pytest
from conftest import ROOT
from preflights import RECIPES, VIT, command_line, sound

from shared.models.vit import vit_config

login_node, run = preflights.login_node, preflights.run


@pytest.mark.slow
def test_dsdir_pretrained_and_data(tmp_path, monkeypatch, run):
    words = ["h100", "ddp", "-A", "abc@h100", "--", "recipes/vit.py", "--pretrained", "org/vit"]
    (line,) = run(*words).errors
    assert line.startswith("error: --pretrained org/vit was not found: no org/vit/config.json")
    assert line.endswith("$DSDIR is not set: log in again, or export it.")
    # In a process of its own: offline from its first import, as a job is.
    (line,) = command_line(words, DSDIR=str(tmp_path)).stderr.splitlines()
    assert "DSDIR" not in line.replace(str(tmp_path), "")
    assert "error: --pretrained org/vit was not found" in line
    assert f"{tmp_path}/HuggingFace_Models/org/vit/config.json" in line
    folder = tmp_path / "HuggingFace_Models/org/vit"
    vit_config("S", 224, 16, 7, 0.0).save_pretrained(folder)
    monkeypatch.setenv("DSDIR", str(tmp_path))
    (line,) = run(*words, "--image_size", "224", "--data", "$DSDIR/images").errors
    assert line.startswith("error: $DSDIR/images was not expanded. Take the single quotes away")
    size = ["--image_size", "224"]
    assert run("h100", "fsdp", *words[2:], *size).status == 0
    memory = run("h100", "ddp", "--memory", *words[2:], *size)
    assert "Memory of a GPU, estimated: 0.1 parameters" in memory.out


def test_caches_in_a_small_home_are_refused_where_there_is_room_elsewhere(run, monkeypatch, tmp_path):
    command = f"h100 ddp {VIT}"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home/hf"))
    assert run(command).status == 0  # a laptop
    monkeypatch.setenv("WORK", str(tmp_path / "work"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    (line,) = run(command).errors
    assert line.endswith(
        "lie in $HOME, which holds 3 GB. Write into ~/.bashrc: export HF_HOME=$WORK/.cache/huggingface"
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "home/triton"))
    remedies = run(command).errors[0].partition("export ")[2].split()
    launch = (ROOT / "slurm/launch.sh").read_text()
    assert len(remedies) == 2
    for name, folder in (remedy.split("=") for remedy in remedies):
        assert f"{name}=${{{name}:-{folder}}}" in launch  # the folder that the job takes
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "home/ops"))
    assert any("TORCH_EXTENSIONS_DIR lies in $HOME" in line for line in run(command).errors)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("SCRATCH")
    assert "HF_HOME, TRITON_CACHE_DIR lie in $HOME" in run(command).errors[0]
    monkeypatch.delenv("WORK")
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    assert "HF_HOME, TORCH_HOME lie in $HOME" in run(command).errors[0]
    (tmp_path / "home").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "home/hf").symlink_to(tmp_path / "scratch")  # as many do with ~/.cache
    (tmp_path / "home/.cache").symlink_to(tmp_path / "scratch")
    assert run(command).status == 0


def test_full_file_systems(run, monkeypatch, tmp_path):
    real, command = os.statvfs(tmp_path), f"h100 ddp {VIT} --output_dir {tmp_path}/new/run"
    state = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
    full = {"f_blocks": 1000, "f_bfree": 50, "f_bavail": 30, "f_files": 10**6, "f_ffree": 500_000}
    full |= {"f_favail": 500_000, "f_frsize": 2**20}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**state | full))
    (line,) = run(command).errors
    assert line.startswith(f"error: 97% of the disk of {tmp_path} is used, and a run may need more than the rest.")
    assert line.endswith("Remove files, change --output_dir, or RECIPES_PREFLIGHT_SKIP=quotas.")
    # The same share of a petabyte leaves 30 TB.
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**state | full | {"f_frsize": 2**40}))
    assert run(command).status == 0
    few = {"f_bavail": 90, "f_ffree": 1, "f_favail": 1}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**state | full | few))
    assert "100% of the inodes of" in run(command).errors[0]


def test_quotas_of_lustre(run, monkeypatch, tmp_path):
    """Answer as Lustre's manual shows the output of `lfs quota -q` and `lfs project -d`."""
    tool = tmp_path / "bin/lfs"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/bash\n"
        'if [[ $1 == project ]]; then echo " 4242 P $3"; exit; fi\n'
        'if [[ $3 == -p && $4 == 4242 ]]; then echo "$5 90 0 100 - 499000* 450000 500000 -"; exit; fi\n'
        'echo "$5 90 0 0 - 7 0 0 -"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    command = f"h100 ddp {VIT} --output_dir {tmp_path}/run"
    (line,) = run(command).errors
    assert f"100% of the inodes quota (p 4242) of {tmp_path} is used, and" in line
    tool.write_text(tool.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\necho $* >>{tmp_path}/asked\n"))
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("".join(f"--output_dir {tmp_path}/{name}\n" for name in "abc"))
    assert len(run(f"h100 ddp --array=1-3 {VIT} @{sweep}").errors) == 1
    assert len((tmp_path / "asked").read_text().splitlines()) == 4  # once for all, the project and three quotas

    def late(*_, **__):
        raise subprocess.TimeoutExpired("lfs", 5)

    monkeypatch.setattr(subprocess, "run", late)
    job = run(command)
    assert job.status == 0
    assert f"warning: lfs does not tell the quotas of {tmp_path}: TimeoutExpired." in job.out


def test_versions_below_the_bounds(run, monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"torch": "2.7.1+cu126", "transformers": "5.9.0"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    errors = "\n".join(run(f"h100 zero1 {VIT}").errors)
    assert "error: torch 2.7.1+cu126 is not >=2.8. Load a newer module, or pip install 'torch>=2.8'." in errors
    assert "error: transformers 5.9.0 is not >=5.17." in errors  # the recipe's own bound
    assert "error: deepspeed is not installed." in errors
    assert "error: Python 3.10.4 is not >=3.11. Load another module." in errors


def test_bounds_are_those_of_the_recipe_itself(run, monkeypatch, tmp_path):
    """An older transformers, as a module of Jean Zay has it: only the Vision Transformer asks for a newer one."""
    folder = tmp_path / "transformers-4.57.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    for name in ("resnet", "resnet_webdataset", "resnet_hf_datasets", "allreduce_pi"):
        assert run(*sound("h100", "ddp", name)).errors == []
    errors = run(*sound("h100", "ddp", "vit")).errors
    remedy = "Load a newer module, or pip install 'transformers>=5.17'."
    assert f"error: transformers 4.57.1 is not >=5.17. {remedy}" in errors
    # A bound of the recipe's head, and none of pyproject.toml.
    mine = tmp_path / "mine.py"
    mine.write_text(RECIPES["allreduce_pi"].read_text().replace("transformers>=4.57", "transformers>=4.58"))
    words = sound("h100", "ddp", "allreduce_pi")
    words[words.index("--") + 1] = str(mine)
    assert "transformers 4.57.1 is not >=4.58." in run(*words).errors[0]
    mine.write_text(RECIPES["allreduce_pi"].read_text().replace('"transformers>=4.57", ', ""))
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.1\n")
    assert run(*words).errors == []


def test_nobody_trains_on_the_digits_by_oversight(run):
    words = ["h100", "ddp", "-A", "abc@h100", "--nodes=2", "--", "recipes/resnet.py"]
    assert run(*words, "--data=digits").status == 0
    (line,) = run(*words).errors
    assert line.startswith(
        "error: without --data the 2 nodes train on the demonstration's digits. Give --data FOLDER, or"
    )
    assert run(*words[:4], *words[5:]).status == 0  # one node: a demonstration

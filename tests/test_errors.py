# SPDX-License-Identifier: Apache-2.0
"""Bad input: one `error:` line with the remedy, a non-zero status, nothing lost."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, environment, launch_command, python

from shared.config import parse
from shared.errors import UserError
from shared.images import open_data
from shared.order import TrainingOrder
from shared.run.interruption import Interruption


@pytest.fixture
def refusal(server) -> Callable[..., str]:
    """The error line of a recipe that must end before it has trained a step, and print nothing else."""

    def refused(*arguments, recipe: str = "resnet", **variables: str) -> str:
        return one_line(server.python([f"recipes/{recipe}.py", *arguments], env=environment(**variables)))

    return refused


def one_line(process: subprocess.CompletedProcess) -> str:
    lines = process.stderr.splitlines()
    assert process.returncode == 1, process.stdout + process.stderr
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_signal_is_noted_where_its_words_cannot_be_written(monkeypatch):
    """The handler writes by itself."""
    full, noted = open("/dev/full", "wb", buffering=0), []  # noqa: SIM115
    monkeypatch.setattr(os, "write", lambda _, text: full.write(text))
    Interruption._note_signal(SimpleNamespace(watches=True, seen=0, note=noted.append), signal.SIGUSR1, None)
    assert noted == ["signal"]


def write(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def folder(tmp_path):
    """Two classes in train/ and val/; a refusal must come before any image is read."""
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            write(tmp_path / "data" / split / label / "1.jpg")
    return tmp_path / "data"


# The real command, one line and its status


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr", "0.1"], ["unknown flag --lr.", "--learning_rate"]),
        (["--learning_rat", "0.1"], ["unknown flag --learning_rat.", "--learning_rate"]),
        (["--data", "no/such/folder"], ["no/such/folder does not exist", "digits"]),
        (["--global_batch_size", "65", "--gradient_accumulation_steps", "2"], ["does not divide", "64 or 66"]),
        (["--sync_batch_norm"], ["--sync_batch_norm needs GPUs", "--norm group"]),
        (["--report_to", "aim"], ["aim is not installed", "pip install aim"]),
        (["--on_nonfinite", "skip"], ["batch norm's statistics", "--norm group"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_a_command_that_cannot_work_is_refused_in_one_line(refusal, tmp_path, arguments, words):
    line = refusal("--output_dir", tmp_path / "run", *arguments)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_fp16_on_cpu_is_refused(refusal, tmp_path):
    line = refusal("--output_dir", tmp_path / "run", ACCELERATE_MIXED_PRECISION="fp16", CUDA_VISIBLE_DEVICES="-1")
    assert "fp16 needs a GPU" in line
    assert "bf16" in line
    assert not (tmp_path / "run").exists()


def test_an_output_folder_below_a_file_is_refused(refusal, tmp_path):
    write(tmp_path / "file", "precious")
    line = refusal("--output_dir", tmp_path / "file/run")
    assert "cannot write to" in line
    assert "--output_dir" in line
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_under_the_launcher_the_line_comes_first_and_ends_what_torchrun_adds(processes):
    words = launch_command(num_processes=processes)
    process = python(*words, "recipes/allreduce_pi.py", "--report_to", "none")
    first, *_, last, border = process.stderr.splitlines()
    line = "error: unknown flag --report_to. The nearest is --help; `--help` lists every flag."
    assert (process.returncode, first, last.strip(), set(border)) == (1, line, f"traceback : {line}", {"="})
    assert process.stderr.count("error: ") == 2, process.stderr
    assert process.stderr.count("Traceback") == 1  # the launcher's


def test_the_configuration_of_another_run_is_refused_by_name_and_kept(refusal, demo, tmp_path):
    folder = shutil.copytree(demo.folder, tmp_path / "demo")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}
    line = refusal("--output_dir", folder, "--learning_rate", "0.2", "--seed", "3")
    assert "learning_rate was 0.1, is 0.2" in line
    assert "seed was 0, is 3" in line
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "lock"}


# The rules behind the lines


def test_a_global_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"100 training samples do not fill .* Give --global_batch_size 100 or less"):
        TrainingOrder(100, 128, 128, 0, 1, seed=0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch_size", "8"], ["--global_batch_size"]),
        (["--per_device_train_batch_size=8"], ["--global_batch_size"]),
        (["--epoch", "1"], ["unknown flag --epoch.", "--epochs"]),
        (["--wieght_decay", "1"], ["--weight_decay"]),
        (["--no_such_thing_at_all"], ["unknown flag"]),
        (["stray"], ["stray"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--epochs", "0"], ["--epochs 0", "from 1"]),
        (["--learning_rate", "nan"], ["--learning_rate nan"]),
        (["--label_smoothing", "1.5"], ["--label_smoothing 1.5", "from 0 to 1"]),
        (["--learning_rate"], ["--learning_rate"]),
        (["--model", "resnet19"], ["resnet19", "resnet18"]),
        (["--channels_last", "perhaps"], ["--channels_last"]),
    ],
    ids=str,
)
def test_the_parser_names_the_flag_and_a_remedy(arguments, words, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    with pytest.raises(UserError) as caught:
        parse(*importlib.import_module("resnet").CONFIGS, arguments=arguments)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: [p.unlink() for p in data.rglob("train/cat/*")], ["train/cat", "holds no images"]),
        (lambda data: write(data / "val/bird/1.jpg"), ["bird", "held-out images only"]),
        (lambda data: write(data / "train/bird/1.jpg"), ["bird", "training images only"]),
        (lambda data: (data / "val").rename(data / "held"), ["no held-out images", "--val_fraction"]),
        (lambda data: (data / "train").rename(data / "training set"), ["no train/"]),
        (lambda data: write(data / "test/cat/1.jpg"), ["val and test"]),
        (
            lambda data: (data / "train/cat").rename(data / "cat") and (data / "train/dog").rename(data / "dog"),
            ["train"],
        ),
    ],
)
def test_a_data_folder_that_contradicts_itself_is_refused(folder, change, words):
    change(folder)
    with pytest.raises(UserError) as caught:
        open_data(str(folder), 0.0, seed=0)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["path,label,split"]),
        ("file,class\na.jpg,cat\n", ["path,label,split"]),
        ("path,label,split\nmissing.jpg,cat,train\n", ["missing.jpg", "does not exist"]),
        ("path,label,split\n1.jpg,cat,trian\n", ["trian", "train"]),
        ("path,label,split\n1.jpg,cat,train\n", ["no row with the split val"]),
        ("path,label,split\n1.jpg,cat,train\n2.jpg,dog,val\n", ["cat", "training images only"]),
        ("path,label\n1.jpg,cat\n2.jpg,dog\n", ["--val_fraction"]),
        ("path,label\n1.jpg,cat\n", ["one class, cat"]),
        ("path,label,split\n1.jpg,,train\n", ["line 2"]),
    ],
)
def test_a_csv_that_contradicts_itself_is_refused(tmp_path, text, words):
    write(tmp_path / "1.jpg")
    write(tmp_path / "2.jpg")
    write(tmp_path / "list.csv", text)
    with pytest.raises(UserError) as caught:
        open_data(str(tmp_path / "list.csv"), 0.0, seed=0)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("path", ["", "empty", "file.txt"])
def test_data_that_is_not_there_is_refused(tmp_path, path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "file.txt")
    with pytest.raises(UserError):
        open_data(str(tmp_path / path), 0.5, seed=0) if path else open_data("", 0.5, seed=0)


def test_a_fraction_beside_an_existing_split_is_refused(folder):
    for data in ("digits", str(folder)):
        with pytest.raises(UserError, match="--val_fraction"):
            open_data(data, 0.1, seed=0)


# Strategies: what cannot be split, or is launched in another way than the recipe knows

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as the launcher passes a YAML on
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


@pytest.mark.parametrize(
    ("recipe", "arguments", "variables", "words"),
    [
        ("vit_tp", ["--tensor_parallel_size", "3"], {}, ["3 does not divide the 4 heads", "--model"]),
        ("vit_tp", [], {}, ["1 process", "--tensor_parallel_size 2", "--num_processes"]),
        ("vit_tp", [], ZERO, ["vit_tp.py does not run under zero3", "local_fsdp.yaml"]),
        ("vit_tp", [], {"ACCELERATE_MIXED_PRECISION": "fp16"}, ["fp16", "bf16"]),
        ("vit_pp", ["--pipeline_parallel_size", "7"], {}, ["exceeds the 6 blocks"]),
        ("vit_pp", ["--pipeline_parallel_size", "4", "--pipeline_chunks", "2"], {}, ["4 or more"]),
        ("vit_pp", ["--pipeline_chunks", "7"], {}, ["do not divide", "--pipeline_chunks"]),
        ("vit_pp", [], FSDP, ["vit_pp.py does not run under fsdp", "local_ddp.yaml"]),
        ("vit", ["--patch_size", "5"], {}, ["--image_size 32 is not a multiple of the patch size 5", "30"]),
        ("vit", [], FSDP | {"FSDP_VERSION": "1"}, ["fsdp_version: 2"]),
        ("vit", [], ZERO | {"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, ["--max_grad_norm"]),
        ("vit_fsdp", [], {}, ["vit_fsdp.py does not run under ddp", "local_hsdp.yaml"]),
        ("vit_zero", [], {}, ["vit_zero.py does not run under ddp", "local_zero3.yaml"]),
        ("resnet", [], FSDP, ["resnet.py does not run under fsdp", "local_ddp.yaml"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_split_is_refused_before_the_processes_meet(
    refusal, tmp_path, recipe, arguments, variables, words
):
    line = refusal("--output_dir", tmp_path / "run", *arguments, recipe=recipe, **variables)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_network_of_another_kind_is_refused(refusal, tmp_path):
    write(tmp_path / "other/config.json", '{"model_type": "bert"}')
    line = refusal("--pretrained", tmp_path / "other", recipe="vit")
    assert "is a bert, not a vit" in line


@pytest.mark.slow
def test_without_deepspeed_its_topologies_are_refused(tmp_path):
    """In an interpreter that sees every installed package but this one."""
    packages = Path(torch.__file__).parent.parent
    for entry in packages.iterdir():
        if not entry.name.startswith("deepspeed"):
            (tmp_path / entry.name).symlink_to(entry)
    command = [sys.executable, "-S", "recipes/vit.py", "--output_dir", str(tmp_path / "run")]
    variables = environment(PYTHONPATH=str(tmp_path), **ZERO)
    process = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert one_line(process).startswith("error: zero3 needs DeepSpeed. Install it (pip install deepspeed)")

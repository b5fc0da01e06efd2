# SPDX-License-Identifier: Apache-2.0
"""A run's words on itself: its data in the first lines, a rate that is of training alone, a bar that keeps up."""

import importlib
import re
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, Result, environment, train
from PIL import Image

from shared.images import Source, open_data
from shared.images.description import describe
from shared.images.storage import Files, Pixels
from shared.run.summary import Summary

FLAGS = ["--epochs", "2", "--global_batch_size", "256", "--image_size", "16", "--logging_steps", "3"]
FLAGS += ["--norm", "group", "--learning_rate", "0.02", "--report_to", "none", "--num_workers", "1"]
PAUSE = 2  # seconds
# resnet.py with a slow start and slow evaluations, whose standard error is a terminal; what it shows goes to a file.
SLOW = f"""
import os, sys, termios, threading, time
import resnet

def slowly(function):
    def call(*arguments):
        time.sleep({PAUSE})
        return function(*arguments)
    return call

terminal, other = os.openpty()
termios.tcsetwinsize(terminal, (40, 200))
os.dup2(other, 2)
shown = open(os.path.join(sys.argv[sys.argv.index("--output_dir") + 1] + ".shown"), "wb", buffering=0)

def copy():
    while True:
        shown.write(os.read(terminal, 1024))

threading.Thread(target=copy, daemon=True).start()
resnet.build_model, resnet.evaluate = slowly(resnet.build_model), slowly(resnet.evaluate)
resnet.main(*resnet.parse(*resnet.CONFIGS))
time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def slow(server, tmp_path_factory) -> Result:
    folder = tmp_path_factory.mktemp("output")
    (folder / "slow.py").write_text(SLOW)
    return train(folder / "run", *FLAGS, recipe=folder / "slow.py", server=server)


def test_the_first_lines_say_what_is_trained_on(slow):
    lines = slow.process.stdout.splitlines()
    lines = lines[lines.index(str(slow.folder)) :]  # a line on the shortened warmup may come before
    assert lines[:6] == [
        str(slow.folder),
        "training: 1,437 images, 10 classes, 32 x 32 pixels",
        "held out: 360 images, 10 classes, 32 x 32 pixels",
        "the network sees 16 x 16 pixels; an epoch leaves out 157 images, no full batch",
        "batch: 256 = 1 (data-parallel) x 256 (images) x 1 (accumulation)",
        "steps: 10 = 2 epochs x 5",
    ]
    assert all(len(line) <= 80 for line in lines[1:])


def test_the_rate_is_of_training_without_the_start_and_the_evaluations(slow):
    """Nine steps of 256 images, in less than the whole time without a start and two evaluations of 2 s."""
    summary, rates = slow.summary, slow.series("samples_per_second")
    assert (9 * 256) / summary["samples_per_second"] < summary["seconds"] - 3 * PAUSE
    assert [line["step"] for line in slow.lines if "loss" in line] == [3, 6, 9, 10]
    seconds = [steps * 256 / rate for steps, rate in zip((2, 3, 3, 1), rates, strict=True)]
    assert sum(seconds) == pytest.approx((9 * 256) / summary["samples_per_second"], rel=0.01)
    assert all(0 <= share <= 1 for share in slow.series("data_wait_fraction"))


def test_the_bar_ends_with_the_accuracy_of_the_summary(slow):
    shown = Path(f"{slow.folder}.shown").read_text()
    accuracies = re.findall(r"accuracy=(\S+?)[,\]]", shown)
    assert accuracies[-1] == f"{slow.summary['accuracy']:.2%}"
    assert slow.series("accuracy")[0] != slow.summary["accuracy"]
    assert "10/10" in shown


def test_tf32_by_torchs_own_switch_is_recorded_and_another_run(slow):
    """A new interpreter: torch reads its variable once."""
    assert slow.config["float32_matmul_precision"] == "highest"
    assert "float32_matmul_precision" not in slow.config["identity"]
    command = [sys.executable, "recipes/resnet.py", "--output_dir", slow.folder, *FLAGS]
    tf32 = environment(TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1")
    process = subprocess.run(command, cwd=ROOT, env=tf32, capture_output=True, text=True, timeout=300)
    assert process.returncode == 1
    assert "float32_matmul_precision was None, is high" in process.stderr.splitlines()[-1]


# The description


def described(parts: tuple[Source, Source], image_size: int, steps: int | None = None) -> list[str]:
    """The opening lines, of batches of one image, but the last two, which say how many images and steps there are."""
    data = [describe(part, image_size, "pillow") for part in parts]
    position = SimpleNamespace(epoch_steps=len(parts[0]) if steps is None else steps, total_steps=0)
    summary = object.__new__(Summary)
    summary.accelerator, summary.position = SimpleNamespace(mesh=None), position
    config = SimpleNamespace(global_batch_size=1, gradient_accumulation_steps=1, epochs=1)
    *lines, _, _ = summary.opening_lines(*data, config)
    assert all(len(line) <= 80 for line in lines)
    return lines


class Large(Source):
    def fingerprint(self) -> str:
        return "not read"


def large(count: int, width: int, height: int, classes: int) -> Source:
    """As many as ImageNet's, in the place of one."""
    pixels = Pixels(np.broadcast_to(np.zeros((), dtype=np.uint8), (count, height, width, 3)))
    return Large(pixels, np.arange(count) % classes, [str(number) for number in range(classes)])


def test_photographs_for_a_small_network_have_a_hint():
    parts = large(1_281_167, 4000, 3000, 1000), large(50_000, 4000, 3000, 1000)
    assert described(parts, 32, 1_281_024) == [
        "training: 1,281,167 images, 1,000 classes, 4000 x 3000 pixels",
        "held out: 50,000 images, 1,000 classes, 4000 x 3000 pixels",
        "the network sees 32 x 32 pixels; an epoch leaves out 143 images, no full batch",
        "hint: images of 4000 x 3000 pixels lose detail there; try --image_size 224",
    ]
    assert described(parts, 224)[2:] == [
        "the network sees 224 x 224 pixels",
        "hint: 4000 x 3000 pixels are slow to decode: tools/pack.py --max_side 896",
    ]
    assert len(described(parts, 750)) == 3  # four times it, not more


@pytest.fixture
def pack(monkeypatch):
    """tools/pack.py with these arguments."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("pack")

    def call(*arguments) -> None:
        monkeypatch.setattr("sys.argv", ["pack.py", *map(str, arguments)])
        module.main(module.parse())

    return call


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_sizes_are_the_smallest_and_the_largest_that_were_seen(image_folder, tmp_path, kind, pack):
    data = image_folder
    if kind != "folder":
        pack(image_folder, tmp_path / kind, "--format", kind, "--num_workers", "1")
        data = tmp_path / kind
    lines = described(open_data(str(data), 0, 0), 32)
    assert re.fullmatch(r"training: 240 images, 10 classes, 3\d x 40 to 5\d x 40 pixels", lines[0])
    assert re.fullmatch(r"held out: 60 images, 10 classes, 5\d x 40 to 6\d x 40 pixels", lines[1])
    assert len(lines) == 3


def test_undecodable_images_have_no_size(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    files = partial(Files, str(tmp_path))
    some = Source(files(np.array([b"0.png", b"1.png", b"gone.png"])), np.array([0, 1, -1]), ["a", "b", "c"])
    none = Source(files(np.array([b"1.png"])), np.array([0]), ["a", "b", "c"])
    assert described((some, none), 32)[:2] == [
        "training: 3 images, 2 of 3 classes, 30 x 20 pixels",
        "held out: 1 images, 1 of 3 classes",
    ]


@pytest.mark.parametrize("recipe", ["resnet", "resnet_torchdata", "vit", "vit_pp", "vit_tp_by_hand", "allreduce_pi"])
def test_help_lists_each_flag_in_its_group_at_80_columns(server, recipe, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    env = server.environment | {"COLUMNS": "80"}
    text = server.python([ROOT / f"recipes/{recipe}.py", "--help"], env=env).stdout
    module = importlib.import_module(recipe)
    titles = ["settings"] if recipe == "allreduce_pi" else ["data", "model", "training", "run"]
    shown = [line for line in text.splitlines() if line in titles]
    assert shown == titles
    assert max(map(len, text.splitlines())) <= 80
    flags = re.findall(r"^  --(\w+) \[(.+)\] (\S+)$", text, re.M)
    assert {name for name, *_ in flags} == {field.name for kind in module.CONFIGS for field in fields(kind)}
    if recipe == "resnet":
        assert {("val_fraction", "0 to 0.9", "0.0"), ("epochs", "1 or more", "10"), ("output_dir", "text", "''")} <= {
            *flags
        }
        assert {("norm", "batch, group", "batch"), ("compile", "true, false", "false")} <= {*flags}

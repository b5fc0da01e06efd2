# SPDX-License-Identifier: Apache-2.0
"""Tests of what only a GPU shows: each recipe and strategy on it, half precision, exact resume, memory, DALI.

Run them by `python -m pytest tests/gpu` in one process: most of a launch is imports, so all are started at once and
share the GPU, of which they take some 60 GB.
"""

import importlib
import os
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Result, launch_command, python
from PIL import Image
from sklearn.datasets import load_sample_images

from shared.checkpoint import checkpoints, read_manifest
from shared.config import RunConfig
from shared.images import ImageConfig
from shared.images.loader import STD

STEPS = 12
QUIET = ["--logging_steps", "1", "--report_to", "none", "--num_workers", "1"]
RESNET = [*QUIET, "--learning_rate", "0.01", "--channels_last"]
VIT = [*QUIET, "--global_batch_size", "64", "--warmup_epochs", "0.5", "--learning_rate", "1e-3", "--drop_path", "0.1"]
STRATEGIES = ["cpu", "ddp", "fsdp", "zero1", "zero2", "zero3"]

# Stopped within the epoch, and resumed: recipe, topology, precision, flags.
RESUMED = {
    "resnet no": ("resnet", "ddp", "no", RESNET),
    "resnet fp16": ("resnet", "ddp", "fp16", [*RESNET, "--gradient_accumulation_steps", "2"]),
    "vit bf16": ("vit", "ddp", "bf16", VIT),
    "vit fp16": ("vit", "ddp", "fp16", [*VIT, "--max_grad_norm", "1"]),
    "vit fsdp": ("vit", "fsdp", "bf16", VIT),
    "vit zero2": ("vit", "zero2", "bf16", VIT),
}

# Three steps at 224 px in bf16: recipe, topology, flags.
LARGE = ["--image_size", "224", "--report_to", "none", "--max_steps", "3", "--num_workers", "1"]
PATCHES = [*LARGE, "--patch_size", "16"]
MEMORY = {
    "resnet50": ("resnet", "ddp", [*LARGE, "--model", "resnet50", "--global_batch_size", "128"]),
    "B ddp": ("vit", "ddp", [*PATCHES, "--model", "B", "--global_batch_size", "64"]),
    "L ddp": ("vit", "ddp", [*PATCHES, "--model", "L", "--global_batch_size", "32"]),
    "L recompute": (
        "vit",
        "ddp",
        [*PATCHES, "--model", "L", "--global_batch_size", "128", "--activation_checkpointing"],
    ),
    "L fsdp": ("vit", "fsdp", [*PATCHES, "--model", "L", "--global_batch_size", "32"]),
    "L zero2": ("vit", "zero2", [*PATCHES, "--model", "L", "--global_batch_size", "32"]),
    "L zero3": ("vit", "zero3", [*PATCHES, "--model", "L", "--global_batch_size", "32"]),
}

JPEGS = [*QUIET, "--image_size", "64", "--global_batch_size", "16", "--max_steps", "8", "--norm", "group"]


def launch(folder: Path, recipe: str, topology: str, precision: str, *flags) -> Result:
    words = launch_command(config_file=f"local_{topology}.yaml", mixed_precision=precision)
    return Result(python(*words, f"recipes/{recipe}.py", "--output_dir", folder, *flags), folder)


@pytest.fixture(scope="module")
def started(runs, photographs) -> dict:
    """Every launch of these tests, as futures."""
    pool = ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 2))
    started = {}

    def start(name: str, function: Callable, *arguments) -> None:
        started[name] = pool.submit(function, *arguments)

    def in_two(folder: Path, *words) -> Result:
        launch(folder, *words, "--max_steps", "7")
        return launch(folder, *words, "--max_steps", str(STEPS))

    for name, (recipe, topology, precision, flags) in RESUMED.items():
        background = [] if "zero" in topology else ["--async_checkpoint"]
        words = recipe, topology, precision, *flags, "--checkpointing_steps", "3", *background
        start(f"{name} in two", in_two, runs / f"{name} in two", *words)
        start(f"{name} in one", launch, runs / f"{name} in one", *words, "--max_steps", str(STEPS))
    for name, (recipe, topology, flags) in MEMORY.items():
        start(f"peak {name}", launch, runs / f"peak {name}", recipe, topology, "bf16", *flags)
        words = ["h100", topology, "--memory", "-A", "a@h100", "--gres=gpu:1", "--", f"recipes/{recipe}.py", *flags]
        start(f"estimate {name}", python, "tools/preflight.py", *words)
    for recipe in ("resnet", "resnet_dali"):
        start(f"jpegs {recipe}", launch, runs / f"jpegs {recipe}", recipe, "ddp", "no", "--data", photographs, *JPEGS)
    for name in STRATEGIES:
        start(f"vit {name}", launch, runs / f"vit {name}", "vit", name, "no", *VIT, "--max_steps", str(STEPS))
    for name in ("no", "bf16", "fp16"):
        # Under fp16 the scaler halves its scale, 65,536 at first, before a run is stopped.
        folder, spoilt = runs / f"spoilt {name}", [*VIT, "--learning_rate", "1e30", "--max_steps", "24"]
        start(f"spoilt {name}", launch, folder, "vit", "ddp", name, *spoilt)
    for path in sorted((ROOT / "recipes").glob("*.py")):
        start(f"smoke {path.stem}", python, "tools/smoke.py", path.stem)
    return started


def ended(future) -> Result:
    result = future.result()
    assert result.process.returncode == 0, result.text[-3000:]
    return result


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Class folders of JPEGs, 470 x 385."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(160):
        path = folder / ("train" if number < 128 else "val") / "ab"[number % 2] / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.roll(load_sample_images().images[number % 2], number * 7, axis=1)[:385, :470]
        Image.fromarray(pixels).save(path, quality=95)
    return folder


@pytest.mark.parametrize(("image_size", "bound"), [(224, 1), (64, 5)])  # of 64 pixels: the base decodes fewer
def test_dali_decodes_on_the_gpu_what_the_base_shows(photographs, image_size, bound, monkeypatch, capfd):
    """Mean difference a pixel, of 255."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    batches = {}
    for recipe in ("resnet", "resnet_dali"):
        module = importlib.import_module(recipe)
        accelerator = SimpleNamespace(device=torch.device("cuda"), mesh=None, is_main_process=True)
        images = ImageConfig(data=str(photographs), image_size=image_size, horizontal_flip=True)
        config = module.Config(global_batch_size=16)
        loaders = module.build_loaders(accelerator, RunConfig(num_workers=0), images, config)
        batches[recipe] = [batch for loader in loaders for batch in loader]
    for ours, theirs in zip(batches["resnet_dali"], batches["resnet"], strict=True):
        assert ours.images.device.type == "cuda"
        assert ours.digest == theirs.digest
        assert ours.labels.equal(theirs.labels)
        scale = torch.tensor(STD, device="cuda").view(3, 1, 1)
        difference = ((ours.images - theirs.images).abs() * scale).mean((1, 2, 3)).max().item()
        assert difference < bound
    print(f"DALI at {image_size} px: the last batch differs by {difference:.3f}")
    assert "DALI failed" not in capfd.readouterr().err


def test_dali_trains_on_jpegs(started):
    ours, theirs = (ended(started[f"jpegs {recipe}"]) for recipe in ("resnet_dali", "resnet"))
    assert "DALI failed" not in ours.text
    assert ours.series("samples_digest") == theirs.series("samples_digest")
    np.testing.assert_allclose(ours.series("loss")[:4], theirs.series("loss")[:4], rtol=0.05)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_in_two_starts_is_bitwise_the_run_in_one(started, name):
    """Its state written in the background, where the strategy has that. Of a ResNet the losses alone: cuDNN is free to
    choose convolutions that are not deterministic."""
    two, one = (ended(started[f"{name} in {word}"]) for word in ("two", "one"))
    assert "resumed at step 7" in two.text
    assert two.series("samples_digest") == one.series("samples_digest")
    assert two.series("loss") == one.series("loss"), np.subtract(two.series("loss"), one.series("loss"))
    if name.startswith("vit") and "zero" not in name:
        files = [read_manifest(checkpoints(run.folder / "checkpoints")[-1])["files"] for run in (two, one)]
        tensors = [{name: entry for name, entry in each.items() if name.startswith("tensors")} for each in files]
        assert tensors[0] == tensors[1]


@pytest.mark.parametrize("name", MEMORY)
def test_the_estimated_peak_is_within_a_fifth_of_the_measured_one(started, name):
    process = started[f"estimate {name}"].result()
    assert process.returncode == 0, process.stdout + process.stderr
    estimate = float(re.search(r"at most ([\d.]+) GiB at once", process.stdout)[1])
    measured = ended(started[f"peak {name}"]).summary["peak_memory_bytes"] / 2**30
    print(f"{name}: estimated {estimate:.2f} GiB, measured {measured:.2f} GiB, {estimate / measured:.3f}")
    assert estimate == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_every_strategy_has_the_losses_of_the_cpu(started, strategy):
    """In fp32, to rounding; the bound leaves room for a convolution that cuDNN computes in tf32."""
    run, cpu = ended(started[f"vit {strategy}"]), ended(started["vit cpu"])
    assert run.config["device"] == torch.cuda.get_device_name()
    difference = np.abs(np.divide(run.series("loss"), cpu.series("loss")) - 1).max()
    print(f"{strategy}: losses differ from the CPU's by {difference:.1e} at most")
    assert difference < 2e-3
    assert run.series("samples_digest") == cpu.series("samples_digest")
    assert run.series("learning_rate") == cpu.series("learning_rate")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_what_is_not_finite_stops_the_run(started, precision):
    run = started[f"spoilt {precision}"].result()
    assert run.process.returncode, run.text[-3000:]
    assert len([line for line in run.process.stderr.splitlines() if line.startswith("error: ")]) == 1, run.text[-3000:]
    assert run.summary["status"] == "running"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.py")))
def test_two_steps_of_each_recipe(started, recipe):
    process: subprocess.CompletedProcess = started[f"smoke {recipe}"].result()
    assert process.returncode == 0, process.stdout + process.stderr

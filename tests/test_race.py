# SPDX-License-Identifier: Apache-2.0
"""The race: a time budget becomes a plan of epochs, which belongs to the run; images grow by the step."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, Result, python, train
from loading import surroundings  # noqa: F401 - a fixture of every test here
from torch.nn.functional import interpolate

RECIPE = ROOT / "recipes/resnet_race.py"
# Four steps an epoch.
SMALL = ["--train_images", "128", "--global_batch_size", "32", "--image_size", "16", "--first_image_size", "8"]
SMALL += ["--norm", "group", "--num_workers", "0", "--logging_steps", "1", "--report_to", "none"]


@pytest.fixture(scope="module")
def race(surroundings):  # noqa: F811
    return importlib.import_module("resnet_race")


def raced(server, folder: Path, *flags: str, **launch) -> Result:
    return train(folder, *SMALL, *flags, recipe=RECIPE, server=server, **launch)


def test_images_grow_for_two_thirds_of_the_steps(race):
    images, config = SimpleNamespace(image_size=32), SimpleNamespace(first_image_size=16)
    sides = [race.image_size_at(step / 12, images, config) for step in range(12)]
    assert sides == [16, 16, 20, 24, 24, 24, 28, 32, 32, 32, 32, 32]
    config.first_image_size = 0
    assert {race.image_size_at(step / 12, images, config) for step in range(12)} == {32}
    images.image_size = 30  # no multiple of four
    assert race.image_size_at(1.0, images, config) == 30


def test_smaller_images_are_antialiased(race):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert race.resized(pixels, 32) is pixels
    expected = interpolate(pixels, (16, 16), mode="bilinear", antialias=True)
    assert torch.equal(race.resized(pixels, 16), expected)


@pytest.fixture(scope="module")
def planned(server, runs) -> Result:
    """Return a race that was stopped in its second epoch. A slow machine plans few epochs."""
    flags = ["--minutes", "3", "--max_steps", "6", "--ema_decay", "0.9", "--flip_test"]
    return raced(server, runs / "race", *flags)


def test_the_minutes_become_epochs_that_belong_to_the_run(planned):
    config = planned.config["config"]
    assert config["epochs"] >= 2
    assert config["warmup_epochs"] == pytest.approx(0.3 * config["epochs"])
    assert planned.config["identity"]["epochs"] == config["epochs"]
    assert f"planned: {config['epochs']} epochs of " in planned.text
    assert f"steps: {4 * config['epochs']} = {config['epochs']} epochs x 4" in planned.text
    last = planned.lines[-1]
    assert 0 <= last["flip_accuracy"] <= 1
    assert {"ema_accuracy", "ema_eval_loss", "ema_flip_accuracy"} <= {*last}


def test_a_resumed_race_keeps_its_plan_on_other_processes(server, planned):
    before = planned.config["config"]["epochs"]
    flags = ["--minutes", "3", "--max_steps", "9", "--ema_decay", "0.9", "--flip_test"]
    result = raced(server, planned.folder, *flags, num_processes=2)
    assert "planned: " not in result.text
    assert f"resumed at step 6 of {4 * before}" in result.text
    assert result.config["config"]["epochs"] == before
    assert len(result.series("loss")) == 9


def test_given_its_plan_a_race_is_the_same_on_any_topology(server, tmp_path):
    # A rate at which the loss falls: at the default one it rises to 16, and rounding grows with it.
    flags = ["--epochs", "3", "--warmup_epochs", "1", "--mixup_alpha", "0.2", "--learning_rate", "0.005"]
    one = raced(server, tmp_path / "1", *flags)
    two = raced(server, tmp_path / "2", *flags, "--gradient_accumulation_steps", "2", num_processes=2)
    np.testing.assert_allclose(two.series("loss"), one.series("loss"), rtol=1e-5)
    assert two.series("samples_digest") == one.series("samples_digest")
    assert two.series("accuracy") == pytest.approx(one.series("accuracy"), abs=1.5 / 360)


def test_a_measurement_leaves_no_trace_in_the_race(server, tmp_path):
    """The same losses with the plan's epochs given as with a measurement."""
    measured = raced(server, tmp_path / "measured", "--minutes", "3", "--max_steps", "3")
    config = measured.config["config"]
    flags = ["--epochs", str(config["epochs"]), "--warmup_epochs", str(config["warmup_epochs"]), "--max_steps", "3"]
    assert raced(server, tmp_path / "given", *flags).series("loss") == measured.series("loss")


REFUSED = {
    "--minutes 0.01": "--minutes 0.01 is too short: an epoch takes ",
    "--minutes -1": "--minutes -1.0 is out of range.",
    "--first_image_size 4": "--first_image_size 4 is not within 8 to --image_size 16. Change it.",
    "--first_image_size 20": "--first_image_size 20 is not within 8 to --image_size 16. Change it.",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(server, tmp_path, flags):
    words = [*SMALL, *flags.split(), "--output_dir", str(tmp_path / "run")]
    process = python(RECIPE, *words, server=server)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"error: {REFUSED[flags]}")
    assert not (tmp_path / "run").exists()

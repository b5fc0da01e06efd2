# SPDX-License-Identifier: Apache-2.0
"""Law 2: a run that is killed at any moment resumes as if it had not been."""

import random

import numpy as np
import pytest
import vits
from conftest import ROOT, train
from forked import Server
from kills import IN_BACKGROUND, KILLED, QUIET, VIT, difference, kill_often, kill_once, words
from vits import VIT_RECIPE, vit_words

from shared.checkpoint import checkpoints, damage

data, whole = vits.data, vits.whole


@pytest.mark.parametrize("name", KILLED)
def test_a_run_killed_anywhere_ends_bitwise_as_one_that_was_not(server: Server, runs, data, name):
    kills, recipe, flags, launch = KILLED[name]
    flags = [*data, *flags, "--checkpointing_steps", "4"]
    background = ["--async_checkpoint"] if name in IN_BACKGROUND else []  # the reference saves in the loop
    folder, path = runs / f"killed-{name.replace(' ', '-')}", ROOT / f"recipes/{recipe}.py"
    reference = train(runs / f"whole-{folder.name}", *flags, recipe=path, server=server, **launch)
    chance = random.Random(name)
    start = words(folder, *flags, *background, recipe=recipe, **launch)
    counts = kill_often(server, start, folder, kills, chance, print)
    assert counts.total() == kills
    assert difference(folder, reference.folder) is None


@pytest.mark.parametrize("recipe", ["resnet_webdataset", "resnet_torchdata"])
def test_other_loaders_resume_where_they_were_killed(server: Server, runs, recipe):
    flags = [*QUIET, "--learning_rate", "0.001", "--norm", "group", "--image_size", "16", "--global_batch_size", "32"]
    flags += ["--max_steps", "9", "--checkpointing_steps", "3"]
    folder = runs / f"killed-{recipe}"
    reference = train(runs / f"whole-{folder.name}", *flags, recipe=ROOT / f"recipes/{recipe}.py", server=server)
    start, chance = words(folder, *flags, recipe=recipe), random.Random(recipe)
    assert kill_once(server, start, folder, "all workers", "tmp-00000006", chance)
    assert server.launch(start).returncode == 0
    assert difference(folder, reference.folder) is None


def test_a_run_resumes_on_every_topology(server: Server, runs, data, whole):
    """Its losses are those of one process up to rounding, which grows with the steps, as in test_strategies.py."""
    folder = runs / "topologies"
    chain = {6: ("ddp", 4), 12: ("fsdp", 5), 18: ("ddp", 1), 24: ("fsdp", 2)}
    for step, (strategy, processes) in chain.items():
        launch = {"num_processes": processes, "config_file": f"local_{strategy}.yaml", "recipe": VIT_RECIPE}
        run = train(folder, *data, *VIT, "--max_steps", str(step), server=server, **launch)
        assert run.summary["world_size"] == processes
    losses = [line["loss"] for line in whole.lines if "loss" in line][:24]
    np.testing.assert_allclose(run.series("loss"), losses, rtol=1e-5)
    assert run.series("samples_digest") == whole.series("samples_digest")[:24]


def test_checkpoints_in_the_background_are_the_same(server: Server, runs, data, whole):
    """A kill within a write leaves the checkpoint before it the newest."""
    folder = runs / "background"
    start = vit_words(folder, data, "--async_checkpoint")
    assert kill_once(server, start, folder, "all workers", "tmp-*", random.Random(1))
    assert not [damage(path) for path in checkpoints(folder / "checkpoints") if damage(path)]
    assert kill_once(server, start, folder, "launcher", "tmp-*/tensors-*", random.Random(2))
    process = server.launch(start)
    assert process.returncode == 0, process.stdout
    assert difference(folder, whole.folder) is None

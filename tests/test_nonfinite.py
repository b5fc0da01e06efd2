# SPDX-License-Identifier: Apache-2.0
"""A loss that is not a number stops the run before the update, or skips it, on all processes alike."""

import json
import re

import numpy as np
import pytest
import vits
from kills import curve
from vits import one_error

from shared.checkpoint import checkpoints, read_weights

data, whole, planted = vits.data, vits.whole, vits.planted


NAN = """
count, right = 0, recipe.cross_entropy
def cross_entropy(logits, labels, **options):
    global count
    count += torch.is_grad_enabled()
    loss = right(logits, labels, **options)
    print(f"forward {count}", flush=True)
    return loss {spoilt} if count == 6 and rank == 1 else loss
recipe.cross_entropy = cross_entropy
"""


@pytest.mark.quick
def test_a_loss_that_is_no_number_stops_before_the_update(planted, runs, whole, tmp_path):
    """Its gradients are finite here, as those of the logarithm of a constant are, and the step is the run's last."""
    folder = tmp_path / "run"
    error = one_error(planted(NAN.replace("{spoilt}", '+ float("nan")'), folder, "--max_steps", "6", num_processes=2))
    record = json.loads((folder / "nonfinite.json").read_text())
    newest = checkpoints(folder / "checkpoints")[-1]
    samples = record["processes"][1]["samples"]
    assert record["step"] == 6
    assert [len(one["samples"]) for one in record["processes"]] == [10, 10]
    assert "error: step 6 has" in error
    assert ", ".join(map(str, sorted(samples))) in error
    assert str(newest) in error
    assert newest.name == "step-00000004"
    assert all(tensor.isfinite().all() for tensor in read_weights(newest).values())
    again = planted("", folder, "--max_steps", "8", num_processes=2)  # with the cause fixed
    assert "resumed at step 4" in again.stdout, again.stdout
    losses = [line[3] for line in curve(folder) if line[3] is not None]
    np.testing.assert_allclose(losses, whole.series("loss")[:8], rtol=1e-5)


def test_the_loop_reads_a_step_when_it_has_begun_the_next(planted, tmp_path):
    """Only step 12 is logged: the loop does not wait for the device at 6, and both processes stop after 7."""
    folder, flags = tmp_path / "run", ["--max_steps", "12", "--logging_steps", "12"]
    process = planted(NAN.replace("{spoilt}", '+ float("nan")'), folder, *flags, num_processes=2)
    assert "error: step 6 has the losses nan and the gradient norm nan, from samples" in one_error(process)
    assert [process.stdout.count(f"forward {step}\n") for step in (6, 7, 8)] == [2, 2, 0]
    newest = checkpoints(folder / "checkpoints")[-1]
    assert newest.name == "step-00000004"
    assert all(tensor.isfinite().all() for tensor in read_weights(newest).values())


def test_a_pipelines_loss_that_is_no_number_stops_all_stages(planted, tmp_path):
    """Only the last stage computes it."""
    flags = ["--max_steps", "6", "--pipeline_chunks", "5"]
    launch = {"num_processes": 2, "config_file": "local_pp.yaml", "recipe": "vit_pp"}
    error = one_error(planted(NAN.replace("{spoilt}", '+ float("nan")'), tmp_path / "run", *flags, **launch))
    assert re.search(r"error: step [12] has the losses nan and the gradient norm nan", error)


WATCHED = """
models, weights = [], []
parallelize, end_step = recipe.parallelize, recipe.Run.end_step
def kept(*arguments):
    models[:] = parallelize(*arguments)
    return models
def compared(run, *arguments):
    end_step(run, *arguments)
    weights.append([parameter.detach().clone() for parameter in models[0].parameters()])
    if rank == 0:
        print(f"step {run.step} unchanged: {len(weights) > 1 and all(map(torch.equal, *weights[-2:]))}", flush=True)
recipe.parallelize, recipe.Run.end_step = kept, compared
"""


def test_a_step_that_is_skipped_leaves_the_weights_alone(planted, tmp_path):
    folder = tmp_path / "run"
    flags = ["--max_steps", "8", "--on_nonfinite", "skip"]
    process = planted(NAN.replace("{spoilt}", '* float("nan")') + WATCHED, folder, *flags, num_processes=2)
    assert process.returncode == 0, process.stdout
    assert "step 6 unchanged: True" in process.stdout
    assert "step 5 unchanged: False" in process.stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (skipped,) = [line for line in lines if line.get("skipped")]
    assert skipped["step"] == 6
    assert skipped["loss"] is None
    assert skipped["grad_norm"] is None
    assert [line["step"] for line in lines if line.get("loss")] == [1, 2, 3, 4, 5, 7, 8]
    assert all(tensor.isfinite().all() for tensor in read_weights(folder / "checkpoints/step-00000008").values())

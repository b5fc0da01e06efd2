# SPDX-License-Identifier: Apache-2.0
"""The lessons on bare collectives: pi, and tensor and data parallelism by hand."""

import re

import numpy as np
import pytest
from conftest import ROOT, launch_command, python, train

FLAGS = ["--max_steps", "20", "--logging_steps", "1", "--report_to", "none", "--num_workers", "1", "--epochs", "2"]
FLAGS += ["--warmup_epochs", "0.2", "--learning_rate", "1e-3"]
BY_HAND = ROOT / "recipes/vit_tp_by_hand.py"


def test_pi_does_not_depend_on_the_number_of_processes():
    recipe = ROOT / "recipes/allreduce_pi.py"
    texts = [python(recipe).stdout, python(*launch_command(4), recipe).stdout]
    values = [float(re.search(r"3\.\d+", text)[0]) for text in texts]
    assert values[0] == pytest.approx(np.pi, abs=1e-10)
    assert values[1] == pytest.approx(values[0], abs=1e-12)
    assert "error: " in python(recipe, "--intervals", "0").stderr


@pytest.fixture(scope="module")
def plain(runs):
    return train(runs / "by-hand-reference", *FLAGS, recipe=ROOT / "recipes/vit.py")


@pytest.mark.parametrize(
    ("processes", "flags"),
    [(2, []), (4, []), (4, ["--tensor_parallel_size", "4", "--gradient_accumulation_steps", "2"])],
)
def test_by_hand_the_losses_are_those_of_one_process(runs, plain, processes, flags):
    folder = runs / f"by-hand-{processes}-{len(flags)}"
    launch = {"num_processes": processes, "config_file": "local_tp.yaml"}
    result = train(folder, *FLAGS, *flags, recipe=BY_HAND, **launch)
    losses, reference = result.series("loss"), plain.series("loss")
    np.testing.assert_allclose(losses[:5], reference[:5], rtol=1e-5)
    np.testing.assert_allclose(losses, reference, rtol=1e-4)
    np.testing.assert_allclose(result.series("grad_norm"), plain.series("grad_norm"), rtol=1e-3)
    assert result.series("samples_digest") == plain.series("samples_digest")
    assert result.lines[-1]["accuracy"] == pytest.approx(plain.lines[-1]["accuracy"], abs=1.5 / 360)


@pytest.mark.parametrize("processes", [2, 4])
def test_each_piece_by_hand_is_its_dense_layer(processes):
    process = python(*launch_command(processes, "local_tp.yaml"), BY_HAND, "--check")
    assert process.returncode == 0, process.stdout + process.stderr
    rows = re.findall(r"(?m)^(\w.{20,}?) +(\d\.\de[+-]\d+)$", process.stdout)
    titles = " ".join(title for title, _ in rows)
    assert len(rows) == 9
    for word in ("column", "row", "MLP", "attention", "embedding", "cross-entropy", "data parallelism", "DTensor"):
        assert word in titles
    assert all(float(value) <= 1e-5 for _, value in rows)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tensor_parallel_size", "3"], "3"),
        (["--checkpointing_steps", "5", "--tensor_parallel_size", "1"], "vit_tp.py"),
    ],
)
def test_what_cannot_be_cut_by_hand_is_refused(tmp_path, flags, words):
    process = python(BY_HAND, *flags, "--output_dir", tmp_path / "run")
    (error,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1
    assert words in error
    assert not (tmp_path / "run").exists()

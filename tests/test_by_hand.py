# SPDX-License-Identifier: Apache-2.0
"""The lessons on bare collectives: pi, and tensor and data parallelism by hand."""

import re

import golden
import numpy as np
import pytest
from conftest import ROOT, launch_command, python, train

from shared.checkpoint import checkpoints, read_weights

FLAGS = ["--max_steps", "12", "--logging_steps", "1", "--report_to", "none", "--num_workers", "1", "--epochs", "1"]
FLAGS += ["--warmup_epochs", "0.1", "--learning_rate", "1e-3", "--global_batch_size", "32"]
BY_HAND = ROOT / "recipes/vit_tp_by_hand.py"
# What a checkpoint says of vit.py or of this recipe, and not of the other.
OF_ONE_RECIPE = "recipe,init,check,pretrained,drop_path,compile,activation_checkpointing"


def test_pi_does_not_depend_on_the_number_of_processes(server):
    recipe = ROOT / "recipes/allreduce_pi.py"
    texts = [python(recipe).stdout, python(*launch_command(4), recipe, server=server).stdout]
    values = [float(re.search(r"3\.\d+", text)[0]) for text in texts]
    assert values[0] == pytest.approx(np.pi, abs=1e-10)
    assert values[1] == pytest.approx(values[0], abs=1e-12)
    assert "error: " in python(recipe, "--intervals", "0", server=server).stderr


@pytest.fixture(scope="module")
def plain(server, runs):
    return train(runs / "by-hand-reference", *FLAGS, recipe=ROOT / "recipes/vit.py", server=server)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "processes", "flags"),
    [
        ("tp 2", 2, []),
        ("tp 2 x ddp 2", 4, []),
        ("tp 4, accumulation 2", 4, ["--tensor_parallel_size", "4", "--gradient_accumulation_steps", "2"]),
    ],
)
def test_by_hand_the_losses_are_those_of_one_process(server, runs, plain, name, processes, flags):
    folder = runs / f"by-hand {name}"
    launch = {"num_processes": processes, "config_file": "local_tp.yaml", "server": server}
    result = train(folder, *FLAGS, *flags, recipe=BY_HAND, **launch)
    losses, reference = result.series("loss"), plain.series("loss")
    np.testing.assert_allclose(losses[:5], reference[:5], rtol=1e-5)
    np.testing.assert_allclose(losses, reference, rtol=1e-4)
    np.testing.assert_allclose(result.series("grad_norm"), plain.series("grad_norm"), rtol=1e-3)
    assert result.series("samples_digest") == plain.series("samples_digest")
    assert result.lines[-1]["accuracy"] == pytest.approx(plain.lines[-1]["accuracy"], abs=1.5 / 360)
    golden.compare(f"vit_tp_by_hand {name}", result)


@pytest.mark.parametrize("processes", [2, 4])
def test_each_piece_by_hand_is_its_dense_layer(server, processes):
    process = python(*launch_command(processes, "local_tp.yaml"), BY_HAND, "--check", server=server)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = re.findall(r"(?m)^(\w.{20,}?) +(\d\.\de[+-]\d+)$", process.stdout)
    titles = " ".join(title for title, _ in rows)
    assert len(rows) == 9
    for word in ("column", "row", "MLP", "attention", "embedding", "cross-entropy", "data parallelism", "DTensor"):
        assert word in titles
    assert all(float(value) <= 1e-5 for _, value in rows)


def test_what_is_saved_by_hand_resumes_by_hand_and_under_other_strategies(server, runs, plain):
    """On four processes to step 4, on two to step 8, without any to the end, in one folder each; and vit.py's own
    checkpoint under this recipe."""
    flags = [*FLAGS[2:], "--max_steps"]
    by_hand = {"recipe": BY_HAND, "config_file": "local_tp.yaml", "server": server}
    vit = {"recipe": ROOT / "recipes/vit.py", "server": server}
    wide = ["--tensor_parallel_size", "4"]
    train(runs / "moved", *flags, "4", *wide, "--async_checkpoint", **by_hand, num_processes=4)
    second = train(runs / "moved", *flags, "8", **by_hand, num_processes=2)
    assert "resumed at step 4" in second.text
    losses = second.series("loss")
    np.testing.assert_allclose(losses, plain.series("loss")[:8], rtol=1e-5)
    path = checkpoints(second.folder / "checkpoints")[-1]

    def moved(path, folder, **launch):
        onward = ["--resume_from_checkpoint", str(path), "--resume_override", OF_ONE_RECIPE]
        return train(runs / folder, *flags, "12", *onward, **launch)

    assert set(read_weights(path)) == set(read_weights(checkpoints(plain.folder / "checkpoints")[-1]))
    last = moved(path, "moved-to-vit", **vit)
    np.testing.assert_allclose(last.series("loss"), plain.series("loss")[8:], rtol=1e-4)
    first = train(runs / "moved-from-vit", *flags, "4", **vit)
    path = checkpoints(first.folder / "checkpoints")[-1]
    last = moved(path, "moved-by-hand", **by_hand, num_processes=2)
    np.testing.assert_allclose(last.series("loss"), plain.series("loss")[4:], rtol=1e-4)


def test_what_cannot_be_cut_by_hand_is_refused(server, tmp_path):
    words = [BY_HAND, "--tensor_parallel_size", "3", "--output_dir", tmp_path / "run"]
    process = python(*words, server=server)
    (error,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1
    assert "--tensor_parallel_size 3" in error
    assert not (tmp_path / "run").exists()

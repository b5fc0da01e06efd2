# SPDX-License-Identifier: Apache-2.0
"""A second modality in the same loop: samples of unequal weight give the loss of one process on any topology."""

import numpy as np
import pytest
from conftest import ROOT, Result, environment, launch_command, train

from shared.checkpoint import checkpoints, read_manifest, read_weights

TOKENS = ROOT / "tests/tokens.py"
FLAGS = ["--logging_steps", "1", "--report_to", "none", "--checkpointing_steps", "3"]


@pytest.fixture(scope="module")
def alone(server, tmp_path_factory) -> Result:
    return train(tmp_path_factory.mktemp("tokens") / "run", *FLAGS, recipe=TOKENS, server=server)


# 16 parts of one sequence each: some micro-batches have no counted token.
@pytest.mark.quick
@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (1, 16), (2, 1), (4, 4)])
def test_the_losses_are_those_of_one_process(server, tmp_path, alone, processes, accumulation):
    flags = [*FLAGS, "--gradient_accumulation_steps", str(accumulation)]
    run = train(tmp_path / "run", *flags, recipe=TOKENS, server=server, num_processes=processes)
    assert len(run.series("loss")) == 16
    assert run.series("samples_digest") == alone.series("samples_digest")
    np.testing.assert_allclose(run.series("loss"), alone.series("loss"), rtol=1e-6)
    np.testing.assert_allclose(run.series("nats_per_token"), alone.series("nats_per_token"), rtol=1e-6)
    assert alone.series("loss")[-1] < 0.7 * alone.series("loss")[0]  # it learns


def test_means_of_means_are_another_loss(server, tmp_path, alone):
    """The check above would see it."""
    flags = [*FLAGS, "--loss", "means", "--gradient_accumulation_steps", "4"]
    run = train(tmp_path / "run", *flags, recipe=TOKENS, server=server, num_processes=2)
    difference = np.abs(np.divide(run.series("loss"), alone.series("loss")) - 1)
    assert difference.max() > 1e-3


@pytest.mark.quick
def test_a_run_that_is_killed_resumes_bit_by_bit(server, tmp_path, alone):
    words = [*launch_command()[2:], str(TOKENS), "--output_dir", str(tmp_path / "run"), *FLAGS]
    assert server.launch(words, env=environment(TOKENS_DIE_AT="7")).returncode
    process = server.launch(words, env=environment())
    assert "resumed at step 6" in process.stdout, process.stdout
    run = Result(process, tmp_path / "run")
    assert run.series("loss") == alone.series("loss")
    ours, theirs = (read_weights(checkpoints(each.folder / "checkpoints")[-1]) for each in (run, alone))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_less_is_better_where_the_metric_says_so(alone):
    """The best checkpoint stays beside the newest two; the last line and the summary name the metric."""
    kept = {path.name: read_manifest(path) for path in checkpoints(alone.folder / "checkpoints")}
    best = min(manifest["nats_per_token"] or 9 for manifest in kept.values())
    assert best == min(alone.series("nats_per_token"))
    assert {(values["metric"], values["higher_is_better"]) for values in kept.values()} == {("nats_per_token", False)}
    assert alone.summary["nats_per_token"] == alone.series("nats_per_token")[-1]
    assert "finished: nats_per_token 1." in alone.text
    assert "training: 64 sequences" in alone.text

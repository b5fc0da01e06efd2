# SPDX-License-Identifier: Apache-2.0
"""tools/find_learning_rate.py: the rates that a recipe trains with, and what is said of its losses."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from PIL import Image

from shared.errors import UserError

TOOL, RESNET = ROOT / "tools/find_learning_rate.py", ROOT / "recipes/resnet.py"
VIT, FSDP = ROOT / "recipes/vit.py", ROOT / "accelerate_configs/local_fsdp.yaml"
RATES = np.geomspace(1e-5, 10, 100)
STEPS_A_DECADE = 99 / 6
SMALL = ["--image_size", "16", "--num_workers", "0"]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("find_learning_rate", TOOL)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


finder = load()


def losses(edge: float = 0.1, fall: float = 1.0, seed: int = 0) -> np.ndarray:
    """Return noisy losses that fall from 2.3 by `fall` around the rate 1e-3 and explode at the rate `edge`."""
    decades = np.log10(RATES)
    clean = 2.3 - fall / (1 + np.exp(-4 * (decades + 3))) + 10 ** np.minimum(4 * (decades - np.log10(edge)), 3)
    return clean + np.random.default_rng(seed).normal(0, 0.05, len(RATES))


def suggest(*curves: np.ndarray) -> tuple[float | None, str]:
    return finder.suggest([finder.smooth(curve, RATES) for curve in curves], RATES)


# The answer


def test_smoothing_removes_noise_and_has_no_lag():
    inner = slice(15, -15)  # more than four standard deviations from the ends
    line = 3 - 0.1 * np.log10(RATES)
    np.testing.assert_allclose(finder.smooth(line, RATES)[inner], line[inner], atol=1e-4)
    noise = np.random.default_rng(0).normal(0, 0.1, 100)
    # What a Gaussian kernel of this many steps leaves of white noise: 1 / (2 sqrt(pi) steps) of its variance.
    left = 0.1 / np.sqrt(2 * np.sqrt(np.pi) * 0.2 * STEPS_A_DECADE)
    assert 0.7 * left < finder.smooth(2 + noise, RATES)[inner].std() < 1.4 * left


def test_a_loss_counts_as_at_most_twice_the_first_ones_and_so_does_one_that_is_not_finite():
    spike, cut = np.full(100, 2.0), np.full(60, 2.0)
    spike[[0, 50]] = 1e6
    peak = 1 / (np.sqrt(2 * np.pi) * 0.2 * STEPS_A_DECADE)  # of the kernel
    assert finder.smooth(spike, RATES)[30:70].max() == pytest.approx(2 + 2 * peak, rel=1e-3)
    smoothed = finder.smooth(cut, RATES)
    assert smoothed[:40] == pytest.approx(2.0, rel=1e-6)
    assert smoothed[80:] == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize("edge", [3e-3, 0.03, 0.3])
def test_the_suggestion_is_a_third_of_the_rate_at_which_the_loss_has_risen(edge):
    """5 % are 0.115 = 10 ** (4 x -0.235 decades). Smoothing makes it earlier, by less than its width of 0.2."""
    rate, reason = suggest(*(losses(edge, seed=seed) for seed in range(3)))
    assert -0.435 < np.log10(rate * 3 / edge) < -0.2
    assert re.fullmatch(
        r"the averaged loss falls from 2\.3 to 1\.\d+, and rises by 0\.1[12] at 0\.\d+, 3 times .+", reason
    )


def test_the_suggestion_moves_little_between_seeds():
    """The rate of the least loss moves by a decade."""
    groups = [[losses(fall=0.3, seed=seed) for seed in range(first, first + 3)] for first in range(0, 30, 3)]
    rates = [suggest(*group)[0] for group in groups]
    assert max(rates) / min(rates) < 1.5


@pytest.mark.parametrize(
    ("curves", "words"),
    [
        (
            [losses(1e9, 0)],
            r"up to the rate 10 the averaged loss never falls by 3%\. Lower --least_rate, raise --great",
        ),
        (
            [losses(1e-4, 0)],
            r"up to the rate 4\.\d+e-05 the averaged loss never falls by 3%\. Lower --least_rate, raise",
        ),
        (
            [losses()[:5]] * 2,
            r"up to the rate 1\S*e-05 the averaged loss never falls by 3%\. Lower --least_rate, raise",
        ),
        ([losses(1e9)], r"up to the rate 10 the averaged loss does not rise again\. Raise --greatest_rate\."),
        ([losses(2e-2), losses(2e-2), losses(0.9)], r"trainings say 0\.003\d to 0\.1\d\. Raise --steps, or give"),
    ],
    ids=["flat", "rises at once", "nan from the sixth step", "only falls", "they disagree"],
)
def test_no_answer_has_a_reason_and_a_remedy(curves, words):
    rate, reason = suggest(*curves)
    assert rate is None
    assert re.search(words, reason)


def test_a_training_that_ends_early_is_read_up_to_there(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert len(finder.read_losses(path)) == 0
    values = [{"loss": 2.0}, {"accuracy": 0.5}, {"loss": 3.0}, {"loss": None}, {"loss": 1.0}]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    assert finder.read_losses(path).tolist() == [2.0, 3.0]


def test_each_groups_peak_is_kept():
    """A recipe that scales its rate, or has several, is tested as it is."""
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 4.0}], lr=2.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # the recipe's own, which must not act
    _, scheduler = finder.rising(optimizer, 1e-2, 3)
    seen = []
    for _ in range(3):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(seen, [[0.02, 0.04], [0.2, 0.4], [2.0, 4.0]])


@pytest.fixture
def made_up(monkeypatch, tmp_path) -> Callable[..., int]:
    """Run the tool in an empty folder on losses by seed, in place of trainings; return the exit status."""

    def run(by_seed: dict[int, np.ndarray], *words: str) -> int:
        monkeypatch.setattr(finder, "record", lambda arguments, name, seed, folder: by_seed[seed])
        return finder.main(finder.parse([*words, str(RESNET), "--seed", "7"]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return run


def test_the_trainings_have_consecutive_seeds_and_their_average_decides(made_up, capsys, tmp_path):
    edges = {7: 0.05, 8: 0.1, 9: 0.2}
    assert made_up({seed: losses(edge, seed=seed) for seed, edge in edges.items()}) == 0
    *seeds, chart, single, answer = capsys.readouterr().out.splitlines()
    assert seeds == [f"seed {seed}: 100 of 100 steps have a finite loss" for seed in edges]
    assert chart == "chart: learning_rate_resnet.png"
    rates = [float(word) for word in single.removeprefix("each training alone would say: ").split(", ")]
    assert rates == sorted(rates)
    assert rates[0] < float(re.match(r"use --learning_rate (\S+): ", answer)[1]) < rates[2]
    assert Image.open(tmp_path / "learning_rate_resnet.png").size == (840, 540)


def test_no_answer_has_a_chart_too_and_status_1(made_up, capsys, tmp_path):
    assert made_up({7: losses(1e9)}, "--runs", "1", "--chart", "chart.svg") == 1
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("no answer: up to the rate 10 the averaged loss does not")
    )
    assert "</svg>" in (tmp_path / "chart.svg").read_text()


# Real trainings


@pytest.fixture
def record(server, monkeypatch) -> Callable[..., np.ndarray]:
    """Train as the tool does, but in forks of the server; return the losses."""

    def launch(words: list[str], log: Path) -> tuple[int, str]:
        process = server.launch(words[3:], env=environment())
        return process.returncode, process.stdout

    monkeypatch.setattr(finder, "launch", launch)
    return lambda folder, *words: finder.record(finder.parse([*map(str, words)]), "learning_rate", 3, folder)


def test_rates_rise_exponentially_and_shards_change_no_loss(record, tmp_path):
    """To a rate at which rounding is not amplified yet. The steps need two epochs, where --epochs is 1."""
    words = ["--greatest_rate", "0.01", "--steps", "20", VIT, *SMALL, "--global_batch_size", "128", "--epochs", "1"]
    whole = record(tmp_path / "whole", *words)
    sharded = record(tmp_path / "sharded", "--config_file", FSDP, "--num_processes", "2", *words)
    assert len(whole) == 20
    np.testing.assert_allclose(sharded, whole, rtol=1e-4)
    assert json.loads((tmp_path / "sharded/summary.json").read_text())["world_size"] == 2
    for folder in (tmp_path / "whole", tmp_path / "sharded"):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]  # no evaluation
        np.testing.assert_allclose([line["learning_rate"] for line in lines], np.geomspace(1e-5, 0.01, 20), rtol=1e-9)
        assert json.loads((folder / "config.json").read_text())["identity"]["seed"] == 3
        assert not list((folder / "checkpoints").iterdir())


def test_a_training_that_diverges_is_read_up_to_there(record, tmp_path):
    """Other failures are the user's."""
    words = [*SMALL, "--global_batch_size", "128"]
    assert 5 <= len(record(tmp_path / "0", "--greatest_rate", "1e30", "--steps", "20", VIT, *words)) < 20
    with pytest.raises(
        UserError, match=r"no answer: with seed 3 only \d steps have a finite loss\. Lower --least_rate"
    ):
        record(tmp_path / "1", "--least_rate", "1e20", "--greatest_rate", "1e30", "--steps", "20", VIT, *words)
    with pytest.raises(UserError, match="patch"):
        record(tmp_path / "2", VIT, *words, "--image_size", "20")


@pytest.mark.slow
def test_a_user_gets_a_chart_and_nothing_else(tmp_path):
    (tmp_path / "scratch").mkdir()
    words = ["--runs", "1", "--steps", "20", RESNET, *SMALL]
    env = environment(TMPDIR=str(tmp_path / "scratch"))  # an interpreter of its own reads it
    process = subprocess.run([sys.executable, TOOL, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.stdout.startswith("seed 0: 20 of 20 steps have a finite loss\n"), process.stderr
    assert process.returncode == (0 if "\nuse --learning_rate" in process.stdout else 1)
    assert {path.name for path in tmp_path.iterdir()} == {"scratch", "learning_rate_resnet.png"}
    assert not list((tmp_path / "scratch").glob("learning_rate_*"))


# Refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes/no_such.py"], r"recipes/no_such\.py is not a file\. Give the path of one\."),
        (["--config_file", "no.yaml", RESNET], r"no\.yaml is not a file\. Give"),
        (["--least_rate", "1", "--greatest_rate", "1", RESNET], r"--least_rate 1 must be above 0 and below .+ Change"),
        (["--least_rate", "0", RESNET], r"--least_rate 0 must be above 0"),
        (["--greatest_rate", "nan", RESNET], r"below --greatest_rate nan\. Change"),
        (["--steps", "19", RESNET], r"--steps 19 is too small\. Give 20 or more\."),
        (["--runs", "0", RESNET], r"--runs 0 is too small\. Give 1 or more\."),
        (["--num_processes", "0", RESNET], r"--num_processes 0 is too small\. Give 1 or more\."),
        (["--chart", "there.png", RESNET], r"--chart there\.png exists.+Give another name"),
        (["--chart", "chart.txt", RESNET], r"--chart chart\.txt .+ no \.png or \.svg"),
        (["--chart", "no/chart.png", RESNET], r"--chart no/chart\.png .+ a folder that exists"),
        ([RESNET, "--output_dir=x"], r"--output_dir is set by this tool\. Leave it out"),
        ([RESNET, "--max-steps", "9"], r"--max-steps is set by this tool"),
        ([RESNET, "--no_such", "1"], r"unknown flag --no_such\. The nearest is"),
        ([RESNET, "--momentum", "2"], r"--momentum 2\.0 is out of range\. Give"),
        ([ROOT / "recipes/allreduce_pi.py"], r"allreduce_pi\.py trains nothing: .+ Give another recipe\."),
    ],
)
def test_what_cannot_work_is_refused_before_a_launch(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(finder, "record", None)
    (tmp_path / "there.png").touch()
    with pytest.raises(UserError, match=message):
        finder.main(finder.parse([*map(str, words)]))
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["there.png"]

# SPDX-License-Identifier: Apache-2.0
"""Large batches: a learning rate that follows the batch, and optimizers with one curve on any topology."""

import importlib
import inspect
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, Result, environment, launch_command, python, train
from kills import curve
from test_strategies import QUIET
from timm.optim import Lamb, Lars, Lion
from torch import nn

from shared.config import parse
from shared.errors import UserError
from shared.images import ImageConfig
from shared.launch import this_launch
from shared.optim import parameter_groups

RECIPE = ROOT / "recipes/resnet_large_batch.py"
OPTIMIZERS = ("adamw", "lars", "lamb", "lion")


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # parse sets another
    return importlib.import_module("resnet_large_batch")


# A dozen steps of the digits on one process, two and four; from the checkpoint of step 6 again

DIGITS = ["--global_batch_size", "16", "--image_size", "16", "--norm", "group", "--max_grad_norm", "1"]
DIGITS += ["--epochs", "4", "--logging_steps", "1", "--num_workers", "0", *QUIET]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_optimizer_has_one_curve_and_resumes_bitwise(server, tmp_path, optimizer):
    def run(name: str, processes: int, *flags: str) -> Result:
        words = [*DIGITS, "--optimizer", optimizer, "--max_steps", "12", *flags]
        return train(tmp_path / name, *words, recipe=RECIPE, server=server, num_processes=processes)

    single, whole = run("single", 1), run("whole", 2, "--checkpointing_steps", "6")
    assert len({*single.series("loss")}) == 12
    others = [whole, run("four", 4)] if optimizer == "lars" else [whole]
    for other in others:
        assert other.series("samples_digest") == single.series("samples_digest")
        np.testing.assert_allclose(other.series("loss"), single.series("loss"), rtol=1e-5)
        np.testing.assert_allclose(other.series("grad_norm"), single.series("grad_norm"), rtol=1e-4)
    resumed = run("resumed", 2, "--resume_from_checkpoint", str(whole.folder / "checkpoints/step-00000006"))
    assert "resumed at step 6" in resumed.text
    assert curve(resumed.folder) == [line for line in curve(whole.folder) if line[0] > 6]
    assert len(curve(resumed.folder)) == 7  # with the evaluation
    rate = {"adamw": "0.001 x sqrt(16 / 256) (sqrt", "lars": "1 x 16 / 256 (linear"}.get(optimizer)
    assert rate is None or f" = {rate} scaling)\n" in whole.text


# The demonstration's ViT, whose weights are split: a layer's norm is that of all its parts

VIT = """
import json
import torch
from sklearn.datasets import load_digits
from torch.distributed import all_reduce, get_rank
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
import resnet_large_batch as large
import vit_tp as recipe
from shared.optim import parameter_groups

config, digits = recipe.Config(), load_digits()
pixels = torch.tensor(digits.images).float().sub(8).div(8)[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3)
pixels, labels = pixels.expand(-1, 3, -1, -1), torch.tensor(digits.target)
accelerator = recipe.build_accelerator(0, config, ("ddp",))

def split(model, strategy):
    if strategy == "tp":
        return recipe.parallelize(accelerator, model, config)
    for part in (*model.vit.layers, model) if strategy == "fsdp" else ():
        fully_shard(part, mesh=accelerator.mesh["tp"])
    return model

def train(strategy, optimizer, rate):
    model = split(recipe.build_model(recipe.Images(), config, 10, 0), strategy).train()
    settings = large.Config(optimizer=optimizer, weight_decay=0.1)
    optimizer = large.make_optimizer(parameter_groups(model, 0.1), settings, rate)
    mine, losses = slice(get_rank(), None, 2) if strategy == "fsdp" else slice(None), []
    for step in range(12):
        batch = slice(32 * step, 32 * step + 32)
        loss = cross_entropy(model(pixels[batch][mine]), labels[batch][mine])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / 2
        all_reduce(mean)
        losses.append(mean.item())
    return losses

for name, rate in {"lars": 1.0, "lamb": 1e-2}.items():
    found = {strategy: train(strategy, name, rate) for strategy in ("whole", "fsdp", "tp")}
    if get_rank() == 0:
        print("losses", json.dumps(found), flush=True)
accelerator.end_training()
"""


def test_layerwise_rates_see_whole_layers_under_fsdp_and_tp(server, tmp_path):
    script = tmp_path / "split.py"
    script.write_text(VIT)
    process = server.launch([*launch_command(2, "local_tp.yaml")[2:], script], env=environment())
    assert process.returncode == 0, process.stdout
    found = [json.loads(line[7:]) for line in process.stdout.splitlines() if line.startswith("losses ")]
    assert len(found) == 2
    for losses in found:
        assert max(losses["whole"]) - min(losses["whole"]) > 0.1
        np.testing.assert_allclose(losses["fsdp"], losses["whole"], rtol=1e-5)
        np.testing.assert_allclose(losses["tp"], losses["whole"], rtol=1e-5)


# The learning rate


@pytest.mark.parametrize(
    ("optimizer", "scaling", "rate"),
    [
        *(("adamw", scaling, rate) for scaling, rate in {"linear": 0.4, "sqrt": 0.2, "none": 0.1}.items()),
        *((optimizer, "auto", 0.4) for optimizer in ("sgd", "lars")),
        *((optimizer, "auto", 0.2) for optimizer in ("adamw", "lamb", "lion")),
    ],
)
def test_the_peak_rate_follows_the_batch(recipe, optimizer, scaling, rate):
    values = {"optimizer": optimizer, "scaling": scaling, "base_learning_rate": 0.1}
    for batch, reference in ((1024, 256), (64, 16)):
        config = recipe.Config(**values, global_batch_size=batch, reference_batch_size=reference)
        assert recipe.peak_rate(config)[0] == pytest.approx(rate)
    made, scheduler = recipe.build_optimizer(nn.Linear(2, 2), config, 10)
    assert [group["initial_lr"] for group in made.param_groups] == pytest.approx([rate, rate])
    assert max(scheduler.lr_lambdas[0](step) for step in range(100)) == pytest.approx(1)


def test_a_smaller_batch_has_a_smaller_rate(recipe):
    assert recipe.peak_rate(recipe.Config(global_batch_size=64))[0] == pytest.approx(0.025)


@pytest.mark.parametrize(
    ("scaling", "line"),
    [
        ("auto", "peak learning rate: 0.4 = 0.1 x 1024 / 256 (linear scaling)"),
        ("sqrt", "peak learning rate: 0.2 = 0.1 x sqrt(1024 / 256) (sqrt scaling)"),
        ("none", "peak learning rate: 0.1 (no scaling)"),
    ],
)
def test_the_run_says_how_its_rate_came_about(recipe, scaling, line):
    assert recipe.describe_rate(recipe.Config(global_batch_size=1024, scaling=scaling)) == line


def test_each_optimizer_has_its_own_default_rate(recipe):
    rates = {"sgd": 0.1, "adamw": 1e-3, "lars": 1, "lamb": 1e-3, "lion": 1e-4}
    for optimizer, rate in rates.items():
        assert recipe.peak_rate(recipe.Config(optimizer=optimizer, global_batch_size=256))[0] == rate
    for optimizer, kind in {"adamw": torch.optim.AdamW, "lars": Lars, "lamb": Lamb, "lion": Lion}.items():
        assert inspect.signature(kind).parameters["lr"].default == rates[optimizer]


# The optimizers


def stepped(optimizer_of, scale: float) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """Return the optimizer after one step of a layer, and the changes of its weight and bias."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    optimizer = optimizer_of(layer)
    for parameter in layer.parameters():
        parameter.grad = scale * torch.randn_like(parameter)
    optimizer.step()
    return optimizer, [now.detach() - old for now, old in zip(layer.parameters(), before, strict=True)]


def factory(recipe, optimizer: str, weight_decay: float = 1e-8):
    config = recipe.Config(optimizer=optimizer)
    return lambda layer: recipe.make_optimizer(parameter_groups(layer, weight_decay), config, 0.01)


@pytest.mark.parametrize("optimizer", ["sgd", *OPTIMIZERS])
def test_the_optimizer_is_the_one_that_was_asked_for(recipe, optimizer):
    """The first step's change: the gradient's, its sign's, or one in proportion to the weight's norm."""
    (made, (small, bias)), (_, (large, larger_bias)) = (stepped(factory(recipe, optimizer), s) for s in (1, 1000))
    grows = {"sgd": (1000, 1000), "lars": (1, 1000)}.get(optimizer, (1, 1))
    torch.testing.assert_close([large, larger_bias], [small * grows[0], bias * grows[1]], rtol=1e-3, atol=1e-6)
    torch.manual_seed(0)
    norm = nn.Linear(8, 8).weight.norm().item()
    # 1.9: Nesterov's first step; 0.001: LARS's trust coefficient
    expected = {"lars": 0.01 * 0.001 * 1.9 * norm, "lamb": 0.01 * norm}.get(optimizer, 0.01 * 8)
    if optimizer != "sgd":
        assert small.norm().item() == pytest.approx(expected, rel=1e-3)
    assert type(made).__name__.lower() == optimizer


def test_lamb_clips_no_second_time(recipe):
    optimizer, _ = stepped(factory(recipe, "lamb"), 1000)
    for parameter, state in optimizer.state.items():
        torch.testing.assert_close(state["exp_avg"], 0.1 * parameter.grad)


@pytest.mark.parametrize(("optimizer", "plain"), [("lars", "sgd"), ("lamb", "adamw")])
def test_without_decay_timm_adapts_nothing(recipe, optimizer, plain):
    """When this no longer holds, the recipe need not refuse --weight_decay 0."""
    (_, ours), (_, theirs) = (stepped(factory(recipe, name, 0), 1) for name in (optimizer, plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # their eps differ


# What is refused, in one line


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--reference_batch_size", "0"], "--reference_batch_size 0 is out of range. Give a value from 1 to inf."),
        (
            ["--optimizer", "adam"],
            r"--optimizer: invalid choice: 'adam' \(choose from .*sgd.*lion.*\)\. `--help`",
        ),
        (["--learning_rate", "1"], "unknown flag --learning_rate. The nearest is --base_learning_rate; "),
    ],
)
def test_a_wrong_value_is_refused(recipe, flags, error):
    with pytest.raises(UserError, match=error) as raised:
        parse(*recipe.CONFIGS, arguments=flags)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("optimizer", ["sgd", *OPTIMIZERS])
def test_a_missing_timm_is_refused_where_it_is_needed(recipe, monkeypatch, optimizer):
    configs = recipe.RunConfig(), ImageConfig(), recipe.Config(optimizer=optimizer)
    recipe.check(*configs, this_launch())
    monkeypatch.setitem(sys.modules, "timm", None)
    if optimizer in ("sgd", "adamw"):
        recipe.check(*configs, this_launch())
        recipe.build_optimizer(nn.Linear(2, 2), configs[-1], 10)
        return
    with pytest.raises(UserError) as raised:
        recipe.check(*configs, this_launch())
    assert str(raised.value) == (
        f"--optimizer {optimizer} needs timm. Install it (pip install timm), or give sgd or adamw."
    )


@pytest.mark.parametrize(("optimizer", "plain"), [("lars", "sgd"), ("lamb", "adamw")])
def test_layerwise_rates_without_decay_are_refused_before_anything_is_made(server, tmp_path, optimizer, plain):
    words = ["--optimizer", optimizer, "--weight_decay", "0", "--output_dir", tmp_path / "run"]
    process = python(RECIPE, *words, server=server)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: --optimizer {optimizer} adapts only weights that decay")
    assert line.endswith(f"Give a weight decay, or --optimizer {plain}.")
    assert not (tmp_path / "run").exists()


def test_what_needs_no_layerwise_rate_may_train_without_decay(recipe):
    for optimizer in ("sgd", "adamw", "lion"):
        config = recipe.Config(optimizer=optimizer, weight_decay=0.0)
        recipe.check(recipe.RunConfig(), ImageConfig(), config, this_launch())


# benchmarks/accuracy.py, which compares the optimizers


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("accuracy")


def test_the_steps_to_a_target_are_those_of_the_first_evaluation_that_reaches_it(accuracy):
    text = '{"step": 5, "loss": 2}\n{"step": 5, "accuracy": 0.9}\n{"step": 10, "accuracy": 0.97}\n'
    lines = [json.loads(line) for line in (text + '{"step": 15, "accuracy": 0.96}\n').splitlines()]
    assert [accuracy.steps_to(target, lines) for target in (0.9, 0.95, 0.97, 0.98)] == [5, 10, 10, None]


def test_each_set_of_flags_gets_the_same_seeds_and_rows_of_its_own(accuracy, monkeypatch, capsys):
    launched, written = [], {}

    def trained(recipe: str, seed: int, flags: list[str], target: float) -> dict:
        launched.append((seed, *flags))
        steps = {"a": 10 + seed, "b": 20 if seed else None}[flags[-1]]
        return {"seed": seed} | dict.fromkeys(accuracy.FIGURES, seed) | {"steps_to_target": steps}

    monkeypatch.setattr(accuracy, "train", trained)
    monkeypatch.setattr(accuracy, "write", lambda what, rows, **more: written.update(more, what=what, rows=rows))
    words = ["--seeds", "2", "--vary", "--norm a", "--epochs", "3", "--vary", "--norm b", "--target", "0.9"]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *words, "--output", "norms"])
    accuracy.main()
    sets = ("--epochs", "3", "--norm", "a"), ("--epochs", "3", "--norm", "b")
    assert launched == [(seed, *flags) for seed in (0, 1) for flags in sets]
    assert written["what"] == "norms"
    assert written["target"] == 0.9
    assert [(run["vary"], run["seed"]) for run in written["runs"]] == [
        ("--norm a", 0), ("--norm b", 0), ("--norm a", 1), ("--norm b", 1)
    ]  # fmt: skip
    steps = [row for row in written["rows"] if row["figure"] == "steps_to_target"]
    assert steps == [
        {"vary": "--norm a", "figure": "steps_to_target", "median": 10.5, "min": 10, "max": 11, "n": 2},
        {"vary": "--norm b", "figure": "steps_to_target", "median": 20, "min": 20, "max": 20, "n": 1},
    ]
    assert "steps_to_target" in capsys.readouterr().out

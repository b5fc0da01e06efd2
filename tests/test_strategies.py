# SPDX-License-Identifier: Apache-2.0
"""Law 1 under every way to split the Vision Transformer: one loss curve, the same final weights, the same names.

A dozen steps of the demonstration's network in fp32, with clipping and stochastic depth at work.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from conftest import ROOT, Result, python, train
from forked import Server
from transformers import ViTConfig, ViTForImageClassification

from shared.checkpoint import checkpoints, read_weights
from shared.images.loader import MEAN, STD
from shared.models.vit import pixel_statistics

# Seven steps an epoch of 240 images, after which 60 are evaluated.
STEPS = ["--global_batch_size", "32", "--epochs", "4", "--warmup_epochs", "0.5", "--learning_rate", "1e-3"]
STEPS += ["--drop_path", "0.2", "--logging_steps", "1", "--num_workers", "0"]
QUIET = ["--report_to", "none"]

# name: recipe, topology, processes, the recipe's flags, the launcher's flags
CASES = {
    "accumulation 4": ("vit", "ddp", 1, ["--gradient_accumulation_steps", "4"]),
    "ddp 2": ("vit", "ddp", 2, []),
    "ddp 4": ("vit", "ddp", 4, []),
    "fsdp 2": ("vit", "fsdp", 2, []),
    "fsdp 4": ("vit", "fsdp", 4, ["--activation_checkpointing"]),
    "hsdp 2x2": ("vit", "hsdp", 4, []),
    "vit_fsdp 2": ("vit_fsdp", "fsdp", 2, ["--prefetch", "2"]),
    "vit_fsdp 2x2": ("vit_fsdp", "hsdp", 4, ["--reshard_after_forward", "False"]),
    "tp 2": ("vit_tp", "tp", 2, []),
    "tp 2, by tokens": ("vit_tp", "tp", 2, ["--sequence_parallel"]),
    "tp 2 x ddp 2": ("vit_tp", "tp", 4, []),
    "tp 2 x fsdp 2": ("vit_tp", "fsdp", 4, []),
    "pp 2, gpipe": ("vit_pp", "pp", 2, ["--pipeline_schedule", "gpipe", "--gradient_accumulation_steps", "2"]),
    "pp 2, 1f1b": ("vit_pp", "pp", 2, []),
    "pp 2 x ddp 2": ("vit_pp", "pp", 4, ["--pipeline_chunks", "4", "--gradient_accumulation_steps", "2"]),
    "pp 2 x ddp 2, gpipe": ("vit_pp", "pp", 4, ["--pipeline_schedule", "gpipe"]),
    "zero1 2": ("vit", "zero1", 2, []),
    "zero2 2, accumulation 2": ("vit", "zero2", 2, ["--gradient_accumulation_steps", "2"]),
    "zero3 2": ("vit", "zero3", 2, []),
    "zero3 2, offload": ("vit", "zero3_offload", 2, []),
    "vit_zero 2": ("vit_zero", "zero3", 2, []),
    "vit_zero1 2": ("vit_zero", "zero1", 2, []),
    "vit_zero2 2": ("vit_zero", "zero2", 2, []),
    "vit_zero 2, offload": ("vit_zero", "zero3_offload", 2, []),
}
QUICK = {"ddp 2", "fsdp 2", "tp 2", "pp 2, 1f1b"}
# Strategies whose checkpoints have a form of their own: stopped at step 6 and started again.
RESUMED = {"fsdp 2", "zero3 2", "zero2 2, accumulation 2", "tp 2 x fsdp 2", "pp 2, 1f1b", "vit_fsdp 2x2"}


@pytest.fixture(scope="module")
def run(server, image_folder) -> Callable[..., Result]:
    return partial(launched, server, image_folder)


def launched(
    server: Server,
    data: Path,
    folder: Path,
    recipe: str,
    topology: str,
    processes: int,
    flags: list[str],
    steps: int = 12,
    **launch: str,
) -> Result:
    limit = ["--data", str(data), "--max_steps", str(steps)]
    path = ROOT / "recipes" / f"{recipe}.py"
    launch = {"num_processes": processes, "config_file": f"local_{topology}.yaml"} | launch
    return train(folder, *STEPS, *QUIET, *limit, *flags, recipe=path, server=server, **launch)


def weights(result: Result) -> dict[str, torch.Tensor]:
    """Name -> whole tensor of the newest checkpoint, whoever wrote its parts."""
    return read_weights(checkpoints(result.folder / "checkpoints")[-1])


@pytest.fixture(scope="module")
def single(run, runs) -> Result:
    return run(runs / "vit-single", "vit", "ddp", 1, [])


@pytest.mark.golden
def test_the_reference_clips(single):
    norms = np.array(single.series("grad_norm"))
    assert (norms > 1).sum() > 5  # --max_grad_norm 1 is at work
    golden.compare("vit, ddp 1", single)


@pytest.mark.golden
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.quick] * (name in QUICK)) for name in CASES])
def test_each_strategy_has_the_curve_and_the_weights_of_one_process(run, runs, single, name):
    recipe, topology, processes, flags = CASES[name]
    folder = runs / name.replace(" ", "-").replace(",", "")
    if name in RESUMED:
        run(folder, recipe, topology, processes, flags, steps=6)
    result = run(folder, recipe, topology, processes, flags)
    assert ("resumed at step 6" in result.text) == (name in RESUMED)
    assert result.series("samples_digest") == single.series("samples_digest")
    assert result.series("learning_rate") == single.series("learning_rate")
    reference = np.array(single.series("loss"))
    np.testing.assert_allclose(result.series("loss")[:5], reference[:5], rtol=1e-5)
    np.testing.assert_allclose(result.series("loss"), reference, rtol=1e-4)
    np.testing.assert_allclose(result.series("grad_norm"), single.series("grad_norm"), rtol=1e-3)
    # One that was stopped has an evaluation at that step too.
    assert result.series("eval_loss")[-2:] == pytest.approx(single.series("eval_loss"), rel=1e-4)
    assert result.series("accuracy")[-2:] == pytest.approx(single.series("accuracy"), abs=1.5 / 60)
    assert {*result.series("eval_samples")} == {60}
    same_weights(weights(result), weights(single))
    assert result.summary["world_size"] == processes
    golden.compare(name if name.startswith("vit_") else f"{recipe} {name}", result)


def same_weights(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    """Within 1e-4, by name. A key projection's bias has no gradient but rounding's, which Adam scales up to a step."""
    assert set(ours) == set(reference)
    for name, tensor in reference.items():
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=name)


def test_names_are_those_of_the_plain_model(single):
    config = ViTConfig(hidden_size=96, num_hidden_layers=6, num_attention_heads=4, intermediate_size=384)
    with torch.device("meta"):
        plain = ViTForImageClassification(config)
    assert set(weights(single)) == set(plain.state_dict())


def test_zero_ends_with_a_folder_for_transformers(run, runs):
    result = run(runs / "zero-export", "vit_zero", "zero3", 2, [], steps=2)
    model = ViTForImageClassification.from_pretrained(result.folder / "pretrained")
    same_weights(dict(model.state_dict()), weights(result))
    mean, std = pixel_statistics(result.folder / "pretrained")
    assert mean == pytest.approx(MEAN, rel=1e-6)
    assert std == pytest.approx(STD, rel=1e-6)


def test_the_pipeline_says_its_bubble_and_memory_beside_the_theory(run, runs):
    """Activations of min(m, p - s) chunks wait in stage s under 1f1b."""
    result = run(runs / "pp-report", "vit_pp", "pp", 2, ["--pipeline_chunks", "8"], steps=2)
    rows = [line.split() for line in result.text.splitlines() if line.strip().startswith(("0  ", "1  "))]
    assert len(rows) == 2
    for row in rows:
        idle, theory, kept, kept_in_theory = row[2], row[3], float(row[4]), float(row[5].strip("()"))
        assert 0 < float(idle.rstrip("%")) < 100
        assert theory == "(11.1%)"  # (2 - 1) / (8 + 2 - 1)
        assert kept == pytest.approx(kept_in_theory, rel=0.05)
    assert float(rows[0][4]) > 1.5 * float(rows[1][4])


# A checkpoint of one strategy, given by its path, resumes under another; what one recipe alone has is named

MOVED = {
    "tp 2 to ddp 1": (("vit_tp", "tp", 2), ("vit", "ddp", 1), "recipe,sequence_parallel"),
    "pp 2 to fsdp 2": (("vit_pp", "pp", 2), ("vit", "fsdp", 2), "recipe,compile,pipeline_schedule,pipeline_chunks"),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_checkpoint_resumes_under_another_strategy_and_is_exported(server, run, single, tmp_path, name):
    source, target, override = MOVED[name]
    first = run(tmp_path / "first", *source, [], steps=8)
    path = checkpoints(first.folder / "checkpoints")[-1]
    flags = ["--resume_from_checkpoint", str(path), "--resume_override", override]
    second = run(tmp_path / "second", *target, flags, steps=12)
    assert "resumed at step 8" in second.text
    losses = first.series("loss") + second.series("loss")
    np.testing.assert_allclose(losses, single.series("loss"), rtol=1e-5)
    assert first.series("samples_digest") + second.series("samples_digest") == single.series("samples_digest")
    exported = python(ROOT / "tools/export.py", first.folder, tmp_path / "exported", server=server)
    assert exported.returncode == 0, exported.stderr
    written = ViTForImageClassification.from_pretrained(tmp_path / "exported").state_dict()
    torch.testing.assert_close(dict(written), weights(first), rtol=0, atol=0)


# bf16: weights in fp32, products in bf16 (8 bits of mantissa: 4e-3), under policies that round in other places

HALF = {
    "fsdp 2": ("vit", "fsdp", 2),
    "vit_fsdp 2": ("vit_fsdp", "fsdp", 2),
    "zero2 2": ("vit", "zero2", 2),
    "tp 2": ("vit_tp", "tp", 2),
    "pp 2": ("vit_pp", "pp", 2),
}


@pytest.fixture(scope="module")
def half(run, runs) -> Result:
    return run(runs / "vit-bf16", "vit", "ddp", 1, [], steps=8, mixed_precision="bf16")


@pytest.mark.parametrize("name", HALF)
def test_bf16_stays_within_its_rounding(run, runs, single, half, name):
    recipe, topology, processes = HALF[name]
    folder = runs / f"bf16-{name.replace(' ', '-')}"
    result = run(folder, recipe, topology, processes, [], steps=8, mixed_precision="bf16")
    losses, exact = np.array(result.series("loss")), np.array(single.series("loss")[:8])
    np.testing.assert_allclose(losses, half.series("loss"), rtol=1e-2)
    np.testing.assert_allclose(losses, exact, rtol=3e-2)
    assert abs(losses / exact - 1).max() > 1e-5  # rounding of fp32 is less: bf16 was at work
    # The mean of two processes' bf16 losses, between 2 and 4, would be a multiple of 1/128.
    assert np.all(losses * 128 % 1 != 0), "computed on half-precision logits"
    assert result.config["identity"]["mixed_precision"] == "bf16"


# The whole table of README.md: each yes in fp32, and each recipe in bf16, that none of the cases above has launched


def table() -> set[tuple[str, str]]:
    """(recipe, topology) of each yes."""
    rows = re.findall(r"^\| \[`(\w+)\.py`\]\(.*?\) \|(.*)\|$", (ROOT / "README.md").read_text(), re.M)
    columns = [["ddp"], ["fsdp"], ["hsdp"], ["zero1", "zero2", "zero3", "zero3_offload"], ["tp"], ["pp"]]
    cells = [(name, zip(columns, row.split("|")[1:], strict=True)) for name, row in rows]
    return {(name, each) for name, row in cells for column, cell in row if cell.strip() == "yes" for each in column}


TABLE = table() - {("allreduce_pi", "ddp")}  # trains nothing; tests/test_recipes.py runs it
CHECKED = {"no": {case[:2] for case in CASES.values()}, "bf16": {case[:2] for case in HALF.values()}}
# tests/test_augmentation.py, test_race.py and test_large_batch.py launch these.
CHECKED["no"] |= {("vit_augmentation", each) for each in ("ddp", "fsdp", "hsdp")}
CHECKED["no"] |= {(f"resnet_{each}", "ddp") for each in ("augmentation", "race", "large_batch")}
# tests/test_llm.py
CHECKED["no"] |= {("llm", each) for each in ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")}
CHECKED["no"] |= {("llm_packing", "ddp"), ("llm_packing", "fsdp")}
CHECKED["bf16"] |= {("llm", "ddp"), ("llm", "fsdp")}
# Those that change the loaders of resnet.py or llm.py and leave the loop, where autocast is: their base covers them.
HEADS = {
    case: (ROOT / f"recipes/{case[0]}.py").read_text() for case in TABLE if case[0].startswith(("resnet_", "llm_"))
}
CHECKED["bf16"] |= {case for case in HEADS if not re.search(r"Changes: .*train_one_epoch", HEADS[case])}
# FSDP's and ZeRO's other stages, and TP's other topology, cast where the ones in HALF and below do.
CHECKED["bf16"] |= {(name, each) for name in ("vit", "llm") for each in ("hsdp", "zero1", "zero3", "zero3_offload")}
CHECKED["bf16"] |= {("vit_fsdp", "hsdp"), ("vit_zero", "zero1"), ("vit_zero", "zero2")}
CHECKED["bf16"] |= {("vit_tp", "fsdp"), ("vit_augmentation", "fsdp"), ("vit_augmentation", "hsdp")}
LEFT = [(precision, *case) for precision, checked in CHECKED.items() for case in sorted(TABLE - checked)]


@pytest.mark.parametrize(("precision", "recipe", "topology"), LEFT)
def test_each_yes_of_the_table_trains(server, image_folder, tmp_path, precision, recipe, topology):
    processes = 4 if topology == "hsdp" else 2
    path = ROOT / f"recipes/{recipe}.py"
    launch = {"num_processes": processes, "config_file": f"local_{topology}.yaml", "mixed_precision": precision}
    flags = ["--max_steps", "2", "--logging_steps", "1", "--num_workers", "0", *QUIET]
    flags += ["--global_batch_size", "32"]
    flags += [] if recipe.startswith("llm") else ["--image_size", "16" if precision == "no" else "32"]
    if recipe.startswith("vit"):
        flags += ["--data", str(image_folder)]
    result = train(tmp_path / "run", *flags, recipe=path, server=server, **launch)
    assert result.summary["status"] == "finished"
    assert result.summary["world_size"] == processes
    assert result.config["strategy"] == {"tp": "ddp", "pp": "ddp"}.get(topology, topology.removesuffix("_offload"))
    assert result.config["identity"]["mixed_precision"] == precision
    assert len(result.series("loss")) == 2
    assert np.isfinite(result.series("loss")).all()


def test_the_table_has_the_topologies_that_are_there():
    assert len(TABLE) >= 20
    assert {topology for _, topology in TABLE} == {
        path.stem.removeprefix("local_") for path in (ROOT / "accelerate_configs").glob("local_*.yaml")
    } - {"cpu"}


# Fine-tuning: a network of seven classes on larger images becomes one of ten digits


@pytest.fixture(scope="module")
def pretrained(runs) -> Path:
    folder = runs / "pretrained"
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # no strategy trains with it
    config = ViTConfig(**sizes, **dropout, image_size=48, patch_size=8, num_labels=7)
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def tuned(run, runs, pretrained) -> Result:
    return run(runs / "tuned", "vit", "ddp", 1, ["--pretrained", str(pretrained)], steps=5)


TUNED = {
    "fsdp 2": ("vit", "fsdp", 2),
    "zero3 2": ("vit", "zero3", 2),
    "vit_fsdp 2": ("vit_fsdp", "fsdp", 2),
    "vit_zero 2": ("vit_zero", "zero3", 2),
    "tp 2": ("vit_tp", "tp", 2),
    "pp 2": ("vit_pp", "pp", 2),
}


@pytest.mark.parametrize("name", TUNED)
def test_each_strategy_fine_tunes_alike(run, runs, tuned, pretrained, name):
    recipe, topology, processes = TUNED[name]
    folder = runs / f"tuned-{name.replace(' ', '-')}"
    result = run(folder, recipe, topology, processes, ["--pretrained", str(pretrained)], steps=5)
    np.testing.assert_allclose(result.series("loss"), tuned.series("loss"), rtol=1e-5)
    assert (
        result.text.count("has hidden_dropout_prob 0.1, attention_probs_dropout_prob 0.1: trained here without") == 1
    )
    assert weights(result)["vit.embeddings.position_embeddings"].shape == (1, 17, 64)


def test_a_pretrained_network_is_looked_for_in_dsdir_too(run, pretrained, tuned, monkeypatch, tmp_path):
    home = tmp_path / "HuggingFace_Models/lab"
    home.mkdir(parents=True)
    (home / "vit").symlink_to(pretrained)
    monkeypatch.setenv("DSDIR", str(tmp_path))
    found = run(tmp_path / "run", "vit", "ddp", 1, ["--pretrained", "lab/vit"], steps=2)
    assert found.series("loss") == tuned.series("loss")[:2]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lost = python(ROOT / "recipes/vit.py", "--pretrained", "lab/other", "--output_dir", tmp_path / "other")
    assert lost.returncode == 1
    (error,) = [line for line in lost.stderr.splitlines() if line.startswith("error: ")]
    assert "lab/other/config.json" in error
    assert f"{tmp_path}/HuggingFace_Models/lab/other/config.json" in error
    assert not (tmp_path / "other").exists()

# SPDX-License-Identifier: Apache-2.0
"""Augmented, erased and mixed images and averaged weights: functions of seed and step, on any topology."""

import copy
import dataclasses
import importlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, Result, python, train
from loading import build, surroundings  # noqa: F401 - a fixture of every test here
from safetensors.torch import load_file
from scipy.stats import beta, chisquare, ks_1samp, ks_2samp
from test_strategies import STEPS
from timm.loss import BinaryCrossEntropy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from shared.checkpoint import checkpoints, read_manifest, read_weights
from shared.draws import hash64
from shared.errors import UserError
from shared.images import augment as augmenting
from shared.images.augment import POLICIES, augment
from shared.launch import Launch
from shared.models.ema import averaged, keep_average
from shared.models.mixing import box_mask, erase, erased_box, mix, mixed_pair, soft_labels, summed_loss

DRAWS = 20_000
LIKELY = 1e-3  # least p-value: the draws are seeded, so a test that passes once passes always

# Batches

ALL = {"augmentation": "randaugment", "random_erasing": 0.5, "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "repeats": 2}
FEATURES = {
    "randaugment": {"augmentation": "randaugment"},
    "trivialaugment": {"augmentation": "trivialaugment"},
    "autoaugment": {"augmentation": "autoaugment"},
    "erasing": {"random_erasing": 0.5},
    "mixup": {"mixup_alpha": 0.2},
    "cutmix": {"cutmix_alpha": 1.0},
    "repeats": {"repeats": 4},
    "all": ALL,
}
# processes, workers, accumulation steps, the first step
TOPOLOGIES = [(2, 1, 1, 0), (4, 0, 4, 0), (1, 3, 4, 0), (2, 0, 1, 9)]


def steps_of(flags: dict, size: int, workers: int, accumulation: int, first: int, count: int) -> list[tuple]:
    """Return (pixels, labels' probabilities, indices) of some global steps, as all processes make them."""
    values = {name: flags.get(name, 0.0) for name in ("random_erasing", "mixup_alpha", "cutmix_alpha")}
    shares = []
    for rank in range(size):
        settings = flags | {"gradient_accumulation_steps": accumulation, "image_size": 16}
        loader, _ = build("resnet_augmentation", "digits", rank, size, workers, **settings)
        batches = itertools.islice(loader.starting_at(first), count * accumulation)
        shares.append([(*prepared(batch, **values), batch.indices) for batch in batches])
    steps = []
    for step in range(count):
        parts = [part for share in shares for part in share[step * accumulation : (step + 1) * accumulation]]
        steps.append(tuple(map(torch.cat, zip(*parts, strict=True))))
    return steps


def prepared(batch, random_erasing: float, mixup_alpha: float, cutmix_alpha: float) -> tuple:
    seeds = batch.keys.tolist()
    pixels, shares = mix(erase(batch.images, seeds, random_erasing), seeds, mixup_alpha, cutmix_alpha)
    return pixels, soft_labels(batch.labels, shares, 10, 0.1)


@pytest.fixture(scope="module")
def alone(surroundings) -> dict[str, list[tuple]]:  # noqa: F811
    """Return the first steps of each feature by one process."""
    counts = {"all": 11, "repeats": 8}
    return {name: steps_of(flags, 1, 0, 1, 0, counts.get(name, 2)) for name, flags in FEATURES.items()}


@pytest.mark.parametrize("name", FEATURES)
def test_each_step_sees_the_same_pixels_and_labels_on_any_topology(alone, name):
    topologies = TOPOLOGIES if name == "all" else TOPOLOGIES[:1] if name in POLICIES else TOPOLOGIES[1:2]
    for *topology, first in topologies:
        steps = steps_of(FEATURES[name], *topology, first, 2)
        for ours, reference in zip(steps, alone[name][first : first + 2], strict=True):
            assert all(map(torch.equal, ours, reference)), (name, topology, first)


def test_each_feature_changes_the_batch(alone):
    plain = steps_of({}, 1, 0, 1, 0, 1)[0]
    for name, steps in alone.items():
        assert not torch.equal(steps[0][0], plain[0]), name
        assert torch.equal(steps[0][1], plain[1]) == (name in (*POLICIES, "erasing")), name


def test_repeats_show_each_image_so_often_augmented_apart(alone):
    for pixels, _, indices in alone["repeats"]:
        images, counts = indices.unique(return_counts=True)
        assert (len(images), {*counts.tolist()}) == (16, {4})
        copies = pixels[indices == images[0]].flatten(1)
        assert len(copies.unique(dim=0)) > 1  # at 16 pixels two crops may be the same
    seen = torch.cat([indices.unique() for *_, indices in alone["repeats"]])
    assert len(seen.unique()) == len(seen)


# torchvision's draws and pixels


@pytest.mark.parametrize("name", POLICIES)
def test_an_augmented_image_is_the_one_that_torchvision_makes_of_its_seed(name):
    images = torch.randint(0, 256, (48, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours, policy = augment(images, [*range(48)], name), POLICIES[name]()
    with torch.random.fork_rng():
        for row, image in enumerate(images):
            torch.manual_seed(hash64(row))
            assert torch.equal(ours[row], policy(image)), row
    assert not torch.equal(ours, images)


def test_operations_are_drawn_evenly():
    draw, drawn = augmenting._recorder("trivialaugment"), []
    with torch.random.fork_rng():
        for seed in range(DRAWS):
            augmenting.seed_torch(seed)
            drawn += draw(32, 32)
    names, counts = np.unique([name for name, _ in drawn], return_counts=True)
    assert len(names) == 14
    assert chisquare(counts).pvalue > LIKELY
    for name, most in (("Rotate", 135.0), ("Brightness", 0.99)):
        levels = np.array([magnitude for each, magnitude in drawn if each == name])
        _, counts = np.unique(np.rint(levels / most * 30).astype(int), return_counts=True)
        assert len(counts) == 61
        expected = np.where(np.arange(61) == 30, 2, 1)  # 0 has no sign
        assert chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > LIKELY


def test_shares_of_pairs_follow_beta():
    image = torch.zeros(1, 3, 224, 224)
    with torch.random.fork_rng():
        mixup = [mixed_pair(image, (seed, seed + DRAWS), 0.2, 0.0) for seed in range(DRAWS)]
        cutmix = [mixed_pair(image, (seed, seed + DRAWS), 0.0, 1.0) for seed in range(DRAWS)]
        both = [mixed_pair(image, (seed, seed + DRAWS), 1.0, 1.0) for seed in range(DRAWS // 4)]
        torch.manual_seed(1)
        mixing, cutting = v2.MixUp(alpha=0.2), v2.CutMix(alpha=1.0)
        theirs = [mixing.make_params([image])["lam"] for _ in range(DRAWS // 4)]
        reference = [cutting.make_params([image])["lam_adjusted"] for _ in range(DRAWS // 4)]
    shares, blends, boxes = zip(*mixup, strict=True)
    assert ks_2samp(shares, theirs).pvalue > LIKELY
    assert shares == blends
    assert {*boxes} == {(0, 0, 0, 0)}
    shares, blends, boxes = zip(*cutmix, strict=True)
    assert ks_2samp(shares, reference).pvalue > LIKELY
    assert {*blends} == {1.0}
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    np.testing.assert_allclose(shares, 1 - np.array(areas) / 224**2, atol=1e-12)
    blended = [share for share, blend, _ in both if blend < 1.0]
    assert abs(len(blended) / len(both) - 0.5) < 0.03
    assert ks_1samp(blended, beta(1, 1).cdf).pvalue > LIKELY


def test_erased_areas_are_torchvisions():
    image = torch.zeros(3, 100, 80)
    with torch.random.fork_rng():
        boxes = [erased_box(image, seed, 0.25) for seed in range(DRAWS)]
        torch.manual_seed(1)
        theirs = v2.RandomErasing(p=1)
        drawn = [theirs.make_params([image]) for _ in range(DRAWS // 4)]
    sizes = np.array([(bottom - top, right - left) for left, top, right, bottom in boxes if bottom])
    reference = np.array([(each["h"], each["w"]) for each in drawn])
    assert abs(len(sizes) / DRAWS - 0.25) < 0.02
    for ours, others in ((sizes.prod(1), reference.prod(1)), (sizes[:, 0] / sizes[:, 1], np.divide(*reference.T))):
        assert ks_2samp(ours, others).pvalue > LIKELY
    assert max(right for *_, right, _ in boxes) <= 80


# Labels


def test_cutmix_labels_have_the_shares_of_the_pixels():
    rows = torch.arange(16.0)
    images = rows[:, None, None, None].expand(16, 3, 32, 32)
    mixed, shares = mix(images, [*range(16)], 0.0, 1.0)
    own = (mixed == images).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(own, shares, rtol=0, atol=1e-6)
    partners = rows.view(8, 2).flip(1).flatten()
    assert all({*mixed[row].unique().tolist()} <= {row, int(partners[row])} for row in range(16))
    labels = soft_labels(torch.arange(16), shares, 16, 0.0)
    torch.testing.assert_close(labels[rows.long(), partners.long()], 1 - shares)
    torch.testing.assert_close(labels.diagonal(), shares)


def test_mixup_blends_pixels_as_it_does_labels():
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mixed, shares = mix(images, [*range(8)], 0.5, 0.0)
    share = shares.view(-1, 1, 1, 1)
    partners = images.view(4, 2, 3, 4, 4).flip(1).flatten(0, 1)
    torch.testing.assert_close(mixed, share * images + (1 - share) * partners)
    assert torch.equal(shares[::2], shares[1::2])
    assert len(shares.unique()) == 4


def test_losses_are_those_of_torch_and_timm():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(12, 7, generator=generator), torch.randint(0, 7, (12,), generator=generator)
    _, shares = mix(torch.zeros(12, 3, 8, 8), [*range(12)], 0.4, 1.0)
    for each in (None, shares):
        torch.testing.assert_close(soft_labels(labels, each, 7, 0.1).sum(dim=1), torch.ones(12))
    plain = summed_loss(logits, soft_labels(labels, None, 7, 0.1), "cross_entropy")
    torch.testing.assert_close(plain, cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum"))
    partners = labels.view(6, 2).flip(1).flatten()
    own, other = (cross_entropy(logits, each, label_smoothing=0.1, reduction="none") for each in (labels, partners))
    mixed = summed_loss(logits, soft_labels(labels, shares, 7, 0.1), "cross_entropy")
    torch.testing.assert_close(mixed, (shares * own + (1 - shares) * other).sum())
    binary = summed_loss(logits, soft_labels(labels, None, 7, 0.1), "bce")
    torch.testing.assert_close(binary, BinaryCrossEntropy(smoothing=0.1, reduction="mean")(logits, labels) * 12)


def test_channels_last_stays_channels_last():
    images = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
    changed = [erase(images, [*range(8)], 0.9), mix(images, [*range(8)], 0.2, 1.0)[0]]
    whole = (images * 50 + 128).clamp(0, 255).to(torch.uint8)
    changed += [augment(whole, [*range(8)], name) for name in POLICIES]
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in changed)


def test_a_box_covers_its_pixels_alone():
    mask = box_mask([(1, 2, 4, 3), (0, 0, 0, 0)], torch.zeros(2, 3, 5, 6))
    assert mask.shape == (2, 1, 5, 6)
    assert mask.nonzero().tolist() == [[0, 0, 2, 1], [0, 0, 2, 2], [0, 0, 2, 3]]


# Averages


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_twenty_steps_average_as_torch_does(kind):
    model = network()
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    optimizer = keep_average(model, make(model.parameters(), 0.1), 0.9)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step in range(20):
        model(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reference.update_parameters(model)
    last = copy.deepcopy(model.state_dict())
    theirs = {name: value for name, value in reference.module.state_dict().items() if "num_batches" not in name}
    with averaged(model, optimizer):
        ours = copy.deepcopy(model.state_dict())
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6, msg=name)
        assert not torch.equal(ours[name], last[name]), name
    assert all(torch.equal(value, last[name]) for name, value in model.state_dict().items())


EMA = ["--ema_decay", "0.8", "--checkpointing_steps", "1", "--keep_checkpoints", "30", "--report_to", "none"]
MIXED = ["--augmentation", "trivialaugment", "--random_erasing", "0.3", "--mixup_alpha", "0.2", "--cutmix_alpha", "1"]
# topology, processes, accumulation steps
CASES = {"ddp 2, accumulation 2": ("ddp", 2, 2), "fsdp 2": ("fsdp", 2, 1), "hsdp 2x2": ("hsdp", 4, 1)}


def launched(server, folder: Path, data: Path, topology: str, processes: int, parts: int, *flags: str) -> Result:
    words = [*STEPS, *EMA, *MIXED, "--data", str(data), "--max_steps", "12", "--loss", "bce", *flags]
    launch = {"num_processes": processes, "config_file": f"local_{topology}.yaml"}
    words += ["--gradient_accumulation_steps", str(parts)]
    return train(folder, *words, recipe=ROOT / "recipes/vit_augmentation.py", server=server, **launch)


@pytest.fixture(scope="module")
def single(server, runs, image_folder) -> Result:
    return launched(server, runs / "ema-single", image_folder, "ddp", 1, 1)


def looped(folder: Path, decay: float) -> dict[str, torch.Tensor]:
    """Return the average of the weights in all of a run's checkpoints, by a plain loop."""
    first, *others = [read_weights(path) for path in checkpoints(folder / "checkpoints")]
    average = {name: value.double() for name, value in first.items() if value.is_floating_point()}
    for weights in others:
        average = {name: decay * value + (1 - decay) * weights[name].double() for name, value in average.items()}
    return average


def kept(folder: Path) -> dict[str, torch.Tensor]:
    """Return the averages in a run's newest checkpoint."""
    exporter = importlib.import_module("export")
    return exporter.read_average(checkpoints(folder / "checkpoints")[-1])


def check_average(folder: Path, decay: float) -> None:
    ours, average = kept(folder), looped(folder, decay)
    assert average
    for name, value in average.items():
        torch.testing.assert_close(ours[name].double(), value, rtol=0, atol=1e-6, msg=name)
    last = read_weights(checkpoints(folder / "checkpoints")[-1])
    assert not all(torch.equal(ours[name], last[name]) for name in average)


@pytest.mark.quick
def test_one_process_averages_as_a_loop_over_its_checkpoints(single):
    check_average(single.folder, 0.8)
    assert len(single.series("ema_accuracy")) == len(single.series("accuracy"))
    assert single.series("ema_eval_loss") != single.series("eval_loss")


@pytest.mark.parametrize("name", CASES)
def test_each_strategy_averages_alike(server, runs, image_folder, single, name):
    result = launched(server, runs / f"ema-{name.split(',')[0].replace(' ', '-')}", image_folder, *CASES[name])
    np.testing.assert_allclose(result.series("loss"), single.series("loss"), rtol=1e-5)
    assert result.series("samples_digest") == single.series("samples_digest")
    assert result.series("ema_eval_loss") == pytest.approx(single.series("ema_eval_loss"), rel=1e-5)
    check_average(result.folder, 0.8)


@pytest.mark.parametrize(("topology", "processes"), [("ddp", 2), ("fsdp", 2)])
def test_a_resume_keeps_the_average_bitwise(server, runs, image_folder, single, tmp_path, topology, processes):
    name = "ddp 2, accumulation 2" if topology == "ddp" else "fsdp 2"
    folder = runs / f"ema-{topology}-2"
    if not folder.exists():
        launched(server, folder, image_folder, *CASES[name])
    flags = ["--resume_from_checkpoint", str(folder / "checkpoints/step-00000005")]
    result = launched(server, tmp_path, image_folder, *CASES[name], *flags)
    assert "resumed at step 5" in result.text
    assert tensors(tmp_path) == tensors(folder)
    assert result.series("ema_eval_loss") == [line["ema_eval_loss"] for line in evaluations(folder)]


def tensors(folder: Path) -> dict[str, bytes]:
    newest = checkpoints(folder / "checkpoints")[-1]
    files = [load_file(path) for path in sorted(newest.glob("tensors-*.safetensors"))]
    return {name: value.numpy().tobytes() for each in files for name, value in each.items()}


def evaluations(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "ema_eval_loss" in line]


def test_batch_norm_is_averaged_and_the_export_has_the_logged_accuracy(server, tmp_path):
    """Compare by two processes, whose own statistics differ."""
    flags = [*EMA, *MIXED, "--repeats", "2", "--max_steps", "4", "--epochs", "4", "--image_size", "16"]
    recipe = ROOT / "recipes/resnet_augmentation.py"
    result = train(tmp_path / "run", *flags, "--num_workers", "0", recipe=recipe, server=server, num_processes=2)
    check_average(result.folder, 0.8)
    assert {name.rpartition(".")[2] for name in kept(result.folder)} >= {"running_mean", "running_var"}
    exported = python(ROOT / "tools/export.py", result.folder, tmp_path / "weights", "--ema", server=server)
    assert exported.returncode == 0, exported.stderr
    check = json.loads((tmp_path / "weights/check.json").read_text())
    (logged,) = result.series("ema_accuracy")
    assert check["agrees"] is True
    assert check["averaged"] is True
    assert check["accuracy"] == pytest.approx(logged, abs=1.01 / 360)
    assert check["accuracy_of_the_run"] == logged
    newest = checkpoints(result.folder / "checkpoints")[-1]
    assert read_manifest(newest)["ema_accuracy"] == logged
    written = load_file(tmp_path / "weights/model.safetensors")
    for name, value in kept(result.folder).items():
        assert torch.equal(written[name], value), name


def test_without_its_flags_it_is_the_base(server, tmp_path, topologies):
    flags = [*SHORT, "--norm", "group", "--num_workers", "0", "--max_grad_norm", "1"]
    result = train(tmp_path, *flags, recipe=ROOT / "recipes/resnet_augmentation.py", server=server)
    np.testing.assert_allclose(result.series("loss"), topologies[1, 1].series("loss"), rtol=1e-5)
    assert result.series("samples_digest") == topologies[1, 1].series("samples_digest")
    assert not any("ema" in name for line in result.lines for name in line)
    refused = python(ROOT / "tools/export.py", tmp_path, tmp_path / "weights", "--ema", server=server)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].endswith("Leave --ema out, or train with --ema_decay.")
    assert not (tmp_path / "weights").exists()


# What is refused

REFUSED = {
    "--mixup_alpha -0.2": "--mixup_alpha -0.2 is out of range. Give a value from 0 to",
    "--cutmix_alpha nan": "--cutmix_alpha nan is out of range.",
    "--augmentation cutout": "invalid choice: 'cutout'",
    "--random_erasing 1.5": "--random_erasing 1.5 is out of range. Give a value from 0 to 1.",
    "--ema_decay 1": "--ema_decay 1.0 is out of range.",
    "--repeats 0": "--repeats 0 is out of range.",
    "--repeats 3": "--repeats 3 does not divide --global_batch_size 64. Change it.",
    "--cutmix_alpha 1 --global_batch_size 1": "each process has 1 images at a time. Give a --global_batch_size",
    "--mixup_alpha 1 --global_batch_size 66 --gradient_accumulation_steps 2": "that is a multiple of 4.",
}


@pytest.mark.parametrize("flags", REFUSED)
@pytest.mark.parametrize("recipe", ["resnet_augmentation", "vit_augmentation"])
def test_what_cannot_work_is_refused_in_one_line(server, tmp_path, recipe, flags):
    process = python(ROOT / f"recipes/{recipe}.py", *flags.split(), "--output_dir", tmp_path / "run", server=server)
    assert process.returncode == 1
    (error,) = process.stderr.splitlines()[-1:]
    assert error.startswith("error: ")
    assert REFUSED[flags] in error
    assert not (tmp_path / "run").exists()


def test_zero_is_refused():
    recipe = importlib.import_module("vit_augmentation")
    assert not any(name.startswith("zero") for name in recipe.STRATEGIES)


def test_a_pair_is_whole_on_each_process():
    recipe = importlib.import_module("resnet_augmentation")
    run_config, images, config = (kind() for kind in recipe.CONFIGS)
    images = dataclasses.replace(images, mixup_alpha=0.2)
    recipe.check(run_config, images, config, Launch("ddp", "no", 32, False))
    with pytest.raises(UserError, match=r"each process has 1 images at a time\. Give .* multiple of 128\.$"):
        recipe.check(run_config, images, config, Launch("ddp", "no", 64, False))

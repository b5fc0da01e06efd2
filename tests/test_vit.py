# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer's parts: sizes, weights by name, stochastic depth, interpolated positions."""

import numpy as np
import pytest
import torch
from conftest import ROOT, train
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from recipes.vit_pp import Stage
from shared.draws import augmentation_seed
from shared.errors import UserError
from shared.models.vit import (
    SIZES,
    VisionTransformer,
    drop_path_scales,
    load_pretrained,
    pixel_statistics,
    resize_positions,
    uniform,
    vit_config,
)
from shared.models.weights import init_weights

# Millions of parameters at 224 px and 1,000 classes, without a pooler: Ti to L after arXiv:2012.12877 and
# arXiv:2010.11929, H, g and G after arXiv:2106.04560 (table 2; patch 14).
MILLIONS = {"Ti": 5.7, "S": 22, "B": 86, "L": 304, "H": 632, "g": 1011, "G": 1843}


def network(name: str = "demo", drop_path: float = 0.0, **sizes) -> VisionTransformer:
    model = VisionTransformer(vit_config(name, 32, 8, 10, drop_path))
    init_weights(model, seed=0)
    return model


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    seeds = torch.tensor([augmentation_seed(0, 1, index) for index in range(8)], dtype=torch.uint64).view(torch.int64)
    return images, seeds


@pytest.mark.parametrize("name", MILLIONS)
def test_sizes_have_the_papers_numbers_of_parameters(name):
    with torch.device("meta"):
        model = VisionTransformer(vit_config(name, 224, 14 if name in "HgG" else 16, 1000, 0.0))
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[name], rel=0.02)
    assert set(SIZES) == {"demo", *MILLIONS}


def test_the_network_is_transformers_own(batch):
    ours = network().eval()
    theirs = ViTForImageClassification(ours.config).eval()
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(batch[0]), theirs(batch[0]).logits)


def test_weights_are_a_function_of_seed_and_name():
    first, second = network(), network()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    init_weights(second, seed=1)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    a, b = (first.vit.layers[number].mlp.fc1.weight for number in (0, 1))
    assert not torch.equal(a, b)
    assert float(a.detach().std()) == pytest.approx(0.02 * 0.88, rel=0.05)  # a normal cut at two deviations
    assert float(first.vit.layernorm.weight.min()) == 1
    assert float(first.classifier.bias.abs().max()) == 0


def test_uniforms_are_uniform_and_independent_of_each_other():
    draws = [uniform(torch.arange(100_000) + first) for first in (0, 10**12)]
    for draw in draws:
        counts = np.histogram(draw.numpy(), bins=20, range=(0, 1))[0]
        assert abs(counts / 5000 - 1).max() < 0.06
        assert draw.min() >= 0
        assert draw.max() < 1
    assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 0.02
    assert abs(np.corrcoef(draws[0][1:], draws[0][:-1])[0, 1]) < 0.02


def test_a_sample_is_dropped_alike_in_any_batch_and_any_forward(batch):
    images, seeds = batch
    model = network(drop_path=0.5).train()
    whole = model(images, seeds)
    torch.testing.assert_close(model(images[3:5], seeds[3:5]), whole[3:5])
    torch.testing.assert_close(model(images, seeds), whole)
    assert not torch.allclose(model(images, seeds + 1), whole)
    for block in model.vit.layers:
        block.recompute = True
    cross_entropy(model(images, seeds), torch.zeros(8, dtype=int)).backward()
    again = [parameter.grad.clone() for parameter in model.parameters()]
    for block in model.vit.layers:
        block.recompute = False
    model.zero_grad()
    cross_entropy(model(images, seeds), torch.zeros(8, dtype=int)).backward()
    for former, parameter in zip(again, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, former, rtol=1e-4, atol=1e-6)


def test_branches_are_dropped_at_their_rate_and_keep_their_mean():
    scales = drop_path_scales(torch.arange(20_000) * 7919, blocks=3, drop_path=0.4)
    assert scales.shape == (3, 2, 20_000)
    for block, rate in enumerate((0, 0.2, 0.4)):
        for branch in range(2):
            assert scales[block, branch].unique().tolist() == pytest.approx([0, 1 / (1 - rate)] if rate else [1])
            assert float(scales[block, branch].mean()) == pytest.approx(1, abs=0.02)
    both = (scales[2] == 0).float()
    assert float((both[0] * both[1]).mean()) == pytest.approx(0.16, abs=0.02)  # drawn apart


def test_evaluation_drops_nothing(batch):
    model = network(drop_path=0.5).eval()
    torch.testing.assert_close(model(*batch), model(batch[0]))


@pytest.mark.parametrize("stages", [1, 2, 4, 6])
def test_stages_one_after_the_other_are_the_network(batch, stages):
    images, seeds = batch
    model = network(drop_path=0.3).train()
    parts = [Stage(model, number, stages) for number in range(stages)]
    names = [name for part in parts for name in part.state_dict()]
    assert sorted(names) == sorted(model.state_dict())
    x = images
    for part in parts:
        x = part(x, seeds)
    torch.testing.assert_close(x, model(images, seeds))


def test_positions_are_interpolated_and_the_head_is_drawn_again(tmp_path):
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    saved = ViTForImageClassification(ViTConfig(**sizes, image_size=48, patch_size=8, num_labels=7))
    saved.save_pretrained(tmp_path)
    same = load_pretrained(tmp_path, 48, 7, 0.0, seed=0).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(same(images), saved.eval()(images).logits)
    other = load_pretrained(tmp_path, 64, 10, 0.0, seed=0).eval()
    assert other(torch.randn(2, 3, 64, 64)).shape == (2, 10)
    positions = saved.vit.embeddings.position_embeddings.data
    assert torch.equal(other.vit.embeddings.position_embeddings.data, resize_positions(positions, 8))
    torch.testing.assert_close(resize_positions(torch.ones(1, 37, 4), 8), torch.ones(1, 65, 4))
    ramp = torch.arange(6.0).repeat_interleave(6).view(1, 36, 1)  # the row that each patch lies in
    _, resized = resize_positions(torch.cat([torch.zeros(1, 1, 1), ramp], dim=1), 8).view(65).split([1, 64])
    rows = resized.view(8, 8)
    assert (rows - rows[:, :1]).abs().max() < 1e-5
    assert (rows[:, 0].diff() > 0.5).all()
    assert pixel_statistics(tmp_path) is None
    with pytest.raises(UserError, match="not a multiple of the patch size"):
        load_pretrained(tmp_path, 50, 10, 0.0, seed=0)


@pytest.mark.slow
def test_all_blocks_share_one_compiled_program(batch):
    model = network(drop_path=0.5).train()
    expected = model(*batch)
    for block in model.vit.layers:
        block.compile()
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(model(*batch), expected)


def test_blocks_that_are_compiled_one_by_one_train_alike(server, runs):
    """With activation checkpointing and stochastic depth, whose random numbers the compiler sees too."""
    recipe = ROOT / "recipes/vit.py"
    flags = [
        "--max_steps",
        "6",
        "--logging_steps",
        "1",
        "--report_to",
        "none",
        "--drop_path",
        "0.2",
        "--num_workers",
        "1",
    ]
    flags += ["--warmup_epochs", "0.2", "--activation_checkpointing"]
    eager = train(runs / "vit-eager", *flags, recipe=recipe, server=server)
    compiled = train(runs / "vit-compiled", *flags, "--compile", recipe=recipe, server=server)
    np.testing.assert_allclose(compiled.series("loss"), eager.series("loss"), rtol=1e-4)
    assert compiled.series("grad_norm") != eager.series("grad_norm")  # compiled: another rounding

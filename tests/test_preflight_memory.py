# SPDX-License-Identifier: Apache-2.0
"""Compare what tools/preflight.py --memory estimates with what real processes held, and with counts by hand."""

import json
import re
from types import SimpleNamespace

import preflights
import pytest
import torch
from conftest import ROOT
from memory_estimate import activations, held, inputs_of, peak
from preflights import sound

from shared.models.vit import VisionTransformer, vit_config

pytestmark = pytest.mark.slow
INPUTS = inputs_of(SimpleNamespace(image_size=224))

login_node, run, collection = preflights.login_node, preflights.run, preflights.collection


def estimate(
    run, machine: str, strategy: str, recipe: str, *flags: str, nodes: int = 2, options: tuple[str, ...] = ()
):
    """Run the preflight of a sound job with --memory."""
    return run(machine, strategy, "--memory", *options, *sound(machine, strategy, recipe, *flags, nodes=nodes)[2:])


def test_the_time_of_an_all_reduce_and_its_source(run, collection):
    """ViT-S has 22 million weights; a measurement made there is taken before what users saw."""

    def line(machine: str = "a100", nodes: int = 2) -> str:
        job = estimate(run, machine, "ddp", "vit", "--model", "S", "--image_size", "224", nodes=nodes)
        return next(line for line in job.out.splitlines() if line.startswith("Gradients"))

    # 15/8 of 87 MB at 5 GB/s
    assert line() == "Gradients of 87 MB: about 0.033 s a step by all-reduce at 5 GB/s on the bus (reports of users)."
    results = collection / "benchmarks/results"
    results.mkdir(parents=True)
    for day, per_node, rate in (("2026-01-01", 8, 7.0), ("2026-01-02", 8, 8.6), ("2026-01-03", 16, 200.0)):
        result = {"processes": 16, "processes_per_node": per_node, "rows": [{"bus, GB/s": {"median": rate}}]}
        (results / f"allreduce_a100_{day}.json").write_text(json.dumps(result))
    assert line().endswith("0.019 s a step by all-reduce at 8.6 GB/s on the bus (allreduce_a100_2026-01-02.json).")
    assert "at 200 GB/s on the bus (allreduce_a100_2026-01-03.json)" in line(nodes=1)
    assert "no bandwidth between nodes of h100 is known. Run benchmarks/allreduce.py there." in line("h100")


@pytest.fixture(scope="module")
def counted() -> list[dict]:
    """Return what real processes held and took at most, by benchmarks/memory.py."""
    (path,) = (ROOT / "benchmarks/results").glob("memory_cpu2_*.json")
    return [row for row in json.loads(path.read_text())["rows"] if row["how"] == "step"]


def network(model: str) -> VisionTransformer:
    with torch.device("meta"):
        return VisionTransformer(vit_config(model, 224, 16, 1000, 0.0))


@pytest.fixture(scope="module")
def networks() -> dict:
    """Return the shapes of the weights, and what a forward saves in fp32 and in bf16."""
    found = {}
    for name, model in (("S", network("S")), ("B", network("B"))):
        shapes = {name: weight.shape for name, weight in model.named_parameters()}
        found[name] = shapes, *(activations(model, INPUTS, half=half) for half in (False, True))
    return found


def test_estimates_beside_what_each_rank_held(counted, networks):
    """Parameters, gradients and optimizer state within 5 %; the peak of a step within 11 %, of tp in bf16 20."""
    names = {row["strategy"] for row in counted}
    assert len({name for name in names if not name.endswith("_bf16")}) == 10
    assert len({name for name in names if name.endswith("_bf16")}) == 8
    for row in counted:
        case = row["strategy"], row["ranks"], row["rank"]
        half, name = row["strategy"].endswith("_bf16"), row["strategy"].removesuffix("_bf16")
        kind = {"tp": "ddp", "pp": "ddp", "tp_fsdp": "fsdp", "zero3_offload": "zero3"}.get(name, name)
        tensor, stages = row.get("tensor", 1), row["ranks"] if name == "pp" else 1
        shapes, *saved = networks[row["model"]]
        split = {"tensor": tensor, "stages": stages}
        own = {"weight_bytes": 2 if half and kind.startswith("zero") else 4, "offloads": name == "zero3_offload"}
        own["replicas"] = 2 if kind == "hsdp" else 1
        kept = held(kind, shapes, row["ranks"], row["rank"], **split, **own)
        assert sum(kept.values()) == pytest.approx(sum(row[f"{name}_bytes"] for name in kept), rel=0.05), case
        for name, value in kept.items():
            assert value == pytest.approx(row[f"{name}_bytes"], rel=0.05), (*case, name)
        if kind in ("zero1", "zero2"):  # with what two ranks keep of a weight on their border
            assert kept["gradients"] == row["gradients_bytes"], case
        images = 4 * tensor * stages // row["ranks"]
        how = {"half": half, "accumulates": False, **split}
        most = peak(kind, shapes, row["ranks"], kept, saved[half], images, **how)["total"]
        if row["rank"] == 0:
            within = 0.2 if row["strategy"] == "tp_bf16" else 0.11
            assert most == pytest.approx(row["peak_bytes"], rel=within), case


def test_saved_bytes_of_a_block_by_hand():
    """ViT-S at 224 px in bf16: 197 tokens of width 384, 6 heads, MLP 1536."""
    model, tokens = network("S"), 197
    saved = activations(model, INPUTS, half=True)
    row = tokens * 384
    # In fp32: the input of both norms, two statistics of each a token. In bf16: their output once for each of q, k, v
    # and fc1; q, k, v, what attention gives; fc1's output and the activation's. In fp32: a sum for a head and token.
    norms, products, mlp = 2 * 4 * row + 4 * 4 * tokens, 8 * 2 * row, 2 * 2 * 4 * row
    assert saved.block == norms + products + mlp + 4 * 6 * tokens
    assert saved.split == 4 * 2 * row + mlp
    assert saved.entry == 4 * row
    assert saved.blocks == 12
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1 and "embed" not in name}
    assert saved.copies == pytest.approx(2 * sum(weight.numel() for weight in weights.values()), rel=0.05)


def test_checkpointing_keeps_the_inputs_of_blocks(networks):
    shapes, saved, _ = networks["S"]
    kept = held("ddp", shapes, 1, 0)
    how = {"half": False, "accumulates": False}
    plain = peak("ddp", shapes, 1, kept, saved, 64, **how)
    less = peak("ddp", shapes, 1, kept, saved, 64, recompute=True, **how)
    assert plain["activations"] == 64 * (saved.ends + 12 * saved.block) + saved.copies
    assert less["activations"] == 64 * (saved.ends + 12 * saved.entry + saved.block) + saved.copies


def test_the_verdict_and_its_remedies(run, monkeypatch):
    words = ["--image_size", "224", "--patch_size", "14", "--model", "G", "--global_batch_size", "1024"]
    job = estimate(run, "h100", "fsdp", "vit", *words)
    (line,) = job.errors
    assert job.status == 1
    remedies = re.findall(r"(--gradient_accumulation_steps (\d+)|--activation_checkpointing) \((\d+\.\d) GiB\)", line)
    assert len(remedies) == 2, line
    for flag, _, size in remedies:
        again = estimate(run, "h100", "fsdp", "vit", *words, *flag.split())
        assert again.status == 0, again.errors
        assert f"at most {size} GiB at once of 77.4." in again.out
        assert float(size) < 77.4
    # 16 bytes for each of 1.8 billion parameters, and nothing to shard them.
    job = estimate(run, "v100", "ddp", "vit", *words, nodes=128)
    assert "Give more GPUs, or a strategy that shards more" in job.errors[0]
    assert "6.9 parameters + 6.9 gradients + 13.7 optimizer" in job.errors[0]
    offload = estimate(run, "v100", "zero3_offload", "vit", *words, nodes=128)
    assert "0.0 parameters + 0.0 gradients + 0.0 optimizer" in "".join([offload.out, *offload.errors])
    # In fp16: weights and gradients 2 bytes each, Adam 12, and the gradients in fp32 again; of 128 nodes.
    assert f"offloaded, estimated: {1.843e9 * 20 / 128 / 2**30:.1f} GiB of 149.0 that" in offload.out
    monkeypatch.setenv("RECIPES_LAUNCH_FLAGS", "--mixed_precision no")
    one = estimate(run, "v100", "zero3_offload", "vit", *words[:-1], "4", nodes=1, options=("--gres=gpu:1",))
    assert "offloaded, estimated: 41.2 GiB of 37.3 that the job has there.\nwarning: that is too much" in one.out


@pytest.mark.parametrize(
    ("machine", "strategy", "recipe", "state"),
    [
        ("a100", "ddp", "resnet", 4),
        ("h100", "tp", "vit_tp", 8),
        ("h100", "pp", "vit_pp", 8),
        ("h100", "zero2", "vit_zero", 6),  # gradients 2, of 8 GPUs' Adam 12
        ("h100", "ddp", "vit_tp_by_hand", 8),
    ],
)
def test_every_kind_of_recipe_is_estimated(run, machine, strategy, recipe, state):
    """state: bytes for each parameter of the optimizer that the recipe builds."""
    size = ["--model", "L"] if recipe != "resnet" else ["--model", "resnet152"]
    job = estimate(run, machine, strategy, recipe, "--global_batch_size", "1024", *size, nodes=1)
    assert job.status == 0, job.errors
    sizes = re.search(r"estimated: ([\d.]+) parameters \+ [\d.]+ gradients \+ ([\d.]+) optimizer .* of 77.4", job.out)
    assert float(sizes[2]) == pytest.approx(float(sizes[1]) * state / 4, abs=0.11 * state / 4), job.out


def test_a_language_models_logits_are_counted(run):
    """12 bytes for each of 2,048 tokens and 128,256 words; the 1.24 billion weights take 4 bytes on each of 8 GPUs'
    shards, and so do the gradients."""
    flags = ["--model", "1B", "--vocabulary_size", "128256", "--sequence_length", "2048", "--global_batch_size", "16"]
    job = estimate(run, "h100", "fsdp", "llm", *flags)
    line = next(line for line in job.out.splitlines() if line.startswith("Memory of a GPU"))
    assert f"{12 * 2048 * 128256 / 2**30:.1f} logits" in line
    assert line.startswith(f"Memory of a GPU, estimated: {4 * 1_235_814_400 / 8 / 2**30:.1f} parameters + ")

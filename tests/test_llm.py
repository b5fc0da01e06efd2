# SPDX-License-Identifier: Apache-2.0
"""recipes/llm.py: every token weighs the same, on any topology."""

import ast
import difflib
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from conftest import ROOT, Result, python, train
from kills import LLM
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from shared.checkpoint import checkpoints, read_weights
from shared.text import open_corpus
from shared.text.loader import cut
from shared.text.tokenizer import END, byte_tokenizer, train_tokenizer

RECIPE, PACKING = (ROOT / f"recipes/{name}.py" for name in ("llm", "llm_packing"))
# The learning rate still rises in the last step. Completions differ in length: so do the tokens of each process.
STEPS = [*LLM, "--num_workers", "0", "--loss_on", "completion", "--max_grad_norm", "0.5"]
CASES = {
    "accumulation 4": ("ddp", 1, ["--gradient_accumulation_steps", "4"]),
    "ddp 2": ("ddp", 2, []),
    "ddp 4": ("ddp", 4, []),
    "fsdp 2": ("fsdp", 2, []),
    "fsdp 4": ("fsdp", 4, ["--activation_checkpointing"]),
    "hsdp 2x2": ("hsdp", 4, []),
    "zero1 2": ("zero1", 2, []),
    "zero2 2": ("zero2", 2, ["--gradient_accumulation_steps", "2"]),
    "zero3 2": ("zero3", 2, []),
}
RESUMED = {"fsdp 2": ("ddp", 4, []), "zero3 2": CASES["zero3 2"]}  # their first eight steps


@pytest.fixture(scope="module")
def run(server, tmp_path_factory) -> Callable[..., Result]:
    common = tmp_path_factory.mktemp("llm")

    def launch(
        name: str, topology: str, processes: int, flags: list[str], steps: int = 20, recipe=RECIPE, **more
    ) -> Result:
        options = {"num_processes": processes, "config_file": f"local_{topology}.yaml", "server": server} | more
        flags = [*STEPS, "--max_steps", str(steps), *flags]
        return train(common / name.replace(" ", "-"), *flags, recipe=recipe, **options)

    return launch


@pytest.fixture(scope="module")
def single(run) -> Result:
    return run("single", "ddp", 1, [])


def test_the_reference_clips_and_learns(single):
    losses, norms = single.series("loss"), np.array(single.series("grad_norm"))
    assert (norms > 0.5).sum() > 10
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.quick] * (name == "ddp 2")) for name in CASES])
def test_each_strategy_has_the_curve_and_the_weights_of_one_process(run, single, name):
    if name in RESUMED:
        run(name, *RESUMED[name], steps=8)
    result = run(name, *CASES[name])
    assert ("resumed at step 8" in result.text) == (name in RESUMED)
    assert result.series("samples_digest") == single.series("samples_digest")
    losses, reference = np.array(result.series("loss")), np.array(single.series("loss"))
    np.testing.assert_allclose(losses, reference, rtol=1e-6)
    np.testing.assert_allclose(result.series("grad_norm"), single.series("grad_norm"), rtol=1e-5)
    for figure in ("bits_per_byte", "perplexity", "eval_loss"):
        assert result.series(figure)[-1:] == pytest.approx(single.series(figure), rel=1e-6)
    assert result.summary["world_size"] == CASES[name][1]
    ours, theirs = weights(result), weights(single)
    assert ours.keys() == theirs.keys()
    for each, tensor in theirs.items():
        torch.testing.assert_close(ours[each], tensor, rtol=0, atol=1e-5, msg=each)


def weights(result: Result) -> dict[str, torch.Tensor]:
    return read_weights(checkpoints(result.folder / "checkpoints")[-1])


def test_recomputing_blocks_changes_no_bit(run, single):
    result = run("recomputed", "ddp", 1, ["--activation_checkpointing"])
    assert result.series("loss") == single.series("loss")
    assert result.series("grad_norm") == single.series("grad_norm")


def test_the_usual_mean_of_each_micro_batch_is_another_training(run, single, tmp_path):
    """Its weight is the micro-batch's own count: under accumulation the same recipe is more than 0.5 % off."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'recipes')!r})\n"
        "import llm\n"
        "class Mean(llm.Loader):\n"
        "    def __iter__(self):\n"
        "        for batch in super().__iter__():\n"
        "            count = int((batch.labels != -100).sum())\n"
        "            yield batch._replace(step_weight=count * batch.parts)\n"
        "llm.Loader = Mean\n"
        "if __name__ == '__main__':\n"
        "    llm.main(*llm.parse(*llm.CONFIGS))\n"
    )
    result = run("wrong", "ddp", 1, ["--gradient_accumulation_steps", "4"], recipe=wrong)
    assert result.series("samples_digest") == single.series("samples_digest")
    off = abs(np.array(result.series("grad_norm")) / single.series("grad_norm") - 1)
    assert off.max() > 5e-3


def test_the_loop_is_vits():
    """`train_one_epoch` and `main` differ from vit.py's in the batch, the loss and the words of the modality alone."""
    sources = [(ROOT / f"recipes/{name}.py").read_text() for name in ("vit", "llm")]
    for function, expected in (
        ("train_one_epoch", {
            "logits = model(batch.images, batch.seeds)",
            "loss = cross_entropy(logits.float(), batch.labels, label_smoothing=config.label_smoothing, "
            "reduction='sum')",
            "loss = model(batch.tokens, batch.labels, batch.positions)",
        }),
        ("main", {
            "def main(run_config, images, config):",
            "check(run_config, images, config, this_launch())",
            "train_loader, eval_loader = build_loaders(accelerator, run_config, images, config)",
            "classes, steps_per_epoch = (train_loader.dataset.source.classes, train_loader.order.steps_per_epoch)",
            "run = Run(accelerator, run_config, images, config, train_loader, eval_loader)",
            "model = build_model(images, config, len(classes), run_config.seed)",
            "def main(run_config, text, config):",
            "check(run_config, text, config, this_launch())",
            "train_loader, eval_loader = build_loaders(accelerator, run_config, text, config)",
            "vocabulary, steps_per_epoch = "
            "(train_loader.dataset.tokenizer.size, train_loader.order.steps_per_epoch)",
            "run = Run(accelerator, run_config, text, config, train_loader, eval_loader, BITS_PER_BYTE)",
            "model = build_model(text, config, vocabulary, run_config.seed)",
        }),
    ):  # fmt: skip
        lines = [
            ast.unparse(node).splitlines()
            for source in sources
            for node in ast.parse(source).body
            if getattr(node, "name", "") == function
        ]
        different = {line[2:].strip() for line in difflib.ndiff(*lines) if line[:1] in "+-"}
        assert {line for line in different if not line.startswith('"""')} == expected


def test_bf16_leaves_the_loss_in_fp32(run, single):
    """accelerate's FSDP2 would round what forward returns, the loss, to bf16: 6.9688 for 6.9556."""
    losses = {}
    for topology in ("ddp", "fsdp"):
        losses[topology] = run(f"bf16 {topology}", topology, 2, [], steps=6, mixed_precision="bf16").series("loss")
        np.testing.assert_allclose(losses[topology], single.series("loss")[:6], rtol=1e-3)
        rounded = torch.tensor(losses[topology]).bfloat16().tolist()
        assert all(loss != other for loss, other in zip(losses[topology], rounded, strict=True))
    assert losses["ddp"] != single.series("loss")[:6]


def test_sizes_are_those_of_llama_3(monkeypatch):
    """Llama-3.2-1B has 1,235,814,400 weights, its head tied, and Llama-3.1-8B 8,030,261,248; by hand, with the
    vocabulary of 128,256."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    recipe = importlib.import_module("llm")
    counts = {}
    for name in ("1B", "8B"):
        with torch.device("meta"):
            model = recipe.build_model(recipe.TextConfig(), recipe.Config(model=name), 128256, 0)
        counts[name] = sum(each.numel() for each in model.parameters())
    assert counts == {"1B": 1_235_814_400, "8B": 8_030_261_248}


# Packing


@pytest.fixture(scope="module")
def packed(run) -> Result:
    return run("packed", "ddp", 1, [], recipe=PACKING)


@pytest.mark.parametrize(("topology", "processes", "steps"), [("ddp", 1, 8), ("ddp", 2, 0), ("fsdp", 2, 0)])
def test_packing_is_the_same_on_each_topology_and_after_a_stop(run, packed, topology, processes, steps):
    name = f"packed {topology} {processes}"
    for most in (steps, 20) if steps else (20,):
        result = run(name, topology, processes, [], recipe=PACKING, steps=most)
    assert result.series("samples_digest") == packed.series("samples_digest")
    np.testing.assert_allclose(result.series("loss"), packed.series("loss"), rtol=0 if steps else 1e-6)
    np.testing.assert_allclose(result.series("grad_norm"), packed.series("grad_norm"), rtol=0 if steps else 1e-5)


def test_an_evaluation_of_packed_documents_is_that_of_separate_ones(run):
    flags = ["--learning_rate", "0"]
    results = [run(f"still {recipe.stem}", "ddp", 1, flags, 1, recipe) for recipe in (RECIPE, PACKING)]
    for figure in ("bits_per_byte", "perplexity", "eval_loss"):
        ours, theirs = (result.series(figure) for result in results)
        assert ours == pytest.approx(theirs, rel=1e-6)
    blocks = re.search(r"packed into ([\d,]+) blocks, 9\d\.\d% full; unpacked: \d\d\.\d%", results[1].text)
    assert int(blocks[1].replace(",", "")) < 0.6 * 2551  # the sequences of llm.py


def test_a_packed_document_has_the_loss_and_the_gradients_of_one_alone(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes")
    recipe = importlib.import_module("llm_packing")
    text = recipe.TextConfig(data="docstrings", loss_on="completion", sequence_length=96)
    sequences = cut(open_corpus("docstrings", 0.1)[1], byte_tokenizer(), text)
    blocks = recipe.pack(sequences)
    assert sorted(piece for block in blocks.members for piece in block) == [*range(len(sequences))]
    assert all(sequences.pieces[block, 1].sum() <= 96 for block in blocks.members)
    assert blocks.counted.sum() == sequences.counted.sum()
    chosen = [index for index, block in enumerate(blocks.members) if len(block) > 1][:6]
    alone = [piece for index in chosen for piece in blocks.members[index]]
    assert len(alone) >= 12
    model = recipe.build_model(text, recipe.Config(), 257, 0)
    found = []
    for data, indices in ((blocks, chosen), (sequences, alone)):
        batch = data.__getitems__([(0, index) for index in indices])
        model.zero_grad()
        loss = model(batch.tokens, batch.labels, batch.positions)
        loss.backward()
        found.append((loss.detach(), torch.cat([each.grad.flatten() for each in model.parameters()])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-5 * float(found[1][1].abs().max()))
    batch = blocks.__getitems__([(0, chosen[0])])
    first = int(blocks.pieces[blocks.members[chosen[0]][0], 1])
    losses = []
    for begin in (1, 2):  # other tokens in the block's first document, of which the others must see nothing
        labels = batch.labels.clone()
        labels[0, :first] = -100
        tokens = torch.cat([torch.full((1, first), begin), batch.tokens[:, first:]], dim=1)
        losses.append(model(tokens, labels, batch.positions).item())
    assert losses[0] == losses[1] > 0


# The run's folder, and weights for others


def test_the_runs_folder_has_the_tokenizer_that_made_its_tokens(single):
    text = (single.folder / "tokenizer.json").read_text()
    documents = open_corpus("docstrings", 0.1)[0].documents
    made = train_tokenizer((each.prompt + each.text for each in documents), 1024)
    assert text == made.text
    assert single.config["identity"]["tokenizer_sha256"] == made.sha256
    assert single.config["vocabulary"] == 1024


def test_the_exported_network_is_transformers_own(run, single, server, tmp_path):
    """Under its own name, tied, with its tokenizer; bits per byte are the run's, and a fine-tuning starts from it."""
    out = tmp_path / "weights"
    process = python(ROOT / "tools/export.py", single.folder, out, server=server)
    assert process.returncode == 0, process.stderr
    assert json.loads((out / "check.json").read_text())["bits_per_byte"] == pytest.approx(
        single.series("bits_per_byte")[-1], rel=1e-5
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert type(model) is LlamaForCausalLM
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in weights(single)  # the same tensor is kept once
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.testing.assert_close(named, weights(single), rtol=0, atol=0)
    said = "def naïve(text):\n"
    assert tokenizer.decode(tokenizer.encode(said, add_special_tokens=False)) == said
    tuned = run("from the export", "ddp", 1, ["--pretrained", str(out), "--learning_rate", "0"], steps=1)
    assert tuned.series("bits_per_byte")[-1] == pytest.approx(single.series("bits_per_byte")[-1], rel=1e-5)
    refused = python(ROOT / "tools/export.py", single.folder, tmp_path / "b", "--images", "3", server=server)
    assert refused.stderr == "error: --images 3: the run's data is text. Leave it out.\n"


def test_another_tokenizer_is_another_run(run, single, server):
    words = [RECIPE, *STEPS, "--max_steps", "24", "--output_dir", single.folder]
    process = python(*words, "--vocabulary_size", "512", server=server)
    assert process.returncode == 1
    assert "vocabulary_size" in process.stderr


# Pretrained networks


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """Save a network of two grouped-query blocks and its tokenizer, with the dropout of its training."""
    folder = tmp_path_factory.mktemp("pretrained")
    made = train_tokenizer([text for _, text in sorted(topics.items())], 600)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(made.text), eos_token=END).save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 128, "vocab_size": 640, "max_position_embeddings": 64, "attention_dropout": 0.1}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(run, pretrained) -> Result:
    return run("tuned", "ddp", 1, ["--pretrained", str(pretrained)], steps=5)


@pytest.mark.parametrize(("topology", "processes"), [("fsdp", 2), ("zero3", 2)])
def test_each_strategy_fine_tunes_alike(run, tuned, pretrained, topology, processes):
    result = run(f"tuned {topology}", topology, processes, ["--pretrained", str(pretrained)], steps=5)
    np.testing.assert_allclose(result.series("loss"), tuned.series("loss"), rtol=1e-6)
    assert result.text.count("has attention_dropout: trained here without") == 1
    assert not (result.folder / "tokenizer.json").exists()  # it has its own


def test_the_loss_is_transformers_own(pretrained, monkeypatch):
    """The summed loss of a step over its counted tokens, with the pretrained network's weights, is the mean that the
    library computes for the same tokens."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    llm = importlib.import_module("llm")
    model = LlamaForCausalLM.from_pretrained(pretrained).eval()
    tokens = torch.arange(3, 35).view(2, 16)
    labels = torch.where(torch.arange(16) < 4, -100, tokens.roll(-1, 1))
    shifted = torch.full_like(labels, -100)
    shifted[:, 1:] = labels[:, :-1]  # the library shifts by itself, and loses the last label
    expected = model(tokens, labels=shifted).loss * (shifted != -100).sum()
    own = type("Own", (llm.SummedLoss, LlamaForCausalLM), {})
    model.__class__ = own
    kept = labels.clone()
    kept[:, -1] = -100
    torch.testing.assert_close(model(tokens, kept), expected)


@pytest.mark.parametrize(
    ("change", "flags", "line"),
    [
        (
            {},
            ["--sequence_length", "65"],
            r"error: --sequence_length 65 is more than the 64 positions of --pretrained",
        ),
        ({"model_type": "granite", "logits_scaling": 8.0}, [], "scales or caps its logits. Give another network."),
        ({"model_type": "gpt_bigcode"}, [], "cannot be loaded: "),
        ({"vocab_size": 500}, [], "has 600 tokens, its network 500. Give a folder where the two belong together."),
        (None, [], "has no tokenizer that transformers reads. Copy it there."),
    ],
)
def test_a_network_that_does_not_fit_is_one_line(server, pretrained, tmp_path, change, flags, line):
    for path in pretrained.iterdir():
        lost = "token" if change is None else "safetensors" if "gpt_bigcode" in str(change) else "/"
        if lost not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    values = json.loads((pretrained / "config.json").read_text()) | (change or {})
    (tmp_path / "config.json").write_text(json.dumps(values))
    words = [*STEPS, *flags, "--pretrained", tmp_path, "--output_dir", tmp_path / "run"]
    process = python(RECIPE, *words, server=server)
    assert process.returncode == 1
    (error,) = [each for each in process.stderr.splitlines() if each.startswith("error: ")]
    assert line in error

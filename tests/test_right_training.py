# SPDX-License-Identifier: Apache-2.0
"""Precision, momentum, dropout, device, warmup and sources: a run trains with what it says."""

import importlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, launch_command, python, train
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import ViTConfig, ViTForImageClassification

from shared.checkpoint import read_state, read_weights
from shared.checkpoint.origin import differing
from shared.config import parse
from shared.errors import UserError
from shared.images import ImageConfig
from shared.launch import program, this_launch
from shared.models.vit import VisionTransformer
from shared.models.weights import initial_value
from shared.optim import zero_momentum
from shared.order import TrainingOrder
from shared.run.identity import identity, recipe_source

RESNETS = sorted(path.stem for path in (ROOT / "recipes").glob("resnet*.py"))


@pytest.fixture
def recipe(monkeypatch):
    """A recipe by name, as a module."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # parse sets another
    return importlib.import_module


# fp16


def test_the_first_scale_of_fp16_overflows_no_loss_of_21843_classes():
    """As in the recipes' loops: logits in fp16, the loss in fp32, times GradScaler's first 65,536."""
    torch.manual_seed(0)
    inputs, labels, classes = torch.randn(8, 32).half(), torch.arange(8), 21843
    head = nn.Linear(32, classes)
    optimizer, scaler = torch.optim.SGD(head.parameters(), 0.1), torch.amp.GradScaler("cpu")
    before = head.weight.detach().clone()
    logits = torch.nn.functional.linear(inputs, head.weight.half(), head.bias.half())
    assert scaler.scale(cross_entropy(logits, labels, label_smoothing=0.1)).isinf()
    scaler.scale(cross_entropy(logits.float(), labels, label_smoothing=0.1)).backward()
    assert scaler.get_scale() == 65536
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    scaler.step(optimizer)
    assert (head.weight != before).any()


def sgd(fused: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer and the recipes' optimizer; not fused: torch's plain one."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True, fused=fused)
    return model, zero_momentum(optimizer) if fused else optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, seed: int, factor=1.0):
    inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    scaler.scale(model(inputs * factor).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def test_a_first_step_that_fp16_skips_leaves_no_trace_in_the_momentum():
    (model, optimizer), (plain, reference) = sgd(), sgd(fused=False)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    torch.full((1 << 16,), float("nan"))  # what the next allocation may find in its memory
    step(model, optimizer, scaler, seed=0, factor=1e30)
    assert scaler.get_scale() == 512
    torch.testing.assert_close([*model.parameters()], before, rtol=0, atol=0)
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert all((buffer == 0).all() for buffer in buffers)
    for seed in (1, 2):
        step(model, optimizer, scaler, seed)
        step(plain, reference, torch.amp.GradScaler("cpu", enabled=False), seed)
    torch.testing.assert_close([*model.parameters()], [*plain.parameters()], rtol=1e-6, atol=1e-7)


def test_a_momentum_of_zeros_is_bitwise_the_one_that_torch_begins_with():
    weights = []
    for make in (zero_momentum, lambda optimizer: optimizer):
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        optimizer = make(torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True, fused=True))
        for seed in range(4):
            step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), seed)
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("name", RESNETS)
def test_every_fused_sgd_of_a_recipe_begins_so(recipe, name):
    module, model = recipe(name), nn.Linear(4, 4)
    optimizer, _ = module.build_optimizer(model, module.Config(), 10)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None  # as GradScaler says that it skips
    optimizer.step()
    assert all((state["momentum_buffer"] == 0).all() for state in optimizer.state.values())


# vit_fsdp.py in fp16 on CPU processes, whose scaler accelerate keeps for GPUs. In step 3 a gradient of one process
# alone is inf; in step 4 accelerate's own clipping is tried.
SCALED = """
import os
import torch
import vit_fsdp as recipe
from shared.checkpoint import read_state, read_weights
from shared.config import parse
from torch.nn.utils import clip_grad_norm_
build, clip, steps = recipe.build_accelerator, recipe.clip_grad_norm, 0
def scaled(*arguments):
    accelerator = build(*arguments)
    os.environ["ACCELERATE_MIXED_PRECISION"] = accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator
def clipped(accelerator, model, max_norm):
    global steps
    steps += 1
    if steps == 3 and os.environ["RANK"] == "1":
        model.classifier.weight.grad.to_local()[0, 0] = float("inf")
    if steps != 4:
        return clip(accelerator, model, max_norm)
    try:
        return accelerator.clip_grad_norm_(model.parameters(), max_norm)
    except RuntimeError as error:
        print(f"accelerate: {error}", flush=True)
        return clip_grad_norm_(model.parameters(), max_norm)
recipe.build_accelerator, recipe.clip_grad_norm = scaled, clipped
recipe.main(*parse(*recipe.CONFIGS))
"""


def test_fsdp2_in_fp16_takes_its_first_step_and_all_ranks_skip_the_same(server, tmp_path):
    script = tmp_path / "vit_fsdp.py"
    script.write_text(SCALED)
    flags = ["--max_steps", "4", "--checkpointing_steps", "1", "--keep_checkpoints", "9", "--warmup_epochs", "0"]
    flags += ["--logging_steps", "1", "--num_workers", "0", "--report_to", "none"]
    run = train(tmp_path / "run", *flags, recipe=script, server=server, num_processes=2, config_file="local_fsdp.yaml")
    assert run.config["identity"]["mixed_precision"] == "fp16"
    losses, norms = run.series("loss"), run.series("grad_norm")
    assert all(loss * 128 % 1 for loss in losses), "computed on half-precision logits"
    assert [norm is None for norm in norms] == [False, False, True, False]
    folders = sorted((tmp_path / "run/checkpoints").iterdir())
    scales = [read_state(folder)["scaler"]["scale"] for folder in folders]
    assert scales == [65536, 65536, 32768, 32768]
    first, second, third, fourth = (read_weights(folder) for folder in folders)
    for name, weight in first.items():
        assert (weight != initial_value(name, weight.shape, 0)).any(), name
        assert (second[name] != weight).any()
        assert torch.equal(third[name], second[name]), name
        assert (fourth[name] != third[name]).any()
    # When this no longer holds, shared.optim.clip_grad_norm needs no unscaling of its own.
    assert run.text.count("accelerate: unscale_() has already been called on this optimizer") == 2


UNITS = """
import vit as recipe
from shared.config import parse
from torch.distributed.fsdp import FSDPModule
whole = recipe.parallelize
def counted(*arguments):
    model, optimizer = whole(*arguments)
    blocks = [each for each in model.modules() if isinstance(each, FSDPModule) and "DropPathLayer" in str(type(each))]
    print("units:", len(blocks), flush=True)
    return model, optimizer
recipe.parallelize = counted
recipe.main(*parse(*recipe.CONFIGS))
"""


def test_fsdp_finds_the_blocks_though_no_yaml_names_them(server, tmp_path):
    """All six; without units FSDP would gather the whole network at once, silently."""
    (tmp_path / "units.py").write_text(UNITS)
    flags = ["--max_steps", "1", "--num_workers", "0", "--report_to", "none"]
    launch = {"recipe": tmp_path / "units.py", "num_processes": 2, "config_file": "local_fsdp.yaml"}
    assert train(tmp_path / "run", *flags, server=server, **launch).text.count("units: 6\n") == 2


@pytest.mark.parametrize("name", ["vit_tp", "vit_pp", "vit_tp_by_hand"])
def test_what_shares_no_loss_scale_refuses_fp16(recipe, monkeypatch, name):
    module = recipe(name)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match=r"fp16.* Set mixed_precision to bf16 or no"):
        module.check(*(config() for config in module.CONFIGS), this_launch())


def test_a_resnet_in_bf16_refuses_images_of_which_cpus_compute_garbage(recipe, monkeypatch):
    """Stride 2 on 1 x 1 pixels: oneDNN's bf16 convolution leaves the gradient of eight of nine weights unwritten."""
    module = recipe("resnet")
    run_config, _, config = (kind() for kind in module.CONFIGS)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="Give --image_size 32"):
        module.check(run_config, ImageConfig(image_size=16), config, this_launch())
    module.check(run_config, ImageConfig(image_size=17), config, this_launch())
    module.check(run_config, ImageConfig(image_size=16), config, this_launch()._replace(on_gpu=True))
    assert "MKL-DNN v3.13" in torch.__config__.show(), "look whether a newer one computes it"


# Dropout, which each process would draw for itself


def active(model: nn.Module) -> list[str]:
    """Names of modules that drop by torch's random state, as layers and as transformers' attention do."""
    modules = dict(model.named_modules()).items()
    return [name for name, module in modules if getattr(module, "p", 0) or getattr(module, "attention_dropout", 0)]


@pytest.fixture(scope="module")
def dropping(tmp_path_factory) -> str:
    """A folder that transformers saved, of a network with dropout of both kinds."""
    folder, sizes = tmp_path_factory.mktemp("dropping"), {"hidden_size": 32, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8, "num_labels": 10}
    config = ViTConfig(**sizes, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    ViTForImageClassification(config).save_pretrained(folder)
    assert len(active(ViTForImageClassification(config))) > 5
    return str(folder)


@pytest.mark.parametrize("name", [*RESNETS, "vit", "vit_fsdp", "vit_tp", "vit_pp"])
def test_no_network_of_a_recipe_has_an_active_dropout(recipe, dropping, capfd, monkeypatch, name):
    module, images = recipe(name), ImageConfig()
    assert active(module.build_model(images, module.Config(), 10, 0)) == []
    if name.startswith("vit"):
        model = module.build_model(images, module.Config(pretrained=dropping), 10, 0)
        assert active(model) == []
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "--pretrained" in line]
        given = "hidden_dropout_prob 0.1, attention_probs_dropout_prob 0.2"
        assert line == f"--pretrained {dropping} has {given}: trained here without dropout; see --drop_path"
        pixels = torch.randn(2, 3, 32, 32)
        assert torch.equal(model.train()(pixels), model(pixels))
        monkeypatch.setenv("RANK", "1")
        module.build_model(images, module.Config(pretrained=dropping), 10, 0)
        assert "--pretrained" not in capfd.readouterr().err


def test_a_network_with_dropout_is_not_built():
    with pytest.raises(AssertionError, match="drawn by each process"):
        VisionTransformer(ViTConfig(num_hidden_layers=1, hidden_dropout_prob=0.1))


# The device


@pytest.mark.parametrize(("device", "index"), [("cuda:3", 3), ("cuda", 0)])
def test_dali_builds_its_pipeline_on_the_gpu_of_the_process(recipe, device, index):
    """In a thread, where torch's current device is 0 on every process. Building a pipeline needs no GPU yet."""
    module = recipe("resnet_dali")
    batches = module.Dali.__new__(module.Dali)
    batches.num_threads, batches.device, batches.copied = 1, torch.device(device), object()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(batches.build, 8, 32).result().device_id == index


def test_torchdata_pins_on_the_gpu_of_the_process(recipe, monkeypatch):
    """PinMemory sets the device of its thread only where it is told the kind; recorded here, for it needs a GPU."""
    from torchdata import nodes

    given = []
    monkeypatch.setattr(nodes, "PinMemory", lambda node, *kind: (given.append(kind), node)[1])
    order = TrainingOrder(64, 8, 8, 0, 1, 0)
    views = SimpleNamespace(order=order, __getitems__=list)
    recipe("resnet_torchdata").read_nodes(views, 1, torch.device("cuda:3"))
    assert given == [("cuda",)]


# The warmup


@pytest.mark.parametrize(("name", "epochs", "warmup"), [("resnet", 3, 0.9), ("resnet", 4, 3.0), ("vit_pp", 5, 5 / 12)])
def test_a_default_warmup_ends_within_the_run(recipe, capsys, name, epochs, warmup):
    module = recipe(name)
    configs = parse(*module.CONFIGS, arguments=["--epochs", str(epochs)])
    config = configs[-1]
    assert config.warmup_epochs == pytest.approx(warmup)
    said = f"the warmup takes {warmup:g} of {epochs} epochs" in capsys.readouterr().err
    assert said == (warmup < epochs - 1)
    assert identity(name, "no", *configs)["warmup_epochs"] == config.warmup_epochs
    model = nn.Linear(1, 1)
    _, scheduler = module.build_optimizer(model, config, 100)
    rates = [scheduler.lr_lambdas[0](number) for number in range(100 * epochs)]
    assert max(rates) == pytest.approx(1)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize("word", ["--warmup_epochs=3", "--warmup-epochs=3.5"])
def test_a_warmup_that_the_run_does_not_leave_is_refused(recipe, word):
    module = recipe("resnet")
    with pytest.raises(UserError, match=r"--warmup_epochs 3(.5)? leaves nothing of --epochs 3 .* Give less than 3\."):
        parse(*module.CONFIGS, arguments=["--epochs", "3", word])
    *_, config = parse(*module.CONFIGS, arguments=["--epochs", "3", "--warmup_epochs", "2.9"])
    assert config.warmup_epochs == 2.9


@pytest.mark.slow
def test_the_preflight_refuses_such_a_warmup():
    words = ["h100", "ddp", "--time=1:00:00", "-A", "abc@h100", "--", "recipes/resnet.py"]
    process = python("tools/preflight.py", *words, "--epochs", "5", "--warmup_epochs", "5")
    (error,) = process.stderr.splitlines()
    assert error.startswith("error: --warmup_epochs 5 leaves nothing of --epochs 5"), process.stderr
    assert process.returncode == 1


# A recipe that was edited between two starts

RECIPE = '''"""A lesson."""
from torch import nn
from torch.nn.functional import cross_entropy
STEP = 3

class Config:
    epochs: int = HfArg(default=1, help="passes")

def train(x):
    """Do."""
    return cross_entropy(x, STEP)  # once

def main(model):
    train(nn.Linear(2, 2)(model))

if __name__ == "__main__":
    main(1)
'''


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("cross_entropy(x, STEP)  # once", "cross_entropy(\n        x,\n        STEP,\n    )", []),
        ('    """Do."""\n', "", []),
        ('"""A lesson."""', '"""Another."""\nimport math', []),
        ('help="passes"', 'help="rounds"', []),
        ("STEP)", "STEP) * 0.5", ["train"]),
        ("train(nn", "print(nn", ["main"]),
        ("STEP = 3", "STEP = 4", ["STEP"]),
        ("torch.nn.functional", "mine", ["train"]),
        ("import nn", "import optim as nn", ["main"]),
        ("def main", "def helper():\n    pass\n\ndef main", ["helper"]),
        ("main(1)", "main(2)", ["the code at the end"]),
        ("epochs: int", "def steps(self): return 1\n    epochs: int", ["Config"]),
    ],
)
def test_only_what_a_recipe_does_counts(tmp_path, monkeypatch, old, new, names):
    path = tmp_path / "recipe.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    sources = []
    for text in (RECIPE, RECIPE.replace(old, new)):
        path.write_text(text)
        program.cache_clear()
        sources.append(recipe_source())
    assert text != RECIPE
    assert differing(*sources) == names
    assert differing({}, sources[0]) == []  # an older version wrote none
    path.write_text("edited = 'while the data is listed'")
    assert recipe_source() == sources[1]
    path.unlink()
    program.cache_clear()
    assert recipe_source() == {}


def test_an_edited_recipe_is_no_longer_the_run_of_its_folder(server, tmp_path):
    """The folder's name stays, so that the edit is told; a checkpoint without the entries is resumed in silence."""
    path, folder = tmp_path / "resnet.py", tmp_path / "run"
    source = (ROOT / "recipes/resnet.py").read_text()

    def start(text: str, *flags: str) -> str:
        path.write_text(text)
        more = ["--output_dir", str(folder), "--num_workers", "0", "--report_to", "none", "--global_batch_size", "8"]
        return server.launch([*launch_command()[2:], str(path), *more, *flags]).stdout

    start(source, "--max_steps", "1")
    formatted = source.replace("model.train()\n", "model.train()  # not eval\n\n").replace("Train a ResNet", "Fit one")
    assert "already finished" in start(formatted, "--max_steps", "1")
    edited = source.replace("loss = cross_entropy(", "loss = 2 * cross_entropy(")
    for steps in ("1", "2"):
        error = start(edited, "--max_steps", steps).splitlines()[-1]
        assert (
            "belongs to another run: train_one_epoch of the recipe was edited. Give the values it had, or another"
            in error
        )
        assert "--resume_override source" in error
    (manifest,) = (folder / "checkpoints").glob("*/manifest.json")
    values = json.loads(manifest.read_text())
    values["shared"]["optim.py"] = "other"
    manifest.write_text(json.dumps(values))
    text = start(edited, "--max_steps", "2", "--resume_override", "source")
    assert "resumed at step 1" in text
    assert "warning: shared/ has changed since the checkpoint was written: optim.py" in text
    manifest = sorted((folder / "checkpoints").glob("*/manifest.json"))[-1]
    for old, changes in ((manifest, json.loads(manifest.read_text())), (folder / "config.json", {})):
        changes = changes or json.loads(old.read_text())
        changes.pop("shared")
        changes["identity"].pop("source")
        old.write_text(json.dumps(changes))
    text = start(source, "--max_steps", "3")
    assert "resumed at step 2" in text
    assert "warning" not in text


def test_every_setting_of_the_images_is_another_run_but_what_may_be_left_out():
    """A column decides where it is given."""
    other = {"data": "x", "val_fraction": 0.1, "shuffle_block": 8, "image_column": "x", "label_column": "x"}
    other |= {"image_size": 64, "min_crop_area": 0.5, "horizontal_flip": True, "eval_crop_ratio": 0.5}
    other |= {"train_images": 100}
    assert {*other, "max_undecodable"} == {field.name for field in fields(ImageConfig)}
    for name, value in other.items():
        assert ImageConfig(**{name: value}).identity() != ImageConfig().identity(), name
    assert ImageConfig(max_undecodable=0.5).identity() == ImageConfig().identity()

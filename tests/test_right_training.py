# SPDX-License-Identifier: Apache-2.0
"""Precision, momentum, dropout, warmup and device: what a run trains with is what it says."""

import importlib
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, python
from torch import nn
from torch.nn.functional import cross_entropy

from shared.config import UserError, identity, parse
from shared.data import TrainingOrder
from shared.optim import zero_momentum

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
    run_config, config = parse(module.RunConfig, module.Config, arguments=["--epochs", str(epochs)])
    assert config.warmup_epochs == pytest.approx(warmup)
    said = f"the warmup takes {warmup:g} of {epochs} epochs" in capsys.readouterr().err
    assert said == (warmup < epochs - 1)
    assert identity(name, "no", run_config, config)["warmup_epochs"] == config.warmup_epochs
    model = nn.Linear(1, 1)
    _, scheduler = module.build_optimizer(model, config, 100)
    rates = [scheduler.lr_lambdas[0](number) for number in range(100 * epochs)]
    assert max(rates) == pytest.approx(1)
    assert rates[-1] < 1e-3


@pytest.mark.parametrize("word", ["--warmup_epochs=3", "--warmup-epochs=3.5"])
def test_a_warmup_that_the_run_does_not_leave_is_refused(recipe, word):
    module = recipe("resnet")
    with pytest.raises(UserError, match=r"--warmup_epochs 3(.5)? leaves nothing of --epochs 3 .* Give less than 3\."):
        parse(module.RunConfig, module.Config, arguments=["--epochs", "3", word])
    _, config = parse(module.RunConfig, module.Config, arguments=["--epochs", "3", "--warmup_epochs", "2.9"])
    assert config.warmup_epochs == 2.9


def test_the_preflight_refuses_such_a_warmup():
    words = ["h100", "ddp", "--time=1:00:00", "-A", "abc@h100", "--", "recipes/resnet.py"]
    process = python("tools/preflight.py", *words, "--epochs", "5", "--warmup_epochs", "5")
    (error,) = process.stderr.splitlines()
    assert error.startswith("error: --warmup_epochs 5 leaves nothing of --epochs 5"), process.stderr
    assert process.returncode == 1

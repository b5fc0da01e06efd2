# SPDX-License-Identifier: Apache-2.0
"""Keep an exponential moving average of the weights (Polyak & Juditsky, 1992), by torch's swa_utils arithmetic.

The averages are state of the optimizer, beside its moments: sharded as the weights are, in each checkpoint, and moved
by each `optimizer.step()` alone, so that a skipped step leaves them as they are.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..config import Range

Decay = Annotated[float, Range(0, 1 - 1e-9)]
KEY = "ema"
STATISTICS = ("running_mean", "running_var")  # of batch norm; their averages are state of the layer's weight


def keep_average(model: nn.Module, optimizer: Optimizer, decay: float) -> Optimizer:
    """Let each step of the optimizer move the averages; the first step sets them to the weights. 0 keeps none.

    Batch norm's statistics are averaged too: those of the last batches belong to the last weights, not to the average.
    """
    if decay:
        move = get_ema_multi_avg_fn(decay)
        optimizer.register_step_post_hook(lambda optimizer, *_: _step(model, optimizer, move))
    return optimizer


@torch.no_grad()
def _step(model: nn.Module, optimizer: Optimizer, move: Callable) -> None:
    averages, values = [], []
    for parameter, key, value in _averaged(model, optimizer):
        if parameter.grad is None:  # no state of its own either, and some optimizers look whether it is empty
            continue
        state = optimizer.state[parameter]
        if key in state:
            averages.append(state[key])
            values.append(value)
        else:
            state[key] = value.detach().clone()
    if averages:
        move(averages, values, None)


def _averaged(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
    """Yield the parameter whose state holds an average, the average's key there, and the tensor that is averaged."""
    for group in optimizer.param_groups:
        yield from ((parameter, KEY, parameter) for parameter in group["params"])
    for layer in (each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)):
        yield from ((layer.weight, f"{KEY}_{name}", getattr(layer, name)) for name in STATISTICS)


@contextlib.contextmanager
def averaged(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Exchange the weights with their averages, for an evaluation."""
    _exchange(model, optimizer)
    try:
        yield
    finally:
        _exchange(model, optimizer)


@torch.no_grad()
def _exchange(model: nn.Module, optimizer: Optimizer) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # an evaluation leaves the root's weights gathered: copies, which would be computed with
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    for parameter, key, value in _averaged(model, optimizer):
        if key in optimizer.state.get(parameter, ()):
            average = optimizer.state[parameter][key]
            was = value.clone()
            value.copy_(average)
            average.copy_(was)

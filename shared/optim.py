# SPDX-License-Identifier: Apache-2.0
"""Build parameter groups, and learning rates as functions of the global step; clip gradients."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from .launch import strategy


def parameter_groups(model: nn.Module, weight_decay: float, no_decay: tuple[str, ...] = ()) -> list[dict]:
    """Make groups in which matrices and filters decay, but norms, biases (He et al., arXiv:1812.01187, section 3.1)
    and parameters whose name ends in one of `no_decay` do not."""
    groups = {weight_decay: [], 0.0: []} if weight_decay else {0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 shows a shard, of another shape
            decays = len(shape) > 1 and not name.endswith(no_decay)
            groups[weight_decay if decays else 0.0].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def build_scheduler(optimizer: Optimizer, name: str, total_steps: int, warmup_steps: int) -> LambdaLR:
    """Scale the optimizer's learning rate by `one_cycle`, or by `cosine` after a linear warmup from 0.

    Both count global steps: step the scheduler once per optimizer step, on every process, without `prepare`.
    """
    if name == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    return LambdaLR(optimizer, lambda step: one_cycle(step, total_steps, warmup_steps))


def one_cycle(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return a factor that rises from 1/25 to 1 and falls to nearly 0, both by a cosine (Smith & Topin,
    arXiv:1708.07120, with the factors of torch's OneCycleLR, which fails for warmups of less than two steps)."""
    first, last = 1 / 25, 1 / 25e4
    if step < warmup_steps:
        return 1 - (1 - first) * (1 + math.cos(math.pi * step / warmup_steps)) / 2
    way = min(1, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return last + (1 - last) * (1 + math.cos(math.pi * way)) / 2


def zero_momentum(optimizer: Optimizer) -> Optimizer:
    """Start SGD's momentum from zeros; the first step is the same as torch's.

    Fused SGD makes the buffers by `empty_like`. Where fp16's scaler skips the first step they stay uninitialised, and
    the second step adds to them (torch 2.15, torch/optim/sgd.py, _fused_sgd).
    """

    def fill(optimizer: Optimizer, *_) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)

    optimizer.register_step_pre_hook(fill)
    return optimizer


def clip_grad_norm(accelerator: Accelerator, model: nn.Module, max_norm: float) -> Tensor:
    """Return the norm of all gradients, and scale them so that it is at most max_norm; 0 leaves them as they are."""
    clip = accelerator.clip_grad_norm_
    if accelerator.scaler:
        # Accelerate 1.15 unscales twice, which torch refuses, where FSDP2's model did not go through `prepare`.
        accelerator.unscale_gradients()
        clip = clip_grad_norm_
    if max_norm or strategy() != "ddp" or any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return clip(model.parameters(), max_norm or math.inf)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if gradients[0].is_cuda:
        return get_total_norm(gradients)
    # torch 2.15's norm of a tensor on the CPU uses one thread, dot all of them. as_strided flattens any layout.
    flat = [gradient.as_strided((gradient.numel(),), (1,)) for gradient in gradients]
    return torch.stack([values.dot(values) for values in flat]).sum().sqrt()

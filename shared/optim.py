# SPDX-License-Identifier: Apache-2.0
"""Parameter groups, and learning rates as functions of the global step."""

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from transformers import get_cosine_schedule_with_warmup


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay matrices and filters, but neither norms nor biases (He et al., arXiv:1812.01187, section 3.1)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_scheduler(
    optimizer: Optimizer, name: str, learning_rate: float, total_steps: int, warmup_steps: int
) -> LRScheduler:
    """`one_cycle` (Smith & Topin, arXiv:1708.07120; momentum left alone) or `cosine` after a linear warmup.

    Both count steps of the global batch: step the scheduler once per optimizer step, on every process, unprepared.
    """
    if name == "cosine":
        return get_cosine_schedule_with_warmup(optimizer, warmup_steps, total_steps)
    share = min(max(warmup_steps, 1) / total_steps, 1 - 1 / total_steps) if total_steps > 1 else 0.5
    return OneCycleLR(optimizer, learning_rate, total_steps, pct_start=share, cycle_momentum=False)

# SPDX-License-Identifier: Apache-2.0
"""Handle a step whose loss or gradient is not finite, and name its samples.

The loop multiplies the loss by `1 + 0 * loss.detach()`, so that a loss that is not finite makes every gradient not
finite, and the reduction carries this to every process: all see the same norm, and agree without a message.
"""

import contextlib
import math
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..config import RunConfig
from ..errors import UserError
from ..files import write_json
from ..launch import mixed_precision
from .folder import Folder


class Step(NamedTuple):
    """A step whose gradient norm is being copied from the device to the host."""

    number: int
    norm: Tensor  # a scalar on the host, in pinned memory
    arrived: torch.cuda.Event | None
    losses: list[Tensor]
    samples: list[Tensor]

    def is_finite(self) -> bool:
        if self.arrived:
            self.arrived.synchronize()
        return math.isfinite(self.norm)


class NonFinite:
    """The policy of --on_nonfinite. `skip` decides on the host before the update; `stop` reads a step's norm while the
    next one is computed, so that the loop does not wait for the device."""

    def __init__(self, accelerator: Accelerator, policy: str, files: Folder):
        self.accelerator, self.policy, self.files = accelerator, policy, files
        self.noted: list[Step] = []  # oldest first

    def note(self, number: int, grad_norm: Tensor | float, losses: list[Tensor], samples: list[Tensor]) -> None:
        """Start copying the norm to the host while the device computes."""
        norm, arrived = whole(grad_norm), None
        if norm.is_cuda:
            norm = torch.empty_like(norm, device="cpu", pin_memory=True).copy_(norm, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.noted.append(Step(number, norm, arrived, losses, samples))

    def skips_update(self) -> bool:
        """Return whether to skip the update of the step noted last. Under fp16 the gradient scaler decides instead."""
        return self.policy == "skip" and mixed_precision() != "fp16" and not self.noted[-1].is_finite()

    def check(self, but_last: bool = False) -> None:
        """Raise UserError, under `stop`, for a noted step that was not finite; every process must call it.

        but_last: leave out the step noted last, whose norm may still be on its way from the device.
        """
        for step in self.noted[:-1] if but_last else self.noted:
            if self.policy == "stop" and not step.is_finite() and not self._scaler_skips():
                self.stop(step)
        self.noted = self.noted[-1:]

    def _scaler_skips(self) -> bool:
        """Return whether fp16's gradient scaler skips such a step itself, and halves its scale. A scale below 1
        means that the scale is not the cause."""
        scaler = self.accelerator.scaler
        return mixed_precision() == "fp16" and (scaler is None or scaler.get_scale() >= 1)

    def stop(self, step: Step) -> None:
        """Raise UserError that names the step, its samples and the last good checkpoint; every process must call
        it."""
        mine = {
            "rank": self.accelerator.process_index,
            "losses": [str(loss.item()) for loss in step.losses],
            "samples": [index for part in step.samples for index in part.tolist()],
        }
        everyone = [mine]
        if self.accelerator.num_processes > 1:
            everyone = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(everyone, mine)
        guilty = [one for one in everyone if {"nan", "inf", "-inf"} & {*one["losses"]}] or everyone
        samples = sorted({index for one in guilty for index in one["samples"]})
        norm, record = step.norm.item(), self.files.path / "nonfinite.json"
        with contextlib.suppress(OSError):  # a full disk
            if self.accelerator.is_main_process:
                write_json(record, {"step": step.number, "grad_norm": str(norm), "processes": everyone})
        raise UserError(
            f"step {step.number} has the losses {', '.join(guilty[0]['losses'])} and the gradient norm {norm}, "
            f"from samples {', '.join(map(str, samples[:16]))}{', ...' if len(samples) > 16 else ''} "
            f"(all in {record}). The last good checkpoint is {self.files.newest_checkpoint or 'none'}. Lower "
            "the learning rate, look at these samples, or give --on_nonfinite skip."
        )


def whole(norm: Tensor | float) -> Tensor:
    """Return the gradient norm as one plain tensor, whether it is a DTensor or, from DeepSpeed, a number."""
    return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)


def refuse_pairs(run_config: RunConfig, config, strategy: str) -> None:
    """Raise UserError for settings that do not go together."""
    if run_config.on_nonfinite == "skip" and getattr(config, "norm", "") == "batch":
        raise UserError("batch norm's statistics would keep a nan. Give --norm group beside --on_nonfinite skip.")
    if not strategy.startswith("zero"):
        return
    if run_config.async_checkpoint:
        raise UserError("DeepSpeed writes its state itself. Leave --async_checkpoint out under ZeRO.")
    if run_config.on_nonfinite == "skip":
        raise UserError("DeepSpeed's backward pass updates the weights too. Leave --on_nonfinite skip out under ZeRO.")

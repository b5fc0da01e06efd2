# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are complete or absent: written beside, renamed into place.

A checkpoint holds what the future depends on: weights and optimizer state under the plain model's parameter names
(torch.distributed.checkpoint), and in state.json the global step, the schedule and the gradient scaler. The sample
order and the augmentation are functions of the step, so no random state is in it, and no loader's but where a recipe
gives one.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .accelerator import strategy
from .config import UserError

# Said by torch of every save and load by one process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

KEPT = 2
ZERO = "zero"  # DeepSpeed's folder within a checkpoint
# One entry a parameter, not one a group: then each process of a pipeline can bring its own parameters.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_checkpoint(
    run_folder: Path,
    step: int,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    loader: dict | None = None,
) -> Path:
    """Write run_folder/checkpoints/step-XXXXXXXX, then remove all but the KEPT newest; every process must call it.

    loader: a loader's state, the same on every process, in what JSON can hold.
    """
    folder = run_folder / "checkpoints"
    final = folder / f"step-{step:08d}"
    temporary = folder / f"tmp-{step:08d}"
    if final.exists():
        # A run that was started from an older checkpoint comes by here again: the step decides the content.
        return final
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if strategy().startswith("zero"):
        _save_zero(temporary, accelerator, model)
    else:
        weights, moments = get_state_dict(model, _unwrapped(optimizer), options=FLAT)
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary, no_dist=_alone())
    if accelerator.is_main_process:
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        state = {"step": step, "scheduler": scheduler.state_dict(), "scaler": scaler, "loader": loader}
        _write_json(temporary / "state.json", state)
        os.rename(temporary, final)
        _sync(folder)
        for old in complete_checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    path: Path, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler
) -> int:
    """Put everything back and return the global step; every process must call it."""
    if strategy().startswith("zero"):
        _load_zero(path, model)
    else:
        optimizer = _unwrapped(optimizer)
        weights, moments = get_state_dict(model, optimizer, options=FLAT)
        dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=path, no_dist=_alone())
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=FLAT)
    state = json.loads((path / "state.json").read_text())
    scheduler.load_state_dict(state["scheduler"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"]


def loader_state(path: Path) -> dict | None:
    """What the recipe gave as its loader's state."""
    return json.loads((path / "state.json").read_text())["loader"]


def _save_zero(folder: Path, accelerator: Accelerator, model: nn.Module) -> None:
    """DeepSpeed's shards for its own resume, and beside them the whole weights in fp32 under their plain names."""
    from deepspeed.utils import safe_get_full_fp32_param

    model.save_checkpoint(str(folder), tag=ZERO)
    weights = {}
    for name, parameter in model.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)  # gathers: every process must call it
        if accelerator.is_main_process:
            weights[name] = whole.cpu()
    if accelerator.is_main_process:
        dcp.save({"model": weights}, checkpoint_id=folder, no_dist=True)
    accelerator.wait_for_everyone()


def _load_zero(path: Path, model: nn.Module) -> None:
    """Raises UserError where another strategy, or another number of processes, wrote the checkpoint."""
    shards = list((path / ZERO).glob("*_optim_states.pt"))
    if len(shards) != torch.distributed.get_world_size():
        raise UserError(
            f"{path} was written by {len(shards)} ZeRO processes; here are {torch.distributed.get_world_size()}. "
            "Resume with that strategy and number, or give another --output_dir."
        )
    model.load_checkpoint(str(path), tag=ZERO)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Oldest first; a folder that bears this name was written to its end."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def checkpoint_to_resume(folder: Path, resume_from_checkpoint: str) -> Path | None:
    """What `--resume_from_checkpoint` means here; None is a fresh start.

    Raises UserError for a path that is no checkpoint, and for `never` where the folder holds one.
    """
    complete = complete_checkpoints(folder)
    if resume_from_checkpoint == "auto":
        return complete[-1] if complete else None
    if resume_from_checkpoint == "never":
        if complete:
            raise UserError(f"{folder.parent} holds a run. Remove that folder, or give another --output_dir.")
        return None
    path = Path(resume_from_checkpoint).resolve()
    if not (path / "state.json").is_file() or not path.name.startswith("step-"):
        raise UserError(
            f"--resume_from_checkpoint {resume_from_checkpoint} is no complete checkpoint. "
            "Give auto, never, or a folder checkpoints/step-XXXXXXXX of a run."
        )
    return path


def _alone() -> bool:
    return not torch.distributed.is_initialized()


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _write_json(path: Path, values: dict) -> None:
    with open(path, "w") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)

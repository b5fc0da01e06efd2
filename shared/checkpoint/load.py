# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint into a training run, or only its weights."""

import json
from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import UserError
from ..launch import strategy
from .deepspeed import load_zero, refuse_other_zero
from .retention import STATE
from .tensors import FLAT, TensorReader, plain_names, unwrapped, without_tied


def load_checkpoint(
    path: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    changed: Collection[str] = (),
) -> dict:
    """Load model, optimizer and scheduler, and return the content of state.json; every process must call it.

    changed: names in the optimizer's groups that keep this configuration's values. Raises UserError where the
    checkpoint's names are not those of the training, and where its files cannot be read.
    """
    try:
        state = _load(path, accelerator, model, optimizer, scheduler)
    except dcp.api.CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = error
    else:
        numbers = {name: value for name, value in state.get("optimizer", {}).items() if name not in changed}
        for group in unwrapped(optimizer).param_groups if numbers else ():  # former checkpoints have none
            for name, value in numbers.items():
                was = group.get(name)
                group[name] = torch.full_like(was, value) if isinstance(was, Tensor) else value
        return state
    raise UserError(f"{path} cannot be read: {reason}. Give --resume_from_checkpoint another one.")


def _load(
    path: Path, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler
) -> dict:
    refuse_other_zero(path, accelerator.num_processes)
    if strategy().startswith("zero"):
        load_zero(path, model)
    else:
        _load_tensors(path, accelerator, model, unwrapped(optimizer))
    state = read_state(path)
    if accelerator.scaler and state["scaler"]:  # None: written in another precision, which --resume_override allows
        accelerator.scaler.load_state_dict(state["scaler"])
    rates = scheduler.base_lrs
    scheduler.load_state_dict(state["scheduler"])
    scheduler.base_lrs, scheduler.last_epoch = rates, scheduler.last_epoch - 1
    scheduler.step()  # to the rates of this configuration, which --resume_override may have changed
    return state


def _load_tensors(path: Path, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    reader = TensorReader(path)
    there = set(reader.read_metadata().state_dict_metadata)
    if not any(name.startswith("optimizer.") for name in there):
        moments = {}  # no optimizer state: every step so far was skipped
    tensors = plain_names(without_tied(weights, getattr(model, "module", model)), moments)
    _check_names(path, there, set(tensors), accelerator)
    # dcp.load fills the tensors in place; set_state_dict then gives the optimizer those that get_state_dict made.
    dcp.load(tensors, storage_reader=reader, no_dist=accelerator.num_processes == 1)
    if moments:
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=FLAT)
    else:
        optimizer.state.clear()  # get_state_dict has made a state


def read_state(path: Path) -> dict:
    """Return the content of a checkpoint's state.json: step, scheduler, scaler and the recipe's `loader`."""
    return json.loads((path / STATE).read_text())


def read_weights(path: Path, part: str = "model.") -> dict[str, Tensor]:
    """Return plain name -> whole weight or buffer, on the CPU, whatever strategy wrote it; DeepSpeed's are in fp32.
    part: what to read; `optimizer.state.` has names such as fc.weight.exp_avg."""
    entries = (reader := TensorReader(path)).read_metadata().state_dict_metadata
    names = [name for name in entries if name.startswith(part)]
    state = {name: torch.empty(entries[name].size, dtype=entries[name].properties.dtype) for name in names}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix(part): tensor for name, tensor in state.items()}


def _check_names(path: Path, there: set[str], mine: set[str], accelerator: Accelerator) -> None:
    everyone = [mine]
    if accelerator.num_processes > 1:
        everyone = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(everyone, mine)
    wanted = set().union(*everyone)
    missing, unknown = "is missing {}", "has {}, which this training does not have"
    for these, those, problem in ((wanted, there, missing), (there, wanted, unknown)):
        if these - those:
            names = ", ".join(sorted(these - those)[:3])
            raise UserError(f"{path} {problem.format(names)}. Resume with the model and optimizer that wrote it.")

# SPDX-License-Identifier: Apache-2.0
"""Store torch.distributed.checkpoint's tensors as safetensors and JSON, so that reading a checkpoint can run no code.

torch's own storage writes its index, and whatever is not a tensor, as pickles; its safetensors storage takes other
arguments in each release from 2.8 on. Each process writes one file with the pieces that the planner gave it;
index.json says where each piece of each tensor lies, so that any number of processes can read them, under any other
split.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import Metadata, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.optim import Optimizer

from ..errors import UserError
from ..files import to_disk, write_json

# One entry per parameter, not per group: each process of a pipeline has parameters of its own.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return weights, buffers and the optimizer's tensors by plain name, each as this process holds it.

    See group_numbers for what an optimizer keeps besides; its settings come from the configuration. torch's
    get_state_dict takes longer than copying the values.
    """
    # state_dict first: under FSDP it shards again what an evaluation left gathered, and the optimizer has the shards.
    weights = without_tied(model.state_dict(), model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"state.{names[parameter]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    return plain_names(weights, moments)


def without_tied(weights: dict, model: nn.Module) -> dict:
    """Leave out the other names of a parameter that has several, such as a head that is the embedding."""
    again = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(
        model.named_parameters()
    ).keys()
    return {name: value for name, value in weights.items() if name not in again}


def plain_names(weights: dict, moments: dict) -> dict[str, Tensor]:
    both = [(f"model.{name}", value) for name, value in weights.items()]
    # Values of a group are no entry of a parameter: group_numbers has them.
    both += [(f"optimizer.{name}", value) for name, value in moments.items() if not name.startswith("param_groups.")]
    return {name.replace("_orig_mod.", ""): value for name, value in both if isinstance(value, Tensor)}


def own_share(tensors: dict[str, Tensor], model: nn.Module, rank: int, size: int) -> dict[str, Tensor]:
    """Return the tensors that this data-parallel process writes: its shards, and its share of what all of them hold.

    Rank 0 writes buffers and their averages (models/ema.py): they differ until DDP's next forward broadcasts rank 0's.
    """
    buffers = {*plain_names(dict(model.named_buffers()), {}), *(each for each in tensors if ".ema_running_" in each)}
    loads, mine = [0] * size, {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        writer = rank if isinstance(tensor, DTensor) else 0 if name in buffers else loads.index(min(loads))
        if not isinstance(tensor, DTensor):
            loads[writer] += tensor.nbytes
        if writer == rank:
            mine[name] = tensor
    return mine


def unwrapped(optimizer: Optimizer) -> Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def group_numbers(optimizer: Optimizer) -> dict[str, float]:
    """Return the numbers that all parameter groups hold alike, without the learning rates, which the scheduler sets.
    Some optimizers count there: timm's Lamb its steps, schedulefree the weights of its average.

    Raises UserError where the optimizer keeps a number for each parameter: a checkpoint would lose it.
    """
    for name, value in (item for values in optimizer.state.values() for item in values.items()):
        if type(value) in (int, float):
            kind = type(optimizer).__name__
            what = f"{kind} keeps `{name}` of each parameter as a number, which no checkpoint holds"
            raise UserError(f"{what}. Take an optimizer that keeps tensors.")
    first, *others = [{name: _number(value) for name, value in group.items()} for group in optimizer.param_groups]
    alike = {name: value for name, value in first.items() if all(group.get(name) == value for group in others)}
    return {name: value for name, value in alike.items() if value is not None and name not in ("lr", "initial_lr")}


def _number(value) -> float | None:
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return value if type(value) in (int, float) else None


INDEX = "index.json"


class _Storage:
    """The part of a storage that does nothing: the plans stay as the planner made them."""

    def reset(self, checkpoint_id=None) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan | LoadPlan) -> SavePlan | LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list) -> list:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


class TensorWriter(_Storage, StorageWriter):
    """A writer into an existing folder; every file is on the disk, not only in its cache, when `save` returns."""

    def __init__(self, folder: Path, rank: int, staged: dict[str, torch.Tensor] | None = None):
        """staged: copies of this process's parts, to write instead of the tensors, which training may have changed."""
        self.folder, self.name, self.staged = folder, f"tensors-{rank:05d}.safetensors", staged

    def set_up_storage_writer(self, is_coordinator: bool, *arguments, **keywords) -> None:
        pass

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's pieces; raises OSError where the disk is full, and ValueError for what is not a
        tensor."""
        pieces, results = {}, []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise ValueError(f"{item.index.fqn} is not a tensor: it belongs in state.json")
            live = planner.resolve_data(item) if self.staged is None else self.staged[item.index.fqn]
            tensor = live.detach().cpu().contiguous()
            if tensor.untyped_storage().nbytes() != tensor.nbytes:
                tensor = tensor.clone()  # a view: safetensors refuses memory that two tensors share
            offsets = _offsets(item.index, tensor)
            pieces[_key(item.index.fqn, offsets)] = tensor
            results.append(WriteResult(item.index, tensor.nbytes, self.name))
        if pieces:
            try:
                save_file(pieces, self.folder / self.name)
            except SafetensorError as error:
                raise OSError(str(error)) from error
            os.chmod(self.folder / self.name, self.folder.stat().st_mode & 0o666)  # else only its owner can read it
            to_disk(self.folder / self.name)
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {(result.index.fqn, result.index.offset): result.storage_data for part in results for result in part}
        index = {}
        for name, entry in metadata.state_dict_metadata.items():
            chunks = []
            for chunk in entry.chunks:
                file = files.get((name, chunk.offsets)) or files[name, None]
                chunks.append({"offsets": list(chunk.offsets), "sizes": list(chunk.sizes), "file": file})
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            index[name] = {"size": list(entry.size), "dtype": dtype, "chunks": chunks}
        write_json(self.folder / INDEX, index)


class TensorReader(_Storage, StorageReader):
    """A reader of the files that TensorWriters wrote."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read_metadata(self, *arguments, **keywords) -> Metadata:
        entries, self.files = {}, {}
        for name, entry in json.loads((self.folder / INDEX).read_text()).items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"]))
                for chunk in entry["chunks"]
            ]
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            entries[name] = TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)
            for chunk in entry["chunks"]:
                self.files[MetadataIndex(name, chunk["offsets"])] = chunk["file"]
        return Metadata(entries)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *arguments, **keywords) -> None:
        pass

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file = {}
        for item in plan.items:
            by_file.setdefault(self.files[item.storage_index], []).append(item)
        for name, items in by_file.items():
            with safe_open(self.folder / name, framework="pt") as file:
                for item in items:
                    piece = file.get_slice(_key(item.storage_index.fqn, item.storage_index.offset))
                    ranges = zip(item.storage_offsets, item.lengths, strict=True)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(piece[tuple(slice(begin, begin + length) for begin, length in ranges)])
                    planner.commit_tensor(item, target)
        return _done(None)


def _key(name: str, offsets: torch.Size) -> str:
    return f"{name}@{','.join(map(str, offsets))}"


def _offsets(index: MetadataIndex, tensor: torch.Tensor) -> torch.Size:
    return index.offset if index.offset is not None else torch.Size([0] * tensor.ndim)


def _done(result) -> Future:
    future = Future()
    future.set_result(result)
    return future

# SPDX-License-Identifier: Apache-2.0
"""The storage of torch.distributed.checkpoint as safetensors and JSON: reading one can run no code.

torch's own writes its index, and whatever is no tensor, as pickles; its safetensors storage takes other arguments in
each release from 2.8 on. Each process writes one file with the pieces that the planner gave it; index.json says which
piece of which tensor lies where, so that any number of processes can read them, split in any other way.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import Metadata, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

INDEX = "index.json"


class TensorWriter(StorageWriter):
    """Writes into a folder that exists; every file is on the disk, not only in its cache, when `save` returns."""

    def __init__(self, folder: Path, rank: int, staged: dict[str, torch.Tensor] | None = None):
        """staged: copies of this process's parts, to be written in the place of what the tensors hold by then."""
        self.folder, self.name, self.staged = folder, f"tensors-{rank:05d}.safetensors", staged

    def reset(self, checkpoint_id=None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *arguments, **keywords) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Raises OSError where the disk is full, and ValueError for what is no tensor."""
        pieces, results = {}, []
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise ValueError(f"{item.index.fqn} is no tensor: it belongs into state.json")
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
            os.chmod(self.folder / self.name, self.folder.stat().st_mode & 0o666)  # else nobody but the owner reads it
            to_disk(self.folder / self.name)
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {(result.index.fqn, result.index.offset): result.storage_data for part in results for result in part}
        index = {}
        for name, entry in metadata.state_dict_metadata.items():
            chunks = [
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": files.get((name, chunk.offsets)) or files[name, None],
                }
                for chunk in entry.chunks
            ]
            dtype = str(entry.properties.dtype).removeprefix("torch.")
            index[name] = {"size": list(entry.size), "dtype": dtype, "chunks": chunks}
        write_json(self.folder / INDEX, index)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


class TensorReader(StorageReader):
    """Reads what a TensorWriter's processes wrote."""

    def __init__(self, folder: Path):
        self.folder = folder

    def reset(self, checkpoint_id=None) -> None:
        pass

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

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

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

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


def _key(name: str, offsets: torch.Size) -> str:
    return f"{name}@{','.join(map(str, offsets))}"


def _offsets(index: MetadataIndex, tensor: torch.Tensor) -> torch.Size:
    return index.offset if index.offset is not None else torch.Size([0] * tensor.ndim)


def _done(result) -> Future:
    future = Future()
    future.set_result(result)
    return future


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """A reader finds the former text or this one, whole, also after a loss of power."""
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    to_disk(beside)
    os.replace(beside, path)


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values) + "\n")
    to_disk(path)

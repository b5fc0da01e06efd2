# SPDX-License-Identifier: Apache-2.0
"""List a data set's samples in one file of tensors. It is mapped into memory, so that a million samples open without
delay and the processes of a node share their pages. It lies beside packed tar shards, or in a cache."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ..collectives import on_main_process
from ..errors import UserError
from ..files import make_once
from .tree import States, state_of

NAME = "index.safetensors"  # beside shards
VERSION = 3  # of the rules by which tree.py and shards.py make an index; one of another version is built again
LISTS = ("classes", "shards", "checksums", "notes", "parts", "tables", "states")
PATIENCE = 30  # seconds until all nodes see a file that one wrote: some file systems cache that it is missing


@dataclass(frozen=True)
class Index:
    """N samples. names: (N,) bytes, a file below the folder or a key in a shard. labels: (N,) int64, -1 where a sample
    names no class. shards: files below the folder; shard, offset, length: (N,), where each image's bytes lie in them.
    checksums: blake2b of each shard, None where shards are another program's. notes: lines to print on what was left
    out. parts: how many samples and shards each has, one part after the other. tables: files of each part, which have
    rows of their own. states: what it was built from."""

    names: np.ndarray
    labels: np.ndarray
    classes: list[str]
    shards: list[str] | None = None
    shard: np.ndarray | None = None
    offset: np.ndarray | None = None
    length: np.ndarray | None = None
    checksums: list[str] | None = None
    notes: list[str] | None = None
    parts: dict[str, list[int]] | None = None
    tables: dict[str, list[str]] | None = None
    states: States | None = None

    def take(self, numbers: np.ndarray | slice) -> "Index":
        """Return these samples, in this order."""
        arrays = {name: getattr(self, name)[numbers] for name in ("names", "labels")}
        if self.shards is not None:
            arrays |= {name: getattr(self, name)[numbers] for name in ("shard", "offset", "length")}
        return replace(self, **arrays)

    def save(self, path: Path) -> None:
        """Write the index under a name that nobody reads yet."""
        arrays = {"names": _as_bytes(self.names), "labels": self.labels.astype(np.int64)}
        if self.shards is not None:
            kinds = {"shard": np.int32, "offset": np.int64, "length": np.int64}
            arrays |= {name: getattr(self, name).astype(kind) for name, kind in kinds.items()}
        lists = json.dumps({name: getattr(self, name) for name in LISTS})
        # One entry: safetensors writes several in an order that changes from run to run.
        header = {"lists": f"{_hash(self.states or {})}\n{lists}"}
        data = save({name: torch.from_numpy(array) for name, array in arrays.items()}, header)
        path.write_bytes(data)  # safetensors' save_file raises its own error on a full disk

    @staticmethod
    def lists(path: Path) -> dict:
        """Return all but the arrays."""
        with safe_open(path, framework="pt") as file:
            lists = json.loads(file.metadata()["lists"].rpartition("\n")[2])
        return {name: lists.get(name) for name in LISTS}

    def part(self, name: str) -> "Index":
        """Return the samples of one of `parts`."""
        ends = dict(zip(self.parts, np.cumsum(list(self.parts.values()), axis=0).tolist(), strict=True))
        samples, shards = (slice(end - count, end) for end, count in zip(ends[name], self.parts[name], strict=True))
        part = self.take(samples)
        if self.shards is None:
            return part
        return replace(part, shards=self.shards[shards], shard=part.shard - shards.start)

    @staticmethod
    def load(path: Path) -> "Index":
        lists = Index.lists(path)
        arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        names = arrays.pop("names")
        return Index(names.view(f"S{names.shape[1]}")[:, 0], **arrays, **lists)


def _as_bytes(names: np.ndarray) -> np.ndarray:
    """View (N,) of fixed-width bytes as (N, width) of uint8."""
    return np.ascontiguousarray(names).view(np.uint8).reshape(len(names), names.dtype.itemsize)


def cache_folder() -> Path:
    """Return the recipes' cache: in `$SCRATCH`, else in the user's cache."""
    home = os.environ.get("SCRATCH") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):  # a container's user, say, without an entry in passwd
        home = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
        os.makedirs(home, mode=0o700, exist_ok=True)
        if os.lstat(home).st_uid != os.getuid():
            raise UserError(f"{home} belongs to another user. Set HOME or SCRATCH to a folder of yours.")
    return Path(home) / "dlojz-recipes"


def cached(folder: Path, build: Callable[[], Index]) -> Index:
    """Return the index of a folder from the cache. Rank 0 builds it where it is missing, or where a folder or a shard
    that it lists has changed; the others wait, as long as that takes.

    Every process must call it. Raises UserError on each of them where rank 0 cannot build it.
    """
    name = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=12).hexdigest()
    path = cache_folder() / f"{name}.{VERSION}.safetensors"
    make = partial(make_once, path, lambda partial: build().save(partial))
    stamp = on_main_process(PartialState(), lambda: _stamp(make(lambda path: _is_fresh(path, folder))))
    until = time.monotonic() + PATIENCE
    while _stamp(path) != stamp and time.monotonic() < until:
        time.sleep(0.1)
    # Here too, since rank 0's cache may be a disk of another node.
    return Index.load(make(lambda path: _stamp(path) == stamp))


def _stamp(path: Path) -> str:
    """Return the hash of the states in an index; empty where it is missing or damaged."""
    with contextlib.suppress(OSError, SafetensorError, KeyError, TypeError), safe_open(path, framework="pt") as file:
        return file.metadata()["lists"].rpartition("\n")[0]
    return ""


def _is_fresh(path: Path, folder: Path) -> bool:
    """Return whether there is an index, and its folders and shards have not changed."""
    if stamp := _stamp(path):
        with contextlib.suppress(OSError):
            return stamp == _hash({name: state_of(os.stat(folder / name)) for name in Index.lists(path)["states"]})
    return False


def _hash(states: States) -> str:
    return hashlib.blake2b(json.dumps(states).encode(), digest_size=12).hexdigest()

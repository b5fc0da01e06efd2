# SPDX-License-Identifier: Apache-2.0
"""The list of a data set's samples: one file of tensors that is mapped into memory, so that a million samples open at
once and the processes of a node share their pages. It stands beside packed tar shards, or in a cache."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import load_file, save

from ..config import UserError
from ..locks import make_once

NAME = "index.safetensors"  # beside shards
PATIENCE = 30  # seconds until a file that another node wrote is seen by all: some systems keep for a while what lacks


@dataclass(frozen=True)
class Index:
    """N samples. names: (N,) bytes, a file below the folder or a key in a shard. labels: (N,) int64, -1 where a sample
    names no class. shards: files below the folder; shard, offset, length: (N,), where each image's bytes lie in them.
    checksums: blake2b of each shard, None where shards are another program's. torn: what was wrong with some."""

    names: np.ndarray
    labels: np.ndarray
    classes: list[str]
    shards: list[str] | None = None
    shard: np.ndarray | None = None
    offset: np.ndarray | None = None
    length: np.ndarray | None = None
    checksums: list[str] | None = None
    torn: list[str] | None = None

    def take(self, numbers: np.ndarray) -> "Index":
        """Some of the samples, in this order."""
        arrays = {name: getattr(self, name)[numbers] for name in ("names", "labels")}
        if self.shards is not None:
            arrays |= {name: getattr(self, name)[numbers] for name in ("shard", "offset", "length")}
        return replace(self, **arrays)

    def save(self, path: Path) -> None:
        """Write it under a name that nobody reads."""
        arrays = {"names": _as_bytes(self.names), "labels": self.labels.astype(np.int64)}
        if self.shards is not None:
            kinds = {"shard": np.int32, "offset": np.int64, "length": np.int64}
            arrays |= {name: getattr(self, name).astype(kind) for name, kind in kinds.items()}
        lists = json.dumps({name: getattr(self, name) for name in ("classes", "shards", "checksums", "torn")})
        data = save({name: torch.from_numpy(array) for name, array in arrays.items()}, {"lists": lists})
        path.write_bytes(data)  # safetensors' own save_file has an error of its own for a full disk

    @staticmethod
    def load(path: Path) -> "Index":
        with safe_open(path, framework="pt") as file:
            lists = json.loads(file.metadata()["lists"])
        arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}
        names = arrays.pop("names")
        return Index(names.view(f"S{names.shape[1]}")[:, 0], **arrays, **lists)


def _as_bytes(names: np.ndarray) -> np.ndarray:
    """(N,) of fixed-width bytes as (N, width) of uint8."""
    return np.ascontiguousarray(names).view(np.uint8).reshape(len(names), -1)


def cache_folder() -> Path:
    """Of this collection: in `$SCRATCH`, else the user's."""
    home = os.environ.get("SCRATCH") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):
        raise UserError("this user has no home folder. Let HOME or SCRATCH name a folder, for lists of images.")
    return Path(home) / "dlojz-recipes"


def cached(what: Path, entries: Iterable[Path], build: Callable[[], Index]) -> Index:
    """The index of a folder that has none, from the cache. Rank 0 builds it where it is missing, or where one of the
    entries, on which it depends, has changed; the others wait, for as long as that takes.

    Every process must call it. Raises UserError on each of them where rank 0 could not.
    """
    path = cache_folder() / f"{_key(what, entries)}.safetensors"
    _by_main_process(lambda: make_once(path, lambda partial: build().save(partial)))
    until = time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)
    # Again, for rank 0's cache may be a disk of another node.
    return Index.load(make_once(path, lambda partial: build().save(partial)))


def _key(what: Path, entries: Iterable[Path]) -> str:
    """A hash of a folder's place and of the names, sizes and times of change of itself and the entries."""
    try:
        stats = [(path.name, path.stat()) for path in (what, *entries)]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}. Mend or remove it.") from error
    states = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.blake2b(f"{what.resolve()}\n{states}".encode(), digest_size=12).hexdigest()


def _by_main_process(work: Callable[[], object]) -> None:
    """Rank 0 does it, the others wait; its error is everyone's."""
    state = PartialState()
    if state.num_processes == 1:
        work()
        return
    ends: list[str] = []  # of rank 0: the error, empty for none, when there is one
    thread = Thread(target=lambda: ends.append(_error_of(work)), daemon=True)
    if state.is_main_process:
        thread.start()
    end = None
    while end is None:  # many short messages: one for which the others waited would run into a timeout
        if state.is_main_process:
            thread.join(1)
        (end,) = broadcast_object_list(ends[:1] or [None])
    if end:
        raise UserError(end)


def _error_of(work: Callable[[], object]) -> str:
    try:
        work()
        return ""
    except Exception as error:
        return str(error) or repr(error)

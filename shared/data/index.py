# SPDX-License-Identifier: Apache-2.0
"""The list of a data set's samples: one file of tensors that is mapped into memory, so that a million samples open at
once and the processes of a node share their pages. It stands beside packed tar shards, or in a cache."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file

NAME = "index.safetensors"  # beside shards


@dataclass(frozen=True)
class Index:
    """N samples. names: (N,) bytes, a file below the folder or a key in a shard. labels: (N,) int64, -1 where a sample
    names no class. shards: files below the folder; shard, offset, length: (N,), where each image's bytes lie in them.
    checksums: blake2b of each shard, empty where shards are another program's."""

    names: np.ndarray
    labels: np.ndarray
    classes: list[str]
    shards: list[str] | None = None
    shard: np.ndarray | None = None
    offset: np.ndarray | None = None
    length: np.ndarray | None = None
    checksums: list[str] | None = None

    def take(self, numbers: np.ndarray) -> "Index":
        """Some of the samples, in this order."""
        arrays = {name: getattr(self, name)[numbers] for name in ("names", "labels")}
        if self.shards is not None:
            arrays |= {name: getattr(self, name)[numbers] for name in ("shard", "offset", "length")}
        return replace(self, **arrays)

    def save(self, path: Path) -> None:
        """Complete or absent: written beside, then renamed."""
        arrays = {"names": _as_bytes(self.names), "labels": self.labels.astype(np.int64)}
        if self.shards is not None:
            kinds = {"shard": np.int32, "offset": np.int64, "length": np.int64}
            arrays |= {name: getattr(self, name).astype(kind) for name, kind in kinds.items()}
        lists = json.dumps({name: getattr(self, name) for name in ("classes", "shards", "checksums")})
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(
            {name: torch.from_numpy(array) for name, array in arrays.items()}, partial, metadata={"lists": lists}
        )
        os.replace(partial, path)

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
    home = os.environ.get("SCRATCH") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dlojz-recipes"


def cached(what: Path, changed: float, build: Callable[[], Index]) -> Index:
    """The index of a folder that has none, from the cache of `$SCRATCH` or of the user. Rank 0 builds it where it is
    missing or older than the folder; the others wait for the file, for as long as that takes."""
    key = hashlib.blake2b(f"{what.resolve()}\n{changed}".encode(), digest_size=12).hexdigest()
    path = cache_folder() / f"{key}.safetensors"
    if not path.exists() and PartialState().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        build().save(path)
    while not path.exists():
        time.sleep(0.1)
    return Index.load(path)

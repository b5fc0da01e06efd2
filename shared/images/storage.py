# SPDX-License-Identifier: Apache-2.0
"""Read any image by its number: from memory, files, tar shards or a table."""

import functools
import os
from typing import Protocol

import numpy as np

from ..files import raise_open_files
from .index import Index

OPEN_FILES = 4096  # that a process asks for: ImageNet has 641 shards, and many systems give 1,024 unless asked


class Images(Protocol):
    def __getitem__(self, number: int) -> bytes | np.ndarray:
        """Return the encoded image, or its pixels (H, W, 3) uint8; raises OSError where it is missing or cut off."""

    def name(self, number: int) -> str:
        """Return the name under which a person finds the image."""

    def take(self, numbers: np.ndarray) -> "Images":
        """Return a part of the images, in this order."""


class Pixels:
    """Decoded images of one size, in memory."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels

    def __getitem__(self, number: int) -> np.ndarray:
        return self.pixels[number]

    def name(self, number: int) -> str:
        return f"embedded image {number}"

    def take(self, numbers: np.ndarray) -> "Pixels":
        return Pixels(self.pixels[numbers])


class Files:
    """Images in files of their own. names: (N,) bytes, paths below the folder, or absolute."""

    def __init__(self, folder: str, names: np.ndarray):
        self.folder, self.names = folder, names

    def __getitem__(self, number: int) -> bytes:
        if b".." in self.names[number].split(b"/"):
            raise OSError("its path climbs out of the folder")
        with open(self.name(number), "rb") as file:
            return file.read()

    def name(self, number: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.names[number]))

    def take(self, numbers: np.ndarray) -> "Files":
        return Files(self.folder, self.names[numbers])


def open_shards() -> int:
    """Return how many shards one source keeps open: a quarter of the files that this process may open, since there
    are a training and a held-out part, and other files."""
    return max(1, raise_open_files(OPEN_FILES) // 4)


class Members:
    """Images within uncompressed tar shards, read at the offset that the index gives."""

    def __init__(self, folder: str, index: Index):
        self.folder, self.index = folder, index
        opener = functools.partial(open, mode="rb", buffering=0)
        self.opened = functools.lru_cache(open_shards())(lambda name: opener(os.path.join(folder, name)))

    def __reduce__(self) -> tuple:
        return Members, (self.folder, self.index)  # another process has no such open files

    def __getitem__(self, number: int) -> bytes:
        index = self.index
        length = int(index.length[number])
        # Closed when neither this nor the cache refers to it. Reads name their position: threads may share it.
        file = self.opened(index.shards[index.shard[number]])
        data = os.pread(file.fileno(), length, int(index.offset[number]))
        if len(data) < length:
            raise OSError(f"the shard ends {length - len(data)} bytes too early")
        return data

    def name(self, number: int) -> str:
        shard = self.index.shards[self.index.shard[number]]
        return f"{os.path.join(self.folder, shard)}: {os.fsdecode(self.index.names[number])}"

    def take(self, numbers: np.ndarray) -> "Members":
        return Members(self.folder, self.index.take(numbers))


class Rows:
    """Images in a column of Hugging Face's Image feature, a struct of bytes and path, mapped from the disk."""

    def __init__(self, column, where: str, rows: np.ndarray | None = None):
        """column: a pyarrow ChunkedArray."""
        self.column, self.where, self.rows = column, where, np.arange(len(column)) if rows is None else rows

    def __getitem__(self, number: int) -> bytes:
        data = self.column[int(self.rows[number])]["bytes"].as_py()
        if data is None:
            raise OSError("the row holds a path and no bytes")
        return data

    def name(self, number: int) -> str:
        return f"{self.where}: row {self.rows[number]}"

    def take(self, numbers: np.ndarray) -> "Rows":
        return Rows(self.column, self.where, self.rows[numbers])

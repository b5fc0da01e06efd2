# SPDX-License-Identifier: Apache-2.0
"""Where images lie, each read at random by its number: in memory, in files, in tar shards, in a parquet table."""

import os
from collections import OrderedDict
from typing import Protocol

import numpy as np

from .index import Index

OPEN_SHARDS = 128  # files that one process keeps open


class Images(Protocol):
    def __getitem__(self, number: int) -> bytes | np.ndarray:
        """The encoded image, or its pixels (H, W, 3) of uint8; raises OSError where it is missing or cut off."""

    def name(self, number: int) -> str:
        """What a person would look for."""

    def take(self, numbers: np.ndarray) -> "Images":
        """A part of them, in this order."""


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
    """Each image a file. names: (N,) bytes, paths below the folder, or absolute."""

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


class Members:
    """Images within uncompressed tar shards, read at the offset that the index gives."""

    def __init__(self, folder: str, index: Index):
        self.folder, self.index, self.files = folder, index, OrderedDict()

    def __getitem__(self, number: int) -> bytes:
        index = self.index
        length = int(index.length[number])
        data = os.pread(self._open(int(index.shard[number])), length, int(index.offset[number]))
        if len(data) < length:
            raise OSError(f"the shard ends {length - len(data)} bytes too early")
        return data

    def _open(self, shard: int) -> int:
        """A descriptor. Reads name their position, so that processes which were forked may share it."""
        if shard not in self.files:
            if len(self.files) >= OPEN_SHARDS:
                os.close(self.files.popitem(last=False)[1])
            self.files[shard] = os.open(os.path.join(self.folder, self.index.shards[shard]), os.O_RDONLY)
        self.files.move_to_end(shard)
        return self.files[shard]

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

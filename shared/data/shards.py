# SPDX-License-Identifier: Apache-2.0
"""Tar shards in webdataset's convention: `KEY.jpg` beside `KEY.cls`, which holds the class's number as text."""

import contextlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from ..config import UserError
from .index import Index

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "pgm")
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
BLOCK = tarfile.BLOCKSIZE
MOST_CLASSES = 1_000_000  # a greater label is taken for a mistake: the network would have an output for each


def scan(folder: Path, shards: list[Path]) -> Index:
    """The index of shards that another program wrote, by their headers and labels alone."""
    rows, torn = [], []
    for number, shard in enumerate(tqdm(shards, desc=f"index of {folder}", unit="shard", disable=None)):
        if not is_complete(shard):
            torn.append(f"{shard} was cut off, or is no tar: what it lost is unknown")
        rows += [(key, label, number, *place) for key, label, *place in members(shard)]
    if not rows:
        raise UserError(f"{folder} has shards but no images in them. Members must be KEY.jpg beside KEY.cls.")
    key, label, number, *_ = max(rows, key=lambda row: row[1])
    if label >= MOST_CLASSES:
        raise UserError(f"{shards[number]}: {key} has the class {label}, which is no number of a class. Mend it.")
    if label < 0:
        raise UserError(
            f"{folder}: no image of its shards has a class. Beside KEY.jpg must be KEY.cls with its number."
        )
    keys, labels, shard, offset, length = map(np.array, zip(*rows, strict=True))
    names = [str(path.relative_to(folder)) for path in shards]
    return Index(
        np.char.encode(keys, "utf-8"), labels, numbered(label + 1), names, shard, offset, length, torn=torn or None
    )


def numbered(count: int) -> list[str]:
    """Classes that have no names."""
    return [str(label) for label in range(count)]


def members(shard: Path) -> list[tuple[str, int, int, int]]:
    """(key, label, offset, length) of each image of a shard; label -1 where it names no class. An image within which
    the shard ends is listed, so that reading it fails and is counted."""
    images, label = {}, {}
    with open(shard, "rb") as file:
        for member in _headers(file):
            # webdataset's: what comes before the first dot of the file's name.
            stem, _, kind = os.path.basename(member.name).partition(".")
            key, kind = os.path.join(os.path.dirname(member.name), stem), kind.lower()
            if kind.rpartition(".")[2] in PICKLES:  # of the whole: KEY.input.pyd
                raise UserError(
                    f"{shard} holds {member.name}, a pickle, which can run any program when it is read. "
                    "Pack the images anew from their JPEG files: tools/pack.py."
                )
            if kind == "cls":
                label[key] = _number(os.pread(file.fileno(), min(member.size, 32), member.offset_data))
            elif image_kind([kind]):
                images.setdefault(key, {}).setdefault(kind, (member.offset_data, member.size))
    return [(key, label.get(key, -1), *kinds[image_kind(kinds)]) for key, kinds in images.items()]


def image_kind(kinds: Iterable[str]) -> str | None:
    """Which of a sample's members is its image: `jpg` or the like before `mask.jpg`, the first before others."""
    found = [kind for kind in kinds if kind.rpartition(".")[2] in IMAGES]
    return min(found, key=lambda kind: kind not in IMAGES, default=None)


def is_complete(shard: Path) -> bool:
    """Whether it ends as an archive does, with two empty blocks; tarfile does not mind where they lack."""
    with open(shard, "rb") as file:
        file.seek(max(0, shard.stat().st_size - 2 * BLOCK))
        return file.read() == bytes(2 * BLOCK)


def _headers(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Of what is left of a shard: none of one that is empty."""
    with contextlib.suppress(tarfile.ReadError), tarfile.open(fileobj=file, mode="r:") as tar:
        yield from filter(tarfile.TarInfo.isfile, tar)


def _number(text: bytes) -> int:
    return int(text) if text.strip().isdigit() else -1

# SPDX-License-Identifier: Apache-2.0
"""Tar shards in webdataset's convention: `KEY.jpg` beside `KEY.cls`, which holds the class's number as text."""

import contextlib
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from ..config import UserError, say
from .index import Index

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff", "pgm")
PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
BLOCK = tarfile.BLOCKSIZE


def scan(folder: Path, shards: list[Path]) -> Index:
    """The index of shards that another program wrote, by their headers and labels alone."""
    rows = []
    for number, shard in enumerate(tqdm(shards, desc=f"index of {folder}", unit="shard", disable=None)):
        rows += [(key, label, number, *place) for key, label, *place in members(shard)]
    if not rows:
        raise UserError(f"{folder} has shards but no images in them. Members must be KEY.jpg beside KEY.cls.")
    keys, labels, shard, offset, length = map(np.array, zip(*rows, strict=True))
    if max(labels) < 0:
        raise UserError(
            f"{folder}: no image of its shards has a class. Beside KEY.jpg must be KEY.cls with its number."
        )
    classes = [str(label) for label in range(max(labels) + 1)]
    names = [str(path.relative_to(folder)) for path in shards]
    return Index(np.char.encode(keys, "utf-8"), labels, classes, names, shard, offset, length)


def members(shard: Path) -> list[tuple[str, int, int, int]]:
    """(key, label, offset, length) of each image of a shard; label -1 where it names no class. A shard that was cut
    off is named; an image that it ends within is listed, so that reading it fails and is counted."""
    images, label = {}, {}
    with open(shard, "rb") as file:
        for member in _headers(shard, file):
            # webdataset's: what comes before the first dot of the file's name.
            stem, _, kind = os.path.basename(member.name).partition(".")
            key, kind = os.path.join(os.path.dirname(member.name), stem), kind.lower()
            if kind in PICKLES:
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


def _headers(shard: Path, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    file.seek(max(0, shard.stat().st_size - 2 * BLOCK))
    if file.read().strip(b"\0"):  # an archive ends with two empty blocks, and tarfile does not mind where they lack
        say(f"torn shard: {shard} was cut off: what it lost is unknown", sys.stderr)
    file.seek(0)
    with tarfile.open(fileobj=file) as tar, contextlib.suppress(tarfile.ReadError):
        yield from filter(tarfile.TarInfo.isfile, tar)


def _number(text: bytes) -> int:
    return int(text) if text.strip().isdigit() else -1

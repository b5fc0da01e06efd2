# SPDX-License-Identifier: Apache-2.0
"""Read tar shards in webdataset's convention: `KEY.jpg` beside `KEY.cls`, which holds the class's number as text."""

import contextlib
import itertools
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from .index import Index
from .tree import IMAGES, is_hidden, state_of

PICKLES = ("pyd", "pkl", "pickle", "pth", "pt")
BLOCK = tarfile.BLOCKSIZE
FEW_CLASSES = 1000  # even a few images of ImageNet may have labels up to this


def scan(parts: dict[str, list[str]], root: Path) -> Index:
    """Return the index of shards from another program, by their headers and labels. parts: the shards of each part."""
    shards = [shard for part in parts.values() for shard in part]
    rows, notes, counts, states = [], [], [], {}
    for number, shard in enumerate(tqdm(shards, desc=f"index of {root}", unit="shard", disable=None)):
        states[shard] = state_of(os.stat(root / shard))
        found, is_whole = members(root / shard)
        if not is_whole:
            notes.append(f"truncated shard: {root / shard} (or damaged, or not a tar). What it lost is unknown")
        rows += [(key, label, number, *place) for key, label, *place in found]
        counts.append(len(found))
    if not rows:
        raise UserError(f"{root} has shards but no images in them. Members must be KEY.jpg beside KEY.cls.")
    keys, labels, shard, offset, length = map(np.array, zip(*rows, strict=True))
    ends = np.cumsum([0, *map(len, parts.values())])
    sizes = [[sum(counts[begin:end]), int(end - begin)] for begin, end in itertools.pairwise(ends)]
    places = dict(zip(parts, sizes, strict=True))
    _check_labels(root, shards, rows, np.split(labels, np.cumsum(sizes, axis=0)[:-1, 0]), places)
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    names = np.array([os.fsencode(key) for key in keys.tolist()])
    return Index(
        names, labels, classes, shards, shard, offset, length, notes=notes or None, parts=places, states=states
    )


def _check_labels(root: Path, shards: list[str], rows: list, labels: list[np.ndarray], parts: dict) -> None:
    """Raise UserError for implausible labels: the greatest one decides how many classes there are."""
    key, label, number, *_ = max(rows, key=lambda row: row[1])
    for name, part in zip(parts, labels, strict=True):
        if not (part >= 0).any():
            what = f"of the part {name}" if name else "of its shards"
            raise UserError(f"{root}: no image {what} has a class. Beside KEY.jpg must be KEY.cls with its number.")
    if label + 1 > max(len(labels[0]), FEW_CLASSES):
        where, count = f"{root / shards[number]}: {key}", len(labels[0])
        raise UserError(f"{where} has the class {label}, but there are {count} training images in all. Fix it.")
    train, *held_out = ({*part[part >= 0].tolist()} for part in labels)
    if unseen := set().union(*held_out) - train:
        raise UserError(f"{root}: the class {min(unseen)} has held-out images only. Both parts need the same classes.")
    if len(train) == 1:
        raise UserError(f"{root}: all images have the class {label}, so there is nothing to classify. Check KEY.cls.")


def members(shard: Path) -> tuple[list[tuple[str, int, int, int]], bool]:
    """Return (key, label, offset, length) of each image of a shard, label -1 where it has no class; and whether the
    shard is whole. An image that the end of the shard cuts off is listed, so that reading it fails and is counted."""
    images, label = {}, {}
    found, is_whole = members_of_tar(shard)
    with open(shard, "rb") as file:
        for member in found:
            # webdataset's key: what comes before the first dot of the file's name.
            stem, _, kind = os.path.basename(member.name).partition(".")
            key, kind = os.path.join(os.path.dirname(member.name), stem), kind.lower()
            if kind.rpartition(".")[2] in PICKLES:  # its last ending: KEY.input.pyd
                raise UserError(
                    f"{shard} holds {member.name}, a pickle, which can run any program when it is read. "
                    "Pack the images again from their JPEG files: tools/pack.py."
                )
            if kind == "cls":
                label[key] = _number(os.pread(file.fileno(), min(member.size, 32), member.offset_data))
            elif image_kind([kind]):
                images.setdefault(key, {}).setdefault(kind, (member.offset_data, member.size))
    for key, kinds in images.items():
        _refuse_several(shard, key, kinds)
    return [(key, label.get(key, -1), *kinds[image_kind(kinds)]) for key, kinds in images.items()], is_whole


def _refuse_several(shard: Path, key: str, kinds: Iterable[str]) -> None:
    plain = [kind for kind in kinds if kind in IMAGES] or list(kinds)
    if len(plain) > 1:
        raise UserError(
            f"{shard} has several images of {key}: {', '.join(plain[:3])}. Call the one to train on {key}.jpg, or "
            "remove the others."
        )


def image_kind(kinds: Iterable[str]) -> str | None:
    """Return the kind of a sample's image: `jpg` or the like before `mask.jpg`, the first before others."""
    found = [kind for kind in kinds if kind.rpartition(".")[2] in IMAGES]
    return min(found, key=lambda kind: kind not in IMAGES, default=None)


def members_of_tar(path: Path) -> tuple[list[tarfile.TarInfo], bool]:
    """Return a tar's files, links to them, and folders (with a final slash), without hidden ones, as far as it can be
    read; and whether it is whole, which an empty block at its end shows: tarfile accepts a damaged header.

    A file's size is at most one byte more than the tar has: in a damaged header it can be any number.
    """
    files, size = {}, os.stat(path).st_size
    with open(path, "rb") as file, contextlib.suppress(tarfile.TarError, MemoryError, OverflowError, ValueError):
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - it closes nothing
        for member in tqdm(tar, desc=str(path), unit="member", disable=None, leave=False):
            if any(is_hidden(name) for name in member.name.split("/") if name != "."):
                continue
            if member.isdir():
                member.name += "/"
            if member.isfile() or member.isdir():
                member.size = min(member.size, max(0, size - member.offset_data) + 1)
                files[member.name] = member
            elif target := (member.issym() or member.islnk()) and files.get(_target(member)):
                files[member.name] = target.replace(name=member.name, deep=False)
        return list(files.values()), os.pread(file.fileno(), BLOCK, tar.offset) == bytes(BLOCK)
    return list(files.values()), False


def _target(link: tarfile.TarInfo) -> str:
    """Return the name in the tar to which a link points."""
    return link.linkname if link.islnk() else os.path.normpath(os.path.join(os.path.dirname(link.name), link.linkname))


def _number(text: bytes) -> int:
    return int(text) if text.strip().isdigit() else -1

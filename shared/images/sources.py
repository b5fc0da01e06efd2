# SPDX-License-Identifier: Apache-2.0
"""Open labelled images for random access: digits, garments, or those that a folder or a CSV file names."""

import gzip
import hashlib
import os
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from accelerate import PartialState
from PIL import Image

from ..draws import random_bits
from ..errors import UserError, say
from ..order import Blocks
from . import listing, shards
from .index import NAME, Index, cached
from .storage import Files, Images, Members, Pixels
from .tables import open_rows, read_columns
from .tree import HELD_OUT, PARTS, pair, read_layout, tree_of_folder

ARCHIVES = (".zip", ".tar")
SAMPLED = 64  # images of a part whose bytes are in its fingerprint
FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
GARMENTS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True)
class Source:
    """Labelled images: `labels[i]`, of `images[i]`, indexes `classes`; -1 where an image has no class. blocks: for an
    order by shards.

    Raises UserError where labels are not one whole number per image: they are never cast.
    """

    images: Images
    labels: np.ndarray
    classes: list[str]
    blocks: Blocks | None = None

    def __post_init__(self):
        if self.labels.dtype.kind not in "iu" or self.labels.ndim != 1:
            raise UserError(
                f"labels of {self.labels.dtype}, {self.labels.ndim} dimensions, such as {self.labels[:1].tolist()}. "
                "Give the number of one class an image; other tasks than classification are not supported."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, numbers: np.ndarray) -> "Source":
        blocks = self.blocks and Blocks(self.blocks.shard[numbers], self.blocks.size)
        return Source(self.images.take(numbers), self.labels[numbers], self.classes, blocks)

    def first(self, count: int, seed: int) -> "Source":
        """Return the first images of the seed's permutation, in their former order; all for 0."""
        if count > len(self):
            raise UserError(f"--train_images {count} is more than the {len(self)} that there are. Give 0 for all.")
        permutation = np.argsort(random_bits(len(self), seed), kind="stable")
        return self.subset(np.sort(permutation[:count])) if count else self

    def fingerprint(self) -> str:
        """Return a hash (16 hex digits) of all labels, all file names and the bytes of SAMPLED images."""
        digest = hashlib.blake2b(self.labels.astype(np.int64), digest_size=8)
        names = getattr(getattr(self.images, "index", self.images), "names", None)
        digest.update(b"" if names is None else names.tobytes())
        for number in np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).astype(int).tolist():
            try:
                digest.update(self.images[number])
            except OSError:
                digest.update(b"torn")  # the word stays: existing runs have its hash
        return digest.hexdigest()


def open_data(
    data: str, val_fraction: float, seed: int, shuffle_block: int = 0, image_column: str = "", label_column: str = ""
) -> tuple[Source, Source]:
    """Return the training and the held-out images of `--data`. shuffle_block: shards whose samples are shuffled
    together; 0 shuffles all. image_column, label_column: which ones of a table or a CSV; empty where there is one.

    Raises UserError, naming the folder and the remedy, for whatever is missing, empty or contradictory.
    """
    train, held_out = _open(data, val_fraction, seed, image_column, label_column)
    if shuffle_block and train.blocks is None:
        raise UserError(
            f"--shuffle_block {shuffle_block} needs tar shards, which tools/pack.py fills at random; {data} has none. "
            "Leave it out."
        )
    blocks = Blocks(train.blocks.shard, shuffle_block) if shuffle_block else None
    return replace(train, blocks=blocks), held_out


def _open(data: str, val_fraction: float, seed: int, *columns: str) -> tuple[Source, Source]:
    if data in NAMED:
        _refuse_columns(columns, f"--data {data}")
        _refuse_fraction(val_fraction, f"--data {data}")
        return NAMED[data]()
    path = Path(data)
    if not path.exists():
        raise UserError(f"--data {data} does not exist. Give the word digits or fashion, a folder, or a CSV file.")
    if path.is_file() and path.suffix.lower() == ".csv":
        return _from_csv(path, val_fraction, seed, *columns)
    if path.is_file() and path.suffix.lower() in ARCHIVES:
        raise UserError(f"--data {data} is an archive. Pack it: python tools/pack.py {data} FOLDER --format tar.")
    if not path.is_dir():
        raise UserError(f"--data {data} is neither a folder nor a .csv file.")
    raw = path / "RawImages"  # of Jean Zay's $DSDIR/imagenet
    folder = raw if raw.is_dir() else path
    return train_and_held_out(_parts_of_folder(folder, columns), val_fraction, seed, folder)


def train_and_held_out(
    parts: dict[str, Source], val_fraction: float, seed: int, where: Path | str
) -> tuple[Source, Source]:
    """Return both parts with the training's classes; without a held-out part, split off a share of each class.

    Raises UserError where the parts do not allow it.
    """
    train, *held_out = (parts[name] for name in pair(list(parts), str(where)))
    if len(train.classes) < 2:
        raise UserError(f"{where} has one class, {train.classes[0]}. There is nothing to classify. Give it another.")
    if not held_out:
        return split(train, val_fraction, seed, where)
    _refuse_fraction(val_fraction, f"the part {list(parts)[1]} of {where}")
    return train, with_classes(held_out[0], train.classes, where)


def with_classes(held_out: Source, classes: list[str], where: Path | str) -> Source:
    """Renumber the labels for these classes, by name. Raises UserError for a class that one part is missing."""
    if held_out.classes == classes:
        return held_out
    refuse_other_classes(classes, held_out.classes, where)
    number = {name: label for label, name in enumerate(classes)}
    numbers = np.array([*(number[name] for name in held_out.classes), -1])  # the label -1 stays
    return replace(held_out, labels=numbers[held_out.labels], classes=classes)


def refuse_other_classes(train: Iterable[str], held_out: Iterable[str], where: Path | str) -> None:
    if different := sorted({*train} ^ {*held_out}):
        part = "training" if different[0] in train else "held-out"
        raise UserError(f"{where}: the class {different[0]} has {part} images only. Both parts need the same classes.")


def _parts_of_folder(folder: Path, columns: tuple[str, ...]) -> dict[str, Source]:
    if packed := _packed(folder):
        _refuse_columns(columns, str(folder))
        return packed
    index = cached(folder, lambda: scan(folder))
    if index.notes and PartialState().is_main_process:
        say("\n".join(index.notes), sys.stderr)
    if index.tables:
        return {name: _from_tables(folder, name, files, columns) for name, files in index.tables.items()}
    _refuse_columns(columns, str(folder))
    return {name: _of_index(folder, index.part(name)) for name in index.parts}


def _packed(folder: Path) -> dict[str, Source]:
    """Return what tools/pack.py wrote: the parts, if each has an index beside it."""
    if (folder / NAME).exists():
        return {"": _of_packed(folder)}
    parts = [entry.name for entry in os.scandir(folder) if entry.name in PARTS and entry.is_dir()]
    if not parts or not all((folder / name / NAME).exists() for name in parts):
        return {}
    return {name: _of_packed(folder / name) for name in pair(sorted(parts), str(folder))}


def _of_packed(folder: Path) -> Source:
    index = Index.load(folder / NAME)
    missing = set(index.shards or ()) - {entry.name for entry in os.scandir(folder)}
    if missing:
        raise UserError(f"{folder / NAME} lists {min(missing)}, which is not there. Copy it, or pack again.")
    return _of_index(folder, index)


def _of_index(folder: Path, index: Index) -> Source:
    images = Members(str(folder), index) if index.shards else Files(str(folder), index.names)
    return Source(images, index.labels, index.classes, Blocks(index.shard, 0) if index.shards else None)


def scan(folder: Path) -> Index:
    """List the images of a folder, of its shards or of its tables."""
    try:
        tree, states, notes = tree_of_folder(folder)
        layout = read_layout(tree, str(folder))
        if layout.kind == "tables":  # which have rows of their own
            index = Index(np.zeros(0, "S1"), np.zeros(0, np.int64), [], tables=layout.parts)
        else:
            index = (index_of_images if layout.kind == "images" else shards.scan)(layout.parts, folder)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}. Fix or remove it.") from error
    notes += layout.notes + (index.notes or [])
    return replace(index, notes=notes or None, states=states | (index.states or {}))


def index_of_images(parts: dict[str, dict[str, list[str]]], where: Path) -> Index:
    """Return the index of class folders, part after part. Raises UserError where the parts' classes differ."""
    first = next(iter(parts.values()))
    classes, names, labels, counts = list(first), [], [], {}
    for name, part in parts.items():
        refuse_other_classes(first, part, where)
        before = len(names)
        for label, files in enumerate(part[each] for each in classes):
            names += map(os.fsencode, files)
            labels += [label] * len(files)
        counts[name] = [len(names) - before, 0]
    return Index(np.array(names), np.array(labels, dtype=np.int64), classes, parts=counts)


def _from_tables(folder: Path, part: str, files: list[str], columns: tuple[str, ...]) -> Source:
    where = str(folder / part)
    return Source(*read_columns(open_rows([folder / file for file in files]), where, *columns))


def _digits() -> tuple[Source, Source]:
    """Return scikit-learn's 1,797 digits (Alpaydin & Kaynak, 1998), enlarged from 8x8 to 32x32; every fifth held
    out."""
    (package,) = find_spec("sklearn").submodule_search_locations  # importing it takes two seconds
    table = np.loadtxt(Path(package) / "datasets/data/digits.csv.gz", delimiter=",")
    grey = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=3)
    everything = Source(Pixels(images), table[:, -1].astype(np.int64), [str(digit) for digit in range(10)])
    held_out = np.arange(len(everything)) % 5 == 0
    return everything.subset(np.flatnonzero(~held_out)), everything.subset(np.flatnonzero(held_out))


def _fashion() -> tuple[Source, Source]:
    """Return Fashion-MNIST (Xiao et al., arXiv:1708.07747): 60,000 and 10,000 grey images of 28 x 28 pixels."""
    parts = []
    try:
        for name in ("train", "t10k"):
            grey = _numbers(FASHION / f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28, 1)
            labels = _numbers(FASHION / f"{name}-labels-idx1-ubyte.gz", 8).astype(np.int64)
            parts.append(Source(Pixels(np.repeat(grey, 3, axis=3)), labels, [*GARMENTS]))
    except (OSError, EOFError, zlib.error) as error:
        remedy = "Install Debian's package: apt install dataset-fashion-mnist"
        raise UserError(f"--data fashion cannot be read: {error}. {remedy}.") from error
    return parts[0], parts[1]


def _numbers(path: Path, header: int) -> np.ndarray:
    """Return the bytes of an IDX file that follow its header."""
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


NAMED = {"digits": _digits, "fashion": _fashion}


def _from_csv(path: Path, val_fraction: float, seed: int, *columns: str) -> tuple[Source, Source]:
    """Open a CSV: columns path (relative to its folder, or absolute), label (a class name) and, optionally, split."""
    paths, names, parts = listing.read_csv(path, *columns)
    classes = sorted({*names})
    number = {name: label for label, name in enumerate(classes)}
    first = path.parent / paths[0]  # any other that is missing is counted as undecodable
    if not first.is_file():
        raise UserError(f"{path} names {first}, which does not exist. Paths are relative to the CSV's folder.")
    images = Files(str(path.parent), np.array([*map(os.fsencode, paths)]))
    everything = Source(images, np.array([number[name] for name in names], dtype=np.int64), classes)
    if parts is None:
        return train_and_held_out({"": everything}, val_fraction, seed, path)
    return train_and_held_out(_by_split(everything, parts, path), val_fraction, seed, path)


def _by_split(everything: Source, parts: list[str], path: Path) -> dict[str, Source]:
    unknown = sorted({part for part in parts if part.lower() not in PARTS})
    if unknown:
        raise UserError(f"{path} has the split {unknown[0]!r}. Write train, or one of {', '.join(HELD_OUT)}.")
    lines = np.array([part.lower() for part in parts])
    names = pair(sorted({*lines.tolist()}), str(path))
    if len(names) == 1:
        raise UserError(f"{path} has no row with the split val. Add one, or drop the column for --val_fraction.")
    sources = {name: everything.subset(np.flatnonzero(lines == name)) for name in names}
    present = [[everything.classes[label] for label in np.unique(part.labels)] for part in sources.values()]
    refuse_other_classes(*present, path)
    return sources


def split(everything: Source, val_fraction: float, seed: int, path: Path | str) -> tuple[Source, Source]:
    """Hold out `val_fraction` of each class, drawn from the seed."""
    if val_fraction == 0:
        raise UserError(f"{path} has no held-out images. Add a folder val/, or give --val_fraction 0.1.")
    order = np.argsort(random_bits(len(everything), seed), kind="stable")
    held_out = np.zeros(len(everything), dtype=bool)
    for label in range(len(everything.classes)):
        members = order[everything.labels[order] == label]
        held_out[members[: min(max(1, round(len(members) * val_fraction)), len(members) - 1)]] = True
    return everything.subset(np.flatnonzero(~held_out)), everything.subset(np.flatnonzero(held_out))


def _refuse_columns(columns: tuple[str, ...], what: str) -> None:
    for flag, name in zip(("--image_column", "--label_column"), columns, strict=True):
        if name:
            raise UserError(f"{flag} {name} has no effect: {what} has no columns. Leave it out.")


def _refuse_fraction(val_fraction: float, what: str) -> None:
    if val_fraction:
        raise UserError(f"--val_fraction {val_fraction:g} has no effect: {what} says what is held out. Leave it out.")

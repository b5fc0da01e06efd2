# SPDX-License-Identifier: Apache-2.0
"""Random access to labelled images: the embedded digits, a folder of class folders, or a CSV of paths."""

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import UserError
from .order import random_bits

HELD_OUT = ("val", "valid", "validation", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Source:
    """`images[i]` is an array (H, W, 3) of uint8 or the path of a file; `labels[i]` indexes `classes`."""

    images: list[str] | np.ndarray
    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The decoded RGB image of one sample; raises OSError that names the file where it cannot be decoded."""
        image = self.images[index]
        if isinstance(image, np.ndarray):
            return Image.fromarray(image)
        try:
            with Image.open(image) as file:
                return file.convert("RGB")
        except OSError as error:
            raise OSError(f"cannot decode {image}: {error}") from error

    def subset(self, indices: np.ndarray) -> "Source":
        images = self.images[indices] if isinstance(self.images, np.ndarray) else [self.images[i] for i in indices]
        return Source(images, self.labels[indices], self.classes)


def open_data(data: str, val_fraction: float, seed: int) -> tuple[Source, Source]:
    """The training and the held-out images of `--data`.

    Raises UserError, naming the folder and the remedy, for whatever is missing, empty or contradictory.
    """
    if data == "digits":
        _refuse_fraction(val_fraction, "the digits")
        return _digits()
    path = Path(data)
    if not path.exists():
        raise UserError(f"--data {data} does not exist. Give the word digits, a folder, or a CSV file.")
    if path.is_file() and path.suffix.lower() == ".csv":
        return _from_csv(path, val_fraction, seed)
    if not path.is_dir():
        raise UserError(f"--data {data} is neither a folder nor a .csv file.")
    return _from_folder(path, val_fraction, seed)


def _digits() -> tuple[Source, Source]:
    """scikit-learn's 1,797 scanned digits (Alpaydin & Kaynak, 1998), 8x8 enlarged to 32x32; every fifth held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=3)
    everything = Source(images, digits.target.astype(np.int64), [str(name) for name in digits.target_names])
    held_out = np.arange(len(everything)) % 5 == 0
    return everything.subset(np.flatnonzero(~held_out)), everything.subset(np.flatnonzero(held_out))


def _from_folder(path: Path, val_fraction: float, seed: int) -> tuple[Source, Source]:
    train = path / "train"
    held_out = [path / name for name in HELD_OUT if (path / name).is_dir()]
    if not train.is_dir():
        if held_out:
            raise UserError(f"{path} has {held_out[0].name}/ but no train/. Add it, or list the images in a CSV.")
        return _split(_scan(path), val_fraction, seed, path)
    if not held_out:
        return _split(_scan(train), val_fraction, seed, path)
    if len(held_out) > 1:
        names = " and ".join(folder.name for folder in held_out)
        raise UserError(f"{path} has {names}. Keep one of them, or list the images in a CSV.")
    _refuse_fraction(val_fraction, str(held_out[0]))
    sources = _scan(train), _scan(held_out[0])
    _same_classes(*sources, path)
    return sources


def _scan(folder: Path) -> Source:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} holds no class folders. Put the images of each class into a folder of its own.")
    images, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(
            os.path.join(parent, file)
            for parent, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        )
        if not files:
            raise UserError(f"the class folder {folder / name} holds no images. Fill it or remove it.")
        images += files
        labels += [label] * len(files)
    return Source(images, np.array(labels, dtype=np.int64), classes)


def _from_csv(path: Path, val_fraction: float, seed: int) -> tuple[Source, Source]:
    """Columns path (relative to the CSV's folder, or absolute), label (a class name) and, optionally, split."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = set(rows[0]) if rows else set()
    if not {"path", "label"} <= columns:
        raise UserError(f"{path} needs a header `path,label,split` and at least one row (split may be left out).")
    for number, row in enumerate(rows, start=2):
        if not row["path"] or not row["label"]:
            raise UserError(f"{path}, line {number}: path or label is empty. Complete the line or remove it.")
    classes = sorted({row["label"] for row in rows})
    labels = np.array([classes.index(row["label"]) for row in rows], dtype=np.int64)
    everything = Source([str(path.parent / row["path"]) for row in rows], labels, classes)
    missing = next((image for image in everything.images if not os.path.isfile(image)), None)
    if missing:
        raise UserError(f"{path} names {missing}, which does not exist. Paths are relative to the CSV's folder.")
    if "split" not in columns:
        return _split(everything, val_fraction, seed, path)
    return _by_split(everything, [row["split"] for row in rows], val_fraction, path)


def _by_split(everything: Source, splits: list[str], val_fraction: float, path: Path) -> tuple[Source, Source]:
    _refuse_fraction(val_fraction, f"the split column of {path}")
    unknown = sorted({str(split) for split in splits} - {"train", *HELD_OUT})
    if unknown:
        raise UserError(f"{path} has the split {unknown[0]!r}. Write train, or one of {', '.join(HELD_OUT)}.")
    training = np.array([split == "train" for split in splits])
    parts = [everything.subset(np.flatnonzero(mask)) for mask in (training, ~training)]
    for part, name in zip(parts, ("train", "val"), strict=True):
        if not len(part):
            raise UserError(
                f"{path} has no row with the split {name}. Add one, or drop the column for --val_fraction."
            )
    _same_classes(
        *(Source([], part.labels, [everything.classes[i] for i in np.unique(part.labels)]) for part in parts), path
    )
    return parts[0], parts[1]


def _split(everything: Source, val_fraction: float, seed: int, path: Path) -> tuple[Source, Source]:
    """Hold out `val_fraction` of each class, drawn from the seed."""
    if val_fraction == 0:
        raise UserError(f"{path} has no held-out images. Add {'/, '.join(HELD_OUT)}/, or give --val_fraction 0.1.")
    order = np.argsort(random_bits(len(everything), seed), kind="stable")
    held_out = np.zeros(len(everything), dtype=bool)
    for label in range(len(everything.classes)):
        members = order[everything.labels[order] == label]
        held_out[members[: min(max(1, round(len(members) * val_fraction)), len(members) - 1)]] = True
    return everything.subset(np.flatnonzero(~held_out)), everything.subset(np.flatnonzero(held_out))


def _same_classes(train: Source, held_out: Source, path: Path) -> None:
    different = sorted(set(train.classes) ^ set(held_out.classes))
    if different:
        where = "training" if different[0] in train.classes else "held-out"
        raise UserError(f"{path}: the class {different[0]} has {where} images only. Both parts need the same classes.")


def _refuse_fraction(val_fraction: float, what: str) -> None:
    if val_fraction:
        raise UserError(f"--val_fraction {val_fraction:g} has no use: {what} already says what is held out. Drop it.")

# SPDX-License-Identifier: Apache-2.0
"""Random access to labelled images: the embedded digits, class folders, tar shards, or a CSV of paths."""

import csv
import os
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from ..config import UserError, say
from .index import NAME as INDEX
from .index import Index, cached
from .order import Blocks, random_bits
from .shards import numbered, scan
from .storage import Files, Images, Members, Pixels, Rows, class_numbers

HELD_OUT = ("val", "valid", "validation", "test")
FEW_CLASSES = 1000  # a small part of ImageNet has that many
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Source:
    """Labelled images: `labels[i]`, of `images[i]`, indexes `classes`. blocks: for an order that goes by shards."""

    images: Images
    labels: np.ndarray
    classes: list[str]
    blocks: Blocks | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, numbers: np.ndarray) -> "Source":
        blocks = self.blocks and Blocks(self.blocks.shard[numbers], self.blocks.size)
        return Source(self.images.take(numbers), self.labels[numbers], self.classes, blocks)


def open_data(data: str, val_fraction: float, seed: int, shuffle_block: int = 0) -> tuple[Source, Source]:
    """The training and the held-out images of `--data`. shuffle_block: shards whose samples are shuffled together; 0
    shuffles all.

    Raises UserError, naming the folder and the remedy, for whatever is missing, empty or contradictory.
    """
    train, held_out = _open(data, val_fraction, seed)
    if shuffle_block and train.blocks is None:
        raise UserError(
            f"--shuffle_block {shuffle_block} needs tar shards, which tools/pack.py fills at random; {data} has none. "
            "Leave it out."
        )
    blocks = Blocks(train.blocks.shard, shuffle_block) if shuffle_block else None
    return replace(train, blocks=blocks), held_out


def _open(data: str, val_fraction: float, seed: int) -> tuple[Source, Source]:
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
    raw = path / "RawImages"  # of Jean Zay's $DSDIR/imagenet
    return _from_folder(raw if raw.is_dir() else path, val_fraction, seed)


def _digits() -> tuple[Source, Source]:
    """scikit-learn's 1,797 scanned digits (Alpaydin & Kaynak, 1998), 8x8 enlarged to 32x32; every fifth held out."""
    (package,) = find_spec("sklearn").submodule_search_locations  # to import it takes two seconds
    table = np.loadtxt(Path(package) / "datasets/data/digits.csv.gz", delimiter=",")
    grey = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=3)
    everything = Source(Pixels(images), table[:, -1].astype(np.int64), [str(digit) for digit in range(10)])
    held_out = np.arange(len(everything)) % 5 == 0
    return everything.subset(np.flatnonzero(~held_out)), everything.subset(np.flatnonzero(held_out))


def _from_folder(path: Path, val_fraction: float, seed: int) -> tuple[Source, Source]:
    train = path / "train"
    held_out = [path / name for name in HELD_OUT if (path / name).is_dir()]
    if not train.is_dir():
        if held_out:
            raise UserError(f"{path} has {held_out[0].name}/ but no train/. Add it, or list the images in a CSV.")
        return _split_numbered(_scan(path), val_fraction, seed, path)
    if not held_out:
        return _split_numbered(_scan(train), val_fraction, seed, path)
    if len(held_out) > 1:
        names = " and ".join(folder.name for folder in held_out)
        raise UserError(f"{path} has {names}. Keep one of them, or list the images in a CSV.")
    _refuse_fraction(val_fraction, str(held_out[0]))
    sources = _scan(train), _scan(held_out[0])
    if all(source.classes == numbered(len(source.classes)) for source in sources):
        # Classes without names are as many as the greatest label that a part happens to hold.
        classes = max((source.classes for source in sources), key=len)
        _refuse_stray_label(len(classes), len(sources[0]), path)
        return replace(sources[0], classes=classes), replace(sources[1], classes=classes)
    _same_classes(*sources, path)
    return sources


def _scan(folder: Path) -> Source:
    """One part of the data: tar shards, parquet files, what `datasets` saved, or class folders."""
    shards, tables = sorted(folder.glob("*.tar")), sorted(folder.glob("*.parquet"))
    if tables or (folder / "dataset_info.json").exists():
        return _from_datasets(folder, tables)
    if (folder / INDEX).exists():  # of tools/pack.py
        index = Index.load(folder / INDEX)
        missing = set(index.shards or ()) - {shard.name for shard in shards}
        if missing:
            raise UserError(f"{folder / INDEX} lists {min(missing)}, which is not there. Copy it, or pack anew.")
    elif shards:
        index = cached(folder, shards, lambda: scan(folder, shards))
    else:
        index = cached(folder, _class_folders(folder), lambda: _of_class_folders(folder))
    if index.torn and PartialState().is_main_process:
        say("\n".join(f"torn shard: {shard}" for shard in index.torn), sys.stderr)
    images = Members(str(folder), index) if shards else Files(str(folder), index.names)
    return Source(images, index.labels, index.classes, Blocks(index.shard, 0) if shards else None)


def _from_datasets(folder: Path, tables: list[Path]) -> Source:
    """Rows of Hugging Face's features Image and ClassLabel, which `datasets` maps into memory: parquet by way of its
    cache, what `save_to_disk` wrote from where it lies."""
    import datasets

    files = [str(table) for table in tables]
    saved = not files
    rows = (
        datasets.load_from_disk(folder) if saved else datasets.load_dataset("parquet", data_files=files, split="train")
    )
    kinds = {type(feature): name for name, feature in rows.features.items()}
    if not {datasets.Image, datasets.ClassLabel} <= set(kinds):
        raise UserError(f"{folder}: its columns are {dict(rows.features)}. An Image and a ClassLabel are needed.")
    image, label = kinds[datasets.Image], kinds[datasets.ClassLabel]
    classes = rows.features[label].names
    labels = class_numbers(rows.data.table[label], len(classes))
    return Source(Rows(rows.data.table[image], str(folder)), labels, classes)


def _class_folders(folder: Path) -> list[Path]:
    return sorted(Path(entry) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _of_class_folders(folder: Path) -> Index:
    classes = [entry.name for entry in _class_folders(folder)]
    if not classes:
        raise UserError(f"{folder} holds no class folders. Put the images of each class into a folder of its own.")
    names, labels = [], []
    for label, name in enumerate(tqdm(classes, desc=f"index of {folder}", unit="class", disable=None)):
        files = sorted(
            os.path.relpath(os.path.join(parent, file), folder)
            for parent, _, files in os.walk(folder / name, followlinks=True)
            for file in files
            if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        )
        if not files:
            raise UserError(f"the class folder {folder / name} holds no images. Fill it or remove it.")
        names += files
        labels += [label] * len(files)
    return Index(np.array([os.fsencode(name) for name in names]), np.array(labels, dtype=np.int64), classes)


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
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[row["label"]] for row in rows], dtype=np.int64)
    first = path.parent / rows[0]["path"]  # any other that is missing is counted as torn
    if not first.is_file():
        raise UserError(f"{path} names {first}, which does not exist. Paths are relative to the CSV's folder.")
    everything = Source(Files(str(path.parent), np.array([os.fsencode(row["path"]) for row in rows])), labels, classes)
    if "split" not in columns:
        return split(everything, val_fraction, seed, path)
    return _bysplit(everything, [row["split"] for row in rows], val_fraction, path)


def _bysplit(everything: Source, splits: list[str], val_fraction: float, path: Path) -> tuple[Source, Source]:
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
        *(Source(part.images, part.labels, [part.classes[i] for i in np.unique(part.labels)]) for part in parts), path
    )
    return parts[0], parts[1]


def split(everything: Source, val_fraction: float, seed: int, path: Path) -> tuple[Source, Source]:
    """Hold out `val_fraction` of each class, drawn from the seed."""
    if val_fraction == 0:
        raise UserError(f"{path} has no held-out images. Add {'/, '.join(HELD_OUT)}/, or give --val_fraction 0.1.")
    order = np.argsort(random_bits(len(everything), seed), kind="stable")
    held_out = np.zeros(len(everything), dtype=bool)
    for label in range(len(everything.classes)):
        members = order[everything.labels[order] == label]
        held_out[members[: min(max(1, round(len(members) * val_fraction)), len(members) - 1)]] = True
    return everything.subset(np.flatnonzero(~held_out)), everything.subset(np.flatnonzero(held_out))


def _split_numbered(everything: Source, val_fraction: float, seed: int, path: Path) -> tuple[Source, Source]:
    if everything.classes == numbered(len(everything.classes)):
        _refuse_stray_label(len(everything.classes), len(everything), path)
    return split(everything, val_fraction, seed, path)


def _refuse_stray_label(classes: int, images: int, path: Path) -> None:
    """The network would have an output for each number up to it."""
    if classes > max(images, FEW_CLASSES):
        raise UserError(f"{path} has the label {classes - 1}, but {images} training images in all. Mend that label.")


def _same_classes(train: Source, held_out: Source, path: Path) -> None:
    different = sorted(set(train.classes) ^ set(held_out.classes))
    if different:
        where = "training" if different[0] in train.classes else "held-out"
        raise UserError(f"{path}: the class {different[0]} has {where} images only. Both parts need the same classes.")


def _refuse_fraction(val_fraction: float, what: str) -> None:
    if val_fraction:
        raise UserError(f"--val_fraction {val_fraction:g} has no use: {what} already says what is held out. Drop it.")

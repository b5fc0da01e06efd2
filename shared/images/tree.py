# SPDX-License-Identifier: Apache-2.0
"""Find a data set's parts and classes from the names of its files alone: by one rule for folders and archives, for
images in class folders, tar shards and tables. Names that can be read in two ways are refused.

The parts' names are Hugging Face's (datasets/data_files.py); as there, a folder's name takes precedence over a file's.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ..errors import UserError

Tree = dict[str, list[str]]  # each folder ("" is the root, "a/b" lies below it) -> the names of its files
States = dict[str, list[int]]  # each folder or file -> its size and time of change

HELD_OUT = ("val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation")
PARTS = ("train", "training", *HELD_OUT)
WORD = re.compile(rf"(?<![a-z])(?:{'|'.join(PARTS)})(?![a-z])", re.IGNORECASE)
IMAGES = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "ppm", "pgm", "bmp", "tif", "tiff")
KINDS = {".parquet": "tables", ".arrow": "tables", ".tar": "tar shards"} | {f".{kind}": "images" for kind in IMAGES}
# What systems put beside a user's files, besides names that begin with a dot.
SYSTEM = {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM |= {"thumbs.db", "desktop.ini"}
ONE_EACH = "Put the images of each class into a folder of its own."


class Layout(NamedTuple):
    """The kind of files and, for each part, {class: names} of images or the names of other files; "" is the part of
    files that name none. notes: what was left out."""

    kind: str
    parts: dict[str, dict[str, list[str]] | list[str]]
    notes: list[str]


def is_hidden(name: str) -> bool:
    """Return whether a folder or a file is hidden or the system's, and so not data."""
    return name.startswith(".") or name.lower() in SYSTEM


def ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def tree_of_folder(root: Path) -> tuple[Tree, States, list[str]]:
    """Walk a folder, through links too, but into each real folder once and never into one that it lies in.

    Return the tree, the folders' states from before they were listed, and notes on links that were not followed.
    """
    tree, states, notes = {}, {}, []
    seen = {_identity(os.stat(parent)) for parent in root.resolve().parents}
    waiting, bar = [""], tqdm(desc=f"folders of {root}", unit="folder", disable=None)
    while waiting:
        folder = waiting.pop()
        state = os.stat(root / folder)
        if _identity(state) in seen:
            notes.append(f"{root / folder} is a link to a folder that is read already: left out")
            continue
        seen.add(_identity(state))
        with os.scandir(root / folder) as entries:
            there = [(entry.name, entry.is_dir()) for entry in entries if not is_hidden(entry.name)]
        tree[folder], states[folder] = sorted(name for name, is_dir in there if not is_dir), state_of(state)
        waiting += sorted((os.path.join(folder, name) for name, is_dir in there if is_dir), reverse=True)
        bar.update()
    bar.close()
    return tree, states, notes


def _identity(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino


def state_of(state: os.stat_result) -> list[int]:
    return [state.st_size, state.st_mtime_ns]


def with_slashes(names: list[str]) -> list[str]:
    """Return names without `./`, and with slashes for another system's backslashes."""
    return [name.replace("\\", "/").removeprefix("./") for name in names]


def read_layout(tree: Tree, where: str) -> Layout:
    """Find the kind of a data set's files, its parts and their classes. Raises UserError for what is missing, or what
    can be read in two ways."""
    top = sorted({folder.partition("/")[0] for folder in tree if folder})
    parts = [name for name in top if name in PARTS]
    if parts and (odd := [name for name in top if name.lower() in PARTS and name not in parts]):
        raise UserError(f"{where} has the folders {parts[0]} and {odd[0]}. Rename {odd[0]} to {odd[0].lower()}.")
    inside, outside = _kinds(tree, parts)
    found = inside if parts else outside
    if len(found) > 1:
        (one, other), names = sorted(found)[:2], sorted(found.values())
        raise UserError(
            f"{where} holds {one} and {other}, such as {names[0]} and {names[1]}. Give --data a folder of one kind."
        )
    kind = next(iter(found), "images")
    notes = _left_out(tree, parts, where)
    if kind == "images":
        folders = {name: _classes(tree, f"{name}/", f"{where}/{name}", notes) for name in pair(parts, where, tree)}
        return Layout(kind, folders if parts else {"": _classes(tree, "", where, notes)}, notes)
    if kind in outside and parts:
        raise UserError(f"{where} has {inside[kind]} and, outside of {parts[0]}/, {outside[kind]}. Keep one of them.")
    files = [os.path.join(folder, name) for folder, names in tree.items() for name in names]
    files = sorted(name for name in files if KINDS.get(ending(name)) == kind)
    grouped = parts_of_files(files, where)
    return Layout(kind, {name: grouped[name] for name in pair(list(grouped), where)}, notes)


def _kinds(tree: Tree, parts: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return {kind: the first such file} inside the parts' folders, and outside. An image that lies in no class
    folder does not count."""
    inside, outside = {}, {}
    for folder, files in tree.items():
        in_part = folder.partition("/")[0] in parts
        has_class = "/" in folder if in_part else folder
        for name in files:
            kind = KINDS.get(ending(name))
            if kind and (kind != "images" or has_class):
                (inside if in_part else outside).setdefault(kind, os.path.join(folder, name))
    return inside, outside


def pair(parts: list[str], where: str, tree: Tree | None = None) -> list[str]:
    """Return the names of the training part and, where there is one, of the held-out part.

    Raises UserError for any other parts, or for files of no part ("") beside them.
    """
    named = [name for name in parts if name]
    if odd := [name for name in named if name not in PARTS]:
        raise UserError(f"{where} has the part {odd[0]}. Name parts train and one of {', '.join(HELD_OUT)}.")
    if named and "" in parts:
        raise UserError(f"{where} has files of the part {named[0]}, and files of no part. Keep those of parts alone.")
    held_out = [name for name in HELD_OUT if name in named]
    train = [name for name in named if name not in HELD_OUT]
    for alike in (train, held_out):
        if len(alike) > 1:
            raise UserError(f"{where} has {' and '.join(alike)}. Keep one of them, or list the images in a CSV.")
    if held_out and not train:
        inner = {name for name in PARTS if f"{held_out[0]}/{name}" in (tree or ())}
        remedy = f"Give --data {where}/{held_out[0]}" if inner else "Add it, or list the images in a CSV"
        raise UserError(f"{where} has {held_out[0]}/ but no train/. {remedy}.")
    return (train or parts[:1]) + held_out


def parts_of_files(files: list[str], where: str) -> dict[str, list[str]]:
    """Return {part: its files}; "" is the part of those whose names say nothing."""
    parts, bases = {}, {}
    for file in files:
        names = file.split("/")
        words = [(depth, word.lower()) for depth, name in enumerate(names) for word in WORD.findall(name)]
        if len({word in HELD_OUT for _, word in words}) > 1:
            named = " and ".join(sorted({word for _, word in words}))
            raise UserError(f"{where}/{file} names {named}. Rename it to one part, or give --data a folder below.")
        depth, part = (words or [(len(names), "")])[0]
        parts.setdefault(part, []).append(file)
        bases.setdefault("/".join(names[: min(depth, len(names) - 1)]), file)
    if len(bases) > 1:
        one, other = list(bases.values())[:2]
        raise UserError(f"{where} has {one} and {other} in several folders. Give --data one of these folders.")
    return parts


def _classes(tree: Tree, prefix: str, where: str, notes: list[str]) -> dict[str, list[str]]:
    """Return {class: its images, sorted} of the folders below `prefix`."""
    folders = {}
    for folder in tree:
        if folder.startswith(prefix) and len(folder) > len(prefix):
            folders.setdefault(folder[len(prefix) :].partition("/")[0], []).append(folder)
    if not folders:
        loose = Counter(map(ending, tree.get(prefix[:-1], ())))
        raise UserError(f"{where} holds no class folders{', but ' + _counted(loose) if loose else ''}. {ONE_EACH}")
    _check_class_names(folders, prefix, where)
    classes, others = {}, Counter()
    for name, inner in sorted(folders.items()):
        files = [(folder, file) for folder in inner for file in tree[folder]]
        classes[name] = sorted(f"{folder}/{file}" for folder, file in files if KINDS.get(ending(file)) == "images")
        other = Counter(ending(file) for _, file in files if KINDS.get(ending(file)) != "images")
        if not classes[name]:
            what = f", but {_counted(other)}" if files else ""
            raise UserError(f"the class folder {where}/{name} holds no images{what}. Fill it or remove it.")
        others += other
    if others:
        notes.append(f"{where}: {_counted(others)} in class folders are not images")
    return classes


def _check_class_names(folders: dict[str, list[str]], prefix: str, where: str) -> None:
    """Raise UserError for a single class, and for folders that may be parts. folders: those of each class."""
    alone = len(folders) == 1
    if not alone and all(name.lower() in PARTS for name in folders):
        raise UserError(
            f"{where} has the folders {', '.join(folders)}, which name parts. Rename them to "
            f"{', '.join(map(str.lower, folders))}, and keep two."
        )
    for name, inner in folders.items():
        below = {folder[len(prefix) :].split("/")[1].lower() for folder in inner if folder != prefix + name}
        parts = sorted(below & {*PARTS})
        if parts and (alone or len({part in HELD_OUT for part in parts}) > 1):
            remedy = f"Give --data {where}/{name}" if alone else "Move the classes into the parts"
            raise UserError(f"{where}/{name} holds {' and '.join(parts)}, which name parts. {remedy}.")
        if alone:
            deeper = f" If it holds the class folders, give --data {where}/{name}." if len(inner) > 1 else ""
            raise UserError(f"{where} has one class, {name}, so there is nothing to classify. {ONE_EACH}{deeper}")


def _counted(endings: Counter) -> str:
    """Return a text such as `16 files (.txt: 16)`."""
    each = ", ".join(f"{kind or 'no ending'}: {count}" for kind, count in endings.most_common())
    return f"{endings.total()} files ({each})"


def _left_out(tree: Tree, parts: list[str], where: str) -> list[str]:
    """Return a line on data that lie in no part, and on images that lie in no class folder."""
    stray = Counter()
    for folder, files in tree.items():
        first, _, rest = folder.partition("/")
        if (first not in parts if parts else not folder) or (first in parts and not rest):
            loose = (ending(file) for file in files)
            outside = parts and first not in parts
            stray.update(kind for kind in loose if KINDS.get(kind) == "images" or (outside and kind in KINDS))
    return [f"{where}: {_counted(stray)} in no class folder, or in no part, are left out"] if stray else []

# SPDX-License-Identifier: Apache-2.0
"""Read parquet and arrow files of Hugging Face's `datasets`: the columns to train on, and their rows."""

import json
from pathlib import Path

import numpy as np
from accelerate import PartialState

from ..collectives import on_main_process
from ..errors import UserError
from .storage import Rows


def open_rows(files: list[Path]):
    """Return the rows of one part as a `datasets.Dataset` on the disk: arrow files are mapped in place, parquet
    files through the library's cache."""
    import datasets

    saved = files[0].with_name("state.json")  # of save_to_disk: it lists the files, beside which caches may lie
    if saved.exists():
        files = [saved.with_name(file["filename"]) for file in json.loads(saved.read_text())["_data_files"]]
    on_main_process(PartialState(), _refuse_other_features, files)
    try:
        if saved.exists():
            return datasets.load_from_disk(saved.parent)
        if files[0].suffix.lower() == ".arrow":
            return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])
        return datasets.load_dataset("parquet", data_files=[*map(str, files)], split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{files[0].parent}: {reason}. Copy or write its files again.") from error


def _refuse_other_features(files: list[Path]) -> None:
    """Raise UserError where files differ: the library would give all of them the first one's class names."""
    import datasets

    first = None
    for file in files:
        features = {
            name: feature
            for name, feature in datasets.Features.from_arrow_schema(_schema(file)).items()
            if isinstance(feature, datasets.Image | datasets.ClassLabel)
        }
        first = features if first is None else first
        for name in sorted(first.keys() | features.keys()):
            if first.get(name) != features.get(name):
                raise UserError(
                    f"{file}: its column {name} is {_said(features.get(name))}, but {_said(first.get(name))} in "
                    f"{files[0].name}. Write all files of a part alike."
                )


def _schema(file: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if file.suffix.lower() == ".parquet":
            return pq.read_schema(file)
        with pa.memory_map(str(file)) as mapped:
            return pa.ipc.open_stream(mapped).schema
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{file} cannot be read: {reason}. Copy or write it again.") from error


def read_columns(rows, where: str, image_column: str = "", label_column: str = "") -> tuple[Rows, np.ndarray, list]:
    """Return the images, the labels and the class names of a `datasets.Dataset`; empty names choose the columns where
    there is one of each.

    Raises UserError, naming the columns, where there are several of a kind, or none, or none of that name.
    """
    import datasets

    image = choose_column(rows.features, datasets.Image, image_column, "--image_column", where)
    label = choose_column(rows.features, datasets.ClassLabel, label_column, "--label_column", where)
    table, classes = rows.data.table, rows.features[label].names
    labels = np.asarray(table[label].fill_null(-1), dtype=np.int64)  # -1: null, or no number of a class
    return Rows(table[image], where), np.where((labels >= 0) & (labels < len(classes)), labels, -1), classes


def choose_column(features: dict, kind: type, wanted: str, flag: str, where: str) -> str:
    """Return the name of the only column of a kind of feature, or of the one that `flag` names."""
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if wanted in found or (len(found) == 1 and not wanted):
        return wanted or found[0]
    if wanted in features:
        raise UserError(
            f"{where}: {flag} {wanted} is {_said(features[wanted])}, and no {kind.__name__}. {_cast(kind)}"
        )
    there = ", ".join(f"{name} ({_said(feature)})" for name, feature in features.items())
    if wanted:
        raise UserError(f"{where} has no column {wanted}. It has {there}. Give {flag} one of them.")
    if found:
        raise UserError(f"{where} has the {kind.__name__} columns {', '.join(found)}. Choose one: {flag} {found[0]}.")
    raise UserError(f"{where} has no {kind.__name__} among its columns {there}. {_cast(kind)}")


def _said(feature) -> str:
    """Describe what a column holds, in a word or two."""
    if names := getattr(feature, "names", None):
        return f"a ClassLabel of {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    kind = type(feature).__name__
    return {"NoneType": "absent", "Value": getattr(feature, "dtype", "")}.get(kind, kind)


def _cast(kind: type) -> str:
    return f"Write the table again with that column as {kind.__name__}: `datasets.Dataset.cast_column`."

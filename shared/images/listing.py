# SPDX-License-Identifier: Apache-2.0
"""Read a CSV file that lists images. Its encoding, separator and columns are not guessed where two readings fit."""

import csv
import io
import math
import os
from pathlib import Path

from ..errors import UserError
from .tree import with_slashes

SEPARATORS = (",", ";", "\t")
NEEDED = "It needs a header `path,label,split` and at least one row (split may be left out)"


def read_csv(path: Path, image_column: str, label_column: str) -> tuple[list[str], list[str], list[str] | None]:
    """Return paths (as the CSV writes them, with slashes), labels, and parts where there is a column split."""
    wanted = [(image_column or "path").lower(), (label_column or "label").lower()]
    header, rows = _rows(path, _text(path), wanted)
    for name in (*wanted, "split"):
        if header.count(name) > 1:
            raise UserError(f"{path} has several columns {name}. Rename all but one of them.")
    columns = [[row[header.index(name)] for _, row in rows] for name in wanted]
    for (line, _), *values in zip(rows, *columns, strict=True):
        if not all(values):
            raise UserError(f"{path}, line {line}: {' or '.join(wanted)} is empty. Complete the line or remove it.")
    paths, labels = with_slashes(columns[0]), columns[1]
    _refuse_encoding(path, paths, labels)
    _refuse_no_classes(path, wanted[1], labels)
    return paths, labels, [row[header.index("split")] for _, row in rows] if "split" in header else None


def _text(path: Path) -> str:
    """Return the file's text. File names need not be UTF-8: their bytes are kept."""
    data = path.read_bytes()
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:4096]:
        raise UserError(f"{path} is UTF-16. Save it as UTF-8: iconv -f utf-16 -t utf-8 {path.name} > new.csv")
    return data.decode("utf-8-sig", "surrogateescape")


def _rows(path: Path, text: str, wanted: list[str]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header's names in lower case, and each row with its line number, split at the separator that yields
    the wanted columns."""
    for separator in SEPARATORS:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        try:
            header = [name.strip().lower() for name in next(reader, [])]
            if not {*wanted} <= {*header}:
                continue
            rows = [(reader.line_num, [value.strip() for value in row]) for row in reader if row]
        except csv.Error as error:
            raise UserError(f"{path}, line {reader.line_num}: {error}. Close its quotes.") from error
        if not rows:
            break
        for line, row in rows:
            if len(row) != len(header):
                remedy = "Put values that hold the separator into quotes"
                raise UserError(f"{path}, line {line} has {len(row)} values for {len(header)} columns. {remedy}.")
        return header, rows
    first = text.splitlines()[0][:100] if text.strip() else "nothing"
    raise UserError(f"{path} begins with {first!r}. {NEEDED}.")


def _refuse_encoding(path: Path, paths: list[str], labels: list[str]) -> None:
    """Raise UserError for bytes that are not UTF-8, except in the name of an existing file."""
    odd = next((label for label in labels if not _is_utf8(label)), None)
    file = next((name for name in paths if not _is_utf8(name)), None)
    if odd is None and file is not None and not os.path.exists(os.path.join(path.parent, file)):
        odd = file
    if odd is not None:
        shown = ascii(odd.encode("utf-8", "replace").decode())
        raise UserError(f"{path} is not UTF-8: {shown}. Convert it: iconv -f latin1 -t utf-8 {path.name} > new.csv")


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _refuse_no_classes(path: Path, column: str, labels: list[str]) -> None:
    """Raise UserError for labels that are neither class names nor whole numbers: each value would become a class."""
    several = next((label for label in labels if any(mark in label for mark in ";|\t\n")), None)
    if several is not None:
        raise UserError(
            f"{path}: the column {column} holds {several!r}, several labels of one image or two columns in one. Give "
            "one class per line; other tasks than classification are not supported."
        )
    numbers = [_number(label) for label in {*labels}]
    if None not in numbers and not all(number.is_integer() for number in numbers if math.isfinite(number)):
        odd = next(label for label in labels if not float(label).is_integer())
        raise UserError(
            f"{path}: the column {column} holds {odd}, a number, not a class; other tasks than classification are not "
            "supported."
        )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None

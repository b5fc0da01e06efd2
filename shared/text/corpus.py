# SPDX-License-Identifier: Apache-2.0
"""Read documents: those that Python itself carries, or a folder's .txt, .jsonl and .parquet files."""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

PARTS = {"train": "train", "val": "val", "validation": "val", "test": "val"}  # folders
COLUMNS = (("messages",), ("prompt", "completion"), ("text",))
NAMED_AT_MOST = 3  # documents that were left out


class Document(NamedTuple):
    """A text, or a prompt and its completion, or the messages of a conversation: {"role": ..., "content": ...}."""

    name: str
    text: str = ""
    prompt: str = ""
    messages: tuple[dict, ...] = ()


class Corpus(NamedTuple):
    """One part of the data."""

    documents: list[Document]
    fingerprint: str  # SHA-256 of names and texts
    notes: list[str]  # what was left out


def open_corpus(data: str, val_fraction: float) -> tuple[Corpus, Corpus]:
    """Return the training and the held-out documents, sorted by name.

    Raises UserError where the data is missing or has no usable document, or a part would be empty.
    """
    left_out: dict[str, list[str]] = {}
    found = list(NAMED[data]() if data in NAMED else _read_folder(Path(data), left_out))
    documents = sorted(each for each in found if _is_usable(each, left_out))
    has_parts = data not in NAMED and {"train", "val"} <= {_part(each) for each in documents}
    part = _part if has_parts else lambda each: "val" if _share(each.name) < val_fraction else "train"
    if beside := [each.name for each in documents if not part(each)]:
        left_out["other folders'"] = beside
    notes = [_note(reason, names) for reason, names in left_out.items()]
    parts = [[each for each in documents if part(each) == name] for name in ("train", "val")]
    for name, those in zip(("training", "held-out"), parts, strict=True):
        if not those:
            why = f"{len(documents)} usable documents" + "".join(f"; {note}" for note in notes)
            raise UserError(f"--data {data} has no {name} document ({why}). Change --val_fraction, or give more.")
    return Corpus(parts[0], _fingerprint(parts[0]), notes), Corpus(parts[1], _fingerprint(parts[1]), [])


def _is_usable(document: Document, left_out: dict[str, list[str]]) -> bool:
    if any(text.strip() for text in (document.text, *(each["content"] for each in document.messages))):
        return True
    left_out.setdefault("empty", []).append(document.name)
    return False


def _note(reason: str, names: list[str]) -> str:
    more = ", ..." * (len(names) > NAMED_AT_MOST)
    return f"left out {len(names):,} {reason} documents: {', '.join(sorted(names)[:NAMED_AT_MOST])}{more}"


def _part(document: Document) -> str:
    return PARTS.get(document.name.split("/")[0], "") if "/" in document.name else ""


def _share(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") / 2**64


def _fingerprint(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps(document, sort_keys=True).encode())
    return digest.hexdigest()


# What Python carries


def _python() -> Iterator[Document]:
    """Yield the topics of Python's help, some 80 documents, which differ by its version. They quote each other: each
    paragraph stays where it is first, or most of the held-out text would be learned."""
    from pydoc_data.topics import topics

    met = set()
    for name, text in sorted(topics.items()):
        words = {paragraph: " ".join(paragraph.split()) for paragraph in text.split("\n\n")}
        if new := [paragraph for paragraph, key in words.items() if key and key not in met]:
            yield Document(name, "\n\n".join(new))
        met.update(words.values())


def _docstrings() -> Iterator[Document]:
    """Yield signatures of the standard library, each with the first paragraph of its description."""
    described = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and (said := ast.get_docstring(node)):
                signature = f"def {node.name}({ast.unparse(node.args)}):\n"
                if signature not in described:
                    described.add(signature)
                    name = f"{path.stem}.{node.name} {node.lineno}"
                    yield Document(name, " ".join(said.split("\n\n")[0].split()), signature)


NAMED: dict[str, Callable[[], Iterator[Document]]] = {"python": _python, "docstrings": _docstrings}


# A folder


def _read_folder(folder: Path, left_out: dict[str, list[str]]) -> Iterator[Document]:
    if not folder.is_dir():
        names = ", ".join(NAMED)
        raise UserError(f"--data {folder} does not exist, or is no folder. Give a folder of text files, or {names}.")
    readers = {".txt": _read_text, ".jsonl": _read_lines, ".parquet": _read_table}
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in readers]
    if not files:
        raise UserError(f"--data {folder} holds no {', '.join(readers)} file. Give a folder that does.")
    for path in files:
        name = path.relative_to(folder).as_posix()
        yield from readers[path.suffix.lower()](path, name, left_out)


def _read_text(path: Path, name: str, left_out: dict) -> Iterator[Document]:
    try:
        yield Document(name, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Convert it: iconv.") from error


def _read_lines(path: Path, name: str, left_out: dict) -> Iterator[Document]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            values = json.loads(line) if line.strip() else None
        except ValueError:  # JSON's and UTF-8's errors
            left_out.setdefault("invalid JSON", []).append(f"{name}:{number}")
            continue
        if values is not None:
            yield _document(f"{name}:{number}", values, path)


def _read_table(path: Path, name: str, left_out: dict) -> Iterator[Document]:
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(path).iter_batches()
    except ValueError as error:  # pyarrow's
        raise UserError(f"{path} is damaged, or no parquet file: {error} Write it again.") from error
    for number, values in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
        yield _document(f"{name}:{number}", values, path)


def _document(name: str, values: dict, path: Path) -> Document:
    """Return a row's document. Raises UserError where it has none of the known columns."""
    columns = next((each for each in COLUMNS if isinstance(values, dict) and {*each} <= values.keys()), None)
    row = f"{path}: row {name}"
    if columns is None:
        there = ", ".join(values) if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{row} has {there}. Give text, or prompt and completion, or messages.")
    messages = tuple(values["messages"] or ()) if columns[0] == "messages" else ()
    said = [each.get("content") if isinstance(each, dict) and "role" in each else None for each in messages]
    texts = said or [values[column] or "" for column in columns]
    if not all(isinstance(each, str) for each in texts):
        why = f"{row} has something else than text as its {columns[-1]}"
        raise UserError(f"{why}. Write strings; a message has a role and a content.")
    if messages:
        return Document(name, messages=messages)
    return Document(name, texts[-1], texts[0] if len(columns) == 2 else "")

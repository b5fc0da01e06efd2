# SPDX-License-Identifier: Apache-2.0
"""The cheap part of the style guide within programs: how docstrings open, and one word for each thing."""

import ast
import io
import tokenize
from pathlib import Path

import pytest
from conftest import BANNED, ROOT

FOLDERS = ("shared", "recipes", "tools", "benchmarks", "tests")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FILES.remove(ROOT / "tests/conftest.py")  # which lists the words
OPENINGS = ("Of", "What", "That", "By")  # a docstring opens with a verb, or with the name of what a class is


def docstrings(text: str) -> list[str]:
    kinds = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return [found for node in nodes if (found := ast.get_docstring(node))]


def words(path: Path) -> str:
    """Return the docstrings, comments and strings of a file."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    kinds = tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)
    return "\n".join(token.string for token in tokens if token.type in kinds).replace('b"torn"', "")  # in a hash


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_open_with_a_verb_and_each_thing_has_one_word(path):
    assert [text for text in docstrings(path.read_text()) if text.split()[0] in OPENINGS] == []
    assert BANNED.findall(words(path)) == []


def test_scripts_and_configurations_have_the_same_words():
    patterns = ("Makefile", "pyproject.toml", "slurm/*.*", "accelerate_configs/*.yaml", "shared/**/*.c", "tests/*.c")
    files = [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]
    assert {str(path): found for path in files if (found := BANNED.findall(path.read_text()))} == {}

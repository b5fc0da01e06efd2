# SPDX-License-Identifier: Apache-2.0
"""Import a recipe's file, for the tools that use what it defines."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import shared
from shared.errors import UserError


def load_recipe(path: Path) -> ModuleType:
    """Import the recipe as a module. Its folder comes first, as in `python RECIPE`: it may have a `shared` of its
    own."""
    sys.path.insert(0, str(path.parent))
    own = path.parent / "shared"
    if own.is_dir() and own.resolve() != Path(shared.__file__).resolve().parent:
        for name in [name for name in sys.modules if name.split(".")[0] == "shared"]:
            del sys.modules[name]  # this file keeps what it has imported
    spec = importlib.util.spec_from_file_location(path.stem, path)
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = recipe  # a dataclass looks its module up
    spec.loader.exec_module(recipe)
    return recipe


@contextlib.contextmanager
def as_user_errors(recipe: ModuleType) -> Iterator[None]:
    """Turn a UserError of the recipe's own `shared` into one of ours."""
    theirs = sys.modules[recipe.parse.__module__].UserError
    try:
        yield
    except theirs as error:
        raise UserError(str(error)) from error

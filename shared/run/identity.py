# SPDX-License-Identifier: Apache-2.0
"""Collect everything that decides a run's loss curve, and refuse to resume where it has changed."""

import ast
import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import torch

from ..checkpoint.origin import differing, hash_of
from ..config import SIZES, RunConfig
from ..contracts import Description
from ..errors import UserError
from ..launch import mixed_precision, program


def identity(recipe: str, precision: str, run_config: RunConfig, data_config, config) -> dict:
    """Return everything but the topology that decides the loss curve: a resume must find it unchanged."""
    own = {name: value for name, value in dataclasses.asdict(config).items() if name not in SIZES}
    return {"recipe": recipe, "mixed_precision": precision} | run_config.identity() | data_config.identity() | own


def of_run(run_config: RunConfig, data_config, config, train: Description, held_out: Description) -> tuple[dict, Path]:
    """Return a run's identity and its folder: --output_dir, or a name with the configuration's hash."""
    values = identity(program()[0].stem, mixed_precision(), run_config, data_config, config)
    folder = Path(run_config.output_dir or f"runs/{values['recipe']}-{identity_hash(values)}")
    return values | identity_of_data(train, held_out) | identity_of_program(), folder


def identity_of_data(train: Description, held_out: Description) -> dict:
    """Return the data's part, which is not in the folder's name: the same command on changed data is refused."""
    counts = {f"training_{train.unit}": train.samples, f"held_out_{train.unit}": held_out.samples}
    return counts | train.identity | {"data_fingerprint": f"{train.fingerprint} {held_out.fingerprint}"}


def identity_of_program() -> dict:
    """Return the recipe's source, and the precision where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 turns tf32 on."""
    precision = torch.get_float32_matmul_precision()
    return ({} if precision == "highest" else {"float32_matmul_precision": precision}) | {"source": recipe_source()}


def refuse_other_values(mine: dict, former: list[dict], override: str, what: Path) -> None:
    """Raise UserError where this run's identity differs from a previous start's, except in the values that
    --resume_override names.

    former: the identities of the folder and of the checkpoint. what: the path to name in the error.
    """
    known = {name: [values.get(name) for values in former] for name in {*mine, *former[0], *former[1]}}
    # The parts of another recipe differ anyway.
    same = [values.get("source", {}) for values in former if values.get("recipe") == mine["recipe"]]
    parts = sorted({part for source in same for part in differing(mine["source"], source)})
    values = {name for name, those in known.items() if {*map(str, those)} != {str(mine.get(name))}}
    changed = (values - {"source"}) | ({"source"} if parts else set())
    allowed = set(override.replace(",", " ").split())
    if allowed - known.keys():
        name, names = min(allowed - known.keys()), ", ".join(sorted(known))
        raise UserError(f"--resume_override {name} is not a value of the run's identity. Known: {names}.")
    if changed - allowed:
        lines = {name: _difference(name, known[name], mine.get(name)) for name in changed - {"source"}}
        lines["source"] = f"{', '.join(parts)} of the recipe {'was' if len(parts) == 1 else 'were'} edited"
        changes = ", ".join(lines[name] for name in sorted(changed - allowed))
        raise UserError(
            f"{what} belongs to another run: {changes}. Give the values it had, or another --output_dir; or "
            f"--resume_override {','.join(sorted(changed))} to resume with the new values."
        )


def _difference(name: str, former: list, value) -> str:
    """Return a text such as `seed was 0, is 1`; for lists, of the first place where they differ."""
    was = next(each for each in former if str(each) != str(value))
    if isinstance(was, list) and isinstance(value, list):
        pairs = enumerate(itertools.zip_longest(was, value))
        place, (was, value) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        name = f"{name}[{place}]"
    return f"{name} was {was}, is {value}"


def identity_hash(values: dict) -> str:
    """Return 8 hex digits, the same for the same values on any machine."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


# The recipe's source


def recipe_source() -> dict[str, str]:
    """Return name -> hash of each function, class and constant of the recipe, with the modules of the imports it uses.

    Comments, docstrings and layout do not count, nor do the fields of Config: their values are in the identity. Empty
    where the program has no file.
    """
    tree = ast.parse(program()[1])
    parts, origins = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{'.' * getattr(node, 'level', 0)}{getattr(node, 'module', '')}"
            origins |= {alias.asname or alias.name.split(".")[0]: f"{origin} {alias.name}" for alias in node.names}
        elif isinstance(getattr(node, "body", None), list):
            is_config = getattr(node, "name", "") == "Config"
            node.body = [each for each in node.body if not _is_text(each) and not (is_config and _is_field(each))]
    for node in (node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)):
        used = sorted({each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & origins.keys())
        parts.setdefault(_name(node), []).append("\n".join([ast.unparse(node), *(origins[name] for name in used)]))
    return {name: hash_of("\n".join(texts).encode()) for name, texts in sorted(parts.items())}


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign)


def _name(node: ast.stmt) -> str:
    """Return the name that a statement of a module defines."""
    made = [getattr(node, "name", getattr(node, "target", None))]
    names = made if made[0] else getattr(node, "targets", [])
    return ", ".join(name if isinstance(name, str) else ast.unparse(name) for name in names) or "the code at the end"

# SPDX-License-Identifier: Apache-2.0
"""Name everything that decides a run's loss curve, and where the run was made."""

import ast
import contextlib
import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch

from ..checkpoint.origin import differing, hash_of
from ..config import SIZES, RunConfig
from ..contracts import Description
from ..errors import UserError
from ..launch import mixed_precision, program


def identity(recipe: str, precision: str, run_config: RunConfig, data_config, config) -> dict:
    """Return everything that decides the loss curve, the topology left out: a resume must find it unchanged."""
    own = {name: value for name, value in dataclasses.asdict(config).items() if name not in SIZES}
    return {"recipe": recipe, "mixed_precision": precision} | run_config.identity() | data_config.identity() | own


def of_run(run_config: RunConfig, data_config, config, train: Description, held_out: Description) -> tuple[dict, Path]:
    """Return a run's identity, and its folder, which --output_dir names or the configuration's hash."""
    values = identity(program()[0].stem, mixed_precision(), run_config, data_config, config)
    folder = Path(run_config.output_dir or f"runs/{values['recipe']}-{identity_hash(values)}")
    return values | identity_of_data(train, held_out) | identity_of_program(), folder


def identity_of_data(train: Description, held_out: Description) -> dict:
    """Return what is not in the folder's name: the same command on data that has changed is to be told so."""
    counts = {f"training_{train.unit}": train.samples, f"held_out_{train.unit}": held_out.samples}
    return counts | train.identity | {"data_fingerprint": f"{train.fingerprint} {held_out.fingerprint}"}


def identity_of_program() -> dict:
    """Return the recipe's source, and tf32 where it is on, by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1."""
    precision = torch.get_float32_matmul_precision()
    return ({} if precision == "highest" else {"float32_matmul_precision": precision}) | {"source": recipe_source()}


def refuse_other_values(mine: dict, former: list[dict], override: str, what: Path) -> None:
    """Raise UserError where this run's identity differs from a former start's, but in what --resume_override names.

    former: identities of the folder and of the checkpoint. what: the one to name.
    """
    known = {name: [values.get(name) for values in former] for name in {*mine, *former[0], *former[1]}}
    # Another recipe's parts differ as it is.
    same = [values.get("source", {}) for values in former if values.get("recipe") == mine["recipe"]]
    parts = sorted({part for source in same for part in differing(mine["source"], source)})
    values = {name for name, those in known.items() if {*map(str, those)} != {str(mine.get(name))}}
    changed = (values - {"source"}) | ({"source"} if parts else set())
    allowed = set(override.replace(",", " ").split())
    if allowed - known.keys():
        raise UserError(f"--resume_override {min(allowed - known.keys())} is no value that decides a run.")
    if changed - allowed:
        lines = {name: _difference(name, known[name], mine.get(name)) for name in changed - {"source"}}
        lines["source"] = f"{', '.join(parts)} of the recipe {'was' if len(parts) == 1 else 'were'} edited"
        changes = ", ".join(lines[name] for name in sorted(changed - allowed))
        raise UserError(
            f"{what} is of another run: {changes}. Give what it had, or another --output_dir; or --resume_override "
            f"{','.join(sorted(changed))} to resume with what is new."
        )


def _difference(name: str, former: list, value) -> str:
    """Such as `seed was 0, is 1`; of lists, the first place where they differ."""
    was = next(each for each in former if str(each) != str(value))
    if isinstance(was, list) and isinstance(value, list):
        pairs = enumerate(itertools.zip_longest(was, value))
        place, (was, value) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        name = f"{name}[{place}]"
    return f"{name} was {was}, is {value}"


def identity_hash(values: dict) -> str:
    """8 hex digits, the same wherever the same values are given."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


# What config.json says of where a run was made


def git_commit() -> str | None:
    """Return the commit of the recipe's repository, None where there is none."""
    command = ["git", "-C", str(Path(sys.argv[0]).resolve().parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None


def recipe_source() -> dict[str, str]:
    """Name -> hash of each function, class and constant of the recipe, with where it imports from what it uses.

    Comments, docstrings and layout do not count, nor do the fields of Config: their values are the run's identity.
    Nothing where there is no file.
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
    """Return the name of what a statement of a module makes."""
    made = [getattr(node, "name", getattr(node, "target", None))]
    names = made if made[0] else getattr(node, "targets", [])
    return ", ".join(name if isinstance(name, str) else ast.unparse(name) for name in names) or "the code at the end"

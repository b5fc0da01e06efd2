# SPDX-License-Identifier: Apache-2.0
"""Name everything that decides a run's loss curve, and where the run was made."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..config import SIZES, RunConfig
from ..launch import program

IDENTITY = ("data", "val_fraction", "shuffle_block", "seed")
COLUMNS = ("image_column", "label_column")  # they decide where they are given, alone


def identity(recipe: str, precision: str, run_config: RunConfig, config) -> dict:
    """Everything that decides the loss curve, the topology left out: a resume must find it unchanged."""
    data = run_config.data if run_config.data == "digits" else str(Path(run_config.data).resolve())
    chosen = {name: getattr(run_config, name) for name in IDENTITY} | {"data": data}
    chosen |= {name: getattr(run_config, name) for name in COLUMNS if getattr(run_config, name)}
    values = {"recipe": recipe, "mixed_precision": precision} | chosen | dataclasses.asdict(config)
    return {name: value for name, value in values.items() if name not in SIZES}


def identity_hash(values: dict) -> str:
    """8 hex digits, the same wherever the same values are given."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


PACKAGES = ("torch", "torchvision", "accelerate", "transformers", "numpy", "pillow")
# What says how a run was launched. Of Slurm's variables, which may hold secrets (SLURM_JWT), only what is named here:
# the job, and what it was given.
LAUNCHER_VARIABLES = re.compile(
    "(ACCELERATE|FSDP|PARALLELISM|NCCL|GLOO|CUDA_VISIBLE)_.*|OMP_NUM_THREADS|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
    "|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|NVIDIA_TF32_OVERRIDE"
    "|SLURM_(JOB_(ID|NAME|NUM_NODES|NODELIST|PARTITION|QOS|ACCOUNT|START_TIME|END_TIME)|ARRAY_(JOB|TASK)_ID|CLUSTER_NAME"
    "|SUBMIT_(DIR|HOST)|RESTART_COUNT|NODEID|PROCID|LOCALID|NTASKS|CPUS_(PER_TASK|ON_NODE)|GPUS_ON_NODE)"
)
SECRETS = re.compile("JWT|TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


# What config.json says of where a run was made


def versions() -> dict[str, str | None]:
    return {"python": sys.version.split()[0]} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def git_commit() -> str | None:
    """Of the recipe."""
    command = ["git", "-C", str(Path(sys.argv[0]).resolve().parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None


@functools.cache
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
    return {name: _hash("\n".join(texts).encode()) for name, texts in sorted(parts.items())}


def shared_source() -> dict[str, str]:
    """File of `shared` -> hash."""
    folder = Path(__file__).parents[1]
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c"))
    return {str(path.relative_to(folder)): _hash(path.read_bytes()) for path in files}


def differing(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Names with another hash, or that one side lacks; none where one side has nothing to compare."""
    names = {*ours, *theirs} if ours and theirs else ()
    return sorted(name for name in names if ours.get(name) != theirs.get(name))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign)


def _name(node: ast.stmt) -> str:
    """Of what a statement of a module makes."""
    made = [getattr(node, "name", getattr(node, "target", None))]
    names = made if made[0] else getattr(node, "targets", [])
    return ", ".join(name if isinstance(name, str) else ast.unparse(name) for name in names) or "the code at the end"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def launcher_variables() -> dict[str, str]:
    """Return what the environment says of the launch, without names that promise a secret."""
    names = (name for name in sorted(os.environ) if LAUNCHER_VARIABLES.fullmatch(name) and not SECRETS.search(name))
    return {name: os.environ[name] for name in names}

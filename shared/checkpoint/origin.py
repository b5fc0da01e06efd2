# SPDX-License-Identifier: Apache-2.0
"""Record in each checkpoint what wrote it, and compare at a resume."""

import contextlib
import hashlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from accelerate import Accelerator

from ..config import SIZES
from ..launch import program, strategy
from .retention import read_manifest

PACKAGES = ("torch", "torchvision", "accelerate", "transformers", "numpy", "pillow")


def origin(accelerator: Accelerator, config, begun_from: str | None) -> dict:
    """Return what every checkpoint's manifest records about its origin."""
    return {
        "recipe": program()[0].stem,
        "strategy": strategy(),
        "world_size": accelerator.num_processes,
        "versions": versions(),
        "shared": shared_source(),
        "begun_from": begun_from,
        **{name: getattr(config, name) for name in SIZES if hasattr(config, name)},
    }


def warn_of_changes(checkpoint: Path) -> str:
    """Return a warning where `shared` has changed since a checkpoint was written, or an empty string."""
    names = differing(shared_source(), read_manifest(checkpoint).get("shared", {}))
    return f"warning: shared/ has changed since the checkpoint was written: {', '.join(names)}" if names else ""


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return Python's version and those of the packages, None for one that is not installed."""
    return {"python": sys.version.split()[0]} | {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def source() -> dict[str, str | bool | None]:
    """Return the source that runs: the commit of the program's repository and whether its files were changed since
    (None without a repository); hashes of the program's file and of `shared`, which identify a copy of them too."""
    folder = program()[0].resolve().parent
    commit = _git(folder, "rev-parse", "HEAD") or None
    # The results of an earlier benchmark are not source.
    paths = "--", ":(top)", ":(top,exclude)benchmarks/results"
    dirty = bool(_git(folder, "status", "--porcelain", "--untracked-files=no", *paths)) if commit else None
    shared = hash_of("".join(shared_source().values()).encode())
    return {"commit": commit, "dirty": dirty, "program": hash_of(program()[1]), "shared": shared}


def _git(folder: Path, *words: str) -> str:
    with contextlib.suppress(OSError):
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True).stdout.strip()
    return ""


def shared_source() -> dict[str, str]:
    """Return file of `shared` -> hash."""
    folder = Path(__file__).parents[1]
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c"))
    return {str(path.relative_to(folder)): hash_of(path.read_bytes()) for path in files}


def differing(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Return the names whose hashes differ or that one side is missing; none where one side is empty."""
    names = {*ours, *theirs} if ours and theirs else ()
    return sorted(name for name in names if ours.get(name) != theirs.get(name))


def hash_of(data: bytes) -> str:
    """Return the first 8 hex digits of the SHA-256."""
    return hashlib.sha256(data).hexdigest()[:8]

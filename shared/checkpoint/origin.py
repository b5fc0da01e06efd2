# SPDX-License-Identifier: Apache-2.0
"""Say in each checkpoint by what it was written, and compare at a resume."""

import contextlib
import hashlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from accelerate import Accelerator

from ..config import SIZES
from ..launch import program, strategy
from .retention import read_manifest

PACKAGES = ("torch", "torchvision", "accelerate", "transformers", "numpy", "pillow")


def origin(accelerator: Accelerator, config, begun_from: str | None) -> dict:
    """Return what every checkpoint's manifest says of where it came from."""
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
    """Return a line where `shared` is not what wrote a checkpoint, or an empty string."""
    names = differing(shared_source(), read_manifest(checkpoint).get("shared", {}))
    return f"warning: not as when it was written, in shared/: {', '.join(names)}" if names else ""


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return Python's version and those of the packages, None for one that is not installed."""
    return {"python": sys.version.split()[0]} | {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def shared_source() -> dict[str, str]:
    """File of `shared` -> hash."""
    folder = Path(__file__).parents[1]
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c"))
    return {str(path.relative_to(folder)): hash_of(path.read_bytes()) for path in files}


def differing(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Names with another hash, or that one side lacks; none where one side has nothing to compare."""
    names = {*ours, *theirs} if ours and theirs else ()
    return sorted(name for name in names if ours.get(name) != theirs.get(name))


def hash_of(data: bytes) -> str:
    """8 hex digits."""
    return hashlib.sha256(data).hexdigest()[:8]

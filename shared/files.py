# SPDX-License-Identifier: Apache-2.0
"""Write files and folders that are complete or absent, one process at a time."""

import contextlib
import glob
import json
import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError, say

PATIENCE = 3 * 3600  # seconds to wait for another process that makes the same file


def take_lock(path: Path, what: str, seconds: float) -> FileLock:
    """Lock a file for as long as the result is kept. Where another process holds it, say `what` and wait.

    Raises Timeout after these seconds, and OSError where the file cannot be made.
    """
    held = FileLock(path)
    with contextlib.suppress(Timeout):
        held.acquire(timeout=0)
        return held
    say(f"{what}; waiting for it to end, at most {seconds:.0f} s", sys.stderr)
    held.acquire(timeout=seconds)
    return held


def make_once(path: Path, write: Callable[[Path], object], is_there: Callable[[Path], bool] = Path.exists) -> Path:
    """Return `path`, a file or folder of a cache. Where it is missing, let `write` make it under a temporary name, or
    wait for another process that is making it.

    Raises UserError where it cannot be written.
    """
    if is_there(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with take_lock(path.with_name(f"{path.name}.lock"), f"another start makes {path}", PATIENCE):
            if not is_there(path):
                remove_partials(path.parent, path.name)
                with complete(path) as partial:
                    write(partial)
    except Timeout:
        raise UserError(f"another start has made {path} for {PATIENCE} s. End it, and start again.") from None
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}. Let SCRATCH name a folder with room.") from error
    return path


@contextlib.contextmanager
def complete(path: Path) -> Iterator[Path]:
    """Yield a temporary name for a file or folder. Rename it to `path` when the block ends; remove it when the block
    fails."""
    partial = partial_of(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise


def partial_of(path: Path) -> Path:
    """Return a name beside `path` that no other process uses, on any host."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def remove_partials(folder: Path, name: str = "") -> None:
    """Remove the partial files of `name`, or all, that killed processes left below a folder; hold the lock on it."""
    for path in list(folder.rglob(f".{glob.escape(name)}*.partial")):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, values: dict) -> None:
    """Replace the file atomically; where that fails, raise OSError and keep the old one."""
    replace_text(path, json.dumps(values, indent=1) + "\n")


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replace a file's text so that a reader finds the old or the new one whole, also after a power failure."""
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    to_disk(beside)
    os.replace(beside, path)


def raise_open_files(wanted: int) -> int:
    """Raise this process's limit on open files to `wanted`, or as near as the system allows; return that number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed

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

PATIENCE = 3 * 3600  # seconds for another start to end what both want


def take_lock(path: Path, what: str, seconds: float) -> FileLock:
    """Lock a file, for as long as the result is held; `what` is in use where another process has it.

    Says so and waits; raises Timeout after these seconds, and OSError where the file cannot be made.
    """
    held = FileLock(path)
    with contextlib.suppress(Timeout):
        held.acquire(timeout=0)
        return held
    say(f"{what}; waiting for it to end, at most {seconds:.0f} s", sys.stderr)
    held.acquire(timeout=seconds)
    return held


def make_once(path: Path, write: Callable[[Path], object], is_there: Callable[[Path], bool] = Path.exists) -> Path:
    """Return `path`, a file or folder of a cache, which `write` makes under the name that it is given, unless it is
    there, as it should be, or another start makes it: that one is waited for.

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
    """Give the name under which the block writes a file or folder, which gets its own when it is complete; where it
    does not come to that, nothing stays."""
    partial = partial_of(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise


def partial_of(path: Path) -> Path:
    """Return a name beside `path` that no other process, of any host, writes."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def remove_partials(folder: Path, name: str = "") -> None:
    """Remove what killed processes left in a folder of the file `name`, or of any: call it under the lock of what
    they wrote."""
    for path in list(folder.rglob(f".{glob.escape(name)}*.partial")):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """Nothing where it is absent, or was cut off by a loss of power: each start writes it again."""
    return parse_object(path.read_text(errors="replace")) if path.exists() else {}


def write_json(path: Path, values: dict) -> None:
    """Raises OSError, and leaves the former file whole."""
    replace_text(path, json.dumps(values, indent=1) + "\n")


def parse_object(text: str) -> dict:
    """Return the object in a line; nothing where the line is partial."""
    with contextlib.suppress(json.JSONDecodeError):
        values = json.loads(text)
        return values if isinstance(values, dict) else {}
    return {}


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """A reader finds the former text or this one, whole, also after a loss of power."""
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    to_disk(beside)
    os.replace(beside, path)


def raise_open_files(wanted: int) -> int:
    """Let this process open `wanted` files and sockets, or as many as the system allows; return how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed

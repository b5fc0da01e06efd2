# SPDX-License-Identifier: Apache-2.0
"""Find a run's checkpoints: which are whole, which one to resume, which to keep."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import UserError

MANIFEST, STATE = "manifest.json", "state.json"
QUARANTINED = "quarantined-"  # the prefix of quarantined checkpoints: see quarantine


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint: rename it first, so that no kill leaves a part of it under its name."""
    beside = folder.with_name(folder.name.replace("step-", "tmp-"))
    shutil.rmtree(beside, ignore_errors=True)
    with contextlib.suppress(OSError):  # what cannot be removed does no harm
        os.rename(folder, beside)
    shutil.rmtree(beside, ignore_errors=True)


def checksum(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def damage(folder: Path, contents: bool = True) -> str | None:
    """Return why a checkpoint cannot be used; None where it is whole. contents: compare checksums too, not only
    sizes."""
    try:
        files = read_manifest(folder)["files"]
        there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        strangers = there - {*files, MANIFEST}
        if strangers:
            return f"{min(strangers)} is not in its {MANIFEST}"
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda name: _file_damage(folder / name, files[name], contents), files)
            return next(filter(None, found), None)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"


def _file_damage(path: Path, expected: dict, contents: bool) -> str | None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path.name} has {size} bytes instead of {expected['bytes']}"
    if contents and checksum(path)["sha256"] != expected["sha256"]:
        return f"{path.name} is not what was written: its SHA-256 differs"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Return a folder's checkpoints, oldest first; only a complete one has a name step-*."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def score(manifest: dict) -> float:
    """Return a checkpoint's metric, signed so that more is better; -inf where it was not evaluated."""
    value = manifest.get(manifest.get("metric", "accuracy"))
    if value is None:
        return -math.inf
    return value if manifest.get("higher_is_better", True) else -value


def superfluous(folder: Path, keep: int) -> list[Path]:
    """Return the whole checkpoints to remove: all but the newest `keep` and the best by the run's metric, the
    newest of equals. Damaged ones do not count and are not removed."""
    whole = [path for path in checkpoints(folder) if damage(path, contents=False) is None]
    best = max(whole, key=lambda path: (score(read_manifest(path)), path), default=None)
    return [path for path in whole[:-keep] if path != best]


def checkpoint_to_resume(folder: Path, resume_from_checkpoint: str) -> tuple[Path | None, list[str]]:
    """Return the checkpoint that `--resume_from_checkpoint` means, None for a fresh start, and a line per damaged one
    skipped.

    A path begins the folder's run from that checkpoint, or takes the run back to one of its own. It does so once: a
    job that is started again with the same command resumes from what was written since.

    Raises UserError for a path that is not a whole checkpoint, for `never` where the folder holds one, and where all
    are damaged.
    """
    there = checkpoints(folder)
    if resume_from_checkpoint == "never" and there:
        raise UserError(f"{folder.parent} holds a run. Remove that folder, or give another --output_dir.")
    newest, passed = _newest_whole(there)
    if resume_from_checkpoint not in ("auto", "never"):
        path = Path(resume_from_checkpoint).resolve()
        if newest is None or not _follows(newest, path):
            return _named_checkpoint(path, resume_from_checkpoint), []
    elif newest is None and passed:
        raise UserError(f"{passed[0]}, and no other is whole. Remove {folder.parent} to start again.")
    return newest, passed


def _newest_whole(there: list[Path]) -> tuple[Path | None, list[str]]:
    passed = []
    for path in reversed(there):
        reason = damage(path)
        if reason is None:
            return path, passed
        passed.append(f"{path} is damaged: {reason}")
    return None, passed


def _follows(newest: Path, path: Path) -> bool:
    """Return whether to resume from a folder's newest checkpoint rather than from the path that was given."""
    elsewhere = path.parent != newest.parent.resolve()
    return (
        path.name.startswith("step-")
        and newest.name > path.name
        and (elsewhere or read_manifest(newest).get("begun_from") == str(path))
    )


def _named_checkpoint(path: Path, given: str) -> Path:
    reason = damage(path) if path.name.startswith("step-") else "a checkpoint is a folder step-XXXXXXXX"
    if reason:
        raise UserError(
            f"--resume_from_checkpoint {given} is not a complete checkpoint: {reason}. "
            "Give auto, never, or a folder checkpoints/step-XXXXXXXX of a run."
        )
    return path


def quarantine(folder: Path, checkpoint: Path) -> None:
    """Quarantine the checkpoints past the one that is resumed, damaged or not, by renaming them: they are no longer
    part of the run, and would block the saves of their steps. The user may inspect and remove them."""
    for path in checkpoints(folder):
        if path.name > checkpoint.name:
            beside = path.with_name(path.name.replace("step-", QUARANTINED))
            shutil.rmtree(beside, ignore_errors=True)
            os.rename(path, beside)

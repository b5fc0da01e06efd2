# SPDX-License-Identifier: Apache-2.0
"""The files of a run's folder, of which one process writes and which may be cut off at any byte."""

import contextlib
import errno
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from ..checkpoint import checkpoint_to_resume, checkpoints, put_aside, read_manifest
from ..config import RunConfig
from ..errors import UserError, job_folder, say, tell_job
from ..files import parse_object, read_json, replace_text, take_lock, to_disk
from .identity import refuse_other_values

LOCK_SECONDS = 60  # a requeued job may start while the former one still ends


class Claim(NamedTuple):
    """The findings of a start in the folder that it holds."""

    checkpoint: Path | None  # to resume from; None for a fresh start
    former: dict  # the former start's summary.json
    begun_from: str | None  # the path that --resume_from_checkpoint once gave

    def finished(self, last_step: int) -> bool:
        """Return whether a former start has come as far as this one would."""
        return self.former.get("status") == "finished" and self.former["steps"] >= last_step


class Folder:
    """A run's folder, which one process of one run at a time writes. Every process makes one; rank 0 claims it."""

    def __init__(self, path: Path):
        self.path, self.checkpoints = path, path / "checkpoints"
        self.lock: FileLock | None = None

    def claim(self, run_config: RunConfig, identity: dict) -> Claim:
        """Lock the folder and find what to resume.

        Raises UserError where the folder is in use, or is of another run, before anything in it has changed.
        """
        wait_for_preflight()
        with self.writing():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.path)
        say(str(self.path))
        tell_job("run_folder", str(self.path.resolve()))
        checkpoint, damaged = checkpoint_to_resume(self.checkpoints, run_config.resume_from_checkpoint)
        for line in damaged:
            say(f"{line}; the one before it is taken", sys.stderr)
        folders = read_json(self.path / "config.json").get("identity", identity)
        former = [folders, read_manifest(checkpoint)["identity"] if checkpoint else folders]
        refuse_other_values(identity, former, run_config.resume_override, checkpoint or self.path)
        for unfinished in self.checkpoints.glob("tmp-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        given = str(Path(run_config.resume_from_checkpoint).resolve())
        begun = read_manifest(checkpoint).get("begun_from") if checkpoint and str(checkpoint) != given else given
        return Claim(checkpoint, read_json(self.path / "summary.json"), begun if checkpoint else None)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError within it into a UserError: for the start, when that costs nothing."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}. Give another --output_dir.") from error

    def go_back(self, checkpoint: Path, metrics: "MetricsFile") -> list[dict]:
        """Rename the checkpoints past this one, drop the lines past it, and return the others."""
        with self.writing():
            put_aside(self.checkpoints, checkpoint)
            return metrics.drop_after(read_manifest(checkpoint)["step"])

    @property
    def newest_checkpoint(self) -> Path | None:
        return next(reversed(checkpoints(self.checkpoints)), None)


def wait_for_preflight() -> None:
    """Wait for slurm/launch.sh, which makes it meanwhile for plain sbatch; raises UserError where it refuses."""
    folder = job_folder()
    while folder and (folder / "unchecked").exists():
        time.sleep(0.1)
    if folder and (folder / "refused").exists():
        raise UserError("the preflight refuses this job. The end of the log says why.")


def lock(folder: Path) -> FileLock:
    """One run per folder; raises UserError where another one stays there."""
    holder = read_json(folder / "summary.json")
    use = f"{folder} is in use by process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    try:
        return take_lock(folder / "lock", use, LOCK_SECONDS)
    except Timeout:
        raise UserError(f"{use}. Stop it, or give another --output_dir.") from None


class MetricsFile:
    """metrics.jsonl: one object a line, each once and in its place, whatever the disk has room for."""

    def __init__(self, path: Path):
        self.path = path
        self.unwritten, self.bytes = [], 0  # lines that wait for room; size without them

    def drop_after(self, step: int) -> list[dict]:
        """Drop what a resume makes again, and a partial last line; return the others."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        kept = [line for line in map(parse_object, lines) if line.get("step", math.inf) <= step]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.bytes = self.path.stat().st_size
        return kept

    def append(self, line: dict) -> None:
        """Raises OSError where there is no room; the line is then written with the next one that finds some."""
        self.unwritten.append(json.dumps(line) + "\n")
        self.write()

    def write(self) -> None:
        data = "".join(self.unwritten).encode()
        with open(self.path, "ab", buffering=0) as file:
            if file.tell() > self.bytes:
                file.truncate(self.bytes)  # a part, of what did not fit
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.bytes, self.unwritten = self.bytes + len(data), []

    def to_disk(self) -> None:
        """Before a checkpoint that lies past these lines; raises OSError."""
        self.write()
        to_disk(self.path)

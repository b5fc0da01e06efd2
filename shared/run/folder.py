# SPDX-License-Identifier: Apache-2.0
"""Lock, read and write the files of a run's folder, each of which a kill may cut off at any byte."""

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

from ..checkpoint import checkpoint_to_resume, checkpoints, quarantine, read_manifest
from ..config import RunConfig
from ..errors import UserError, job_folder, say, tell_job
from ..files import replace_text, take_lock, to_disk
from .identity import refuse_other_values

LOCK_SECONDS = 60  # a requeued job may start while the previous one is still ending


class Claim(NamedTuple):
    """A start's findings in the folder that it has locked."""

    checkpoint: Path | None  # to resume from; None for a fresh start
    former: dict  # the previous start's summary.json
    begun_from: str | None  # the path from which --resume_from_checkpoint began this run

    def finished(self, last_step: int) -> bool:
        """Return whether a previous start has already finished the steps of this one."""
        return self.former.get("status") == "finished" and self.former["steps"] >= last_step


class Folder:
    """A run's folder, written by one process of one run at a time. Every process makes one; rank 0 claims it."""

    def __init__(self, path: Path):
        self.path, self.checkpoints = path, path / "checkpoints"
        self.lock: FileLock | None = None

    def claim(self, run_config: RunConfig, identity: dict) -> Claim:
        """Lock the folder and find what to resume.

        Raises UserError, before anything in the folder changes, where it is in use or belongs to another run.
        """
        wait_for_preflight()
        with self.writing():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.path)
        say(str(self.path))
        tell_job("run_folder", str(self.path.resolve()))
        checkpoint, damaged = checkpoint_to_resume(self.checkpoints, run_config.resume_from_checkpoint)
        for line in damaged:
            say(f"{line}; trying the one before it", sys.stderr)
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
        """Turn an OSError within the block into a UserError: for the start of a run, when nothing is lost yet."""
        try:
            yield
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}. Give another --output_dir.") from error

    def go_back(self, checkpoint: Path, metrics: "MetricsFile") -> list[dict]:
        """Quarantine the checkpoints past this one, drop the lines past it, and return the other lines."""
        with self.writing():
            quarantine(self.checkpoints, checkpoint)
            return metrics.drop_after(read_manifest(checkpoint)["step"])

    @property
    def newest_checkpoint(self) -> Path | None:
        return next(reversed(checkpoints(self.checkpoints)), None)


def wait_for_preflight() -> None:
    """Wait for the preflight that slurm/launch.sh runs beside a plain sbatch job; raises UserError where it
    refuses."""
    folder = job_folder()
    while folder and (folder / "unchecked").exists():
        time.sleep(0.1)
    if folder and (folder / "refused").exists():
        raise UserError("the preflight refuses this job. The end of the log says why.")


def lock(folder: Path) -> FileLock:
    """Lock the folder for one run; raises UserError where another one still holds it after LOCK_SECONDS."""
    holder = read_json(folder / "summary.json")
    use = f"{folder} is in use by process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    try:
        return take_lock(folder / "lock", use, LOCK_SECONDS)
    except Timeout:
        raise UserError(f"{use}. Stop it, or give another --output_dir.") from None


class MetricsFile:
    """The file metrics.jsonl: one object per line, each once and in order, even if the disk was full for a while."""

    def __init__(self, path: Path):
        self.path = path
        self.unwritten, self.bytes = [], 0  # lines that wait for room; size without them

    def drop_after(self, step: int) -> list[dict]:
        """Drop the lines past a step, which a resume writes again, and a partial line; return the others."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        kept = [line for line in map(parse_object, lines) if line.get("step", math.inf) <= step]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.bytes = self.path.stat().st_size
        return kept

    def append(self, line: dict) -> None:
        """Append a line; raises OSError where the disk is full, and writes it with the next line that fits."""
        self.unwritten.append(json.dumps(line) + "\n")
        self.write()

    def write(self) -> None:
        data = "".join(self.unwritten).encode()
        with open(self.path, "ab", buffering=0) as file:
            if file.tell() > self.bytes:
                file.truncate(self.bytes)  # a partial line, which did not fit
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.bytes, self.unwritten = self.bytes + len(data), []

    def to_disk(self) -> None:
        """Flush these lines to the disk, before a checkpoint past them is written; raises OSError."""
        self.write()
        to_disk(self.path)


def read_json(path: Path) -> dict:
    """Return the file's object; {} where it is missing or was cut off by a power failure: each start writes it
    again."""
    return parse_object(path.read_text(errors="replace")) if path.exists() else {}


def parse_object(text: str) -> dict:
    """Return the object in a line; {} where the line is partial."""
    with contextlib.suppress(json.JSONDecodeError):
        values = json.loads(text)
        return values if isinstance(values, dict) else {}
    return {}

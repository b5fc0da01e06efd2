# SPDX-License-Identifier: Apache-2.0
"""The files of a run's folder, of which one process writes and which may be cut off at any byte."""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError, job_folder
from ..files import parse_object, read_json, replace_text, take_lock, to_disk

LOCK_SECONDS = 60  # a requeued job may start while the former one still ends


def wait_for_preflight() -> None:
    """Of a job by plain sbatch, which slurm/launch.sh makes meanwhile; raises UserError where it refuses the job."""
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


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """At the start, when an error costs nothing."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}. Give another --output_dir.") from error


class MetricsFile:
    """metrics.jsonl: one object a line, each once and in its place, whatever the disk has room for."""

    def __init__(self, path: Path):
        self.path = path
        self.unwritten, self.bytes = [], 0  # lines that wait for room; size without them

    def drop_after(self, step: int) -> list[dict]:
        """What a resume makes anew, and a last line that was torn; returns the others."""
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

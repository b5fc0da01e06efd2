# SPDX-License-Identifier: Apache-2.0
"""Define the error that a user can fix, and print a program's lines."""

import contextlib
import os
import sys
from pathlib import Path


class UserError(ValueError):
    """An error that the user can fix: printed as one line, without a traceback."""

    alone = False  # whether this process alone has it, so that rank 0 will not report it


def say(line: str, stream=None) -> None:
    """Print a line at once, in a single write: those of several processes do not mix, also under PYTHONUNBUFFERED."""
    print(f"{line}\n", end="", file=stream or sys.stdout, flush=True)


def job_folder() -> Path | None:
    """Return the folder in which slurm/launch.sh and its processes leave each other messages; None without it."""
    return Path(os.environ["RECIPES_JOB_FOLDER"]) if "RECIPES_JOB_FOLDER" in os.environ else None


def tell_job(name: str, text: str) -> None:
    """Write a file into job_folder(), for slurm/launch.sh."""
    if folder := job_folder():
        with contextlib.suppress(OSError):  # the folder is removed when the job ends
            (folder / name).write_text(text, errors="backslashreplace")

# SPDX-License-Identifier: Apache-2.0
"""What a user can put right, and the words that a program says."""

import contextlib
import os
import sys
from pathlib import Path


class UserError(ValueError):
    """What the person at the keyboard can put right: printed as one line, without a traceback."""

    alone = False  # whether only this process has seen it: rank 0 will not report it


def say(line: str, stream=None) -> None:
    """Print at once, on standard output or the stream."""
    print(line, file=stream or sys.stdout, flush=True)


def job_folder() -> Path | None:
    """Where slurm/launch.sh and the processes that it started tell each other what they know."""
    return Path(os.environ["RECIPES_JOB_FOLDER"]) if "RECIPES_JOB_FOLDER" in os.environ else None


def tell_job(name: str, text: str) -> None:
    """Into a file of job_folder(), for slurm/launch.sh."""
    if folder := job_folder():
        with contextlib.suppress(OSError):  # the folder goes with the job
            (folder / name).write_text(text, errors="backslashreplace")

# SPDX-License-Identifier: Apache-2.0
"""Write what a run reports: to metrics.jsonl, the trackers, the progress bar and the terminal."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from tqdm import tqdm

from ..errors import UserError
from .folder import MetricsFile


class Log:
    """The outputs of a run's lines. Every process makes one; only rank 0 writes."""

    def __init__(self, accelerator: Accelerator, folder: Path):
        self.accelerator, self.folder = accelerator, folder
        self.metrics, self.warned = MetricsFile(folder / "metrics.jsonl"), set()
        self.shown: dict[str, str] = {}  # beside the bar

    def open(self, trackers: list[str], values: dict, last_step: int) -> None:
        """Start the trackers and the bar. values: the run's identity, for the trackers' tables of hyper-parameters."""
        os.environ.setdefault("WANDB_MODE", "offline")
        # Files, not SQLite: MLflow's client has no database, and a parallel file system does not suit one.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_TRACKING_URI", (self.folder / "mlflow").resolve().as_uri())
        self.accelerator.project_configuration.set_directories(str(self.folder))
        self.accelerator.project_configuration.logging_dir = str(self.folder / "tensorboard")
        self.accelerator.log_with = filter_trackers(trackers, self.folder)
        plain = {name: value for name, value in values.items() if isinstance(value, str | int | float)}
        self.accelerator.init_trackers(values["recipe"], plain, {"wandb": {"dir": str(self.folder)}})
        hidden = None if self.accelerator.is_main_process else True  # None: shown on a terminal, not in a log file
        self.bar = tqdm(total=last_step, unit="step", disable=hidden, dynamic_ncols=True)

    def begin_at(self, step: int) -> None:
        """Start the bar at this step: its rate must not count the steps of previous starts."""
        self.bar.initial = self.bar.n = self.bar.last_print_n = step

    def write(self, line: dict) -> None:
        """Append a line to metrics.jsonl and give its numbers to the trackers."""
        numbers = {name: value for name, value in line.items() if not isinstance(value, str) and name != "step"}
        if self.accelerator.is_main_process:
            with self.bearing("metrics.jsonl"):
                self.metrics.append(line)
        with self.bearing("the trackers' log"):
            try:
                self.accelerator.log(numbers, step=line["step"])
            except OSError:
                self.accelerator.trackers = []  # they would fail on every later line
                raise

    @contextlib.contextmanager
    def bearing(self, name: str) -> Iterator[None]:
        """Continue the training where the block cannot write, and warn once per name."""
        try:
            yield
        except OSError as error:
            if name not in self.warned:
                self.say(f"warning: {name} cannot be written: {error.strerror or error}; training continues")
            self.warned.add(name)

    def show(self, **values: str) -> None:
        """Show these values beside the bar, with those shown before."""
        self.shown |= values
        self.bar.set_postfix(self.shown, refresh=False)

    def say(self, line: str) -> None:
        """Print one line from rank 0, above the bar."""
        if self.accelerator.is_main_process:
            tqdm.write(line)
            sys.stdout.flush()


def known_trackers(report_to: str) -> list[str]:
    """Return the names in --report_to; raises UserError for one that is unknown or not installed."""
    names = [name for name in report_to.split(",") if name and name != "none"]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"--report_to {name} is unknown. Known: none, {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}.")
        if name not in map(str, get_available_trackers()):
            raise UserError(f"--report_to {name} is not installed. Install it (pip install {name}), or leave it out.")
    return names

# SPDX-License-Identifier: Apache-2.0
"""Write a run's checkpoints: complete or absent, in the background if asked."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..collectives import data_parallel
from ..errors import UserError
from ..files import to_disk, write_json
from ..launch import strategy
from .deepspeed import write_zero
from .retention import MANIFEST, STATE, checkpoints, checksum, remove_checkpoint, superfluous
from .tensors import TensorWriter, group_numbers, local, own_share, state_tensors, unwrapped


class SaveError(RuntimeError):
    """The error of a checkpoint that was not written: raised by every process, even if only one of them failed."""


class Checkpoints:
    """A writer of a run's checkpoints, in the background if asked. Every process makes one and calls every method."""

    def __init__(self, folder: Path, accelerator: Accelerator, identity: dict, keep: int, background: bool):
        """folder: the run's `checkpoints`. keep: how many of the newest stay; the best by the metric stays too."""
        self.folder, self.accelerator, self.identity, self.keep = folder, accelerator, identity, keep
        self.background, self.buffers = background, {}
        self.thread: threading.Thread | None = None
        self.error: SaveError | None = None
        self.begin, self.seconds = 0.0, 0.0  # when the last save began; how long the slowest took to become durable
        self.alone = accelerator.num_processes == 1
        # A group of its own: the thread's messages must not come between the training's.
        self.group = None if self.alone else torch.distributed.new_group(backend="gloo")

    def save(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, state: dict, manifest: dict
    ) -> None:
        """Write step-XXXXXXXX for state["step"], then remove superfluous checkpoints.

        state is for the resume, manifest for people and tools; both must be JSON values. Raises SaveError on every
        process; the complete checkpoints stay. One save at a time: call `wait` before the next.
        """
        assert self.thread is None
        self.begin = time.monotonic()
        final, temporary = (self.folder / f"{word}-{state['step']:08d}" for word in ("step", "tmp"))
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        numbers = {} if strategy().startswith("zero") else group_numbers(unwrapped(optimizer))
        state = {**state, "scheduler": scheduler.state_dict(), "scaler": scaler, "optimizer": numbers}
        manifest = {"step": state["step"], "identity": self.identity, **manifest}
        tensors = {}
        with self._removed_on_failure(temporary):
            self.agreed(lambda: _make(temporary), on_main=True)
            self.agreed(lambda: tensors.update(self._taken(temporary, model, optimizer)))
        if self.background:
            arguments = temporary, final, tensors, self.buffers, state, manifest
            self.thread = threading.Thread(target=self._write_behind, args=arguments, daemon=True)
            self.thread.start()
        else:
            self._write(temporary, final, tensors, None, state, manifest)

    def wait(self) -> SaveError | None:
        """Wait until the background save is durable; return its error, if any: once, the same on every process."""
        if self.thread:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        return error

    def failure(self) -> SaveError | None:
        """Return what `wait` would, if the save has ended. Processes may see it at different steps: for messages
        only."""
        return None if self.thread and self.thread.is_alive() else self.wait()

    def _write_behind(self, *arguments) -> None:
        try:
            self._write(*arguments)
        except SaveError as error:
            self.error = error
        except Exception as error:  # such as a lost connection to a dead process: the training will fail on it too
            self.error = SaveError(str(error))

    def _taken(self, temporary: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return the tensors that this process writes; for a background save, copy their values."""
        if strategy().startswith("zero"):
            return write_zero(temporary, self.accelerator, model)
        whole = model.module if isinstance(model, DistributedDataParallel) else model
        tensors = own_share(state_tensors(whole, unwrapped(optimizer)), whole, *data_parallel(self.accelerator))
        if self.background:
            self._stage(tensors)
        return tensors

    def _stage(self, tensors: dict) -> None:
        """Copy this process's parts to host memory, which the next save uses again."""
        cuda = self.accelerator.device.type == "cuda"
        for name, tensor in tensors.items():
            part = local(tensor)
            if name not in self.buffers or self.buffers[name].shape != part.shape:
                self.buffers[name] = torch.empty_like(part, device="cpu", pin_memory=cuda)
            self.buffers[name].copy_(part, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()

    def _write(
        self, temporary: Path, final: Path, tensors: dict, staged: dict | None, state: dict, manifest: dict
    ) -> None:
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        with self._removed_on_failure(temporary):
            self._save_tensors(tensors, TensorWriter(temporary, rank, staged))
            names = self.agreed(lambda: _finish(temporary, state), on_main=True)[0]
            sums = self.agreed(lambda: {name: checksum(temporary / name) for name in names[rank::size]})
            manifest["files"] = {name: entry for part in sums for name, entry in part.items()}
            self.agreed(lambda: _publish(temporary, final, manifest, self.keep), on_main=True)
        self.seconds = max(self.seconds, time.monotonic() - self.begin)

    @contextlib.contextmanager
    def _removed_on_failure(self, temporary: Path) -> Iterator[None]:
        """Remove an unfinished checkpoint where the block fails: it would only fill the disk."""
        try:
            yield
        except SaveError:
            if self.accelerator.is_main_process:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _save_tensors(self, tensors: dict, writer: TensorWriter) -> None:
        try:
            dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.alone)
        except dcp.api.CheckpointException as error:  # torch raises it on every process
            rank, (problem, _) = next(iter(error.failures.items()))
            raise SaveError(f"{problem} (process {rank})") from error

    def agreed(self, function: Callable, on_main: bool = False) -> list:
        """Call the function, under on_main on rank 0 alone, and return every process's result. Where it fails on one
        process, all of them raise SaveError."""
        outcome = None, None
        if self.accelerator.is_main_process or not on_main:
            try:
                outcome = function(), None
            except Exception as error:
                outcome = None, str(error) or type(error).__name__
        outcomes = [outcome]
        if not self.alone:
            outcomes = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(outcomes, outcome, group=self.group)
        for rank, (_, error) in enumerate(outcomes):
            if error:
                raise SaveError(f"{error} (process {rank})")
        return [result for result, _ in outcomes]


class Saves:
    """A run's saves: a failed one within the run is only a warning, and the next one is tried. Every process makes
    one and calls every method."""

    def __init__(self, checkpoints: Checkpoints, say: Callable, before: Callable, origin: dict):
        """say: prints a line. before: rank 0 calls it before each save; it may raise OSError. origin: for each
        manifest, see origin.py."""
        self.checkpoints, self.say, self.before, self.origin = checkpoints, say, before, origin
        self.saved_step = 0

    def save(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, state: dict, metric: dict, at_end: bool
    ) -> None:
        """Write a checkpoint of state["step"]. metric: the evaluation's part of its manifest.

        Raises UserError where it cannot be written and the run is at its end.
        """
        self._report(self.checkpoints.wait())
        try:
            self.checkpoints.agreed(self.before, on_main=True)
            manifest = {"saved": datetime.now(UTC).isoformat(timespec="seconds"), **self.origin, **metric}
            self.checkpoints.save(model, optimizer, scheduler, state, manifest)
            if at_end and (error := self.checkpoints.wait()):
                raise error
            self.saved_step = state["step"]
        except SaveError as error:
            if at_end:
                line = f"no checkpoint of step {state['step']}: {error}; {self._newest()}. Start again."
                raise UserError(line) from error
            self._report(error)

    def report(self) -> None:
        """Warn of a background save that has failed, once it has ended."""
        self._report(self.checkpoints.failure())

    def _report(self, error: SaveError | None) -> None:
        if error:
            self.say(f"warning: no checkpoint: {error}; {self._newest()}; training continues, next save as planned")

    @property
    def reserve(self) -> float:
        """Return the seconds that a last save may take: it also waits for a background save that is under way."""
        return self.checkpoints.seconds * (1 + self.checkpoints.background)

    def _newest(self) -> str:
        there = checkpoints(self.checkpoints.folder)
        return f"the newest one is {there[-1]}" if there else "there is none yet"


def _make(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)


def _finish(temporary: Path, state: dict) -> list[str]:
    write_json(temporary / STATE, state)
    return sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())


def _publish(temporary: Path, final: Path, manifest: dict, keep: int) -> None:
    write_json(temporary / MANIFEST, manifest)
    for folder in {(temporary / name).parent for name in manifest["files"]}:
        to_disk(folder)
    os.rename(temporary, final)  # the name is free: `quarantine` has renamed those past the resumed one
    to_disk(final.parent)
    for old in superfluous(final.parent, keep):
        remove_checkpoint(old)

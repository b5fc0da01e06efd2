# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are complete or absent, and are checked before anything of them is used.

A checkpoint holds what the future depends on: weights, buffers and optimizer state under the plain model's names, in
safetensors files that any number of processes reads (torch.distributed.checkpoint); in state.json the schedule, the
gradient scaler and what a recipe gives of its loader. The sample order and the augmentation are functions of the step,
so no random state is in it. manifest.json, written last, names every file with its size and SHA-256; then the folder
gets its name.

What is trusted: nothing here is unpickled, but where DeepSpeed owns the state. Its files are pickles; their checksums
are verified before they are opened, which tells damage, not malice: resume ZeRO only from folders of your own.
"""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .accelerator import data_parallel, strategy
from .config import UserError
from .tensor_files import TensorReader, TensorWriter, to_disk, write_json

# Said by torch of every save and load by one process.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

MANIFEST, STATE = "manifest.json", "state.json"
ZERO = "zero"  # DeepSpeed's folder within a checkpoint
ASIDE = "aside-"  # instead of step-: see put_aside
# One entry a parameter, not one a group: then each process of a pipeline can bring its own parameters.
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class SaveError(RuntimeError):
    """No checkpoint was written: raised by every process, also where only one had the reason."""


class Checkpoints:
    """Writes a run's checkpoints, in the background where that is asked for. Every process makes one and calls every
    method."""

    def __init__(self, folder: Path, accelerator: Accelerator, identity: dict, keep: int, background: bool):
        """folder: the run's `checkpoints`. keep: how many of the newest stay; the best by accuracy stays besides."""
        self.folder, self.accelerator, self.identity, self.keep = folder, accelerator, identity, keep
        self.background, self.buffers = background, {}
        self.thread: threading.Thread | None = None
        self.error: SaveError | None = None
        self.begin, self.seconds = 0.0, 0.0  # of the save at work; that the longest took until it was durable
        self.alone = accelerator.num_processes == 1
        # A group of its own: the thread's messages must not come between the training's.
        self.group = None if self.alone else torch.distributed.new_group(backend="gloo")

    def save(
        self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, state: dict, manifest: dict
    ) -> None:
        """Write step-XXXXXXXX of state["step"], then remove what need not be kept.

        state is for the resume, manifest for people and tools; both in what JSON can hold. Raises SaveError on every
        process; every checkpoint that was complete then still is. One at a time: call `wait` before.
        """
        assert self.thread is None
        self.begin = time.monotonic()
        final, temporary = (self.folder / f"{word}-{state['step']:08d}" for word in ("step", "tmp"))
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        state = {**state, "scheduler": scheduler.state_dict(), "scaler": scaler}
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
        """Until the save in the background is durable; what went wrong with it, once, the same on every process."""
        if self.thread:
            self.thread.join()
        error, self.thread, self.error = self.error, None, None
        return error

    def failure(self) -> SaveError | None:
        """As `wait`, if it has ended. Processes may see that at different steps: it is for a message only."""
        return None if self.thread and self.thread.is_alive() else self.wait()

    def _write_behind(self, *arguments) -> None:
        try:
            self._write(*arguments)
        except SaveError as error:
            self.error = error
        except Exception as error:  # of a connection to a process that is gone: the training will find it as well
            self.error = SaveError(str(error))

    def _taken(self, temporary: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        """What this process writes; for the background, its values are copied."""
        if strategy().startswith("zero"):
            return _zero_tensors(temporary, self.accelerator, model)
        whole = model.module if isinstance(model, DistributedDataParallel) else model
        tensors = _share(_tensors(whole, _unwrapped(optimizer)), whole, *data_parallel(self.accelerator))
        if self.background:
            self._stage(tensors)
        return tensors

    def _stage(self, tensors: dict) -> None:
        """Copy this process's parts into memory of the host that is used again by the next save."""
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
            sums = self.agreed(lambda: {name: _sum(temporary / name) for name in names[rank::size]})
            manifest["files"] = {name: entry for part in sums for name, entry in part.items()}
            self.agreed(lambda: _publish(temporary, final, manifest, self.keep), on_main=True)
        self.seconds = max(self.seconds, time.monotonic() - self.begin)

    @contextlib.contextmanager
    def _removed_on_failure(self, temporary: Path) -> Iterator[None]:
        """So that a part of a checkpoint does not fill a disk that has no room for the whole."""
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
        """What each process's call gave. Where one of them fails, all raise SaveError, so that none leaves alone."""
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
    os.rename(temporary, final)  # none is there: `put_aside` has moved those past the one that was resumed
    to_disk(final.parent)
    for old in superfluous(final.parent, keep):
        _remove(old)


def _remove(folder: Path) -> None:
    """In two steps, so that no kill leaves a part of it under its name."""
    beside = folder.with_name(folder.name.replace("step-", "tmp-"))
    shutil.rmtree(beside, ignore_errors=True)
    with contextlib.suppress(OSError):  # what cannot be removed does no harm
        os.rename(folder, beside)
    shutil.rmtree(beside, ignore_errors=True)


def _sum(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# What is saved


def local(tensor: Tensor) -> Tensor:
    """The part of it that this process holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Weights and buffers, and the optimizer's tensors, by plain names, each as this process holds it.

    What else an optimizer keeps comes from the configuration. torch's get_state_dict gives the same, and takes longer
    than to copy the values.
    """
    # First: it makes shards again of what an evaluation leaves whole under FSDP; the optimizer's are the shards.
    weights = model.state_dict()
    names = {parameter: name for name, parameter in model.named_parameters()}
    moments = {
        f"state.{names[parameter]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    return _named(weights, moments)


def _named(weights: dict, moments: dict) -> dict[str, Tensor]:
    both = [(f"model.{name}", value) for name, value in weights.items()]
    both += [(f"optimizer.{name}", value) for name, value in moments.items()]
    return {name.replace("_orig_mod.", ""): value for name, value in both if isinstance(value, Tensor)}


def _share(tensors: dict[str, Tensor], model: nn.Module, rank: int, size: int) -> dict[str, Tensor]:
    """What this one of the data-parallel processes writes: its shards, and a part of what each of them holds whole.

    Buffers are rank 0's: batch norm's statistics differ until DDP's next forward sends that one's to all.
    """
    buffers = set(_named(dict(model.named_buffers()), {}))
    loads, mine = [0] * size, {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].numel(), item[0])):
        writer = rank if isinstance(tensor, DTensor) else 0 if name in buffers else loads.index(min(loads))
        if not isinstance(tensor, DTensor):
            loads[writer] += tensor.nbytes
        if writer == rank:
            mine[name] = tensor
    return mine


def _zero_tensors(folder: Path, accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Write DeepSpeed's shards for its own resume; rank 0 gets the whole weights in fp32 under their plain names."""
    from deepspeed.utils import safe_get_full_fp32_param

    failures = _save_zero(folder, model)
    weights = {}
    for name, parameter in model.module.named_parameters():
        whole = safe_get_full_fp32_param(parameter)  # gathers: every process must call it
        if accelerator.is_main_process:
            weights[f"model.{name}"] = whole.cpu()
    if failures:
        raise failures[0]
    return weights


def _save_zero(folder: Path, model: nn.Module) -> list[Exception]:
    """What went wrong with this process's files. An exception within save_checkpoint would leave the others in its
    barriers: it is to be raised when all are through."""
    engine, failures = model.checkpoint_engine, []
    write = engine.save

    def save(state_dict: dict, path: str) -> None:
        try:
            write(state_dict, path)
            to_disk(path)
        except Exception as error:
            failures.append(error)

    model._copy_recovery_script = lambda folder: None  # it could fail as well, and tools/export.py needs no script
    engine.save = save
    model.save_checkpoint(str(folder), tag=ZERO, save_latest=False)
    engine.save = write
    return failures


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


# Reading


def load_checkpoint(
    path: Path, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler
) -> dict:
    """Put everything back and return state.json's content; every process must call it.

    Raises UserError where the checkpoint lacks something that the training has, or has what the training lacks, and
    where its files are no tensors or no JSON.
    """
    try:
        return _load(path, accelerator, model, optimizer, scheduler)
    except dcp.api.CheckpointException as error:
        reason, _ = next(iter(error.failures.values()))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = error
    raise UserError(f"{path} cannot be read: {reason}. Give --resume_from_checkpoint another one.")


def _load(
    path: Path, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler
) -> dict:
    _refuse_other_zero(path, accelerator.num_processes)
    if strategy().startswith("zero"):
        _load_zero(path, model)
    else:
        _load_tensors(path, accelerator, model, _unwrapped(optimizer))
    state = read_state(path)
    if accelerator.scaler and state["scaler"]:  # none: written in another precision, which --resume_override names
        accelerator.scaler.load_state_dict(state["scaler"])
    rates = scheduler.base_lrs
    scheduler.load_state_dict(state["scheduler"])
    scheduler.base_lrs, scheduler.last_epoch = rates, scheduler.last_epoch - 1
    scheduler.step()  # to the rates of this configuration, which --resume_override may have changed
    return state


def _load_tensors(path: Path, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> None:
    weights, moments = get_state_dict(model, optimizer, options=FLAT)
    reader = TensorReader(path)
    there = set(reader.read_metadata().state_dict_metadata)
    if not any(name.startswith("optimizer.") for name in there):
        moments = {}  # every step so far was skipped
    tensors = _named(weights, moments)
    _check_names(path, there, set(tensors), accelerator)
    # Into the tensors themselves; set_state_dict then tells those of them that the optimizer has made anew.
    dcp.load(tensors, storage_reader=reader, no_dist=accelerator.num_processes == 1)
    if moments:
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=FLAT)
    else:
        optimizer.state.clear()  # get_state_dict has made one


def read_state(path: Path) -> dict:
    """state.json of a checkpoint: step, scheduler, scaler, and what the recipe gave as `loader`."""
    return json.loads((path / STATE).read_text())


def read_weights(path: Path) -> dict[str, Tensor]:
    """Plain name -> whole weight or buffer, on the CPU, whoever wrote its parts; DeepSpeed's are in fp32."""
    reader, part = TensorReader(path), "model."
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(part)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix(part): tensor for name, tensor in state.items()}


def _check_names(path: Path, there: set[str], mine: set[str], accelerator: Accelerator) -> None:
    everyone = [mine]
    if accelerator.num_processes > 1:
        everyone = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(everyone, mine)
    wanted = set().union(*everyone)
    for these, those, verb in ((wanted, there, "lacks"), (there, wanted, "has, but this training has not,")):
        if these - those:
            names = ", ".join(sorted(these - those)[:3])
            raise UserError(f"{path} {verb} {names}. Resume with the model and optimizer that wrote it.")


def _refuse_other_zero(path: Path, processes: int) -> None:
    """DeepSpeed's state is of one stage and one number of processes; raises UserError for any other."""
    manifest = read_manifest(path)
    wrote, here = (manifest.get("strategy"), manifest.get("world_size")), (strategy(), processes)
    if wrote != here and "zero" in f"{wrote}{here}":
        raise UserError(
            f"{path} was written by {wrote[0]} on {wrote[1]} processes; here is {here[0]} on {here[1]}. Resume as it "
            f"was written, or start from its weights: `python tools/export.py {path.parent.parent} weights`, then "
            "--pretrained weights and another --output_dir."
        )


def _load_zero(path: Path, model: nn.Module) -> None:
    loaded, _ = model.load_checkpoint(str(path), tag=ZERO)
    if loaded is None:
        raise OSError("DeepSpeed found nothing to load")


# Looking at what is there


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def damage(folder: Path, contents: bool = True) -> str | None:
    """Why a checkpoint cannot be used; None where it is whole. contents: compare checksums too, not only sizes."""
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
    if contents and _sum(path)["sha256"] != expected["sha256"]:
        return f"{path.name} is not what was written: its SHA-256 differs"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first; a folder that bears this name was written to its end."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def superfluous(folder: Path, keep: int) -> list[Path]:
    """Whole checkpoints but the newest `keep` and the one with the best accuracy, the newest of equals. What is
    damaged neither counts nor goes."""
    whole = [path for path in checkpoints(folder) if damage(path, contents=False) is None]
    best = max(whole, key=lambda path: (read_manifest(path).get("accuracy") or -1, path), default=None)
    return [path for path in whole[:-keep] if path != best]


def checkpoint_to_resume(folder: Path, resume_from_checkpoint: str) -> tuple[Path | None, list[str]]:
    """What `--resume_from_checkpoint` means here, None for a fresh start; and a line for each damaged one passed over.

    A path begins the folder's run, or takes it back to one of its own checkpoints. It does so once: what was written
    since is newer, and a job that is started again with the same command goes on from there.

    Raises UserError for a path that is no whole checkpoint, for `never` where the folder holds one, and where all are
    damaged.
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
        raise UserError(f"{passed[0]}, and no other is whole. Remove {folder.parent} to start afresh.")
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
    """Whether a folder's newest checkpoint, rather than the path that was given, is to be gone on from."""
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
            f"--resume_from_checkpoint {given} is no whole checkpoint: {reason}. "
            "Give auto, never, or a folder checkpoints/step-XXXXXXXX of a run."
        )
    return path


def put_aside(folder: Path, checkpoint: Path) -> None:
    """Rename what lies past the checkpoint that is gone on from, damaged or not: it is no part of the run any more,
    would block the saves of these steps, and is the user's to look at and to remove."""
    for path in checkpoints(folder):
        if path.name > checkpoint.name:
            beside = path.with_name(path.name.replace("step-", ASIDE))
            shutil.rmtree(beside, ignore_errors=True)
            os.rename(path, beside)

# SPDX-License-Identifier: Apache-2.0
"""A run: its position, and what it says of it in its folder, to trackers and on the terminal."""

import contextlib
import itertools
import math
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from accelerate.utils import ProfileKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from ..accelerator import MESH
from ..checkpoint.load import load_checkpoint
from ..checkpoint.retention import checkpoint_to_resume, checkpoints, put_aside, read_manifest
from ..checkpoint.save import Checkpoints, SaveError
from ..collectives import all_reduce_sum, data_parallel, on_main_process
from ..config import SIZES, RunConfig
from ..errors import UserError, say, tell_job
from ..files import read_json, write_json
from ..images.description import describe
from ..images.loader import Batch
from ..images.sources import Source
from ..launch import mixed_precision, strategy
from ..lifetime import Interruption
from .folder import MetricsFile, lock, wait_for_preflight, writing
from .identity import (
    differing,
    git_commit,
    identity,
    identity_hash,
    launcher_variables,
    recipe_source,
    shared_source,
    versions,
)

TRACED = 3  # training steps, and evaluation batches, in the trace of --profile


class Run:
    """One training's folder and position. Every process makes one; rank 0 alone writes.

    Making it claims the folder, refuses the configuration of another run by name, and finds what to resume:
    `checkpoint` (None for a fresh start). Raises UserError before anything in the folder has changed.

    `step` counts the global batches done, `last_step` is where this start ends.
    """

    def __init__(self, accelerator: Accelerator, run_config: RunConfig, config, train_loader, eval_loader):
        self.accelerator, self.run_config, self.config = accelerator, run_config, config
        self.views, self.decoder = (train_loader.dataset, eval_loader.dataset), train_loader.decoder
        sources = [view.source for view in self.views]
        classes, epoch_steps = sources[0].classes, train_loader.order.steps_per_epoch
        self.recipe = Path(sys.argv[0]).stem
        self.identity = identity(self.recipe, mixed_precision(), run_config, config)
        default = Path("runs") / f"{self.recipe}-{identity_hash(self.identity)}"
        self.folder = Path(run_config.output_dir or default)
        # Not in the folder's name: the same command on data that has changed is to be told so.
        self.identity |= {"training_images": len(train_loader.dataset), "held_out_images": len(eval_loader.dataset)}
        self.identity["class_names"] = classes
        self.identity["data_fingerprint"] = on_main_process(accelerator, _fingerprint, sources)
        if torch.get_float32_matmul_precision() != "highest":  # tf32, by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1
            self.identity["float32_matmul_precision"] = torch.get_float32_matmul_precision()
        self.identity["source"], self.shared_source = recipe_source(), shared_source()
        self.epoch_steps, self.total_steps = epoch_steps, epoch_steps * config.epochs
        self.last_step = min(self.total_steps, run_config.max_steps or self.total_steps)
        self.checkpoint_steps = _checkpoint_steps(run_config.checkpointing_steps, epoch_steps)
        trackers = _trackers(run_config.report_to)
        _refuse_pairs(run_config, config)
        self.begun_from = None  # the path that --resume_from_checkpoint once gave, as rank 0 knows
        self.checkpoint, self.former = on_main_process(accelerator, self._claim)
        self.finished = self.former.get("status") == "finished" and self.former["steps"] >= self.last_step
        self.step, self.first_step, self.saved_step, self.evaluation = 0, 0, 0, {}
        self.torn, self.launched = 0, time.perf_counter()
        self.interrupted = ""  # or the reason, the same one on every process
        self.evaluation_seconds, self.step_end = 0.0, time.perf_counter()
        self.train_steps, self.train_seconds = 0, 0.0  # see _count_time
        self.window_start = self.train_steps, self.train_seconds
        self.losses, self.samples, self.digest, self.wait_seconds = [], [], 0, 0.0
        self.metrics, self.warned = MetricsFile(self.folder / "metrics.jsonl"), set()
        self.skipped = False  # the last step, for its loss or gradient was not finite
        self.profiler = SimpleNamespace(step=lambda: None)
        if not self.finished:
            self._open(classes, trackers)
            train_loader.noted = eval_loader.noted = self.interruption.noted

    def _claim(self) -> tuple[Path | None, dict]:
        """Rank 0: lock the folder; return the checkpoint to resume from and the former summary."""
        wait_for_preflight()
        with writing(self.folder):
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder)
        say(str(self.folder))
        tell_job("run_folder", str(self.folder.resolve()))
        folder = self.folder / "checkpoints"
        checkpoint, damaged = checkpoint_to_resume(folder, self.run_config.resume_from_checkpoint)
        for line in damaged:
            say(f"{line}; the one before it is taken", sys.stderr)
        self._refuse_other_values(checkpoint)
        for unfinished in folder.glob("tmp-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        given = str(Path(self.run_config.resume_from_checkpoint).resolve())
        if checkpoint:
            self.begun_from = given if str(checkpoint) == given else read_manifest(checkpoint).get("begun_from")
        return checkpoint, read_json(self.folder / "summary.json")

    def _refuse_other_values(self, checkpoint: Path | None) -> None:
        """Where this run differs from the one of the folder or the checkpoint, but in what --resume_override names."""
        folders = read_json(self.folder / "config.json").get("identity", self.identity)
        sources = [folders, read_manifest(checkpoint)["identity"] if checkpoint else folders]
        known = {name: [former.get(name) for former in sources] for name in {*self.identity, *sources[0], *sources[1]}}
        parts = sorted({part for former in sources for part in self._changed_parts(former)})
        values = {name for name, former in known.items() if {*map(str, former)} != {str(self.identity.get(name))}}
        changed = (values - {"source"}) | ({"source"} if parts else set())
        allowed = set(self.run_config.resume_override.replace(",", " ").split())
        if allowed - known.keys():
            raise UserError(f"--resume_override {min(allowed - known.keys())} is no value that decides a run.")
        if changed - allowed:
            lines = {name: _difference(name, known[name], self.identity.get(name)) for name in changed - {"source"}}
            lines["source"] = f"{', '.join(parts)} of the recipe {'was' if len(parts) == 1 else 'were'} edited"
            changes = ", ".join(lines[name] for name in sorted(changed - allowed))
            raise UserError(
                f"{checkpoint or self.folder} is of another run: {changes}. Give what it had, or another "
                f"--output_dir; or --resume_override {','.join(sorted(changed))} to resume with what is new."
            )

    def _changed_parts(self, former: dict) -> list[str]:
        """Of this recipe, since a start of the same one; another's differ as it is."""
        same = former.get("recipe") == self.recipe
        return differing(self.identity["source"], former.get("source", {})) if same else []

    def _open(self, classes: list[str], trackers: list[str]) -> None:
        if self.accelerator.is_main_process:
            epoch_images = self.epoch_steps * self.config.global_batch_size
            self.say("\n".join([*describe(*self.views, epoch_images), self._batch_line()]))
        on_main_process(self.accelerator, self._begin_files, classes)
        options = self.run_config.keep_checkpoints, self.run_config.async_checkpoint
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.accelerator, self.identity, *options)
        self.interruption = Interruption(self.accelerator, self.folder, self.run_config.time_limit)
        self._start_trackers(trackers)
        hidden = None if self.accelerator.is_main_process else True  # None: shown on a terminal, not in a log file
        self.bar = tqdm(total=self.last_step, unit="step", disable=hidden, dynamic_ncols=True)
        self.shown: dict[str, str] = {}  # beside the bar

    def _begin_files(self, classes: list[str]) -> None:
        former = read_json(self.folder / "config.json").get("decoder", self.decoder)
        if former != self.decoder:
            same = "" if "DALI" in (former, self.decoder) else "; their pixels are the same"
            say(f"warning: images were decoded by {former}, now by {self.decoder}{same}", sys.stderr)
        with writing(self.folder):
            write_json(self.folder / "config.json", self._description(classes))
            if self.checkpoint is None:
                self.metrics.drop_after(0)
        self._write_summary("running")

    def _batch_line(self) -> str:
        config, size = self.config, data_parallel(self.accelerator)[1]
        each = config.global_batch_size // size // config.gradient_accumulation_steps
        return (
            f"global batch {config.global_batch_size} = {size} (data-parallel processes) x {each} (images) x "
            f"{config.gradient_accumulation_steps} (accumulation); "
            f"{config.epochs} epochs x {self.epoch_steps} steps = {self.total_steps} steps"
        )

    def _description(self, classes: list[str]) -> dict:
        accelerator = self.accelerator
        on_gpu = accelerator.device.type == "cuda"
        return {
            "identity": self.identity,
            "config": vars(self.config),
            "run_config": vars(self.run_config),
            "command": [sys.executable, *sys.argv],
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_commit": git_commit(),
            "versions": versions(),
            "launcher": launcher_variables(),
            "strategy": strategy(),
            "mesh": dict(zip(MESH, accelerator.mesh.shape, strict=True)) if accelerator.mesh else None,
            "world_size": accelerator.num_processes,
            "data_parallel_size": data_parallel(accelerator)[1],
            "device": torch.cuda.get_device_name() if on_gpu else accelerator.device.type,
            "threads": torch.get_num_threads(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "decoder": self.decoder,
            "steps_per_epoch": self.epoch_steps,
            "classes": classes,
            "shared": str(Path(__file__).with_name("__init__.py")),
        }

    # Position

    @property
    def epoch(self) -> int:
        return self.step // self.epoch_steps

    @property
    def stopping(self) -> bool:
        return self.step >= self.last_step or bool(self.interrupted)

    @property
    def newest_checkpoint(self) -> Path | None:
        return next(reversed(checkpoints(self.folder / "checkpoints")), None)

    @property
    def will_log(self) -> bool:
        """Whether the step that is being computed gets a line in metrics.jsonl."""
        return (self.step + 1) % self.run_config.logging_steps == 0 or self.step + 1 >= self.last_step

    @property
    def evaluation_due(self) -> bool:
        """At the end of an epoch or of the run; an interruption within an epoch leaves no trace in the metrics."""
        return self.step % self.epoch_steps == 0 or self.step >= self.last_step

    @property
    def checkpoint_due(self) -> bool:
        """Within an epoch. At its end the evaluation comes first, so that a resume cannot skip it."""
        at_end = self.stopping or self.step % self.epoch_steps == 0
        return not at_end and self.step % self.checkpoint_steps == 0

    def resume(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Go on after the checkpoint's global step; what lies past it is dropped from metrics.jsonl and put aside."""
        state = load_checkpoint(self.checkpoint, self.accelerator, model, optimizer, scheduler)
        self.step = self.first_step = self.saved_step = state["step"]
        self.torn = state["torn"] if data_parallel(self.accelerator)[0] == 0 else 0
        on_main_process(self.accelerator, self._go_back)
        self.bar.initial = self.bar.n = self.bar.last_print_n = self.step  # no steps of this start, for its rate
        self._show(**self._accuracy())
        self.say(f"resumed at step {self.step} of {self.total_steps}")
        if names := differing(self.shared_source, read_manifest(self.checkpoint).get("shared", {})):
            self.say(f"warning: not as when it was written, in shared/: {', '.join(names)}")

    def _go_back(self) -> None:
        with writing(self.folder):
            put_aside(self.folder / "checkpoints", self.checkpoint)
            kept = self.metrics.drop_after(self.step)
        self.evaluation = next((line for line in reversed(kept) if "accuracy" in line), {})

    def save(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, loader: dict | None = None) -> None:
        """Write a checkpoint of this step; loader is a loader's state, the same on every process.

        What goes wrong with one within the run is said, and the next one is tried. Raises UserError at the run's end.
        """
        begin = time.perf_counter()
        torn = all_reduce_sum(self.accelerator, [self.torn])[0]
        self._say_unsaved(self.checkpoints.wait())
        try:
            self.checkpoints.agreed(self.metrics.to_disk, on_main=True)
            state = {"step": self.step, "torn": int(torn), "loader": loader}
            self.checkpoints.save(model, optimizer, scheduler, state, self._origin())
            if self.stopping and (error := self.checkpoints.wait()):
                raise error
            self.saved_step = self.step
        except SaveError as error:
            if self.stopping:
                raise UserError(
                    f"no checkpoint of step {self.step}: {error}; {self._newest()}. Start again."
                ) from error
            self._say_unsaved(error)
        # The last save waits for the one in the background that is at work then.
        at_end = self.checkpoints.seconds * (1 + self.run_config.async_checkpoint)
        self.interruption.reserve = at_end + self.evaluation_seconds
        self.step_end += time.perf_counter() - begin  # no time of training

    def _say_unsaved(self, error: SaveError | None) -> None:
        if error:
            self.say(f"warning: no checkpoint: {error}; {self._newest()}; training goes on, the next comes as planned")

    def _newest(self) -> str:
        return f"the newest one is {self.newest_checkpoint}" if self.newest_checkpoint else "there is none yet"

    def _origin(self) -> dict:
        """What a checkpoint's manifest says of where it came from."""
        return {
            "saved": datetime.now(UTC).isoformat(timespec="seconds"),
            "recipe": self.recipe,
            "strategy": strategy(),
            "world_size": self.accelerator.num_processes,
            "versions": versions(),
            "shared": self.shared_source,
            "accuracy": self.evaluation.get("accuracy") if self.evaluation.get("step") == self.step else None,
            "begun_from": self.begun_from,
            **{name: getattr(self.config, name) for name in SIZES if hasattr(self.config, name)},
        }

    # Training

    def observe(self, batch: Batch, loss: Tensor) -> None:
        """Count one micro-batch; loss is its mean, a scalar on the device. Call it before the backward pass: there a
        loss that is not finite makes every gradient so, and with the gradients' reduction all processes know it."""
        value = loss.detach()
        self.losses.append(value)
        self.samples.append(batch.indices)
        if strategy().startswith("zero"):
            # Its backward updates the weights too. Under fp16 it skips by itself, and ends where no scale helps.
            if mixed_precision() != "fp16" and not _all_finite(self.accelerator, value):
                self._stop_nonfinite(None)
        elif loss.requires_grad:
            loss.register_hook(lambda gradient: torch.where(value.isfinite(), gradient, math.nan))
        self.backward_follows = loss.requires_grad
        self.digest += batch.digest
        self.wait_seconds += batch.wait_seconds
        self.torn += len(batch.torn)

    def end_step(self, learning_rate: float, grad_norm: Tensor) -> None:
        """A global batch is done: every logging_steps a line goes to metrics.jsonl, the trackers and the bar.

        grad_norm is the norm before clipping.
        """
        logged, first = self.will_log, self.step == self.first_step
        if logged or first:
            loss = torch.stack(self.losses).mean().item()  # waits for the device
        self.step += 1
        self._count_time(first)
        self.bar.update()
        at_end = self.step % self.epoch_steps == 0
        if logged:
            self._log_step(loss, learning_rate, grad_norm)
        elif at_end:  # before its count is dropped
            self._refuse_torn_training(all_reduce_sum(self.accelerator, [self.torn])[0])
        self.losses, self.samples, self.digest = [], [], 0
        self.torn *= not at_end
        self._say_unsaved(self.checkpoints.failure())
        reason = self.interruption.agreed(self.step)
        if self.step < self.last_step:
            self.interrupted = reason

    def _count_time(self, first: bool) -> None:
        """Training time is that from the end of one step to the end of the next, less saves and evaluations between
        them. A start's first step has none: it waits for the first batch, compiles and tunes kernels."""
        now = time.perf_counter()
        if first:
            self.wait_seconds = 0.0
        else:
            self.train_steps, self.train_seconds = self.train_steps + 1, self.train_seconds + now - self.step_end
        self.step_end = now

    def is_finite(self, grad_norm: Tensor) -> bool:
        """Whether the optimizer may step: call it on every process before it does.

        A loss or a gradient that is not finite has, after the reduction, a norm that is finite on no process, so all
        agree without a message. Ends the run with UserError, or returns False under `--on_nonfinite skip`.
        """
        norm = _whole(grad_norm)
        finite = norm.isfinite().item()  # waits for the device, once a step
        if not self.backward_follows:  # a pipeline, which has done it when it knows the loss
            finite &= _all_finite(self.accelerator, torch.stack(self.losses))
        self.skipped = not (finite or self._scaler_skips())
        if self.skipped and self.run_config.on_nonfinite == "stop":
            self._stop_nonfinite(norm.item())
        return not self.skipped or mixed_precision() == "fp16"

    def _scaler_skips(self) -> bool:
        """Under fp16 the gradient scaler leaves such a step out itself, when the optimizer's is called, and halves its
        scale. A scale below 1 means that it is not the scale."""
        scaler = self.accelerator.scaler
        return mixed_precision() == "fp16" and (scaler is None or scaler.get_scale() >= 1)

    def _stop_nonfinite(self, norm: float | None) -> None:
        """Name the step, its samples and the way back; every process must call it. norm: None before the backward."""
        mine = {
            "rank": self.accelerator.process_index,
            "losses": [str(loss.item()) for loss in self.losses],
            "samples": [index for part in self.samples for index in part.tolist()],
        }
        everyone = [mine]
        if self.accelerator.num_processes > 1:
            everyone = [None] * self.accelerator.num_processes
            torch.distributed.all_gather_object(everyone, mine)
        guilty = [one for one in everyone if {"nan", "inf", "-inf"} & {*one["losses"]}] or everyone
        samples = sorted({index for one in guilty for index in one["samples"]})
        record = self.folder / "nonfinite.json"
        with contextlib.suppress(OSError):  # a full disk
            if self.accelerator.is_main_process:
                write_json(record, {"step": self.step + 1, "grad_norm": str(norm), "processes": everyone})
        late = norm is not None and strategy().startswith("zero")
        gradient = "" if norm is None else f" and the gradient norm {norm}"
        raise UserError(
            f"step {self.step + 1} has the losses {', '.join(guilty[0]['losses'])}{gradient}, "
            f"from samples {', '.join(map(str, samples[:16]))}{', ...' if len(samples) > 16 else ''} "
            f"(all in {record}). The weights are {'spoilt' if late else 'those before it'}; the last good checkpoint "
            f"is {self.newest_checkpoint or 'none'}. Lower --learning_rate, look at these samples, or give "
            "--on_nonfinite skip."
        )

    def _log_step(self, mean_loss: float, learning_rate: float, grad_norm: Tensor) -> None:
        size = data_parallel(self.accelerator)[1]
        # The digest in two halves: float64 adds 32-bit numbers exactly.
        parts = [mean_loss, self.digest >> 32 & 0xFFFFFFFF, self.digest & 0xFFFFFFFF, self.wait_seconds, self.torn]
        loss, high, low, wait, torn = all_reduce_sum(self.accelerator, parts)
        speed = self._speed(wait / size)
        self._log(
            {
                "step": self.step,
                "epoch": (self.step - 1) // self.epoch_steps,
                "samples": self.step * self.config.global_batch_size,
                "loss": _number(loss / size),
                "samples_digest": f"{((int(high) << 32) + int(low)) % 2**64:016x}",
                "learning_rate": learning_rate,
                "grad_norm": _number(_whole(grad_norm).item()),
                **speed,
                **({"torn": int(torn)} if torn else {}),
                **({"skipped": True} if self.skipped else {}),
            }
        )
        self._refuse_torn_training(torn)
        rate = {"images/s": f"{speed['samples_per_second']:.0f}"} if speed else {}
        self._show(loss=f"{loss / size:.4f}", **self._accuracy(), **rate)
        self.window_start, self.wait_seconds = (self.train_steps, self.train_seconds), 0.0

    def _speed(self, wait_seconds: float) -> dict[str, float]:
        """Of the training time since the last line; nothing where there is none: see _count_time."""
        steps, seconds = self.train_steps - self.window_start[0], self.train_seconds - self.window_start[1]
        if not steps:
            return {}
        rate = round(steps * self.config.global_batch_size / seconds, 1)
        return {"samples_per_second": rate, "data_wait_fraction": round(wait_seconds / seconds, 4)}

    def _accuracy(self) -> dict[str, str]:
        return {"accuracy": f"{self.evaluation['accuracy']:.2%}"} if self.evaluation else {}

    def _show(self, **values: str) -> None:
        self.shown |= values
        self.bar.set_postfix(self.shown, refresh=False)

    def _refuse_torn_training(self, torn: float) -> None:
        """torn: of the epoch so far, on all processes."""
        self._refuse_torn(int(torn), self.epoch_steps * self.config.global_batch_size)

    def _refuse_torn(self, torn: int, images: int) -> None:
        if torn > self.run_config.max_torn * images:
            raise UserError(
                f"{torn} of {images} images cannot be decoded; each is named above. Mend the data, or accept more: "
                f"--max_torn {torn / images * 1.5:.2g} (it is {self.run_config.max_torn:g})."
            )

    def log_evaluation(self, result: dict[str, float]) -> None:
        """Record accuracy, eval_loss and eval_samples (and eval_torn) after this step; also say them in a line."""
        self.evaluation_seconds = max(self.evaluation_seconds, time.perf_counter() - self.step_end)
        epoch = (self.step - 1) // self.epoch_steps
        self.evaluation = {"step": self.step, "epoch": epoch, **result}
        torn = result.get("eval_torn", 0)
        self._refuse_torn(torn, torn + result["eval_samples"])
        self._log(self.evaluation)
        if self.accelerator.is_main_process:
            self._write_summary("running")
        self._show(**self._accuracy())
        rate = f"  {self._rate():.0f} images/s" if self.train_steps else ""
        self.say(
            f"epoch {epoch + 1}/{self.config.epochs}  step {self.step}  accuracy {result['accuracy']:.2%}  "
            f"eval loss {result['eval_loss']:.4f}{rate}"
        )
        self.step_end = time.perf_counter()

    def _log(self, line: dict) -> None:
        numbers = {name: value for name, value in line.items() if not isinstance(value, str) and name != "step"}
        if self.accelerator.is_main_process:
            with self._bearing("metrics.jsonl"):
                self.metrics.append(line)
        with self._bearing("the trackers' log"):
            try:
                self.accelerator.log(numbers, step=line["step"])
            except OSError:
                self.accelerator.trackers = []  # they would fail ever after
                raise

    @contextlib.contextmanager
    def _bearing(self, name: str) -> Iterator[None]:
        """What cannot be written is said once, and the training goes on."""
        try:
            yield
        except OSError as error:
            if name not in self.warned:
                self.say(f"warning: {name} cannot be written: {error.strerror or error}; training goes on")
            self.warned.add(name)

    def _rate(self) -> float:
        """Images a second over the training time of this start, 0 before its second step."""
        return self.train_steps * self.config.global_batch_size / max(self.train_seconds, 1e-9)

    # Trackers and trace

    def _start_trackers(self, names: list[str]) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        # Files, not SQLite: the client alone has no database, and a parallel file system is no place for one.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_TRACKING_URI", (self.folder / "mlflow").resolve().as_uri())
        self.accelerator.project_configuration.set_directories(str(self.folder))
        self.accelerator.project_configuration.logging_dir = str(self.folder / "tensorboard")
        self.accelerator.log_with = filter_trackers(names, self.folder)
        values = {name: value for name, value in self.identity.items() if isinstance(value, str | int | float)}
        self.accelerator.init_trackers(self.recipe, values, {"wandb": {"dir": str(self.folder)}})

    @contextlib.contextmanager
    def profiling(self, first_evaluation_batches: int) -> Iterator[None]:
        """With --profile: trace the last training steps before the first evaluation and that one's first batches."""
        if not self.run_config.profile or self.finished:
            yield
            return
        steps = min(self.epoch_steps - self.step % self.epoch_steps, self.last_step - self.step)
        traced = min(TRACED, steps)
        window = {"skip_first": max(steps - traced - 1, 0), "wait": 0, "warmup": min(1, steps - traced)}
        window |= {"active": traced + min(TRACED, first_evaluation_batches), "repeat": 1}
        folder = self.folder / "profile"
        with self.accelerator.profile(ProfileKwargs(schedule_option=window, output_trace_dir=str(folder))) as profiler:
            self.profiler = profiler
            yield
        self.say(f"trace of {traced} training steps and the evaluation: {folder}/profile_0.json")

    # The end

    def finish(self) -> None:
        """Write summary.json, unless a former start has; say the result and where everything is.

        Raises UserError where the run was interrupted and has no checkpoint of it: it is not one to go on from.
        """
        if not self.finished:
            self.bar.close()
            self.interruption.close()
            if self.interrupted and self.saved_step != self.step:
                raise UserError(f"interrupted at step {self.step}, and this recipe keeps no checkpoints. Start again.")
            if self.accelerator.is_main_process:
                reason = "epochs" if self.last_step == self.total_steps else "max_steps"
                status = "interrupted" if self.interrupted else "finished"
                self._write_summary(status, stop_reason=self.interrupted or reason)
        self._show_result()

    def _show_result(self) -> None:
        if not self.accelerator.is_main_process:
            return  # the file may not be written yet
        summary = read_json(self.folder / "summary.json")
        if self.interrupted:
            self.say(f"interrupted ({self.interrupted}) at step {self.step} of {self.total_steps}; the checkpoint is")
            self.say(f"  {self.newest_checkpoint}")
            return self.say("The same command goes on from there.")
        rate = f", {summary['samples_per_second']} images/s" if summary.get("samples_per_second") else ""
        self.say(
            f"{'already ' if self.finished else ''}finished: top-1 accuracy {summary.get('accuracy', 0):.2%}, "
            f"{summary.get('steps')} steps, {summary.get('seconds')} s{rate}"
        )
        for name in ("summary.json", "metrics.jsonl", "tensorboard"):
            if (self.folder / name).exists():
                self.say(f"  {self.folder / name}")
        if self.finished:
            self.say(f"To start afresh: rm -r {self.folder}, or give another --output_dir or --seed.")

    def _write_summary(self, status: str, **more) -> None:
        before = self.former.get("seconds", 0) if self.checkpoint else 0
        summary = {
            "status": status,
            **more,
            "accuracy": self.evaluation.get("accuracy"),
            "steps": self.step,
            "samples": self.step * self.config.global_batch_size,
            "seconds": round(before + time.perf_counter() - self.launched, 2),
            "samples_per_second": round(self._rate(), 1) or None,  # see _count_time
            "peak_memory_bytes": _peak_memory(self.accelerator.device),
            "world_size": self.accelerator.num_processes,
            "data_parallel_size": data_parallel(self.accelerator)[1],
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with self._bearing("summary.json"):
            write_json(self.folder / "summary.json", summary)

    def say(self, line: str) -> None:
        """Print one line from rank 0, above the bar."""
        if self.accelerator.is_main_process:
            tqdm.write(line)
            sys.stdout.flush()


def _trackers(report_to: str) -> list[str]:
    names = [name for name in report_to.split(",") if name and name != "none"]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"--report_to {name} is unknown. Known: none, {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}.")
        if name not in map(str, get_available_trackers()):
            raise UserError(f"--report_to {name} is not installed. Install it (pip install {name}), or leave it out.")
    return names


def _fingerprint(sources: list[Source]) -> str:
    return " ".join(source.fingerprint() for source in sources)


def _difference(name: str, former: list, value) -> str:
    """Such as `seed was 0, is 1`; of lists, the first place where they differ."""
    was = next(each for each in former if str(each) != str(value))
    if isinstance(was, list) and isinstance(value, list):
        pairs = enumerate(itertools.zip_longest(was, value))
        place, (was, value) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        name = f"{name}[{place}]"
    return f"{name} was {was}, is {value}"


def _refuse_pairs(run_config: RunConfig, config) -> None:
    """What does not go together; raises UserError."""
    if run_config.on_nonfinite == "skip" and getattr(config, "norm", "") == "batch":
        raise UserError("batch norm's statistics would keep a nan. Give --norm group beside --on_nonfinite skip.")
    if not strategy().startswith("zero"):
        return
    if run_config.async_checkpoint:
        raise UserError("DeepSpeed writes its state itself. Leave --async_checkpoint out under ZeRO.")
    if run_config.on_nonfinite == "skip":
        raise UserError("DeepSpeed's backward pass updates the weights too. Leave --on_nonfinite skip out under ZeRO.")


def _checkpoint_steps(value: str, epoch_steps: int) -> int:
    if value == "epoch":
        return epoch_steps
    if not value.isdigit() or int(value) < 1:
        raise UserError(f"--checkpointing_steps {value} is neither the word epoch nor a number of steps from 1 on.")
    return int(value)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the allocator on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _whole(norm: Tensor | float) -> Tensor:
    """The gradient's norm as one plain scalar; DeepSpeed gives a number."""
    return norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)


def _number(value: float) -> float | None:
    """JSON has neither nan nor inf."""
    return value if math.isfinite(value) else None


def _all_finite(accelerator: Accelerator, losses: Tensor) -> bool:
    """On every process; the answer is the same on all of them."""
    infinite = (~losses.isfinite()).any().float()
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(infinite)
    return infinite.item() == 0

# SPDX-License-Identifier: Apache-2.0
"""Give a recipe's loop one object, `Run`: a facade over parts that each have one subject."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..checkpoint import Checkpoints, Saves, load_checkpoint, origin
from ..collectives import all_reduce_sum, data_parallel, on_main_process
from ..config import RunConfig
from ..contracts import Batch, Loader
from ..errors import UserError
from ..launch import strategy
from ..metrics import ACCURACY, Metric
from . import identity, profile
from .folder import Folder
from .interruption import Interruption
from .lines import Lines
from .log import Log, known_trackers
from .nonfinite import NonFinite, refuse_pairs
from .phases import Ledger
from .position import Position
from .summary import Summary
from .tally import Tally


class Run(Position):
    """A run's position and folder. Every process makes one and calls every method; only rank 0 writes.

    The constructor locks the folder, refuses another run's configuration, and finds what to resume: `checkpoint` (None
    for a fresh start). It raises UserError before anything in the folder has changed.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_config: RunConfig,
        data_config,
        config,
        train_loader: Loader,
        eval_loader: Loader,
        metric: Metric = ACCURACY,
    ):
        super().__init__(run_config, train_loader.order.steps_per_epoch, config.epochs)
        trackers = known_trackers(run_config.report_to)
        refuse_pairs(run_config, config, strategy())
        self.accelerator, self.traced = accelerator, run_config.profile
        self.changed = run_config.resume_override.replace(",", " ").split()
        data = on_main_process(accelerator, lambda: (train_loader.describe(), eval_loader.describe()))
        values, self.folder = identity.of_run(run_config, data_config, config, *data)
        self.files = Folder(self.folder)
        claim = on_main_process(accelerator, self.files.claim, run_config, values)
        self.checkpoint, self.finished = claim.checkpoint, claim.finished(self.last_step)
        self.log, self.ledger, self.tally = Log(accelerator, self.folder), Ledger(), Tally()
        self.lines = Lines(accelerator, self.log, train_loader, metric, data[0].unit, config)
        self.summary = Summary(accelerator, self, self.files, self.ledger, self.lines, claim)
        self.nonfinite = NonFinite(accelerator, run_config.on_nonfinite, self.files)
        self.profiler = SimpleNamespace(step=lambda: None)
        if self.finished:
            return
        self.log.say("\n".join(self.summary.opening_lines(*data, config)))
        on_main_process(accelerator, self.summary.begin, (run_config, data_config, config), values, data[0])
        kept = run_config.keep_checkpoints, run_config.async_checkpoint
        checkpoints = Checkpoints(self.files.checkpoints, accelerator, values, *kept)
        source = origin.origin(accelerator, config, claim.begun_from)
        self.saves = Saves(checkpoints, self.say, self.log.metrics.to_disk, source)
        self.interruption = Interruption(accelerator, self.folder, run_config.time_limit)
        self.log.open(trackers, values, self.last_step)
        train_loader.noted = eval_loader.noted = self.interruption.noted

    def observe(self, batch: Batch, loss: Tensor) -> None:
        """Count one micro-batch. loss: this process's share of the step's loss, a scalar on the device."""
        self.tally.add(batch, loss)
        self.ledger.wait_seconds += batch.wait_seconds

    def skips(self, grad_norm: Tensor | float) -> bool:
        """Return whether to skip this step's update: never under `--on_nonfinite stop`. `skip` waits for the device.

        Call it once per step, on every process: `check_finite` reads what it notes.
        """
        self.nonfinite.note(self.step + 1, grad_norm, self.tally.losses, self.tally.samples)
        return self.nonfinite.skips_update()

    def check_finite(self) -> None:
        """Raise UserError, on every process, where the step before the last one was not finite. The last step's
        norm is still on its way from the device."""
        self.nonfinite.check(but_last=True)

    def stop(self) -> None:
        """Raise UserError for the step being computed, whose loss is not finite on some process."""
        self.nonfinite.note(self.step + 1, math.nan, self.tally.losses, self.tally.samples)
        self.nonfinite.check()

    def end_step(self, learning_rate: float, grad_norm: Tensor | float) -> None:
        """Count a finished global batch; every logging_steps, log it to metrics.jsonl, the trackers and the bar.

        grad_norm: the norm before clipping.
        """
        logged, first = self.will_log, self.step == self.first_step
        if logged or first:
            self.tally.loss()  # waits for the device
        self.step += 1
        self.ledger.end_step(first)
        self.log.bar.update()
        if logged:
            self.nonfinite.check()
            self.lines.add_step(self, self.tally, self.ledger, learning_rate, grad_norm)
        elif self.at_epoch_end:
            self.lines.end_epoch(self, self.tally)
        self.tally.end_step(self.at_epoch_end)
        self.saves.report()
        reason = self.interruption.agreed(self.step)
        if self.step < self.last_step:
            self.interrupted = reason

    def log_evaluation(self, result: dict[str, float]) -> None:
        """Record the metric, eval_loss and eval_samples after this step, and print them in one line."""
        self.nonfinite.check()
        self.ledger.end_evaluation()
        self.lines.add_evaluation(self, self.ledger, result)
        self.summary.write("running")

    def save(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, loader: dict | None = None) -> None:
        """Write a checkpoint of this step. loader: the state of a loader, the same on every process.

        Within the run a failed save is only a warning, and the next one is tried. Raises UserError for a failed save
        at the run's end, and for a step that was not finite.
        """
        begin = time.perf_counter()
        self.nonfinite.check()
        (rejected,) = all_reduce_sum(self.accelerator, [self.tally.rejected])
        state = {"step": self.step, "rejected": int(rejected), "loader": loader}
        self.saves.save(model, optimizer, scheduler, state, self.lines.measured_at(self.step), self.stopping)
        self.interruption.reserve = self.saves.reserve + self.ledger.evaluation_seconds
        self.ledger.end_save(time.perf_counter() - begin)

    def resume(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Load the checkpoint; drop later lines from metrics.jsonl, and quarantine later checkpoints."""
        state = load_checkpoint(self.checkpoint, self.accelerator, model, optimizer, scheduler, self.changed)
        self.step = self.first_step = self.saves.saved_step = state["step"]
        self.tally.rejected = state["rejected"] if data_parallel(self.accelerator)[0] == 0 else 0
        self.lines.resume(on_main_process(self.accelerator, self.files.go_back, self.checkpoint, self.log.metrics))
        self.log.begin_at(self.step)
        self.say(f"resumed at step {self.step} of {self.total_steps}")
        if line := origin.warn_of_changes(self.checkpoint):
            self.say(line)

    def profiling(self, evaluation_batches: int) -> AbstractContextManager:
        """Trace, with --profile, the last training steps before the first evaluation, and its first batches."""
        return profile.tracing(self, evaluation_batches) if self.traced and not self.finished else nullcontext()

    def finish(self) -> None:
        """Write summary.json, unless a previous start has; print the result and where the files are.

        Raises UserError where the run was interrupted without a checkpoint of its last step: it cannot be resumed.
        """
        if not self.finished:
            self.nonfinite.check()
            self.log.bar.close()
            self.interruption.close()
            if self.interrupted and self.saves.saved_step != self.step:
                raise UserError(f"interrupted at step {self.step}, and this recipe keeps no checkpoints. Start again.")
            self.summary.write_end()
        self.summary.show(self.finished)

    def say(self, line: str) -> None:
        """Print one line from rank 0, above the bar."""
        self.log.say(line)

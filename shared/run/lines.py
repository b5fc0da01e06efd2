# SPDX-License-Identifier: Apache-2.0
"""Write the lines of steps and evaluations: to metrics.jsonl, beside the bar and on the terminal."""

import math

from accelerate import Accelerator
from torch import Tensor

from ..collectives import all_reduce_sum, data_parallel
from ..contracts import Loader
from ..metrics import Metric
from .log import Log
from .nonfinite import whole
from .phases import Ledger
from .position import Position
from .tally import Tally


class Lines:
    """A run's measurements, line by line. Raises UserError where the share of rejected samples is too large."""

    def __init__(self, accelerator: Accelerator, log: Log, loader: Loader, metric: Metric, unit: str, config):
        self.accelerator, self.log, self.loader, self.metric = accelerator, log, loader, metric
        self.unit, self.batch, self.epochs = unit, config.global_batch_size, config.epochs
        self.evaluation: dict = {}  # the line of the last evaluation

    def add_step(
        self, position: Position, tally: Tally, ledger: Ledger, learning_rate: float, grad_norm: Tensor | float
    ) -> None:
        """Log the last step; every process must call it."""
        norm = whole(grad_norm).item()
        loss, digest, wait, rejected = tally.over_all(self.accelerator, ledger.wait_seconds)
        speed = ledger.close_window(self.batch, wait / data_parallel(self.accelerator)[1])
        self.log.write(
            {
                "step": position.step,
                "epoch": position.epoch,
                "samples": position.step * self.batch,
                "loss": _number(loss),
                "samples_digest": digest,
                "learning_rate": learning_rate,
                "grad_norm": _number(norm),
                **speed,
                **({self.loader.rejects: rejected} if rejected else {}),
                **({} if math.isfinite(norm) else {"skipped": True}),
            }
        )
        self.loader.check_rejected(rejected, position.epoch_steps * self.batch)
        rate = {f"{self.unit}/s": f"{speed['samples_per_second']:.0f}"} if speed else {}
        self.log.show(loss=f"{loss:.4f}", **self.headline(), **rate)

    def end_epoch(self, position: Position, tally: Tally) -> None:
        """Check the epoch's rejected samples before their count is reset, where its last step gets no line."""
        (rejected,) = all_reduce_sum(self.accelerator, [tally.rejected])
        self.loader.check_rejected(int(rejected), position.epoch_steps * self.batch)

    def add_evaluation(self, position: Position, ledger: Ledger, result: dict[str, float]) -> None:
        """Log an evaluation. result: the metric, eval_loss, eval_samples and, if any, the number of rejected
        samples."""
        self.evaluation = {"step": position.step, "epoch": position.epoch, **result}
        rejected = result.get(f"eval_{self.loader.rejects}", 0)
        self.loader.check_rejected(rejected, rejected + result["eval_samples"])
        self.log.write(self.evaluation)
        self.log.show(**self.headline())
        rate = f"  {ledger.rate(self.batch):.0f} {self.unit}/s" if ledger.train_steps else ""
        self.log.say(
            f"epoch {position.epoch + 1}/{self.epochs}  step {position.step}  {self.metric.name} "
            f"{self.headline()[self.metric.name]}  eval loss {result['eval_loss']:.4f}{rate}"
        )

    def measured_at(self, step: int) -> dict:
        """Return the evaluation's part of the manifest of this step's checkpoint."""
        measured, name = self.evaluation if self.evaluation.get("step") == step else {}, self.metric.name
        averaged = {key: value for key, value in measured.items() if key.startswith("ema_")}
        values = {name: measured.get(name), "metric": name, "higher_is_better": self.metric.higher_is_better}
        return values | averaged

    def resume(self, lines: list[dict]) -> None:
        """Take the last evaluation from a previous start's lines."""
        self.evaluation = next((line for line in reversed(lines) if self.metric.name in line), {})
        self.log.show(**self.headline())

    def headline(self) -> dict[str, str]:
        """Return the last evaluation's metric, formatted for people; {} before the first evaluation."""
        return {self.metric.name: self.metric.text(self.evaluation[self.metric.name])} if self.evaluation else {}


def _number(value: float) -> float | None:
    """Return the value, or None for nan and inf, which JSON does not have."""
    return value if math.isfinite(value) else None

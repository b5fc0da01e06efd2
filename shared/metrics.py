# SPDX-License-Identifier: Apache-2.0
"""Name the metric of a run; evaluate so that every sample counts once on any number of processes."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from .collectives import all_reduce_sum
from .errors import UserError

IGNORED = -100  # the label of a sample that is left out; torch's cross-entropy skips it


class Metric(NamedTuple):
    """The headline of an evaluation, used by the best checkpoint, the progress bar and the summary."""

    name: str  # its field in metrics.jsonl and summary.json
    higher_is_better: bool
    form: str = "{:.4f}"  # how it is shown
    title: str = ""  # in the last line; empty = its name

    def text(self, value: float | None) -> str:
        return self.form.format(value or 0.0)


ACCURACY = Metric("accuracy", higher_is_better=True, form="{:.2%}", title="top-1 accuracy")


class Evaluation:
    """Top-1 accuracy, mean cross-entropy and the number of samples, summed batch by batch."""

    def __init__(self):
        self.sums: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Add a batch: logits (B, classes), labels (B,), and valid (B,), False where a sample is only padding."""
        losses = cross_entropy(logits.float(), labels, reduction="none")
        correct = logits.argmax(dim=1) == labels
        # Kept on the device: a copy to the host would make every batch wait for the one before.
        counts = [(correct & valid).sum(), losses.where(valid, 0).sum(), valid.sum(), (labels == IGNORED).sum()]
        self.sums.append(torch.stack(counts))

    def result(self, accelerator: Accelerator, expected_samples: int) -> dict[str, float]:
        """Return accuracy (0 to 1), eval_loss (nats) and eval_samples over all processes, and eval_undecodable where
        images could not be decoded and were left out. Raises UserError where none could."""
        sums = torch.stack(self.sums).cpu().double().sum(dim=0).tolist()
        correct, loss, count, rejected = all_reduce_sum(accelerator, sums)
        assert count + rejected == expected_samples, f"{count} + {rejected} of {expected_samples} were evaluated"
        if not count:
            raise UserError(f"none of {expected_samples} held-out images can be decoded. Fix those named above.")
        left_out = {"eval_undecodable": int(rejected)} if rejected else {}
        return {"accuracy": correct / count, "eval_loss": loss / count, "eval_samples": int(count), **left_out}

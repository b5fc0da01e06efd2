# SPDX-License-Identifier: Apache-2.0
"""Name what a run is judged by; evaluate so that every sample counts once, on any number of processes."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from .collectives import all_reduce_sum
from .errors import UserError

IGNORED = -100  # the label of a sample that is left out: torch's cross-entropy ignores it


class Metric(NamedTuple):
    """The headline of an evaluation: best checkpoint, bar and summary use it."""

    name: str  # its field in metrics.jsonl and summary.json
    higher_is_better: bool
    form: str = "{:.4f}"  # how a person reads it
    title: str = ""  # in the last line; empty = its name

    def text(self, value: float | None) -> str:
        return self.form.format(value or 0.0)


ACCURACY = Metric("accuracy", higher_is_better=True, form="{:.2%}", title="top-1 accuracy")


class Evaluation:
    """Sums over an evaluation set: top-1 accuracy, mean cross-entropy, and the number of samples that were counted."""

    def __init__(self):
        self.sums: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Take one batch: logits (B, classes), labels (B,), valid (B,) False where a sample only pads the batch."""
        losses = cross_entropy(logits.float(), labels, reduction="none")
        correct = logits.argmax(dim=1) == labels
        # Stays on the device: a copy to the host here would make every batch wait for the one before.
        counts = [(correct & valid).sum(), losses.where(valid, 0).sum(), valid.sum(), (labels == IGNORED).sum()]
        self.sums.append(torch.stack(counts))

    def result(self, accelerator: Accelerator, expected_samples: int) -> dict[str, float]:
        """Accuracy (0 to 1), eval_loss (nats) and eval_samples over all processes; eval_undecodable where images were
        left out because they could not be decoded. Raises UserError where all were."""
        sums = torch.stack(self.sums).cpu().double().sum(dim=0).tolist()
        correct, loss, count, rejected = all_reduce_sum(accelerator, sums)
        assert count + rejected == expected_samples, f"{count} + {rejected} of {expected_samples} were evaluated"
        if not count:
            raise UserError(f"not one of {expected_samples} held-out images can be decoded; each is named above.")
        left_out = {"eval_undecodable": int(rejected)} if rejected else {}
        return {"accuracy": correct / count, "eval_loss": loss / count, "eval_samples": int(count), **left_out}

# SPDX-License-Identifier: Apache-2.0
"""Evaluate a language model: bits per byte compare networks whose tokens differ."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from ..collectives import all_reduce_sum
from ..metrics import IGNORED, Metric

BITS_PER_BYTE = Metric("bits_per_byte", higher_is_better=False, title="bits per byte")


class Evaluation:
    """Negative log-likelihood, in nats, summed over the counted tokens, batch by batch."""

    def __init__(self):
        self.sums: list[Tensor] = []

    def add(self, loss: Tensor, labels: Tensor) -> None:
        """Add a batch: its summed loss, a scalar, and labels (B, S)."""
        self.sums.append(torch.stack([loss.double(), (labels != IGNORED).sum().double()]))

    def result(self, accelerator: Accelerator, samples: int, byte_count: int) -> dict[str, float]:
        """Return bits_per_byte, perplexity and eval_loss (nats per token) over all processes.

        byte_count: of the text that the counted tokens spell; a document's end is a token more, and no byte.
        """
        loss, count = all_reduce_sum(accelerator, torch.stack(self.sums).cpu().sum(dim=0).tolist())
        mean = loss / count
        bits = loss / math.log(2) / byte_count
        perplexity = math.exp(min(mean, 700.0))
        return {"bits_per_byte": bits, "perplexity": perplexity, "eval_loss": mean, "eval_samples": samples}

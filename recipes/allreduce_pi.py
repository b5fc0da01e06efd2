# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "accelerate>=1.10", "transformers>=4.57", "numpy>=2"]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Run a first collective: each process sums its share of an integral, and one all-reduce gives all of them pi.

Base: none.

    python recipes/allreduce_pi.py
    accelerate launch --config_file accelerate_configs/local_ddp.yaml --num_processes 4 recipes/allreduce_pi.py

When: every process needs the sum of what all hold. In a ring of n processes each sends 2 (n - 1) / n of the tensor:
for DDP's gradients of ViT-S, 84 MiB, 126 on 4 processes (benchmarks/results/communication_cpu2_2026-11-23.json).
"""

import math
from dataclasses import dataclass

import torch
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator
from shared.config import parse
from shared.errors import UserError

MOST = 10**8  # intervals: on one process they need four arrays of 8 bytes each, 3.2 GB


@dataclass
class Config:
    """The settings of the sum."""

    intervals: int = HfArg(default=1_000_000, help="rectangles under the curve, over all processes")
    gradient_accumulation_steps = 1  # no flag: build_accelerator reads it, and nothing is trained here


def main(config):
    if not 1 <= config.intervals <= MOST:
        raise UserError(f"--intervals {config.intervals} is out of range. Give a value from 1 to {MOST}.")
    accelerator = build_accelerator(0, config)
    count, rank, world = config.intervals, accelerator.process_index, accelerator.num_processes
    # pi is the integral of 4 / (1 + x^2) from 0 to 1, here by the midpoint rule.
    share = torch.arange(count * rank // world, count * (rank + 1) // world, device=accelerator.device)
    x = (share.double() + 0.5) / count
    pi = (4 / (1 + x * x)).sum() / count
    if world > 1:
        torch.distributed.all_reduce(pi)  # in: a term on each process; out: the sum, on every process
    accelerator.print(
        f"pi = {pi.item():.15f}, off by {abs(pi.item() - math.pi):.1e} ({count} intervals, {world} processes)"
    )
    accelerator.wait_for_everyone()
    accelerator.end_training()


CONFIGS = (Config,)

if __name__ == "__main__":
    main(*parse(*CONFIGS))

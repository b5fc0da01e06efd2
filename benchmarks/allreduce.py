# SPDX-License-Identifier: Apache-2.0
"""Measure the bandwidth of data parallelism's all-reduce by message size: NCCL on GPUs, gloo on CPU processes.

    accelerate launch --config_file accelerate_configs/local_ddp.yaml --num_processes 2 benchmarks/allreduce.py
    sbatch --nodes=2 --time=00:10:00 -A PROJECT@h100 slurm/h100.slurm ddp benchmarks/allreduce.py   # not yet run

Each size is reduced in rounds, in turn with the others, after one that warms up. The time of a round is the slowest
process's. `algorithm` is bytes over time; `bus` is what each process's link carries for it in a ring,
2 (n - 1) / n of that for n processes, which can be compared between numbers of processes and with the link's rate
(NVIDIA's nccl-tests, doc/PERFORMANCE.md). Then the gradients of ResNet-50 and ViT-B, in DDP's buckets of 25 MiB.
Prints a table and writes benchmarks/results/allreduce_<hardware>_<date>.json.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from accelerate import Accelerator
from report import median_and_spread, table, write
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator
from shared.config import parse
from shared.errors import UserError

MIB = 2**20
BUCKET_BYTES = 25 * MIB  # DDP's default
GRADIENTS = {"ResNet-50": 25_557_032, "ViT-B/16": 86_567_656}  # parameters, in fp32


@dataclass
class Config:
    """The messages to send."""

    largest: int = HfArg(default=256, help="largest message, MiB; sizes start at 4 KiB, by factors of 4")
    rounds: int = HfArg(default=10, help="rounds of each size, after one that warms up")
    gradient_accumulation_steps = 1  # no flag: build_accelerator reads it, and nothing is trained here


def main(config: Config) -> None:
    if config.largest < 1 or config.rounds < 1:
        raise UserError("--largest and --rounds must be at least 1. Change them.")
    accelerator = build_accelerator(0, config)
    if accelerator.num_processes < 2:
        raise UserError("one process has nothing to reduce with. Give --num_processes 2 or more.")
    sizes = [size for size in (4096 * 4**power for power in range(20)) if size <= config.largest * MIB]
    messages = {f"{size // MIB} MiB" if size >= MIB else f"{size // 1024} KiB": [size] for size in sizes}
    messages |= {f"gradients of {name}": buckets(4 * count) for name, count in GRADIENTS.items()}
    times = {name: [] for name in messages}
    buffer = torch.zeros(max(map(max, messages.values())) // 4, device=accelerator.device)
    for _ in range(1 + config.rounds):
        for name, parts in messages.items():
            times[name].append(slowest(accelerator, lambda parts=parts: reduce(buffer, parts)))
    rows = [row(name, sum(parts), times[name][1:], accelerator.num_processes) for name, parts in messages.items()]
    if accelerator.is_main_process:
        report(rows, accelerator)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def buckets(size: int) -> list[int]:
    return [min(BUCKET_BYTES, size - begin) for begin in range(0, size, BUCKET_BYTES)]


def reduce(buffer: torch.Tensor, parts: list[int]) -> None:
    """Reduce all parts at once, as DDP does during the backward."""
    for work in [dist.all_reduce(buffer[: size // 4], async_op=True) for size in parts]:
        work.wait()


def slowest(accelerator: Accelerator, function: Callable[[], None]) -> float:
    """Return the seconds from when all processes are ready until the last one is done."""
    accelerator.wait_for_everyone()
    begin = time.perf_counter()
    function()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64, device=accelerator.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def row(name: str, size: int, seconds: list[float], processes: int) -> dict:
    rates = [size / 1e9 / value for value in seconds]
    bus = [2 * (processes - 1) / processes * rate for rate in rates]
    milliseconds = [1000 * value for value in seconds]
    return {
        "message": name,
        "milliseconds": median_and_spread(milliseconds),
        "algorithm, GB/s": median_and_spread(rates),
        "bus, GB/s": median_and_spread(bus),
    }


def report(rows: list[dict], accelerator: Accelerator) -> None:
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    place = {"backend": dist.get_backend(), "processes": accelerator.num_processes, "processes_per_node": local}
    print(table(rows))
    print(" ".join(f"{name} {value}" for name, value in place.items()))
    print(write("allreduce", rows, **place))


if __name__ == "__main__":
    main(*parse(Config))

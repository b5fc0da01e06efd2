# SPDX-License-Identifier: Apache-2.0
"""Build the Accelerator that the launcher asked for, on GPUs or, without them, on CPU processes."""

import ctypes
import os
import signal
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed

from .config import UserError

# Compute capability from which a GPU has the format in hardware; V100 is 7.0 (torch emulates bf16 there and says yes).
LEAST_CAPABILITY = {"bf16": (8, 0), "fp8": (8, 9)}


def mixed_precision() -> str:
    """`no`, `fp16`, `bf16` or `fp8`: the YAML's, which the launcher passes on."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def build_accelerator(seed: int, gradient_accumulation_steps: int = 1) -> Accelerator:
    """The Accelerator of this process, with every rank's random state seeded alike.

    Raises UserError for a precision that the device lacks, for more processes than GPUs, and for an accumulation set
    outside the recipe's configuration.
    """
    _die_with_launcher()
    on_cpu = _forced_cpu() or not torch.cuda.is_available()
    _check_precision(on_cpu)
    _check_processes(on_cpu)
    if "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in os.environ:
        raise UserError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS, or this key in the YAML, overrides the recipe's flag. "
            "Remove it and give --gradient_accumulation_steps."
        )
    accelerator = Accelerator(
        # One process without CUDA keeps Accelerate's own choice (MPS on a Mac); several talk through gloo.
        cpu=_forced_cpu() or (on_cpu and _world_size() > 1),
        gradient_accumulation_steps=gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        project_config=ProjectConfiguration(),
    )
    assert accelerator.num_processes == _world_size()
    # The launcher exports OMP_NUM_THREADS=1 whatever the machine.
    torch.set_num_threads(max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    set_seed(seed)
    return accelerator


def data_parallel(accelerator: Accelerator) -> tuple[int, int]:
    """Rank and size among the processes that see different samples."""
    return accelerator.process_index, accelerator.num_processes


def micro_batch_size(accelerator: Accelerator, global_batch_size: int, gradient_accumulation_steps: int) -> int:
    """Images per forward of one process; raises UserError where the global batch does not divide."""
    _, size = data_parallel(accelerator)
    parts = size * gradient_accumulation_steps
    if global_batch_size % parts:
        near = (global_batch_size // parts * parts, -(-global_batch_size // parts) * parts)
        raise UserError(
            f"--global_batch_size {global_batch_size} does not divide by {size} data-parallel processes x "
            f"{gradient_accumulation_steps} accumulation steps. "
            f"Give {' or '.join(str(value) for value in near if value)}."
        )
    return global_batch_size // parts


def all_reduce_sum(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Sum each value over the data-parallel processes, in float64; every process gets the result."""
    if data_parallel(accelerator)[1] == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def on_main_process(accelerator: Accelerator, function, *arguments):
    """Call on rank 0 alone and give every rank its result, or its UserError."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function(*arguments)
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _forced_cpu() -> bool:
    """By `use_cpu` of a YAML for one process, or by local_cpu.yaml, which hides the GPUs from any number of them."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("-1")
    return hidden or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")


def _check_precision(on_cpu: bool) -> None:
    precision = mixed_precision()
    if on_cpu:
        # Accelerate would train in fp32 and report fp16.
        if precision in ("fp16", "fp8") and not torch.backends.mps.is_available():
            raise UserError(f"{precision} needs a GPU. Set mixed_precision to no or bf16 in the YAML.")
        return
    least = LEAST_CAPABILITY.get(precision, (0, 0))
    if torch.cuda.get_device_capability() < least:
        name = torch.cuda.get_device_name()
        raise UserError(
            f"{name} has no {precision} in hardware. Set mixed_precision to {'fp16' if least == (8, 0) else 'bf16'}."
        )


def _check_processes(on_cpu: bool) -> None:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not on_cpu and local > torch.cuda.device_count():
        raise UserError(
            f"{local} processes on a machine with {torch.cuda.device_count()} GPUs. Lower --num_processes, "
            "or use accelerate_configs/local_cpu.yaml."
        )


def _die_with_launcher() -> None:
    """Ask Linux to kill this worker when its launcher dies: a killed launcher leaves its workers running."""
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

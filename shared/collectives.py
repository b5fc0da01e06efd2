# SPDX-License-Identifier: Apache-2.0
"""Exchange numbers and results among the processes of a launch."""

import functools
from datetime import timedelta

import torch
from accelerate import Accelerator

from .errors import UserError


def data_parallel(accelerator: Accelerator) -> tuple[int, int]:
    """Return this process's rank among the data-parallel processes, which see different samples, and their number."""
    if accelerator.mesh is None:
        return 0, 1
    return accelerator.mesh.get_local_rank("dp"), accelerator.mesh["dp"].size()


def all_reduce_sum(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Sum each value over the data-parallel processes, in float64; every process gets the sums."""
    if data_parallel(accelerator)[1] == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(total, group=accelerator.mesh["dp"].get_group())
    return total.tolist()


def on_main_process(accelerator: Accelerator, function, *arguments):
    """Call the function on rank 0 alone; every rank gets its result, or raises its UserError."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function(*arguments)
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, src=0, group=_patient_group())
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


@functools.cache
def _patient_group() -> torch.distributed.ProcessGroup:
    """Make a group for long waits on rank 0, which reads checkpoints or lists data: NCCL gives up after 10 minutes."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=3))

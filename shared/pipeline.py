# SPDX-License-Identifier: Apache-2.0
"""A pipeline stage that measures itself, beside what the theory says of it."""

import contextlib
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.distributed.pipelining import PipelineStage


class MeasuredStage(PipelineStage):
    """torch's stage; while `measuring`, it notes the seconds it computes and the bytes that wait for a backward."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.measuring, self.waiting, self.chunk_bytes = False, 0, 0
        self.busy, self.most_waiting, self.idle = 0.0, 0, 0.0

    @contextlib.contextmanager
    def measure(self, wanted: bool) -> Iterator[None]:
        """Around one call of the schedule."""
        self.measuring, self.busy, self.most_waiting, begin = wanted, 0.0, 0, time.perf_counter()
        yield
        if wanted:
            self.measuring = False
            self.idle = 1 - self.busy / (time.perf_counter() - begin)

    def forward_one_chunk(self, *arguments, **keywords):
        if not (self.measuring and torch.is_grad_enabled()):
            return super().forward_one_chunk(*arguments, **keywords)
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.submod.parameters()}
        kept = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            result = self._timed(super().forward_one_chunk, arguments, keywords)
        self.chunk_bytes = sum(size for pointer, size in kept.items() if pointer not in weights)
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        return result

    def backward_one_chunk(self, *arguments, **keywords):
        if not self.measuring:
            return super().backward_one_chunk(*arguments, **keywords)
        self.waiting -= 1
        return self._timed(super().backward_one_chunk, arguments, keywords)

    def _timed(self, function, arguments, keywords):
        begin = time.perf_counter()
        result = function(*arguments, **keywords)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.busy += time.perf_counter() - begin
        return result


def stage_table(accelerator: Accelerator, stage: MeasuredStage, schedule: str, chunks: int) -> str:
    """A line for each stage of the first replica, measured and in theory; every process must call it.

    Theory: stage s of p idles (p - 1) / (m + p - 1) of a step of m chunks (Huang et al., arXiv:1811.06965), and keeps
    the activations of m chunks under gpipe, of min(m, p - s) under 1f1b (Narayanan et al., arXiv:2104.04473).
    """
    stages, number = stage.num_stages, stage.stage_index
    waiting = chunks if schedule == "gpipe" else min(chunks, stages - number)
    mine = {
        "parameters": sum(parameter.numel() for parameter in stage.submod.parameters()),
        "idle": stage.idle,
        "kept_bytes": stage.most_waiting * stage.chunk_bytes,
        "theory_bytes": waiting * stage.chunk_bytes,
    }
    rows = [None] * stages
    torch.distributed.all_gather_object(rows, mine, group=accelerator.mesh["pp"].get_group())
    bubble = (stages - 1) / (chunks + stages - 1)
    lines = ["stage  parameters  idle (theory)    activations kept, MiB (theory)"]
    lines += [
        f"{index:5}  {row['parameters']:10,}  {row['idle']:5.1%} ({bubble:.1%})   "
        f"{row['kept_bytes'] / 2**20:17.1f} ({row['theory_bytes'] / 2**20:.1f})"
        for index, row in enumerate(rows)
    ]
    return "\n".join(lines)

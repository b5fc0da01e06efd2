# SPDX-License-Identifier: Apache-2.0
"""Write config.json and summary.json; print what a run trains on at its start, and the result at its end."""

import os
import resource
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from accelerate import Accelerator

from ..checkpoint.origin import source, versions
from ..collectives import data_parallel
from ..contracts import Description
from ..files import write_json
from ..launch import launcher_variables, strategy
from .folder import Claim, Folder, read_json
from .lines import Lines
from .phases import Ledger
from .position import Position


class Summary:
    """A start's reports: its first lines, config.json, summary.json and its last lines."""

    def __init__(
        self, accelerator: Accelerator, position: Position, files: Folder, ledger: Ledger, lines: Lines, claim: Claim
    ):
        self.accelerator, self.position, self.files = accelerator, position, files
        self.ledger, self.lines, self.log = ledger, lines, lines.log
        self.seconds_before = claim.former.get("seconds", 0) if claim.checkpoint else 0
        self.is_resumed = claim.checkpoint is not None

    def opening_lines(self, train: Description, held_out: Description, config) -> list[str]:
        """Return lines on the data, the batch and the number of steps."""
        batch, parts = config.global_batch_size, config.gradient_accumulation_steps
        size = data_parallel(self.accelerator)[1]
        left_out = train.samples - self.position.epoch_steps * batch
        rest = f"; an epoch leaves out {left_out:,} {train.unit}, no full batch" if left_out else ""
        return [
            f"training: {train.summary}",
            f"held out: {held_out.summary}",
            train.notes[0] + rest,
            *train.notes[1:],
            f"batch: {batch} = {size} (data-parallel) x {batch // size // parts} ({train.unit}) x {parts} "
            "(accumulation)",
            f"steps: {self.position.total_steps} = {config.epochs} epochs x {self.position.epoch_steps}",
        ]

    def begin(self, configs: tuple, identity: dict, train: Description) -> None:
        """Write config.json, summary.json and the loader's own files, on rank 0, before the first step."""
        names = ("run_config", "data_config", "config")
        values = {"identity": identity} | {name: vars(one) for name, one in zip(names, configs, strict=True)}
        values |= _environment(self.accelerator) | {"steps_per_epoch": self.position.epoch_steps} | train.record
        with self.files.writing():
            write_json(self.files.path / "config.json", values)
            for name, text in train.files:
                (self.files.path / name).write_text(text)
            if not self.is_resumed:
                self.log.metrics.drop_after(0)
        self.write("running")

    def write(self, status: str, **more: str) -> None:
        """Write summary.json, on rank 0."""
        if not self.accelerator.is_main_process:
            return
        position, batch, metric = self.position, self.lines.batch, self.lines.metric.name
        values = {
            "status": status,
            **more,
            metric: self.lines.evaluation.get(metric),
            "steps": position.step,
            "samples": position.step * batch,
            "seconds": round(self.seconds_before + self.ledger.elapsed(), 2),
            "samples_per_second": round(self.ledger.rate(batch), 1) or None,
            "peak_memory_bytes": _peak_memory(self.accelerator.device),
            "world_size": self.accelerator.num_processes,
            "data_parallel_size": data_parallel(self.accelerator)[1],
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        with self.log.bearing("summary.json"):
            write_json(self.files.path / "summary.json", values)

    def write_end(self) -> None:
        if self.position.interrupted:
            return self.write("interrupted", stop_reason=self.position.interrupted)
        whole = self.position.last_step == self.position.total_steps
        self.write("finished", stop_reason="epochs" if whole else "max_steps")

    def show(self, already: bool) -> None:
        """Print the result from summary.json, and where the files are. already: a previous start had finished."""
        if not self.accelerator.is_main_process:
            return  # the file may not be written yet
        position, folder = self.position, self.files.path
        if reason := position.interrupted:
            where = f"step {position.step} of {position.total_steps}"
            self.log.say(f"interrupted ({reason}) at {where}; the checkpoint is\n  {self.files.newest_checkpoint}")
            return self.log.say("The same command resumes from there.")
        values, metric = read_json(folder / "summary.json"), self.lines.metric
        rate = f", {values['samples_per_second']} {self.lines.unit}/s" if values.get("samples_per_second") else ""
        result = f"{metric.title or metric.name} {metric.text(values.get(metric.name))}"
        result += f", {values.get('steps')} steps, {values.get('seconds')} s{rate}"
        self.log.say(f"already finished: {result}" if already else f"finished: {result}")
        for name in ("summary.json", "metrics.jsonl", "tensorboard"):
            if (folder / name).exists():
                self.log.say(f"  {folder / name}")
        if already:
            self.log.say(f"To start again: rm -r {folder}, or give another --output_dir or --seed.")


def _environment(accelerator: Accelerator) -> dict:
    """Return, for config.json, the command, the versions, the launcher's settings and the hardware."""
    on_gpu = accelerator.device.type == "cuda"
    names = accelerator.mesh.mesh_dim_names if accelerator.mesh else ()
    return {
        "command": [sys.executable, *sys.argv],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source(),
        "versions": versions(),
        "launcher": launcher_variables(),
        "strategy": strategy(),
        "mesh": dict(zip(names, accelerator.mesh.shape, strict=True)) if accelerator.mesh else None,
        "world_size": accelerator.num_processes,
        "data_parallel_size": data_parallel(accelerator)[1],
        "device": torch.cuda.get_device_name() if on_gpu else accelerator.device.type,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "shared": str(Path(__file__).parents[1] / "__init__.py"),
    }


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: the allocator's on a GPU, this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

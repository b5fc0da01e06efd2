# SPDX-License-Identifier: Apache-2.0
"""Write config.json and summary.json; say at the start what a run trains on, and at the end what came out."""

import os
import resource
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
from accelerate import Accelerator

from ..checkpoint.origin import versions
from ..collectives import data_parallel
from ..contracts import Description
from ..errors import say
from ..files import read_json, write_json
from ..launch import launcher_variables, strategy
from .folder import Claim, Folder
from .identity import git_commit
from .lines import Lines
from .phases import Ledger
from .position import Position


class Summary:
    """The words of a start on itself: first lines, config.json, summary.json, last lines."""

    def __init__(
        self, accelerator: Accelerator, position: Position, files: Folder, ledger: Ledger, lines: Lines, claim: Claim
    ):
        self.accelerator, self.position, self.files = accelerator, position, files
        self.ledger, self.lines, self.log = ledger, lines, lines.log
        self.seconds_before = claim.former.get("seconds", 0) if claim.checkpoint else 0
        self.is_resumed = claim.checkpoint is not None

    def opening_lines(self, train: Description, held_out: Description, config) -> list[str]:
        """Return what the run trains on, how a batch is made, and how many steps there are."""
        batch, parts = config.global_batch_size, config.gradient_accumulation_steps
        size = data_parallel(self.accelerator)[1]
        left_out = train.samples - self.position.epoch_steps * batch
        rest = f"; an epoch leaves out {left_out:,} {train.unit}, no whole batch" if left_out else ""
        return [
            f"training: {train.summary}",
            f"held out: {held_out.summary}",
            train.notes[0] + rest,
            *train.notes[1:],
            f"global batch {batch} = {size} (data-parallel processes) x {batch // size // parts} ({train.unit}) x "
            f"{parts} (accumulation); "
            f"{config.epochs} epochs x {self.position.epoch_steps} steps = {self.position.total_steps} steps",
        ]

    def begin(self, configs: tuple, identity: dict, record: dict) -> None:
        """Rank 0: write what the folder says of this start, before its first step. record: a loader's."""
        if line := self.lines.loader.compare(read_json(self.files.path / "config.json")):
            say(line, sys.stderr)
        names = ("run_config", "data_config", "config")
        values = {"identity": identity} | {name: vars(one) for name, one in zip(names, configs, strict=True)}
        values |= _environment(self.accelerator) | {"steps_per_epoch": self.position.epoch_steps} | record
        with self.files.writing():
            write_json(self.files.path / "config.json", values)
            if not self.is_resumed:
                self.log.metrics.drop_after(0)
        self.write("running")

    def write(self, status: str, **more: str) -> None:
        """Rank 0: write summary.json."""
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
        """Say the result from summary.json, and where the files are. already: a former start had finished."""
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
            self.log.say(f"To start afresh: rm -r {folder}, or give another --output_dir or --seed.")


def _environment(accelerator: Accelerator) -> dict:
    """Return, for config.json, what the run was launched with and runs on."""
    on_gpu = accelerator.device.type == "cuda"
    names = accelerator.mesh.mesh_dim_names if accelerator.mesh else ()
    return {
        "command": [sys.executable, *sys.argv],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
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
    """Bytes: of the allocator on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

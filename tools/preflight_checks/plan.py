# SPDX-License-Identifier: Apache-2.0
"""Describe a job as its command line, environment, headers and YAML define it."""

import difflib
import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from machines import Machine


class Task(NamedTuple):
    """One run of the recipe: where its flags stand ("" or "sweep.txt line 2"), the flags, and what they parse to."""

    name: str
    words: list[str]
    run_config: object  # None where the recipe has none, nor data
    data: object
    config: object

    @property
    def given(self) -> set[str]:
        """Return the names of the flags among the words."""
        flags = (word.split("=")[0] for word in self.words if word.startswith("--"))
        return {flag.removeprefix("--").removeprefix("no_").replace("-", "_") for flag in flags}


@dataclass
class Plan:
    """The job, and its recipe's tasks once they are read."""

    root: Path  # of the project
    machine: str
    facts: Machine
    strategy: str
    in_job: bool  # of slurm/launch.sh: Slurm's variables are those of this job
    recipe: Path
    words: list[str]  # after the recipe
    options: dict[str, tuple[str, str]]  # sbatch option: value, origin
    topology: dict
    nodes: int = 1
    gpus: int = 0  # of a node
    precision: str = ""
    origins: dict[str, str] = field(default_factory=dict)  # of gpus and precision
    seconds: float = 0
    module: ModuleType | None = None
    tasks: list[Task] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # printed below a sound job

    @property
    def yaml(self) -> str:
        return f"accelerate_configs/{self.facts.topologies or self.machine}_{self.strategy}.yaml"

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus

    @property
    def kind(self) -> str:
        """Return the strategy as a worker sees it: tp and pp are ddp, with code of the recipe."""
        kind = str(self.topology.get("distributed_type"))
        if kind == "DEEPSPEED":
            return f"zero{self.section('deepspeed').get('zero_stage', 2)}"
        return ("hsdp" if "parallelism_config" in self.topology else "fsdp") if kind == "FSDP" else "ddp"

    @property
    def gigabytes(self) -> int:
        """Return the memory of a GPU."""
        known = self.facts.gpu_memory_by_constraint
        return next((known[word] for word in self.words_of("constraint") if word in known), self.facts.gpu_memory)

    @property
    def takes(self) -> list[str]:
        """Return the strategies that the recipe supports."""
        names = {each.name for each in fields(self.module.Config)}
        in_code = [name for name, size in zip(("tp", "pp"), self.splits, strict=True) if size in names]
        return [*getattr(self.module, "STRATEGIES", ("ddp",)), *in_code]

    @property
    def splits(self) -> tuple[str, str]:
        """Return the fields of the recipes that split a network in code: tensor, pipeline."""
        return self.shared("config").SIZES

    def shared(self, name: str) -> ModuleType:
        """Return a module of the `shared` that the recipe imports: a copied recipe may have its own."""
        return importlib.import_module(f"{self.module.parse.__module__.rpartition('.')[0]}.{name}")

    def section(self, name: str) -> dict:
        """Return a section of the YAML."""
        return self.topology.get(f"{name}_config") or {}

    def option(self, name: str) -> str:
        return self.options.get(name, ("", ""))[0]

    def words_of(self, name: str) -> list[str]:
        """Return the features or partitions in an option, as in `a100&long`."""
        return re.split(r"[,&|]", self.option(name))

    def sizes(self, task: Task) -> tuple[int, int, int]:
        """Return the (tensor, pipeline, data) parallel sizes; the last is 0 where they do not divide the processes."""
        tensor, pipeline = (getattr(task.config, name, 1) for name in self.splits)
        return tensor, pipeline, 0 if self.world_size % (tensor * pipeline) else self.world_size // tensor // pipeline

    @property
    def unit(self) -> str:
        """Return what a batch counts."""
        return "sequences" if hasattr(self.tasks[0].data, "sequence_length") else "images"

    def micro_batch(self, task: Task) -> int:
        """Return the images, or sequences, of one forward of one process."""
        return task.config.global_batch_size // self.sizes(task)[2] // task.config.gradient_accumulation_steps

    def output(self, task: Task) -> Path:
        """Return the run's folder."""
        identity = self.shared("run.identity")
        values = identity.identity(self.recipe.stem, self.precision, task.run_config, task.data, task.config)
        return Path(task.run_config.output_dir or f"runs/{self.recipe.stem}-{identity.identity_hash(values)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the known word that is most like this one."""
    return difflib.get_close_matches(word, list(known), 1, 0)[0]

# SPDX-License-Identifier: Apache-2.0
"""Read the table of machines, slurm/machines.toml."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """An entry of slurm/machines.toml. docs/other_clusters.md explains each key."""

    gpu: str
    gpus: int
    gpu_memory: int
    precisions: list[str]
    cores: int
    memory: int
    hours: int
    default_minutes: int
    gpu_memory_by_constraint: dict[str, int] = field(default_factory=dict)
    select: dict[str, str] = field(default_factory=dict)
    selected_by: list[str] = field(default_factory=list)
    account: str = ""
    home: int = 0
    modules: str = ""
    memory_option_refused: str = ""
    nvlink: float | None = None
    network: float | None = None
    default_qos: str = ""
    qos: dict[str, dict[str, int]] = field(default_factory=dict)
    topologies: str = ""

    @property
    def selectors(self) -> set[str]:
        """Return the constraints and partitions that select its nodes."""
        return {*self.selected_by, *self.select.values()}


def read_machines(root: Path) -> dict[str, Machine]:
    """Return the entries of the project in `root` by their names; raises ValueError where one has wrong keys."""
    machines, place = {}, "slurm/machines.toml"
    try:
        for name, entry in tomllib.loads((root / place).read_text()).items():
            place = f"[{name}] of slurm/machines.toml"
            machines[name] = Machine(**entry)
    except (TypeError, ValueError) as error:
        what = str(error).removeprefix("Machine.__init__() ")
        raise ValueError(f"{place}: {what}. docs/other_clusters.md explains each key.") from error
    return machines

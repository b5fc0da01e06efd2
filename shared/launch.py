# SPDX-License-Identifier: Apache-2.0
"""Read the launcher's variables (no other module does), and refuse those that are left over from another launch."""

import functools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from .errors import UserError

LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
NUMBERS = (*LAUNCH[:5], "PARALLELISM_CONFIG_DP_REPLICATE_SIZE")
FLAGS = ("ACCELERATE_USE_", "ACCELERATE_DEBUG_MODE")
READ = ("ACCELERATE_", "FSDP_", "PARALLELISM_", "OMP_NUM_THREADS", "PMI_", "OMPI_COMM_", "MV2_COMM_", *LAUNCH)
OTHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate reads them like WORLD_SIZE
WORDS = {"true": "true", "1": "true", "yes": "true", "false": "false", "0": "false", "no": "false"}
PRECISIONS = ("no", "fp16", "bf16", "fp8")
# Variables that say how a run was launched. Slurm's may hold secrets (SLURM_JWT): only the named ones are recorded.
LAUNCHER_VARIABLES = re.compile(
    "(ACCELERATE|FSDP|PARALLELISM|NCCL|GLOO|CUDA_VISIBLE)_.*|OMP_NUM_THREADS|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
    "|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|NVIDIA_TF32_OVERRIDE"
    "|SLURM_(JOB_(ID|NAME|NUM_NODES|NODELIST|PARTITION|QOS|ACCOUNT|START_TIME|END_TIME)|ARRAY_(JOB|TASK)_ID|CLUSTER_NAME"
    "|SUBMIT_(DIR|HOST)|RESTART_COUNT|NODEID|PROCID|LOCALID|NTASKS|CPUS_(PER_TASK|ON_NODE)|GPUS_ON_NODE)"
)
SECRETS = re.compile("JWT|TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


class Launch(NamedTuple):
    """A launch's facts, which a recipe's `check` may refuse before processes meet; the preflight makes one too."""

    strategy: str  # ddp, fsdp, hsdp or zero1 to zero3
    precision: str  # no, fp16, bf16 or fp8
    processes: int
    on_gpu: bool


def this_launch() -> Launch:
    """Return the launch that this process belongs to."""
    return Launch(strategy(), mixed_precision(), world_size(), not forced_cpu() and torch.cuda.is_available())


def settle_variables() -> None:
    """Bring the launcher's variables into the form that accelerate and torch read, and drop empty ones.

    Raises UserError for a meaningless value, and for a launch with a variable missing.
    """
    for name, value in [(name, value) for name, value in os.environ.items() if name.startswith(READ)]:
        if not value.strip():
            del os.environ[name]
        elif name in NUMBERS and not value.isdecimal():
            raise left_over(f"{name}={value} is not a number", name)
        elif name.startswith(FLAGS):
            if value.lower() not in WORDS:
                raise left_over(f"{name}={value} is neither true nor false", name)
            os.environ[name] = WORDS[value.lower()]
    _settle_choices()
    _check_launch()
    program()


@functools.cache
def program() -> tuple[Path, bytes]:
    """Return the path and the content of the running program; the content is empty where it is not a file.

    It is read once, at the start, since it may be edited while the data is listed.
    """
    path = Path(sys.argv[0])
    return path, path.read_bytes() if path.is_file() else b""


def left_over(what: str, *names: str) -> UserError:
    return UserError(f"{what}. It may be left over from another launch: unset {' '.join(names)}")


def _settle_choices() -> None:
    name = "ACCELERATE_MIXED_PRECISION"
    precision = os.environ.get(name, "no").lower()
    if precision not in PRECISIONS:
        raise left_over(f"{name}={precision} is not one of {', '.join(PRECISIONS)}", name)
    if name in os.environ:
        os.environ[name] = precision
    name = "ACCELERATE_DYNAMO_BACKEND"
    backend = os.environ.get(name, "no").lower()
    if backend != "no":
        raise left_over(f"{name}={backend}, or dynamo_backend in the YAML, is not read here: give --compile", name)


def _check_launch() -> None:
    """Require all of a launch's variables, or none: then it is one process without a launcher."""
    for name in OTHERS:
        if "WORLD_SIZE" not in os.environ and os.environ.get(name, "1") != "1":
            raise left_over(f"{name}={os.environ[name]}, but MPI starts no recipe: use accelerate launch", name)
    given = [name for name in LAUNCH if name in os.environ]
    rank, local_rank = (int(os.environ.get(name, 0)) for name in LAUNCH[:2])
    world, local = (int(os.environ.get(name, 1)) for name in LAUNCH[2:4])
    missing = [name for name in LAUNCH if name not in (*given, "LOCAL_WORLD_SIZE")]
    if rank >= world or ("LOCAL_WORLD_SIZE" in given and local_rank >= local):
        raise left_over(f"{_values(given)}: no launch has such a process", *given)
    if missing and world > 1:
        raise left_over(f"{_values(given)}, but no {', '.join(missing)}", *given)
    if missing:
        for name in LAUNCH[:4]:
            os.environ.pop(name, None)


def never_met(seconds: int) -> UserError:
    """Return the error for a launch whose processes did not all arrive."""
    given = [name for name in LAUNCH if name in os.environ]
    return left_over(f"{_values(given)}, but not all of these processes connected within {seconds} s", *given)


def _values(names: list[str]) -> str:
    return " ".join(f"{name}={os.environ[name]}" for name in names)


def mixed_precision() -> str:
    """Return the YAML's `no`, `fp16`, `bf16` or `fp8`, which the launcher passes on."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def strategy() -> str:
    """Return the YAML's `ddp` (for one process too), `fsdp`, `hsdp` or `zero1` to `zero3`."""
    if variable("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        return f"zero{variable('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if variable("ACCELERATE_USE_FSDP", "false") == "true":
        return "hsdp" if replicas() > 1 else "fsdp"
    return "ddp"


def variable(name: str, default: str) -> str:
    return os.environ.get(name, default).lower()


def rank() -> int:
    """Return this process's number in the launch."""
    return int(os.environ.get("RANK") or 0)


def local_world_size() -> int:
    """Return the number of this launch's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def launched() -> bool:
    """Return whether a launcher started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def under_torchrun() -> bool:
    """Return whether torchrun watches over this launch's processes."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def error_file() -> str:
    """Return the file from which torchrun reads why a worker failed, or an empty string."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE", "")


def world_size() -> int:
    """Return the number of this launch's processes, known before they meet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def replicas() -> int:
    """Return the number of HSDP's replicas, each of which is sharded."""
    return int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1))


def forced_cpu() -> bool:
    """Return whether the YAML keeps the launch off GPUs: by `use_cpu`, or by hiding them as local_cpu.yaml does."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("-1")
    return hidden or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")


def launcher_variables() -> dict[str, str]:
    """Return the environment's variables about the launch, without those whose names suggest a secret."""
    names = (name for name in sorted(os.environ) if LAUNCHER_VARIABLES.fullmatch(name) and not SECRETS.search(name))
    return {name: os.environ[name] for name in names}

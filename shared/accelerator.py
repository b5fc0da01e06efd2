# SPDX-License-Identifier: Apache-2.0
"""Build the Accelerator that the launcher asked for, on GPUs or, without them, on CPU processes."""

import functools
import importlib.util
import logging
import os
import resource
import signal
import sys
import threading
import time
import warnings
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from .config import SIZES, UserError
from .launch import meeting
from .process import die_with_parent
from .run_folder import recipe_source

# Compute capability from which a GPU has the format in hardware; V100 is 7.0 (torch emulates bf16 there and says yes).
LEAST_CAPABILITY = {"bf16": (8, 0), "fp8": (8, 9)}

# DTensor's advice to join two all-reduces, for the one number of the gradient's norm.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

GRACE = 45  # seconds for a last checkpoint; a new start waits 60 for the folder's lock

OTHER_FILES = 1000  # libraries, loaders, logs, checkpoints

# Names of the mesh's dimensions, from the outermost; neighbours in the last one share a node.
MESH = ("pp", "dp", "tp")


def mixed_precision() -> str:
    """`no`, `fp16`, `bf16` or `fp8`: the YAML's, which the launcher passes on."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def strategy() -> str:
    """`ddp` (one process too), `fsdp`, `hsdp` or `zero1` to `zero3`: the YAML's, which the launcher passes on."""
    if _variable("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        return f"zero{_variable('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if _variable("ACCELERATE_USE_FSDP", "false") == "true":
        return "hsdp" if _replicas() > 1 else "fsdp"
    return "ddp"


def build_accelerator(seed: int, config, strategies: tuple[str, ...] = ("ddp",)) -> Accelerator:
    """The Accelerator of this process, with every rank's random state seeded alike.

    config holds gradient_accumulation_steps, global_batch_size, max_grad_norm and, in some recipes,
    tensor_parallel_size and pipeline_parallel_size. `accelerator.mesh` is the DeviceMesh of the processes, of shape
    (pp, dp, tp), or None for one process.

    Raises UserError, before any process group is made, for a strategy that the recipe has not, a precision that the
    device lacks, sizes that do not multiply to the processes, and settings that are made in two places.
    """
    _die_with_launcher()
    recipe_source()
    on_cpu = _forced_cpu() or not torch.cuda.is_available()
    _check_strategy(strategies)
    _check_precision(on_cpu)
    _check_processes(on_cpu)
    shape = _mesh_shape(config)
    _check_recipes_keys()
    _check_descriptors()
    with meeting():
        accelerator = _accelerator(config, on_cpu)
    assert accelerator.num_processes == world_size()
    torch.set_num_threads(_threads())
    # NumPy's and torch's generators take 32 bits of the 63; a smaller seed stays what it is.
    set_seed((seed ^ (seed >> 32) * 0x9E3779B9) % 2**32)
    if not torch.distributed.is_initialized() and any(hasattr(config, name) for name in SIZES):
        # `python recipes/vit_tp.py --tensor_parallel_size 1`: the code that splits finds a group of one.
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    alone = not torch.distributed.is_initialized()
    accelerator.mesh = None if alone else init_device_mesh(accelerator.device.type, shape, mesh_dim_names=MESH)
    if strategy().startswith("zero"):
        _configure_deepspeed(accelerator, config)
    return accelerator


def _accelerator(config, on_cpu: bool) -> Accelerator:
    if strategy() in ("fsdp", "hsdp") and on_cpu and world_size() > 1:
        # Accelerate makes FSDP of MULTI_GPU alone; with gloo processes it would train unsharded without a word.
        PartialState(backend="gloo")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(
        # One process without CUDA keeps Accelerate's own choice (MPS on a Mac); several talk through gloo.
        cpu=strategy() == "ddp" and (_forced_cpu() or (on_cpu and world_size() > 1)),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        project_config=ProjectConfiguration(),
        parallelism_config=_parallelism_config(),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and strategy().startswith("zero") else [],
    )


def data_parallel(accelerator: Accelerator) -> tuple[int, int]:
    """Rank and size among the processes that see different samples."""
    if accelerator.mesh is None:
        return 0, 1
    return accelerator.mesh.get_local_rank("dp"), accelerator.mesh["dp"].size()


def micro_batch_size(accelerator: Accelerator, global_batch_size: int, gradient_accumulation_steps: int) -> int:
    """Images per forward of one process; raises UserError where the global batch does not divide."""
    return split_batch(data_parallel(accelerator)[1], global_batch_size, gradient_accumulation_steps)


def split_batch(size: int, global_batch_size: int, gradient_accumulation_steps: int) -> int:
    """Images per forward of one of `size` data-parallel processes; raises UserError where that is no whole number."""
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
    torch.distributed.all_reduce(total, group=accelerator.mesh["dp"].get_group())
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
        torch.distributed.broadcast_object_list(outcome, src=0, group=_patient_group())
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


@functools.cache
def _patient_group() -> torch.distributed.ProcessGroup:
    """For waits on rank 0 while it reads whole checkpoints or lists the data: NCCL would give up after ten minutes."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=3))


def _variable(name: str, default: str) -> str:
    return os.environ.get(name, default).lower()


def world_size() -> int:
    """Processes of this launch; known before they meet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _replicas() -> int:
    """HSDP: the model's sharded copies."""
    return int(os.environ.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _threads() -> int:
    """Return this process's share of the cores, at most OMP_THREAD_LIMIT. OMP_NUM_THREADS is not read: the launcher
    sets it to 1 on every machine.

    With more threads than OpenMP's limit torch 2.15 computes wrong sums: a gradient norm of inf was seen.
    """
    share = max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    return min(share, int(limit)) if limit.isdecimal() and int(limit) else share


def _forced_cpu() -> bool:
    """By `use_cpu` of a YAML for one process, or by local_cpu.yaml, which hides the GPUs from any number of them."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("-1")
    return hidden or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1")


def _check_strategy(strategies: tuple[str, ...]) -> None:
    asked = strategy()
    if asked not in strategies:
        name = os.path.basename(sys.argv[0])
        configs = " or ".join(f"accelerate_configs/local_{known}.yaml" for known in strategies)
        raise UserError(f"{name} does not run under {asked}. Launch it with {configs}.")
    if asked in ("fsdp", "hsdp") and _variable("FSDP_VERSION", "1") != "2":
        raise UserError("the YAML asks for the first FSDP. Set fsdp_version: 2 in its fsdp_config.")
    if asked.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{asked} needs DeepSpeed. Install it (pip install deepspeed), or use local_fsdp.yaml.")


def _mesh_shape(config) -> tuple[int, int, int]:
    """(pipeline, data, tensor) parallel sizes."""
    world, (tensor, pipeline) = world_size(), (getattr(config, name, 1) for name in SIZES)
    for name, size in zip(SIZES, (tensor, pipeline), strict=True):
        if world % size:
            raise UserError(f"{world} process(es) are no multiple of --{name} {size}. Change it or --num_processes.")
    if strategy() == "hsdp" and world % _replicas():
        raise UserError(
            f"{world} processes are no multiple of {_replicas()} replicas. "
            "Change --parallelism_config_dp_replicate_size or --num_processes."
        )
    return pipeline, world // (pipeline * tensor), tensor


def _check_recipes_keys() -> None:
    """Refuse what is the recipe's to say: from the environment or the YAML, Accelerate would override it silently."""
    # The launcher of DeepSpeed exports its own default, 1.
    if _variable("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise UserError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS, or this key in the YAML, overrides the recipe's flag. "
            "Remove it and give --gradient_accumulation_steps."
        )
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    if _variable("ACCELERATE_GRADIENT_CLIPPING", "auto") != "auto":
        raise UserError("gradient_clipping stands in the YAML. Remove it there and give --max_grad_norm.")


def raise_open_files(wanted: int) -> int:
    """Let this process open `wanted` files and sockets, or as many as the system allows; return how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


def _check_descriptors() -> None:
    """Refuse a world whose three gloo groups do not fit: each takes a descriptor for each process, and three more."""
    needed = 3 * (world_size() + 3)
    allowed = raise_open_files(needed + OTHER_FILES)
    if world_size() > 1 and allowed < needed:
        raise UserError(
            f"{world_size()} processes need {needed} open files each, and this machine allows {allowed} (ulimit -Hn). "
            "Have the hard limit raised, or use fewer processes."
        )


def _parallelism_config() -> ParallelismConfig | None:
    if strategy() != "hsdp":
        return None
    return ParallelismConfig(dp_replicate_size=_replicas(), dp_shard_size=world_size() // _replicas())


def _configure_deepspeed(accelerator: Accelerator, config) -> None:
    """Batch, accumulation and clipping (0 = none) are the recipe's; DeepSpeed's own defaults would be others."""
    # With offload DeepSpeed's own Adam takes over the groups, and the scheduler misses the steps of torch's.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    batch = micro_batch_size(accelerator, config.global_batch_size, config.gradient_accumulation_steps)
    accelerator.state.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": batch,
        "train_batch_size": config.global_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": float(config.max_grad_norm),
    }


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


def settle_buckets(model: nn.Module, image_size: int) -> None:
    """Let DDP sort its buckets before the first step: call it after `prepare`, at every start.

    After its first backward DDP sorts them by when the gradients came. A resumed run would do so at another step than
    an uninterrupted one, and its sums would round otherwise. So one image is thrown away here.
    """
    if isinstance(model, DistributedDataParallel):
        device = next(model.parameters()).device
        model.eval()  # batch norm's statistics stay as they are
        with torch.compiler.set_stance("force_eager"):
            model(torch.zeros(1, 3, image_size, image_size, device=device)).sum().backward()
        model.zero_grad()


def _die_with_launcher() -> None:
    """Workers end when their launcher does: at first as if by SIGTERM, with a checkpoint; GRACE seconds later by
    force, for one may wait for a peer that is gone."""
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and sys.platform == "linux":
        die_with_parent()
        if os.getppid() == 1 and os.path.realpath("/proc/1/exe") != os.path.realpath("/proc/self/exe"):
            sys.exit(1)  # it died while this process imported its libraries, and init took this one over
        threading.Thread(target=_end_by_force, args=(os.getppid(),), daemon=True).start()


def _end_by_force(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)

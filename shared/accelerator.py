# SPDX-License-Identifier: Apache-2.0
"""Build the Accelerator that the launcher asked for, on GPUs or, without them, on CPU processes."""

import contextlib
import ctypes
import importlib.util
import logging
import os
import sys
import warnings

import torch
from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from .collectives import data_parallel
from .config import SIZES
from .errors import UserError
from .files import raise_open_files
from .launch import forced_cpu, local_world_size, mixed_precision, replicas, strategy, variable, world_size
from .lifetime import die_with_launcher, meeting
from .order import micro_batch_size

# Least compute capability with the format in hardware. A V100 has 7.0; torch emulates bf16 there and reports support.
LEAST_CAPABILITY = {"bf16": (8, 0), "fp8": (8, 9)}

OTHER_FILES = 1000  # libraries, loaders, logs, checkpoints

# Names of the mesh's dimensions, outermost first; ranks that are neighbours in the last one share a node.
MESH = ("pp", "dp", "tp")


def build_accelerator(seed: int, config, strategies: tuple[str, ...] = ("ddp",)) -> Accelerator:
    """Build this process's Accelerator and seed every rank alike.

    config holds gradient_accumulation_steps, global_batch_size, max_grad_norm and, in some recipes,
    tensor_parallel_size and pipeline_parallel_size. `accelerator.mesh` is the DeviceMesh of all processes, of shape
    (pp, dp, tp), or None for a single process.

    Raises UserError before any process group is made: for a strategy that the recipe does not support, a precision
    that the device lacks, sizes that do not multiply to the number of processes, and settings given in two places.
    """
    die_with_launcher()
    _silence()
    on_cpu = forced_cpu() or not torch.cuda.is_available()
    _check_strategy(strategies)
    _check_precision(on_cpu)
    _check_processes(on_cpu)
    shape = _mesh_shape(config)
    _check_recipes_keys()
    _check_descriptors()
    if on_cpu:
        _keep_memory()
    with meeting():
        accelerator = _accelerator(config, on_cpu)
    assert accelerator.num_processes == world_size()
    torch.set_num_threads(_threads())
    # set_seed also seeds NumPy, which takes 32 bits; a seed that fits is used as it is.
    set_seed((seed ^ (seed >> 32) * 0x9E3779B9) % 2**32)
    if not torch.distributed.is_initialized() and any(hasattr(config, name) for name in SIZES):
        # `python recipes/vit_tp.py --tensor_parallel_size 1`: code that splits the network needs a group, even of one.
        backend = "nccl" if accelerator.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    alone = not torch.distributed.is_initialized()
    accelerator.mesh = None if alone else init_device_mesh(accelerator.device.type, shape, mesh_dim_names=MESH)
    if strategy().startswith("zero"):
        _configure_deepspeed(accelerator, config)
    return accelerator


def _keep_memory() -> None:
    """Let glibc keep what a step frees for the next one: the system would have to clear and map each page again."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def _silence() -> None:
    """Silence warnings that a user can do nothing about."""
    # DTensor's advice to merge two all-reduces, given for a single number, the gradient norm.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    # Given at each save and load of a single process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _accelerator(config, on_cpu: bool) -> Accelerator:
    if strategy() in ("fsdp", "hsdp") and on_cpu and world_size() > 1:
        # Accelerate turns only MULTI_GPU into FSDP; with gloo processes it would silently train unsharded.
        PartialState(backend="gloo")
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    sizes = {"dp_replicate_size": replicas(), "dp_shard_size": world_size() // replicas()}
    return Accelerator(
        # A single process without CUDA keeps Accelerate's own choice (MPS on a Mac); several use gloo.
        cpu=strategy() == "ddp" and (forced_cpu() or (on_cpu and world_size() > 1)),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        step_scheduler_with_optimizer=False,
        parallelism_config=ParallelismConfig(**sizes) if strategy() == "hsdp" else None,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpu and strategy().startswith("zero") else [],
    )


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _threads() -> int:
    """Return this process's share of the cores, at most OMP_THREAD_LIMIT: with more threads than that torch 2.15
    computes wrong sums (a gradient norm of inf was seen). OMP_NUM_THREADS is ignored: the launcher sets it to 1."""
    share = max(1, cores() // local_world_size())
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    return min(share, int(limit)) if limit.isdecimal() and int(limit) else share


def _check_strategy(strategies: tuple[str, ...]) -> None:
    asked = strategy()
    if asked not in strategies:
        name = os.path.basename(sys.argv[0])
        configs = " or ".join(f"accelerate_configs/local_{known}.yaml" for known in strategies)
        raise UserError(f"{name} does not run under {asked}. Launch it with {configs}.")
    if asked in ("fsdp", "hsdp") and variable("FSDP_VERSION", "1") != "2":
        raise UserError("the YAML asks for FSDP version 1. Set fsdp_version: 2 in its fsdp_config.")
    if asked.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{asked} needs DeepSpeed. Install it (pip install deepspeed), or use local_fsdp.yaml.")


def _mesh_shape(config) -> tuple[int, int, int]:
    """Return the (pipeline, data, tensor) parallel sizes."""
    world, (tensor, pipeline) = world_size(), (getattr(config, name, 1) for name in SIZES)
    for name, size in zip(SIZES, (tensor, pipeline), strict=True):
        if world % size:
            raise UserError(f"{world} processes are not a multiple of --{name} {size}. Change it or --num_processes.")
    if strategy() == "hsdp" and world % replicas():
        raise UserError(
            f"{world} processes are not a multiple of {replicas()} replicas. "
            "Change --parallelism_config_dp_replicate_size or --num_processes."
        )
    return pipeline, world // (pipeline * tensor), tensor


def _check_recipes_keys() -> None:
    """Refuse settings that belong to the recipe: Accelerate would silently prefer the environment or the YAML."""
    # DeepSpeed's launcher exports its own default, 1.
    if variable("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise UserError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS, or this key in the YAML, overrides the recipe's flag. "
            "Remove it and give --gradient_accumulation_steps."
        )
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    if variable("ACCELERATE_GRADIENT_CLIPPING", "auto") != "auto":
        raise UserError("gradient_clipping is set in the YAML. Remove it there and give --max_grad_norm.")


def _check_descriptors() -> None:
    """Raise UserError where three gloo groups of n processes, each with n + 3 open files, exceed what is allowed."""
    needed = 3 * (world_size() + 3)
    allowed = raise_open_files(needed + OTHER_FILES)
    if world_size() > 1 and allowed < needed:
        raise UserError(
            f"{world_size()} processes need {needed} open files each, and this machine allows {allowed} (ulimit -Hn). "
            "Have the hard limit raised, or use fewer processes."
        )


def _configure_deepspeed(accelerator: Accelerator, config) -> None:
    """Give DeepSpeed the recipe's batch, accumulation and clipping (0 = none) instead of its own defaults."""
    # With offload DeepSpeed's own Adam takes the groups, so the scheduler sees no step of torch's optimizer.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    accelerator.state.deepspeed_plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": micro_batch_size(config, data_parallel(accelerator)[1]),
        "train_batch_size": config.global_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": float(config.max_grad_norm),
    }


def _check_precision(on_cpu: bool) -> None:
    precision = mixed_precision()
    if on_cpu:
        # Accelerate would train in fp32 but report fp16.
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
    local = local_world_size()
    if not on_cpu and local > torch.cuda.device_count():
        raise UserError(
            f"{local} processes on a machine with {torch.cuda.device_count()} GPUs. Lower --num_processes, "
            "or use accelerate_configs/local_cpu.yaml."
        )


def settle_buckets(model: nn.Module, sample: Tensor) -> None:
    """Let DDP sort its buckets before the first step: call it after `prepare`, at every start.

    DDP sorts its buckets after the first backward, by the order in which gradients arrived. A resumed run would do so
    at another step than an uninterrupted one and round its sums differently. So this runs one backward on `sample`, a
    batch of the model's input, and drops the gradients.
    """
    if isinstance(model, DistributedDataParallel):
        model.eval()  # batch norm's statistics stay as they are
        with torch.compiler.set_stance("force_eager"):
            model(sample).sum().backward()
        model.zero_grad()

# SPDX-License-Identifier: Apache-2.0
"""Launcher's variables: what another launch left in the environment is refused by name, before it decides anything."""

import contextlib
import os
import threading
from collections.abc import Iterator

from .process import UserError, end_at_once

LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
NUMBERS = (*LAUNCH[:5], "PARALLELISM_CONFIG_DP_REPLICATE_SIZE")
FLAGS = ("ACCELERATE_USE_", "ACCELERATE_DEBUG_MODE")
READ = ("ACCELERATE_", "FSDP_", "PARALLELISM_", "OMP_NUM_THREADS", "PMI_", "OMPI_COMM_", "MV2_COMM_", *LAUNCH)
OTHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # which accelerate reads beside WORLD_SIZE
WORDS = {"true": "true", "1": "true", "yes": "true", "false": "false", "0": "false", "no": "false"}
PRECISIONS = ("no", "fp16", "bf16", "fp8")
PATIENCE = 60  # seconds for processes that no launcher watches to meet


def settle_variables() -> None:
    """Bring launcher's variables into the form that accelerate and torch read; one that is empty is none.

    Raises UserError for a value that says nothing, and for a launch that lacks a part.
    """
    for name, value in [(name, value) for name, value in os.environ.items() if name.startswith(READ)]:
        if not value.strip():
            del os.environ[name]
        elif name in NUMBERS and not value.isdecimal():
            raise left_over(f"{name}={value} is no number", name)
        elif name.startswith(FLAGS):
            if value.lower() not in WORDS:
                raise left_over(f"{name}={value} is neither true nor false", name)
            os.environ[name] = WORDS[value.lower()]
    _settle_choices()
    _check_launch()


def left_over(what: str, *names: str) -> UserError:
    return UserError(f"{what}. It may be left over from another launch: unset {' '.join(names)}")


def _settle_choices() -> None:
    name = "ACCELERATE_MIXED_PRECISION"
    precision = os.environ.get(name, "no").lower()
    if precision not in PRECISIONS:
        raise left_over(f"{name}={precision} is none of {', '.join(PRECISIONS)}", name)
    if name in os.environ:
        os.environ[name] = precision
    name = "ACCELERATE_DYNAMO_BACKEND"
    backend = os.environ.get(name, "no").lower()
    if backend != "no":
        raise left_over(f"{name}={backend}, or dynamo_backend in the YAML, is not read here: give --compile", name)


def _check_launch() -> None:
    """All of a launch's variables are there, or it is one process without a launcher."""
    for name in OTHERS:
        if "WORLD_SIZE" not in os.environ and os.environ.get(name, "1") != "1":
            raise left_over(f"{name}={os.environ[name]}, but MPI starts no recipe: accelerate launch does", name)
    given = [name for name in LAUNCH if name in os.environ]
    rank, local_rank = (int(os.environ.get(name, 0)) for name in LAUNCH[:2])
    world, local = (int(os.environ.get(name, 1)) for name in LAUNCH[2:4])
    missing = [name for name in LAUNCH if name not in (*given, "LOCAL_WORLD_SIZE")]
    if rank >= world or ("LOCAL_WORLD_SIZE" in given and local_rank >= local):
        raise left_over(f"{_values(given)} name no process", *given)
    if missing and world > 1:
        raise left_over(f"{_values(given)}, but no {', '.join(missing)}", *given)
    if missing:
        for name in LAUNCH[:4]:
            os.environ.pop(name, None)


def _values(names: list[str]) -> str:
    return " ".join(f"{name}={os.environ[name]}" for name in names)


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Within it the processes of a launch meet. Without torchrun, which watches over its own, some may never come:
    PATIENCE seconds later this one ends with an `error:` line."""
    watched = "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") == "1"
    given = [name for name in LAUNCH if name in os.environ]
    error = left_over(f"{_values(given)}, but not all of these processes came within {PATIENCE} s", *given)
    timer = threading.Timer(PATIENCE, end_at_once, [error])
    timer.daemon = True
    if not watched:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()

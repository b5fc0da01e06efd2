# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: the hardware and its peaks, timing and its budget, a table and a dated results file."""

import contextlib
import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "accelerate", "transformers", "numpy")

# Dense peaks of the datasheets, TFLOP/s, by a part of the device's name; PCIe and NVL boards have lower ones.
PEAKS = {
    "V100-SXM": {"fp16": 125, "fp32": 15.7},
    "A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "H100 80GB HBM3": {"bf16": 989, "fp16": 989, "tf32": 494.5, "fp32": 67},
    "H200": {"bf16": 989, "fp16": 989, "tf32": 494.5, "fp32": 67},
}


def hardware() -> dict:
    """The device (the first GPU, else the processor), sizes in bytes, and versions (None where not installed)."""
    gpus = torch.cuda.device_count()
    return {
        "device": torch.cuda.get_device_name() if gpus else _processor(),
        "gpus": gpus,
        "cores": _cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device_memory_bytes": torch.cuda.get_device_properties(0).total_memory if gpus else None,
        "versions": {name: _version(name) for name in PACKAGES}
        | {"python": platform.python_version(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
    }


def hardware_slug() -> str:
    """`h100`, `v100`, `rtx4090`: the model in the GPU's name; without a GPU `cpu` and the number of usable cores."""
    if not torch.cuda.device_count():
        return f"cpu{_cores()}"
    name = torch.cuda.get_device_name().lower()
    model = re.search(r"[a-z]+ ?\d+", name)
    return (model.group() if model else name).replace(" ", "")


def peak_tflops(precision: str) -> float | None:
    """Of the first GPU in fp32, tf32, fp16 or bf16; None where it is unknown."""
    name = torch.cuda.get_device_name() if torch.cuda.device_count() else ""
    return next((peaks.get(precision) for part, peaks in PEAKS.items() if part in name and "NVL" not in name), None)


def median_and_spread(values: Iterable[float]) -> dict:
    """Median, least and greatest of n values, to six digits."""
    values = list(values)
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.6g}") for name, value in spread.items()} | {"n": len(values)}


def table(rows: list[dict]) -> str:
    """Aligned text: numbers to the right; a spread as `median (min to max)`, `..._bytes` in GiB, None as a dash."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[_cell(name, row.get(name)) for name in columns] for row in rows]
    lines = [[name.replace("_bytes", "_GiB") for name in columns], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    numeric = [any(isinstance(row.get(name), int | float | dict) for row in rows) for name in columns]
    return "\n".join(
        "  ".join(
            f"{cell:>{w}}" if n else f"{cell:<{w}}" for cell, w, n in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def write(what: str, rows: list[dict], **more) -> Path:
    """Write benchmarks/results/<what>_<hardware>_<date>.json, over a former one of that day; return its path.

    Where the environment variable OUT names a folder, a copy goes there. Folders of this machine are cut from every
    string, so that no path or user name is published.
    """
    now = datetime.now(UTC)
    values = {"what": what, "date": now.isoformat(timespec="seconds"), "command": _command()}
    values |= {"hardware": hardware(), "rows": rows, **more}
    path = ROOT / "benchmarks" / "results" / f"{what}_{hardware_slug()}_{now:%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(_portable(values), indent=1) + "\n")
    if os.path.isdir(os.environ.get("OUT", "")):
        shutil.copy(path, os.environ["OUT"])
    return path


def step_seconds(step: Callable[[], object], steps: int) -> list[float]:
    """Seconds between the ends of successive calls; on a GPU from events in its queue, as it runs behind the host."""
    if not torch.cuda.is_available():
        marks = [time.perf_counter(), *((step(), time.perf_counter())[1] for _ in range(steps))]
        return [end - begin for begin, end in itertools.pairwise(marks)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(marks)]


def write_profile(path: Path, step: Callable[[], object], steps: int = 5) -> None:
    """Write a table of the operations and kernels that so many calls spend their time on, the longest first."""
    with torch.profiler.profile() as profiler:
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    key = f"self_{'device' if torch.cuda.is_available() else 'cpu'}_time_total"
    text = profiler.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{path.stem}: {steps} steps\n{text}\n")


def release_memory() -> None:
    """Forget what ran before: its compiled code, its garbage, the allocator's cache and peak."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def failure(error: Exception) -> str:
    """`out of memory`, or the class and the first line that tells something."""
    if any(words in str(error).lower() for words in ("out of memory", "alloc_failed", "can't allocate")):
        return "out of memory"
    lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
    return f"{type(error).__name__}: {''.join(lines[:1])}"


class BudgetSpent(BaseException):
    """The alarm's; not an Exception, which torch.compile would catch and wrap."""


@contextlib.contextmanager
def budget(seconds: float) -> Iterator[None]:
    """End the block, wherever it stands, after these seconds; what follows it runs on."""

    def stop(*_):
        raise BudgetSpent

    signal.signal(signal.SIGALRM, stop)
    # Again every 5 s: an exception that is raised while an object is finalised gets lost.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), 5)
    try:
        yield
    except BudgetSpent:
        print("the budget of time is spent", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def load_recipe(name: str) -> ModuleType:
    """recipes/<name>.py as a module, whose Config and build_... functions can be measured."""
    folder = ROOT / "recipes"
    sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    # Registered first: its dataclass looks its own module up.
    recipe = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def _command() -> str:
    return shlex.join(["python", os.path.relpath(os.path.realpath(sys.argv[0]), ROOT), *sys.argv[1:]])


def _portable(value):
    """A path below the repository loses the repository's part, any other absolute path its folders; NaN is a word."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return re.sub(r"(?<![\w.:/-])/(?:[^\s/'\":,=]+/)+", "", value.replace(f"{ROOT}/", ""))
    if isinstance(value, dict):
        return {name: _portable(item) for name, item in value.items()}
    return [_portable(item) for item in value] if isinstance(value, list | tuple) else value


def _cell(name: str, value) -> str:
    if isinstance(value, dict) and "median" in value:
        low, high = (_cell(name, value[bound]) for bound in ("min", "max"))
        return f"{_cell(name, value['median'])} ({low} to {high})"
    if name.endswith("_bytes") and value is not None:
        return f"{value / 2**30:.1f}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None

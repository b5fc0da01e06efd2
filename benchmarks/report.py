# SPDX-License-Identifier: Apache-2.0
"""Describe the hardware, print a table and write a dated results file, for every benchmark."""

import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch

from shared.checkpoint.origin import hash_of, source, versions

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "torchvision", "accelerate", "transformers", "deepspeed", "numpy", "pillow", "simplejpeg")
PACKAGES += ("nvidia-dali-cuda130", "webdataset", "datasets", "torchdata", "timm", "ffcv")


def hardware() -> dict:
    """Return the device (the first GPU, else the processor), sizes in bytes, and versions (None where not
    installed)."""
    gpus = torch.cuda.device_count()
    return {
        "device": torch.cuda.get_device_name() if gpus else _processor(),
        "gpus": gpus,
        "cores": cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": versions(PACKAGES) | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
    }


def hardware_slug() -> str:
    """Return `h100`, `v100`, `rtx4090`: the model in the GPU's name; without a GPU `cpu` and the number of usable
    cores."""
    if not torch.cuda.device_count():
        return f"cpu{cores()}"
    name = torch.cuda.get_device_name().lower()
    model = re.search(r"[a-z]+ ?\d+", name)
    return (model.group() if model else name).replace(" ", "")


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def median_and_spread(values: Iterable[float]) -> dict:
    """Return median, least and greatest of n values, to six digits."""
    values = list(values)
    spread = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.6g}") for name, value in spread.items()} | {"n": len(values)}


def table(rows: list[dict]) -> str:
    """Return aligned text, a spread as `median (min to max)`, `..._bytes` in GiB, None as a dash."""
    rows = [_folded(row) for row in rows]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[name.replace("_bytes", "_GiB") for name in columns]]
    lines += [[_cell(name, row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines)


def write(what: str, rows: list[dict], output: str = "", **more) -> Path:
    """Write benchmarks/results/<what>_<hardware>_<date>.json, over an earlier one of that day, or the file `output`;
    return its path.

    Where the environment variable OUT names a folder, a copy goes there: for machines whose disks do not last.
    """
    now = datetime.now(UTC)
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    values = {"what": what, "date": now.isoformat(timespec="seconds"), "command": command, "source": _source()}
    values |= {"hardware": hardware()}
    path = ROOT / "benchmarks" / "results" / f"{what}_{hardware_slug()}_{now:%Y-%m-%d}.json"
    path = Path(output).resolve() if output else path
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values | {"rows": rows, **more}, indent=1) + "\n")
    if os.path.isdir(os.environ.get("OUT", "")):
        shutil.copy(path, os.environ["OUT"])
    return Path(output) if output else path.relative_to(ROOT)


def _source() -> dict:
    """Return source(), and the hash of the recipes and benchmarks, which benchmarks import and launch."""
    files = [path.read_bytes() for folder in ("recipes", "benchmarks") for path in (ROOT / folder).glob("*.py")]
    return source() | {"recipes": hash_of(b"".join(sorted(files)))}


def _folded(row: dict) -> dict:
    """Merge a median and its spread, which stands beside it under `..._spread`, into one value."""
    spreads = {name: row[f"{name}_spread"] for name in row if isinstance(row.get(f"{name}_spread"), dict)}
    kept = {
        name: value for name, value in row.items() if name.removesuffix("_spread") not in spreads or name in spreads
    }
    return {name: {"median": value, **spreads[name]} if name in spreads else value for name, value in kept.items()}


def _cell(name: str, value) -> str:
    if isinstance(value, dict) and "median" in value:
        low, high = (_cell(name, value[bound]) for bound in ("min", "max"))
        return f"{_cell(name, value['median'])} ({low} to {high})"
    if name.endswith("_bytes") and value is not None:
        return f"{value / 2**30:.3g}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def _processor() -> str:
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()

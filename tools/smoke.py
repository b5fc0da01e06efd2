# SPDX-License-Identifier: Apache-2.0
"""Run two steps of every recipe, or of those named, under the launcher on this machine's GPU or else its CPU.

    python tools/smoke.py [RECIPE ...]

Prints recipe, pass or fail, seconds and peak memory; exits 1 if one failed, with the end of its output.
"""

import importlib
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import torch

from shared.config import SIZES
from shared.lifetime import begin, die_with_parent

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2
CODES = dict(zip(SIZES, ("tp", "pp"), strict=True))


def main(names: list[str]) -> int:
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
    sys.path.insert(0, str(ROOT / "recipes"))
    unknown = [name for name in names if name not in recipes]
    if unknown:
        print(f"error: no recipe {unknown[0]}. There are: {', '.join(recipes)}.", file=sys.stderr)
        return 1
    print(f"{'recipe':24}{'result':8}{'seconds':>8}{'peak memory':>14}")
    failures = [name for name in names or recipes if not smoke(name)]
    return 1 if failures else 0


def smoke(name: str) -> bool:
    """Run one recipe in a folder of its own; return whether it passed."""
    begin = time.perf_counter()
    try:
        problem, memory = run(importlib.import_module(name))
    except Exception:  # a recipe that cannot be imported, or left no result: a row of the table
        problem, memory = traceback.format_exc(), 0
    seconds = time.perf_counter() - begin
    print(f"{name:24}{'fail' if problem else 'pass':8}{seconds:8.1f}{memory / 2**20:10.0f} MiB")
    if problem:
        print(f"--- {problem}\n---", file=sys.stderr)
    return not problem


def run(recipe: ModuleType) -> tuple[str, int]:
    """Run a recipe; return what is wrong (empty: nothing), with the end of its output, and the peak memory in
    bytes."""
    with tempfile.TemporaryDirectory() as folder:
        words = command(recipe, folder)
        process = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, preexec_fn=die_with_parent)
        problem, memory = examine(process, Path(folder) / "run", trains(recipe))
    return f"{problem}\n{(process.stdout + process.stderr)[-4000:]}" if problem else "", memory


def command(recipe: ModuleType, folder: str) -> list[str]:
    """Return the launch of a recipe under its first strategy, on two processes where they split something."""
    sizes = [name for name in SIZES if trains(recipe) and name in {field.name for field in fields(recipe.Config)}]
    strategy = CODES[sizes[0]] if sizes else getattr(recipe, "STRATEGIES", ("ddp",))[0]
    processes = 1 if strategy == "ddp" or torch.cuda.device_count() == 1 else 2
    topology = f"accelerate_configs/local_{strategy}.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", topology]
    launch += ["--num_processes", str(processes), str(Path(recipe.__file__).relative_to(ROOT))]
    if not trains(recipe):
        return launch
    launch += [word for name in sizes for word in (f"--{name}", str(processes))]
    return [*launch, "--max_steps", str(STEPS), "--logging_steps", "1", "--output_dir", f"{folder}/run"]


def trains(recipe: ModuleType) -> bool:
    return hasattr(recipe, "train_one_epoch")


def examine(process: subprocess.CompletedProcess, run: Path, is_training: bool) -> tuple[str, int]:
    """Return what is wrong (empty: nothing) and the peak memory in bytes (0 where the recipe does not train)."""
    if process.returncode or not is_training:
        return f"exit status {process.returncode}" if process.returncode else "", 0
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    if summary["status"] != "finished" or summary["steps"] != STEPS or len(losses) != STEPS:
        return f"summary.json says {summary['status']} after {summary['steps']} steps", summary["peak_memory_bytes"]
    if not all(math.isfinite(loss) for loss in losses):
        return f"losses {losses}", summary["peak_memory_bytes"]
    return "", summary["peak_memory_bytes"]


if __name__ == "__main__":
    begin()
    sys.exit(main(sys.argv[1:]))

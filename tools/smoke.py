# SPDX-License-Identifier: Apache-2.0
"""Two real steps of every recipe, or of the one named, under the launcher on this machine's GPU or else its CPU.

    python tools/smoke.py [RECIPE]

Prints recipe, pass or fail, seconds and peak memory; exits 1 if one failed, with the end of its output.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from shared.config import SIZES
from shared.lifetime import begin, die_with_parent

ROOT = Path(__file__).resolve().parent.parent
STEPS = 2


def main(names: list[str]) -> int:
    recipes = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.py"))}
    unknown = [name for name in names if name not in recipes]
    if unknown:
        print(f"error: no recipe {unknown[0]}. There are: {', '.join(recipes)}.", file=sys.stderr)
        return 1
    print(f"{'recipe':24}{'result':8}{'seconds':>8}{'peak memory':>14}")
    failures = [name for name in names or recipes if not smoke(recipes[name])]
    return 1 if failures else 0


def smoke(recipe: Path) -> bool:
    """Run one recipe in a folder of its own; whether it did what it should."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        process = subprocess.run(
            command(recipe, folder), capture_output=True, text=True, cwd=ROOT, preexec_fn=die_with_parent
        )
        seconds = time.perf_counter() - begin
        problem, memory = examine(process, Path(folder) / "run", is_training(recipe))
    print(f"{recipe.stem:24}{'fail' if problem else 'pass':8}{seconds:8.1f}{memory / 2**20:10.0f} MiB")
    if problem:
        print(f"--- {problem}\n{(process.stdout + process.stderr)[-4000:]}\n---", file=sys.stderr)
    return not problem


def command(recipe: Path, folder: str) -> list[str]:
    """The recipe under the first topology that its head names; splits take two processes where they can."""
    source = recipe.read_text()
    config = (re.findall(r"local_\w+\.yaml", source) or ["local_ddp.yaml"])[0]
    processes = 2 if config != "local_ddp.yaml" and torch.cuda.device_count() != 1 else 1
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{config}"]
    launch += ["--num_processes", str(processes), str(recipe.relative_to(ROOT))]
    if not is_training(recipe):
        return launch
    sizes = [f"--{name}" for name in SIZES if f"    {name}: " in source]
    launch += [word for name in sizes for word in (name, str(processes))]
    return [*launch, "--max_steps", str(STEPS), "--logging_steps", "1", "--output_dir", f"{folder}/run"]


def is_training(recipe: Path) -> bool:
    return "def train_one_epoch" in recipe.read_text()


def examine(process: subprocess.CompletedProcess, run: Path, trains: bool) -> tuple[str, int]:
    """What is wrong (empty: nothing) and the peak memory in bytes (0 where the recipe does not train)."""
    if process.returncode or not trains:
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

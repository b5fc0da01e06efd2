# SPDX-License-Identifier: Apache-2.0
"""Measure accuracy and time of the demonstration over several seeds.

    python benchmarks/accuracy.py [--recipe vit] [--seeds 5] [any flag of the recipe]

Runs the plain public command once per seed, and writes benchmarks/results/accuracy_<recipe>_<hardware>_<date>.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from report import ROOT, median_and_spread, table, write

from shared.lifetime import die_with_parent

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/local_ddp.yaml"]
FIGURES = ("accuracy", "seconds", "samples_per_second", "peak_memory_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs, of the seeds 0, 1, 2, ...")
    parser.add_argument("--recipe", default="resnet", help="the recipe's name")
    arguments, flags = parser.parse_known_args()
    summaries = [train(arguments.recipe, seed, flags) for seed in range(arguments.seeds)]
    rows = [{"figure": name, **median_and_spread([summary[name] for summary in summaries])} for name in FIGURES]
    print(table(rows))
    print(write(f"accuracy_{arguments.recipe}", rows, recipe=arguments.recipe, flags=flags, runs=summaries))


def train(recipe: str, seed: int, flags: list[str]) -> dict:
    """Return the summary of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *LAUNCH, f"recipes/{recipe}.py", *flags]
        words = [*command, "--seed", str(seed), "--output_dir", f"{folder}/run"]
        subprocess.run(words, cwd=ROOT, check=True, preexec_fn=die_with_parent)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    return {"seed": seed} | {name: summary[name] for name in (*FIGURES, "steps", "world_size")}


if __name__ == "__main__":
    main()

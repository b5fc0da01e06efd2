# SPDX-License-Identifier: Apache-2.0
"""Measure accuracy and time of the demonstration over several seeds.

    python benchmarks/accuracy.py [--recipe vit] [--seeds 5] [any flag of the recipe]
    python benchmarks/accuracy.py --vary "--norm batch" --vary "--norm group" --target 0.97 --output norms

Runs the plain public command once per seed, and writes benchmarks/results/accuracy_<recipe>_<hardware>_<date>.json.
Each --vary is a set of flags; all sets train with the same seeds, in turn.
"""

import argparse
import json
import shlex
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
    parser.add_argument("--vary", action="append", metavar="FLAGS", help="flags to compare; once for each set")
    parser.add_argument("--target", type=float, help="count the steps to the first evaluation of this accuracy")
    parser.add_argument("--output", help="name of the results file, instead of accuracy_<recipe>")
    arguments, flags = parser.parse_known_args()
    sets, runs = [{"vary": vary} for vary in arguments.vary or ()] or [{}], []
    for seed in range(arguments.seeds):
        for each in sets:
            words = [*flags, *shlex.split(each.get("vary", ""))]
            runs.append(each | train(arguments.recipe, seed, words, arguments.target))
    more = {} if arguments.target is None else {"target": arguments.target}
    figures = (*FIGURES, "steps_to_target") if more else FIGURES
    rows = [
        each | {"figure": name} | spread([run[name] for run in runs if each.items() <= run.items() and name in run])
        for each in sets
        for name in (*figures, "ema_accuracy")
        if any(name in run for run in runs if each.items() <= run.items())
    ]
    print(table(rows))
    what = arguments.output or f"accuracy_{arguments.recipe}"
    print(write(what, rows, recipe=arguments.recipe, flags=flags, **more, runs=runs))


def spread(values: list[float | None]) -> dict:
    """Return median, least and greatest of the runs that have the figure, and their number n: a run may not reach the
    target."""
    values = [value for value in values if value is not None]
    return median_and_spread(values) if values else {"median": None, "min": None, "max": None, "n": 0}


def train(recipe: str, seed: int, flags: list[str], target: float | None) -> dict:
    """Return the summary of one run, with its steps to the target, if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *LAUNCH, f"recipes/{recipe}.py", *flags]
        words = [*command, "--seed", str(seed), "--output_dir", f"{folder}/run"]
        subprocess.run(words, cwd=ROOT, check=True, preexec_fn=die_with_parent)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    run = {"seed": seed} | {name: summary[name] for name in (*FIGURES, "steps", "world_size")}
    run |= {name: value for line in lines for name, value in line.items() if name == "ema_accuracy"}  # the last one
    return run if target is None else run | {"steps_to_target": steps_to(target, lines)}


def steps_to(target: float, lines: list[dict]) -> int | None:
    """Return the step of the first evaluation of at least this accuracy, or None."""
    return next((line["step"] for line in lines if line.get("accuracy", -1) >= target), None)


if __name__ == "__main__":
    main()

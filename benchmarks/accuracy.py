# SPDX-License-Identifier: Apache-2.0
"""Measure accuracy and time of the demonstration over several seeds.

    python benchmarks/accuracy.py [--recipe vit] [--seeds 5] [any flag of the recipe]
    python benchmarks/accuracy.py --vary "--norm batch" --vary "--norm group" --target 0.97 --output norms

Runs the plain public command once per seed, and writes benchmarks/results/accuracy_<recipe>_<hardware>_<date>.json.
Each --vary is a set of flags, before which another recipe's name may stand; all sets train with the same seeds, in
turn. `seconds` are the run's own, of training and evaluations; `wall_seconds` and `seconds_to_target` count from the
command, with imports and compilation.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import ROOT, median_and_spread, table, write

from shared.lifetime import die_with_parent

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/local_ddp.yaml"]
FIGURES = ("accuracy", "bits_per_byte", "seconds", "samples_per_second", "peak_memory_bytes")  # of summary.json


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
            words = shlex.split(each.get("vary", ""))
            recipe = words.pop(0) if words and not words[0].startswith("-") else arguments.recipe
            runs.append(each | train(recipe, seed, [*flags, *words], arguments.target))
    more = {} if arguments.target is None else {"target": arguments.target}
    figures = (*FIGURES, "wall_seconds", *(("steps_to_target", "seconds_to_target") if more else ()))
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
    """Return the summary of one run, with its steps and seconds to the target, if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *LAUNCH, f"recipes/{recipe}.py", *flags]
        words, path = [*command, "--seed", str(seed), "--output_dir", f"{folder}/run"], Path(folder, "run")
        begin, reached = time.perf_counter(), None
        process = subprocess.Popen(words, cwd=ROOT, preexec_fn=die_with_parent)
        while process.poll() is None:
            time.sleep(0.1)
            if target and not reached and steps_to(target, lines_of(path)):
                reached = time.perf_counter() - begin
        wall = time.perf_counter() - begin
        if process.returncode:
            sys.exit(process.returncode)
        summary, lines = json.loads((path / "summary.json").read_text()), lines_of(path)
    figures = {name: summary[name] for name in (*FIGURES, "steps", "world_size") if name in summary}
    run = {"seed": seed} | figures | {"wall_seconds": wall}
    run |= {name: value for line in lines for name, value in line.items() if name == "ema_accuracy"}  # the last one
    if target is not None:
        steps = steps_to(target, lines)
        run |= {"steps_to_target": steps, "seconds_to_target": steps and (reached or wall)}
    return run


def lines_of(path: Path) -> list[dict]:
    """Return the whole lines of a run's metrics.jsonl."""
    file = path / "metrics.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines(True) if line.endswith("\n")]
        if file.exists()
        else []
    )


def steps_to(target: float, lines: list[dict]) -> int | None:
    """Return the step of the first evaluation of at least this accuracy, or None."""
    return next((line["step"] for line in lines if line.get("accuracy", -1) >= target), None)


if __name__ == "__main__":
    main()

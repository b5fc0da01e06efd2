# SPDX-License-Identifier: Apache-2.0
"""Suggest a learning rate for any recipe under any strategy, by a range test (Smith, arXiv:1506.01186, section 3.3).

    python tools/find_learning_rate.py recipes/resnet.py --norm group        # the recipe's own flags come last
    python tools/find_learning_rate.py --config_file accelerate_configs/local_fsdp.yaml --num_processes 2 \\
        recipes/vit.py --global_batch_size 128

A few short trainings, of consecutive seeds, raise the rate exponentially from --least_rate to --greatest_rate. Their
losses are smoothed and averaged. The suggestion is a third of the rate at which the average has risen by 5 % of its
first value: the best rate is usually within a factor of 2 of the largest one that does not diverge (Bengio,
arXiv:1206.5533, section 3.1.1). The rate of the least loss says little, since the loss is flat over decades. Nothing
is evaluated, and nothing is written but a chart. Where the losses give no answer, the exit status is 1.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from recipe_file import as_user_errors, load_recipe
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from shared.config import expand_home
from shared.errors import UserError
from shared.lifetime import begin, die_with_parent

CONFIGURATION = Path(__file__).resolve().parent.parent / "accelerate_configs/local_ddp.yaml"
WORKER = "--worker"  # the first word where a launcher starts this file
RATES = ("learning_rate", "base_learning_rate")  # a recipe has one of these flags
FIXED = ("--max_steps", "--logging_steps", "--report_to", "--output_dir", "--resume_from_checkpoint", "--on_nonfinite")
WIDTH = 0.2  # decades of the rate: standard deviation of the kernel that smooths
FIRST = 5  # steps whose median is the loss at the start
CAP = 2.0  # a loss counts as at most so many times the one at the start, or one diverged step would hide the others
LEAST_FALL, RISE = 0.03, 0.05  # of the loss at the start
MARGIN = 3  # between the rate at which the loss has risen and the suggestion
DISAGREE = 10  # ratio between what single trainings say at which there is no answer


def main(arguments: argparse.Namespace) -> int:
    """Run the test, draw the chart and print the answer; return the exit status."""
    refuse(arguments)
    name, seed = understand(arguments)
    rates, losses = np.geomspace(arguments.least_rate, arguments.greatest_rate, arguments.steps), []
    with tempfile.TemporaryDirectory(prefix="learning_rate_", ignore_cleanup_errors=True) as folder:
        for each in range(seed, seed + arguments.runs):
            losses.append(record(arguments, name, each, Path(folder) / str(each)))
            print(f"seed {each}: {len(losses[-1])} of {arguments.steps} steps have a finite loss", flush=True)
    curves = [smooth(values, rates) for values in losses]
    rate, reason = suggest(curves, rates)
    draw(arguments.chart, name, rates, losses, curves, rate)
    single = ", ".join(f"{rates[edge(curve)] / MARGIN:.2g}" for curve in curves)
    print(f"chart: {arguments.chart}\neach training alone would say: {single}")
    print(f"use --{name} {rate:.2g}: {reason}" if rate else f"no answer: {reason}", flush=True)
    return 0 if rate else 1


# Before the launches


def refuse(arguments: argparse.Namespace) -> None:
    """Raise UserError for arguments that cannot work."""
    low, high = arguments.least_rate, arguments.greatest_rate
    if not 0 < low < high < math.inf:
        raise UserError(f"--least_rate {low:g} must be above 0 and below --greatest_rate {high:g}. Change one.")
    for name, least in (("steps", 20), ("runs", 1), ("num_processes", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise UserError(f"--{name} {value} is too small. Give {least} or more.")
    for path in (arguments.recipe, arguments.config_file):
        if not path.is_file():
            raise UserError(f"{path} is not a file. Give the path of one.")
    arguments.chart = chart = arguments.chart or Path(f"learning_rate_{arguments.recipe.stem}.png")
    if chart.exists() or chart.suffix not in (".png", ".svg") or not chart.resolve().parent.is_dir():
        raise UserError(f"--chart {chart} exists, or is no .png or .svg in a folder that exists. Give another name.")
    if not importlib.util.find_spec("matplotlib"):
        raise UserError("the chart needs matplotlib. Install it: pip install matplotlib")
    for flag in arguments.flags:
        if flag.split("=")[0].replace("-", "_").replace("__", "--", 1) in FIXED:
            raise UserError(f"{flag.split('=')[0]} is set by this tool. Leave it out; --steps is the number of steps.")


def understand(arguments: argparse.Namespace) -> tuple[str, int]:
    """Return the name of the recipe's flag for the rate, and its seed; raises UserError for flags that it refuses."""
    recipe = load_recipe(arguments.recipe.resolve())
    if not hasattr(recipe, "build_optimizer"):
        raise UserError(f"{arguments.recipe} trains nothing: it has no build_optimizer. Give another recipe.")
    with as_user_errors(recipe):
        run_config, *_, config = recipe.parse(*recipe.CONFIGS, arguments=arguments.flags)
    if not (names := [name for name in RATES if hasattr(config, name)]):
        raise UserError(f"{arguments.recipe} has no --{' and no --'.join(RATES)}. Give another recipe.")
    return names[0], run_config.seed


# One training


def record(arguments: argparse.Namespace, name: str, seed: int, folder: Path) -> np.ndarray:
    """Launch a training of this seed; return the losses of its steps, up to the first that is not finite.

    Raises UserError where the recipe fails, and where there are less than FIRST such losses.
    """
    words = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(arguments.config_file)]
    words += ["--num_processes", str(arguments.num_processes)] if arguments.num_processes else []
    words += [str(Path(__file__).resolve()), WORKER, str(arguments.least_rate / arguments.greatest_rate)]
    words += [str(arguments.steps), str(arguments.recipe.resolve()), *arguments.flags, "--seed", str(seed)]
    words += [f"--{name}", str(arguments.greatest_rate), "--output_dir", str(folder)]
    status, output = launch(words, folder.with_suffix(".txt"))
    if status and not (folder / "nonfinite.json").exists():
        errors = [line.removeprefix("error: ") for line in output.splitlines() if line.startswith("error: ")]
        if not errors:
            print(output[-4000:], file=sys.stderr)
        raise UserError(
            errors[0] if errors else f"the training of seed {seed} failed, as shown above. Fix the recipe."
        )
    if len(losses := read_losses(folder / "metrics.jsonl")) < FIRST:
        raise UserError(
            f"no answer: with seed {seed} only {len(losses)} steps have a finite loss. Lower --least_rate."
        )
    return losses


def launch(words: list[str], log: Path) -> tuple[int, str]:
    """Run a command; return its status and output. Where this program is interrupted, it ends the command first."""
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
        try:
            process.wait()
        finally:
            process.terminate()
            process.wait()
    return process.returncode, log.read_text(errors="replace")


def read_losses(metrics: Path) -> np.ndarray:
    """Return the losses up to the first that is not finite, which metrics.jsonl has as null."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    losses = [line["loss"] for line in lines if "loss" in line]
    return np.array(losses[: losses.index(None)] if None in losses else losses, float)


def train(ratio: float, steps: int, path: Path, flags: list[str]) -> None:
    """Run the recipe in this process of a launch; its rate rises exponentially from `ratio` x peak to the peak.

    Names of the recipe's own module are replaced, so that its loop runs as it is, and neither evaluates nor saves.
    """
    # The run's identity reads the program's name and source here.
    sys.argv = [str(path), *flags, "--max_steps", str(steps), "--logging_steps", "1", "--report_to", "none"]
    recipe = load_recipe(path)
    *others, config = recipe.parse(*recipe.CONFIGS)
    build_optimizer = recipe.build_optimizer
    recipe.build_optimizer = lambda *given: rising(build_optimizer(*given)[0], ratio, steps)
    recipe.evaluate = lambda *_: None
    recipe.Run = type("Run", (recipe.Run,), {"save": lambda *_: None})
    # Enough epochs for the steps; the samples of a step do not depend on their number.
    recipe.main(*others, dataclasses.replace(config, epochs=max(config.epochs, steps)))


def rising(optimizer: Optimizer, ratio: float, steps: int) -> tuple[Optimizer, LambdaLR]:
    """Return the optimizer with a scheduler that multiplies its peaks by ratio, ..., 1, equal factors apart."""
    return optimizer, LambdaLR(optimizer, lambda step: ratio ** max(0.0, 1 - step / (steps - 1)))


# The answer


def smooth(losses: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Return one loss per rate: capped, and averaged by a Gaussian kernel in the logarithm of the rate. Steps after
    the first that is not finite have the cap."""
    cap = CAP * np.median(losses[:FIRST])
    padded = np.append(losses, np.full(len(rates) - len(losses), cap))
    decades = np.log10(rates)
    kernel = np.exp(-(((decades[:, None] - decades) / WIDTH) ** 2) / 2)
    return kernel @ np.minimum(padded, cap) / kernel.sum(1)


def edge(curve: np.ndarray) -> int:
    """Return the first step at which the curve has risen above its least value so far; else the last step."""
    risen = curve > np.minimum.accumulate(curve) + RISE * curve[0]
    return int(risen.argmax()) if risen.any() else len(curve) - 1


def suggest(curves: list[np.ndarray], rates: np.ndarray) -> tuple[float | None, str]:
    """Return a rate and its reason; or None, and a reason with a remedy."""
    average, single = np.mean(curves, 0), [rates[edge(curve)] / MARGIN for curve in curves]
    step = edge(average)
    first, least, rate = average[0], average[: max(1, step)].min(), f"{rates[step]:.2g}"
    if least > (1 - LEAST_FALL) * first:
        remedy = "Lower --least_rate, raise --greatest_rate or --steps, or give the recipe larger batches."
        return None, f"up to the rate {rate} the averaged loss never falls by {LEAST_FALL:.0%}. {remedy}"
    if step == len(rates) - 1:
        return None, f"up to the rate {rate} the averaged loss does not rise again. Raise --greatest_rate."
    if max(single) > DISAGREE * min(single):
        spread = f"single trainings say {min(single):.2g} to {max(single):.2g}"
        return None, f"{spread}. Raise --steps, or give the recipe larger batches."
    fall = f"the averaged loss falls from {first:.3g} to {least:.3g}, and rises by {RISE * first:.2g} at {rate}"
    return rates[step] / MARGIN, f"{fall}, {MARGIN} times this rate."


def draw(path: Path, name: str, rates: np.ndarray, losses: list, curves: list, rate: float | None) -> None:
    """Write a chart of the losses (thin lines), their smoothed average (thick) and the suggestion."""
    from matplotlib.figure import Figure

    figure, average = Figure(figsize=(7, 4.5), layout="constrained"), np.mean(curves, 0)
    panel = figure.subplots()
    panel.set(xscale="log", xlabel=f"--{name}", ylabel="training loss")
    for values in losses:
        panel.plot(rates[: len(values)], values, linewidth=0.7, alpha=0.6)
    panel.plot(rates, average, color="black", linewidth=2.5, label=f"average of {len(losses)}, smoothed")
    if rate:
        panel.axvline(rate, color="tab:red", linestyle="--", label=f"suggestion: {rate:.2g}")
    low, high = average.min(), average[0]
    panel.set_ylim(low - 0.1 * high, 1.4 * high)  # what diverged would flatten the rest
    panel.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_file", type=Path, default=CONFIGURATION, help="the launcher's (local_ddp.yaml)")
    parser.add_argument("--num_processes", type=int, help="the launcher's (the file's)")
    parser.add_argument("--least_rate", type=float, default=1e-5, help="of the first step (%(default)s)")
    parser.add_argument("--greatest_rate", type=float, default=10.0, help="of the last step (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of each training (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="trainings; their seeds follow --seed (%(default)s)")
    parser.add_argument("--chart", type=Path, help="file to write, .png or .svg (learning_rate_<recipe>.png)")
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe's file")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="the recipe's flags")
    return parser.parse_args(words)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        train(float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5:])
        sys.exit()
    begin()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises, as Ctrl-C does, so that nothing is left behind
    try:
        sys.exit(main(parse(expand_home(sys.argv[1:]))))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")

# SPDX-License-Identifier: Apache-2.0
"""Measure what resuming costs: saves beside plain writes, the loop's wait, the check for signals, a resumed start.

    python benchmarks/checkpoint.py [--model resnet50] [--processes 2] [--rounds 7] [--folder .]

In each round, in turn: `dd conv=fsync` of as many bytes as a checkpoint of the model with SGD's momenta has, a
synchronous save, and one in the background, of which the loop only waits for the copy. Then the check for an
interruption, in steps of 0.1 s. Then starts of recipes/resnet.py, plain and resumed in turn, up to the end of the
first step. Prints a table and writes benchmarks/results/checkpoint_<hardware>_<date>.json. Goals: a save within 3 x of
dd, a wait of at most 10 % of a save, a check below 0.1 % of a step, a resume that adds less than 2 s.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from report import ROOT, median_and_spread, table, write

sys.path.insert(0, str(ROOT / "recipes"))
import resnet

from shared.accelerator import build_accelerator
from shared.checkpoint import Checkpoints, checkpoints, read_manifest
from shared.config import expand_home
from shared.lifetime import die_with_parent
from shared.run.interruption import Interruption

STEP_SECONDS = 0.1
BEFORE = 9  # steps before a resume: within an epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="torchvision's name")
    parser.add_argument("--processes", type=int, default=2, help="processes, of one machine")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each kind, after one that warms up")
    parser.add_argument("--checks", type=int, default=10, help="measurements of a check's cost, 50 steps each")
    parser.add_argument("--starts", type=int, default=5, help="pairs of starts of the recipe")
    parser.add_argument("--folder", default=".", help="where to write: the file system that is measured")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(expand_home(sys.argv[1:]))
    if arguments.worker:
        return work(arguments, Path(arguments.worker))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name).resolve()
        finish(launch(arguments, __file__, *sys.argv[1:], "--worker", folder))
        measured = json.loads((folder / "measured.json").read_text())
        if arguments.starts:
            start(arguments, folder / "base", BEFORE)
        starts = [start_seconds(arguments, folder / "base") for _ in range(arguments.starts)]
    report(measured, starts)


def launch(arguments, *words) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(arguments.processes)]
    command += ["--config_file", str(ROOT / "accelerate_configs/local_ddp.yaml"), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **pipes, preexec_fn=die_with_parent)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(output)


# One launch: saves and checks


def work(options, folder: Path) -> None:
    """Measure in every process; rank 0 writes measured.json."""
    config = resnet.Config(model=options.model)
    accelerator = build_accelerator(0, config)
    model = resnet.build_model(None, config, 10, seed=0)
    optimizer, scheduler = resnet.build_optimizer(model, config, 100)
    model, optimizer = resnet.parallelize(accelerator, model, optimizer, config)
    model(torch.randn(2, 3, 32, 32, device=accelerator.device)).sum().backward()
    optimizer.step()
    both = [Checkpoints(folder / name, accelerator, {}, 2, name == "async") for name in ("sync", "async")]
    measured = {"dd": [], "save": [], "held": [], "background": []}
    for step in range(1, 2 + options.rounds):
        arguments = model, optimizer, scheduler, {"step": step}, {}
        held = [seconds(accelerator, partial(each.save, *arguments)) for each in both]
        background = seconds(accelerator, both[1].wait)
        size = sum(entry["bytes"] for entry in read_manifest(checkpoints(folder / "sync")[-1])["files"].values())
        plain = seconds(accelerator, partial(dd, accelerator, folder / "dd", size))
        for name, value in zip(measured, (plain, *held, held[1] + background), strict=True):
            measured[name].append(value)
    measured = {name: values[1:] for name, values in measured.items()} | {"checkpoint_bytes": size}
    measured["check"] = check_seconds(accelerator, folder, options.checks)
    if accelerator.is_main_process:
        (folder / "measured.json").write_text(json.dumps(measured))
    accelerator.wait_for_everyone()
    accelerator.end_training()


def dd(accelerator, path: Path, size: int) -> None:
    if accelerator.is_main_process:
        command = ["dd", "if=/dev/zero", f"of={path}", "bs=1M", f"count={size >> 20}", "conv=fsync"]
        subprocess.run(command, check=True, capture_output=True)
        path.unlink()
    accelerator.wait_for_everyone()


def seconds(accelerator, function: Callable[[], None]) -> float:
    """Return the seconds of a call, made when all earlier writes are on the disk."""
    os.sync()
    accelerator.wait_for_everyone()
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def check_seconds(accelerator, folder: Path, checks: int) -> list[float]:
    """Return the seconds that the check takes per step, as means over fifty steps."""
    interruption, means = Interruption(accelerator, folder, 3600), []
    for _ in range(checks):
        total = 0.0
        for step in range(50 * len(means), 50 * len(means) + 50):
            time.sleep(STEP_SECONDS)
            begin = time.perf_counter()
            interruption.agreed(step)
            total += time.perf_counter() - begin
        means.append(total / 50)
    interruption.close()
    return means


# Starts of the recipe


def start_seconds(arguments, base: Path) -> tuple[float, float]:
    """Return the seconds from the command to the end of the first step: of a plain start, and of one that resumes
    within an epoch."""
    fresh, resumed = base.with_name("fresh"), base.with_name("resumed")
    for folder in (fresh, resumed):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, resumed)
    return start(arguments, fresh, 1), start(arguments, resumed, BEFORE + 1)


def start(arguments, folder: Path, last_step: int) -> float:
    """Start or resume, and train to this step; return the seconds until metrics.jsonl has it."""
    flags = ["--model", arguments.model, "--report_to", "none", "--logging_steps", "1", "--output_dir", folder]
    begin = time.perf_counter()
    process = launch(arguments, ROOT / "recipes/resnet.py", *flags, "--max_steps", last_step)
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and f'"step": {last_step},' in metrics.read_text()):
        time.sleep(0.02)
    taken = time.perf_counter() - begin
    finish(process)
    return taken


def report(measured: dict, starts: list[tuple[float, float]]) -> None:
    rates = {
        "save / dd": [save / plain for save, plain in zip(measured["save"], measured["dd"], strict=True)],
        "held / save": [held / save for held, save in zip(measured["held"], measured["save"], strict=True)],
        "check / step": [check / (STEP_SECONDS + check) for check in measured["check"]],
        "resumed - plain start, s": [resumed - fresh for fresh, resumed in starts],
    }
    values = {
        "dd conv=fsync, s": measured["dd"],
        "save, s": measured["save"],
        "held by a save in the background, s": measured["held"],
        "a save in the background, s": measured["background"],
        "check, s a step": measured["check"],
        "plain start, s": [fresh for fresh, _ in starts],
        "resumed start, s": [resumed for _, resumed in starts],
    }
    rows = [{"what": name, **median_and_spread(numbers)} for name, numbers in {**values, **rates}.items() if numbers]
    print(table(rows))
    save, held, check = (statistics.median(rates[name]) for name in list(rates)[:3])
    print(f"a save takes {save:.1f} x dd (goal: 3); in the background the loop waits {held:.1%} of it (goal: 10 %)")
    print(f"the check takes {check:.3%} of a step (goal: 0.1 %)")
    if starts:
        print(f"a resume adds {statistics.median(rates['resumed - plain start, s']):.1f} s to a start (goal: 2)")
    print(write("checkpoint", rows, **measured, starts=starts))


if __name__ == "__main__":
    main()

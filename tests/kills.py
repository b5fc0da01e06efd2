# SPDX-License-Identifier: Apache-2.0
"""Kills at any moment, half of them within a save, of one worker, all of them or the launcher, and the next start.

Used by test_survival.py and, for hundreds of kills, by soak.py.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, launch_command
from forked import Launch, Server

from shared.checkpoint import checkpoints, damage, read_manifest

VICTIMS = ("one worker", "all workers", "launcher")
AT = ("start", "step", "step", "tmp-*", "tmp-*/tensors-*", "tmp-*/manifest.json")  # half of them in a save
STEPS = 5  # that a start may make, at most, before a kill that is not aimed at a save, and within a pause
BEGINS = "batch: "  # what a run says when the folder is its own
MOST_SECONDS = 300  # of one start

QUIET = ["--logging_steps", "1", "--report_to", "none", "--num_workers", "1"]
# Twelve steps an epoch of 240 small images.
RESNET = [*QUIET, "--learning_rate", "0.001", "--global_batch_size", "20", "--image_size", "16", "--epochs", "3"]
VIT = [*QUIET, "--global_batch_size", "20", "--image_size", "16", "--warmup_epochs", "0.5", "--epochs", "5"]
VIT += ["--learning_rate", "1e-3", "--drop_path", "0.2"]
LLM = [
    *QUIET,
    "--data",
    "docstrings",
    "--global_batch_size",
    "16",
    "--sequence_length",
    "64",
    "--warmup_epochs",
    "0.5",
]

# case: kills in the test, recipe, its flags, the launcher's
KILLED = {
    "1 process": (4, "vit", [*VIT, "--max_steps", "40"], {}),
    "2 processes, batch norm": (3, "resnet", [*RESNET, "--norm", "batch", "--max_steps", "30"], {"num_processes": 2}),
    "4 processes": (2, "vit", [*VIT, "--max_steps", "24"], {"num_processes": 4}),
    "fsdp": (2, "vit", [*VIT, "--max_steps", "24"], {"num_processes": 2, "config_file": "local_fsdp.yaml"}),
    "language": (2, "llm", [*LLM, "--max_steps", "24"], {"num_processes": 2}),
}
IN_BACKGROUND = {"2 processes, batch norm", "fsdp"}  # of these, the ones that are killed write there
# Only `make soak` has time for these too.
DIGITS = [*QUIET, "--data", "digits", "--learning_rate", "0.001", "--norm", "group", "--image_size", "16"]
DIGITS += ["--global_batch_size", "64", "--max_steps", "30"]
SOAKED = KILLED | {
    "webdataset": (2, "resnet_webdataset", DIGITS, {"num_processes": 2}),
    "torchdata": (2, "resnet_torchdata", DIGITS, {"num_processes": 2}),
    "zero2": (2, "vit", [*VIT, "--max_steps", "24"], {"num_processes": 2, "config_file": "local_zero2.yaml"}),
}


def words(folder: Path, *flags: str, recipe: str = "resnet", **launch) -> list[str]:
    """After `accelerate launch`, as the server takes them."""
    path = str(ROOT / f"recipes/{recipe}.py")
    return [*map(str, launch_command(**launch)[2:]), path, "--output_dir", str(folder), *flags]


def kill_once(server: Server, words: list[str], folder: Path, victim: str, at: str, chance: random.Random) -> bool:
    """Start and kill; False where the run ended before."""
    lines, before = steps(folder), set((folder / "checkpoints").glob("*/*"))
    wanted = lines + chance.randint(1, STEPS)
    launch = server.start(words)
    if at == "start":
        pause(chance.uniform(0, 2), folder, lines, launch)
    elif at == "step":
        # Until then the workers of a launcher that was killed may hold the folder, and write.
        wait_for(lambda: launch.ended or BEGINS in launch.output.read_text(), launch)
        wait_for(lambda: launch.ended or steps(folder) >= wanted, launch)
        pause(chance.uniform(0, 0.1), folder, wanted, launch)
    else:
        wait_for(lambda: launch.ended or set((folder / "checkpoints").glob(at)) - before, launch)
        pause(chance.choice((0, chance.uniform(0, 0.05), chance.uniform(0, 0.4))), folder, steps(folder), launch)
    if launch.ended:
        return False
    workers = launch.workers
    pids = {"one worker": workers and [chance.choice(workers)], "all workers": workers}.get(victim)
    launch.kill(pids or [launch.pid])
    launch.wait()
    return True


def pause(seconds: float, folder: Path, step: int, launch: Launch) -> None:
    """Sleep, but not for more than STEPS steps after this one: a fast machine would end the run meanwhile."""
    end = time.monotonic() + seconds
    wait_for(lambda: launch.ended or time.monotonic() >= end or steps(folder) >= step + STEPS, launch)


def kill_often(
    server: Server,
    words: list[str],
    folder: Path,
    kills: int,
    chance: random.Random,
    say: Callable = lambda line: None,
) -> Counter:
    """Return how many kills of each kind hit; the run resumes at every start, and at last runs to its end."""
    counts, moments = Counter(), []
    while counts.total() < kills:
        victim, moments = chance.choice(VICTIMS), moments or chance.sample(AT, len(AT))
        at = moments.pop()
        if not kill_once(server, words, folder, victim, at, chance):
            break
        counts[f"{victim} at {at}"] += 1
        say(f"{folder.name}: {victim} at {at}, after step {steps(folder)}")
        found = {path: damage(path) for path in checkpoints(folder / "checkpoints")}
        # The workers of a launcher that was killed still end: one that is gone by now was superfluous.
        broken = {path.name: reason for path, reason in found.items() if reason and path.exists()}
        assert not broken, broken
    last = server.launch(words)
    assert last.returncode == 0, last.stdout
    return counts


def steps(folder: Path) -> int:
    """The last step in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        if line.endswith("}"):
            return json.loads(line)["step"]
    return 0


def difference(folder: Path, reference: Path, names: tuple[str, ...] = ("tensors", "index", "zero")) -> str | None:
    """Return what differs between two runs, bit by bit: the curves, or the last checkpoint's weights and optimizer."""
    ours, theirs = (curve(path) for path in (folder, reference))
    if ours != theirs:
        pairs = ((one, other) for one, other in zip(ours, theirs, strict=False) if one != other)
        return f"lines {len(ours)} and {len(theirs)}; first {next(pairs, None)}"
    newest = [checkpoints(path / "checkpoints")[-1] for path in (folder, reference)]
    if newest[0].name != newest[1].name or damage(newest[0]):
        return f"checkpoint {newest}"
    sums = [
        {name: entry for name, entry in read_manifest(path)["files"].items() if name.startswith(names)}
        for path in newest
    ]
    return None if sums[0] == sums[1] and sums[0] else f"files {sums}"


def curve(folder: Path) -> list[tuple]:
    """All that a step or an evaluation says of the training, timings left out."""
    names = [
        "step",
        "epoch",
        "samples",
        "loss",
        "samples_digest",
        "learning_rate",
        "grad_norm",
        "accuracy",
        "eval_loss",
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line.get(name) for name in names) for line in lines]


def wait_for(condition: Callable[[], bool], launch: Launch | None = None, seconds: float = MOST_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited in vain\n{launch.output.read_text() if launch else ''}")
        time.sleep(0.002)

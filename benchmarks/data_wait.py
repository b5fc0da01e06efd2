# SPDX-License-Identifier: Apache-2.0
"""Measure how long a training waits for its images: recipes/resnet.py on JPEGs, with each loader, on one GPU.

    python benchmarks/data_wait.py                                    # ResNet-50, 224 px, bf16, channels-last, compile
    python benchmarks/data_wait.py --data $DSDIR/imagenet --num_workers 8

Without `--data` the images are crops of scikit-learn's two photographs, 470 x 385 pixels in 91 kB, listed in a CSV
often enough to make epochs of `--images`; they come from the page cache. Each recipe runs `--max_steps` steps in turn,
`--rounds` times. Only windows of ten steps that lie within an epoch, and after a run's first forty steps (compilation,
warm-up), count. data_wait_fraction is the share of a window in which the training loop waited for a batch.
Goal: less than 3 % with 16 cores. Writes benchmarks/results/data_wait_<hardware>_<date>.json.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from loaders import photographs
from report import ROOT, cores, median_and_spread, table, write

from shared.lifetime import die_with_parent

WARMUP, WINDOW = 40, 10  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="", help="what resnet.py's --data takes; default: photographs")
    add("--recipes", default="resnet", help="comma list: resnet, resnet_dali, ...; in turn")
    add("--model", default="resnet50", help="torchvision's name (%(default)s)")
    add("--image_size", default="224", help="pixels (%(default)s)")
    add("--global_batch_size", default="256", help="images per step (%(default)s)")
    add("--mixed_precision", default="bf16", help="%(default)s")
    add("--num_workers", default=str(max(1, cores() - 1)), help="loader processes (all cores but one: %(default)s)")
    add("--no_compile", action="store_true", help="do not compile the network")
    add("--images", type=int, default=40_000, help="images of an epoch, without --data (%(default)s)")
    add("--max_steps", default="150", help="steps of each run (%(default)s)")
    add("--rounds", type=int, default=2, help="runs of each recipe (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        data = arguments.data or str(make_images(Path(name) / "images", arguments.images))
        windows = {recipe: [] for recipe in arguments.recipes.split(",")}
        for number in range(arguments.rounds):
            for recipe in windows:
                windows[recipe] += train(recipe, data, Path(name) / f"{recipe}-{number}", arguments)
    rows = [
        {"recipe": recipe}
        | {
            name: median_and_spread(line[name] for line in lines)
            for name in ("samples_per_second", "data_wait_fraction")
        }
        for recipe, lines in windows.items()
    ]
    print(table(rows))
    settings = {name: value for name, value in vars(arguments).items() if name not in ("recipes", "rounds")}
    print(write("data_wait_eager" if arguments.no_compile else "data_wait", rows, settings=settings))


def make_images(folder: Path, count: int) -> Path:
    """Write 512 photographs and a CSV that lists them over and over: an epoch of `count`, and 256 held out."""
    folder.mkdir()
    images = list(photographs(512))
    for number, (data, _) in enumerate(images):
        (folder / f"{number}.jpg").write_bytes(data)
    lines = [
        f"{place % 512}.jpg,{images[place % 512][1]},{'train' if place < count else 'val'}"
        for place in range(count + 256)
    ]
    (folder / "images.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
    return folder / "images.csv"


def train(recipe: str, data: str, folder: Path, arguments: argparse.Namespace) -> list[dict]:
    """Return the lines of those windows of one run that count."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_configs/local_ddp.yaml",
    ]
    command += ["--mixed_precision", arguments.mixed_precision, f"recipes/{recipe}.py", "--data", data]
    for name in ("model", "image_size", "global_batch_size", "num_workers", "max_steps"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += [] if arguments.no_compile else ["--compile"]
    command += ["--channels_last", "--min_crop_area", "0.08", "--horizontal_flip", "--epochs", "90"]
    command += ["--logging_steps", str(WINDOW), "--report_to", "none", "--output_dir", str(folder)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=die_with_parent)
    if process.returncode:
        sys.exit(process.stdout + process.stderr)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    print(f"{recipe}: {process.stdout.splitlines()[-4:]}", file=sys.stderr)
    return list(within_epochs([line for line in lines if "loss" in line]))


def within_epochs(lines: list[dict]) -> Iterator[dict]:
    """Yield all lines except those of the warm-up and the first of each epoch."""
    for former, line in itertools.pairwise(lines):
        if former["epoch"] == line["epoch"] and former["step"] >= WARMUP:
            yield line


if __name__ == "__main__":
    main()

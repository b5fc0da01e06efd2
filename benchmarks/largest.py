# SPDX-License-Identifier: Apache-2.0
"""Find the largest Vision Transformer that trains on one device, with each way to save its memory.

    python benchmarks/largest.py                              # S to G, 224 px, batch 32, every case
    python benchmarks/largest.py --sizes B,L --cases whole    # some

Each case and size is one launch of recipes/vit_zero.py or recipes/vit.py for a few steps on random images. A size is
not tried where a smaller one had no room, nor are sizes between the named ones. Writes
benchmarks/results/largest_<hardware>_<date>.json.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from report import ROOT, table, write

from shared.lifetime import die_with_parent

# name: topology, recipe, the launcher's flags, the recipe's flags
CASES = {
    "whole": ("ddp", "vit", [], []),
    "recompute": ("ddp", "vit", [], ["--activation_checkpointing"]),
    "fsdp offload": ("fsdp", "vit", ["--fsdp_offload_params", "true"], ["--activation_checkpointing"]),
    "zero2 optimizer offload": (
        "zero2",
        "vit_zero",
        ["--offload_optimizer_device", "cpu"],
        ["--activation_checkpointing"],
    ),
    "zero3 offload": ("zero3_offload", "vit_zero", [], ["--activation_checkpointing"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, words = parser.add_argument, lambda text: text.split(",")
    add("--sizes", type=words, default="S,B,L,H,g,G", help="comma list, rising (%(default)s)")
    add("--cases", type=words, default=",".join(CASES), help="%(default)s")
    add("--batch_size", type=int, default=32, help="images per step (%(default)s)")
    add("--image_size", type=int, default=224, help="pixels (%(default)s)")
    add("--mixed_precision", default="bf16", help="%(default)s")
    arguments = parser.parse_args()
    unknown = set(arguments.cases) - set(CASES)
    if unknown:
        parser.error(f"--cases {unknown.pop()} is unknown. Known: {', '.join(CASES)}.")
    with tempfile.TemporaryDirectory() as folder:
        images = make_images(Path(folder) / "images", 4 * arguments.batch_size, arguments.image_size)
        rows = [row for case in arguments.cases for row in climb(case, arguments, images, Path(folder))]
    print(table(rows))
    print(write("largest", rows, batch_size=arguments.batch_size, image_size=arguments.image_size))


def make_images(folder: Path, count: int, image_size: int) -> Path:
    """Write noise in two classes: memory does not depend on what is seen."""
    pixels = np.random.default_rng(0).integers(256, size=(image_size, image_size, 3), dtype=np.uint8)
    for part, number in (("train", count), ("val", 2)):
        for index in range(number):
            path = folder / part / str(index % 2) / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(pixels, index, axis=0)).save(path)
    return folder


def climb(case: str, arguments: argparse.Namespace, images: Path, folder: Path) -> list[dict]:
    """Return a row per size, up to the first that has no room."""
    rows = []
    for size in arguments.sizes:
        rows.append({"case": case, "model": size} | train(case, size, arguments, images, folder / f"{case}-{size}"))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if rows[-1]["result"] != "trains":
            break
    return rows


def train(case: str, size: str, arguments: argparse.Namespace, images: Path, folder: Path) -> dict:
    topology, recipe, launch, flags = CASES[case]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command += ["--config_file", f"accelerate_configs/local_{topology}.yaml"]
    command += ["--mixed_precision", arguments.mixed_precision, *launch, f"recipes/{recipe}.py", *flags]
    patch_size = next(patch for patch in (14 if size in "HgG" else 16, 16, 8) if arguments.image_size % patch == 0)
    command += ["--model", size, "--patch_size", str(patch_size), "--image_size", str(arguments.image_size)]
    command += ["--data", str(images), "--global_batch_size", str(arguments.batch_size), "--max_steps", "4"]
    command += ["--logging_steps", "1", "--report_to", "none", "--output_dir", str(folder)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=die_with_parent)
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if re.search(r"Error|error:", line)]
        no_room = "OutOfMemoryError" in process.stderr
        return {"result": "out of memory" if no_room else (lines or ["failed"])[0][:200]}
    summary = json.loads((folder / "summary.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["samples_per_second"] for line in steps if "samples_per_second" in line]
    # The last step: those before it warm up.
    return {
        "result": "trains",
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "last_step_images_per_second": rates[-1],
    }


if __name__ == "__main__":
    main()

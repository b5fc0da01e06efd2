# SPDX-License-Identifier: Apache-2.0
"""Measure the cost of opening a data set of ImageNet's size: its index is built once, then mapped from the cache.

    python benchmarks/index.py                        # 1,281,167 images in 1,000 tar shards, some 2.6 GB of empty ones
    python benchmarks/index.py --samples 10000 --shards 10

Writes shards of images without content below `--work`, has resnet.py's `open_data` list them in a new process (cold:
each header is read), and again in others, in which the list comes from the cache (warm). Memory is what the process
holds for itself after it has opened the data and drawn an epoch's order, less what it held before: pages of the mapped
file are shared. Writes benchmarks/results/index_<hardware>_<date>.json.
"""

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from report import ROOT, median_and_spread, table, write

from shared.lifetime import die_with_parent

OPEN = """
import sys, time, psutil
sys.path.insert(0, "{root}")
from accelerate import PartialState
from shared.images import open_data
from shared.order import TrainingOrder
PartialState()
before = psutil.Process().memory_full_info().uss
begin = time.perf_counter()
train, _ = open_data("{data}", 0.0, 0)
seconds = time.perf_counter() - begin
TrainingOrder(len(train), 256, 256, 0, 1, 0).permutation(0)
assert len(train) == {samples}
print(seconds, psutil.Process().memory_full_info().uss - before)
"""


def write_shards(folder: Path, samples: int, shards: int) -> None:
    """Write shards of KEY.jpg, empty, and KEY.cls in webdataset's convention, and one held-out shard."""
    for part, first, last in [("train", 0, shards), ("val", shards, shards + 1)]:
        (folder / part).mkdir()
        for shard in range(first, last):
            with tarfile.open(folder / part / f"{shard:06d}.tar", "w") as tar:
                for key in range(shard, samples, shards) if part == "train" else range(min(1000, samples)):
                    for kind, data in (("jpg", b""), ("cls", b"%d" % (key % 1000))):
                        member = tarfile.TarInfo(f"{key:07d}.{kind}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))


def opened(folder: Path, samples: int) -> tuple[float, float]:
    """Return seconds and megabytes of opening the data, in a process of its own."""
    code = OPEN.format(root=ROOT, data=folder / "data", samples=samples)
    environment = os.environ | {"SCRATCH": str(folder)}
    pipes = {"check": True, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.run([sys.executable, "-c", code], env=environment, **pipes, preexec_fn=die_with_parent)
    seconds, size = map(float, process.stdout.split())
    return seconds, size / 1e6


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.work, prefix="index-") as folder:
        (Path(folder) / "data").mkdir()
        write_shards(Path(folder) / "data", args.samples, args.shards)
        (cold, _), *warm = [opened(Path(folder), args.samples) for _ in range(1 + args.repeats)]
    sizes = {"samples": args.samples, "shards": args.shards}
    rows = [
        {"list": "built (cold)", **sizes, "seconds": cold, "megabytes": None},
        {"list": "from the cache (warm)", **sizes}
        | {
            "seconds": median_and_spread(run[0] for run in warm),
            "megabytes": median_and_spread(run[1] for run in warm),
        },
    ]
    print(table(rows))
    print(write("index", rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--samples", type=int, default=1_281_167, help="images in training shards")
    parser.add_argument("--shards", type=int, default=1000, help="training shards")
    parser.add_argument("--repeats", type=int, default=5, help="warm openings")
    parser.add_argument("--work", default=None, help="an existing folder for the shards; default: temporary")
    main(parser.parse_args())

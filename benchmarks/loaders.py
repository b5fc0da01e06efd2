# SPDX-License-Identifier: Apache-2.0
"""Compare loaders in a bake-off: images a second of each, with this machine's cores, from your images and your disk.

    python benchmarks/loaders.py                                         # crops of scikit-learn's two photographs
    python benchmarks/loaders.py --data $DSDIR/imagenet --num_workers 8  # 1,024 of your images
    python benchmarks/loaders.py --data FOLDER --output loaders.json     # results there, not in benchmarks/results/
    python benchmarks/loaders.py --part sweep --num_workers 16           # only how many workers, in a few minutes

It takes `--images` images of `--data` (all that resnet.py reads), stores them below `--work` as class folders, tar
shards and parquet, and lets each loader make training batches of them: a random crop of 8 to 100 % of the area,
resized to `--image_size`, mirrored half of the time. The loaders run in turn, round by round, each in a process of its
own. Its first epoch is not counted, so that files come from the page cache. For our loaders that epoch is the row's
cold_images_per_second: the page cache is emptied of the files before it, and the workers have just started. A figure
is the median of the rounds, with its spread beside it; a loader that fails has the reason in its row. `decode_only` is
one core that decodes whole JPEGs by simplejpeg: a limit to compare the others' images_per_core_second with. Ours and
DALI give uint8, which is normalised (ours also mirrored) on the device; torchvision's reference, timm, webdataset and
datasets do all of it on the CPU, as their own examples do. Then follow a sweep over workers, prefetched batches and
pinned memory, in rounds too, with a recommendation, and the memory of one worker over twenty epochs.
Writes benchmarks/results/loaders_<hardware>_<date>.json, and a chart beside it.
"""

import argparse
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import psutil
import torch
from contestants import DEVICE, LOADERS, ON_GPU, Epoch, decode_only, installed, ours, training_views
from PIL import Image
from report import ROOT, cores, median_and_spread, table, write

from shared.config import expand_home
from shared.errors import UserError
from shared.images import Batch, Loader, open_data
from shared.images.loader import PREFETCH, WorkerLoader
from shared.lifetime import die_with_parent

PAIRS = 20  # comparisons of one worker with two, in a round
EPOCHS = 20  # over which a worker's memory is measured


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.work, prefix="loaders-") as folder:
        args.folder = Path(folder)
        # Lists of shards and arrow files go where the images are, so that they are read from there, and removed.
        os.environ |= {"SCRATCH": f"{folder}/lists", "HF_DATASETS_CACHE": f"{folder}/arrow"}
        stores = in_process(store, args)
        print(table(stores))
        contestants = [name for name in LOADERS if not args.loaders or name in args.loaders.split(",")]
        contestants = contestants if args.part != "sweep" else []
        rows = bake_off([name for name in contestants if installed(name)], args)
        print(table(rows) if rows else "")
        for name in contestants:
            if not installed(name):
                print(f"{name}: left out, {LOADERS[name][1]} is not installed (or there is no GPU)")
        sweep, more = [], {}
        if not args.loaders and args.part != "bake_off":
            sweep, more = sweep_options(args), in_process(two_over_one, args)
            more |= {"worker_megabytes": in_process(worker_memory, args), "advice": recommendation(sweep)}
            print(table(sweep), *(f"{name}: {value}" for name, value in more.items()), sep="\n")
        name = "loaders" if args.part == "all" else f"loaders_{args.part}"
        path = write(name, rows, output=args.output, stores=stores, sweep=sweep, **more)
        chart(rows, sweep, (Path(args.output) if args.output else ROOT / path).with_suffix(".png"))
        print(path)


# The images


def images_of(args: argparse.Namespace) -> list[tuple[bytes, int]]:
    """Return (encoded, label) of `--images` images, evenly spread over the training images."""
    if args.data == "photographs":
        return list(photographs(args.images))
    source, _ = open_data(args.data, args.val_fraction, 0)
    numbers = np.linspace(0, len(source) - 1, min(args.images, len(source))).astype(int)
    _, labels = np.unique(source.labels[numbers], return_inverse=True)  # few images may be of few of many classes
    return [(encoded(source.images[n]), label) for n, label in zip(numbers.tolist(), labels.tolist(), strict=True)]


def photographs(number: int) -> Iterator[tuple[bytes, int]]:
    """Cut images like ImageNet's out of scikit-learn's two photographs: 470 x 385 pixels in about 91 kB."""
    from sklearn.datasets import load_sample_images

    draws, photos = np.random.default_rng(0), load_sample_images().images
    for place in range(number):
        pixels = photos[place % 2]
        top, left = (int(draws.integers(0, room)) for room in (pixels.shape[0] - 384, pixels.shape[1] - 469))
        yield encoded(pixels[top : top + 385, left : left + 470], quality=97 - place // 2 % 2), place % 2


def encoded(image: bytes | np.ndarray, quality: int = 95) -> bytes:
    if isinstance(image, bytes):
        return image
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


def store(args: argparse.Namespace) -> list[dict]:
    """Store the images in each format below args.folder; return files and bytes of each."""
    import datasets
    import webdataset

    images = images_of(args)
    for number, (data, label) in enumerate(images):
        path = args.folder / f"folder/{label:04d}/{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (args.folder / "tar").mkdir()
    most = -(-len(images) // max(16, args.num_workers))
    with webdataset.ShardWriter(f"{args.folder}/tar/%06d.tar", maxcount=most, verbose=0) as shards:
        for number, (data, label) in enumerate(images):
            shards.write({"__key__": f"{number:06d}", "jpg": data, "cls": label})
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(num_classes=max(images, key=label_of)[1] + 1)
    )
    columns = {"image": [{"bytes": data, "path": None} for data, _ in images], "label": [label for _, label in images]}
    (args.folder / "parquet").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(args.folder / "parquet/0.parquet")
    return [
        {
            "format": name,
            "images": len(images),
            "files": len(files),
            "bytes": sum(file.stat().st_size for file in files),
        }
        for name in ("folder", "tar", "parquet")
        for files in [[file for file in (args.folder / name).rglob("*") if file.is_file()]]
    ]


def label_of(image: tuple[bytes, int]) -> int:
    return image[1]


# Measuring


def in_process(function: Callable, *arguments):
    """Return what the function returns in a process of its own, which leaves no thread and no memory behind.

    Raises UserError, with the reason, where it fails there.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def target():
        die_with_parent(signal.SIGKILL)
        try:
            theirs.send((function(*arguments), ""))
        except Exception as error:
            traceback.print_exc()
            theirs.send((None, f"{type(error).__name__}: {error}".splitlines()[0]))
        os._exit(0)  # FFCV's threads may keep a process from ending

    process = context.Process(target=target)
    process.start()
    theirs.close()
    try:
        result, reason = ours.recv()
    except EOFError:
        result, reason = None, "its process was ended"
    process.join()
    if reason:
        raise UserError(reason)
    return result


def bake_off(names: list[str], args: argparse.Namespace) -> list[dict]:
    rows = [{"loader": name, **measured(runs)} for name, runs in in_rounds(names, args).items()]
    limits = [row["images_per_core_second"] for row in rows if row["loader"] == "decode_only"]
    for row in rows if limits and limits[0] else []:
        if row["images_per_core_second"]:
            row["of_decode_only"] = round(row["images_per_core_second"] / limits[0], 3)
    return rows


def in_rounds(names: list[str], args: argparse.Namespace) -> dict[str, list[dict] | str]:
    """Return what each round measured of each loader, or why a loader failed and was left out of later rounds."""
    seen = {name: [] for name in names}
    for number in range(args.rounds):
        for name in names:
            if isinstance(seen[name], str):
                continue
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            try:
                seen[name].append(in_process(measure, LOADERS[name][0], args, name.startswith("shared_")))
            except UserError as error:
                seen[name] = str(error)
    return seen


def measured(runs: list[dict] | str) -> dict:
    """Return a row's figures: medians, each with the spread of its rounds beside it."""
    if isinstance(runs, str):
        return {"images_per_second": None, "images_per_core_second": None, "left_out": runs}
    row = {}
    for name in runs[0]:
        spread = median_and_spread(run[name] for run in runs)
        row |= {name: spread.pop("median"), f"{name}_spread": spread}
    return row


def measure(make: Callable[[argparse.Namespace], Epoch], args: argparse.Namespace, cold: bool = False) -> dict:
    """Measure images a second, images a second of processor time, and bytes of memory that this process and its
    workers share with no other. cold: also images a second of the first epoch, from the disk."""
    if cold:
        drop_cache(args.folder)
    epoch = make(args)
    begin = time.perf_counter()
    first = sum(epoch()) / (time.perf_counter() - begin)
    return counted(lambda: sum(epoch()), args.seconds) | ({"cold_images_per_second": first} if cold else {})


def counted(some: Callable[[], int], least: float) -> dict:
    """Measure for at least this many seconds. some: loads images and returns their number."""
    images, processor, begin = 0, processor_seconds(), time.perf_counter()
    while time.perf_counter() - begin < least:
        images += some()
        if ON_GPU:
            torch.cuda.synchronize()
    seconds, processor = time.perf_counter() - begin, processor_seconds() - processor
    memory = sum(process.memory_full_info().uss for process in family())
    rates = {"images_per_second": images / seconds, "images_per_core_second": images / processor}
    return rates | {"memory_bytes": memory}


def drop_cache(folder: Path) -> None:
    """Drop what the kernel's page cache holds of these files, once they are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def family() -> list[psutil.Process]:
    """Return this process and its workers."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def processor_seconds() -> float:
    return sum(sum(process.cpu_times()[:2]) for process in family())


def sweep_options(args: argparse.Namespace) -> list[dict]:
    """Measure the tar shards' loader with each number of workers and of prefetched batches, pinned or not."""
    cases = sweep_cases(max(cores(), args.num_workers))
    runs = [[] for _ in cases]
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}: the sweep", file=sys.stderr)
        for case, seen in zip(cases, runs, strict=True):
            seen.append(in_process(measure_with, case, args))
    return [case | measured(seen) for case, seen in zip(cases, runs, strict=True)]


def two_over_one(args: argparse.Namespace) -> dict:
    """Measure how much faster two workers are than one, and two processes that only decode: the most that this machine
    can give. They take turns of seconds, since a shared machine's speed changes by the minute. Empty on one core."""
    if cores() < 2:
        return {}
    print("one worker and two, by turns with one decoder and two", file=sys.stderr)
    cases = [{"num_workers": workers, "prefetch_factor": PREFETCH, "pin_memory": ON_GPU} for workers in (1, 2)]
    ratios = {"two_workers_over_one": [], "two_decoders_over_one": []}
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, context, die_with_parent, (signal.SIGKILL,)) as pool:
        streams = [endless(case, args) for case in cases]
        for _ in range(PAIRS * args.rounds):
            loaded, decoders = [], [sum(pool.map(decoded, [args] * number)) for number in (1, 2)]
            for case, batches in zip(cases, streams, strict=True):
                fill_queues(case, batches)  # again: what lies there was made in the other's turn
                loaded.append(counted(partial(load_round, case, batches), args.seconds / 4)["images_per_second"])
            for (one, two), seen in zip((loaded, decoders), ratios.values(), strict=True):
                seen.append(two / one)
    return {name: median_and_spread(seen) for name, seen in ratios.items()}


def decoded(args: argparse.Namespace) -> float:
    """Return images a second of decoding alone."""
    images, number = chain.from_iterable(iter(decode_only(args), None)), 0  # epoch after epoch
    begin = time.perf_counter()
    while (seconds := time.perf_counter() - begin) < args.seconds / 4:
        number += next(images)
    return number / seconds


def sweep_cases(most: int) -> list[dict]:
    return [
        {"num_workers": workers, "prefetch_factor": prefetch, "pin_memory": pinned}
        for workers in (0, 1, 2, 4, 8, 16, 32, 64)
        if workers <= most
        for prefetch in ((1, 2, 4) if workers else (None,))
        for pinned in ((False, True) if ON_GPU else (False,))
    ]


def as_a_recipe(case: dict) -> bool:
    """Return whether a recipe takes these options, of which only --num_workers is a flag."""
    return case["prefetch_factor"] in (None, PREFETCH) and case["pin_memory"] == ON_GPU


def measure_with(case: dict, args: argparse.Namespace) -> dict:
    batches = endless(case, args)
    fill_queues(case, batches)
    return counted(partial(load_round, case, batches), args.seconds)


def endless(case: dict, args: argparse.Namespace) -> Iterator[Batch]:
    """Return batches of long epochs: the few batches of a bake-off's epoch do not divide evenly among workers."""
    views = training_views(args, "tar", times=100)
    options = {"prefetch_factor": case["prefetch_factor"] or PREFETCH, "pin_memory": case["pin_memory"]}
    loader = Loader(views, DEVICE, case["num_workers"], read=partial(WorkerLoader, **options))
    return chain.from_iterable(repeat(loader if ON_GPU else loader.batches))


def load_round(case: dict, batches: Iterator[Batch]) -> int:
    """Load one batch per worker: they come nearly at the same time, and a count ending between them would be off."""
    return sum(len(next(batches).labels) for _ in range(max(1, case["num_workers"])))


def fill_queues(case: dict, batches: Iterator[Batch]) -> None:
    for _ in range(1 + (case["prefetch_factor"] or 1)):
        load_round(case, batches)


def recommendation(sweep: list[dict]) -> str:
    """Name the fewest workers that are nearly as fast as any number, and whether other options would be faster."""
    recipes = [row for row in sweep if as_a_recipe(row)]
    best = max(row["images_per_second"] for row in recipes)
    least = min(
        (row for row in recipes if row["images_per_second"] >= 0.95 * best), key=lambda row: row["num_workers"]
    )
    top = max(sweep, key=lambda row: row["images_per_second"])
    return (
        f"Give --num_workers {least['num_workers']}: {least['images_per_second']:.0f} images/s, no other number is "
        f"over 5 % faster. (The most of all rows: {top['images_per_second']:.0f}, with {top['num_workers']} workers, "
        f"prefetch_factor {top['prefetch_factor']} and pin_memory {top['pin_memory']}; the recipes take "
        f"{PREFETCH} and {ON_GPU}.)"
    )


def worker_memory(args: argparse.Namespace) -> dict:
    """Return the megabytes of one worker's own memory after each of EPOCHS epochs."""
    args.num_workers = 1
    epoch, megabytes = ours(args, "tar"), []
    for _ in range(EPOCHS):
        for _ in epoch():
            pass
        megabytes.append(round(family()[1].memory_full_info().uss / 1e6, 1))
    return {"first": megabytes[0], "last": megabytes[-1], "epochs": megabytes}


def chart(rows: list[dict], sweep: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["images_per_core_second"]]
    parts = [(draw, drawn) for draw, drawn in ((draw_bars, rows), (draw_lines, sweep)) if drawn]
    if not parts:  # no loader could be measured
        return
    figure = Figure(figsize=(6 * len(parts), 5), layout="constrained")
    for panel, (draw, drawn) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        draw(panel, drawn)
    figure.savefig(path, dpi=120)


def draw_bars(panel, rows: list[dict]) -> None:
    names, values = ([row[field] for row in rows] for field in ("loader", "images_per_core_second"))
    colours = [
        "tab:gray" if name == "decode_only" else f"tab:{'blue' if 'shared' in name else 'orange'}" for name in names
    ]
    panel.barh(names, values, xerr=ends(rows, "images_per_core_second"), color=colours)
    panel.invert_yaxis()
    panel.set_xlabel("images a second of one core")


def draw_lines(panel, sweep: list[dict]) -> None:
    for prefetch in dict.fromkeys(row["prefetch_factor"] for row in sweep if row["num_workers"]):
        for pinned in dict.fromkeys(row["pin_memory"] for row in sweep):
            line = [row for row in sweep if row["prefetch_factor"] in (prefetch, None) and row["pin_memory"] == pinned]
            label = f"prefetch_factor {prefetch}{', pinned' if pinned else ''}"
            numbers, rates = ([row[field] for row in line] for field in ("num_workers", "images_per_second"))
            panel.errorbar(numbers, rates, ends(line, "images_per_second"), fmt="o-", capsize=3, label=label)
    panel.set_xlabel("--num_workers (shared_tar)")
    panel.set_ylabel("images a second")
    panel.set_ylim(bottom=0)
    panel.set_xticks(sorted({row["num_workers"] for row in sweep}))
    panel.legend(loc="lower right")


def ends(rows: list[dict], field: str) -> np.ndarray:
    """Return how far the spread goes below and above: (2, rows)."""
    values, least, most = np.array(
        [(row[field], row[f"{field}_spread"]["min"], row[f"{field}_spread"]["max"]) for row in rows]
    ).T
    return np.stack([values - least, most - values])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", default="photographs", help="the word photographs, or what resnet.py's --data takes")
    parser.add_argument("--val_fraction", type=float, default=0.0, help="as resnet.py's, for data without a split")
    parser.add_argument("--num_workers", type=int, default=1, help="loader processes (DALI and torchdata: threads)")
    parser.add_argument("--images", type=int, default=1024, help="how many to take")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of each loader, and of each case of the sweep"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="least duration of a measurement")
    parser.add_argument("--loaders", default="", help=f"some of them only, and no sweep: {', '.join(LOADERS)}")
    parser.add_argument("--part", choices=("all", "bake_off", "sweep"), default="all", help="of the benchmark")
    parser.add_argument(
        "--work", default=None, help="an existing folder on the disk to be measured; default: temporary"
    )
    parser.add_argument("--output", default="", help="a JSON file; its chart is put beside it")
    args = parser.parse_args(expand_home(sys.argv[1:]))
    # Every reader of streams gives an equal part of a batch.
    args.batch_size = -(-64 // max(1, args.num_workers)) * max(1, args.num_workers)
    unknown = set(args.loaders.split(",")) - {"", *LOADERS}
    if unknown:
        parser.error(f"no loader {min(unknown)}. There are: {', '.join(LOADERS)}")
    return args


if __name__ == "__main__":
    main(arguments())

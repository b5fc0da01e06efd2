# SPDX-License-Identifier: Apache-2.0
"""The bake-off: images a second that each loader brings, with this machine's cores, from your images and your disk.

    python benchmarks/loaders.py                                         # crops of scikit-learn's two photographs
    python benchmarks/loaders.py --data $DSDIR/imagenet --num_workers 8  # 1,024 of your images
    python benchmarks/loaders.py --data FOLDER --output loaders.json     # results there, not in benchmarks/results/
    python benchmarks/loaders.py --part sweep --num_workers 16           # only how many workers, in a few minutes

It takes `--images` images of `--data` (all that resnet.py reads), stores them below `--work` as class folders, tar
shards and parquet, and lets each loader make training batches of them: a random crop of 8 to 100 % of the area,
resized to `--image_size`, mirrored half of the time. The loaders run in turn, round by round, each in a process of its
own. Its first epoch is not counted, so that files come from the page cache; of ours that epoch is the row's
cold_images_per_second: what the kernel held of the files is dropped before, and the workers have just started. A
figure is the median of the rounds, its spread beside it; a loader that fails has its reason in its row. `decode_only`
is one core that decodes whole JPEGs by simplejpeg: the limit that the others' images_per_core_second may be held
against. Ours and DALI give uint8, which is normalised (ours also mirrored) on the device; torchvision's reference way,
timm, webdataset and datasets do all of it on the CPU, as their own examples do. Then a sweep over workers, prefetched
batches and pinned memory, in rounds too, with a recommendation, and the memory of one worker over twenty epochs.
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
from importlib.util import find_spec
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from report import ROOT, cores, median_and_spread, table, write
from torch.utils.data import DataLoader
from torchvision import datasets as folders
from torchvision import transforms

sys.path.insert(0, str(ROOT / "recipes"))
import resnet_dali
import resnet_torchdata
import resnet_webdataset

from shared.config import expand_home
from shared.errors import UserError
from shared.images import Batch, Loader, Views, decode, open_data
from shared.images.loader import MEAN, PREFETCH, STD, WorkerLoader
from shared.images.views import training_view
from shared.lifetime import die_with_parent
from shared.order import TrainingOrder

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
PAIRS = 20  # of one worker and two, a round
EPOCHS = 20  # over which a worker's memory is looked at
Epoch = Callable[[], Iterator[int]]  # one pass over the images: how many each batch has
STREAMS = {"rank": 0, "size": 1, "read_shards": resnet_webdataset.read_shards}


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
    """(encoded, label) of `--images` images, evenly over the training images."""
    if args.data == "photographs":
        return list(photographs(args.images))
    source, _ = open_data(args.data, args.val_fraction, 0)
    numbers = np.linspace(0, len(source) - 1, min(args.images, len(source))).astype(int)
    _, labels = np.unique(source.labels[numbers], return_inverse=True)  # few images may be of few of many classes
    return [(encoded(source.images[n]), label) for n, label in zip(numbers.tolist(), labels.tolist(), strict=True)]


def photographs(number: int) -> Iterator[tuple[bytes, int]]:
    """Like ImageNet's: 470 x 385 pixels in some 91 kB, cut out of scikit-learn's two photographs."""
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
    """The images in each format below args.folder; files and bytes of each."""
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


# The loaders: each makes an Epoch


def decode_only(args: argparse.Namespace) -> Epoch:
    import simplejpeg

    images = [path.read_bytes() for path in (args.folder / "folder").rglob("*.jpg")]

    def epoch():
        for image in images:
            simplejpeg.decode_jpeg(image)
            yield 1

    return epoch


def ours(args: argparse.Namespace, store: str, read: Callable = WorkerLoader, without: tuple[str, ...] = ()) -> Epoch:
    """A recipe's loader. without: libraries that are taken for not installed."""
    for library in without:  # `library` is crop_jpeg.c's
        setattr(decode, library, lambda: None)
    if read is resnet_webdataset.read_streams:
        shuffle = partial(resnet_webdataset.shuffle, buffer=256)
        read = partial(read, num_streams=max(1, args.num_workers), shuffle=shuffle, **STREAMS)
    views = training_views(args, store)
    loader = Loader(views, DEVICE, args.num_workers, read=read)
    return partial(sizes, loader if ON_GPU else loader.batches)


def training_views(args: argparse.Namespace, store: str, times: int = 1) -> Views:
    """times: how often each image is in an epoch."""
    source, _ = open_data(str(args.folder / store), 0.02, 0)
    source = source.subset(np.tile(np.arange(len(source)), times)) if times > 1 else source
    order = TrainingOrder(len(source), args.batch_size, args.batch_size, 0, 1, 0)
    view = partial(training_view, min_crop_area=0.08, horizontal_flip=True)
    return Views(source, view, order, args.image_size, 0)


def sizes(batches) -> Iterator[int]:
    for batch in batches:
        yield len(batch.labels)


def on_device(loader) -> Epoch:
    """Of batches (images, labels) of the libraries' own loaders."""

    def epoch():
        for images, _ in loader:
            yield len(images.to(DEVICE, non_blocking=True))

    return epoch


def reference_transform(args: argparse.Namespace) -> transforms.Compose:
    """Of torchvision's training reference, for PIL images."""
    mean, std = ([value / 255 for value in values] for values in (MEAN, STD))
    crop = transforms.RandomResizedCrop(args.image_size, antialias=True)
    tensor = [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float), transforms.Normalize(mean, std)]
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *tensor])


def options(args: argparse.Namespace) -> dict:
    """Of a DataLoader in the usual way."""
    workers = {"num_workers": args.num_workers, "persistent_workers": args.num_workers > 0, "pin_memory": ON_GPU}
    return {"batch_size": args.batch_size, **workers}


def torchvision_reference(args: argparse.Namespace) -> Epoch:
    data = folders.ImageFolder(args.folder / "folder", reference_transform(args))
    return on_device(DataLoader(data, shuffle=True, drop_last=True, **options(args)))


def timm(args: argparse.Namespace) -> Epoch:
    from timm.data import ImageDataset, create_loader

    size = {"input_size": (3, args.image_size, args.image_size), "interpolation": "bilinear", "color_jitter": None}
    workers = options(args) | {"is_training": True, "use_prefetcher": ON_GPU, "device": DEVICE}
    return on_device(create_loader(ImageDataset(str(args.folder / "folder")), **size, **workers))


def webdataset(args: argparse.Namespace) -> Epoch:
    import webdataset as wds

    paths = sorted(map(str, (args.folder / "tar").glob("*.tar")))
    data = wds.WebDataset(paths, shardshuffle=len(paths), empty_check=False).shuffle(1000).decode("pil")
    data = data.to_tuple("jpg", "cls").map_tuple(reference_transform(args), int)
    return on_device(DataLoader(data.batched(args.batch_size), **options(args) | {"batch_size": None}))


def hf_datasets(args: argparse.Namespace) -> Epoch:
    import datasets

    transform = reference_transform(args)
    paths = [str(path) for path in (args.folder / "parquet").glob("*")]
    data = datasets.load_dataset("parquet", data_files=paths, split="train", cache_dir=str(args.folder / "cache"))
    data = data.with_transform(
        lambda rows: {"images": [transform(image.convert("RGB")) for image in rows["image"]], "labels": rows["label"]}
    )
    loader = DataLoader(data, shuffle=True, drop_last=True, collate_fn=stack, **options(args))
    return on_device(loader)


def stack(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([row["images"] for row in rows]), torch.tensor([row["labels"] for row in rows])


def dali(args: argparse.Namespace, device: str) -> Epoch:
    """DALI's own reader, crop and flip, in the way of its ResNet example, but for the normalisation."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(args.batch_size, max(1, args.num_workers), 0 if device == "mixed" else None)
    with pipeline:
        jpegs, _ = fn.readers.file(file_root=str(args.folder / "folder"), random_shuffle=True, name="files")
        area = {"random_area": [0.08, 1.0], "random_aspect_ratio": [3 / 4, 4 / 3]}
        images = fn.decoders.image_random_crop(jpegs, device=device, output_type=types.RGB, **area)
        size = (args.image_size, args.image_size)
        images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=fn.random.coin_flip()))
    batches = pipeline.epoch_size("files") // args.batch_size

    def epoch():
        for _ in range(batches):
            yield len(pipeline.run()[0])

    return epoch


def ffcv(args: argparse.Namespace) -> Epoch:
    """FFCV's own file; its writer encodes each image anew, at the quality that gives about the bytes of ours."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor
    from ffcv.writer import DatasetWriter

    path = args.folder / "images.beton"
    if not path.exists():
        fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=95), "label": IntField()}
        writer = DatasetWriter(str(path), fields, num_workers=1)
        writer.from_indexed_dataset(folders.ImageFolder(args.folder / "folder", lambda image: image.convert("RGB")))
        print(f"ffcv: {path.stat().st_size} bytes", file=sys.stderr)
    decoder = RandomResizedCropRGBImageDecoder((args.image_size, args.image_size), scale=(0.08, 1))
    pipelines = {"image": [decoder, RandomHorizontalFlip(), ToTensor()], "label": [IntDecoder(), ToTensor()]}
    order = {"order": OrderOption.QUASI_RANDOM, "os_cache": True, "drop_last": True}
    workers = {"batch_size": args.batch_size, "num_workers": max(1, args.num_workers)}
    return on_device(FfcvLoader(str(path), pipelines=pipelines, **order, **workers))


# name -> (what makes its Epoch, the module without which it is left out)
LOADERS: dict[str, tuple[Callable, str]] = {
    "decode_only": (decode_only, "simplejpeg"),
    "shared_folder": (partial(ours, store="folder"), "torch"),
    "shared_tar": (partial(ours, store="tar"), "torch"),
    "shared_parquet": (partial(ours, store="parquet"), "datasets"),
    "shared_tar_simplejpeg": (partial(ours, store="tar", without=("library",)), "simplejpeg"),
    "shared_tar_pil": (partial(ours, store="tar", without=("library", "simplejpeg")), "torch"),
    "shared_webdataset": (partial(ours, store="tar", read=resnet_webdataset.read_streams), "webdataset"),
    "shared_torchdata": (partial(ours, store="tar", read=resnet_torchdata.read_nodes), "torchdata"),
    "shared_dali": (partial(ours, store="tar", read=resnet_dali.Dali), "nvidia.dali"),
    "torchvision_reference": (torchvision_reference, "torchvision"),
    "timm": (timm, "timm"),
    "webdataset": (webdataset, "webdataset"),
    "datasets": (hf_datasets, "datasets"),
    "dali_cpu": (partial(dali, device="cpu"), "nvidia.dali"),
    "ffcv": (ffcv, "ffcv"),
    "dali_gpu": (partial(dali, device="mixed"), "nvidia.dali"),
}


def installed(name: str) -> bool:
    package = LOADERS[name][1].split(".")
    return all(find_spec(".".join(package[: depth + 1])) for depth in range(len(package))) and (
        name != "dali_gpu" or ON_GPU
    )


# Measuring


def in_process(function: Callable, *arguments):
    """What the function returns in a process of its own, which leaves no thread and no memory behind.

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
    """Of each loader what every round measured; or why it failed, and was left out of the rounds after."""
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
    """A row's figures: plain medians, each with the spread of its rounds beside it."""
    if isinstance(runs, str):
        return {"images_per_second": None, "images_per_core_second": None, "left_out": runs}
    row = {}
    for name in runs[0]:
        spread = median_and_spread(run[name] for run in runs)
        row |= {name: spread.pop("median"), f"{name}_spread": spread}
    return row


def measure(make: Callable[[argparse.Namespace], Epoch], args: argparse.Namespace, cold: bool = False) -> dict:
    """Images a second, images a second of processor time, and bytes of memory that this process and its workers do not
    share with others. cold: also images a second of the first epoch, from the disk."""
    if cold:
        drop_cache(args.folder)
    epoch = make(args)
    begin = time.perf_counter()
    first = sum(epoch()) / (time.perf_counter() - begin)
    return counted(lambda: sum(epoch()), args.seconds) | ({"cold_images_per_second": first} if cold else {})


def counted(some: Callable[[], int], least: float) -> dict:
    """some: loads images, and gives their number. least: seconds."""
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
    """Of the kernel: what it holds of these files in memory, once they are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def family() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def processor_seconds() -> float:
    return sum(sum(process.cpu_times()[:2]) for process in family())


def sweep_options(args: argparse.Namespace) -> list[dict]:
    """The tar shards' loader with each number of workers, of batches that a worker prefetches, and pinned or not."""
    cases = sweep_cases(max(cores(), args.num_workers))
    runs = [[] for _ in cases]
    for number in range(args.rounds):
        print(f"round {number + 1} of {args.rounds}: the sweep", file=sys.stderr)
        for case, seen in zip(cases, runs, strict=True):
            seen.append(in_process(measure_with, case, args))
    return [case | measured(seen) for case, seen in zip(cases, runs, strict=True)]


def two_over_one(args: argparse.Namespace) -> dict:
    """How much two workers bring over one, and two processes that only decode, which is what this machine has to give;
    by turns of seconds, since a shared one's speed changes by the minute. Nothing where there is one core."""
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
    """Images a second of decoding alone."""
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
    """Whether a recipe takes these options, of which --num_workers alone is a flag."""
    return case["prefetch_factor"] in (None, PREFETCH) and case["pin_memory"] == ON_GPU


def measure_with(case: dict, args: argparse.Namespace) -> dict:
    batches = endless(case, args)
    fill_queues(case, batches)
    return counted(partial(load_round, case, batches), args.seconds)


def endless(case: dict, args: argparse.Namespace) -> Iterator[Batch]:
    """In long epochs: so few batches as the bake-off's have do not divide evenly among workers."""
    views = training_views(args, "tar", times=100)
    options = {"prefetch_factor": case["prefetch_factor"] or PREFETCH, "pin_memory": case["pin_memory"]}
    loader = Loader(views, DEVICE, case["num_workers"], read=partial(WorkerLoader, **options))
    return chain.from_iterable(repeat(loader if ON_GPU else loader.batches))


def load_round(case: dict, batches: Iterator[Batch]) -> int:
    """A batch of each worker: they come nearly at once, and to stop between them would cost the count one."""
    return sum(len(next(batches).labels) for _ in range(max(1, case["num_workers"])))


def fill_queues(case: dict, batches: Iterator[Batch]) -> None:
    for _ in range(1 + (case["prefetch_factor"] or 1)):
        load_round(case, batches)


def recommendation(sweep: list[dict]) -> str:
    """The fewest workers that are nearly as good as any number, and whether other options would be better."""
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
    """Megabytes of one worker's own after each of EPOCHS epochs."""
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
    """(2, rows): how far the spread goes below and above."""
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

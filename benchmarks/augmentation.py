# SPDX-License-Identifier: Apache-2.0
"""Compare augmentation on the device, batch by batch, with torchvision's on the CPU, image by image.

    python benchmarks/augmentation.py                        # crops of scikit-learn's two photographs
    python benchmarks/augmentation.py --num_workers 8 --batch_size 256 --images 4096

For each kind of augmentation two loaders make training batches of the same JPEG files, in turn, in processes of their
own: `device` as resnet_augmentation.py does, where workers decode and crop, and the device does the rest; `workers` as
people write it, a DataLoader over torchvision's v2 transforms, each worker drawing for each image, with MixUp and
CutMix on the batch. Images a second are of the whole loader, until the device is done; milliseconds a batch are those
of the device's part alone. Without a GPU the device is the CPU, with all its cores. Writes
benchmarks/results/augmentation_<hardware>_<date>.json, and a chart beside it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from contestants import DEVICE, training_views
from loaders import in_process, photographs
from report import ROOT, median_and_spread, table, write
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from shared.images import Loader
from shared.images.augment import POLICIES, augment
from shared.images.loader import MEAN, STD
from shared.models.mixing import erase, mix

PLAIN = {"augmentation": "none", "random_erasing": 0.0, "mixup_alpha": 0.0, "cutmix_alpha": 0.0}
KINDS = {
    "none": {},
    **{name: {"augmentation": name} for name in POLICIES},
    "erasing": {"random_erasing": 0.25},
    "mixup, cutmix": {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
    "all": {"augmentation": "randaugment", "random_erasing": 0.25, "mixup_alpha": 0.2, "cutmix_alpha": 1.0},
}


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="augmentation-") as folder:
        args.folder = Path(folder)
        for number, (data, label) in enumerate(photographs(args.images)):
            path = args.folder / f"folder/{label}/{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        cases = [(kind, where) for kind in KINDS for where in ("device", "workers")]
        seen = {case: [] for case in cases}
        for number in range(args.rounds):
            for kind, where in cases:
                print(f"round {number + 1} of {args.rounds}: {kind}, {where}", file=sys.stderr)
                settings = SimpleNamespace(**(PLAIN | KINDS[kind]))
                seen[kind, where].append(in_process(measure, args, settings, where))
    rows = [{"augmentation": kind, "where": where, **figures(runs)} for (kind, where), runs in seen.items()]
    print(table(rows))
    path = write("augmentation", rows)
    chart(rows, (ROOT / path).with_suffix(".png"))
    print(path)


def figures(runs: list[dict]) -> dict:
    """Return each figure's median over the rounds, with its spread beside it."""
    row = {}
    for name in runs[0]:
        spread = median_and_spread(run[name] for run in runs)
        row |= {name: spread.pop("median"), f"{name}_spread": spread}
    return row


def measure(args: argparse.Namespace, settings: SimpleNamespace, where: str) -> dict[str, float]:
    """Return images a second over whole epochs, at least `--seconds`, after one that does not count."""
    epoch = {"device": on_device, "workers": in_workers}[where](args, settings)
    for _ in epoch():
        pass
    images, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < args.seconds:
        for batch in epoch():
            images += len(batch)
        wait()
    row = {"images_per_second": images / (time.perf_counter() - begin)}
    return row | ({"milliseconds_per_batch": batch_time(args, settings)} if where == "device" else {})


def on_device(args: argparse.Namespace, settings: SimpleNamespace):
    loader = Loader(training_views(args, "folder"), DEVICE, args.num_workers, augmentation=settings.augmentation)

    def epoch() -> Iterator[Tensor]:
        for batch in loader:
            yield mixed(batch.images, batch.keys.tolist(), settings)

    return epoch


def mixed(images: Tensor, seeds: list[int], settings: SimpleNamespace) -> Tensor:
    images = erase(images, seeds, settings.random_erasing)
    return mix(images, seeds, settings.mixup_alpha, settings.cutmix_alpha)[0]


def in_workers(args: argparse.Namespace, settings: SimpleNamespace):
    steps = [v2.RandomResizedCrop(args.image_size, antialias=True), v2.RandomHorizontalFlip()]
    steps += [POLICIES[settings.augmentation]()] if settings.augmentation != "none" else []
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    steps += [v2.Normalize([value / 255 for value in MEAN], [value / 255 for value in STD])]
    steps += [v2.RandomErasing(settings.random_erasing)] if settings.random_erasing else []
    data = ImageFolder(args.folder / "folder", v2.Compose(steps))
    mixes = [(v2.MixUp, settings.mixup_alpha), (v2.CutMix, settings.cutmix_alpha)]
    mixes = [kind(alpha=alpha, num_classes=2) for kind, alpha in mixes if alpha]
    options = {"batch_size": args.batch_size, "num_workers": args.num_workers, "drop_last": True, "shuffle": True}
    options |= {"persistent_workers": args.num_workers > 0, "pin_memory": DEVICE.type == "cuda"}
    loader = DataLoader(data, collate_fn=default_collate, **options)

    def epoch() -> Iterator[Tensor]:
        for images, labels in loader:
            images, labels = images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)
            yield v2.RandomChoice(mixes)(images, labels)[0] if mixes else images

    return epoch


def batch_time(args: argparse.Namespace, settings: SimpleNamespace) -> float:
    """Return the milliseconds that the device's part of a batch takes, the normalisation left out."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (args.batch_size, 3, args.image_size, args.image_size), generator=generator)
    pixels, times = pixels.to(torch.uint8).to(DEVICE), []
    for step in range(6):
        seeds = [*range(step * args.batch_size, (step + 1) * args.batch_size)]
        wait()
        begin = time.perf_counter()
        images = pixels if settings.augmentation == "none" else augment(pixels, seeds, settings.augmentation)
        mixed(images.float(), seeds, settings)
        wait()
        times.append(time.perf_counter() - begin)
    return 1e3 * sorted(times[1:])[2]


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def chart(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for place, where in ((-0.2, "device"), (0.2, "workers")):
        chosen = [row for row in rows if row["where"] == where]
        values = [row["images_per_second"] for row in chosen]
        spreads = [row["images_per_second_spread"] for row in chosen]
        ends = [[v - s["min"] for v, s in zip(values, spreads, strict=True)]]
        ends += [[s["max"] - v for v, s in zip(values, spreads, strict=True)]]
        panel.barh([number + place for number in range(len(chosen))], values, 0.38, xerr=ends, label=where)
    panel.set_yticks(range(len(KINDS)), KINDS)
    panel.invert_yaxis()
    panel.set_xlabel("images a second")
    panel.legend()
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--num_workers", type=int, default=1, help="loader processes")
    parser.add_argument("--images", type=int, default=512, help="JPEG files")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--batch_size", type=int, default=64, help="images")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each case")
    parser.add_argument("--seconds", type=float, default=4.0, help="least duration of a measurement")
    return parser.parse_args()


if __name__ == "__main__":
    main(arguments())

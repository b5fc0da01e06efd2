# SPDX-License-Identifier: Apache-2.0
"""Define the loaders that loaders.py measures: each function makes an Epoch of the images that it has stored."""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch
from report import ROOT
from torch.utils.data import DataLoader
from torchvision import datasets as folders
from torchvision import transforms

sys.path.insert(0, str(ROOT / "recipes"))
import resnet_dali
import resnet_torchdata
import resnet_webdataset

from shared.images import Loader, Views, decode, open_data
from shared.images.loader import MEAN, STD, WorkerLoader
from shared.images.views import training_view
from shared.order import TrainingOrder

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
Epoch = Callable[[], Iterator[int]]  # one pass over the images: how many each batch has
STREAMS = {"rank": 0, "size": 1, "read_shards": resnet_webdataset.read_shards}


def decode_only(args: argparse.Namespace) -> Epoch:
    import simplejpeg

    images = [path.read_bytes() for path in (args.folder / "folder").rglob("*.jpg")]

    def epoch():
        for image in images:
            simplejpeg.decode_jpeg(image)
            yield 1

    return epoch


def ours(args: argparse.Namespace, store: str, read: Callable = WorkerLoader, without: tuple[str, ...] = ()) -> Epoch:
    """Read with a recipe's loader. without: libraries to treat as not installed."""
    for library in without:  # `library` is crop_jpeg.c's
        setattr(decode, library, lambda: None)
    if read is resnet_webdataset.read_streams:
        shuffle = partial(resnet_webdataset.shuffle, buffer=256)
        read = partial(read, num_streams=max(1, args.num_workers), shuffle=shuffle, **STREAMS)
    views = training_views(args, store)
    loader = Loader(views, DEVICE, args.num_workers, read=read)
    return partial(sizes, loader if ON_GPU else loader.batches)


def training_views(args: argparse.Namespace, store: str, times: int = 1) -> Views:
    """Return the training views of a store. times: how often an epoch has each image."""
    source, _ = open_data(str(args.folder / store), 0.02, 0)
    source = source.subset(np.tile(np.arange(len(source)), times)) if times > 1 else source
    order = TrainingOrder(len(source), args.batch_size, args.batch_size, 0, 1, 0)
    view = partial(training_view, min_crop_area=0.08, horizontal_flip=True)
    return Views(source, view, order, args.image_size, 0)


def sizes(batches) -> Iterator[int]:
    for batch in batches:
        yield len(batch.labels)


def on_device(loader) -> Epoch:
    """Move to the device what the libraries' own loaders give: batches of images and labels."""

    def epoch():
        for images, _ in loader:
            yield len(images.to(DEVICE, non_blocking=True))

    return epoch


def reference_transform(args: argparse.Namespace) -> transforms.Compose:
    """Return what torchvision's training reference does to a PIL image."""
    mean, std = ([value / 255 for value in values] for values in (MEAN, STD))
    crop = transforms.RandomResizedCrop(args.image_size, antialias=True)
    tensor = [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float), transforms.Normalize(mean, std)]
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), *tensor])


def options(args: argparse.Namespace) -> dict:
    """Return a DataLoader's usual options."""
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
    """Read, crop and flip with DALI, as its ResNet example does; without the normalisation."""
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
    """Read FFCV's own file. Its writer encodes each image again, at the quality that gives about the bytes of ours."""
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

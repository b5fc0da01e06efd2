# SPDX-License-Identifier: Apache-2.0
"""Recipes of other loaders: the batches of resnet.py, or of webdataset's streams, on any topology and after a resume."""

import importlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, python, train
from PIL import Image
from sklearn.datasets import load_sample_images

from shared.config import RunConfig, UserError
from shared.data import open_data
from shared.data.loaders import STD
from shared.data.order import augmentation_seed

TOPOLOGIES = [(1, 0), (1, 2), (2, 1), (2, 2), (4, 0)]  # processes, workers of each
SIZES = (7, 30, 101, 50, 1, 148)  # images of each shard: 337, ten steps of 32 and a remainder


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCRATCH", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(ROOT / "recipes")
        yield


class Mesh:
    """Of a process that was not launched: what `data_parallel` asks a DeviceMesh."""

    def __init__(self, rank: int, size: int):
        self.rank, self.processes = rank, size

    def __getitem__(self, name: str) -> "Mesh":
        return self

    def get_local_rank(self, name: str) -> int:
        return self.rank

    def size(self) -> int:
        return self.processes


def build(recipe: str, data, rank=0, size=1, num_workers=0, run=None, **flags):
    """A process's loaders, as the recipe builds them."""
    module = importlib.import_module(recipe)
    accelerator = SimpleNamespace(device=torch.device("cpu"), mesh=Mesh(rank, size), is_main_process=True)
    accelerator.wait_for_everyone = lambda: None
    run_config = RunConfig(data=str(data), num_workers=num_workers, **(run or {}))
    return module.build_loaders(accelerator, run_config, module.Config(**{"horizontal_flip": True} | flags))


def joined(recipe, data, size=1, num_workers=0, **flags) -> list[tuple]:
    """(images, labels, valid, seeds, digest, torn) of each training batch, then each evaluation batch, of all
    processes."""
    ranks = [
        [batch for loader in build(recipe, data, rank, size, num_workers, **flags) for batch in loader]
        for rank in range(size)
    ]
    return [
        (
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "valid", "seeds")),
            sum(part.digest for part in parts) % 2**64,
            sum((part.torn for part in parts), ()),
        )
        for parts in zip(*ranks, strict=True)
    ]


def same(one: tuple, other: tuple) -> bool:
    return all(torch.equal(*pair) for pair in zip(one[:4], other[:4], strict=True)) and one[4:] == other[4:]


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, Path | str]:
    """The digits in every format."""
    root = tmp_path_factory.mktemp("packed")
    for kind in ("tar", "parquet", "folder"):
        process = python(ROOT / "tools/pack.py", "digits", root / kind, "--format", kind, "--shard_size", "300")
        assert process.returncode == 0, process.stderr
    from datasets import DatasetDict

    parts = importlib.import_module("resnet_hf_datasets").embedded_digits()
    DatasetDict(parts).save_to_disk(str(root / "saved"))
    return {"digits": "digits"} | {kind: root / kind for kind in ("tar", "parquet", "folder", "saved")}


@pytest.fixture(scope="module")
def reference() -> list[tuple]:
    return joined("resnet", "digits")


# Map-style loaders: resnet.py's batches


@pytest.mark.parametrize(
    ("recipe", "kind", "flags"),
    [
        *[("resnet_hf_datasets", kind, {}) for kind in ("digits", "parquet", "saved")],
        *[("resnet_torchdata", kind, {"pipeline": "nodes"}) for kind in ("digits", "tar", "parquet", "folder")],
        *[("resnet_torchdata", kind, {"pipeline": "dataloader"}) for kind in ("digits", "tar", "parquet", "folder")],
        *[("resnet_dali", kind, {}) for kind in ("digits", "tar", "parquet", "folder")],
    ],
    ids=lambda value: value.get("pipeline", "") if isinstance(value, dict) else value.removeprefix("resnet_"),
)
@pytest.mark.parametrize(("size", "num_workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_every_map_style_loader_gives_the_batches_of_the_base(packed, reference, recipe, kind, flags, size, num_workers):
    batches = joined(recipe, packed[kind], size, num_workers, **flags)
    assert len(batches) == len(reference) == 22 + 6
    for number, pair in enumerate(zip(batches, reference, strict=True)):
        assert same(*pair), number


# Streams


def write_shards(folder: Path, images: list[tuple[str, bytes, int]], sizes: tuple[int, ...]) -> None:
    """(kind, bytes, label) of each image into shards of these many, as any program writes them."""
    folder.mkdir(parents=True)
    images = enumerate(images)
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for key, (kind, image, label) in (next(images) for _ in range(size)):
                for name, data in ((f"{key:05d}.{kind}", image), (f"{key:05d}.cls", str(label).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def unequal(tmp_path_factory) -> Path:
    """Digits in shards of unequal size."""
    root = tmp_path_factory.mktemp("unequal")
    for name, part, sizes in zip(("train", "val"), open_data("digits", 0, 0), (SIZES, (40, 3, 60, 2)), strict=True):
        images = [("png", encoded(part.images[number]), part.labels[number]) for number in range(sum(sizes))]
        write_shards(root / name, images, sizes)
    return root


def streamed(data, size=1, num_workers=0, step=0, accumulation=1, **flags) -> tuple[list, list]:
    """What each global step, and the evaluation, has: {seed: (label, pixels)}, then digest and torn."""
    flags = {"global_batch_size": 32, "gradient_accumulation_steps": accumulation, "shuffle_buffer": 20} | flags
    both = ([], [])
    for rank in range(size):
        loaders = build("resnet_webdataset", data, rank, size, num_workers, **flags)
        for which, loader in enumerate((loaders[0].starting_at(step), loaders[1])):
            both[which].append([batch for batch in loader])
            assert which or len(both[0][-1]) == len(loader)
    for which, ranks in enumerate(both):
        assert len({len(batches) for batches in ranks}) == 1  # or a collective would wait for ever
    each = accumulation
    training = [
        content([batch for batches in both[0] for batch in batches[first : first + each]])
        for first in range(0, len(both[0][0]), each)
    ]
    return training, content([batch for batches in both[1] for batch in batches])


def content(batches: list) -> tuple[dict, int, list]:
    """{augmentation seed: (label, pixels)} of the images that count; digest; names of what is torn."""
    images = {}
    for batch in batches:
        for seed, label, pixels, valid in zip(batch.seeds, batch.labels, batch.images, batch.valid, strict=True):
            if valid:
                assert int(seed) not in images or any(batch.torn for batch in batches)
                images[int(seed)] = (int(label), pixels.numpy().tobytes())
    return images, sum(batch.digest for batch in batches) % 2**64, sorted(sum((batch.torn for batch in batches), ()))

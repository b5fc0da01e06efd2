# SPDX-License-Identifier: Apache-2.0
"""Photographs of scikit-learn's as JPEG and other files, and tar shards as any program writes them."""

import io
import tarfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from shared.images.decode import Crop, render

PHOTOS = load_sample_images().images  # two, of 427 x 640 pixels


def encoded(pixels: np.ndarray, kind: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(number: int, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """Return an image of 150 x 120 pixels."""
    pixels = PHOTOS[number % 2][number : number + 120, :150]
    return encoded(pixels, kind, mode, **options)


def varied(number: int, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """Return an image of a size that depends on its number: 150 to 249 pixels wide, 140 to 199 high."""
    pixels = PHOTOS[number % 2][3 * number :, 5 * number :]
    return encoded(pixels[: 140 + 13 * number % 60, : 150 + 29 * number % 100], kind, mode, **options)


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Write photographs of two classes as JPEG, none of them damaged: train/ with 40 files, val/ with 10."""
    for number in range(50):
        folder = tmp_path / "photographs" / ("train" if number < 40 else "val") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.jpg").write_bytes(photograph(number))
    return tmp_path / "photographs"


def write_shard(path: Path, images: Iterable[tuple[str, str, bytes, int]]) -> None:
    """Write a tar shard of images: key, kind, bytes and label of each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, kind, image, label in images:
            for name, data in ((f"{key}.{kind}", image), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def write_shards(folder: Path, images: Iterable[tuple[str, bytes, int]], sizes: tuple[int, ...]) -> None:
    """Write images (kind, bytes and label of each) into shards of these sizes."""
    keyed = ((f"{key:05d}", *image) for key, image in enumerate(images))
    for shard, size in enumerate(sizes):
        write_shard(folder / f"{shard:03d}.tar", islice(keyed, size))


def middle(width: int, height: int, seed: int) -> Crop:
    return Crop(width // 4, height // 4, width - width // 4, height - height // 4)


def rendered(image: bytes, size: int = 48) -> np.ndarray:
    out = torch.zeros(size, size, 3, dtype=torch.uint8)
    render(image, middle, 0, out)
    return out.numpy().astype(int)

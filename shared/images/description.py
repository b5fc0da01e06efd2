# SPDX-License-Identifier: Apache-2.0
"""Describe a run's images, in the lines with which the run begins."""

import numpy as np

from ..contracts import Description
from .decode import opened
from .sources import Source

LOOKED_AT = 16  # images of each part, evenly spaced, whose headers tell sizes
USUAL = 224  # pixels: ImageNet's convention
FAR = 4  # times larger than what the network sees: most of an image is lost, or decoded for nothing


def describe(source: Source, size: int, decoder: str | None) -> Description:
    """Return the description of one part of a run's images, which the network sees with `size` pixels a side.

    Sizes are width x height in pixels, from the smallest to the largest of the images looked at; undecodable ones have
    none.
    """
    sizes = _sizes(source)
    return Description(
        unit="images",
        samples=len(source),
        fingerprint=source.fingerprint(),
        summary=_part(source, sizes),
        notes=(f"the network sees {size} x {size} pixels", *_hint(size, sizes)),
        identity={"class_names": source.classes},
        record={"decoder": decoder, "classes": source.classes},
    )


def _part(source: Source, sizes: list[tuple[int, int]]) -> str:
    present, known = np.count_nonzero(np.bincount(source.labels[source.labels >= 0])), len(source.classes)
    classes = f"{known:,}" if present == known else f"{present:,} of {known:,}"
    ends = dict.fromkeys(f"{width} x {height}" for width, height in (sizes[:1] + sizes[-1:]))
    pixels = f", {' to '.join(ends)} pixels" if ends else ""
    return f"{len(source):,} images, {classes} classes{pixels}"


def _sizes(source: Source) -> list[tuple[int, int]]:
    """Return (width, height) of some images, the smallest area first."""
    numbers = np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).round().astype(int)).tolist()
    found = [_size(source, number) for number in numbers]
    return sorted((size for size in found if size), key=lambda size: (size[0] * size[1], size))


def _size(source: Source, number: int) -> tuple[int, int] | None:
    try:
        image = source.images[number]
        if isinstance(image, np.ndarray):
            return image.shape[1], image.shape[0]
        with opened(image) as file:
            return file.size
    except (OSError, ValueError):
        return None


def _hint(size: int, sizes: list[tuple[int, int]]) -> list[str]:
    """Return a hint where the image of median area is far larger than what the network sees."""
    width, height = sizes[len(sizes) // 2] if sizes else (0, 0)
    if min(width, height) <= FAR * size:
        return []
    if size < USUAL:
        return [f"hint: images of {width} x {height} pixels lose detail there; try --image_size {USUAL}"]
    return [f"hint: {width} x {height} pixels are slow to decode: tools/pack.py --max_side {FAR * size}"]

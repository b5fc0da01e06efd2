# SPDX-License-Identifier: Apache-2.0
"""Choose what the network sees of an image: a crop, which one resize brings to the network's size, perhaps a flip."""

import math

import numpy as np

from ..draws import uniforms
from .decode import Crop

Box = tuple[int, int, int, int]
ATTEMPTS = 10


def training_view(width: int, height: int, seed: int, min_crop_area: float, horizontal_flip: bool) -> Crop:
    """Return a random crop (Szegedy et al., arXiv:1409.4842), under horizontal_flip mirrored half of the time."""
    draws = uniforms(4 * ATTEMPTS + 1, seed)
    return Crop(*random_crop(width, height, min_crop_area, draws), horizontal_flip and draws[-1] < 0.5)


def evaluation_view(width: int, height: int, seed: int, eval_crop_ratio: float) -> Crop:
    """Return the centred square of `eval_crop_ratio` times the shorter side; 0.875 is resize to 256, then crop 224."""
    side = max(1, round(min(width, height) * eval_crop_ratio))
    left, top = (width - side) // 2, (height - side) // 2
    return Crop(left, top, left + side, top + side)


def random_crop(width: int, height: int, min_area: float, draws: np.ndarray) -> Box:
    """Return (left, top, right, bottom) of min_area to all of the image, of aspect 3/4 to 4/3; the centre where none
    of ten draws fits."""
    for area, aspect, x, y in draws[: 4 * ATTEMPTS].reshape(ATTEMPTS, 4).tolist():
        pixels = width * height * (min_area + (1 - min_area) * area)
        ratio = math.exp(math.log(4 / 3) * (2 * aspect - 1))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + max(w, 1), top + max(h, 1)

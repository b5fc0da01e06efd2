# SPDX-License-Identifier: Apache-2.0
"""What the network sees of an image: one crop, one antialiased resize of uint8 pixels, perhaps a flip."""

import math

import numpy as np
from PIL import Image

from .order import uniforms

Box = tuple[int, int, int, int]
ATTEMPTS = 10


def training_view(
    image: Image.Image, image_size: int, seed: int, min_crop_area: float, horizontal_flip: bool
) -> Image.Image:
    """A random resized crop (Szegedy et al., arXiv:1409.4842) of image_size squared, flipped half of the time."""
    draws = uniforms(4 * ATTEMPTS + 1, seed)
    view = _resize(image, random_crop(*image.size, min_crop_area, draws), image_size)
    if horizontal_flip and draws[-1] < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return view


def evaluation_view(image: Image.Image, image_size: int, seed: int, eval_crop_ratio: float) -> Image.Image:
    """The centred square of `eval_crop_ratio` times the shorter side; 0.875 is resize to 256, then crop 224."""
    width, height = image.size
    side = max(1, round(min(width, height) * eval_crop_ratio))
    left, top = (width - side) // 2, (height - side) // 2
    return _resize(image, (left, top, left + side, top + side), image_size)


def random_crop(width: int, height: int, min_area: float, draws: np.ndarray) -> Box:
    """(left, top, right, bottom) of min_area to all of the image, of aspect 3/4 to 4/3; the centre where ten draws
    do not fit."""
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


def _resize(image: Image.Image, box: Box, image_size: int) -> Image.Image:
    # Cropped first: with `box=` the antialiasing filter would reach over the crop's edge, as no other loader does.
    return image.crop(box).resize((image_size, image_size), Image.Resampling.BILINEAR)

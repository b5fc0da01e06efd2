# SPDX-License-Identifier: Apache-2.0
"""Encoded image and crop in, pixels of the network's size out; as little as possible is decoded, moved or allocated.

JPEGs go through libjpeg-turbo, which decodes the rows and columns of the crop alone and stops below it: by crop_jpeg.c
where it can be compiled, which also resizes; else simplejpeg decodes the whole image. All else goes through PIL, which
reads JPEGs too where both are missing, more slowly. The pixels are the same: all three use that library.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from .native import load

try:
    import simplejpeg
except ImportError:
    simplejpeg = None
native = load()  # here, so that worker processes are forked with it

END_OF_IMAGE = b"\xff\xd9"
# A marker that has no place in compressed data: something else was written over a part of the file.
STRAY = re.compile(rb"\xff[^\x00\xff\xc4\xd0-\xd7\xd9-\xdb\xdd\xfe]")
MOST_PIXELS = 100_000_000  # of one image: a larger one is taken for a decompression bomb


class Crop(NamedTuple):
    """What the network sees of an image, in pixels of its upright form, and whether it is mirrored."""

    left: int
    top: int
    right: int
    bottom: int
    mirrored: bool = False


View = Callable[[int, int, int], Crop]  # of width, height and the sample's augmentation seed


def render(image: bytes | np.ndarray, view: View, seed: int, out: Tensor) -> bool:
    """Write the view of an image into out: (size, size, 3) uint8, by one antialiased bilinear resize of its crop.
    Returns whether the view is mirrored, which is left to the device.

    Raises ValueError or OSError, with the reason, where the image cannot be decoded to its end.
    """
    if native and isinstance(image, bytes) and (crop := _crop_natively(image, view, seed, out)):
        return crop.mirrored
    if isinstance(image, np.ndarray):
        crop = view(image.shape[1], image.shape[0], seed)
        pixels = image
    elif simplejpeg and (found := plain_jpeg(image)):
        pixels, crop = _decode_jpeg(image, *found, view, seed, out.shape[0])
    else:
        pixels = _decode_any(image)
        crop = view(pixels.shape[1], pixels.shape[0], seed)
    _resize(pixels[crop.top : crop.bottom, crop.left : crop.right], out)
    return crop.mirrored


def plain_jpeg(image: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that lies upright in colours of its own; None leaves it to PIL."""
    if image[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(image)
    except ValueError:
        return None
    _refuse_bomb(width, height)
    return None if _is_turned(image) or colours not in ("YCbCr", "RGB", "Gray") else (height, width)


def _is_turned(jpeg: bytes) -> bool:
    return jpeg.find(b"Exif\0\0", 0, 4096) >= 0 and _orientation(jpeg) != 1


def scaled(crop: Crop, size: int, width: int, height: int) -> tuple[Crop, int]:
    """The divisor 1, 2, 4 or 8 by which a decoder may shrink an image whose crop is to fill `size` pixels, and the
    crop with its edges at multiples of it, or at the image's."""
    least = min(crop.right - crop.left, crop.bottom - crop.top) // size
    if least < 2:
        return crop, 1
    scale = next(scale for scale in (8, 4, 2) if least >= scale)
    left, top, right, bottom = (round(edge / scale) * scale for edge in crop[:4])
    return Crop(left, top, min(right, width), min(bottom, height), crop.mirrored), scale


def _crop_natively(image: bytes, view: View, seed: int, out: Tensor) -> Crop | None:
    """Into out, by crop_jpeg.c; None, and then out holds nothing of use, where it leaves the image to others."""
    assert out.is_contiguous()
    if not (shape := native.jpeg_size(image, len(image))):
        return None
    width, height, size = shape >> 16, shape & 0xFFFF, out.shape[0]
    _refuse_bomb(width, height)
    if _is_turned(image):
        return None
    crop, scale = scaled(view(width, height, seed), size, width, height)
    box = crop[:4] if scale == 1 else (-(-edge // scale) for edge in crop[:4])
    return None if native.crop_jpeg(image, len(image), *box, scale, size, out.data_ptr()) else crop


def _decode_jpeg(image: bytes, height: int, width: int, view: View, seed: int, size: int) -> tuple[np.ndarray, Crop]:
    """The decoded image, scaled where the crop allows it, and the crop in it."""
    crop, scale = scaled(view(width, height, seed), size, width, height)
    limits = {"min_height": -(-height // scale), "min_width": -(-width // scale)} if scale > 1 else {}
    try:
        pixels = simplejpeg.decode_jpeg(image, "RGB", **limits)
    except ValueError:  # perhaps only a warning of libjpeg's: PIL knows which images end too early
        return _decode_any(image), crop
    return pixels, Crop(*(-(-edge // scale) for edge in crop[:4]), crop.mirrored)


def intact(image: bytes) -> bool:
    """Whether a JPEG may be decoded in part: it has its end, and no other file's bytes within its data."""
    place = 2
    while image[place : place + 1] == b"\xff" and image[place + 1 : place + 2] != b"\xda":  # segments
        place += 2 + int.from_bytes(image[place + 2 : place + 4])
    place += 2 + int.from_bytes(image[place + 2 : place + 4])
    return image.endswith(END_OF_IMAGE) and not STRAY.search(image, place)


def _decode_any(image: bytes) -> np.ndarray:
    """By PIL: upright, RGB, all of it."""
    with opened(image) as file:
        return np.array(ImageOps.exif_transpose(file).convert("RGB"))


def _orientation(image: bytes) -> int:
    with opened(image) as file:
        return file.getexif().get(ExifTags.Base.Orientation, 1)


@contextlib.contextmanager
def opened(image: bytes) -> Iterator[Image.Image]:
    """By PIL, whose readers raise errors of any kind on damaged files, here and as they decode within the block: each
    becomes a ValueError with its reason."""
    try:
        with Image.open(BytesIO(image)) as file:
            _refuse_bomb(*file.size)
            yield file
    except Image.UnidentifiedImageError:
        raise ValueError("it is no image that PIL knows") from None  # PIL's own words have an address in memory
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"PIL cannot read it: {type(error).__name__}: {error}") from error


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels: taken for a decompression bomb")


def _resize(pixels: np.ndarray, out: Tensor) -> None:
    # (1, H, W, 3) seen as (1, 3, H, W) is channels-last, which torch's kernel for uint8 wants, in and out.
    image, out = (tensor[None].permute(0, 3, 1, 2) for tensor in (torch.from_numpy(np.ascontiguousarray(pixels)), out))
    if image.shape == out.shape:
        out.copy_(image)
    else:  # what torch.nn.functional.interpolate(mode="bilinear", antialias=True) calls, without its copy
        torch.ops.aten._upsample_bilinear2d_aa.out(image, out.shape[2:], False, out=out)

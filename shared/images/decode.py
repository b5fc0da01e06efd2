# SPDX-License-Identifier: Apache-2.0
"""Decode the crop of an encoded image and resize it to the network's size.

Where crop_jpeg.c can be compiled, it decodes only the rows and columns of a JPEG's crop, and resizes them; else
simplejpeg decodes the whole image. All other images go through PIL, and JPEGs too where both are missing, more slowly.
The pixels are the same: all three use libjpeg-turbo, on the same crop, at the same scale. Only an image that is
damaged below its crop is decoded by crop_jpeg.c and refused by the others.

Transparency is dropped, not blended: the colours below it are what the file holds. Of 16 bits per channel the upper 8
are kept. Of an animation only the first picture is used.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from io import BytesIO
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL import __version__ as pillow
from torch import Tensor

from .native import libjpeg_version, library

# PIL's names. Its other readers run programs (EPS) or are seldom used. JPEG includes MPO.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "WEBP", "TIFF")
MOST_PIXELS = 100_000_000  # of one image: a larger one is taken for a decompression bomb
METHODS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
PIXELS = {"I": "signed or 32-bit integers (PIL's mode I)", "F": "floating-point numbers (PIL's mode F)"}
TURNS = {orientation: Image.Transpose[method] for orientation, method in enumerate(METHODS, 2)}  # by Exif's value


@functools.cache
def simplejpeg() -> ModuleType | None:
    """Return the library, or None where it is not installed."""
    with contextlib.suppress(ImportError):
        import simplejpeg

        return simplejpeg
    return None


class Crop(NamedTuple):
    """The part of an image that the network sees, in pixels of the upright image, and whether it is mirrored."""

    left: int
    top: int
    right: int
    bottom: int
    mirrored: bool = False


View = Callable[[int, int, int], Crop]  # takes width, height and the sample's augmentation seed


def decoder() -> str:
    """Name the library that decodes JPEGs on this machine, for records; the others decode what it cannot."""
    if library():
        return f"crop_jpeg.c with libjpeg-turbo {libjpeg_version()}"
    return f"simplejpeg {simplejpeg().__version__}" if simplejpeg() else f"pillow {pillow}"


def render(image: bytes | np.ndarray, view: View, seed: int, out: Tensor) -> bool:
    """Write the view of an image into out, (size, size, 3) uint8, by one antialiased bilinear resize of its crop.
    Return whether the view is mirrored, which is left to the device.

    Raises ValueError or OSError, with the reason, where the image cannot be decoded to its end.
    """
    if library() and isinstance(image, bytes) and (crop := _crop_natively(image, view, seed, out)):
        return crop.mirrored
    if isinstance(image, np.ndarray):
        pixels, crop = image, view(image.shape[1], image.shape[0], seed)
    else:
        size = out.shape[0]
        pixels, crop = _by_simplejpeg(image, view, seed, size) or _by_pil(image, view, seed, size)
    _resize(pixels[crop.top : crop.bottom, crop.left : crop.right], out)
    return crop.mirrored


def plain_jpeg(image: bytes) -> tuple[int, int] | None:
    """Return height and width of a JPEG that is upright and grey, RGB or YCbCr; None leaves it to PIL."""
    if image[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg().decode_jpeg_header(image)
    except ValueError:
        return None
    _refuse_bomb(width, height)
    return None if _jpeg_orientation(image) != 1 or colours not in ("YCbCr", "RGB", "Gray") else (height, width)


def scaled(crop: Crop, size: int, width: int, height: int) -> tuple[Crop, int]:
    """Return the crop, and the divisor (1, 2, 4 or 8) by which a decoder may shrink the image so that the crop still
    fills `size` pixels. The crop's edges are rounded to multiples of the divisor, or lie at the image's edge."""
    least = min(crop.right - crop.left, crop.bottom - crop.top) // size
    if least < 2:
        return crop, 1
    scale = next(scale for scale in (8, 4, 2) if least >= scale)
    left, top, right, bottom = (round(edge / scale) * scale for edge in crop[:4])
    right, bottom = max(right, left + scale), max(bottom, top + scale)  # halves are rounded to even: 3/2 and 5/2 to 2
    return Crop(left, top, min(right, width), min(bottom, height), crop.mirrored), scale


def _shrunk(crop: Crop, scale: int) -> Crop:
    """Return the crop in the image that was divided by scale."""
    return crop if scale == 1 else Crop(*(-(-edge // scale) for edge in crop[:4]), crop.mirrored)


def _crop_natively(image: bytes, view: View, seed: int, out: Tensor) -> Crop | None:
    """Fill `out` by crop_jpeg.c and return the crop; None leaves the image to the others, and `out` undefined."""
    assert out.is_contiguous()
    if not (shape := library().jpeg_size(image, len(image))):
        return None
    width, height, size = shape >> 16 & 0xFFFF, shape & 0xFFFF, out.shape[0]
    _refuse_bomb(width, height)
    if shape >> 32 and _jpeg_orientation(image) != 1:
        return None
    crop, scale = scaled(view(width, height, seed), size, width, height)
    box = _shrunk(crop, scale)[:4]
    return None if library().crop_jpeg(image, len(image), *box, scale, size, out.data_ptr()) else crop


def _by_simplejpeg(image: bytes, view: View, seed: int, size: int) -> tuple[np.ndarray, Crop] | None:
    """Return the decoded image, scaled where the crop allows it, and the crop in it; None leaves it to PIL."""
    if not simplejpeg() or not (found := plain_jpeg(image)):
        return None
    height, width = found
    crop, scale = scaled(view(width, height, seed), size, width, height)
    limits = {"min_height": -(-height // scale), "min_width": -(-width // scale)} if scale > 1 else {}
    try:
        return simplejpeg().decode_jpeg(image, "RGB", **limits), _shrunk(crop, scale)
    except ValueError:  # perhaps only a warning of libjpeg's: PIL tells whether the image is truncated
        return None


def _by_pil(image: bytes, view: View, seed: int, size: int) -> tuple[np.ndarray, Crop]:
    """Return the decoded image, upright, scaled as simplejpeg does, and the crop in it."""
    with opened(image) as file:
        if file.format not in ("JPEG", "MPO") or _jpeg_orientation(image) != 1:
            pixels = np.array(upright(file))
            return pixels, view(pixels.shape[1], pixels.shape[0], seed)
        width, height = file.size
        crop, scale = scaled(view(width, height, seed), size, width, height)
        file.draft(None, (width // scale, height // scale))  # by the largest of 1, 2, 4, 8 that leaves this size
        pixels = np.array(file.convert("RGB"))
    assert pixels.shape[:2] == (-(-height // scale), -(-width // scale)), "PIL took another scale"
    return pixels, _shrunk(crop, scale)


def segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each marker of the header, up to the compressed data, and where its segment's content begins and ends."""
    place = 2
    while (place := jpeg.find(b"\xff", place)) >= 0 and place + 4 <= len(jpeg):
        marker = jpeg[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        begin, place = place + 4, place + 2 + int.from_bytes(jpeg[place + 2 : place + 4])
        yield marker, begin, place
        if marker == 0xDA:
            return


# Orientation


def _jpeg_orientation(jpeg: bytes) -> int:
    if any(marker == 0xE1 for marker, *_ in segments(jpeg)):  # asking PIL takes 40 us
        with contextlib.suppress(Exception), Image.open(BytesIO(jpeg), formats=("JPEG",)) as file:
            return _orientation(file)
    return 1


def _orientation(file: Image.Image) -> int:
    """Return a loaded image's orientation, 1 to 8 as in Exif; 1 where neither Exif nor XMP gives one."""
    with contextlib.suppress(Exception):  # a damaged Exif
        return file.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


# PIL


@contextlib.contextmanager
def opened(image: bytes) -> Iterator[Image.Image]:
    """Open an image by PIL. Its readers raise errors of any kind on damaged files, here and while they decode
    within the block: each becomes a ValueError with its reason."""
    try:
        with Image.open(BytesIO(image), formats=FORMATS) as file:
            _refuse_bomb(*file.size)
            yield file
    except Image.UnidentifiedImageError:  # PIL's message holds a memory address
        raise ValueError(f"it is none of {', '.join(FORMATS)}, or its header is damaged") from None
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"PIL cannot read it: {type(error).__name__}: {error}") from error


def upright(file: Image.Image) -> Image.Image:
    """Return the whole image that `opened` gives, upright, in RGB with 8 bits per channel.

    Raises ValueError for 32-bit pixels, whose range no format defines.
    """
    file.load()
    turn, pixels = TURNS.get(_orientation(file)), _of_eight_bits(file)
    pixels.info.pop("transparency", None)  # PIL warns of it
    return (pixels.transpose(turn) if turn is not None else pixels).convert("RGB")


def _of_eight_bits(file: Image.Image) -> Image.Image:
    """Reduce 16-bit grey (12-bit, in a TIFF) to its upper 8 bits, as PIL does with colours; return all else as it is.

    PIL would clip it: all but the darkest 256 levels would become white.
    """
    if file.mode.startswith("I;16") or (file.mode == "I" and file.format in ("PNG", "PPM")):
        tags = getattr(file, "tag_v2", {})
        bits, white_is_zero = tags.get(258, (16,))[0], tags.get(262) == 0
        grey = (np.asarray(file) >> bits - 8).astype(np.uint8)
        return Image.fromarray(255 - grey if white_is_zero else grey)
    if file.mode in ("I", "F"):
        raise ValueError(f"its pixels are {PIXELS[file.mode]} of unknown range. Save it with 8 or 16 bits")
    return file


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels: rejected as a possible decompression bomb")


def _resize(pixels: np.ndarray, out: Tensor) -> None:
    # (1, H, W, 3) seen as (1, 3, H, W) is channels-last, which torch's kernel for uint8 wants, in and out.
    image, out = (tensor[None].permute(0, 3, 1, 2) for tensor in (torch.from_numpy(np.ascontiguousarray(pixels)), out))
    if image.shape == out.shape:
        out.copy_(image)
    else:  # what torch.nn.functional.interpolate(mode="bilinear", antialias=True) calls, without its copy
        torch.ops.aten._upsample_bilinear2d_aa.out(image, out.shape[2:], False, out=out)

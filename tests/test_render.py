# SPDX-License-Identifier: Apache-2.0
"""Every kind of image shows what PIL shows, upright; a damaged one is undecodable, whatever PIL raises."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import PHOTOS, middle, photograph, rendered
from PIL import Image

from shared.images.decode import Crop, render


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("WEBP", "RGB", {}),
    ],
)
def test_every_kind_of_image_shows_what_pil_shows(kind, mode, options):
    image = photograph(3, kind, mode, **options)
    with Image.open(io.BytesIO(image)) as file:
        crop = middle(*file.size, 0)
        expected = np.asarray(file.convert("RGB").crop(crop[:4]).resize((48, 48), Image.Resampling.BILINEAR))
    assert np.abs(rendered(image) - expected).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_was_turned_by_exif_stands_upright(orientation):
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
    undo |= {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE}
    undo |= {8: Image.Transpose.ROTATE_90}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photograph(3, exif=exif)
    with Image.open(io.BytesIO(image)) as file:
        upright = file.transpose(undo[orientation]) if orientation > 1 else file.copy()
    crop = middle(*upright.size, 0)
    expected = np.asarray(upright.crop(crop[:4]).resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(rendered(image) - expected).max() <= 2


def test_one_pixel_and_very_large_images():
    dot, large = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (1, 1), (200, 100, 50)).save(dot, "PNG")
    out = torch.zeros(8, 8, 3, dtype=torch.uint8)
    render(dot.getvalue(), lambda width, height, seed: Crop(0, 0, width, height), 0, out)
    assert (out == torch.tensor([200, 100, 50], dtype=torch.uint8)).all()
    photo = Image.fromarray(PHOTOS[0])
    photo.resize((6000, 4000), Image.Resampling.BICUBIC).save(large, "JPEG", quality=95)
    small = photo.crop(middle(*photo.size, 0)[:4]).resize((48, 48), Image.Resampling.BILINEAR)
    # Scaled by 1/8 within the decoder, which averages a little otherwise.
    assert np.abs(rendered(large.getvalue()) - np.asarray(small)).mean() < 3


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a PNG with one more chunk before its end."""
    image = photograph(3, "PNG")
    return image[:-12] + chunk(kind, data) + image[-12:]


def with_text_for_a_number() -> bytes:
    """Return a JPEG that Exif turns, and whose tag Compression is a text."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0103] = 6, 6
    image = photograph(3, exif=exif)
    place = image.index(b"\x01\x03", image.index(b"Exif"))
    return image[: place + 3] + b"\x02" + image[place + 4 :]


BOMB = (
    chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
)


def test_whatever_pil_raises_is_an_undecodable_image():
    with pytest.raises(ValueError, match="decompression bomb"):
        rendered(b"\x89PNG\r\n\x1a\n" + BOMB)


@pytest.mark.parametrize(
    "image",
    [with_chunk(b"eXIf", b"XX"), with_chunk(b"eXIf", b"MM\0*\0\0"), with_text_for_a_number()],
    ids=["header", "cut", "kind"],
)
def test_a_damaged_exif_leaves_the_image(image):
    rendered(image)

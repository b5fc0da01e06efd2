# SPDX-License-Identifier: Apache-2.0
"""Each decoder gives the same pixels, to the bit, of the same crop; what none can decode has a reason."""

import io
import itertools
import struct
import subprocess
import sys
import zlib
from itertools import product

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from shared.images import decode, native
from shared.images.decode import Crop, render

simplejpeg = pytest.importorskip("simplejpeg")
LOAD = "from shared.images.native import library; print(library() is not None)"
COMPILED = "compiled crop_jpeg.c for this machine, to decode JPEGs faster (RECIPES_NATIVE_DECODER=0: without)\n"
MISSING = [{}, {"library": lambda: None}, {"library": lambda: None, "simplejpeg": lambda: None}]
PHOTOS = load_sample_images().images
SAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "4:4:0", "grey", "RGB", "progressive", "restarts")


@pytest.fixture
def library():
    if native.library() is None:
        pytest.skip("no C compiler, or no headers of libjpeg-turbo, is installed")
    return native.library()


def encoded(pixels: np.ndarray, sampling: str, quality: int) -> bytes:
    if sampling == "4:4:0":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorsubsampling="440")
    options = {
        "restarts": {"restart_marker_blocks": 3},
        "RGB": {"keep_rgb": True},
        "progressive": {"progressive": True},
    }
    options = options.get(sampling, {"subsampling": sampling} if sampling[0] == "4" else {})
    file = io.BytesIO()
    Image.fromarray(pixels).convert("L" if sampling == "grey" else "RGB").save(
        file, "JPEG", quality=quality, **options
    )
    return file.getvalue()


def piece(draws: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return the pixels of a photograph, 427 x 640."""
    photo = PHOTOS[draws.integers(2)]
    top, left = draws.integers(0, 428 - height), draws.integers(0, 641 - width)
    return photo[top : top + height, left : left + width]


def random_jpeg(draws: np.random.Generator, sampling: str) -> tuple[bytes, Crop]:
    """One that has from 1 x 1 to 427 x 640 pixels, and a crop of it."""
    most = draws.choice([2, 20, 200, 427])
    height, width = (int(draws.integers(1, room + 1)) for room in (most, most * 3 // 2))
    left, top = int(draws.integers(width)), int(draws.integers(height))
    crop = Crop(left, top, int(draws.integers(left + 1, width + 1)), int(draws.integers(top + 1, height + 1)))
    return encoded(piece(draws, height, width), sampling, int(draws.integers(20, 100))), crop


def outcome(image: bytes, crop: Crop, size: int) -> bytes | str:
    """Pixels, or why there are none."""
    out = torch.zeros(size, size, 3, dtype=torch.uint8)
    try:
        render(image, lambda width, height, seed: crop, 0, out)
    except (OSError, ValueError) as error:
        return str(error)
    return out.numpy().tobytes()


def by_each(cases: list[tuple[bytes, Crop, int]]) -> list[list[bytes | str]]:
    """The outcomes of all cases by crop_jpeg.c, by simplejpeg and by PIL."""
    outcomes = []
    for missing in MISSING:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in missing.items():
                patch.setattr(decode, name, value)
            outcomes.append([outcome(*case) for case in cases])
    return outcomes


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_decoder_gives_the_same_pixels(library, sampling):
    draws = np.random.default_rng(SAMPLINGS.index(sampling))
    cases = [(*random_jpeg(draws, sampling), int(draws.integers(32, 257))) for _ in range(60)]
    same = encoded(piece(draws, 100, 100), sampling, 90)
    cases += [(same, Crop(7, 11, 71, 75), 64), (same, Crop(0, 0, 64, 99), 64)]  # nothing to resize, in both or one
    cases += [(same, Crop(1, 2, 1 + side, 99), side // scale) for scale, side in ((2, 67), (4, 66), (8, 97))]  # scaled
    assert all((sampling != "progressive") == bool(library.jpeg_size(image, len(image))) for image, *_ in cases)
    ours, *others = by_each(cases)
    for case, pixels, *theirs in zip(cases, ours, *others, strict=True):
        assert theirs == [pixels] * 2, (sampling, *case[1:])
    assert all(isinstance(pixels, bytes) for pixels in ours)


def test_a_crop_that_becomes_one_pixel_keeps_it(library):
    """Its edges, halves after the division by 2 or 4, are rounded to the same multiple."""
    image = encoded(piece(np.random.default_rng(0), 40, 40), "4:2:0", 90)
    crops = (Crop(3, 1, 5, 9), Crop(0, 6, 12, 10), Crop(7, 3, 9, 5))
    ours, *others = by_each([(image, crop, 1) for crop in crops])
    assert others == [ours] * 2
    assert all(isinstance(pixels, bytes) for pixels in ours)


def test_the_portable_c_gives_the_same(library, tmp_path, monkeypatch):
    """For processors without AVX2."""
    (tmp_path / "portable.c").write_text(native.SOURCE.read_text().replace('__builtin_cpu_supports("avx2")', "0"))
    monkeypatch.setattr(native, "SOURCE", tmp_path / "portable.c")
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    draws, portable = np.random.default_rng(0), native.load()
    for _ in range(60):
        image, crop = random_jpeg(draws, "4:2:0")
        size = int(draws.integers(1, 100))
        out = torch.zeros(2, size, size, 3, dtype=torch.uint8)
        for row, each in zip(out, (library, portable), strict=True):
            assert each.crop_jpeg(image, len(image), *crop[:4], 1, size, row.data_ptr()) == 0
        assert torch.equal(*out)


def test_damaged_images_are_judged_alike_by_every_decoder(library):
    draws, cases = np.random.default_rng(0), []
    whole = encoded(piece(draws, 120, 150), "4:2:0", 90)
    start = whole.index(b"\xff\xda")
    for number in range(120):
        place = int(draws.integers(2 if number % 4 == 0 else start, len(whole)))
        wrong = bytes([0xFF, draws.integers(256)]) if number % 3 == 1 else draws.bytes(2)
        image = whole[:place] if number % 3 == 0 else whole[:place] + wrong + whole[place + 2 :]
        left, top = int(draws.integers(100)), int(draws.integers(80))
        cases.append((image, Crop(left, top, left + 50, top + 40), 32 if number % 2 else 12))  # 12: scaled
    cases += [(whole[:place] + b"\xff\xd9", Crop(0, 0, 150, 120), 32) for place in range(2, len(whole), 97)]
    ours, *others = by_each(cases)
    assert others == [ours] * 2
    assert sum(isinstance(result, str) for result in ours) > 20
    assert sum(isinstance(result, bytes) for result in ours) > 20


def test_what_is_not_within_the_image_is_refused(library):
    image, out = encoded(piece(np.random.default_rng(0), 50, 60), "4:2:0", 90), torch.zeros(8, 8, 3, dtype=torch.uint8)
    for box in ((-1, 0, 9, 9), (0, 0, 61, 50), (0, 0, 60, 51), (5, 5, 5, 9), (9, 9, 8, 8)):
        assert library.crop_jpeg(image, len(image), *box, 1, 8, out.data_ptr()) != 0
    assert not out.any()


# Which way is up


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """kind: 3 is SHORT, 4 is LONG."""
    value = struct.pack(*((order + "I", orientation) if kind == 4 else (order + "HH", orientation, 0)))
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, 1)
    return b"Exif\0\0" + head + struct.pack(f"{order}HHI", 0x112, kind, 1) + value + bytes(4)


BEFORE = {
    "nothing": b"",
    "XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>" + b" " * 6000),
    "a profile": segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60000)) * 2,
    "Photoshop's": segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + bytes(7000)),
    "fill bytes": b"\xff\xff",
}
XMP = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="8"/>')


def uprighted(image: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(image)) as file:
        return np.asarray(ImageOps.exif_transpose(file).convert("RGB"))


def test_exif_is_found_wherever_it_stands_and_every_decoder_obeys():
    plain = encoded(PHOTOS[0][:40, :56], "4:4:4", 90)
    headers = [before + segment(0xE1, exif(6)) for before in BEFORE.values()]
    headers += [segment(0xE1, exif(*form)) for form in product((1, 2, 3, 4, 5, 7, 8), "<>", (3, 4))]
    headers += [XMP, segment(0xE1, exif(3)) + XMP, segment(0xE1, exif(9)), b""]
    for header in headers:
        image = plain[:2] + header + plain[2:]
        upright = uprighted(image)
        view = Crop(0, 0, 40, 40)
        pixels = torch.zeros(40, 40, 3, dtype=torch.uint8)
        decode._resize(upright[:40, :40], pixels)
        assert by_each([(image, view, 40)]) == [[pixels.numpy().tobytes()]] * 3, header[:20]


@pytest.mark.parametrize("kind", ["upright", "turned", "progressive", "grey"])
def test_every_decoder_draws_the_crop_of_the_same_image(kind):
    seen = set()
    image = encoded(PHOTOS[0][:41, :57], kind, 90)
    image = image[:2] + segment(0xE1, exif(6)) * (kind == "turned") + image[2:]
    for missing in MISSING:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in missing.items():
                patch.setattr(decode, name, value)
            out = torch.zeros(4, 4, 3, dtype=torch.uint8)
            render(image, lambda *sizes: seen.add(sizes) or Crop(0, 0, *sizes[:2]), 7, out)
    assert seen == {(41, 57, 7) if kind == "turned" else (57, 41, 7)}


def test_damage_within_exif_leaves_the_image_to_every_decoder():
    draws, cases = np.random.default_rng(0), []
    plain = encoded(PHOTOS[0][:64, :64], "4:2:0", 90)
    for _ in range(60):
        content = np.frombuffer(exif(6), np.uint8).copy()
        content[draws.integers(6, len(content), 3)] = draws.integers(0, 256, 3)
        header = segment(0xE1, content.tobytes()[: draws.integers(6, len(content) + 1)])
        cases.append((plain[:2] + header + plain[2:], Crop(0, 0, 64, 64), 16))
    ours, *others = by_each(cases)
    assert others == [ours] * 2
    assert not any(isinstance(pixels, str) for pixels in ours)
    assert len(set(ours)) > 1  # some still turn it


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "MPO"])
def test_other_formats_are_turned_as_well(kind):
    tags = Image.Exif()
    tags[0x112] = 6
    file = io.BytesIO()
    picture = Image.fromarray(PHOTOS[0][:40, :56])
    more = {"WEBP": {"lossless": True}, "MPO": {"save_all": True, "append_images": [picture.rotate(180)]}}
    picture.save(file, kind, exif=tags, **more.get(kind, {}))
    upright = uprighted(file.getvalue())
    assert upright.shape == (56, 40, 3)
    pixels = torch.zeros(40, 40, 3, dtype=torch.uint8)
    decode._resize(upright[8:48], pixels)
    assert by_each([(file.getvalue(), Crop(0, 8, 40, 48), 40)]) == [[pixels.numpy().tobytes()]] * 3


# Other pixels than 8 bits a channel, other formats


def tiff(rows: bytes, bits: int, photometric: int = 1, sample_format: int = 1, order: str = "<") -> bytes:
    """64 x 64 grey pixels."""
    values = {256: 64, 257: 64, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 64, 279: len(rows)}
    values[339] = sample_format
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in values.items())
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(rows))
    return head + rows + struct.pack(f"{order}H", len(values)) + entries + bytes(4)


def png(values: np.ndarray, colour: int) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
EIGHT = (RAMP >> 8).astype(np.uint8)
COLOURS = np.stack([RAMP] * 3, 2)
GREY = {
    "png": png(RAMP, 0),
    "png, colours": png(COLOURS, 2),
    "png, alpha": png(np.stack([RAMP, RAMP[:, ::-1]], 2), 4),
    "tiff": tiff(RAMP.astype("<u2").tobytes(), 16),
    "tiff, the other byte first": tiff(RAMP.astype(">u2").tobytes(), 16, order=">"),
    "tiff, white is 0": tiff((65535 - RAMP).astype("<u2").tobytes(), 16, photometric=0),
    "tiff, packed": saved(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
    "pgm": b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes(),
    "pgm of 12 bits": b"P5 64 64 4095\n" + (RAMP >> 4).astype(">u2").tobytes(),
    "ppm": b"P6 64 64 65535\n" + COLOURS.astype(">u2").tobytes(),
    "8 bits and alpha": saved(Image.fromarray(np.stack([EIGHT, EIGHT[:, ::-1]], 2)), "PNG"),
    "palette": saved(Image.fromarray(EIGHT).convert("P"), "PNG", transparency=bytes(range(256))),
    "gif": saved(Image.fromarray(EIGHT), "GIF", save_all=True, append_images=[Image.fromarray(255 - EIGHT)]),
    "webp": saved(Image.fromarray(np.stack([EIGHT] * 4, 2)), "WEBP", lossless=True, exact=True),
    "bmp": saved(Image.fromarray(EIGHT), "BMP"),
    "cmyk": saved(Image.fromarray(np.stack([EIGHT] * 3, 2)).convert("CMYK"), "TIFF"),
}


@pytest.mark.parametrize("name", GREY)
def test_a_ramp_from_black_to_white_is_one_in_every_format(name, recwarn):
    pixels = outcome(GREY[name], Crop(0, 0, 64, 64), 64)
    shown = np.frombuffer(pixels, np.uint8).reshape(64, 64, 3).astype(int)
    assert np.abs(shown - EIGHT[..., None]).max() <= (name == "ppm")  # PIL rounds these to 8 bits
    assert not recwarn.list


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "32-bit integers .PIL's mode I"),
        (tiff(RAMP.astype("<u2").tobytes(), 16, sample_format=2), "signed or 32-bit integers"),
        (saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floating-point numbers .PIL's mode F"),
        (saved(Image.fromarray(RAMP.astype(np.float32)), "PPM"), "floating-point numbers"),
        (saved(Image.fromarray(EIGHT), "EPS"), "it is none of JPEG, PNG,"),  # which PIL has Ghostscript run
        (saved(Image.fromarray(EIGHT), "ICO"), "it is none of JPEG, PNG,"),
    ],
    ids=["integers", "signed", "floats", "PFM", "EPS", "ICO"],
)
def test_what_has_no_certain_meaning_is_refused_by_its_reason(image, reason):
    with pytest.raises(ValueError, match=reason):
        render(image, lambda width, height, seed: Crop(0, 0, 8, 8), 0, torch.zeros(8, 8, 3, dtype=torch.uint8))


def test_pack_converts_sixteen_bits_by_the_same_rule(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import pack

    for part, label, name in itertools.product(("train", "val"), ("up", "down"), ("png", "tiff")):
        (tmp_path / "data" / part / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / part / label / f"{name}.png").write_bytes(GREY[name])
    source, _ = pack.open_source(str(tmp_path / "data"), 0)
    for number in range(2):
        image, kind = pack.encoded(source, pack.argparse.Namespace(max_side=32, quality=100), number)
        with Image.open(io.BytesIO(image)) as file:
            shown = np.asarray(file.convert("RGB")).astype(int)
        assert (kind, shown.shape) == ("jpg", (32, 32, 3))
        assert np.abs(shown[16, :, 0] - EIGHT[0, ::2]).max() < 12


# The record


def test_the_decoder_is_recorded(demo):
    assert demo.config["decoder"] == decode.decoder()


# Making the library


def loading(code: str = LOAD, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment(**variables), **pipes)


@pytest.mark.slow
def test_processes_that_start_at_once_make_it_once_for_all(library, tmp_path):
    processes = [loading(SCRATCH=str(tmp_path)) for _ in range(3)]
    answers = [process.communicate() for process in processes]
    assert all(said == "True\n" and line in ("", COMPILED) for said, line in answers), answers
    (path,) = (tmp_path / "dlojz-recipes").iterdir()
    assert loading(SCRATCH=str(tmp_path), RECIPES_NATIVE_DECODER="0").communicate() == ("False\n", "")
    made = path.stat().st_mtime_ns
    assert loading(SCRATCH=str(tmp_path)).communicate() == ("True\n", "")
    assert path.stat().st_mtime_ns == made


@pytest.mark.slow
def test_what_fails_is_said_in_one_line(library, tmp_path):
    (tmp_path / "file").touch()
    for variables in ({"CC": "false", "SCRATCH": str(tmp_path)}, {"SCRATCH": str(tmp_path / "file")}):
        said, line = loading(**variables).communicate()
        assert said == "False\n"
        assert line.count("\n") == 1
        assert line.startswith("JPEGs will be decoded more slowly, without crop_jpeg.c: ")


def test_without_compiler_or_headers_nothing_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setenv("CC", "/nowhere/cc")
        assert native.load() is None
    with monkeypatch.context() as patch:
        patch.setattr(native, "_include_folders", lambda: [tmp_path])
        assert native.load() is None
    (tmp_path / "jpeglib.h").touch()  # of another libjpeg
    with monkeypatch.context() as patch:
        patch.setattr(native, "_include_folders", lambda: [tmp_path])
        assert native.load() is None
    assert capfd.readouterr().err == ""

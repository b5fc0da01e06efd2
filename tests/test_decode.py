# SPDX-License-Identifier: Apache-2.0
"""crop_jpeg.c gives, to the bit, what the libraries that it stands in for give; without it everything else works."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from PIL import Image
from sklearn.datasets import load_sample_images

from shared.data import decode, native
from shared.data.decode import Crop, render

simplejpeg = pytest.importorskip("simplejpeg")
LOAD = "from shared.data import decode; print(decode.native is not None)"
PHOTOS = load_sample_images().images
SAMPLINGS = ("4:4:4", "4:2:2", "4:2:0", "4:4:0", "grey", "RGB", "progressive", "restarts")


@pytest.fixture
def library():
    if decode.native is None:
        pytest.skip("no C compiler, or no headers of libjpeg-turbo, is installed")
    return decode.native


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
    """Of a photograph, 427 x 640."""
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


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_crops_are_those_of_simplejpeg_and_torch_to_the_bit(library, sampling, monkeypatch):
    draws, ours = np.random.default_rng(SAMPLINGS.index(sampling)), []
    cases = [(*random_jpeg(draws, sampling), int(draws.integers(32, 257))) for _ in range(60)]
    same = encoded(piece(draws, 100, 100), sampling, 90)
    cases += [(same, Crop(7, 11, 71, 75), 64), (same, Crop(0, 0, 64, 99), 64)]  # nothing to resize, in both or one
    cases += [(same, Crop(1, 2, 1 + side, 99), side // scale) for scale, side in ((2, 67), (4, 66), (8, 97))]  # scaled
    for image, crop, size in cases:
        taken = sampling != "progressive" or decode.plain_jpeg(image) is None
        assert bool(library.jpeg_size(image, len(image))) == taken
        ours.append(outcome(image, crop, size))
    monkeypatch.setattr(decode, "native", None)
    for (image, crop, size), pixels in zip(cases, ours, strict=True):
        assert pixels == outcome(image, crop, size), (sampling, crop, size)


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


def test_torn_images_are_judged_as_without_it(library, monkeypatch):
    draws, cases = np.random.default_rng(0), []
    whole = encoded(piece(draws, 120, 150), "4:2:0", 90)
    start = whole.index(b"\xff\xda")
    for number in range(120):
        place = int(draws.integers(2 if number % 4 == 0 else start, len(whole)))
        wrong = bytes([0xFF, draws.integers(256)]) if number % 3 == 1 else draws.bytes(2)
        image = whole[:place] if number % 3 == 0 else whole[:place] + wrong + whole[place + 2 :]
        left, top = int(draws.integers(100)), int(draws.integers(80))
        cases.append((image, Crop(left, top, left + 50, top + 40)))
    cases += [(whole[:place] + b"\xff\xd9", Crop(0, 0, 150, 120)) for place in range(2, len(whole), 97)]
    ours = [outcome(image, crop, 32) for image, crop in cases]
    monkeypatch.setattr(decode, "native", None)
    theirs = [outcome(image, crop, 32) for image, crop in cases]
    assert ours == theirs
    assert sum(isinstance(result, str) for result in ours) > 20
    assert sum(isinstance(result, bytes) for result in ours) > 20


def test_what_is_not_within_the_image_is_refused(library):
    image, out = encoded(piece(np.random.default_rng(0), 50, 60), "4:2:0", 90), torch.zeros(8, 8, 3, dtype=torch.uint8)
    for box in ((-1, 0, 9, 9), (0, 0, 61, 50), (0, 0, 60, 51), (5, 5, 5, 9), (9, 9, 8, 8)):
        assert library.crop_jpeg(image, len(image), *box, 1, 8, out.data_ptr()) != 0
    assert not out.any()


# Making the library


def loading(code: str = LOAD, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment(**variables), **pipes)


def test_processes_that_start_at_once_make_it_once_for_all(library, tmp_path):
    processes = [loading(SCRATCH=str(tmp_path)) for _ in range(3)]
    assert [process.communicate() for process in processes] == [("True\n", "")] * 3
    (path,) = (tmp_path / "dlojz-recipes").iterdir()
    made = path.stat().st_mtime_ns
    assert loading(SCRATCH=str(tmp_path)).communicate() == ("True\n", "")
    assert path.stat().st_mtime_ns == made


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

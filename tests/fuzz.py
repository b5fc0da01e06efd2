# SPDX-License-Identifier: Apache-2.0
"""Fuzz the native JPEG decoder under AddressSanitizer and UBSan: `make fuzz`, or

    python tests/fuzz.py [CASES [SEED]]

Compiles shared/images/native/crop_jpeg.c into tests/fuzz_jpeg.c and gives it damaged JPEGs, each a function of the
seed and its number, with crops as shared/images/decode.py asks for them and one that may lie outside the image. Prints
a table and writes benchmarks/results/fuzz_jpeg_<hardware>_<date>.json. The first error ends it with status 1, the
number of the case and the sanitizer's report; `case(SEED, NUMBER).image` is the image again.

libjpeg-turbo is the system's, not instrumented: an error within it is seen only if it crashes or is in a call of libc.
"""

import os
import shlex
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from conftest import ROOT
from test_decode import SAMPLINGS, by_each, encoded, exif, piece, segment

from shared.images import native
from shared.images.decode import Crop, _shrunk, scaled, segments

sys.path.insert(0, str(ROOT / "benchmarks"))
import report

HARNESS = ROOT / "tests/fuzz_jpeg.c"
OPTIONS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-ffp-contract=off")
SANITIZERS = {"ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=16"}  # the harness itself looks for leaks
SHAPES = ((1, 1), (2, 9), (16, 16), (37, 53), (64, 48), (100, 150), (230, 170))  # heights and widths of whole images
BATCH = 500  # images that one process of the harness reads
Generator = np.random.Generator


class Case(NamedTuple):
    """An encoded image, its damage, and calls: the crops (and sizes) that a recipe wants, then one that may fail."""

    name: str
    damage: str
    image: bytes
    crops: list[tuple[Crop, int]]
    calls: list[tuple[int, ...]]  # left, top, right, bottom, scale, size


@cache
def whole_images(seed: int) -> list[bytes]:
    """Encode a piece of a photograph in each sampling and shape, every third with an Exif that says upright."""
    draws, images = np.random.default_rng(seed), []
    for number, (height, width) in enumerate(SHAPES * len(SAMPLINGS)):
        image = encoded(piece(draws, height, width), SAMPLINGS[number % len(SAMPLINGS)], int(draws.integers(20, 100)))
        images.append(image[:2] + (segment(0xE1, exif(1)) if number % 3 == 0 else b"") + image[2:])
    return images


def flip_bits(draws: Generator, image: bytes, other: bytes) -> bytes:
    changed = bytearray(image)
    for place in draws.integers(0, len(image), draws.integers(1, 4)):
        changed[place] ^= 1 << int(draws.integers(8))
    return bytes(changed)


def overwrite(draws: Generator, image: bytes, other: bytes) -> bytes:
    place, number = int(draws.integers(len(image))), int(draws.integers(1, 17))
    wrong = draws.bytes(number) if draws.random() < 0.5 else bytes([draws.choice([0, 1, 0x7F, 0xFF])]) * number
    return image[:place] + wrong + image[place + number :]


def edit_header(draws: Generator, image: bytes, other: bytes) -> bytes:
    """Change a byte of a segment: of its length, or of the dimensions, samplings, tables or intervals in it."""
    changed = bytearray(image)
    if found := [(begin, end) for _, begin, end in segments(image) if begin <= end <= len(image)]:
        begin, end = found[draws.integers(len(found))]
        place = int(draws.integers(begin - 2, max(min(end, begin + 20), begin)))
        changed[place] = draws.choice([0, 1, 2, 4, 0x11, 0x21, 0x22, 0xFF, changed[place] ^ 1, draws.integers(256)])
    return bytes(changed)


def truncate(draws: Generator, image: bytes, other: bytes) -> bytes:
    return image[: draws.integers(len(image))] + (b"\xff\xd9" if draws.random() < 0.7 else b"")


def splice(draws: Generator, image: bytes, other: bytes) -> bytes:
    """Continue with the other image, half the time from the same fraction of its length."""
    at, to = draws.random(2) if draws.random() < 0.5 else [draws.random()] * 2
    return image[: int(at * len(image))] + other[int(to * len(other)) :]


def insert_segment(draws: Generator, image: bytes, other: bytes) -> bytes:
    """Insert a restart interval, a segment of any kind or, half the time, a copy of one, mostly before another one."""
    places = [begin - 4 for _, begin, _ in segments(image)] or [0]
    place = int(draws.choice(places) if draws.random() < 0.8 else draws.integers(len(image) + 1))
    copies = [donor[begin - 4 : end] for donor in (image, other) for _, begin, end in segments(donor)] or [b""]
    made = [segment(0xDD, bytes([0, draws.integers(20)])), segment(draws.integers(1, 256), draws.bytes(30))]
    made += [copies[place] for place in draws.integers(0, len(copies), 2)]
    return image[:place] + made[draws.integers(len(made))] + image[place:]


DAMAGES = (flip_bits, overwrite, edit_header, truncate, splice, insert_segment)


def case(seed: int, number: int) -> Case:
    """Return one of the whole images or, beyond their number, one that was damaged once or several times."""
    images, draws, damage = whole_images(seed), np.random.default_rng((seed, number)), "none"
    image = images[number % len(images)]
    if number >= len(images):
        chosen = [DAMAGES[kind] for kind in draws.integers(0, len(DAMAGES), draws.choice([1, 1, 1, 2, 4]))]
        damage = chosen[0].__name__ if len(chosen) == 1 else "several"
        for each in chosen:
            image = each(draws, image, images[draws.integers(len(images))]) or b"\xff"
    width, height = written_size(image)
    crops = [random_crop(draws, width, height) for _ in range(3)]
    boxes = [(*scaled(crop, size, width, height), size) for crop, size in crops]
    calls = [(*_shrunk(crop, scale)[:4], scale, size) for crop, scale, size in boxes]
    return Case(f"case {number} of seed {seed}", damage, image, crops, [*calls, extreme_call(draws, width, height)])


def written_size(image: bytes) -> tuple[int, int]:
    """Return width and height as the header says, or some where it says none."""
    frames = [image[begin + 1 : begin + 5] for marker, begin, _ in segments(image) if marker in (0xC0, 0xC1, 0xC2)]
    height, width = struct.unpack(">HH", frames[0].ljust(4, b"\1")) if frames else (30, 40)
    return max(width, 1), max(height, 1)


def random_crop(draws: Generator, width: int, height: int) -> tuple[Crop, int]:
    """Draw a crop, each edge of which is half the time the image's, and a size of the output."""
    left, top = (int(draws.integers(side)) * int(draws.integers(2)) for side in (width, height))
    right, bottom = int(draws.integers(left, width)) + 1, int(draws.integers(top, height)) + 1
    right, bottom = (int(draws.choice(pair)) for pair in ((right, width), (bottom, height)))
    return Crop(left, top, right, bottom), int(draws.choice([1, 2, 3, 7, draws.integers(4, 40), 64]))


def extreme_call(draws: Generator, width: int, height: int) -> tuple[int, ...]:
    """Draw the whole image at any scale, or a box that may have no or negative sides or lie outside; any size."""
    scale = int(draws.choice([1, 2, 4, 8]))
    box = [0, 0, -(-width // scale), -(-height // scale)]
    edges = (-(2**31), -1, 0, 1, 2**31 - 1, *box, box[2] + 1, box[3] + 1)
    for place in draws.integers(0, 4, draws.integers(3)):
        box[place] = int(draws.choice(edges))
    return (*box, scale, int(draws.choice([-1, 0, 1, 33, 224])))


def compiled(folder: Path, source: Path = native.SOURCE, harness: Path = HARNESS) -> Path:
    """Compile the harness with the source; raises OSError or SubprocessError where that cannot be."""
    compiler, program = shlex.split(os.environ.get("CC") or "cc"), folder / "fuzz_jpeg"
    command = [*compiler, *OPTIONS, f'-DSOURCE="{source}"', str(harness), "-ljpeg", "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return program


def answers(program: Path, cases: list[Case]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Return what the harness says of each case: jpeg_size, and the result and the checksum of each call."""
    heads = (struct.pack("=II", len(each.image), len(each.calls)) + each.image for each in cases)
    data = b"".join(head + np.array(each.calls, "i4").tobytes() for head, each in zip(heads, cases, strict=True))
    options = {"capture_output": True, "timeout": 300, "env": {**os.environ, **SANITIZERS}}
    process = subprocess.run([program], input=data, **options)
    lines = [line.split() for line in process.stdout.decode().splitlines()]
    assert process.returncode == 0, f"{cases[len(lines)].name}: {process.stderr.decode(errors='replace')}"
    return [(int(size), [tuple(map(int, word.split(":"))) for word in words]) for size, *words in lines]


def check_values(whole: list[tuple[Case, tuple]]) -> int:
    """Assert that undamaged images have the pixels of simplejpeg and PIL; return how many crops were compared."""
    assert all(bool(size) == (b"\xff\xc2" not in each.image) for each, (size, _) in whole), "all but progressive ones"
    decoded = [(each, results[:-1]) for each, (size, results) in whole if size]
    wanted = [(each.image, *crop) for each, _ in decoded for crop in each.crops]
    given = [result for _, results in decoded for result in results]
    for others in by_each(wanted)[1:]:
        assert given == [(0, zlib.adler32(pixels)) for pixels in others]
    return len(given)


def fuzz(program: Path, seed: int, number: int) -> list[dict]:
    """Return a row for each kind of damage and one for all; asserts that many were decoded, and many refused."""
    counts = Counter()
    for first in range(0, number, BATCH):
        cases = [case(seed, each) for each in range(first, min(first + BATCH, number))]
        pairs = list(zip(cases, answers(program, cases), strict=True))
        counts["none", "crops_compared"] += check_values([pair for pair in pairs if pair[0].damage == "none"])
        for each, (size, results) in pairs:
            outcome = "decoded" if size and 0 in dict(results) else "refused"
            counts[each.damage, outcome] += 1
    names, damages = ("decoded", "refused", "crops_compared"), dict.fromkeys(damage for damage, _ in counts)
    rows = [{"damage": damage} | {name: counts[damage, name] for name in names} for damage in damages]
    rows.append({"damage": "all"} | {name: sum(row[name] for row in rows) for name in names})
    assert min(rows[-1]["decoded"], rows[-1]["refused"]) > number / 10, rows
    return rows


if __name__ == "__main__":
    number, seed = (int(word) for word in (*sys.argv[1:], *("20000", "0")[len(sys.argv) - 1 :]))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = fuzz(compiled(Path(folder)), seed, number)
    more = {"cases": number, "seed": seed, "errors": 0, "seconds": round(time.monotonic() - begin, 1)}
    more |= {"command": f"python tests/fuzz.py {number} {seed}", "libjpeg_turbo": native.libjpeg_version()}
    more["commit"] = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True).strip()
    print(report.table(rows))
    print(report.write("fuzz_jpeg", rows, **more))

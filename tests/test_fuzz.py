# SPDX-License-Identifier: Apache-2.0
"""The native JPEG decoder under AddressSanitizer and UBSan, which find nothing in it, and an overrun where one is."""

import subprocess
from pathlib import Path

import fuzz
import pytest

from shared.images import native

pytestmark = pytest.mark.slow

PROBE = "#include <sanitizer/asan_interface.h>\n#include <stdio.h>\n#include <jpeglib.h>\nint main(void) { }\n"


@pytest.fixture(scope="module", autouse=True)
def _sanitizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.c").write_text(PROBE)
    try:
        subprocess.run([fuzz.compiled(folder, harness=folder / "probe.c")], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
        pytest.skip(f"no C compiler, sanitizers or headers of libjpeg-turbo: {reason}")


def test_damaged_images_cause_no_error_and_whole_ones_have_their_pixels(tmp_path):
    rows = {row["damage"]: row for row in fuzz.fuzz(fuzz.compiled(tmp_path), 0, 1000)}
    assert set(rows) == {"none", "all", "several", *(each.__name__ for each in fuzz.DAMAGES)}
    assert rows["all"]["decoded"] > 200
    assert rows["all"]["refused"] > 200
    assert rows["none"]["crops_compared"] == 3 * 7 * len(fuzz.SHAPES)  # crops, samplings but progressive


def test_a_seed_gives_the_same_images_and_another_seed_others():
    first, again, other = ([fuzz.case(seed, number) for number in range(200)] for seed in (0, 0, 1))
    assert first == again
    assert all(one.image != two.image for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("finished, stride);", "finished, stride + 1);"), ("narrow = stride + SPARE", "narrow = stride - 1")],
    ids=["the output", "a row within"],
)
def test_a_planted_overrun_by_one_byte_is_found(tmp_path, right, wrong):
    source: Path = tmp_path / "crop_jpeg.c"
    source.write_text(native.SOURCE.read_text().replace(right, wrong))
    with pytest.raises(AssertionError, match=r"AddressSanitizer: (heap-buffer-overflow|use-after-poison)"):
        fuzz.fuzz(fuzz.compiled(tmp_path, source), 0, 100)

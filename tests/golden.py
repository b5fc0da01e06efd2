# SPDX-License-Identifier: Apache-2.0
"""Golden curves: the first losses and digests of each recipe under each strategy. A refactoring leaves them equal.

Tests marked `golden` compare the runs that they launch with these files; `make golden` records the files again.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from conftest import ROOT, Result

FOLDER = Path(__file__).with_name("golden")
STEPS = 12


def compare(name: str, result: Result, steps: int = STEPS) -> None:
    """Assert that the digests are equal and the losses within 1e-5 (relative; AVX2 and AVX-512 differ by 2e-7).

    RECORD_GOLDEN=1 writes the file first.
    """
    path = FOLDER / f"{name.replace(',', '').replace(' ', '-')}.json"
    lock = hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()[:16]
    found = {"lock": lock} | {each: result.series(each)[:steps] for each in ("loss", "samples_digest")}
    assert len(found["loss"]) == steps
    if os.environ.get("RECORD_GOLDEN") == "1":
        path.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(path.read_text())
    why = f"{path.name}, made with {'this' if golden['lock'] == lock else 'another'} requirements.lock"
    assert found["samples_digest"] == golden["samples_digest"], why
    np.testing.assert_allclose(found["loss"], golden["loss"], rtol=1e-5, err_msg=why)

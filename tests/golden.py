# SPDX-License-Identifier: Apache-2.0
"""Golden curves: the first losses and digests of each recipe under each strategy, which no rebuilding may move.

Tests marked `golden` compare what they have launched anyway; `make golden` lets the same tests write the files.
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
    """Digests exactly and losses within 1e-5, relative: what processors differ by is 2e-7 in these steps.

    Under RECORD_GOLDEN=1 write them instead.
    """
    path = FOLDER / f"{name.replace(',', '').replace(' ', '-')}.json"
    lock = hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()[:16]
    found = {"lock": lock} | {each: result.series(each)[:steps] for each in ("loss", "samples_digest")}
    assert len(found["loss"]) == steps
    if os.environ.get("RECORD_GOLDEN") == "1":
        FOLDER.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(path.read_text())
    why = f"{path.name}, made with {'this' if golden['lock'] == lock else 'another'} requirements.lock"
    assert found["samples_digest"] == golden["samples_digest"], why
    np.testing.assert_allclose(found["loss"], golden["loss"], rtol=1e-5, err_msg=why)

# SPDX-License-Identifier: Apache-2.0
"""Run two steps of every recipe with the oldest versions that pyproject.toml takes, and say which pass or are refused.

    make test-oldest     # makes .venv-oldest, then: .venv-oldest/bin/python benchmarks/oldest.py

A recipe may need newer libraries than the others; it then says so in one line. Any other failure means that a lower
bound is wrong, and the exit status is 1. Writes benchmarks/results/oldest_<hardware>_<date>.json.
"""

import re
import subprocess
import sys
import time

from report import ROOT, table, write

from shared.lifetime import die_with_parent


def main() -> int:
    rows = [outcome(recipe.stem) for recipe in sorted((ROOT / "recipes").glob("*.py"))]
    print(table(rows))
    print(write("oldest", rows))
    return int(any(row["outcome"] == "failed" for row in rows))


def outcome(name: str) -> dict:
    """Return whether a recipe passed, was refused by the one line that is given, or failed, with the error that it
    raised."""
    begin = time.perf_counter()
    command = [sys.executable, ROOT / "tools/smoke.py", name]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=die_with_parent)
    row = {"recipe": name, "outcome": "passed", "seconds": round(time.perf_counter() - begin, 1), "reason": None}
    if process.returncode:
        lines = process.stderr.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        raised = [line for line in lines if re.search(r"^(\[rank\d+\]: )?\w+(Error|Exception): ", line)]
        if errors:
            row |= {"outcome": "refused", "reason": errors[0]}
        else:
            row |= {"outcome": "failed", "reason": raised[0] if raised else lines[0]}
    print(name, row["outcome"], file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())

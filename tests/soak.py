# SPDX-License-Identifier: Apache-2.0
"""Hundreds of kills of the runs of test_survival.py, at instants drawn from a seed: `make soak`, or

    python tests/soak.py 500 [SEED]

Prints each kill, and in the end a table; writes benchmarks/results/soak_<hardware>_<date>.json. Exit status 1 where a
run ended otherwise than the one that was not killed.
"""

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import forked
from conftest import ROOT, digits_folder, environment
from kills import KILLED, difference, kill_often, words

sys.path.insert(0, str(ROOT / "benchmarks"))
import report


def soak(kills: int, seed: int, root: Path) -> list[dict]:
    """A row for each case; a run is killed as often as in the test, then another one begins."""
    server, data = forked.Server(environment(), root), digits_folder(root / "images")
    rows = {name: {"case": name, "runs": 0, "kills": 0, "equal": 0, "differences": []} for name in KILLED}
    kinds, chance = {name: Counter() for name in KILLED}, random.Random(seed)
    while sum(row["kills"] for row in rows.values()) < kills:
        for name, (often, recipe, flags, launch) in KILLED.items():
            row = rows[name]
            often = min(often, kills - sum(row["kills"] for row in rows.values()))
            if not often:
                break
            flags = ["--data", str(data), *flags, "--checkpointing_steps", "4"]
            whole, folder = root / f"whole-{name}", root / f"{name}-{row['runs']}"
            if not whole.exists():
                ended = server.launch(words(whole, *flags, recipe=recipe, **launch))
                assert ended.returncode == 0, ended.stdout
            start = words(folder, *flags, recipe=recipe, **launch)
            counts = kill_often(server, start, folder, often, chance, lambda line: print(line, flush=True))
            other = difference(folder, whole)
            row["runs"], row["kills"], row["equal"] = (
                row["runs"] + 1,
                row["kills"] + counts.total(),
                row["equal"] + (not other),
            )
            row["differences"] += [other] if other else []
            kinds[name] += counts
            shutil.rmtree(folder)
    server.close()
    return [row | {"kinds": dict(sorted(kinds[name].items()))} for name, row in rows.items()]


if __name__ == "__main__":
    kills, seed = (int(word) for word in (*sys.argv[1:], *("500", "0")[len(sys.argv) - 1 :]))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = soak(kills, seed, Path(folder))
    equal = all(row["runs"] == row["equal"] for row in rows)
    print(report.table([{name: row[name] for name in ("case", "runs", "kills", "equal")} for row in rows]))
    totals = {"kills": sum(row["kills"] for row in rows), "seed": seed, "all_equal": equal}
    totals |= {"command": f"python tests/soak.py {kills} {seed}", "seconds": round(time.monotonic() - begin)}
    print(report.write("soak", rows, **totals))
    sys.exit(not equal)

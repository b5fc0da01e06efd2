# SPDX-License-Identifier: Apache-2.0
"""Hundreds of kills of the runs of test_survival.py, at moments drawn from a seed: `make soak`, or

    python tests/soak.py 500 [SEED [MINUTES]]

Prints each kill, and in the end a table; writes benchmarks/results/soak_seed<SEED>_<hardware>_<date>.json after each
run. Exit status 1 where one ended otherwise than the run that was not killed. Ctrl-C, or so many minutes (45), end it
early.
"""

import contextlib
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import forked
from conftest import ROOT, digits_folder, environment
from kills import IN_BACKGROUND, SOAKED, difference, kill_often, words

sys.path.insert(0, str(ROOT / "benchmarks"))
import report

KILLS_A_RUN = 8  # where it does not end before


def soak(kills: int, seed: int, minutes: float, root: Path) -> list[dict]:
    """A row for each case, whose runs take turns; no run begins after so many minutes. Recorded after each run."""
    begin = time.monotonic()
    server, data, chance = forked.Server(environment(), root), digits_folder(root / "images"), random.Random(seed)
    rows = [{"case": name, "runs": 0, "kills": 0, "equal": 0, "differences": [], "kinds": {}} for name in SOAKED]
    with contextlib.suppress(KeyboardInterrupt):
        for row in itertools.cycle(rows):
            left = kills - sum(each["kills"] for each in rows)
            if not left or time.monotonic() > begin + 60 * minutes:
                break
            print(f"{kills - left} of {kills} kills", flush=True)
            killed_run(server, data, root, row, min(left, KILLS_A_RUN), chance)
            record(rows, kills, seed, begin)
    server.close()
    return [row for row in rows if row["runs"]]


def record(rows: list[dict], kills: int, seed: int, begin: float) -> Path:
    rows = [row for row in rows if row["runs"]]
    totals = {"kills": sum(row["kills"] for row in rows), "seed": seed, "all_equal": all(map(is_equal, rows))}
    totals |= {"command": f"python tests/soak.py {kills} {seed}", "seconds": round(time.monotonic() - begin)}
    return report.write(f"soak_seed{seed}", rows, **totals)


def is_equal(row: dict) -> bool:
    return row["runs"] == row["equal"]


def killed_run(server: forked.Server, data: Path, root: Path, row: dict, kills: int, chance: random.Random) -> None:
    """Kill one run, let it end, compare it with the one that was not killed, and add both to the row."""
    _, recipe, flags, launch = SOAKED[row["case"]]
    flags = ["--data", str(data), *flags, "--checkpointing_steps", "4"]
    whole, folder = root / f"whole {row['case']}", root / row["case"]
    if not whole.exists():
        ended = server.launch(words(whole, *flags, recipe=recipe, **launch))
        assert ended.returncode == 0, ended.stdout
    background = ["--async_checkpoint"] if row["case"] in IN_BACKGROUND else []
    start = words(folder, *flags, *background, recipe=recipe, **launch)
    try:
        counts = kill_often(server, start, folder, kills, chance, partial(print, flush=True))
        other = difference(folder, whole)
    except AssertionError as error:  # of one run, which ends the others as little as it would alone
        counts, other = Counter(), str(error)[-3000:]
    row["differences"] += [other] if other else []
    row["kinds"] = dict(sorted((Counter(row["kinds"]) + counts).items()))
    row["runs"], row["kills"], row["equal"] = row["runs"] + 1, sum(row["kinds"].values()), row["equal"] + (not other)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    kills, seed, minutes = (int(word) for word in (*sys.argv[1:], *("500", "0", "45")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        rows = soak(kills, seed, minutes, Path(folder))
    print(report.table([{name: row[name] for name in ("case", "runs", "kills", "equal")} for row in rows]))
    sys.exit(not all(map(is_equal, rows)))

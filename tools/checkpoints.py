# SPDX-License-Identifier: Apache-2.0
"""List what a run's folder has to resume from, and verify that it is what was written.

    python tools/checkpoints.py list runs/resnet-ad9742eb        # names and sizes: at once
    python tools/checkpoints.py verify runs/resnet-ad9742eb      # reads every byte; exits 1 where one is damaged

A `step-` folder that has changed since it was written is `damaged`: a resume skips it. A `tmp-` folder is
`unfinished`: its save is at work, or was cut off; the next start or save of that step removes it. A `quarantined-`
folder lay past the checkpoint that a start resumed from. Inspect it, and remove it.
"""

import argparse
import math
import sys
from pathlib import Path

from shared.checkpoint.retention import QUARANTINED, checkpoints, damage, read_manifest, score
from shared.config import SIZES, expand_home
from shared.errors import UserError
from shared.lifetime import begin

HEADER = ("step", "saved (UTC)", "strategy x processes", "accuracy", "MB", "state")
SPLITS = dict(zip(("tp", "pp"), SIZES, strict=True))


def main(arguments: argparse.Namespace) -> int:
    """Print the table; return the exit status."""
    verify = arguments.command == "verify"
    folder = find(arguments.run_folder)
    reasons = {path: damage(path, contents=verify) for path in checkpoints(folder)}
    manifests = {path: manifest(path) for path in reasons}
    best = best_of({path: manifests[path] for path, reason in reasons.items() if reason is None})
    rows = [
        row(path, manifests[path], path == best, f"damaged: {reason}" if reason else "OK" if verify else "complete")
        for path, reason in reasons.items()
    ]
    rows += [row(path, {}, False, "unfinished") for path in folders(folder, "tmp-")]
    rows += [row(path, manifest(path), False, "quarantined") for path in folders(folder, QUARANTINED)]
    show(sorted(rows))
    return int(verify and any(reasons.values()))


def find(run_folder: Path) -> Path:
    """Return the run's folder of checkpoints; raises UserError where it is missing or empty."""
    folder = run_folder / "checkpoints"
    if not run_folder.is_dir():
        raise UserError(f"{run_folder} is not a folder. Give the run's folder, the first line that a recipe prints.")
    if not folder.is_dir():
        raise UserError(f"{run_folder} has no folder checkpoints. Give the folder of a run.")
    if not checkpoints(folder) and not folders(folder, "tmp-"):
        raise UserError(f"{folder} is empty. The run's first checkpoint is yet to come: see --checkpointing_steps.")
    return folder


def folders(folder: Path, prefix: str) -> list[Path]:
    return [path for path in folder.glob(f"{prefix}*") if path.is_dir()]


def manifest(path: Path) -> dict:
    """Return a checkpoint's manifest; {} where it cannot be read."""
    try:
        values = read_manifest(path)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def best_of(manifests: dict[Path, dict]) -> Path | None:
    """Return the best checkpoint, the newest of equals, as a run chooses it."""
    scores = {path: score(values) for path, values in manifests.items() if score(values) > -math.inf}
    return max(scores, key=lambda path: (scores[path], path), default=None)


def row(path: Path, values: dict, best: bool, state: str) -> tuple[str, ...]:
    name = values.get("metric", "accuracy")
    value, form = values.get(name), "{:.2%}" if name == "accuracy" else f"{name} {{:.4g}}"
    return (
        str(int(path.name.partition("-")[2])).rjust(8) if path.name.partition("-")[2].isdigit() else path.name,
        str(values.get("saved", "-")).removesuffix("+00:00").replace("T", " "),
        topology(values) if values else "-",
        "-" if value is None else f"{form.format(value)}{' best' if best else ''}",
        f"{sum(file.stat().st_size for file in path.rglob('*') if file.is_file()) / 1e6:.1f}",
        state,
    )


def topology(values: dict) -> str:
    """Return a text such as `fsdp x 2` or, where the recipe splits the network itself, `tp x 2, fsdp x 2`."""
    rest, parts = values.get("world_size", 1), []
    for word, name in SPLITS.items():
        size = values.get(name, 1)
        parts += [f"{word} x {size}"] * (size > 1)
        rest //= size
    return ", ".join(parts + [f"{values.get('strategy', '?')} x {rest}"] * (rest > 1 or not parts))


def show(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    for cells in (HEADER, *rows):
        padded = [
            cell.rjust(width) if name in ("step", "MB") else cell.ljust(width)
            for name, cell, width in zip(HEADER, cells, widths, strict=True)
        ]
        print("  ".join(padded).rstrip())


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|verify")
    for name, text in (("list", "compare names and sizes"), ("verify", "compare every SHA-256 too")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run_folder", type=Path, metavar="RUN_FOLDER")
    return parser.parse_args(words)


if __name__ == "__main__":
    begin()
    try:
        sys.exit(main(parse(expand_home(sys.argv[1:]))))
    except UserError as error:
        sys.exit(f"error: {error}")

# SPDX-License-Identifier: Apache-2.0
"""Look at what surrounds a job: caches, versions of libraries, room on the file systems."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .plan import Plan

FULL = 0.95  # of a quota
ROOM = {"disk": 10 * 10**9, "inodes": 10_000}  # bytes and files that a run may need: as much left is enough
Usage = tuple[str, int, int]  # what, used, most; in bytes or files


def caches(plan: Plan) -> Iterator[str]:
    """Refuse caches in a small home folder where there is room elsewhere."""
    stores, given, home = [name for name in ("WORK", "SCRATCH") if os.environ.get(name)], os.environ.get, Path.home()
    if not (stores and plan.facts.home):
        return
    small, cache = f"in $HOME, which holds {plan.facts.home} GB", given("XDG_CACHE_HOME") or home / ".cache"

    def at_home(place: str | Path) -> bool:
        return Path(place).resolve().is_relative_to(home.resolve())

    if (built := given("TORCH_EXTENSIONS_DIR")) and at_home(built):
        yield f"TORCH_EXTENSIONS_DIR lies {small}. Unset it: slurm/launch.sh places it."
    # The variable; the store and the folder in it that slurm/launch.sh chooses; the library's own default.
    places = (
        ("HF_HOME", "WORK", "huggingface", cache),
        ("TORCH_HOME", "WORK", "torch", cache),
        ("TRITON_CACHE_DIR", "SCRATCH", "triton", given("TRITON_HOME") or home),
    )
    inside = [place for place in places if at_home(given(place[0]) or given(place[1]) or place[3])]
    if inside:
        exports = [f"{name}=${own if own in stores else stores[0]}/.cache/{it}" for name, own, it, _ in inside]
        names = ", ".join(name for name, *_ in inside)
        yield f"{names} lie {small}. Write into ~/.bashrc: export {' '.join(exports)}"


def versions(plan: Plan) -> Iterator[str]:
    """Compare versions with the bounds of the block at the recipe's head (PEP 723), and with no others."""
    text = plan.recipe.read_text() if plan.recipe.is_file() else ""
    block = re.search(r"^# /// script\n((?:#.*\n)*?)# ///$", text, re.M)
    needs = tomllib.loads(re.sub("^# ?", "", block[1], flags=re.M)) if block else {}
    python, bounds = platform.python_version(), needs.get("requires-python", "")
    if not SpecifierSet(bounds).contains(python):
        yield f"Python {python} is not {bounds}. Load another module."
    lines = {*needs.get("dependencies", []), *(["deepspeed"] if plan.kind.startswith("zero") else [])}
    for need in map(Requirement, sorted(lines)):
        if need.marker and not need.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"{need.name} is not installed. Load a module that has it, or pip install '{need.name}'."
            continue
        if not need.specifier.contains(version, prereleases=True):
            yield f"{need.name} {version} is not {need.specifier}. Load a newer module, or pip install '{need}'."


def quotas(plan: Plan) -> Iterator[str]:
    """Refuse an output folder on a file system that is nearly full, by its own count or by Lustre's quotas."""
    folders = (plan.output(task).absolute() for task in plan.tasks if task.run_config)
    places = {next(each for each in (folder, *folder.parents) if each.exists()) for folder in folders}
    known = {}  # by file system, owner
    for there in sorted(places):
        figures = [*system(there), *(lustre(plan, there, known) if shutil.which("lfs") else ())]
        for what, used, most in figures:
            if most and used > FULL * most and most - used < ROOM[what.split()[0]]:
                share = f"{used / most:.0%} of the {what} of {there} is used, and a run may need more than the rest"
                yield f"{share}. Remove files, change --output_dir, or RECIPES_PREFLIGHT_SKIP=quotas."


def system(folder: Path) -> Iterator[Usage]:
    """Yield what df counts."""
    state = os.statvfs(folder)
    blocks, files = state.f_blocks - state.f_bfree, state.f_files - state.f_ffree
    yield "disk", blocks * state.f_frsize, (blocks + state.f_bavail) * state.f_frsize
    yield "inodes", files, files + state.f_favail


def lustre(plan: Plan, folder: Path, known: dict[tuple, list[Usage]]) -> list[Usage]:
    """Return the quotas of the user, the group and the folder's project; what `known` has is not asked again."""
    figures, state = [], folder.stat()
    try:
        project = (lfs("project", "-d", str(folder)) or "0")[0]
        for kind, owner in (("-u", str(os.getuid())), ("-g", str(state.st_gid)), ("-p", project)):
            if (state.st_dev, kind, owner) not in known:
                known[state.st_dev, kind, owner] = [*quota(kind, owner, folder)]
            figures += known[state.st_dev, kind, owner]
    except (OSError, subprocess.SubprocessError) as error:
        plan.notes.append(f"warning: lfs does not tell the quotas of {folder}: {type(error).__name__}.")
    return figures


def quota(kind: str, owner: str, folder: Path) -> Iterator[Usage]:
    # The path; kilobytes, soft and hard limit, grace; the same of files. `*` marks what exceeds.
    words = [word.rstrip("*") for word in lfs("quota", "-q", kind, owner, str(folder))[1:]]
    for what, unit, values in (("disk", 1024, words[:3]), ("inodes", 1, words[4:7])):
        if len(values) == 3 and all(map(str.isdigit, values)):
            used, soft, hard = (unit * int(value) for value in values)
            yield f"{what} quota ({kind[1:]} {owner})", used, hard or soft


def lfs(*words: str) -> list[str]:
    return subprocess.run(["lfs", *words], capture_output=True, text=True, timeout=5).stdout.split()

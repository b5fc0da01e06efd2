# SPDX-License-Identifier: Apache-2.0
"""The rooms of shared/: their sizes, who may import whom, and that importing a module has no effect."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

SHARED = ROOT / "shared"
# Room -> lines that it may have, all languages counted, and the rooms that it may import. Raised by an issue only.
ROOMS = {
    "core": (1300, {"core"}),
    "run": (1200, {"core", "checkpoint", "run"}),
    "checkpoint": (900, {"core", "checkpoint"}),
    "images": (2100, {"core", "images"}),
    "images/native": (450, {"core", "images"}),
    "text": (600, {"core", "text"}),
    "models": (500, {"core", "models"}),
}
FACADE = 150  # lines of class Run
FILES = sorted(path for path in SHARED.rglob("*") if path.suffix in (".py", ".c"))
MODULES = [path for path in FILES if path.suffix == ".py"]


def room(path: Path) -> str:
    folder = str(path.parent.relative_to(SHARED))
    return "core" if folder == "." else folder


def imports(path: Path) -> set[str]:
    """Modules of this project and of libraries, by their absolute names, that a module imports at any place."""
    package, names = ["shared", *path.parent.relative_to(SHARED).parts], set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*base, *(node.module or "").split(".")]).strip("."))
    return names


def test_each_room_keeps_its_size():
    lines = dict.fromkeys(ROOMS, 0)
    for path in FILES:
        lines[room(path)] += len(path.read_text().splitlines())
    assert {name: count for name, count in lines.items() if count > ROOMS[name][0]} == {}
    (facade,) = [
        node for node in ast.parse((SHARED / "run/run.py").read_text()).body if isinstance(node, ast.ClassDef)
    ]
    assert facade.end_lineno - facade.lineno < FACADE


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SHARED)))
def test_a_room_imports_core_and_itself(path):
    """Core knows no modality, and no modality another."""
    for name in imports(path):
        assert name.split(".")[0] not in {
            "recipes",
            "tools",
            "benchmarks",
            *(p.stem for p in ROOT.glob("recipes/*.py")),
        }
        if name.split(".")[0] == "shared":
            target = SHARED / Path(*name.split(".")[1:])
            target = target / "__init__.py" if target.is_dir() else target.with_suffix(".py")
            assert target.exists(), name
            assert room(target).removesuffix("/native") in ROOMS[room(path)][1], name


# One interpreter imports the libraries alone; a fork of it imports each module, with an older transformers by name.
EFFECTS = """
import atexit, importlib, io, logging, os, sys, threading, warnings
for name in sys.argv[1].split(","):
    importlib.import_module(name)
import transformers
transformers.__version__ = "4.40"

def state():
    with open("/proc/self/maps") as maps:
        libraries = {line.split()[-1] for line in maps if ".so" in line}
    levels = {name: getattr(logger, "level", 0) for name, logger in logging.root.manager.loggerDict.items()}
    return {
        "hook": sys.excepthook, "exit functions": atexit._ncallbacks(), "threads": threading.active_count(),
        "files": sorted(os.listdir("/proc/self/fd")), "loaded libraries": libraries, "variables": dict(os.environ),
        "filters": list(warnings.filters), "log levels": {name: level for name, level in levels.items() if level},
        "cache": os.listdir(os.environ["SCRATCH"]), "home": os.listdir(os.environ["HOME"]),
    }

for module in sys.argv[2].split(","):
    if os.fork():
        assert os.wait()[1] == 0, module
        continue
    before, sys.stdout, sys.stderr = state(), io.StringIO(), io.StringIO()
    importlib.import_module(module)
    said, after = sys.stdout.getvalue() + sys.stderr.getvalue(), state()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    for what in before:
        if before[what] != after[what]:
            print(f"{module} changes the {what}: {before[what]} -> {after[what]}")
    print(f"{module} says {said!r}\\n" * bool(said), end="", flush=True)
    os._exit(0)
"""


def names() -> list[str]:
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES]


@pytest.mark.slow
def test_importing_a_module_has_no_effect(tmp_path):
    """No compiler, hook, output, thread or file, and no error for an old library."""
    top = [node for path in MODULES for node in ast.parse(path.read_text()).body]
    libraries = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    libraries |= {node.module for node in top if isinstance(node, ast.ImportFrom) and not node.level}
    (tmp_path / "home").mkdir()
    folders = {"SCRATCH": str(tmp_path), "HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", EFFECTS, ",".join(sorted(libraries)), ",".join(names())]
    process = subprocess.run(
        command, cwd=ROOT, env=environment(**folders), capture_output=True, text=True, timeout=300
    )
    assert (process.returncode, process.stdout) == (0, ""), process.stderr


@pytest.mark.slow
def test_one_interpreter_imports_all():
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    command = [sys.executable, "-c", code, *names()]
    process = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")

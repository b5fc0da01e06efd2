# SPDX-License-Identifier: Apache-2.0
"""The files of a run's folder, of which one process writes and which may be cut off at any byte."""

import ast
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from filelock import FileLock, Timeout

from .config import UserError, job_folder
from .locks import take_lock
from .tensor_files import replace_text, to_disk

LOCK_SECONDS = 60  # a requeued job may start while the former one still ends
PACKAGES = ("torch", "torchvision", "accelerate", "transformers", "numpy", "pillow")
# What says how a run was launched. Of Slurm's variables, which may hold secrets (SLURM_JWT), only what is named here:
# the job, and what it was given.
LAUNCHER_VARIABLES = re.compile(
    "(ACCELERATE|FSDP|PARALLELISM|NCCL|GLOO|CUDA_VISIBLE)_.*|OMP_NUM_THREADS|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
    "|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|NVIDIA_TF32_OVERRIDE"
    "|SLURM_(JOB_(ID|NAME|NUM_NODES|NODELIST|PARTITION|QOS|ACCOUNT|START_TIME|END_TIME)|ARRAY_(JOB|TASK)_ID|CLUSTER_NAME"
    "|SUBMIT_(DIR|HOST)|RESTART_COUNT|NODEID|PROCID|LOCALID|NTASKS|CPUS_(PER_TASK|ON_NODE)|GPUS_ON_NODE)"
)
SECRETS = re.compile("JWT|TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


def wait_for_preflight() -> None:
    """Of a job by plain sbatch, which slurm/launch.sh makes meanwhile; raises UserError where it refuses the job."""
    folder = job_folder()
    while folder and (folder / "unchecked").exists():
        time.sleep(0.1)
    if folder and (folder / "refused").exists():
        raise UserError("the preflight refuses this job. The end of the log says why.")


def lock(folder: Path) -> FileLock:
    """One run per folder; raises UserError where another one stays there."""
    holder = read_json(folder / "summary.json")
    use = f"{folder} is in use by process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    try:
        return take_lock(folder / "lock", use, LOCK_SECONDS)
    except Timeout:
        raise UserError(f"{use}. Stop it, or give another --output_dir.") from None


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """At the start, when an error costs nothing."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}. Give another --output_dir.") from error


def read_json(path: Path) -> dict:
    """Nothing where it is absent, or was torn by a loss of power: each start writes it anew."""
    return _parse(path.read_text(errors="replace")) if path.exists() else {}


def write_json(path: Path, values: dict) -> None:
    """Raises OSError, and leaves the former file whole."""
    replace_text(path, json.dumps(values, indent=1) + "\n")


def _parse(text: str) -> dict:
    """Nothing where a kill tore it."""
    with contextlib.suppress(json.JSONDecodeError):
        values = json.loads(text)
        return values if isinstance(values, dict) else {}
    return {}


class MetricsFile:
    """metrics.jsonl: one object a line, each once and in its place, whatever the disk has room for."""

    def __init__(self, path: Path):
        self.path = path
        self.unwritten, self.bytes = [], 0  # lines that wait for room; size without them

    def drop_after(self, step: int) -> list[dict]:
        """What a resume makes anew, and a last line that was torn; returns the others."""
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        kept = [line for line in map(_parse, lines) if line.get("step", math.inf) <= step]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.bytes = self.path.stat().st_size
        return kept

    def append(self, line: dict) -> None:
        """Raises OSError where there is no room; the line is then written with the next one that finds some."""
        self.unwritten.append(json.dumps(line) + "\n")
        self.write()

    def write(self) -> None:
        data = "".join(self.unwritten).encode()
        with open(self.path, "ab", buffering=0) as file:
            if file.tell() > self.bytes:
                file.truncate(self.bytes)  # a part, of what did not fit
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.bytes, self.unwritten = self.bytes + len(data), []

    def to_disk(self) -> None:
        """Before a checkpoint that lies past these lines; raises OSError."""
        self.write()
        to_disk(self.path)


# What config.json says of where a run was made


def versions() -> dict[str, str | None]:
    return {"python": sys.version.split()[0]} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def git_commit() -> str | None:
    """Of the recipe."""
    command = ["git", "-C", str(Path(sys.argv[0]).resolve().parent), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None


@functools.cache
def recipe_source() -> dict[str, str]:
    """Name -> hash of each function, class and constant of the recipe, with where it imports from what it uses.

    Comments, docstrings and layout do not count, nor do the fields of Config: their values are the run's identity.
    Nothing where there is no file. Read once, by build_accelerator: it may be edited while the data is listed.
    """
    path = Path(sys.argv[0])
    tree = ast.parse(path.read_bytes() if path.is_file() else "")
    parts, origins = {}, {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            origin = f"{'.' * getattr(node, 'level', 0)}{getattr(node, 'module', '')}"
            origins |= {alias.asname or alias.name.split(".")[0]: f"{origin} {alias.name}" for alias in node.names}
        elif isinstance(getattr(node, "body", None), list):
            is_config = getattr(node, "name", "") == "Config"
            node.body = [each for each in node.body if not _is_text(each) and not (is_config and _is_field(each))]
    for node in (node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)):
        used = sorted({each.id for each in ast.walk(node) if isinstance(each, ast.Name)} & origins.keys())
        parts.setdefault(_name(node), []).append("\n".join([ast.unparse(node), *(origins[name] for name in used)]))
    return {name: _hash("\n".join(texts).encode()) for name, texts in sorted(parts.items())}


def shared_source() -> dict[str, str]:
    """File of `shared` -> hash."""
    folder = Path(__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c"))
    return {str(path.relative_to(folder)): _hash(path.read_bytes()) for path in files}


def differing(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Names with another hash, or that one side lacks; none where one side has nothing to compare."""
    names = {*ours, *theirs} if ours and theirs else ()
    return sorted(name for name in names if ours.get(name) != theirs.get(name))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)


def _is_field(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign)


def _name(node: ast.stmt) -> str:
    """Of what a statement of a module makes."""
    made = [getattr(node, "name", getattr(node, "target", None))]
    names = made if made[0] else getattr(node, "targets", [])
    return ", ".join(name if isinstance(name, str) else ast.unparse(name) for name in names) or "the code at the end"


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def launcher_variables() -> dict[str, str]:
    """Return what the environment says of the launch, without names that promise a secret."""
    names = (name for name in sorted(os.environ) if LAUNCHER_VARIABLES.fullmatch(name) and not SECRETS.search(name))
    return {name: os.environ[name] for name in names}

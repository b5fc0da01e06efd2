# SPDX-License-Identifier: Apache-2.0
"""Runs of the real command lines, each made once a session and looked at by several tests."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import extensions
import forked
import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parent.parent
# Words for which the style guide has another one, in documents and in programs.
BANNED = re.compile(
    r"\b(?:go(?:es|ing)? on|went on|gone on|anew|afresh|torn|mend(?:s|ed)?|(?:puts?|set) aside|instants?|undecoded"
    r"|unreadable|utili[sz]\w*|leverag\w*|seamless\w*|simply|easily|obviously|of course|whilst|thereof)\b",
    re.IGNORECASE,
)
sys.path.insert(0, str(ROOT))  # for `import shared`; the recipes themselves run in processes of their own
sys.path.append(str(ROOT / "tools"))  # tools share recipe_file.py

# A dozen small steps: enough for losses to differ where something is wrong. They lie within the default warmup, of
# three epochs: at full rate the tenth loss would already amplify rounding a thousandfold.
SHORT = ["--epochs", "4", "--max_steps", "12", "--image_size", "16", "--logging_steps", "1", "--report_to", "none"]


def blocks(document: Path, language: str = "bash") -> list[str]:
    """Return the blocks of code of a document."""
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.S)


def add_made_up_machine(folder: Path) -> None:
    """Add docs/other_clusters.md's heron to a copy of the project, by the words of that page."""
    page = ROOT / "docs/other_clusters.md"
    (entry,), (header,) = blocks(page, "toml"), [block for block in blocks(page) if "heron.slurm" in block]
    with (folder / "slurm/machines.toml").open("a") as table:
        table.write(f"\n{entry}")
    subprocess.run(["bash", "-euc", header], cwd=folder, check=True)


@dataclass(frozen=True)
class Result:
    """A finished command and the folder that it wrote."""

    process: subprocess.CompletedProcess
    folder: Path

    @property
    def text(self) -> str:
        return self.process.stdout + self.process.stderr

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def config(self) -> dict:
        return json.loads((self.folder / "config.json").read_text())

    @property
    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def series(self, name: str) -> list:
        """Return one value per step (or evaluation), in the order of the file."""
        return [line[name] for line in self.lines if name in line]


def environment(**more: str) -> dict[str, str]:
    """Return this process's variables, without those that a launcher, pytest or torch.compile may have left.

    One thread per process: on a shared machine the threads of one process mostly wait for each other.
    """
    left = ("ACCELERATE_", "PYTHONPATH", "OMP_", "WANDB_", "TORCHINDUCTOR_", "TRITON_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    kept = {"TORCH_EXTENSIONS_DIR": extensions.folder(), **kept}
    return {**kept, "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1", **more}


def wait_for(condition: Callable[[], object], what: str = "", seconds: float = 120, every: float = 0.002):
    """Return the condition's first true value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"timed out after {seconds:.0f} s. {what}"
        time.sleep(every)
    return value


def flip(path: Path) -> None:
    """Change a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def python(
    *arguments: str, cwd: Path = ROOT, timeout: float = 300, server: forked.Server | None = None
) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` by the suite's interpreter, which the server forks where one is given; ARGUMENTS may
    begin with those of launch_command."""
    options = {"cwd": cwd, "env": environment(), "timeout": timeout}
    if server and arguments[0] == "-m":
        return server.launch([*arguments[2:]], apart=True, **options)
    if server:
        return server.python([*arguments], **options)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def launch_command(num_processes: int = 1, config_file: str = "local_ddp.yaml", **flags: str) -> list[str]:
    """Return the words of `accelerate launch` up to the recipe; keywords become launcher flags."""
    words = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / config_file)]
    words += ["--num_processes", str(num_processes)]
    return words + [word for name, value in flags.items() for word in (f"--{name}", value)]


def train(
    folder: Path,
    *arguments: str,
    recipe: Path = ROOT / "recipes/resnet.py",
    server: forked.Server | None = None,
    **launch,
) -> Result:
    """Run a recipe to its end under the launcher, which the server forks where one is given; fails the test if it
    fails."""
    module, launcher, *words = [*launch_command(**launch), str(recipe), "--output_dir", str(folder), *arguments]
    process = server.launch(words, env=environment()) if server else python(module, launcher, *words)
    assert process.returncode == 0, process.stdout + process.stderr
    return Result(process, Path(folder))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fail a skipped test under NO_SKIPS=1, which .ci/run sets."""
    report = yield
    if report.skipped and os.environ.get("NO_SKIPS"):
        report.outcome, report.longrepr = "failed", f"NO_SKIPS is set, but: {report.longrepr[-1]}"
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="run the units, and one launch of each family")


def is_quick(item: pytest.Item) -> bool:
    """Return whether `make test-quick` runs a test: a unit that is not marked slow, or a launch marked quick."""
    launches = {"server", "cluster"} & {*item.fixturenames}
    return bool(item.get_closest_marker("quick") or not (launches or item.get_closest_marker("slow")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the longest files first, so that the processes that run tests end together; Slurm's, which waits, is the
    very first."""
    items.sort(key=lambda item: [*LONGEST, item.path.stem].index(item.path.stem))
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if not is_quick(item)])
        items[:] = filter(is_quick, items)


LONGEST = ("test_slurm", "test_strategies", "test_survival", "test_signals", "test_recipes", "test_loaders")
LONGEST += ("test_llm", "test_augmentation", "test_training", "test_resume")


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[forked.Server]:
    """Fork all launches and commands but the one of each kind that is started as a user starts it."""
    server = forked.Server(environment(), tmp_path_factory.mktemp("server"))
    server.open()
    yield server
    server.close()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id) -> Callable[..., Result]:
    """Call `make` on a folder of this name in one of the processes that run tests; the others get its result."""
    common = tmp_path_factory.getbasetemp()
    common = common if worker_id == "master" else common.parent

    def once(name: str, make: Callable[[Path], Result]) -> Result:
        folder, text = common / "common" / name, common / f"{name}.txt"
        with FileLock(common / f"{name}.lock"):
            if not text.exists():
                text.write_text(make(folder).text)
        return Result(subprocess.CompletedProcess([], 0, text.read_text(), ""), folder)

    return once


@pytest.fixture(scope="session")
def demo(server, made_once) -> Result:
    """Run the whole demonstration: one process, every default. Other tests read it meanwhile: change a copy."""
    return made_once("demo", lambda folder: train(folder, "--logging_steps", "1", server=server))


@pytest.fixture(scope="session")
def topologies(server, made_once) -> dict[tuple[int, int], Result]:
    """Run the same twelve steps by (processes, accumulation steps), with another number of loader workers in each."""
    workers = {(1, 1): 0, (2, 1): 1, (4, 1): 3, (1, 4): 1}

    def make(processes: int, accumulation: int) -> Callable[[Path], Result]:
        flags = [*SHORT, "--norm", "group", "--num_workers", str(workers[processes, accumulation])]
        flags += ["--gradient_accumulation_steps", str(accumulation), "--max_grad_norm", "1"]
        return lambda folder: train(folder, *flags, num_processes=processes, server=server)

    return {case: made_once(f"topology-{case[0]}-{case[1]}", make(*case)) for case in workers}


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Real digits as PNG and JPEG files: train/ with 24 images a class, val/ with 6, of several sizes."""
    return digits_folder(tmp_path_factory.mktemp("images"))


def digits_folder(root: Path) -> Path:
    """Fill an existing folder; see image_folder."""
    digits = load_digits()
    for label in range(10):
        for number, index in enumerate(np.flatnonzero(digits.target == label)[:30]):
            folder = root / ("train" if number < 24 else "val") / f"digit-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((digits.images[index] * 15).astype(np.uint8)).resize((32 + number, 40))
            image.save(folder / f"{number:03d}.{'png' if number % 2 else 'jpg'}")
    return root

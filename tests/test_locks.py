# SPDX-License-Identifier: Apache-2.0
"""Two starts at once of whatever writes into one place: one of them writes, and the files are those of one start."""

import importlib
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

from shared.files import complete, make_once, partial_of, remove_partials
from shared.images import open_data

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        patch.syspath_prepend(str(ROOT / "recipes"))
        return importlib.import_module("pack"), importlib.import_module("resnet_webdataset")


def start(function, *arguments, log: Path) -> int:
    """The process that calls it, a fork of this one."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        function(*arguments)
        status = 0
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def words(pack, destination: Path, *more: str):
    with pytest.MonkeyPatch.context() as patch:
        flags = ["digits", str(destination), "--format", "tar", "--shard_size", "200", "--num_workers", "1", *more]
        patch.setattr("sys.argv", ["pack.py", *flags])
        return pack.parse()


def test_two_starts_of_packing_write_what_one_writes(modules, tmp_path):
    """The first is stopped as it writes: the second waits, in a line; a third, of another plan, is refused then."""
    pack, _ = modules
    destination, logs = tmp_path / "packed", [tmp_path / f"log-{number}" for number in range(3)]
    first = start(pack.main, words(pack, destination), log=logs[0])
    wait_for((destination / "train/.000001.npz").exists)
    os.killpg(first, signal.SIGSTOP)
    before = contents(destination)
    others = [
        start(pack.main, words(pack, destination, *more), log=log)
        for more, log in (((), logs[1]), (("--max_side", "16"), logs[2]))
    ]
    for log in logs[1:]:
        until = time.monotonic() + 60
        while "waiting for it to end" not in log.read_text() if log.exists() else True:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert contents(destination) == before
    os.killpg(first, signal.SIGCONT)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in (first, *others)]
    assert statuses == [0, 0, 1], [log.read_text() for log in logs]
    assert f"another start packs into {destination}; waiting for it to end, at most 60 s" in logs[1].read_text()
    assert "was begun with max_side 0, not 16. Give another folder." in logs[2].read_text()
    assert "image/s" not in "".join(log.read_text() for log in logs)  # no bar in a log file
    pack.main(words(pack, tmp_path / "alone"))
    assert contents(destination) == contents(tmp_path / "alone")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_packing_whose_first_process_alone_was_killed_leaves_the_lock(modules, tmp_path):
    pack, _ = modules
    pid = start(pack.main, words(pack, tmp_path / "packed"), log=tmp_path / "log")
    wait_for((tmp_path / "packed/train/.000001.npz").exists)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pack.main(words(pack, tmp_path / "packed"))
    assert len(open_data(str(tmp_path / "packed"), 0, 0)[0]) == 1437


def test_two_first_starts_make_the_digits_once(modules, tmp_path):
    """As resnet_webdataset.py makes them; and the index of these shards, whose names are not of tools/pack.py."""
    _, recipe = modules
    folder, made = tmp_path / "cache/digits", tmp_path / "made"

    def slowly(partial: Path) -> None:
        with open(made, "a") as file:
            file.write(f"{os.getpid()} {partial.name}\n")
        time.sleep(0.2)
        recipe.write_digits(partial)

    pids = [start(make_once, folder, slowly, log=tmp_path / f"log-{number}") for number in range(3)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    (line,) = made.read_text().splitlines()
    pid, name = line.split()
    assert name == f".digits.{socket.gethostname()}.{pid}.partial"
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == ["digits"]
    assert [len(part) for part in open_data(str(folder), 0, 0)] == [1437, 360]


def test_two_first_starts_read_a_folder_once(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    sources = sys.modules["shared.images.sources"]
    whole, read = sources.scan, tmp_path / "read"

    def slowly(folder: Path):
        with open(read, "a") as file:
            file.write(f"{folder.name}\n")
        time.sleep(0.2)
        return whole(folder)

    monkeypatch.setattr(sources, "scan", slowly)
    pids = [start(open_data, str(image_folder), 0, 0, log=tmp_path / f"log-{number}") for number in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert read.read_text().split() == [image_folder.name]


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / ".a.this.7.partial").mkdir()
    (tmp_path / ".b.other.7.partial").write_text("x")
    remove_partials(tmp_path, "a")
    assert os.listdir(tmp_path) == [".b.other.7.partial"]
    remove_partials(tmp_path)
    assert not os.listdir(tmp_path)


def test_what_fails_leaves_nothing(tmp_path):
    def fail() -> None:
        with complete(tmp_path / "file") as partial:
            partial.write_text("half")
            assert os.listdir(tmp_path) == [partial_of(tmp_path / "file").name]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not os.listdir(tmp_path)

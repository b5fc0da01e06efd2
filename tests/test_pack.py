# SPDX-License-Identifier: Apache-2.0
"""tools/pack.py: from each format to each other, through kills and full disks, with nothing lost."""

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from functools import partial
from pathlib import Path

import loading
import numpy as np
import pictures
import pytest
from conftest import ROOT, python
from loading import FORMATS, words
from pictures import PHOTOS, photograph, rendered
from PIL import Image

from shared.errors import UserError
from shared.images import Source, open_data, storage
from shared.images.index import NAME as INDEX
from shared.images.index import Index

surroundings, pack, packed = loading.surroundings, loading.pack, loading.packed
photographs = pictures.photographs


PACK = ROOT / "tools/pack.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_packing_that_was_killed_ends_complete(pack, tmp_path, kind):
    flags, begin = ("--format", kind, "--shard_size", "40"), time.monotonic()
    pack.main(words(pack, "digits", tmp_path / "whole", *flags))
    seconds, whole = time.monotonic() - begin, contents(tmp_path / "whole")
    command = partial(pack.main, words(pack, "digits", tmp_path / "killed", *flags))
    draws, killed = np.random.default_rng(0), 0
    for share in (0, 0.01, 0.05, *draws.uniform(0, 0.4, 4)):
        killed += kill(command, share * seconds)
        for name, data in contents(tmp_path / "killed").items():
            assert data == whole[name], name  # nothing has its name before it is complete
    assert killed >= 4
    (tmp_path / "killed/train").mkdir(parents=True, exist_ok=True)  # a busy machine may not have come so far
    (tmp_path / "killed/train" / f".{INDEX}.host.1.partial").write_bytes(b"")  # as a kill leaves it
    command()
    assert contents(tmp_path / "killed") == whole
    assert not list((tmp_path / "killed").rglob(".*"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.*")}
    command()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.*")} == before  # nothing to do


def kill(command, seconds: float) -> bool:
    """Run the command in a process, kill that after so many seconds, and return whether it still ran."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        command()
        os._exit(0)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_a_start_that_was_killed_before_anything_had_its_name(pack, tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/.pack.json.host.1.partial").write_text("{")
    pack.main(words(pack, "digits", tmp_path / "packed", "--format", "tar"))
    assert len(open_data(str(tmp_path / "packed"), 0, 0)[0]) == 1437
    assert not list((tmp_path / "packed").rglob(".*"))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file that has its final name."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("source", "kind"), [("csv", "tar"), ("tar", "parquet"), ("parquet", "folder")])
def test_packing_takes_each_format_to_another(pack, tmp_path, photographs, source, kind):
    train, held_out = open_data(str(photographs), 0, 0)
    if source == "csv":
        rows = [
            f"{part.images.name(number)},{part.classes[part.labels[number]]},{name}"
            for name, part in (("train", train), ("val", held_out))
            for number in range(len(part))
        ]
        (tmp_path / "csv.csv").write_text("\n".join(["path,label,split", *rows]))
    else:
        pack.main(words(pack, photographs, tmp_path / source, "--format", source, "--shard_size", "9"))
    name = tmp_path / (f"{source}.csv" if source == "csv" else source)
    pack.main(words(pack, name, tmp_path / "packed", "--format", kind, "--shard_size", "11"))
    for ours, theirs in zip(open_data(str(tmp_path / "packed"), 0, 0), (train, held_out), strict=True):
        assert ours.classes == theirs.classes
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert [ours.images[i] for i in range(len(ours))] == [theirs.images[i] for i in range(len(theirs))]


@pytest.mark.parametrize("kind", FORMATS)
def test_images_of_no_class_are_left_out_and_counted(pack, tmp_path, photographs, kind, capsys, monkeypatch):
    train, held_out = open_data(str(photographs), 0, 0)
    train.labels[[3, 30]] = -1
    monkeypatch.setattr(pack, "open_data", lambda *_: (train, held_out))
    pack.main(words(pack, "photographs", tmp_path / "packed", "--format", kind))
    assert "train: 2 images without a class" in capsys.readouterr().out
    packed, _ = open_data(str(tmp_path / "packed"), 0, 0)
    kept = [number for number in range(40) if number not in (3, 30)]
    assert packed.labels.tolist() == train.labels[kept].tolist()
    assert {packed.images[i] for i in range(38)} == {train.images[i] for i in kept}


class Unsendable(storage.Pixels):
    def __reduce__(self):
        raise AssertionError("a million images went to another process")


def test_a_source_is_not_sent_with_each_shard(pack, tmp_path):
    train, _ = open_data("digits", 0, 0)
    source = Source(Unsendable(train.images.pixels[:200]), train.labels[:200], train.classes)
    pack.pack(source, tmp_path / "train", words(pack, "", "", "--format", "tar", "--shard_size", "50"))
    assert len(list((tmp_path / "train").glob("*.tar"))) == 4


def test_the_photograph_of_a_telephone_is_a_jpeg(pack, tmp_path, photographs):
    second = Image.fromarray(PHOTOS[0][:50, :50])
    for name in ("train/a/00.jpg", "val/a/40.jpg"):
        (photographs / name).write_bytes(photograph(0, "MPO", save_all=True, append_images=[second]))
    pack.main(words(pack, photographs, tmp_path / "packed", "--format", "tar"))
    with tarfile.open(tmp_path / "packed/train/000000.tar") as tar:
        assert {name.split(".")[1] for name in tar.getnames()} == {"jpg", "cls"}
    packed, _ = open_data(str(tmp_path / "packed"), 0, 0)
    assert np.abs(rendered(packed.images[0]) - rendered(photograph(0))).max() <= 2


def test_checksums_are_those_of_the_shards(packed):
    for part in ("train", "val"):
        index = Index.load(packed["tar"] / part / INDEX)
        files = [packed["tar"] / part / shard for shard in index.shards]
        assert index.checksums == [hashlib.blake2b(file.read_bytes()).hexdigest() for file in files]
        lines = [line.split("  ") for line in (packed["parquet"] / part / "b2sums").read_text().splitlines()]
        assert {name for _, name in lines} == {file.name for file in (packed["parquet"] / part).glob("*.parquet")}
        for known, name in lines:
            assert known == hashlib.blake2b((packed["parquet"] / part / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_dry_run_says_what_packing_makes(pack, packed, tmp_path, kind, capsys):
    pack.main(words(pack, "digits", tmp_path / "new", "--format", kind, "--shard_size", "300", "--dry_run"))
    assert not list(tmp_path.iterdir())
    for part, line in zip(("train", "val"), capsys.readouterr().out.splitlines(), strict=True):
        size, shards, inodes = map(int, re.search(r"(\d+) bytes .* (\d+) shards of 300, (\d+) inodes", line).groups())
        found = [packed[kind] / part, *(packed[kind] / part).rglob("*")]
        assert abs(size / sum(path.stat().st_size for path in found if path.is_file()) - 1) < 0.02
        assert inodes == len(found)
        assert shards == {"train": 5, "val": 2}[part]


def test_a_full_disk_leaves_what_is_complete_and_nothing_else(pack, tmp_path, monkeypatch):
    """Whichever file is being written then: the index or another one."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = partial(pack.main, words(pack, "digits", tmp_path / "packed", "--format", "tar", "--shard_size", "300"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            command()
    assert {path.name for path in (tmp_path / "packed/train").iterdir()} == {
        *(f"{number:06d}.tar" for number in range(5)),
        *(f".{number:06d}.npz" for number in range(5)),
    }
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"), pack.complete_file(tmp_path / "file") as file:
            file.write(b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    before = contents(tmp_path / "packed")
    command()
    assert before.items() < contents(tmp_path / "packed").items()
    assert not list((tmp_path / "packed").rglob(".*"))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_damaged_archive_is_said_in_one_line(pack, tmp_path, photographs, kind):
    archive = Path(shutil.make_archive(str(tmp_path / "archive"), kind, photographs))
    whole = archive.read_bytes()
    command = partial(pack.main, words(pack, archive, tmp_path / "new", "--format", "tar"))
    for data in (b"", whole[: len(whole) // 2], whole[: -(len(whole) % 10240 or 10240)], b"nothing" * 1000):
        archive.write_bytes(data)
        with pytest.raises(UserError, match=r"archive.\w+ cannot be read: .*Copy it again"):
            command()
    assert not (tmp_path / "new").exists()
    if kind == "zip":
        place = whole.index(b".jpg") + 500
        archive.write_bytes(whole[:place] + bytes(100) + whole[place + 100 :])
        with pytest.raises(UserError, match=r"cannot read .*the archive is damaged: "):
            command()
    else:
        archive.write_bytes(whole)
        images, _ = pack.open_source(str(archive), 0)
        os.truncate(archive, len(whole) // 3)  # after it was listed
        with pytest.raises(OSError, match="too early"):
            [images.images[number] for number in range(40)]


def test_what_macos_puts_into_an_archive_is_no_image(pack, tmp_path, photographs):
    for name in ("__MACOSX/train/a/._00.jpg", "train/a/._00.jpg"):
        (photographs / name).parent.mkdir(parents=True, exist_ok=True)
        (photographs / name).write_bytes(b"no image")
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", photographs)
    train, held_out = pack.open_source(archive, 0)
    assert (len(train), len(held_out)) == (40, 10)
    assert train.classes == ["a", "b"]


def test_packing_names_what_it_cannot_read(server, tmp_path, photographs):
    (photographs / "train/a/00.jpg").write_bytes(b"no picture")
    process = python(PACK, photographs, tmp_path / "new", "--format", "tar", server=server)
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith(f"error: cannot read {photographs}/train/a/00.jpg: ")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["digits", "full", "--format", "tar"], "is not empty"),
        (["digits", "begun", "--format", "folder"], "begun with format tar"),
        (["nowhere", "new", "--format", "tar"], "does not exist"),
        (["photographs", "new", "--format", "tar", "--val_fraction", "0.1"], "has no effect"),
        (["digits", "new", "--format", "tar", "--shard_size", "0"], "--shard_size 0 is out of range"),
        (["digits", "new", "--format", "tar", "--quality", "0"], "--quality 0 is out of range"),
        (["digits", "new", "--format", "tar", "--quality", "101"], "--quality 101 is out of range"),
        (["digits", "new", "--format", "tar", "--max_side", "-1"], "--max_side -1 is out of range"),
    ],
)
def test_packing_refuses_in_one_line(pack, tmp_path, photographs, arguments, remedy, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/pack.json").write_text('{"source": "digits", "format": "tar"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=remedy) as caught:
        pack.main(words(pack, *arguments))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_full_disk_is_said_and_loses_nothing(server, tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        assert "CI" not in os.environ, mounted.stderr  # there it must run
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        command = [PACK, "digits", folder / "packed", "--format", "tar", "--shard_size", "100", "--num_workers", "1"]
        process = python(*command, server=server)
        assert process.returncode == 1
        assert process.stderr.splitlines()[-1].startswith("error: ")
        assert "No space left on device" in process.stderr.splitlines()[-1]
        assert "Make room" in process.stderr.splitlines()[-1]
        done = contents(folder / "packed")
        assert len(done) > 2
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        assert python(*command, server=server).returncode == 0
        after = contents(folder / "packed")
        assert {name: after[name] for name in done} == done
        assert len(open_data(str(folder / "packed"), 0, 0)[0]) == 1437
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_is_packed_where_it_lies_and_jpegs_stay_as_they_are(pack, tmp_path, photographs, kind):
    archive = shutil.make_archive(str(tmp_path / "archive"), kind, photographs)
    pack.main(words(pack, archive, tmp_path / "packed", "--format", "tar"))
    ours, theirs = (open_data(str(path), 0, 0) for path in (tmp_path / "packed", photographs))
    for mine, original in zip(ours, theirs, strict=True):
        assert len(mine) == len(original)
        assert mine.classes == original.classes
        assert {mine.images[i] for i in range(len(mine))} == {original.images[i] for i in range(len(original))}
    pack.main(words(pack, archive, tmp_path / "small", "--format", "tar", "--max_side", "60", "--quality", "80"))
    small, _ = open_data(str(tmp_path / "small"), 0, 0)
    with Image.open(io.BytesIO(small.images[0])) as image:
        assert max(image.size) == 60

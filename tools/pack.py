# SPDX-License-Identifier: Apache-2.0
"""Pack a data set into few large files, or into another format; the samples and their order stay the same.

    python tools/pack.py digits packed --format tar                          # train/ and val/ of shards and an index
    python tools/pack.py $DSDIR/imagenet $SCRATCH/imagenet --format tar --dry_run
    python tools/pack.py photographs.zip packed --format parquet --val_fraction 0.1 --max_side 512 --quality 90

SOURCE is whatever a recipe's --data takes, or a .zip or .tar of class folders (or a folder in it: x.zip/photographs),
which is read where it lies, by the rules for a folder: unpacking would cost an inode an image. Encoded images are
copied byte by byte unless --max_side asks for smaller ones. In tar shards the images lie in random order, as a stream
wants them; the index keeps the source's order. If it is killed, the same command resumes after the complete shards.
Checksums are in the index, or beside parquet in b2sums.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from shared.config import expand_home
from shared.draws import random_bits
from shared.errors import UserError
from shared.files import complete, remove_partials, take_lock
from shared.images import Source, open_data
from shared.images.decode import opened, upright
from shared.images.index import NAME as INDEX
from shared.images.index import Index
from shared.images.shards import members_of_tar
from shared.images.sources import index_of_images, train_and_held_out
from shared.images.tree import Tree, is_hidden, read_layout, with_slashes
from shared.lifetime import begin, die_with_parent
from shared.run.folder import LOCK_SECONDS

PLAN = "pack.json"
PROBE = 1000  # images that a dry run packs
ARCHIVES = (".zip", ".tar")
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # RuntimeError: it is encrypted
SUMS = "b2sums"  # beside parquet files: `b2sum -c b2sums` checks them
DONE = {"tar": INDEX, "folder": INDEX, "parquet": SUMS}  # the file that a part's folder gets last
BOUNDS = {"shard_size": (1, math.inf), "quality": (1, 100), "max_side": (0, math.inf)}
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
_job: list = []
FULL = (errno.ENOSPC, errno.EDQUOT)


def main(arguments: argparse.Namespace) -> None:
    for name, (low, high) in BOUNDS.items():
        if not low <= getattr(arguments, name) <= high:
            raise UserError(f"--{name} {getattr(arguments, name)} is out of range. Give {low} to {high}.")
    columns = arguments.image_column, arguments.label_column
    sources = open_source(arguments.source, arguments.val_fraction, *columns)
    parts = {name: with_classes(source, name) for name, source in zip(("train", "val"), sources, strict=True)}
    if arguments.dry_run:
        for name, source in parts.items():
            print(f"{name}: {estimate(source, arguments)}")
        return
    with claim(arguments.destination):
        follow_plan(arguments, parts)
        for name, source in parts.items():
            pack(source, arguments.destination / name, arguments)
    print(f"packed; to train on it: python recipes/resnet.py --data {arguments.destination}")


def with_classes(source: Source, name: str) -> Source:
    """Return the source without images that have no class, which a training would count as undecodable."""
    known = np.flatnonzero(source.labels >= 0)
    if len(known) == len(source):
        return source
    print(f"{name}: {len(source) - len(known)} images without a class, or with one that is not listed, are left out")
    return source.subset(known)


def open_source(name: str, val_fraction: float, *columns: str) -> tuple[Source, Source]:
    for path in (Path(name), *Path(name).parents):
        if path.suffix.lower() in ARCHIVES and path.is_file():
            return from_archive(path, Path(name).relative_to(path), val_fraction)
    return open_data(name, val_fraction, 0, 0, *columns)


def tree_of_names(names: Iterable[str]) -> Tree:
    """Return the folders and files of an archive; a name that ends in a slash is a folder's."""
    tree = {"": []}
    for name in names:
        *folders, file = name.split("/")
        if any(is_hidden(part) for part in (*folders, file)):
            continue
        for depth in range(len(folders)):
            tree.setdefault("/".join(folders[: depth + 1]), [])
        tree["/".join(folders)] += [file] if file else []
    return {folder: sorted(files) for folder, files in sorted(tree.items())}


def from_archive(path: Path, inner: Path, val_fraction: float) -> tuple[Source, Source]:
    """Open images in class folders within one .tar or .zip, or in the folder `inner` there, by the rules for
    folders."""
    try:
        found = tar_members(path) if path.suffix.lower() == ".tar" else zip_members(path)
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read: {error}. Copy it again.") from error
    prefix = "" if inner == Path() else f"{inner}/"
    names = with_slashes([name for name, _ in found])
    places = dict(zip(names, (place for _, place in found), strict=True))
    tree = tree_of_names(name.removeprefix(prefix) for name in names if name.startswith(prefix))
    layout = read_layout(tree, str(path / inner))
    if layout.kind != "images":
        raise UserError(f"{path / inner} holds {layout.kind}, which are only read from a folder. Unpack it.")
    for line in layout.notes:
        print(line, file=sys.stderr)
    index, parts = index_of_images(layout.parts, path / inner), {}
    for name in layout.parts:
        part = index.part(name)
        found = [places[prefix + os.fsdecode(each)] for each in part.names.tolist()]
        parts[name] = Source(Archive(path, part.names, found), part.labels, part.classes)
    return train_and_held_out(parts, val_fraction, 0, path / inner)


def tar_members(path: Path) -> list[tuple[str, tuple[int, int]]]:
    """Return name, offset and length of each file."""
    members, is_whole = members_of_tar(path)
    if not is_whole:
        raise tarfile.ReadError("it is truncated or damaged, or not a tar")
    return [(member.name, (member.offset_data, member.size)) for member in members]


def zip_members(path: Path) -> list[tuple[str, str]]:
    with zipfile.ZipFile(path) as archive:
        return [(name, name) for name in archive.namelist()]


class Archive:
    """Images of one .tar or .zip, read where they lie; each process opens it again."""

    def __init__(self, path: Path, names: np.ndarray, places: list):
        self.path, self.names, self.places, self.file = path, names, places, None

    def __getitem__(self, number: int) -> bytes:
        place = self.places[number]
        if self.file is None:
            self.file = zipfile.ZipFile(self.path) if isinstance(place, str) else self.path.open("rb")
        if isinstance(place, str):
            try:
                return self.file.read(place)
            except DAMAGED as error:
                raise OSError(f"the archive is damaged: {error}") from error
        data = os.pread(self.file.fileno(), place[1], place[0])
        if len(data) < place[1]:
            raise OSError(f"the archive ends {place[1] - len(data)} bytes too early")
        return data

    def __getstate__(self) -> dict:
        return vars(self) | {"file": None}

    def name(self, number: int) -> str:
        return f"{self.path}: {os.fsdecode(self.names[number])}"

    def take(self, numbers: np.ndarray) -> "Archive":
        return Archive(self.path, self.names[numbers], [self.places[i] for i in numbers])


def estimate(source: Source, arguments: argparse.Namespace) -> str:
    """Estimate what packing would make, from some images that are packed on the destination's disk and removed
    again."""
    probe = source.subset(np.sort(np.argsort(random_bits(len(source), 1))[:PROBE]))
    images, reading = timed(lambda: [encoded(probe, arguments, number) for number in range(len(probe))])
    size, writing = try_out(probe, images, arguments)
    share, shards = len(source) / len(probe), count_shards(source, arguments)
    inodes = len(source) + len(source.classes) if arguments.format == "folder" else shards
    processes = min(max(1, arguments.num_workers), shards)
    megabytes = sum(len(data) for data, _ in images) / 1e6
    return (
        f"{len(source)} images, {size * share:.0f} bytes ({size * share / 1e9:.3f} GB), "
        f"{shards} shards of {arguments.shard_size}, {inodes + 2} inodes (and {shards} more while it packs), "
        f"{(reading + writing) * share / processes / 3600:.2f} hours on {processes} processes "
        f"({len(probe)} images: one reads {megabytes / reading:.0f} MB/s and writes {megabytes / writing:.0f})"
    )


def try_out(source: Source, images: list[tuple[bytes, str]], arguments: argparse.Namespace) -> tuple[int, float]:
    """Return the bytes of some packed images, and the seconds that one process takes to write them."""
    destination = arguments.destination.absolute()
    there = next(path for path in (destination, *destination.parents) if path.is_dir())
    with TemporaryDirectory(dir=there, prefix=".pack-probe-") as folder:
        pack_here(source.subset(np.arange(1)), Path(folder, "one"), images, arguments)  # imports what packing needs
        _, seconds = timed(lambda: pack_here(source, Path(folder, "all"), images, arguments))
        files = [path for path in Path(folder, "all").rglob("*") if path.is_file() and not path.name.startswith(".")]
        return sum(path.stat().st_size for path in files), seconds


def timed(function):
    begin = time.perf_counter()
    return function(), time.perf_counter() - begin


def pack_here(source: Source, folder: Path, images: list[tuple[bytes, str]], arguments: argparse.Namespace) -> None:
    """Pack images that were read already, in this process."""
    folder.mkdir()
    for number in range(count_shards(source, arguments)):
        write_shard(source, folder, arguments, images.__getitem__, number)
    finish(source, folder, arguments)


def claim(destination: Path) -> FileLock:
    """Lock a destination, for one start at a time; raises UserError where it holds something else."""
    if destination.exists() and not (destination / PLAN).exists():
        others = [path for path in destination.iterdir() if path.name != "lock" and not path.match(f".{PLAN}.*")]
        if others:
            raise UserError(f"{destination} is not empty, and not from this tool. Give another folder.")
    destination.mkdir(parents=True, exist_ok=True)
    use = f"another start packs into {destination}"
    try:
        return take_lock(destination / "lock", use, LOCK_SECONDS)
    except Timeout:
        raise UserError(f"{use}. Wait for its end, or give another folder.") from None


def follow_plan(arguments: argparse.Namespace, parts: dict[str, Source]) -> None:
    """Record the settings in a new destination; raises UserError where they differ from those of an earlier start."""
    names = ("source", "format", "shard_size", "max_side", "quality", "val_fraction", "image_column", "label_column")
    plan = {name: getattr(arguments, name) for name in names} | {name: len(part) for name, part in parts.items()}
    plan |= {"fingerprint": " ".join(part.fingerprint() for part in parts.values())}
    path = arguments.destination / PLAN
    if path.exists():
        former = json.loads(path.read_text())
        different = [name for name in plan if former.get(name, plan[name]) != plan[name]]
        if different:
            name = different[0]
            raise UserError(f"{path} was begun with {name} {former[name]}, not {plan[name]}. Give another folder.")
    else:
        remove_partials(arguments.destination)
        with complete_file(path) as file:
            file.write(json.dumps(plan, indent=1).encode())


# Shards


def pack(source: Source, folder: Path, arguments: argparse.Namespace) -> None:
    """Write every shard that is missing, then the index."""
    folder.mkdir(exist_ok=True)
    if not (folder / DONE[arguments.format]).exists():
        write_shards(source, folder, arguments)
        finish(source, folder, arguments)
    remove_partials(folder)
    for path in folder.glob(".*.npz"):
        path.unlink()


def write_shards(source: Source, folder: Path, arguments: argparse.Namespace) -> None:
    count = count_shards(source, arguments)
    todo = [number for number in range(count) if not rows_of(folder, number).exists()]
    done = len(source) - sum(len(members_of(source, number, arguments)) for number in todo)
    bar = tqdm(total=len(source), initial=done, unit="image", desc=folder.name, disable=None)
    job = os.getpid(), source, folder, arguments, partial(encoded, source, arguments)
    with ProcessPoolExecutor(max(1, arguments.num_workers), CONTEXT, take_job, job) as pool, bar:
        for images in pool.map(one_shard, todo):
            bar.update(images)


def take_job(parent: int, *job) -> None:
    """Give a process of the pool what its shards have in common. A fork finds it in memory; sent with each shard it
    could be gigabytes, such as a whole parquet table. The process ends with its parent, whose lock a fork has too."""
    die_with_parent(signal.SIGKILL, parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent answers it
    _job[:] = job


def one_shard(number: int) -> int:
    return write_shard(*_job, number)


def count_shards(source: Source, arguments: argparse.Namespace) -> int:
    return -(-len(source) // arguments.shard_size)


def members_of(source: Source, number: int, arguments: argparse.Namespace) -> np.ndarray:
    """Return the samples of one shard. In a tar they are a slice of a random order, the same in every start."""
    everything = np.arange(len(source))
    if arguments.format == "tar":
        everything = np.argsort(random_bits(len(source), 0), kind="stable")
    return everything[number * arguments.shard_size : (number + 1) * arguments.shard_size]


def write_shard(source: Source, folder: Path, arguments: argparse.Namespace, read, number: int) -> int:
    """Write one shard, complete or absent; then its rows of the index, which mark it as done."""
    samples = members_of(source, number, arguments)
    rows = WRITERS[arguments.format](source, samples, folder, number, read)
    with complete_file(rows_of(folder, number)) as file:
        np.savez(file, samples=samples, **rows)
    return len(samples)


def encoded(source: Source, arguments: argparse.Namespace, number: int) -> tuple[bytes, str]:
    """Return the bytes of one image, and the ending of its name."""
    try:
        image = source.images[number]
        if isinstance(image, np.ndarray):  # pixels: PNG loses nothing
            return saved(Image.fromarray(image), "PNG"), "png"
        with opened(image) as file:
            kind = file.format
            if arguments.max_side and max(file.size) > arguments.max_side:
                file = upright(file)
                file.thumbnail((arguments.max_side, arguments.max_side), Image.Resampling.BICUBIC)
                return saved(file, "JPEG", quality=arguments.quality), "jpg"
        # MPO: a phone's JPEG with a second picture behind it.
        return image, {"JPEG": "jpg", "MPO": "jpg"}.get(kind, kind.lower())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {source.images.name(number)}: {error}. Fix or remove it.") from error


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(source: Source, samples: np.ndarray, folder: Path, shard: int, read) -> dict:
    path = folder / f"{shard:06d}.tar"
    names, offset, length = [], [], []
    with complete_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples.tolist():
            data, kind = read(sample)
            key = f"{sample:09d}"
            tar.addfile(member(f"{key}.{kind}", data), io.BytesIO(data))
            names.append(key.encode())
            offset.append(file.tell() - padded(len(data)))
            length.append(len(data))
            label = str(source.labels[sample]).encode()
            tar.addfile(member(f"{key}.cls", label), io.BytesIO(label))
    return {"names": names, "offset": offset, "length": length, "checksum": checksum(path)}


def write_parquet(source: Source, samples: np.ndarray, folder: Path, shard: int, read) -> dict:
    """Write a shard with Hugging Face's Image and ClassLabel features: `datasets.load_dataset` shows its pictures."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=source.classes)})
    images = [
        dict(zip(("bytes", "path"), (data, f"{sample:09d}.{kind}"), strict=True))
        for sample in samples.tolist()
        for data, kind in [read(sample)]
    ]
    rows = pa.table({"image": images, "label": source.labels[samples]}, schema=features.arrow_schema)
    path = folder / f"{shard:06d}.parquet"
    with complete_file(path) as file:
        pq.write_table(rows, file, row_group_size=100)
    return {"checksum": checksum(path)}


def write_folder(source: Source, samples: np.ndarray, folder: Path, shard: int, read) -> dict:
    names = []
    odd = next((name for name in source.classes if name in ("", ".", "..") or "/" in name), None)
    if odd is not None:
        raise UserError(f"the class {odd!r} cannot be the name of a folder. Pack as tar or parquet.")
    for sample in samples.tolist():
        data, kind = read(sample)
        name = f"{source.classes[source.labels[sample]]}/{sample:09d}.{kind}"
        (folder / name).parent.mkdir(exist_ok=True)
        with complete_file(folder / name) as file:
            file.write(data)
        names.append(os.fsencode(name))
    return {"names": names}


def rows_of(folder: Path, shard: int) -> Path:
    """Return the file with a complete shard's rows of the index, which stays until all shards are done."""
    return folder / f".{shard:06d}.npz"


def finish(source: Source, folder: Path, arguments: argparse.Namespace) -> None:
    """Write one index in the source's order, from each shard's rows; beside parquet, which needs none, checksums."""
    kind, count = arguments.format, count_shards(source, arguments)
    parts = [dict(np.load(rows_of(folder, shard))) for shard in range(count)]
    if kind == "parquet":
        with complete_file(folder / SUMS) as file:
            file.write(
                "".join(f"{part['checksum']}  {shard:06d}.parquet\n" for shard, part in enumerate(parts)).encode()
            )
        return
    order = np.argsort(np.concatenate([part["samples"] for part in parts]))
    column = lambda name: np.concatenate([part[name] for part in parts])[order]  # noqa: E731
    places = {}
    if kind == "tar":
        shard = np.repeat(np.arange(count), [len(part["samples"]) for part in parts])[order]
        places = {"shard": shard, "offset": column("offset"), "length": column("length")}
        places |= {"shards": [f"{number:06d}.tar" for number in range(count)]}
        places |= {"checksums": [str(part["checksum"]) for part in parts]}
    with complete(folder / INDEX) as partial:
        Index(column("names"), source.labels, source.classes, **places).save(partial)


WRITERS = {"tar": write_tar, "parquet": write_parquet, "folder": write_folder}


def member(name: str, data: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info


def padded(length: int) -> int:
    return -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that gets its name only when all of it is on the disk; where it fails, nothing stays."""
    with complete(path) as partial, open(partial, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", help="the word digits, a folder, a CSV, shards, or a .zip or .tar of class folders")
    add("destination", type=Path, help="folder to make, or that of an earlier start to resume")
    add("--format", choices=WRITERS, required=True, help="tar: webdataset's shards with an index")
    add("--shard_size", type=int, default=2000, help="images of one shard (%(default)s; ImageNet: 220 MB)")
    add(
        "--max_side",
        type=int,
        default=0,
        help="shrink images whose longer side is greater (0: none)",
    )
    add("--quality", type=int, default=90, help="quality of JPEGs that were shrunk (%(default)s)")
    add("--val_fraction", type=float, default=0.0, help="share held out, per class, where SOURCE has no split")
    add("--image_column", default="", help="column of a table or CSV, where several hold images")
    add("--label_column", default="", help="column of a table or CSV, where several hold classes")
    add("--num_workers", type=int, default=os.cpu_count(), help="processes (%(default)s)")
    add("--dry_run", action="store_true", help="pack some images, remove them again, say what packing would make")
    return parser.parse_args(expand_home(sys.argv[1:]))


if __name__ == "__main__":
    begin()
    try:
        main(parse())
    except UserError as error:
        sys.exit(f"error: {error}")
    except BrokenProcessPool:
        sys.exit("error: a process was killed, perhaps for lack of memory. Give fewer --num_workers: it resumes.")
    except OSError as error:
        remedy = "Make room; the same command resumes after the complete shards." if error.errno in FULL else ""
        sys.exit(f"error: {error}. {remedy}")

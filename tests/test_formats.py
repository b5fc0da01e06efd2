# SPDX-License-Identifier: Apache-2.0
"""Each way to store images gives the same samples, in the same order, with the same augmentation; undecodable
ones are named and replaced alike everywhere."""

import contextlib
import errno
import hashlib
import importlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, launch_command, python
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, get_worker_info

from shared.errors import UserError
from shared.images import Loader, Source, Views, open_data, storage
from shared.images.decode import Crop, render
from shared.images.index import NAME as INDEX
from shared.images.index import Index
from shared.images.loader import WorkerLoader, worker_options
from shared.images.views import evaluation_view, training_view
from shared.metrics import Evaluation
from shared.order import EvaluationOrder, TrainingOrder

FORMATS = ("tar", "parquet", "folder")
PACK = ROOT / "tools/pack.py"


@pytest.fixture(scope="session")
def pack():
    """tools/pack.py: `pack.main(words(...))` is its command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        return importlib.import_module("pack")


def words(pack, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pack.py", *map(str, arguments), "--num_workers", "2"])
        return pack.parse()


@pytest.fixture(scope="session")
def packed(pack, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    for kind in FORMATS:
        pack.main(words(pack, "digits", root / kind, "--format", kind, "--shard_size", "300"))
    return {"digits": "digits"} | {kind: root / kind for kind in FORMATS}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCRATCH", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def loaders(data, rank=0, size=1, num_workers=0, batch=64, shuffle_block=0, seed=0) -> tuple[Loader, Loader]:
    train, held_out = open_data(str(data), 0, seed, shuffle_block)
    order = TrainingOrder(len(train), batch, batch // size, rank, size, seed, train.blocks)
    view = partial(training_view, min_crop_area=0.5, horizontal_flip=True)
    training = Views(train, view, order, 32, seed)
    order = EvaluationOrder(len(held_out), 64, rank, size)
    evaluation = Views(held_out, partial(evaluation_view, eval_crop_ratio=1.0), order, 32, seed)
    return tuple(Loader(views, torch.device("cpu"), num_workers) for views in (training, evaluation))


@pytest.fixture(scope="module")
def reference() -> list:
    return [batch for loader in loaders("digits") for batch in loader]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_batches_of_the_digits(packed, reference, kind):
    batches = [batch for loader in loaders(packed[kind], num_workers=1) for batch in loader]
    assert len(batches) == len(reference) == 22 + 6
    for ours, theirs in zip(batches, reference, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.digest == theirs.digest


@pytest.mark.parametrize("kind", ["digits", *FORMATS])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_takes_every_sample_once(packed, kind, size, num_workers, monkeypatch):
    """Seeds are a function of epoch and sample: as many different ones as samples."""
    parts = [loaders(packed[kind], rank, size, num_workers, batch=2) for rank in range(size)]
    seeds = torch.cat([batch.seeds for training, _ in parts for batch in training])
    assert len(seeds) == len(seeds.unique()) == 1437 // 2 * 2
    batches = [batch for _, evaluation in parts for batch in evaluation]
    indices, labels = (torch.cat([batch[field][batch.valid] for batch in batches]) for field in (8, 1))
    assert sorted(indices.tolist()) == list(range(360))
    assert labels.tolist() == open_data("digits", 0, 0)[1].labels[indices].tolist()


def test_raw_images_of_jean_zay_are_found(photographs):
    expected, _ = open_data(str(photographs), 0, 0)
    (photographs.parent / "imagenet").mkdir()
    photographs.rename(photographs.parent / "imagenet/RawImages")
    for path in (photographs.parent / "imagenet", photographs.parent / "imagenet/RawImages"):
        train, held_out = open_data(str(path), 0, 0)
        assert (len(train), len(held_out), train.classes) == (40, 10, ["a", "b"])
        assert train.images.names.tolist() == expected.images.names.tolist()


def test_a_blocked_shuffle_reads_few_shards_at_a_time_and_every_sample_once(packed):
    order = loaders(packed["tar"], shuffle_block=2)[0].order
    shard, epochs = order.blocks.shard, [order.permutation(epoch) for epoch in (0, 1)]
    for permutation in epochs:
        assert sorted(permutation) == list(range(1437))
        seen = shard[permutation]
        places = [np.flatnonzero(seen == number) for number in range(5)]
        is_open = sum((np.arange(1437) >= place[0]) & (np.arange(1437) <= place[-1]) for place in places)
        assert is_open.max() == 2
        assert (np.diff(seen) != 0).mean() > 0.3  # and those two are mixed
    assert not np.array_equal(*epochs)
    with pytest.raises(UserError, match="tar shards"):
        loaders("digits", shuffle_block=2)


def test_shards_and_parquet_of_other_programs_are_read(tmp_path):
    import datasets
    import webdataset

    train = open_data("digits", 0, 0)[0]
    for part in ("train", "val"):
        (tmp_path / "wds" / part).mkdir(parents=True)
        with webdataset.ShardWriter(str(tmp_path / "wds" / part / "x-%03d.tar"), maxcount=30, verbose=0) as sink:
            for number in range(100):
                sink.write({"__key__": f"{number:05d}", "png": train.images[number], "cls": int(train.labels[number])})
    features = datasets.Features({"picture": datasets.Image(), "digit": datasets.ClassLabel(names=train.classes)})
    rows = {"picture": [Image.fromarray(train.images[i]) for i in range(100)], "digit": train.labels[:100].tolist()}
    for part in ("train", "val"):
        (tmp_path / "hf" / part).mkdir(parents=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "hf" / part / "0.parquet"))
    for name in ("wds", "hf"):
        theirs, _ = open_data(str(tmp_path / name), 0, 0)
        assert theirs.labels.tolist() == train.labels[:100].tolist()
        for number in (0, 57, 99):
            with Image.open(io.BytesIO(theirs.images[number])) as image:
                assert np.array_equal(np.asarray(image.convert("RGB")), train.images[number])
    write = partial(webdataset.ShardWriter, maxcount=30, verbose=0)
    with write(str(tmp_path / "wds/train/y-%03d.tar")) as sink:
        sink.write({"__key__": "a", "png": train.images[0], "txt": "no class"})
    with_one_more, _ = open_data(str(tmp_path / "wds"), 0, 0)
    assert with_one_more.labels.tolist() == [*theirs.labels.tolist(), -1]
    undecodable = [name for batch in loaders(tmp_path / "wds", batch=101)[0] for name in batch.rejected]
    assert len(undecodable) == 1
    assert "names no class" in undecodable[0]
    for kind in ("pyd", "input.pyd"):  # the second: Jean Zay's shards of ImageNet
        with write(str(tmp_path / "wds/train/z-%03d.tar")) as sink:
            sink.write({"__key__": "a", kind: [1, 2]})
        with pytest.raises(UserError, match=f"a.{kind}, a pickle.*Pack the images again"):
            open_data(str(tmp_path / "wds"), 0, 0)


@pytest.mark.parametrize(("label", "words"), [(9876543210, "z-000.tar: a has the class 9876543210"), (5000, "5000")])
def test_a_stray_label_of_foreign_shards_is_refused(tmp_path, label, words):
    """Where the classes come from the labels themselves, the network would have an output for each number."""
    for part in ("train", "val"):
        foreign_shard(tmp_path / part / "a-000.tar", {f"{number:02d}": number % 10 for number in range(50)})
    assert len(open_data(str(tmp_path), 0, 0)[0].classes) == 10
    foreign_shard(tmp_path / "train/z-000.tar", {"a": label})
    with pytest.raises(UserError, match=words):
        open_data(str(tmp_path), 0, 0)
    with pytest.raises(UserError, match=words):
        open_data(str(tmp_path / "train"), 0.1, 0)


def foreign_shard(path: Path, labels: dict[str, int], image: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, label in labels.items():
            for name, data in ((f"{key}.jpg", image), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_labels_of_parquet_that_name_no_class_are_rejected(tmp_path, monkeypatch):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": photograph(number), "path": None} for number in range(6)]
    table = pa.table({"image": images, "label": [0, 1, 2, None, -1, 1]}, schema=features.arrow_schema)
    for part in ("train", "val"):
        (tmp_path / "data" / part).mkdir(parents=True)
        pq.write_table(table, tmp_path / "data" / part / "0.parquet")
    monkeypatch.syspath_prepend(ROOT / "recipes")
    recipe = importlib.import_module("resnet_hf_datasets")
    for name, opened in (("open_data", open_data), ("recipe", recipe.open_data)):
        train, _ = opened(str(tmp_path / "data"), 0, 0, 0)
        assert train.labels.tolist() == [0, 1, -1, -1, -1, 1], name
    undecodable = [name for batch in loaders(tmp_path / "data", batch=6)[0] for name in batch.rejected]
    assert sorted(name.split(": ", 1)[1] for name in undecodable) == [
        f"row {row}: it has no label, or one that names no class" for row in (2, 3, 4)
    ]


def test_a_changed_shard_is_listed_anew(tmp_path):
    """Though its time of change is not the newest."""
    for name in ("a", "b"):
        foreign_shard(tmp_path / f"data/{name}.tar", {f"{name}{key}": key for key in range(4)})
    os.utime(tmp_path / "data/b.tar", (2e9, 2e9))
    first, _ = open_data(str(tmp_path / "data"), 0.3, 0)
    kept = list(Path(os.environ["SCRATCH"]).rglob("*.safetensors"))
    assert len(open_data(str(tmp_path / "data"), 0.3, 0)[0]) == len(first)
    assert list(Path(os.environ["SCRATCH"]).rglob("*.safetensors")) == kept
    foreign_shard(tmp_path / "data/a.tar", {f"a{key}": key for key in range(8)})
    assert len(open_data(str(tmp_path / "data"), 0.3, 0)[0]) > len(first)


CACHED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
rank = os.environ["RANK"]
os.environ["SCRATCH"] = f"{sys.argv[2]}/cache-{rank}"  # of each process its own, as of each node
from accelerate import PartialState
from shared.errors import UserError
from shared.images import index, open_data
PartialState(cpu=True)
index.PATIENCE = 0
for data in ("bad", "good"):
    try:
        train, _ = open_data(f"{sys.argv[2]}/{data}", 0.0, 0)
        print(f"{rank} has {len(train)}", flush=True)
    except UserError as error:
        print(f"{rank} cannot: {error}", flush=True)
PartialState().destroy_process_group()
"""


def test_no_process_waits_for_an_index_that_never_comes(server, tmp_path):
    """Rank 0 fails; then it succeeds, into a cache that the other one does not see."""
    for part in ("train", "val"):
        foreign_shard(tmp_path / "good" / part / "a.tar", {f"{key}": key % 2 for key in range(7)})
        foreign_shard(tmp_path / "bad" / part / "a.tar", {f"{key}": 9876543210 for key in range(7)})
    (tmp_path / "script.py").write_text(CACHED)
    process = python(*launch_command(2, "local_cpu.yaml"), tmp_path / "script.py", ROOT, tmp_path, server=server)
    assert process.returncode == 0, process.stderr
    lines = sorted(process.stdout.splitlines())
    assert [line.split(": ")[0] for line in lines] == ["0 cannot", "0 has 7", "1 cannot", "1 has 7"], process.stdout
    assert lines[0][1:] == lines[2][1:]
    assert "9876543210" in lines[0]
    assert [len(list((tmp_path / f"cache-{rank}").rglob("*.safetensors"))) for rank in (0, 1)] == [1, 1]


def test_threads_read_of_more_shards_than_may_be_open(tmp_path, monkeypatch):
    """And of each what it holds, while other threads drop it."""
    monkeypatch.setattr(storage, "open_shards", lambda: 3)
    for shard in range(60):
        (tmp_path / f"{shard}.tar").write_bytes(shard.to_bytes(1) * 5000)
    numbers = np.arange(60)
    names, shards = numbers.astype("S"), [f"{shard}.tar" for shard in numbers]
    index = Index(names, numbers, [*map(str, numbers)], shards, numbers, 0 * numbers, 0 * numbers + 5000)
    images, draws = storage.Members(str(tmp_path), index), np.random.default_rng(0).integers(0, 60, 6000).tolist()
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(images.__getitem__, draws))
    assert all(data == number.to_bytes(1) * 5000 for data, number in zip(read, draws, strict=True))
    assert len(images.files) <= 3 + 8


# Torn data


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Photographs of two classes as JPEG, all of them sound: train/ with 40 files, val/ with 10."""
    for number in range(50):
        folder = tmp_path / "photographs" / ("train" if number < 40 else "val") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.jpg").write_bytes(photograph(number))
    return tmp_path / "photographs"


def photograph(number: int, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    pixels = load_sample_images().images[number % 2][number : number + 120, :150]
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def tear(folder: Path) -> set[str]:
    """Five ways; the names of what was damaged."""
    files = sorted(folder.glob("*/*.jpg"))
    files[0].write_bytes(files[0].read_bytes()[:-300])
    files[5].write_bytes(b"\xff\xd8 this is no JPEG")
    files[6].unlink()
    files[6].symlink_to("nowhere.jpg")
    files[7].write_bytes(b"")
    bomb = Image.new("L", (12000, 12000))
    bomb.save(files[8])
    return {str(files[number]) for number in (0, 5, 6, 7, 8)}


def test_undecodable_images_are_named_and_replaced_alike_on_any_topology(photographs, capfd):
    whole = [batch for loader in loaders(photographs, batch=8) for batch in loader]
    assert not any(batch.rejected for batch in whole)
    undecodable = tear(photographs / "train") | tear(photographs / "val")
    one = [batch for loader in loaders(photographs, batch=8) for batch in loader]
    named = {name.split(": ")[0] for batch in one for name in batch.rejected}
    assert named == undecodable
    said = capfd.readouterr().err
    assert all(f"undecodable image: {name}: " in said for name in undecodable)
    halves = [list(loaders(photographs, rank, 2, num_workers=1, batch=8)[0]) for rank in (0, 1)]
    for step, (ours, first, second) in enumerate(zip(one, *halves, strict=False)):
        assert torch.equal(ours.images, torch.cat([first.images, second.images])), step
        assert ours.digest == (first.digest + second.digest) % 2**64
    training = one[:5]
    assert all(batch.valid.all() for batch in training)
    # The five undecodable ones are replaced by their successors in the order, which so come twice or thrice.
    sound = {int(seed) for batch in whole[:5] for seed in batch.seeds}
    drawn = [int(seed) for batch in training for seed in batch.seeds]
    assert len(set(drawn)) == 35
    assert set(drawn) <= sound
    evaluation = one[5]
    assert evaluation.valid.sum() == 5
    assert (evaluation.labels == -100).sum() == 5


def test_a_run_names_undecodable_images_and_stops_above_a_share(server, photographs, tmp_path):
    tear(photographs / "train")
    flags = ["--data", photographs, "--global_batch_size", "8", "--image_size", "32", "--norm", "group"]
    flags += ["--report_to", "none", "--output_dir", tmp_path / "run", "--epochs"]
    # Its first line would come after the second epoch: it stops before the first one's evaluation.
    process = python(ROOT / "recipes/resnet.py", *flags, "2", "--logging_steps", "100", server=server)
    assert process.returncode == 1
    assert (tmp_path / "run/metrics.jsonl").read_text() == ""
    shutil.rmtree(tmp_path / "run")
    (error,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "of 40 images cannot be decoded" in error
    assert "--max_undecodable" in error
    flags += ["1", "--logging_steps", "1", "--max_undecodable", "0.2"]
    process = python(ROOT / "recipes/resnet.py", *flags, server=server)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("undecodable image: ") == 5
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["undecodable"] for line in lines if "undecodable" in line][-1] == 5
    assert lines[-1]["eval_samples"] == 10


def test_where_nothing_can_be_decoded_one_line_says_so(tmp_path, monkeypatch):
    names = np.array([b"%d.jpg" % number for number in range(3000)])
    nothing = Source(storage.Files(str(tmp_path), names), np.zeros(3000, dtype=np.int64), ["a", "b"])
    monkeypatch.setattr(sys.modules[__name__], "open_data", lambda *_: (nothing, nothing))
    for num_workers in (0, 1):  # a worker's comes with its traceback
        with pytest.raises(UserError) as caught:
            list(loaders("nothing", num_workers=num_workers)[0])
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"2000 images in a row cannot be decoded, such as {tmp_path}/")
    evaluation = Evaluation()
    for batch in loaders("nothing")[1]:
        evaluation.add(torch.zeros(len(batch.labels), 2), batch.labels, batch.valid)
    with pytest.raises(UserError, match="not one of 3000 held-out images can be decoded"):
        evaluation.result(SimpleNamespace(mesh=None), 3000)


@pytest.mark.parametrize("prefetch_factor", [1, 4])
def test_a_batch_in_use_stays_what_it_is_while_others_are_made(prefetch_factor):
    views = loaders("digits")[0].dataset
    expected = [(batch.images.clone(), batch.labels) for batch in views_in(views, 0, prefetch_factor)]
    for (images, labels), batch in zip(expected, views_in(views, 1, prefetch_factor), strict=True):
        time.sleep(0.02)  # longer than the worker needs to fill what it may
        assert torch.equal(batch.images, images)
        assert torch.equal(batch.labels, labels)


def views_in(views: Views, num_workers: int, prefetch_factor: int) -> DataLoader:
    options = worker_options(views, num_workers, torch.device("cpu"), prefetch_factor)
    return DataLoader(views, batch_sampler=views.order, **options)


def by_worker(views: Views, seconds: Callable[[int], float]) -> Views:
    """In each image's red the number of the worker that rendered it, in its green and blue a byte of its seed.
    seconds: how long a worker takes for one."""

    def render(data, view, seed, out) -> bool:
        worker = get_worker_info().id
        time.sleep(seconds(worker))
        out[..., 0], out[..., 1:] = worker, seed & 255
        return False

    return replace(views, render=render)


def is_whole(batch, expected) -> bool:
    """No other was written over it, nor over its numbers."""
    seeds = (expected.seeds & 255).view(-1, 1, 1, 1)
    return batch.digest == expected.digest and bool((batch.images[..., 1:] == seeds).all())


def test_a_slow_worker_holds_up_only_its_own_batches(reference):
    """Those of the other are held until their turn; it writes none of them again before it was read."""
    views = by_worker(loaders("digits")[0].dataset, lambda worker: 0 if worker else 0.01)
    makers = []
    for batch in WorkerLoader(views, 2, torch.device("cpu")):
        makers.append(int(batch.images[0, 0, 0, 0]))
        time.sleep(0.01)
        assert is_whole(batch, reference[len(makers) - 1])
    assert len(makers) == 22
    assert 1 <= makers.count(0) <= 5  # its first takes 0.64 s


def test_a_worker_that_stands_still_is_waited_for(reference):
    """The other waits, too, when its memory is full. Who leaves off then, and begins anew, has the right batches."""
    begun = time.monotonic()
    views = loaders("digits")[0].dataset
    slow = by_worker(views, lambda worker: 0.001 if worker or time.monotonic() > begun + 3 else 3)
    reader = WorkerLoader(slow, 2, torch.device("cpu"))
    left = iter(reader)
    assert next(left).digest == reference[0].digest
    assert time.monotonic() > begun + 3
    assert reader.numbered.asked < 22  # of the epoch
    for number, batch in enumerate(reader):
        if number == 3:
            left.close()  # late, while the workers are at the next ones
            time.sleep(0.3)
        assert is_whole(batch, reference[number])
    assert number == 21


WAITING = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
import torch
from shared.images import Views, open_data
from shared.order import TrainingOrder
from shared.images.loader import WorkerLoader

def render(data, view, seed, out):
    time.sleep(0 if torch.utils.data.get_worker_info().id else 0.1)  # 6.4 s a batch
    return False

train, _ = open_data("digits", 0, 0)
views = Views(train, None, TrainingOrder(len(train), 64, 64, 0, 1, 0), 32, 0, render=render)
reader = WorkerLoader(views, 2, torch.device("cpu"))
threading.Timer(2, os.kill, (os.getpid(), signal.SIGKILL)).start()
next(iter(reader))
"""


def test_a_worker_that_waits_ends_with_its_process(tmp_path):
    (tmp_path / "script.py").write_text(WAITING)
    process = python(tmp_path / "script.py", ROOT)  # until no worker has its output open
    assert process.returncode == -signal.SIGKILL, process.stderr


NEW = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from shared.errors import UserError
from shared.images import Views, open_data
from shared.images import loader as loaders
from shared.lifetime import one_line
from shared.order import TrainingOrder
sys.excepthook = one_line
loaders.ignore_signals = lambda: time.sleep(float(sys.argv[2]))  # in the worker, which has only begun
train, _ = open_data("digits", 0, 0)
reader = loaders.WorkerLoader(Views(train, None, TrainingOrder(64, 64, 64, 0, 1, 0), 32, 0), 3, torch.device("cpu"))
{end}
"""


@pytest.mark.parametrize(
    ("end", "seconds", "status"),
    [("raise UserError('refused')", 1000, 1), ("os.kill(os.getpid(), signal.SIGKILL)", 2, -signal.SIGKILL)],
    ids=["refusal", "SIGKILL"],
)
def test_a_worker_that_has_only_begun_ends_with_its_process(tmp_path, end, seconds, status):
    """torch's own worker would stay, for it takes for its parent whichever process it has when it first looks."""
    (tmp_path / "script.py").write_text(NEW.format(end=end))
    process = python(tmp_path / "script.py", ROOT, seconds)
    assert process.returncode == status
    assert process.stderr.endswith("error: refused\n" if status == 1 else "")
    assert "Traceback" not in process.stderr


def test_a_shard_that_was_cut_off(pack, tmp_path, capfd):
    pack.main(words(pack, "digits", tmp_path / "tar", "--format", "tar", "--shard_size", "1000"))
    shard = tmp_path / "tar/train/000001.tar"
    whole = open_data(str(tmp_path / "tar"), 0, 0)[0]
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    undecodable = [name for batch in loaders(tmp_path / "tar")[0] for name in batch.rejected]
    assert len(set(undecodable)) == len(undecodable)
    lost = (whole.images.index.shard == 1) & (whole.images.index.offset > shard.stat().st_size)
    assert lost.sum() - 29 <= len(undecodable) <= lost.sum() + 1  # the last 29 of the epoch are not drawn
    assert all("000001.tar" in name and "too early" in name for name in undecodable)
    (tmp_path / "tar/train/index.safetensors").unlink()  # as another program's: what is cut off has no header
    (tmp_path / "tar/train/000002.tar").write_bytes(b"")
    (tmp_path / "tar/train/000003.tar").write_bytes(b"no header" * 1000)
    for _ in range(2):  # the second time from the cache
        capfd.readouterr()
        assert 0 <= len(open_data(str(tmp_path / "tar"), 0, 0)[0]) - (1437 - lost.sum()) <= 1
        said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("truncated shard: ")]
        assert [line.split()[2] for line in said] == [str(shard.with_name(f"00000{n}.tar")) for n in (1, 2, 3)]


def test_a_csv_whose_paths_climb_out(photographs):
    rows = [f"{path.relative_to(photographs)},{path.parent.name},train" for path in photographs.glob("train/*/*.jpg")]
    held_out = [f"{row.rsplit(',', 1)[0]},val" for row in (rows[0], rows[-1])]
    table = ["path,label,split", *rows, *held_out, "../../etc/x.jpg,a,val"]
    (photographs / "list.csv").write_text("\n".join(table))
    (batch,) = loaders(photographs / "list.csv", batch=8)[1]
    assert ["climbs out" in name for name in batch.rejected] == [True]


# Decoding


def middle(width: int, height: int, seed: int) -> Crop:
    return Crop(width // 4, height // 4, width - width // 4, height - height // 4)


def rendered(image: bytes, size: int = 48) -> np.ndarray:
    out = torch.zeros(size, size, 3, dtype=torch.uint8)
    render(image, middle, 0, out)
    return out.numpy().astype(int)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("WEBP", "RGB", {}),
    ],
)
def test_every_kind_of_image_shows_what_pil_shows(kind, mode, options):
    image = photograph(3, kind, mode, **options)
    with Image.open(io.BytesIO(image)) as file:
        crop = middle(*file.size, 0)
        expected = np.asarray(file.convert("RGB").crop(crop[:4]).resize((48, 48), Image.Resampling.BILINEAR))
    assert np.abs(rendered(image) - expected).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_was_turned_by_exif_stands_upright(orientation):
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM}
    undo |= {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE}
    undo |= {8: Image.Transpose.ROTATE_90}
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photograph(3, exif=exif)
    with Image.open(io.BytesIO(image)) as file:
        upright = file.transpose(undo[orientation]) if orientation > 1 else file.copy()
    crop = middle(*upright.size, 0)
    expected = np.asarray(upright.crop(crop[:4]).resize((48, 48), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(rendered(image) - expected).max() <= 2


def test_one_pixel_and_very_large_images():
    dot, large = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (1, 1), (200, 100, 50)).save(dot, "PNG")
    out = torch.zeros(8, 8, 3, dtype=torch.uint8)
    render(dot.getvalue(), lambda width, height, seed: Crop(0, 0, width, height), 0, out)
    assert (out == torch.tensor([200, 100, 50], dtype=torch.uint8)).all()
    photo = Image.fromarray(load_sample_images().images[0])
    photo.resize((6000, 4000), Image.Resampling.BICUBIC).save(large, "JPEG", quality=95)
    small = photo.crop(middle(*photo.size, 0)[:4]).resize((48, 48), Image.Resampling.BILINEAR)
    # Scaled by 1/8 within the decoder, which averages a little otherwise.
    assert np.abs(rendered(large.getvalue()) - np.asarray(small)).mean() < 3


def chunk(kind: bytes, data: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG with one more, before its end."""
    image = photograph(3, "PNG")
    return image[:-12] + chunk(kind, data) + image[-12:]


def with_text_for_a_number() -> bytes:
    """A JPEG that Exif turns, and whose Compression is a text."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0103] = 6, 6
    image = photograph(3, exif=exif)
    place = image.index(b"\x01\x03", image.index(b"Exif"))
    return image[: place + 3] + b"\x02" + image[place + 4 :]


BOMB = (
    chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
)


def test_whatever_pil_raises_is_an_undecodable_image():
    with pytest.raises(ValueError, match="decompression bomb"):
        rendered(b"\x89PNG\r\n\x1a\n" + BOMB)


@pytest.mark.parametrize(
    "image",
    [with_chunk(b"eXIf", b"XX"), with_chunk(b"eXIf", b"MM\0*\0\0"), with_text_for_a_number()],
    ids=["header", "cut", "kind"],
)
def test_a_damaged_exif_leaves_the_image(image):
    rendered(image)


# Packing


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
    (tmp_path / "killed/train" / f".{INDEX}.host.1.partial").write_bytes(b"")  # of a kill as the index was written
    command()
    assert contents(tmp_path / "killed") == whole
    assert not list((tmp_path / "killed").rglob(".*"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.*")}
    command()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*.*")} == before  # nothing to do


def kill(command, seconds: float) -> bool:
    """Whether it still ran, in a process of its own, this long after its start."""
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
    second = Image.fromarray(load_sample_images().images[0][:50, :50])
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
    """As the index is written, and as any other file is."""

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
        (["photographs", "new", "--format", "tar", "--val_fraction", "0.1"], "has no use"),
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

# SPDX-License-Identifier: Apache-2.0
"""Each way to store images gives the same samples, in the same order, with the same augmentation."""

import importlib
import io
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import datasets
import loading
import numpy as np
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from conftest import ROOT, launch_command, python, train
from loading import FORMATS, loaders_of
from pictures import photograph, write_shard
from PIL import Image

from shared.errors import UserError
from shared.images import open_data, storage
from shared.images.index import Index

surroundings, packed, photographs = loading.surroundings, loading.packed, pictures.photographs


@pytest.fixture(scope="module")
def reference() -> list:
    return [batch for loader in loaders_of("digits") for batch in loader]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_batches_of_the_digits(packed, reference, kind):
    batches = [batch for loader in loaders_of(packed[kind], num_workers=1) for batch in loader]
    assert len(batches) == len(reference) == 22 + 6
    for ours, theirs in zip(batches, reference, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.digest == theirs.digest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["digits", *FORMATS])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_takes_every_sample_once(packed, kind, size, num_workers):
    """Seeds are a function of epoch and sample, so that there are as many as samples."""
    parts = [loaders_of(packed[kind], rank, size, num_workers, batch=2) for rank in range(size)]
    seeds = torch.cat([batch.seeds for training, _ in parts for batch in training])
    assert len(seeds) == len(seeds.unique()) == 1437 // 2 * 2
    batches = [batch for _, evaluation in parts for batch in evaluation]
    indices, labels = (torch.cat([batch[field][batch.valid] for batch in batches]) for field in (8, 1))
    assert sorted(indices.tolist()) == list(range(360))
    assert labels.tolist() == open_data("digits", 0, 0)[1].labels[indices].tolist()


def test_training_ends_alike_from_every_format(packed, runs, server):
    """The base recipe into its second epoch: losses, digests and accuracies to the last bit."""
    flags = ["--epochs", "4", "--max_steps", "13", "--image_size", "8", "--global_batch_size", "128"]
    flags += ["--logging_steps", "1", "--num_workers", "1", "--report_to", "none"]
    series = {}
    for kind in ("digits", *FORMATS):
        run = train(runs / f"format-{kind}", *flags, "--data", str(packed[kind]), server=server)
        series[kind] = [run.series(name) for name in ("samples_digest", "loss", "accuracy", "eval_loss")]
    digests, losses, accuracies, _ = series["digits"]
    assert (len(set(digests)), len(losses), len(accuracies)) == (13, 13, 2)
    assert all(other == series["digits"] for other in series.values())


def test_raw_images_of_jean_zay_are_found(photographs):
    expected, _ = open_data(str(photographs), 0, 0)
    (photographs.parent / "imagenet").mkdir()
    photographs.rename(photographs.parent / "imagenet/RawImages")
    for path in (photographs.parent / "imagenet", photographs.parent / "imagenet/RawImages"):
        train, held_out = open_data(str(path), 0, 0)
        assert (len(train), len(held_out), train.classes) == (40, 10, ["a", "b"])
        assert train.images.names.tolist() == expected.images.names.tolist()


def test_a_blocked_shuffle_reads_few_shards_at_a_time_and_every_sample_once(packed):
    order = loaders_of(packed["tar"], shuffle_block=2)[0].order
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
        loaders_of("digits", shuffle_block=2)


def test_shards_and_parquet_of_other_programs_are_read(tmp_path):
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
    undecodable = [name for batch in loaders_of(tmp_path / "wds", batch=101)[0] for name in batch.rejected]
    assert len(undecodable) == 1
    assert "names no class" in undecodable[0]
    for kind in ("pyd", "input.pyd"):  # the second: Jean Zay's shards of ImageNet
        with write(str(tmp_path / "wds/train/z-%03d.tar")) as sink:
            sink.write({"__key__": "a", kind: [1, 2]})
        with pytest.raises(UserError, match=f"a.{kind}, a pickle.*Pack the images again"):
            open_data(str(tmp_path / "wds"), 0, 0)


@pytest.mark.parametrize(
    ("label", "words"), [(9876543210, "z-000.tar: a has the class 9876543210"), (5000, "a has the class 5000")]
)
def test_a_stray_label_of_foreign_shards_is_refused(tmp_path, label, words):
    """Where the labels themselves are the classes, the network would have an output for each number up to it."""
    for part in ("train", "val"):
        foreign_shard(tmp_path / part / "a-000.tar", {f"{number:02d}": number % 10 for number in range(50)})
    assert len(open_data(str(tmp_path), 0, 0)[0].classes) == 10
    foreign_shard(tmp_path / "train/z-000.tar", {"a": label})
    with pytest.raises(UserError, match=words):
        open_data(str(tmp_path), 0, 0)
    with pytest.raises(UserError, match=words):
        open_data(str(tmp_path / "train"), 0.1, 0)


def foreign_shard(path: Path, labels: dict[str, int]) -> None:
    write_shard(path, [(key, "jpg", b"", label) for key, label in labels.items()])


def test_labels_of_parquet_that_name_no_class_are_rejected(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": photograph(number), "path": None} for number in range(6)]
    table = pa.table({"image": images, "label": [0, 1, 2, None, -1, 1]}, schema=features.arrow_schema)
    for part in ("train", "val"):
        (tmp_path / "data" / part).mkdir(parents=True)
        pq.write_table(table, tmp_path / "data" / part / "0.parquet")
    recipe = importlib.import_module("resnet_hf_datasets")
    for name, opened in (("open_data", open_data), ("recipe", recipe.open_data)):
        train, _ = opened(str(tmp_path / "data"), 0, 0, 0)
        assert train.labels.tolist() == [0, 1, -1, -1, -1, 1], name
    undecodable = [name for batch in loaders_of(tmp_path / "data", batch=6)[0] for name in batch.rejected]
    assert sorted(name.split(": ", 1)[1] for name in undecodable) == [
        f"row {row}: it has no label, or one that names no class" for row in (2, 3, 4)
    ]


def test_a_changed_shard_is_listed_again(tmp_path):
    """Its modification time is not the newest of the folder."""
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
from shared.errors import UserError, say
from shared.images import index, open_data
PartialState(cpu=True)
index.PATIENCE = 0
for data in ("bad", "good"):
    try:
        train, _ = open_data(f"{sys.argv[2]}/{data}", 0.0, 0)
        say(f"{rank} has {len(train)}")
    except UserError as error:
        say(f"{rank} cannot: {error}")
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
    """Each read gives what its shard holds, while other threads close it."""
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
    assert images.opened.cache_info().currsize <= 3

# SPDX-License-Identifier: Apache-2.0
"""resnet_webdataset.py's streams of shards: each step has the same images on any topology, and after a resume."""

import importlib
import os
from dataclasses import replace
from pathlib import Path

import loading
import numpy as np
import pytest
import torch
from loading import build
from pictures import encoded, varied, write_shards

from shared.draws import augmentation_seed
from shared.errors import UserError
from shared.images import open_data

pytestmark = pytest.mark.slow

surroundings, packed = loading.surroundings, loading.packed


TOPOLOGIES = [(1, 0), (1, 2), (2, 1), (2, 2), (4, 0)]  # processes, workers of each


SIZES = (7, 30, 101, 50, 1, 148)  # images of each shard: 337, ten steps of 32 and a remainder


@pytest.fixture(autouse=True, scope="module")
def small_buffer(surroundings):
    """Hold fewer images than a stream has, so that some wait in the buffer and others behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("resnet_webdataset"), "SHUFFLE_BUFFER", 20)
        yield


@pytest.fixture(scope="module")
def unequal(tmp_path_factory) -> Path:
    """Write digits into shards of unequal size."""
    root = tmp_path_factory.mktemp("unequal")
    for name, part, sizes in zip(("train", "val"), open_data("digits", 0, 0), (SIZES, (40, 3, 60, 2)), strict=True):
        images = [("png", encoded(part.images[number], "PNG"), part.labels[number]) for number in range(sum(sizes))]
        write_shards(root / name, images, sizes)
    return root


def streamed(data, size=1, num_workers=0, step=0, accumulation=1, **flags) -> tuple[list, tuple]:
    """Return the content of each global step from this one on, and of the evaluation."""
    flags = {"global_batch_size": 32, "gradient_accumulation_steps": accumulation} | flags
    pairs = [build("resnet_webdataset", data, rank, size, num_workers, **flags) for rank in range(size)]
    training = [list(loader.starting_at(step)) for loader, _ in pairs]
    evaluation = [list(loader) for _, loader in pairs]
    assert {len(batches) for batches in training} == {len(pairs[0][0])}
    assert len({len(batches) for batches in evaluation}) == 1  # else a collective would wait forever
    steps = [
        content([batch for batches in training for batch in batches[first : first + accumulation]])
        for first in range(0, len(training[0]), accumulation)
    ]
    images, _, lost = content([batch for batches in evaluation for batch in batches])  # a digest counts empty places
    return steps, (images, lost)


def content(batches: list) -> tuple[list, int, list]:
    """Return (augmentation seed, label, pixels) of each image that counts, the digest, and the undecodable images;
    their order does not matter."""
    fields = zip(*(torch.cat([batch[field] for batch in batches]) for field in (3, 1, 0, 2)), strict=True)
    lost = sorted(name.rsplit(": ", 1)[0] for batch in batches for name in batch.rejected)
    images = [(int(seed), int(label), pixels.numpy().tobytes()) for seed, label, pixels, valid in fields if valid]
    return sorted(images), sum(batch.digest for batch in batches) % 2**64, lost


def seeds(contents: list[tuple]) -> list[int]:
    return sorted(image[0] % 2**64 for images, *_ in contents for image in images)


def of_epoch(epoch: int, samples: int) -> list[int]:
    return sorted(augmentation_seed(0, epoch, index) for index in range(samples))


@pytest.fixture(scope="module")
def streams(unequal) -> tuple[list, tuple]:
    return streamed(unequal)


@pytest.mark.parametrize(("size", "num_workers"), TOPOLOGIES[1:])
def test_streams_give_each_step_the_same_images_on_any_topology(unequal, streams, size, num_workers):
    steps, evaluation = streamed(unequal, size, num_workers)
    assert steps == streams[0]
    assert evaluation == streams[1]
    assert (
        streamed(unequal, size, num_workers, step=13, accumulation=2, num_streams=4)[0]
        == (streamed(unequal, step=13, num_streams=4)[0])
    )


def test_an_epoch_of_streams_takes_each_image_once_in_an_order_of_its_own(unequal, streams, monkeypatch):
    steps, evaluation = streams
    second, _ = streamed(unequal, step=10)
    for epoch, each in enumerate((steps, second)):
        drawn = seeds(each)
        assert len(each) == 10
        assert len(set(drawn)) == len(drawn) == 320
        assert set(drawn) <= set(of_epoch(epoch, 337))
    assert seeds([evaluation]) == of_epoch(0, 105)
    number = {augmentation_seed(0, epoch, index): (epoch, index) for epoch in (0, 1) for index in range(337)}
    order = [[{number[s][1] for s in seeds([step])} for step in each] for each in (steps, second)]
    assert all(len(first & other) < 16 for first, other in zip(*order, strict=True))
    assert max(max(step) - min(step) for step in order[0]) > 200  # a step takes of all streams
    monkeypatch.setattr(importlib.import_module("resnet_webdataset"), "SHUFFLE_BUFFER", 1)
    assert streamed(unequal)[0] != steps


def test_one_shard_has_another_order_in_each_epoch(tmp_path):
    """The order of shards is the same, so that only the shuffling within a stream differs."""
    for part in ("train", "val"):
        write_shards(tmp_path / part, [("jpg", varied(number), number % 2) for number in range(48)], (48,))
    flags, number = {"global_batch_size": 8, "image_size": 8}, {}
    for epoch in (0, 1):
        number |= {seed: index for index, seed in enumerate(augmentation_seed(0, epoch, i) for i in range(48))}
    orders = [[{number[s] for s in seeds([step])} for step in streamed(tmp_path, step=k, **flags)[0]] for k in (0, 6)]
    assert [set().union(*order) for order in orders] == [set(range(48))] * 2
    assert orders[0] != orders[1]


def test_streams_start_at_any_step(unequal, streams):
    both = streams[0] + streamed(unequal, step=10)[0]
    for step, (size, num_workers) in zip((1, 4, 9, 10, 17), TOPOLOGIES, strict=True):
        assert streamed(unequal, size, num_workers, step)[0] == both[step : 10 if step < 10 else 20]


# Undecodable images


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Write JPEGs into shards; two of train/ and one of val/ are undecodable. A shard of each is cut off after it was
    indexed, so that train/ loses whole streams of eight images: 16 images in a row."""
    for part, sizes in (("train", (9, 30, 5, 20)), ("val", (6, 8))):
        images = [["jpg", varied(number), number % 3] for number in range(sum(sizes))]
        images[2][1] = images[2][1][:-300]
        if part == "train":
            images[20][1] = b"\xff\xd8 this is no JPEG"
        write_shards(tmp_path / part, images, sizes)
    for part, source in zip(("train", "val"), open_data(str(tmp_path), 0, 0), strict=True):
        index = source.images.index
        replace(index, shards=[Path(name).name for name in index.shards]).save(tmp_path / part / "index.safetensors")
        shard = tmp_path / part / "001.tar"
        os.truncate(shard, int(shard.stat().st_size * 0.35))
    return tmp_path


def test_streams_name_and_replace_what_is_undecodable_alike_everywhere(photographs):
    flags = {"global_batch_size": 8, "image_size": 48}
    lost = []
    for part, source, bad in zip(("train", "val"), open_data(str(photographs), 0, 0), ({2, 20}, {2}), strict=True):
        index, left = source.images.index, (photographs / part / "001.tar").stat().st_size
        bad |= set(np.flatnonzero((index.shard == 1) & (index.offset + index.length > left)).tolist())
        lost.append(sorted(source.images.name(number) for number in bad))
    steps, evaluation = streamed(photographs, **flags)
    # Each image comes once: 64 are eight steps.
    assert sorted(name for _, _, names in steps for name in names) == lost[0]
    assert len(lost[0]) >= 16 + 2
    assert all(len(images) == 8 for images, *_ in steps)
    assert evaluation[1] == lost[1]
    assert len(evaluation[0]) == 14 - len(lost[1]) < 13
    for size, num_workers in ((1, 2), (2, 1)):
        assert streamed(photographs, size, num_workers, **flags)[1] == evaluation
        for step in (0, 5):
            assert streamed(photographs, size, num_workers, step, **flags)[0] == steps[step:]


# Bad input


@pytest.mark.parametrize(
    ("kind", "topology", "flags", "words"),
    [
        ("unequal", (4, 2), {}, "6 shards are fewer than 4 processes x 2 workers.*--shard_size.*--num_workers"),
        ("unequal", (1, 3), {}, "--num_streams 8 does not divide among 1 processes x 3 workers. Give a multiple of 3"),
        ("unequal", (1, 2), {"global_batch_size": 36}, "--num_streams 8 does not divide the 36 images"),
        ("unequal", (1, 2), {"gradient_accumulation_steps": 16}, "--num_streams 8 does not divide the 4 images"),
        ("folder", (1, 2), {}, "no tar shards.*tools/pack.py"),
    ],
)
def test_streams_that_do_not_divide_are_refused(packed, unequal, kind, topology, flags, words):
    with pytest.raises(UserError, match=words):
        build("resnet_webdataset", {"unequal": unequal, **packed}[kind], 0, *topology, **flags)

# SPDX-License-Identifier: Apache-2.0
"""The recipes of other loaders: resnet.py's batches, or the streams' own, on any topology and after a resume."""

import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
import tempfile
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import golden
import numpy as np
import pytest
import torch
from conftest import ROOT, launch_command, train
from forked import children
from PIL import Image
from sklearn.datasets import load_sample_images

from shared.draws import augmentation_seed
from shared.errors import UserError
from shared.images import loader as loaders
from shared.images import open_data
from shared.images.loader import STD, Batch
from shared.lifetime import SIGNALS
from shared.run.interruption import Interruption

FORMATS = ("digits", "tar", "parquet", "folder")
TOPOLOGIES = [(1, 0), (1, 2), (2, 1), (2, 2), (4, 0)]  # processes, workers of each
SIZES = (7, 30, 101, 50, 1, 148)  # images of each shard: 337, ten steps of 32 and a remainder


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCRATCH", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(ROOT / "recipes")
        patch.syspath_prepend(ROOT / "tools")
        # Fewer than a stream has, so that some images wait in it and others behind it.
        patch.setattr(importlib.import_module("resnet_webdataset"), "SHUFFLE_BUFFER", 20)
        yield


class Mesh(dict):
    """Of a process that was not launched: what `data_parallel` asks a DeviceMesh."""

    def __init__(self, rank: int, size: int):
        super().__init__(dp=SimpleNamespace(size=lambda: size))
        self.get_local_rank = lambda name: rank


def build(recipe: str, data, rank=0, size=1, num_workers=0, run=None, **flags):
    """A process's loaders, as the recipe builds them."""
    module = importlib.import_module(recipe)
    accelerator = SimpleNamespace(device=torch.device("cpu"), mesh=Mesh(rank, size), is_main_process=True)
    accelerator.wait_for_everyone = lambda: None
    values = {"data": str(data), "num_workers": num_workers, "horizontal_flip": True} | (run or {}) | flags
    configs = [kind(**{name: values.pop(name) for name in names(kind) & values.keys()}) for kind in module.CONFIGS]
    assert not values
    return module.build_loaders(accelerator, *configs)


def names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def joined(recipe, data, size=1, num_workers=0, **flags) -> list[Batch]:
    """Each training batch, then each evaluation batch, of all processes together."""
    processes = [build(recipe, data, rank, size, num_workers, **flags) for rank in range(size)]
    batches = zip(*([batch for loader in loaders for batch in loader] for loaders in processes), strict=True)
    columns = (list(zip(*parts, strict=True)) for parts in batches)
    return [Batch(*map(torch.cat, fields[:5]), sum(fields[5]) % 2**64, sum(fields[6], ())) for fields in columns]


def same(ours: Batch, theirs: Batch, first: int = 0) -> bool:
    """All that is said of the samples; from the second field on without their pixels."""
    return all(map(torch.equal, ours[first:5], theirs[first:5])) and ours.digest == theirs.digest


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> dict[str, Path | str]:
    """The digits in every format."""
    root, pack = tmp_path_factory.mktemp("packed"), importlib.import_module("pack")
    for kind in ("tar", "parquet", "folder"):
        with pytest.MonkeyPatch.context() as patch:
            words = ["digits", root / kind, "--format", kind, "--shard_size", "300", "--num_workers", "1"]
            patch.setattr("sys.argv", ["pack.py", *map(str, words)])
            pack.main(pack.parse())
    parts = importlib.import_module("resnet_hf_datasets").embedded_digits()
    datasets.DatasetDict(parts).save_to_disk(str(root / "saved"))
    return {"digits": "digits"} | {kind: root / kind for kind in ("tar", "parquet", "folder", "saved")}


@pytest.fixture(scope="module")
def reference() -> list[Batch]:
    return joined("resnet", "digits")


# Map-style loaders: resnet.py's batches


@pytest.mark.parametrize(
    ("recipe", "kind", "flags"),
    [
        *[("resnet_hf_datasets", kind, {}) for kind in ("digits", "parquet", "saved")],
        *[("resnet_torchdata", kind, {"pipeline": "nodes"}) for kind in FORMATS],
        *[("resnet_torchdata", kind, {"pipeline": "dataloader"}) for kind in ("tar", "parquet")],
        *[("resnet_dali", kind, {}) for kind in FORMATS[1:]],
    ],
    ids=lambda value: value.get("pipeline", "") if isinstance(value, dict) else value.removeprefix("resnet_"),
)
@pytest.mark.parametrize(("size", "num_workers"), [(1, 0), (2, 2)])
def test_every_map_style_loader_gives_the_batches_of_the_base(
    packed, reference, recipe, kind, flags, size, num_workers
):
    batches = joined(recipe, packed[kind], size, num_workers, **flags)
    assert [same(*pair) for pair in zip(batches, reference, strict=True)] == [True] * 28


def test_training_ends_alike_from_every_format(packed, runs, server):
    """The base recipe into its second epoch: losses, digests and accuracies to the last bit."""
    flags = ["--epochs", "4", "--max_steps", "13", "--image_size", "8", "--global_batch_size", "128"]
    flags += ["--logging_steps", "1", "--num_workers", "1", "--report_to", "none"]
    series = {}
    for kind in FORMATS:
        run = train(runs / f"format-{kind}", *flags, "--data", str(packed[kind]), server=server)
        series[kind] = [run.series(name) for name in ("samples_digest", "loss", "accuracy", "eval_loss")]
    digests, losses, accuracies, _ = series["digits"]
    assert (len(set(digests)), len(losses), len(accuracies)) == (13, 13, 2)
    assert all(other == series["digits"] for other in series.values())


# Streams


def write_shards(folder: Path, images: list[tuple[str, bytes, int]], sizes: tuple[int, ...]) -> None:
    """(kind, bytes, label) of each image into shards of these many, as any program writes them."""
    folder.mkdir(parents=True)
    images = enumerate(images)
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for key, (kind, image, label) in (next(images) for _ in range(size)):
                for name, data in ((f"{key:05d}.{kind}", image), (f"{key:05d}.cls", str(label).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def encoded(pixels: np.ndarray, kind: str, mode: str = "RGB", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def unequal(tmp_path_factory) -> Path:
    """Digits in shards of unequal size."""
    root = tmp_path_factory.mktemp("unequal")
    for name, part, sizes in zip(("train", "val"), open_data("digits", 0, 0), (SIZES, (40, 3, 60, 2)), strict=True):
        images = [("png", encoded(part.images[number], "PNG"), part.labels[number]) for number in range(sum(sizes))]
        write_shards(root / name, images, sizes)
    return root


def streamed(data, size=1, num_workers=0, step=0, accumulation=1, **flags) -> tuple[list, tuple]:
    """The content of each global step from this one on, and of the evaluation."""
    flags = {"global_batch_size": 32, "gradient_accumulation_steps": accumulation} | flags
    pairs = [build("resnet_webdataset", data, rank, size, num_workers, **flags) for rank in range(size)]
    training = [list(loader.starting_at(step)) for loader, _ in pairs]
    evaluation = [list(loader) for _, loader in pairs]
    assert {len(batches) for batches in training} == {len(pairs[0][0])}
    assert len({len(batches) for batches in evaluation}) == 1  # or a collective would wait for ever
    steps = [
        content([batch for batches in training for batch in batches[first : first + accumulation]])
        for first in range(0, len(training[0]), accumulation)
    ]
    images, _, lost = content([batch for batches in evaluation for batch in batches])  # a digest counts empty places
    return steps, (images, lost)


def content(batches: list) -> tuple[list, int, list]:
    """(augmentation seed, label, pixels) of each image that counts, the digest, the undecodable ones: in no order."""
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
    """The order of shards is the same: only what shuffles a stream can differ."""
    for part in ("train", "val"):
        write_shards(tmp_path / part, [("jpg", photograph(number), number % 2) for number in range(48)], (48,))
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


# Torn data


def photograph(number: int, kind: str = "JPEG", **options) -> bytes:
    """Of a size of its own: 150 to 249 pixels wide, 140 to 199 high."""
    pixels = load_sample_images().images[number % 2][3 * number :, 5 * number :]
    return encoded(pixels[: 140 + 13 * number % 60, : 150 + 29 * number % 100], kind, **options)


@pytest.fixture
def photographs(tmp_path) -> Path:
    """JPEGs in shards; two of train/ lost, one of val/; and a shard of each cut off after it was indexed, so
    that whole streams of train/ are lost: of eight images, 16 of them in a row."""
    for part, sizes in (("train", (9, 30, 5, 20)), ("val", (6, 8))):
        images = [["jpg", photograph(number), number % 3] for number in range(sum(sizes))]
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
    # Each of them once: 64 are eight steps.
    assert sorted(name for _, _, names in steps for name in names) == lost[0]
    assert len(lost[0]) >= 16 + 2
    assert all(len(images) == 8 for images, *_ in steps)
    assert evaluation[1] == lost[1]
    assert len(evaluation[0]) == 14 - len(lost[1]) < 13
    for size, num_workers in ((1, 2), (2, 1)):
        assert streamed(photographs, size, num_workers, **flags)[1] == evaluation
        for step in (0, 5):
            assert streamed(photographs, size, num_workers, step, **flags)[0] == steps[step:]


# DALI: the base's samples, and its pixels nearly


def garbled(image: bytes) -> bytes:
    """Its header is sound, and names Huffman tables that are not there."""
    place = image.index(b"\xff\xda") + 6
    return image[:place] + b"\x33" + image[place + 1 :]


def overwritten(image: bytes) -> bytes:
    """The middle is another file's beginning."""
    return image[: len(image) // 2] + image[:400] + image[len(image) // 2 + 400 :]


@pytest.fixture
def files(tmp_path) -> Path:
    """JPEGs of several kinds in class folders, among them a PNG and one that EXIF turns: train/ 32, val/ 13."""
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {3: {"mode": "L"}, 4: {"kind": "PNG"}, 5: {"exif": exif}, 6: {"progressive": True, "subsampling": 0}}
    for number in range(45):
        folder = tmp_path / "files" / ("train" if number < 32 else "val") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.jpg").write_bytes(photograph(number, **kinds.get(number % 16, {})))
    return tmp_path / "files"


@pytest.mark.parametrize(("image_size", "bound"), [(100, 0.5), (40, 5)])  # of 40 pixels: decoded at half the size
def test_dali_shows_what_the_base_shows(files, image_size, bound, capfd):
    flags = {"global_batch_size": 16, "image_size": image_size}
    one, two = (joined("resnet_dali", files, size, 2, **flags) for size in (1, 2))
    base = joined("resnet", files, **flags)
    for ours, halves, theirs in zip(one, two, base, strict=True):
        assert same(ours, theirs, 1)
        assert same(ours, halves)
        difference = ((ours.images - theirs.images).abs() * torch.tensor(STD).view(3, 1, 1)).mean((1, 2, 3))
        assert difference.max() < bound
        assert 2 <= (difference == 0).sum() <= 5  # what goes to the base's decoder: PNG, EXIF, empty places
    assert [batch.valid.sum() for batch in base] == [16, 16, 13]
    assert "DALI failed" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "tear", [lambda image: image[:-300], garbled, overwritten], ids=["truncated", "garbled", "overwritten"]
)
def test_dali_names_and_replaces_what_the_base_does(files, tear, capfd):
    lost = [files / "train/a/00.jpg", files / "train/b/17.jpg", files / "val/a/34.jpg"]
    for path in lost:
        path.write_bytes(tear(path.read_bytes()))
    for flags in ({"global_batch_size": 16, "image_size": size} for size in (100, 40)):
        ours, theirs = (joined(name, files, **flags) for name in ("resnet_dali", "resnet"))
        assert all(same(*pair, 1) for pair in zip(ours, theirs, strict=True))
        assert ("DALI failed" in capfd.readouterr().err) == (tear is garbled)
        for batches in (ours, theirs):
            assert sorted(name.split(": ")[0] for batch in batches for name in batch.rejected) == sorted(
                map(str, lost)
            )


# torchdata: a position that is loaded into another loader


@pytest.fixture(scope="module")
def two_epochs() -> list[int]:
    """The digests of the base's steps."""
    loader, _ = build("resnet", "digits", global_batch_size=128, image_size=8)
    return [batch.digest for step in (0, 11) for batch in loader.starting_at(step)]


@pytest.mark.parametrize(
    ("pipeline", "before", "after", "taken"),
    [
        ("nodes", (1, 0), (1, 0), 1),
        ("nodes", (1, 2), (1, 0), 4),
        ("nodes", (1, 2), (2, 2), 11),
        ("nodes", (1, 0), (2, 0), 13),
        ("dataloader", (1, 0), (1, 0), 4),
        ("dataloader", (1, 2), (2, 2), 1),
        ("dataloader", (1, 2), (1, 2), 13),
        ("dataloader", (1, 0), (1, 0), 11),
        ("dataloader", (1, 2), (1, 2), 11),
    ],
)
def test_a_position_of_torchdata_gives_the_rest(tmp_path, two_epochs, pipeline, before, after, taken):
    module, flags = importlib.import_module("resnet_torchdata"), {"global_batch_size": 128, "image_size": 8}
    loader, _ = build("resnet_torchdata", "digits", 0, *before, pipeline=pipeline, **flags)
    module.set_position(loader, None, before[1])
    epochs = (batch for _ in range(2) for batch in loader)
    assert [next(epochs).digest for _ in range(taken)] == two_epochs[:taken]
    (tmp_path / "state.json").write_text(json.dumps({"loader": loader.batches.state_dict()}))
    rest = []
    for rank in range(after[0]):
        loader, _ = build("resnet_torchdata", "digits", rank, *after, pipeline=pipeline, **flags)
        module.set_position(loader, tmp_path, after[1])
        rest.append([batch.digest for _ in range(2 if taken < 11 else 1) for batch in loader])
    assert [sum(parts) % 2**64 for parts in zip(*rest, strict=True)] == two_epochs[taken:]


def test_a_position_of_worker_processes_is_refused_by_another_number_of_them(tmp_path):
    module = importlib.import_module("resnet_torchdata")
    loader, _ = build("resnet_torchdata", "digits", num_workers=1, pipeline="dataloader")
    module.set_position(loader, None, 1)
    (tmp_path / "state.json").write_text(json.dumps({"loader": loader.batches.state_dict()}))
    for num_workers in (0, 2):
        other, _ = build("resnet_torchdata", "digits", num_workers=num_workers, pipeline="dataloader")
        with pytest.raises(UserError, match="Give --num_workers 1; --pipeline nodes takes any"):
            module.set_position(other, tmp_path, num_workers)


# Real command lines: interrupted within an epoch, then continued

FLAGS = ["--learning_rate", "0.001", "--norm", "group", "--image_size", "16", "--logging_steps", "1"]
FLAGS += ["--report_to", "none", "--num_workers", "1", "--global_batch_size", "32"]


@pytest.fixture(scope="module")
def whole(runs, server):
    """A dozen steps of a recipe without a break."""
    return {
        name: train(
            runs / f"whole-{name}", *FLAGS, "--max_steps", "12", recipe=ROOT / f"recipes/{name}.py", server=server
        )
        for name in ("resnet", "resnet_webdataset")
    }


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "base", "processes"),
    [
        ("resnet_hf_datasets", "resnet", 1),
        ("resnet_torchdata", "resnet", 1),
        ("resnet_dali", "resnet", 1),
        ("resnet_webdataset", "resnet_webdataset", 2),
    ],
)
def test_a_run_goes_on_within_an_epoch_as_if_nothing_had_happened(runs, server, whole, name, base, processes):
    folder, options = runs / f"broken-{name}", {"recipe": ROOT / f"recipes/{name}.py", "server": server}
    train(folder, *FLAGS, "--max_steps", "6", "--checkpointing_steps", "5", **options)
    shutil.rmtree(folder / "checkpoints/step-00000006")  # as if it had been killed: what is left is of within the loop
    run = train(folder, *FLAGS, "--max_steps", "12", num_processes=processes, **options)
    assert "resumed at step 5 of 440" in run.text
    assert run.summary["world_size"] == processes
    last = json.loads((folder / "checkpoints/step-00000012/state.json").read_text())
    assert (last["loader"] is not None) == (name == "resnet_torchdata")
    assert run.series("step") == [*range(1, 13), 12]
    golden.compare(f"{name}, ddp {processes}", run)
    assert (run.config["decoder"] == "DALI") == (name == "resnet_dali")
    assert run.series("samples_digest") == whole[base].series("samples_digest")
    np.testing.assert_allclose(run.series("loss"), whole[base].series("loss"), rtol=1e-5)
    for last in ("accuracy", "eval_samples"):
        assert run.series(last) == whole[base].series(last)


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


def test_hugging_face_data_that_does_not_fit_is_refused(packed, server, tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "text"))
    datasets.DatasetDict(dev=rows).save_to_disk(str(tmp_path / "dev"))
    for data, run, words in (
        (tmp_path / "text", {}, r"text, train has no Image among its columns text \(string\), label \(int64\)"),
        (tmp_path / "dev", {}, "has dev/ but no train/"),
        (packed["saved"], {"shuffle_block": 2}, "--shuffle_block 2 needs tar shards.* Leave it out"),
        (packed["saved"], {"val_fraction": 0.1}, "--val_fraction 0.1 has no use"),
    ):
        with pytest.raises(UserError, match=words):
            build("resnet_hf_datasets", data, run=run)
    words = [*launch_command(), ROOT / "recipes/resnet_hf_datasets.py", "--data", tmp_path / "nowhere"]
    process = server.launch([*map(str, words[2:]), "--output_dir", str(tmp_path / "run")])
    (line,) = [line for line in process.stdout.splitlines() if "error: " in line]
    assert line.startswith(f"error: --data {tmp_path / 'nowhere'}: ")
    assert "Give a folder of parquet files" in line
    assert process.returncode
    assert not (tmp_path / "run").exists()


# Waits have an end


@pytest.fixture
def long_path(tmp_path, monkeypatch):
    """A TMPDIR in which no socket can have a name."""
    folder = tmp_path / ("a" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
    yield
    multiprocessing.current_process()._config.pop("tempdir", None)


@pytest.mark.parametrize("recipe", ["resnet", "resnet_torchdata", "resnet_webdataset"])
def test_workers_need_no_sockets(recipe, packed, long_path):
    loader, _ = build(recipe, packed["tar"], num_workers=1)
    assert next(iter(loader)).images.shape == (64, 3, 32, 32)


def test_a_shared_memory_that_is_full_is_one_line():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a batch needs 197,000
    try:
        with pytest.raises(
            UserError, match=r"^loader workers get no 1189632 bytes of /dev/shm: .* Give fewer --num_workers"
        ):
            build("resnet", "digits", num_workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [("resnet", {}), ("resnet_torchdata", {"pipeline": "dataloader"}), ("resnet_webdataset", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_worker_that_is_killed_is_one_line(packed, recipe, flags, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    before = {worker.pid for worker in multiprocessing.active_children()}
    loader, _ = build(recipe, packed["tar"], num_workers=1, **flags)
    batches = iter(loader)
    next(batches)
    for worker in multiprocessing.active_children():
        if worker.pid not in before:
            worker.kill()
    why = r"(DataLoader worker|\w+Error\)|\[Errno)"  # torch's word, or what reading from it ended with
    with pytest.raises(
        UserError, match=rf"^rank 3: a loader worker died, perhaps for want of memory \({why}"
    ) as raised:
        list(batches)
    assert raised.value.alone


def test_a_batch_that_never_comes_ends_the_program(tmp_path):
    """Here from a thread, as DALI's and torchdata's nodes'."""
    if (pid := os.fork()) == 0:
        os.dup2(os.open(tmp_path / "output", os.O_WRONLY | os.O_CREAT), 2)
        loaders.LIMIT = 2
        dataset = build("resnet", "digits")[0].dataset
        future = Future()
        loader = loaders.Loader(dataset, torch.device("cpu"), 0, read=lambda *_: (future.result() for _ in "a"))
        list(loader)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    said = (tmp_path / "output").read_text()
    assert said.count("\n") == 1
    assert said.startswith("error: batch 1 of the training images did not come for 2 s. The loader stands still: look")


IMPATIENT = """
import runpy, sys
from shared.images import loader as loaders
loaders.PATIENCE = 2
runpy.run_path("recipes/resnet.py", run_name="__main__")
"""


def test_a_signal_while_no_batch_comes_ends_the_run(runs, server, tmp_path):
    """Its workers are stopped, as by a storage that does not answer, and what they had ready is trained on."""
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    flags = [*FLAGS, "--epochs", "100", "--checkpointing_steps", "2", "--output_dir", str(runs / "still")]
    launch = server.start([*launch_command()[2:], str(tmp_path / "impatient.py"), *flags])
    metrics = runs / "still/metrics.jsonl"
    waiting(lambda: metrics.exists() and metrics.read_text().count("\n") > 4)
    (training,) = launch.workers
    launch.kill(children(training), signal.SIGSTOP)
    size = 0
    while size < (size := metrics.stat().st_size):
        time.sleep(2)
    launch.kill([training], signal.SIGTERM)
    process = launch.wait()
    assert process.returncode == 1
    last = process.stdout.strip().splitlines()[-1]
    assert last.startswith("error: batch ")
    assert "so the run stops (signal) without a checkpoint of its last steps; the same command resumes it" in last
    assert list((runs / "still/checkpoints").glob("step-*"))


def test_who_waits_sees_every_reason_to_stop(tmp_path, monkeypatch):
    """Signals and the file on every process: between two steps rank 0, which has the deadline, cannot tell others."""
    monkeypatch.delenv("RECIPES_JOB_FOLDER", raising=False)
    main, other = (SimpleNamespace(is_main_process=first, num_processes=1) for first in (True, False))
    former = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert Interruption(main, tmp_path, 0.5).noted() == "deadline"
        interruption = Interruption(other, tmp_path, 1000)
        assert interruption.noted() == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.noted() == "signal"
        (tmp_path / "STOP").touch()
        assert Interruption(other, tmp_path, 1000).noted() == "stop_file"
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def waiting(condition) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)

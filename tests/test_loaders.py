# SPDX-License-Identifier: Apache-2.0
"""The recipes of other loaders give resnet.py's batches on any topology, and after a resume."""

import importlib
import json
import shutil
from pathlib import Path

import datasets
import golden
import loading
import numpy as np
import pytest
import torch
from conftest import ROOT, launch_command, train
from loading import FORMATS, build, joined, same
from pictures import varied
from PIL import Image

from shared.errors import UserError
from shared.images import Batch
from shared.images.loader import STD

surroundings, packed = loading.surroundings, loading.packed


# Map-style loaders: resnet.py's batches


@pytest.fixture(scope="module")
def reference() -> list[Batch]:
    return joined("resnet", "digits")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "kind", "flags"),
    [
        *[("resnet_hf_datasets", kind, {}) for kind in ("digits", "parquet", "saved")],
        *[("resnet_torchdata", kind, {"pipeline": "nodes"}) for kind in ("digits", *FORMATS)],
        *[("resnet_torchdata", kind, {"pipeline": "dataloader"}) for kind in ("tar", "parquet")],
        *[("resnet_dali", kind, {}) for kind in FORMATS],
    ],
    ids=lambda value: value.get("pipeline", "") if isinstance(value, dict) else value.removeprefix("resnet_"),
)
@pytest.mark.parametrize(("size", "num_workers"), [(2, 2)])
def test_every_map_style_loader_gives_the_batches_of_the_base(
    packed, reference, recipe, kind, flags, size, num_workers
):
    batches = joined(recipe, packed[kind], size, num_workers, **flags)
    assert [same(*pair) for pair in zip(batches, reference, strict=True)] == [True] * 28


# DALI: the base's samples, and nearly its pixels


def garbled(image: bytes) -> bytes:
    """Return a JPEG whose header is intact, and names Huffman tables that are not there."""
    place = image.index(b"\xff\xda") + 6
    return image[:place] + b"\x33" + image[place + 1 :]


def overwritten(image: bytes) -> bytes:
    """Return a JPEG with the beginning of a file in its middle."""
    return image[: len(image) // 2] + image[:400] + image[len(image) // 2 + 400 :]


@pytest.fixture
def files(tmp_path) -> Path:
    """Write JPEGs of several kinds into class folders, with a PNG and one that EXIF turns: train/ 32, val/ 13."""
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {3: {"mode": "L"}, 4: {"kind": "PNG"}, 5: {"exif": exif}, 6: {"progressive": True, "subsampling": 0}}
    for number in range(45):
        folder = tmp_path / "files" / ("train" if number < 32 else "val") / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.jpg").write_bytes(varied(number, **kinds.get(number % 16, {})))
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
    "damage", [lambda image: image[:-300], garbled, overwritten], ids=["truncated", "garbled", "overwritten"]
)
def test_dali_names_and_replaces_what_the_base_does(files, damage, capfd):
    lost = [files / "train/a/00.jpg", files / "train/b/17.jpg", files / "val/a/34.jpg"]
    for path in lost:
        path.write_bytes(damage(path.read_bytes()))
    for flags in ({"global_batch_size": 16, "image_size": size} for size in (100, 40)):
        ours, theirs = (joined(name, files, **flags) for name in ("resnet_dali", "resnet"))
        assert all(same(*pair, 1) for pair in zip(ours, theirs, strict=True))
        assert ("DALI failed" in capfd.readouterr().err) == (damage is garbled)
        for batches in (ours, theirs):
            assert sorted(name.split(": ")[0] for batch in batches for name in batch.rejected) == sorted(
                map(str, lost)
            )


# torchdata: a position that is loaded into another loader


@pytest.fixture(scope="module")
def two_epochs() -> list[int]:
    """Return the digests of the base's steps."""
    loader, _ = build("resnet", "digits", global_batch_size=128, image_size=8)
    return [batch.digest for step in (0, 11) for batch in loader.starting_at(step)]


@pytest.mark.slow
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


# Real command lines: interrupted within an epoch, then resumed


FLAGS = ["--learning_rate", "0.001", "--norm", "group", "--image_size", "16", "--logging_steps", "1"]


FLAGS += ["--report_to", "none", "--num_workers", "1", "--global_batch_size", "32"]


@pytest.fixture(scope="module")
def whole(runs, server):
    """Train a dozen steps of each base without a break."""
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
def test_a_run_resumes_within_an_epoch_as_if_nothing_had_happened(runs, server, whole, name, base, processes):
    folder, options = runs / f"broken-{name}", {"recipe": ROOT / f"recipes/{name}.py", "server": server}
    train(folder, *FLAGS, "--max_steps", "6", "--checkpointing_steps", "5", **options)
    shutil.rmtree(folder / "checkpoints/step-00000006")  # as after a kill: what is left was saved within the loop
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


def test_hugging_face_data_that_does_not_fit_is_refused(packed, server, tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "text"))
    datasets.DatasetDict(dev=rows).save_to_disk(str(tmp_path / "dev"))
    for data, run, words in (
        (tmp_path / "text", {}, r"text, train has no Image among its columns text \(string\), label \(int64\)"),
        (tmp_path / "dev", {}, "has dev/ but no train/"),
        (packed["saved"], {"shuffle_block": 2}, "--shuffle_block 2 needs tar shards.* Leave it out"),
        (packed["saved"], {"val_fraction": 0.1}, "--val_fraction 0.1 has no effect"),
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

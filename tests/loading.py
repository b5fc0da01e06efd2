# SPDX-License-Identifier: Apache-2.0
"""The digits packed in each format, and loaders of data within this process: as any rank of a launch has them."""

import dataclasses
import importlib
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import ROOT, Result

from shared.images import Batch, Loader, Views, open_data
from shared.images.views import evaluation_view, training_view
from shared.order import EvaluationOrder, TrainingOrder

FORMATS = ("tar", "parquet", "folder")


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """Give a test file caches of its own, and let it import recipes and tools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCRATCH", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(ROOT / "recipes")
        patch.syspath_prepend(ROOT / "tools")
        yield


@pytest.fixture
def pack(surroundings):
    """Return tools/pack.py: `pack.main(words(...))` is its command."""
    return importlib.import_module("pack")


def words(pack, *arguments):
    """Return what tools/pack.py reads of such a command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pack.py", *map(str, arguments), "--num_workers", "2"])
        return pack.parse()


@pytest.fixture(scope="module")
def packed(surroundings, made_once) -> dict[str, Path | str]:
    """Return the digits in each format: packed in shards of 300, and as Hugging Face saves them."""

    def make(folder: Path) -> Result:
        pack = importlib.import_module("pack")
        for kind in FORMATS:
            pack.main(words(pack, "digits", folder / kind, "--format", kind, "--shard_size", "300"))
        parts = importlib.import_module("resnet_hf_datasets").embedded_digits()
        datasets.DatasetDict(parts).save_to_disk(str(folder / "saved"))
        return Result(subprocess.CompletedProcess([], 0, "", ""), folder)

    folder = made_once("packed", make).folder
    return {"digits": "digits"} | {kind: folder / kind for kind in (*FORMATS, "saved")}


def loaders_of(data, rank=0, size=1, num_workers=0, batch=64, shuffle_block=0, seed=0) -> tuple[Loader, Loader]:
    """Return one process's training and evaluation loader, without a recipe."""
    train, held_out = open_data(str(data), 0, seed, shuffle_block)
    order = TrainingOrder(len(train), batch, batch // size, rank, size, seed, train.blocks)
    view = partial(training_view, min_crop_area=0.5, horizontal_flip=True)
    training = Views(train, view, order, 32, seed)
    order = EvaluationOrder(len(held_out), 64, rank, size)
    evaluation = Views(held_out, partial(evaluation_view, eval_crop_ratio=1.0), order, 32, seed)
    return tuple(Loader(views, torch.device("cpu"), num_workers) for views in (training, evaluation))


class Mesh(dict):
    """Answer, for a process that was not launched, what `data_parallel` asks a DeviceMesh."""

    def __init__(self, rank: int, size: int):
        super().__init__(dp=SimpleNamespace(size=lambda: size))
        self.get_local_rank = lambda name: rank


def build(recipe: str, data, rank=0, size=1, num_workers=0, run=None, **flags):
    """Return one process's loaders, as the recipe builds them."""
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
    """Return each training batch, then each evaluation batch, of all processes together."""
    processes = [build(recipe, data, rank, size, num_workers, **flags) for rank in range(size)]
    batches = zip(*([batch for loader in loaders for batch in loader] for loaders in processes), strict=True)
    columns = (list(zip(*parts, strict=True)) for parts in batches)
    return [Batch(*map(torch.cat, fields[:5]), sum(fields[5]) % 2**64, sum(fields[6], ())) for fields in columns]


def same(ours: Batch, theirs: Batch, first: int = 0) -> bool:
    """Compare all that batches say of their samples; from field `first` on: 1 leaves out the pixels."""
    return all(map(torch.equal, ours[first:5], theirs[first:5])) and ours.digest == theirs.digest

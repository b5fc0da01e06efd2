# SPDX-License-Identifier: Apache-2.0
"""tools/checkpoints.py and tools/export.py: what they say of a run is what its files say."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, Result, python, train
from forked import Server
from safetensors.torch import load_file
from torchvision.models import get_model
from transformers import ViTForImageClassification

from shared.checkpoint import checkpoints, read_manifest, read_weights
from shared.errors import UserError
from shared.images.loader import MEAN, STD
from shared.models.vit import pixel_statistics

SMALL = ["--epochs", "1", "--warmup_epochs", "0.1", "--num_workers", "0", "--report_to", "none"]
SMALL += ["--global_batch_size", "16"]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


lister, exporter = load("checkpoints"), load("export")


@pytest.fixture(scope="module")
def fsdp(server, runs) -> Result:
    flags = [*SMALL, "--max_steps", "4", "--checkpointing_steps", "2"]
    launch = {"num_processes": 2, "config_file": "local_fsdp.yaml", "server": server}
    return train(runs / "tools-fsdp", *flags, recipe=ROOT / "recipes/vit.py", **launch)


@pytest.fixture(scope="module")
def zero(server, runs) -> Result:
    launch = {"num_processes": 2, "config_file": "local_zero2.yaml", "server": server}
    return train(runs / "tools-zero", *SMALL, "--max_steps", "4", recipe=ROOT / "recipes/vit.py", **launch)


@pytest.fixture(scope="module")
def damaged(runs, fsdp) -> Path:
    """The run with copies of its last checkpoint, each damaged in another way, and what a kill leaves of a save."""
    run = shutil.copytree(fsdp.folder, runs / "tools-damaged")
    flipped, bare, short, crowded, cut_off = (
        shutil.copytree(run / "checkpoints/step-00000004", run / "checkpoints" / name)
        for name in ("step-00000005", "step-00000006", "step-00000007", "step-00000008", "tmp-00000009")
    )
    tensors = bytearray((flipped / "tensors-00001.safetensors").read_bytes())
    tensors[-5] ^= 1
    (flipped / "tensors-00001.safetensors").write_bytes(tensors)
    (bare / "manifest.json").unlink()
    content = (short / "tensors-00000.safetensors").read_bytes()
    (short / "tensors-00000.safetensors").write_bytes(content[:-10])
    (crowded / "notes.txt").write_text("x")
    (cut_off / "manifest.json").unlink()
    return run


def table(text: str) -> list[list[str]]:
    """The rows' cells."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()[1:]]


def listed(capsys, command: str, folder: Path) -> tuple[int, list[list[str]]]:
    status = lister.main(lister.parse([command, str(folder)]))
    return status, table(capsys.readouterr().out)


# What is there


@pytest.mark.parametrize(("command", "state"), [("list", "complete"), ("verify", "OK")])
def test_the_table_says_what_the_manifests_say(demo, capsys, command, state):
    status, rows = listed(capsys, command, demo.folder)
    paths = checkpoints(demo.folder / "checkpoints")
    assert status == 0
    assert len(rows) == len(paths) >= 2
    for path, cells in zip(paths, rows, strict=True):
        manifest = read_manifest(path)
        size = sum(file["bytes"] for file in manifest["files"].values()) + (path / "manifest.json").stat().st_size
        saved = manifest["saved"].replace("T", " ").removesuffix("+00:00")
        assert [cells[0], cells[1], cells[2], cells[5]] == [str(manifest["step"]), saved, "ddp x 1", state]
        assert cells[3].removesuffix(" best") == f"{manifest['accuracy']:.2%}"
        assert cells[4] == f"{size / 1e6:.1f}"
    (best,) = [cells for cells in rows if cells[3].endswith("best")]
    assert best[3] == f"{max(read_manifest(path)['accuracy'] for path in paths):.2%} best"


BY_SIZE = {
    "2": "complete",
    "4": "complete",
    "5": "complete",
    "6": "damaged: manifest.json is missing",
    "7": r"damaged: tensors-00000.safetensors has \d+ bytes instead of \d+",
    "8": "damaged: notes.txt is not in its manifest.json",
    "9": "unfinished",
}
BY_CONTENT = BY_SIZE | {
    "2": "OK",
    "4": "OK",
    "5": "damaged: tensors-00001.safetensors is not what was written: its SHA-256 differs",
}


def test_list_compares_names_and_sizes(damaged, capsys):
    status, rows = listed(capsys, "list", damaged)
    assert status == 0
    assert [row[0] for row in rows] == list(BY_SIZE)
    assert all(re.fullmatch(BY_SIZE[row[0]], row[5]) for row in rows), rows
    assert [row[2] for row in rows if row[2] != "-"] == ["fsdp x 2"] * 5
    assert rows[0][3] == "-"  # of within an epoch
    assert [row[0] for row in rows if row[3].endswith("best")] == ["5"]


def test_verify_reads_every_byte_and_fails(damaged):
    process = python(ROOT / "tools/checkpoints.py", "verify", damaged)
    rows = table(process.stdout)
    assert process.returncode == 1, process.stderr
    assert all(re.fullmatch(BY_CONTENT[row[0]], row[5]) for row in rows), rows
    assert len(rows) == len(BY_CONTENT)


def test_an_unfinished_folder_is_no_damage(fsdp, tmp_path, capsys):
    run = shutil.copytree(fsdp.folder, tmp_path / "run")
    (run / "checkpoints/tmp-00000006").mkdir()
    (run / "checkpoints/quarantined-00000008").mkdir()
    status, rows = listed(capsys, "verify", run)
    assert (status, [row[5] for row in rows]) == (0, ["OK", "OK", "unfinished", "quarantined"])


@pytest.mark.parametrize(
    ("sizes", "world_size", "text"),
    [
        ({}, 4, "fsdp x 4"),
        ({"tensor_parallel_size": 1}, 1, "fsdp x 1"),
        ({"tensor_parallel_size": 2}, 4, "tp x 2, fsdp x 2"),
        ({"pipeline_parallel_size": 2}, 2, "pp x 2"),
    ],
)
def test_a_network_split_by_its_recipe_says_so(sizes, world_size, text):
    assert lister.topology({"strategy": "fsdp", "world_size": world_size, **sizes}) == text


@pytest.mark.parametrize("made", ["", "run", "run/checkpoints"])
def test_there_is_nothing_to_list(tmp_path, made):
    (tmp_path / made).mkdir(parents=True, exist_ok=True)
    with pytest.raises(UserError, match=r"run.* (is not a folder|has no folder checkpoints|is empty)\. \w+"):
        lister.main(lister.parse(["list", str(tmp_path / "run")]))


# Export


def export(server: Server, result: Result, out: Path) -> list[str]:
    """From another folder than the one that the run was started in."""
    process = python(ROOT / "tools/export.py", result.folder, out, cwd=out.parent, server=server)
    assert process.returncode == 0, process.stdout + process.stderr
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert (out / "model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    return process.stdout.splitlines()


def check_accuracy(lines: list[str], result: Result) -> None:
    accuracy = f"accuracy {result.summary['accuracy']:.2%}"
    evaluated, own = [line for line in lines if "accuracy" in line]
    assert evaluated.startswith(f"evaluated as written: {accuracy}, eval loss ")
    assert evaluated.endswith(", 360 images")
    assert own == f"the run's own at step-{result.summary['steps']:08d}: {accuracy}"


def same(ours: dict[str, torch.Tensor], result: Result) -> None:
    reference = read_weights(checkpoints(result.folder / "checkpoints")[-1])
    assert ours.keys() == reference.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in reference.items())


def test_a_resnet_is_built_again_from_what_is_written(server, demo, tmp_path):
    lines = export(server, demo, tmp_path / "weights")
    check_accuracy(lines, demo)
    weights = load_file(tmp_path / "weights/model.safetensors")
    same(weights, demo)
    config = json.loads((tmp_path / "weights/config.json").read_text())
    assert (config["recipe"], config["norm"], config["image_size"]) == ("resnet", "batch", 32)
    assert config["classes"] == [str(digit) for digit in range(10)]
    get_model(config["model"], num_classes=config["num_classes"]).load_state_dict(weights)


@pytest.fixture(scope="module")
def from_zero(server, zero, tmp_path_factory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("from-zero") / "weights"
    return out, export(server, zero, out)


def check_vit(folder: Path, result: Result) -> None:
    model = ViTForImageClassification.from_pretrained(folder)
    same(dict(model.state_dict()), result)
    assert model.config.id2label == {digit: str(digit) for digit in range(10)}
    mean, std = pixel_statistics(folder)
    assert mean == pytest.approx(MEAN, rel=1e-6)
    assert std == pytest.approx(STD, rel=1e-6)


def test_shards_of_fsdp_become_a_folder_for_transformers(server, fsdp, tmp_path):
    check_accuracy(export(server, fsdp, tmp_path / "weights"), fsdp)
    check_vit(tmp_path / "weights", fsdp)


def test_shards_of_zero_become_a_folder_for_transformers(zero, from_zero):
    check_accuracy(from_zero[1], zero)
    check_vit(from_zero[0], zero)


def test_a_training_starts_from_the_written_weights(zero, from_zero, server, runs):
    """With a learning rate of 0 they are evaluated as they are."""
    flags = [*SMALL, "--pretrained", str(from_zero[0]), "--max_steps", "1", "--learning_rate", "0"]
    tuned = train(runs / "tools-tuned", *flags, recipe=ROOT / "recipes/vit.py", server=server)
    assert tuned.lines[-1]["accuracy"] == pytest.approx(zero.summary["accuracy"], abs=1.5 / 360)
    assert tuned.lines[-1]["eval_loss"] == pytest.approx(zero.lines[-1]["eval_loss"], rel=1e-5)


# Refusals


def test_the_newest_whole_checkpoint_is_taken(damaged, capsys):
    assert exporter.choose(damaged / "checkpoints", None).name == "step-00000004"
    passed = capsys.readouterr().err.splitlines()
    assert [re.search(r"step-0+(\d)", line)[1] for line in passed] == ["8", "7", "6", "5"]
    assert exporter.choose(damaged / "checkpoints", "step-00000002").name == "step-00000002"
    with pytest.raises(UserError, match=r"step-00000005 is not a complete checkpoint\. Leave --checkpoint out"):
        exporter.choose(damaged / "checkpoints", "step-00000005")
    with pytest.raises(UserError, match=r"has no step-00000003\. There are: step-00000002, "):
        exporter.choose(damaged / "checkpoints", "step-00000003")


def test_no_checkpoint_and_none_that_is_whole(damaged, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        exporter.choose(tmp_path, None)
    shutil.copytree(damaged / "checkpoints/step-00000006", tmp_path / "step-00000006")
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        exporter.choose(tmp_path, None)


def test_what_cannot_be_exported_is_refused_in_one_line(server, fsdp, damaged, tmp_path):
    """Data gone is found before anything is written."""
    run = shutil.copytree(fsdp.folder, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["identity"]["data"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    process = python(ROOT / "tools/export.py", run, tmp_path / "weights", server=server)
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert re.fullmatch(r"error: --data \S+/gone does not exist\. .+", line)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    for run_folder, out, words in (
        (tmp_path / "no", tmp_path / "weights", "is not a run"),
        (run, run, "exists. Give another folder"),
        (run, tmp_path / "no/weights", "Make it first"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            exporter.refuse(run_folder, out)
    with pytest.raises(UserError, match="--images -1 is not a valid number of images"):
        exporter.refuse(run, tmp_path / "weights", -1)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: there is no GPU here"):
            exporter.refuse(run, tmp_path / "weights", 0, "cuda")


def test_an_accuracy_is_compared_to_the_runs(capsys):
    result, path = {"accuracy": 0.9, "eval_loss": 0.3, "eval_samples": 1000}, Path("step-00000004")
    assert exporter.compare(result, 0.904, path, 1000, 1000)
    assert not exporter.compare(result, 0.906, path, 1000, 1000)
    assert exporter.compare(result, 0.92, path, 50, 50)  # one image
    assert not exporter.compare(result, 0.93, path, 50, 50)
    # Of a part: 4 x sqrt(0.935 x 0.065 / 1000 x 49000 / 49999) = 0.0309, and 0.005.
    assert exporter.compare(result, 0.934, path, 1000, 50_000)
    assert not exporter.compare(result, 0.936, path, 1000, 50_000)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "evaluated as written: accuracy 90.00%, eval loss 0.3000, 1000 images"
    assert lines[-2] == lines[0] + " of 50000"
    assert exporter.compare(result, None, path, 1000, 1000) is None


def test_a_check_that_fails_leaves_the_weights_and_says_which_not_to_trust(server, fsdp, tmp_path):
    """A run whose record holds another accuracy; the data that it names is gone, and given again."""
    run = shutil.copytree(fsdp.folder, tmp_path / "run")
    manifest = run / "checkpoints/step-00000004/manifest.json"
    manifest.write_text(json.dumps(read_manifest(manifest.parent) | {"accuracy": 1.0}))
    config = json.loads((run / "config.json").read_text())
    config["identity"]["data"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    words = [ROOT / "tools/export.py", run]
    process = python(*words, tmp_path / "weights", "--data", "digits", "--images", "100", server=server)
    out = tmp_path / "weights"
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("error: the weights have the accuracy ")
    assert f" and had 100.00% in the run: do not trust {out}/config.json and {out}/" in process.stderr.splitlines()[-1]
    check_vit(out, fsdp)
    check = json.loads((out / "check.json").read_text())
    assert (check["agrees"], check["eval_samples"], check["held_out_images"]) == (False, 100, 360)
    assert 0 < check["accuracy"] < 0.9
    assert f"written: {out}" in process.stdout.splitlines()
    exporter.main(exporter.parse([str(run), str(tmp_path / "unchecked"), "--no_check"]))  # without its data
    check_vit(tmp_path / "unchecked", fsdp)
    assert not (tmp_path / "unchecked/check.json").exists()


def test_a_failure_leaves_nothing_behind(tmp_path):
    def fail():
        with exporter.beside(tmp_path / "weights") as folder:
            (folder / "model.safetensors").write_bytes(b"x")
            assert [path.parent for path in tmp_path.rglob("*.safetensors")] == [folder]
            raise UserError("the accuracy differs")

    with pytest.raises(UserError, match="differs"):
        fail()
    assert not list(tmp_path.iterdir())

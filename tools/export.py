# SPDX-License-Identifier: Apache-2.0
"""The plain weights of a run's checkpoint, whatever strategy wrote it, and proof that they are the network's.

    python tools/export.py runs/vit-1d2f3a4b weights                              # the newest whole checkpoint
    python tools/export.py runs/vit-1d2f3a4b weights --checkpoint step-00000308

A ViT becomes a folder for transformers: `ViTForImageClassification.from_pretrained("weights")`, or a recipe's
`--pretrained weights`. Any other network becomes model.safetensors, beside a config.json with the recipe's
configuration and the classes. What was written is read again and evaluated on the run's held-out images, in fp32 on
one CPU process, with what the run's own recipe builds; the accuracy must be the checkpoint's.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers.utils import logging

import shared
from shared.checkpoint import checkpoints, damage, read_manifest, read_weights
from shared.process import UserError, begin, expand_home

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.005  # of accuracy; bf16's rounding turns a few images
# What splits a run over processes.
ALONE = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "sync_batch_norm": False, "compile": False}
LAUNCHER = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def main(arguments: argparse.Namespace) -> None:
    run_folder, out = arguments.run_folder, arguments.out
    refuse(run_folder, out)
    checkpoint = choose(run_folder / "checkpoints", arguments.checkpoint)
    print(f"from {checkpoint}", flush=True)
    run = json.loads((run_folder / "config.json").read_text())
    run["run_config"]["data"] = arguments.data or run["identity"]["data"]  # whole, not relative to the run's start
    run["config"] |= {"pretrained": arguments.pretrained} if arguments.pretrained else {}
    recipe = load_recipe(find_recipe(run))
    with beside(out) as folder:
        with as_user_errors(recipe):
            config = recipe_config(recipe, run)
            accelerator, loader = held_out(recipe, run, config)
            network = write(folder, recipe, run, config, read_weights(checkpoint), loader)
            result = evaluate(recipe, accelerator, network(), loader)
        make_readable(folder)
        compare(result, read_manifest(checkpoint).get("accuracy"), checkpoint)
    print(f"written: {out}")


def refuse(run_folder: Path, out: Path) -> None:
    """Before anything is read: raises UserError."""
    if not (run_folder / "config.json").is_file():
        raise UserError(
            f"{run_folder} is no run: it has no config.json. Give the folder that the recipe printed first."
        )
    if os.path.lexists(out):
        raise UserError(f"{out} exists. Give another folder, or remove it.")
    if not out.resolve().parent.is_dir():
        raise UserError(f"{out.resolve().parent} is no folder. Make it first.")


def choose(folder: Path, name: str | None) -> Path:
    """The named checkpoint or the newest whole one; raises UserError where it is damaged or there is none."""
    there = checkpoints(folder)
    if not there:
        raise UserError(f"{folder} holds no checkpoint. Train to the first one: see --checkpointing_steps.")
    if name and folder / name not in there:
        raise UserError(f"{folder} has no {name}. There are: {', '.join(path.name for path in there)}.")
    for path in [folder / name] if name else reversed(there):
        reason = damage(path)
        if reason is None:
            return path
        print(f"{path} is damaged: {reason}", file=sys.stderr, flush=True)
    others = "Leave --checkpoint out to take the newest whole one." if name else "Go on with the run to write another."
    raise UserError(f"{f'{folder / name} is no' if name else f'{folder} holds no'} whole checkpoint. {others}")


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder that gets the name `out` at the end, or is removed."""
    folder = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, as Ctrl-C is, so that it is removed
    try:
        folder.mkdir()
        yield folder
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# The run's own recipe


def find_recipe(run: dict) -> Path:
    """Beside the `shared` that the run used, or as it was typed, or this repository's of the same name."""
    typed = Path(run["command"][1])
    places = [Path(run["shared"]).parent.parent / typed.name, typed, ROOT / "recipes" / typed.name]
    for path in places:
        if path.is_file():
            return path.resolve()
    raise UserError(f"the run's recipe is gone: no {' and no '.join(map(str, places))}. Put it back.")


def load_recipe(path: Path) -> ModuleType:
    """The recipe as a module. Its folder comes first, as in `python RECIPE`: it may have a `shared` of its own."""
    sys.path.insert(0, str(path.parent))
    own = path.parent / "shared"
    if own.is_dir() and own.resolve() != Path(shared.__file__).resolve().parent:
        for name in [name for name in sys.modules if name.split(".")[0] == "shared"]:
            del sys.modules[name]  # this file keeps what it has imported
    spec = importlib.util.spec_from_file_location(path.stem, path)
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = recipe  # a dataclass looks its module up
    spec.loader.exec_module(recipe)
    return recipe


@contextlib.contextmanager
def as_user_errors(recipe: ModuleType) -> Iterator[None]:
    """What the recipe's own `shared` refuses becomes an error of ours."""
    theirs = sys.modules[recipe.RunConfig.__module__].UserError
    try:
        yield
    except theirs as error:
        raise UserError(str(error)) from error


def recipe_config(recipe: ModuleType, run: dict):
    """The recipe's Config for one process, whose batches are those that a process of the run had."""
    config = dataclasses.replace(known(recipe.Config, run["config"]), **fields(recipe.Config, ALONE))
    config.gradient_accumulation_steps *= run["data_parallel_size"]
    return config


def known(kind: type, values: dict):
    return kind(**fields(kind, values))


def fields(kind: type, values: dict) -> dict:
    """Those that the dataclass has: the run's recipe may be an older or a newer one."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def held_out(recipe: ModuleType, run: dict, config):
    """An Accelerator of one CPU process, and the recipe's loader of the held-out images."""
    for name in [name for name in os.environ if name.startswith(LAUNCHER)]:
        del os.environ[name]
    os.environ |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    run_config = known(recipe.RunConfig, run["run_config"] | {"num_workers": 0, "report_to": "none"})
    # Without the sizes of a split, for which it would make a process group of one.
    asked = SimpleNamespace(**{name: value for name, value in vars(config).items() if name not in ALONE})
    accelerator = recipe.build_accelerator(run_config.seed, asked)
    return accelerator, recipe.build_loaders(accelerator, run_config, config)[1]


# Writing


def write(
    folder: Path, recipe: ModuleType, run: dict, config, weights: dict[str, Tensor], loader
) -> Callable[[], torch.nn.Module]:
    """Fill the folder; returns what reads the network from it."""
    mean, std = ((values.flatten() / 255).tolist() for values in (loader.mean, loader.std))
    if any(name.startswith("vit.embeddings.") for name in weights):
        write_vit(folder, vit_config(recipe, config, run["classes"]), weights)
        size = {"height": config.image_size, "width": config.image_size}
        ViTImageProcessor(size=size, image_mean=mean, image_std=std).save_pretrained(folder)
        return lambda: ViTLogits.from_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    classes = {"num_classes": len(run["classes"]), "classes": run["classes"]}
    values = {"recipe": recipe.__name__} | run["config"] | classes | {"image_mean": mean, "image_std": std}
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    return lambda: read(folder, recipe, config)


def write_vit(folder: Path, network: ViTConfig, weights: dict[str, Tensor]) -> None:
    with torch.device("meta"):  # the weights take its place
        model = ViTForImageClassification(network)
    fill(model, weights)
    model.save_pretrained(folder)


def vit_config(recipe: ModuleType, config, classes: list[str]) -> ViTConfig:
    """Sizes by the recipe's name for them, or of what it fine-tuned, and the classes by name."""
    if getattr(config, "pretrained", ""):
        network = ViTConfig.from_pretrained(recipe.find_pretrained(config.pretrained))
        network.image_size = config.image_size
    else:
        network = recipe.vit_config(config.model, config.image_size, config.patch_size, len(classes), 0.0)
    network.id2label = dict(enumerate(classes))
    network.label2id = {name: number for number, name in enumerate(classes)}
    return network


def read(folder: Path, recipe: ModuleType, config) -> torch.nn.Module:
    """The recipe's network with what was written, as a reader of the folder would build it."""
    model = recipe.build_model(config, json.loads((folder / "config.json").read_text())["num_classes"])
    fill(model, load_file(folder / "model.safetensors"))
    return model


def fill(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Raises UserError where names or shapes are not the network's."""
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:300]
        remedy = "Was the recipe changed since? Put back the one that made the run."
        raise UserError(f"the checkpoint's weights are not those of the recipe's network: {line} {remedy}") from error


def make_readable(folder: Path) -> None:
    """safetensors makes files for their owner alone; weights are given to others."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


# Proof


class ViTLogits(ViTForImageClassification):
    """As transformers reads it; gives the logits alone, as the recipes' networks do."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(pixel_values=images).logits


def evaluate(recipe: ModuleType, accelerator, model: torch.nn.Module, loader) -> dict[str, float]:
    """Top-1 accuracy and loss over the held-out images, each counted once, in fp32."""
    model.float().eval()
    evaluation = recipe.Evaluation()
    with torch.no_grad():
        for batch in loader:
            evaluation.add(model(batch.images), batch.labels, batch.valid)
    return evaluation.result(accelerator, len(loader.dataset))


def compare(result: dict[str, float], expected: float | None, checkpoint: Path) -> None:
    """Raises UserError where the accuracy is not the run's. One image may always differ: a tie may be rounded."""
    accuracy, images = result["accuracy"], result["eval_samples"]
    print(f"evaluated as written: accuracy {accuracy:.2%}, eval loss {result['eval_loss']:.4f}, {images} images")
    if expected is None:
        print(f"{checkpoint.name} is of within an epoch: the run has no accuracy of it to compare")
        return
    print(f"the run's own at {checkpoint.name}: accuracy {expected:.2%}")
    if abs(accuracy - expected) > max(TOLERANCE, 1.01 / images):
        raise UserError(
            f"the weights have the accuracy {accuracy:.2%} here and had {expected:.2%} in the run. "
            "Were the recipe or the data changed since? Put back those of the run."
        )


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="of a run; its first line of output")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    parser.add_argument("--checkpoint", metavar="step-XXXXXXXX", help="instead of the newest whole one")
    parser.add_argument("--data", help="where the run's data lies now, if it was moved")
    parser.add_argument("--pretrained", help="where the network that the run fine-tuned lies now, likewise")
    return parser.parse_args(words)


if __name__ == "__main__":
    logging.disable_progress_bar()
    begin()
    try:
        main(parse(expand_home(sys.argv[1:])))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")

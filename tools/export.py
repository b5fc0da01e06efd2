# SPDX-License-Identifier: Apache-2.0
"""Export the plain weights of a run's checkpoint, whatever strategy wrote it, and check that they are the network's.

    python tools/export.py runs/vit-1d2f3a4b weights                              # the newest complete checkpoint
    python tools/export.py runs/vit-1d2f3a4b weights --checkpoint step-00000308
    python tools/export.py runs/vit-1d2f3a4b weights --ema                        # of a run with --ema_decay

A network of transformers, such as the ViTs' or llm.py's, becomes a folder for that library, with the image processor
or the tokenizer: for `AutoModelForCausalLM.from_pretrained("weights")`, or a recipe's `--pretrained weights`. Any
other network becomes model.safetensors, beside a config.json with the recipe's configuration and the classes. The
folder appears only when it is complete. Then it is read again and evaluated on the run's held-out images, or --images
of them, or documents, in fp32 by one process, with what the run's own recipe builds; accuracy or bits per byte must be
the checkpoint's. The result is in check.json beside the weights: without it they are not checked.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from recipe_file import as_user_errors, load_recipe
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, ViTImageProcessor
from transformers.utils import logging

from shared.checkpoint import checkpoints, damage, read_manifest, read_weights
from shared.config import SIZES, expand_home
from shared.errors import UserError
from shared.files import complete, write_json
from shared.lifetime import begin
from shared.models.weights import find_pretrained
from shared.text.tokenizer import END

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.005  # of accuracy, or a share of the bits per byte: bf16's rounding
# The settings for one process: nothing is split, and nothing compiled.
ALONE = dict.fromkeys(SIZES, 1) | {"sync_batch_norm": False, "compile": False}
LAUNCHER = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def main(arguments: argparse.Namespace) -> None:
    run_folder, out = arguments.run_folder, arguments.out
    refuse(run_folder, out, arguments.images, arguments.device)
    checkpoint = choose(run_folder / "checkpoints", arguments.checkpoint)
    print(f"from {checkpoint}", flush=True)
    run = json.loads((run_folder / "config.json").read_text())
    if "vocabulary" in run and arguments.images:
        raise UserError(f"--images {arguments.images}: the run's data is text. Leave it out.")
    run["data_config"]["data"] = arguments.data or run["identity"]["data"]  # an absolute path
    run["config"] |= {"pretrained": arguments.pretrained} if arguments.pretrained else {}
    recipe = load_recipe(find_recipe(run))
    with as_user_errors(recipe):
        config, images = recipe_config(recipe, run), known(recipe.CONFIGS[1], run["data_config"])
        # First: where the data is gone, nothing is written.
        opened = None if arguments.no_check else held_out(recipe, run, images, config, arguments.device)
        with beside(out) as folder:
            weights = read_average(checkpoint) if arguments.ema else read_weights(checkpoint)
            if "vocabulary" in run:  # text
                network = write_language_model(folder, recipe, run, images, config, weights)
                write_tokenizer(folder, run_folder, config)
            else:
                network = write(folder, recipe, run, images, config, weights)
            make_readable(folder)
    print(f"written: {out}", flush=True)
    if opened:
        prove(recipe, *opened, network, checkpoint, arguments)


def refuse(run_folder: Path, out: Path, images: int = 0, device: str = "cpu") -> None:
    """Raise UserError for arguments that cannot work, before anything is read."""
    if images < 0:
        raise UserError(f"--images {images} is not a valid number of images. Give 1 or more, or leave it out for all.")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU here. Leave it out, or give --device cpu.")
    if not (run_folder / "config.json").is_file():
        raise UserError(
            f"{run_folder} is not a run's folder: it has no config.json. Give the one that the recipe printed."
        )
    if os.path.lexists(out):
        raise UserError(f"{out} exists. Give another folder, or remove it.")
    if not out.resolve().parent.is_dir():
        raise UserError(f"{out.resolve().parent} is not a folder. Make it first.")


def choose(folder: Path, name: str | None) -> Path:
    """Return the named checkpoint or the newest whole one; raises UserError where it is damaged or there is none."""
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
    others = "Leave --checkpoint out to take the newest complete one." if name else "Resume the run to write another."
    what = f"{folder / name} is not a" if name else f"{folder} holds no"
    raise UserError(f"{what} complete checkpoint. {others}")


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """Make a folder that gets the name `out` at the end, or is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raises, as Ctrl-C does, so that it is removed
    with complete(out) as folder:
        folder.mkdir()
        yield folder


# The run's own recipe


def find_recipe(run: dict) -> Path:
    """Find the recipe beside the `shared` that the run used, or as it was typed, or this repository's of the same
    name."""
    typed = Path(run["command"][1])
    places = [Path(run["shared"]).parent.parent / typed.name, typed, ROOT / "recipes" / typed.name]
    for path in places:
        if path.is_file():
            return path.resolve()
    raise UserError(f"the run's recipe is gone: no {' and no '.join(map(str, places))}. Put it back.")


def recipe_config(recipe: ModuleType, run: dict):
    """Return the recipe's Config for one process, with batches as large as those of one process of the run."""
    config = dataclasses.replace(known(recipe.Config, run["config"]), **fields(recipe.Config, ALONE))
    config.gradient_accumulation_steps *= run["data_parallel_size"]
    return config


def known(kind: type, values: dict):
    return kind(**fields(kind, values))


def fields(kind: type, values: dict) -> dict:
    """Return those values that the dataclass has: the run's recipe may be an older or a newer one."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def held_out(recipe: ModuleType, run: dict, images, config, device: str) -> tuple:
    """Return an Accelerator of one process on the device, in fp32, and the recipe's loader of the held-out images."""
    for name in [name for name in os.environ if name.startswith(LAUNCHER)]:
        del os.environ[name]
    os.environ |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    torch.backends.cudnn.allow_tf32 = False
    run_config = known(recipe.RunConfig, run["run_config"] | {"report_to": "none"})
    # Without the sizes of a split: they would need a process group.
    asked = SimpleNamespace(**{name: value for name, value in vars(config).items() if name not in ALONE})
    accelerator = recipe.build_accelerator(run_config.seed, asked)
    return accelerator, recipe.build_loaders(accelerator, run_config, images, config)[1]


# Writing


def read_average(checkpoint: Path) -> dict[str, Tensor]:
    """Return name -> average of a checkpoint's weights and of batch norm's statistics, as models/ema.py keeps them:
    fc.weight.ema, bn1.weight.ema_running_mean. Buffers without an average are the run's own."""
    moments, averages = read_weights(checkpoint, "optimizer.state."), {}
    for name, tensor in moments.items():
        parameter, _, key = name.rpartition(".")
        if key == "ema":
            averages[parameter] = tensor
        elif key.startswith("ema_"):
            averages[f"{parameter.removesuffix('weight')}{key.removeprefix('ema_')}"] = tensor
    if not averages:
        raise UserError(f"{checkpoint} has no average of the weights. Leave --ema out, or train with --ema_decay.")
    return read_weights(checkpoint) | averages


def write(
    folder: Path, recipe: ModuleType, run: dict, images, config, weights: dict[str, Tensor]
) -> Callable[[Path], torch.nn.Module]:
    """Fill the folder; return a function that loads the network from it, wherever it lies by then."""
    mean, std = ([value / 255 for value in values] for values in pixel_statistics(recipe, config))
    with torch.device("meta"):
        network = recipe.build_model(images, config, len(run["classes"]), seed=0)
    kinds = (kind for kind in type(network).__mro__ if kind.__module__.startswith("transformers."))
    if kind := next(kinds, None):  # the library's own class, which anyone can load
        write_for_transformers(folder, kind, network.config, run["classes"], weights)
        size = {"height": images.image_size, "width": images.image_size}
        ViTImageProcessor(size=size, image_mean=mean, image_std=std).save_pretrained(folder)
        return lambda folder: Logits(kind.from_pretrained(folder))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    classes = {"num_classes": len(run["classes"]), "classes": run["classes"]}
    values = (
        {"recipe": recipe.__name__}
        | run["data_config"]
        | run["config"]
        | classes
        | {"image_mean": mean, "image_std": std}
    )
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    return lambda folder: read(folder, recipe, images, config)


def write_language_model(
    folder: Path, recipe: ModuleType, run: dict, text, config, weights: dict[str, Tensor]
) -> Callable[[Path], torch.nn.Module]:
    """Fill the folder; return a function that loads the recipe's network from it, as for fine-tuning."""
    with torch.device("meta"):
        network = recipe.build_model(text, config, run["vocabulary"], seed=0)
    kind = next(kind for kind in type(network).__mro__ if kind.__module__.startswith("transformers."))
    first = {id(parameter): name for name, parameter in network.named_parameters()}
    every = network.named_parameters(remove_duplicate=False)  # a tied one has a name more than the checkpoint
    fill(network, weights | {name: weights[first[id(parameter)]] for name, parameter in every})
    network.__class__ = kind
    network.tie_weights()
    network.save_pretrained(folder)
    return lambda folder: recipe.build_model(
        text, dataclasses.replace(config, pretrained=str(folder)), run["vocabulary"], seed=0
    )


def write_tokenizer(folder: Path, run_folder: Path, config) -> None:
    """Write the run's own tokenizer, or the pretrained network's; --tokenizer bytes needs none."""
    if config.pretrained:
        AutoTokenizer.from_pretrained(find_pretrained(config.pretrained)).save_pretrained(folder)
    elif (run_folder / "tokenizer.json").exists():
        library = Tokenizer.from_file(str(run_folder / "tokenizer.json"))
        tokens = {"bos_token": END, "eos_token": END}
        PreTrainedTokenizerFast(tokenizer_object=library, **tokens).save_pretrained(folder)


def pixel_statistics(recipe: ModuleType, config) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation, in [0, 255], by which the recipe's loaders normalise."""
    own = getattr(config, "pretrained", "") and recipe.pixel_statistics(recipe.find_pretrained(config.pretrained))
    loaders = sys.modules[recipe.Loader.__module__]
    return own or (loaders.MEAN, loaders.STD)


def write_for_transformers(folder: Path, kind: type, config, classes: list[str], weights: dict[str, Tensor]) -> None:
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    with torch.device("meta"):  # without memory: the weights replace its own
        network = kind(config)
    fill(network, weights)
    network.save_pretrained(folder)


def read(folder: Path, recipe: ModuleType, images, config) -> torch.nn.Module:
    """Return the recipe's network with what was written, as a reader of the folder would build it."""
    model = recipe.build_model(images, config, json.loads((folder / "config.json").read_text())["num_classes"], seed=0)
    fill(model, load_file(folder / "model.safetensors"))
    return model


def fill(model: torch.nn.Module, weights: dict[str, Tensor]) -> None:
    """Load the weights into the network; raises UserError where names or shapes differ."""
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:300]
        remedy = "Was the recipe changed since? Put back the one that made the run."
        raise UserError(f"the checkpoint's weights are not those of the recipe's network: {line} {remedy}") from error


def make_readable(folder: Path) -> None:
    """Let others read the weights: safetensors makes files for their owner alone."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


# The check


class Logits(torch.nn.Module):
    """A network of transformers that returns only the logits, as the recipes' do."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(pixel_values=images).logits


def prove(recipe: ModuleType, accelerator, loader, network, checkpoint: Path, arguments: argparse.Namespace) -> None:
    """Evaluate what was written, print the result and write it beside the weights; raises UserError where it
    differs."""
    out, total, is_text = arguments.out, len(loader.dataset), hasattr(loader.dataset, "byte_count")
    images = min(arguments.images or total, total)
    try:
        with as_user_errors(recipe):
            measured = evaluate_text if is_text else partial(evaluate, images=images)
            result = measured(recipe, accelerator, network(out), loader)
    except UserError as error:
        raise UserError(f"{error} {out} is complete, but not checked.") from error
    name, form, unit = ("bits_per_byte", ".4f", "sequences") if is_text else ("accuracy", ".2%", "images")
    expected = read_manifest(checkpoint).get(f"ema_{name}" if arguments.ema else name)
    agrees = compare_text(result, expected) if is_text else compare(result, expected, checkpoint, images, total)
    record = {"checkpoint": str(checkpoint), "averaged": arguments.ema, "device": str(accelerator.device)}
    record |= {f"held_out_{unit}": total, **result, f"{name}_of_the_run": expected, "agrees": agrees}
    write_json(out / "check.json", record)
    if agrees is False:
        files = " and ".join(str(out / name) for name in ("config.json", "*.safetensors"))
        words = name.replace("_", " ")
        raise UserError(
            f"the weights have the {words} {result[name]:{form}} here and had {expected:{form}} in the run: do not "
            f"trust {files}. Were the recipe or the data changed since? Export again with those of the run."
        )


def evaluate_text(recipe: ModuleType, accelerator, model: torch.nn.Module, loader) -> dict[str, float]:
    """Return bits per byte, perplexity and loss over the held-out sequences, in fp32."""
    model.float().eval().to(accelerator.device)
    evaluation = recipe.Evaluation()
    with torch.no_grad():
        for batch in loader:
            evaluation.add(model(batch.tokens, batch.labels, batch.positions), batch.labels)
    return evaluation.result(accelerator, len(loader.dataset), loader.dataset.byte_count)


def compare_text(result: dict[str, float], expected: float | None) -> bool | None:
    """Return whether the bits per byte are the run's, but for bf16's rounding; None where the run has none."""
    bits = result["bits_per_byte"]
    run = "none, it was saved within an epoch" if expected is None else f"{expected:.4f}"
    print(f"evaluated as written: bits per byte {bits:.4f}, {result['eval_samples']} sequences; the run's own: {run}")
    return None if expected is None else abs(bits / expected - 1) <= TOLERANCE


def evaluate(recipe: ModuleType, accelerator, model: torch.nn.Module, loader, images: int) -> dict[str, float]:
    """Return top-1 accuracy and loss over this number of the held-out images, evenly spaced, each counted once, in
    fp32."""
    model.float().eval().to(accelerator.device)
    total, evaluation, taken = len(loader.dataset), recipe.Evaluation(), 0
    chosen = torch.zeros(total + 1, dtype=torch.bool)  # the last is for index -1, a place without an image
    chosen[torch.linspace(0, total - 1, images).round().long()] = True
    with torch.no_grad():
        for batch in loader:
            rows = slice(None) if images == total else chosen[batch.indices].nonzero()[:, 0].to(accelerator.device)
            if len(labels := batch.labels[rows]):
                evaluation.add(model(batch.images[rows]), labels, batch.valid[rows])
                taken += len(labels)
    if not taken:
        raise UserError(f"none of the {images} images can be decoded. Give more --images.")
    return evaluation.result(accelerator, total if images == total else taken)


def compare(
    result: dict[str, float], expected: float | None, checkpoint: Path, images: int, total: int
) -> bool | None:
    """Return whether the accuracy is the run's; None where the run has none. One image may always differ, since
    rounding may break a tie; a part of the images may differ by four standard deviations of such a draw."""
    accuracy = result["accuracy"]
    print(f"evaluated as written: accuracy {accuracy:.2%}, eval loss {result['eval_loss']:.4f}, ", end="")
    print(f"{result['eval_samples']} images" + (f" of {total}" if images < total else ""))
    if expected is None:
        print(f"{checkpoint.name} was saved within an epoch: the run has no accuracy to compare it with")
        return None
    print(f"the run's own at {checkpoint.name}: accuracy {expected:.2%}")
    chance = 4 * math.sqrt(expected * (1 - expected) / images * (total - images) / max(1, total - 1))
    return abs(accuracy - expected) <= max(TOLERANCE, 1.01 / images) + chance


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="a run's folder, its first line of output")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument("--checkpoint", metavar="step-XXXXXXXX", help="instead of the newest whole one")
    parser.add_argument("--data", help="where the run's data lies now, if it was moved")
    parser.add_argument("--ema", action="store_true", help="the average that --ema_decay keeps, not the last weights")
    parser.add_argument("--no_check", action="store_true", help="write the weights, and evaluate nothing")
    parser.add_argument("--images", type=int, default=0, metavar="N", help="evaluate N images, evenly spaced (all)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="to evaluate on (here %(default)s)")
    parser.add_argument("--pretrained", help="where the network that the run fine-tuned lies now, if it was moved")
    return parser.parse_args(words)


if __name__ == "__main__":
    logging.disable_progress_bar()
    begin()
    try:
        main(parse(expand_home(sys.argv[1:])))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=4.57", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18", "datasets>=3",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Train a ResNet on a data set of Hugging Face's `datasets`, whose rows are read in random order from disk, offline.

Base: resnet.py. Changes: open_data, load, embedded_digits.

    python recipes/resnet_hf_datasets.py                                      # a laptop, the digits
    L="accelerate launch --config_file accelerate_configs/local_ddp.yaml"
    $L recipes/resnet_hf_datasets.py --data FOLDER                            # one GPU, or the CPU without one
    $L --num_processes 8 recipes/resnet_hf_datasets.py --data FOLDER          # a node of eight GPUs
    $L --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 --num_processes 32 \\
        recipes/resnet_hf_datasets.py --data FOLDER                           # on each of four nodes, R = 0 to 3

FOLDER holds parquet files, whose names or folders say train or val (`tools/pack.py --format parquet` writes them), or
was written by `save_to_disk`. A data set of the hub is read from the cache; fill it on a machine with a network:

    HF_HUB_OFFLINE=0 python recipes/resnet_hf_datasets.py --data uoft-cs/cifar10 --max_steps 1

`datasets` maps arrow files into memory and reads a row when it is asked for one. So the samples come in the order of
resnet.py, the same on any number of processes: the library's own shuffle and its split among nodes are not used. Nor
is its decoding, which makes a PIL image of each row: the bytes go to the decoder of all other recipes.

When: the images are in the hub's format, or other programs read them with `datasets` too. Measured on 2 CPU cores,
one worker, images/s per core at 224 px: 1,159 from parquet and 1,165 from tar shards with our decoder, 267 where
`datasets` decodes and torchvision transforms (benchmarks/results/loaders_cpu2_2026-11-29.json).
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision import models
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator, settle_buckets
from shared.config import Fraction, NonNegative, Positive, RunConfig, parse
from shared.errors import UserError
from shared.images import ImageConfig, Loader, Source, build_views
from shared.images.sources import open_data as open_files
from shared.images.sources import train_and_held_out
from shared.images.tables import open_rows, read_columns
from shared.images.tree import pair, read_layout, tree_of_folder
from shared.launch import this_launch
from shared.metrics import Evaluation
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups, zero_momentum
from shared.run import Run

# Compute nodes have no network. `datasets` reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

MODELS = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@dataclass
class Config:
    """The hyper-parameters; the defaults are those of the digits demonstration."""

    model: MODELS = HfArg(default="resnet18", help="the network, by torchvision's name")
    norm: Literal["batch", "group"] = HfArg(default="batch", help="group: the same statistics on any topology")
    sync_batch_norm: bool = HfArg(default=False, help="share batch norm's statistics among the GPUs")
    epochs: Positive = HfArg(default=10, help="passes over the training images")
    global_batch_size: Positive = HfArg(default=64, help="images per step, over all processes and accumulation steps")
    gradient_accumulation_steps: Positive = HfArg(default=1, help="backward passes per step")
    learning_rate: NonNegative = HfArg(default=0.1, help="peak learning rate, at the end of the warmup")
    schedule: Literal["one_cycle", "cosine"] = HfArg(default="one_cycle", help="shape of the learning rate curve")
    warmup_epochs: NonNegative = HfArg(default=3.0, help="epochs in which the learning rate rises")
    momentum: Fraction = HfArg(default=0.9, help="Nesterov momentum of SGD")
    weight_decay: NonNegative = HfArg(default=5e-4, help="L2 penalty; norms and biases have none")
    max_grad_norm: NonNegative = HfArg(default=0.0, help="clip the gradient's norm to this; 0 = only log it")
    label_smoothing: Fraction = HfArg(default=0.1, help="probability mass spread over all classes")
    channels_last: bool = HfArg(default=False, help="NHWC layout in memory: for tensor cores")
    compile: bool = HfArg(default=False, help="torch.compile the model")


def open_data(data, val_fraction, seed, shuffle_block, *columns):
    """Return the training and the held-out rows of `--data`; without a held-out part, one is drawn from the seed."""
    if shuffle_block:
        raise UserError(
            f"--shuffle_block {shuffle_block} needs tar shards: recipes/resnet.py reads them. Leave it out."
        )
    parts = embedded_digits() if data == "digits" else load(data)
    # The rows as the loaders take them: bytes, labels, names of the classes.
    sources = {name: Source(*read_columns(part, f"{data}, {name}", *columns)) for name, part in parts.items()}
    return train_and_held_out(sources, val_fraction, seed, data)


def load(data):
    """Return {part: its rows} of a folder, read by the rules of all recipes, or of a data set in the hub's cache."""
    import datasets

    if Path(data).is_dir():
        layout = read_layout(tree_of_folder(Path(data))[0], data)
        if layout.kind != "tables":
            raise UserError(f"--data {data} holds {layout.kind}, no tables: recipes/resnet.py reads it.")
        return {name: open_rows([Path(data, file) for file in files]) for name, files in layout.parts.items()}
    try:
        parts = datasets.load_dataset(data)
    except (OSError, ValueError) as error:
        raise UserError(f"--data {data}: {str(error).splitlines()[0]}. Give a folder of parquet files.") from error
    if len(parts) > 2:
        remedy = "Save two of them by DatasetDict.save_to_disk, and give that folder"
        raise UserError(f"--data {data} has the parts {', '.join(parts)}. {remedy}.")
    return {name: parts[name] for name in pair(list(parts), data)}


def embedded_digits():
    """Return scikit-learn's digits as {part: `datasets.Dataset`}, made as a user would make it from any images."""
    from datasets import ClassLabel, Dataset, Features, Image

    parts = dict(zip(("train", "validation"), open_files("digits", 0, 0), strict=True))
    features = Features(image=Image(), label=ClassLabel(names=parts["train"].classes))
    return {
        name: Dataset.from_dict({"image": list(part.images.pixels), "label": part.labels}, features)
        for name, part in parts.items()
    }


def build_loaders(accelerator, run_config, images, config):
    """Return the training and evaluation loaders of this process's share; samples depend on seed and step alone."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    views = build_views(accelerator, run_config, images, config, open_data(*images.source(run_config.seed)))
    return [Loader(each, accelerator.device, run_config.num_workers, layout) for each in views]


def build_model(images, config, num_classes, seed):
    """Return torchvision's network; residual branches start at zero (Goyal et al., arXiv:1706.02677, section 5.1)."""
    # Group norm with 32 groups: Wu & He, arXiv:1803.08494.
    norm_layer = nn.BatchNorm2d if config.norm == "batch" else partial(nn.GroupNorm, 32)
    model = models.get_model(config.model, num_classes=num_classes, norm_layer=norm_layer, zero_init_residual=True)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if config.sync_batch_norm else model


def build_optimizer(model, config, steps_per_epoch):
    """Return SGD with Nesterov momentum and its learning rate scheduler, which counts global steps."""
    groups, nesterov = parameter_groups(model, config.weight_decay), config.momentum > 0
    # fused: one pass over weights, gradients and momenta instead of one for each operation.
    optimizer = torch.optim.SGD(groups, config.learning_rate, config.momentum, nesterov=nesterov, fused=True)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return zero_momentum(optimizer), build_scheduler(optimizer, config.schedule, steps, warmup)


def parallelize(accelerator, model, optimizer, config):
    """Apply the device, precision and data parallelism of the YAML with `accelerator.prepare`."""
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model, optimizer = accelerator.prepare(model, optimizer)
    if config.compile:
        model.compile()
    return model, optimizer


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run):
    """Train from the run's step to the end of its epoch, or until the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            logits = model(batch.images)
            loss = cross_entropy(logits.float(), batch.labels, label_smoothing=config.label_smoothing, reduction="sum")
            loss = loss / batch.step_weight  # this process's share of the step's loss
            run.observe(batch, loss)
            # parts undoes averaging; the last factor, 1 or nan, shows every process a loss that is not finite.
            accelerator.backward(loss * batch.parts * (1 + 0 * loss.detach()))
            if accelerator.sync_gradients:
                grad_norm = clip_grad_norm(accelerator, model, config.max_grad_norm)
                if not run.skips(grad_norm):  # --on_nonfinite skip decides here, and waits for the device
                    optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            run.check_finite()  # --on_nonfinite stop ends the run here if the step before was not finite
            run.end_step(scheduler.get_last_lr()[0], grad_norm)
            run.profiler.step()
            scheduler.step()
            if run.checkpoint_due:
                run.save(model, optimizer, scheduler)
            if run.stopping:
                return


def evaluate(accelerator, model, loader, run):
    """Log top-1 accuracy and loss over the held-out images, each counted once."""
    model.eval()
    evaluation = Evaluation()
    with torch.no_grad():
        for batch in loader:
            evaluation.add(model(batch.images), batch.labels, batch.valid)
            run.profiler.step()
    run.log_evaluation(evaluation.result(accelerator, len(loader.dataset)))


def check(run_config, images, config, launch):
    """Raise UserError for settings that cannot work, before the processes connect."""
    if config.sync_batch_norm and (not launch.on_gpu or config.norm != "batch"):
        raise UserError("--sync_batch_norm needs GPUs and --norm batch. Leave it out; --norm group needs no sync.")
    if images.image_size <= 16 and launch.precision == "bf16" and not launch.on_gpu:  # layer4 sees 1 x 1 pixels
        raise UserError("bf16 gradients of such small images are wrong on CPUs (oneDNN 3.13). Give --image_size 32.")


def main(run_config, images, config):
    check(run_config, images, config, this_launch())
    accelerator = build_accelerator(run_config.seed, config)
    train_loader, eval_loader = build_loaders(accelerator, run_config, images, config)
    classes, steps_per_epoch = train_loader.dataset.source.classes, train_loader.order.steps_per_epoch
    run = Run(accelerator, run_config, images, config, train_loader, eval_loader)
    if not run.finished:
        model = build_model(images, config, len(classes), run_config.seed)
        optimizer, scheduler = build_optimizer(model, config, steps_per_epoch)
        model, optimizer = parallelize(accelerator, model, optimizer, config)
        settle_buckets(model, train_loader.sample())
        if run.checkpoint:
            run.resume(model, optimizer, scheduler)
        with run.profiling(len(eval_loader)):
            while not run.stopping:
                train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, config, run)
                if run.evaluation_due:
                    evaluate(accelerator, model, eval_loader, run)
                run.save(model, optimizer, scheduler)
    run.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


CONFIGS = (RunConfig, ImageConfig, Config)

if __name__ == "__main__":
    main(*parse(*CONFIGS))

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=4.57", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Race: train the best ResNet within some minutes, whose number of steps is planned by a measurement at the start.

Base: resnet_augmentation.py. Changes: train_one_epoch, evaluate, measure, check, main, plan, measured_seconds,
evaluation_seconds, seconds_of, image_size_at, resized.

    python recipes/resnet_race.py --minutes 2                                 # a laptop
    L="accelerate launch --config_file accelerate_configs/local_ddp.yaml"
    $L recipes/resnet_race.py --minutes 2 --first_image_size 16               # one GPU, or the CPU without one
    $L --num_processes 8 recipes/resnet_race.py --minutes 15                  # a node of eight GPUs
    $L --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 --num_processes 32 \\
        recipes/resnet_race.py --minutes 5 --flip_test                        # on each of four nodes, R = 0 to 3

The first start trains a few steps on these very processes, and plans as many epochs as fit into nine tenths of the
time that is left; the rest is for checkpoints. Libraries' imports come before and do not count. The plan is part of
the run: images grow and the learning rate falls by the step, never by the clock, and a resumed race keeps its plan on
any number of processes.

Longer than 250 lines: the plan is made by real steps of the training, which are written out.

When: the time is given, and the accuracy is what you want to know. On 4,000 garments, images of 12 to 20 pixels, 2 CPU
cores, three seeds: 78.3 % top-1 within 1 minute, 82.0 within 2, 84.7 within 4; the whole commands took 55, 117 and
238 s (benchmarks/results/accuracy_resnet_race_cpu2_2026-12-01.json).
"""

import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import interpolate
from torchvision import models
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator, settle_buckets
from shared.collectives import on_main_process
from shared.config import Fraction, Natural, NonNegative, Positive, RunConfig, parse
from shared.errors import UserError, say
from shared.images import Loader, build_views, open_data
from shared.images.augment import AugmentConfig
from shared.launch import mixed_precision, this_launch
from shared.metrics import Evaluation
from shared.models.ema import Decay, averaged, keep_average
from shared.models.mixing import erase, mix, refuse_odd, soft_labels, summed_loss
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups, zero_momentum
from shared.run import Run
from shared.run.folder import read_json
from shared.run.identity import identity, identity_hash

BEGIN = time.perf_counter()
MEASURED = 8  # steps of each size
PLANNED = 0.9  # of the time that is left; the rest is for checkpoints
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
    loss: Literal["cross_entropy", "bce"] = HfArg(default="cross_entropy", help="bce: each class by itself, averaged")
    ema_decay: Decay = HfArg(default=0.0, help="part of the weights' average that a step keeps; 0 = no average")
    minutes: NonNegative = HfArg(default=0.0, help="time to plan --epochs and --warmup_epochs for; 0 = as given")
    first_image_size: Natural = HfArg(default=0, help="side of the first images; grows for two thirds; 0 = image_size")
    flip_test: bool = HfArg(
        default=False, help="log flip_accuracy too: logits averaged over an image and its mirror image"
    )
    channels_last: bool = HfArg(default=False, help="NHWC layout in memory: for tensor cores")
    compile: bool = HfArg(default=False, help="torch.compile the model")


def build_loaders(accelerator, run_config, images, config):
    """Return the training and evaluation loaders of this process's share; samples depend on seed and step alone."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    views = build_views(accelerator, run_config, images, config, open_data(*images.source(run_config.seed)))
    augmentations = images.augmentation, "none"
    return [
        Loader(each, accelerator.device, run_config.num_workers, layout, augmentation=augmentation)
        for each, augmentation in zip(views, augmentations, strict=True)
    ]


def build_model(images, config, num_classes, seed):
    """Return torchvision's network; residual branches start at zero (Goyal et al., arXiv:1706.02677, section 5.1)."""
    # Group norm with 32 groups: Wu & He, arXiv:1803.08494.
    norm_layer = nn.BatchNorm2d if config.norm == "batch" else partial(nn.GroupNorm, 32)
    model = models.get_model(config.model, num_classes=num_classes, norm_layer=norm_layer, zero_init_residual=True)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if config.sync_batch_norm else model


def build_optimizer(model, config, steps_per_epoch):
    """Return SGD with Nesterov momentum, which moves the average too, and its scheduler, which counts global steps."""
    groups, nesterov = parameter_groups(model, config.weight_decay), config.momentum > 0
    # fused: one pass over weights, gradients and momenta instead of one for each operation.
    optimizer = torch.optim.SGD(groups, config.learning_rate, config.momentum, nesterov=nesterov, fused=True)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    optimizer = keep_average(model, zero_momentum(optimizer), config.ema_decay)
    return optimizer, build_scheduler(optimizer, config.schedule, steps, warmup)


def parallelize(accelerator, model, optimizer, config):
    """Apply the device, precision and data parallelism of the YAML with `accelerator.prepare`."""
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model, optimizer = accelerator.prepare(model, optimizer)
    if config.compile:
        model.compile()
    return model, optimizer


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run, images):
    """Train from the run's step to the end of its epoch, or until the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            seeds = batch.keys.tolist()
            pixels = resized(batch.images, image_size_at(run.step / run.total_steps, images, config))
            pixels = erase(pixels, seeds, images.random_erasing)
            pixels, shares = mix(pixels, seeds, images.mixup_alpha, images.cutmix_alpha)
            logits = model(pixels).float()
            target = soft_labels(batch.labels, shares, logits.shape[1], config.label_smoothing)
            loss = summed_loss(logits, target, config.loss)
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


def evaluate(accelerator, model, loader, run, optimizer, config):
    """Log top-1 accuracy and loss over the held-out images; with names that begin with ema_, those of the average."""
    result = measure(accelerator, model, loader, run, config)
    if config.ema_decay:
        with averaged(model, optimizer):
            average = measure(accelerator, model, loader, run, config)
        run.say(f"averaged weights: accuracy {average['accuracy']:.2%}  eval loss {average['eval_loss']:.4f}")
        result |= {f"ema_{name}": value for name, value in average.items() if name != "eval_samples"}
    if config.flip_test:
        run.say(f"with mirror images: accuracy {result.get('ema_flip_accuracy', result['flip_accuracy']):.2%}")
    run.log_evaluation(result)


def measure(accelerator, model, loader, run, config):
    """Return top-1 accuracy and loss over the held-out images, each counted once; flip_accuracy with mirror images."""
    model.eval()
    evaluation, flipped = Evaluation(), Evaluation()
    with torch.no_grad():
        for batch in loader:
            logits = model(batch.images)
            evaluation.add(logits, batch.labels, batch.valid)
            if config.flip_test:
                flipped.add((logits + model(batch.images.flip(3))) / 2, batch.labels, batch.valid)
            run.profiler.step()
    result = evaluation.result(accelerator, len(loader.dataset))
    if config.flip_test:
        result["flip_accuracy"] = flipped.result(accelerator, len(loader.dataset))["accuracy"]
    return result


def check(run_config, images, config, launch):
    """Raise UserError for settings that cannot work, before the processes connect."""
    if config.sync_batch_norm and (not launch.on_gpu or config.norm != "batch"):
        raise UserError("--sync_batch_norm needs GPUs and --norm batch. Leave it out; --norm group needs no sync.")
    if images.image_size <= 16 and launch.precision == "bf16" and not launch.on_gpu:  # layer4 sees 1 x 1 pixels
        raise UserError("bf16 gradients of such small images are wrong on CPUs (oneDNN 3.13). Give --image_size 32.")
    refuse_odd(images, config, launch.processes)
    if config.first_image_size and not 8 <= config.first_image_size <= images.image_size:
        what = f"--first_image_size {config.first_image_size} is not within 8 to --image_size {images.image_size}"
        raise UserError(f"{what}. Change it.")


def plan(accelerator, run_config, images, config, train_loader, eval_loader):
    """Set the epochs that fit into --minutes: those of an earlier start, or as measured now."""
    values = identity(Path(__file__).stem, mixed_precision(), run_config, images, config)
    folder = Path(run_config.output_dir or f"runs/{values['recipe']}-{identity_hash(values)}")
    run_config.output_dir = str(folder)  # named by the flags alone, which a second start knows
    former = on_main_process(accelerator, read_json, folder / "config.json").get("config", {})
    if "warmup_epochs" in former:
        config.epochs, config.warmup_epochs = former["epochs"], former["warmup_epochs"]
        return
    scale = accelerator.scaler and accelerator.scaler.state_dict()
    with torch.random.fork_rng():  # the race begins as it would without a measurement
        seconds = measured_seconds(accelerator, run_config, images, config, train_loader, eval_loader)
    if scale:
        accelerator.scaler.load_state_dict(scale)
    left = PLANNED * (60 * config.minutes - time.perf_counter() + BEGIN)
    seconds, left = on_main_process(accelerator, lambda: (seconds, left))
    epochs = int(left / seconds)
    if epochs < 1:
        what = f"an epoch takes {seconds:.1f} s here, and {max(left, 0):.1f} s are left for it"
        raise UserError(f"--minutes {config.minutes:g} is too short: {what}. Give more, or fewer --train_images.")
    config.epochs, config.warmup_epochs = epochs, config.warmup_epochs * epochs / config.epochs
    if accelerator.is_main_process:  # the first line on standard output is the run's folder
        say(f"planned: {epochs} epochs of {seconds:.1f} s in {config.minutes:g} minutes", sys.stderr)


def measured_seconds(accelerator, run_config, images, config, train_loader, eval_loader):
    """Return the seconds of an epoch of this training, on these processes, with its evaluation."""
    classes, steps = len(train_loader.dataset.source.classes), train_loader.order.steps_per_epoch
    model = build_model(images, config, classes, run_config.seed)
    optimizer, _ = build_optimizer(model, config, steps)
    model, optimizer = parallelize(accelerator, model, optimizer, config)
    settle_buckets(model, train_loader.sample())
    # A step takes a + b * size^2 seconds. Two thirds of the steps grow from the first size to the last one.
    first, last = config.first_image_size or images.image_size, images.image_size
    least, most = (
        seconds_of(accelerator, model, train_loader, optimizer, images, config, side) for side in (first, last)
    )
    growing = (first**2 + first * last + last**2) / 3  # the mean square
    step = most - (most - least) * (last**2 - growing) * 2 / 3 / max(1, last**2 - first**2)
    forward = evaluation_seconds(model, eval_loader)
    accelerator.free_memory(model, optimizer)
    passes = (1 + (config.ema_decay > 0)) * (1 + config.flip_test)
    return step * steps + forward * passes * len(eval_loader)


def evaluation_seconds(model, loader):
    """Return the median time of a held-out batch, in seconds."""
    model.eval()
    times = []
    with torch.no_grad():
        for batch in itertools.islice(loader, MEASURED):
            begin = time.perf_counter()
            model(batch.images).sum().item()  # waits for the device
            times.append(batch.wait_seconds + time.perf_counter() - begin)
    return statistics.median(times)


def seconds_of(accelerator, model, loader, optimizer, images, config, size):
    """Return the median time of a step on images of this size, in seconds."""
    model.train()
    batches, times = iter(loader.starting_at(0)), []
    for _ in range(min(MEASURED, loader.order.steps_per_epoch)):
        begin = time.perf_counter()
        for batch in itertools.islice(batches, config.gradient_accumulation_steps):
            with accelerator.accumulate(model):
                seeds = batch.keys.tolist()
                pixels = erase(resized(batch.images, size), seeds, images.random_erasing)
                pixels, shares = mix(pixels, seeds, images.mixup_alpha, images.cutmix_alpha)
                logits = model(pixels).float()
                target = soft_labels(batch.labels, shares, logits.shape[1], config.label_smoothing)
                loss = summed_loss(logits, target, config.loss) / batch.step_weight
                accelerator.backward(loss * batch.parts)
                optimizer.step()
                optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - begin)
    return statistics.median(times[len(times) // 2 :])  # the first ones compile and fill caches


def image_size_at(progress, images, config):
    """Return the side of the images, in pixels, a multiple of 4, at this share of all steps."""
    first, last = config.first_image_size or images.image_size, images.image_size
    side = first + (last - first) * min(1, progress * 3 / 2)
    return min(last, round(side / 4) * 4)


def resized(images, size):
    """Return the batch with images of this side."""
    return images if images.shape[-1] == size else interpolate(images, (size, size), mode="bilinear", antialias=True)


def main(run_config, images, config):
    check(run_config, images, config, this_launch())
    accelerator = build_accelerator(run_config.seed, config)
    train_loader, eval_loader = build_loaders(accelerator, run_config, images, config)
    classes, steps_per_epoch = train_loader.dataset.source.classes, train_loader.order.steps_per_epoch
    if config.minutes:
        plan(accelerator, run_config, images, config, train_loader, eval_loader)
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
                train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, config, run, images)
                if run.evaluation_due:
                    evaluate(accelerator, model, eval_loader, run, optimizer, config)
                run.save(model, optimizer, scheduler)
    run.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


CONFIGS = (RunConfig, AugmentConfig, Config)

if __name__ == "__main__":
    main(*parse(*CONFIGS))

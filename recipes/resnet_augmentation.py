# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=4.57", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Train a ResNet on augmented, erased and mixed images, and keep an average of its weights; all of it off by default.

Base: resnet.py. Changes: build_loaders, build_optimizer, train_one_epoch, evaluate, measure, check, main.

    python recipes/resnet_augmentation.py --augmentation trivialaugment --ema_decay 0.99      # a laptop
    L="accelerate launch --config_file accelerate_configs/local_ddp.yaml"
    $L recipes/resnet_augmentation.py --mixup_alpha 0.2 --cutmix_alpha 1      # one GPU, or the CPU without one
    $L --num_processes 8 recipes/resnet_augmentation.py --random_erasing 0.25 # a node of eight GPUs
    $L --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 --num_processes 32 \\
        recipes/resnet_augmentation.py --repeats 2 --loss bce                 # on each of four nodes, R = 0 to 3

The loader's workers decode and crop. The device augments, erases and mixes whole batches, each image by its own seed,
so that its pixels are the same on any number of processes, workers and accumulation steps. MixUp and CutMix mix the
samples 2i and 2i + 1 of the step's order.

ImageNet (command not yet run), after torchvision's second recipe for ResNet-50 (80.9 % in 600 epochs, with training
crops of 176 pixels): --data $DSDIR/imagenet/RawImages --model resnet50 --image_size 224 --min_crop_area 0.08
--horizontal_flip --eval_crop_ratio 0.875 --epochs 600 --global_batch_size 1024 --learning_rate 0.5 --schedule cosine
--warmup_epochs 5 --weight_decay 2e-5 --augmentation trivialaugment --random_erasing 0.1 --mixup_alpha 0.2
--cutmix_alpha 1 --repeats 4 --ema_decay 0.9999 --channels_last --compile, with --mixed_precision bf16 for the
launcher.

When: a training is so long that the network learns its images by heart; a short one becomes worse. On 8,000 garments
of 20 pixels, 5 epochs, three seeds, top-1 fell from 82.7 % to 77.8 % with TrivialAugment and to 78.8 % with CutMix.
The average had 82.8, 77.5 and 79.0 % (benchmarks/results/accuracy_resnet_augmentation_cpu2_2026-11-30.json).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torchvision import models
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator, settle_buckets
from shared.config import Fraction, NonNegative, Positive, RunConfig, parse
from shared.errors import UserError
from shared.images import Loader, build_views, open_data
from shared.images.augment import AugmentConfig
from shared.launch import this_launch
from shared.metrics import Evaluation
from shared.models.ema import Decay, averaged, keep_average
from shared.models.mixing import erase, mix, refuse_odd, soft_labels, summed_loss
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups, zero_momentum
from shared.run import Run

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
            pixels = erase(batch.images, seeds, images.random_erasing)
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
    """Log top-1 accuracy and loss over the held-out images; of the average too, as ema_accuracy and ema_eval_loss."""
    result = measure(accelerator, model, loader, run)
    if config.ema_decay:
        with averaged(model, optimizer):
            average = measure(accelerator, model, loader, run)
        result |= {f"ema_{name}": average[name] for name in ("accuracy", "eval_loss")}
        run.say(f"averaged weights: accuracy {average['accuracy']:.2%}  eval loss {average['eval_loss']:.4f}")
    run.log_evaluation(result)


def measure(accelerator, model, loader, run):
    """Return top-1 accuracy and loss over the held-out images, each counted once."""
    model.eval()
    evaluation = Evaluation()
    with torch.no_grad():
        for batch in loader:
            evaluation.add(model(batch.images), batch.labels, batch.valid)
            run.profiler.step()
    return evaluation.result(accelerator, len(loader.dataset))


def check(run_config, images, config, launch):
    """Raise UserError for settings that cannot work, before the processes connect."""
    if config.sync_batch_norm and (not launch.on_gpu or config.norm != "batch"):
        raise UserError("--sync_batch_norm needs GPUs and --norm batch. Leave it out; --norm group needs no sync.")
    if images.image_size <= 16 and launch.precision == "bf16" and not launch.on_gpu:  # layer4 sees 1 x 1 pixels
        raise UserError("bf16 gradients of such small images are wrong on CPUs (oneDNN 3.13). Give --image_size 32.")
    refuse_odd(images, config, launch.processes)


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

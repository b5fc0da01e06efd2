# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=4.57", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18", "timm>=1.0",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Train a ResNet with large batches: a learning rate that follows the batch, and five optimizers to compare.

Base: resnet.py. Changes: peak_rate, describe_rate, make_optimizer, build_optimizer, check, main.

    python recipes/resnet_large_batch.py --global_batch_size 256              # a laptop
    L="accelerate launch --config_file accelerate_configs/local_ddp.yaml"
    $L recipes/resnet_large_batch.py --global_batch_size 256                  # one GPU, or the CPU without one
    $L --num_processes 8 recipes/resnet_large_batch.py --global_batch_size 512                # a node of eight GPUs
    $L --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 --num_processes 32 \\
        recipes/resnet_large_batch.py --global_batch_size 1024                # on each of four nodes, R = 0 to 3

The course's comparison, on CIFAR-10's 50,000 images in FOLDER (command not yet run): 5,850 steps of 256 images against
450 steps of 8,192, the second with each --optimizer. An epoch's incomplete last batch is dropped. Tune the base rate
of each: the defaults are those of papers and libraries. AdamW, LAMB and Lion want more --weight_decay than SGD.

    C="$L recipes/resnet_large_batch.py --data FOLDER --horizontal_flip --schedule cosine --warmup_epochs 5"
    $C --global_batch_size 256 --epochs 30
    $C --global_batch_size 8192 --epochs 75 --optimizer lars

When: many GPUs share each batch, and fewer steps count for more than fewer images. Measured on 8,192 garments at 12
px, six epochs, top-1, medians of three seeds, with 128, 1,024 and 4,096 images a step: SGD 78.8, 73.1 and 16.0 %,
AdamW 82.1, 76.6 and 36.6 %, LARS 81.7, 80.1 and 36.4 %, LAMB 82.7, 78.6 and 57.5 %, Lion 80.5, 73.1 and 52.5 %
(benchmarks/results/large_batch_cpu2_2026-12-01.json). Each base rate is the best of several at 1,024 images
(benchmarks/results/large_batch_tuning_cpu2_2026-12-01.json); the scaling rule gave the others.
"""

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision import models
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator, settle_buckets
from shared.config import Fraction, NonNegative, Positive, RunConfig, parse
from shared.errors import UserError
from shared.images import ImageConfig, Loader, build_views, open_data
from shared.launch import this_launch
from shared.metrics import Evaluation
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups, zero_momentum
from shared.run import Run

MODELS = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
# Peak learning rates at the reference batch: Goyal et al. (arXiv:1706.02677), and the defaults of torch and timm.
BASE_RATES = {"sgd": 0.1, "adamw": 1e-3, "lars": 1.0, "lamb": 1e-3, "lion": 1e-4}


@dataclass
class Config:
    """The hyper-parameters; the defaults are those of the digits demonstration."""

    model: MODELS = HfArg(default="resnet18", help="the network, by torchvision's name")
    norm: Literal["batch", "group"] = HfArg(default="batch", help="group: the same statistics on any topology")
    sync_batch_norm: bool = HfArg(default=False, help="share batch norm's statistics among the GPUs")
    epochs: Positive = HfArg(default=10, help="passes over the training images")
    global_batch_size: Positive = HfArg(default=64, help="images per step, over all processes and accumulation steps")
    gradient_accumulation_steps: Positive = HfArg(default=1, help="backward passes per step")
    optimizer: Literal["sgd", "adamw", "lars", "lamb", "lion"] = HfArg(
        default="sgd", help="sgd and lars have --momentum; lars and lamb adapt only the weights that decay"
    )
    base_learning_rate: NonNegative = HfArg(
        default=0.0, help="peak learning rate at the reference batch; 0 = sgd 0.1, adamw, lamb 1e-3, lars 1, lion 1e-4"
    )
    reference_batch_size: Positive = HfArg(default=256, help="images per step for which the base rate is meant")
    scaling: Literal["auto", "linear", "sqrt", "none"] = HfArg(
        default="auto", help="of the rate with the batch; auto: linear for sgd and lars, sqrt for the others"
    )
    schedule: Literal["one_cycle", "cosine"] = HfArg(default="one_cycle", help="shape of the learning rate curve")
    warmup_epochs: NonNegative = HfArg(default=3.0, help="epochs in which the learning rate rises")
    momentum: Fraction = HfArg(default=0.9, help="Nesterov momentum of SGD")
    weight_decay: NonNegative = HfArg(default=5e-4, help="L2 penalty; norms and biases have none")
    max_grad_norm: NonNegative = HfArg(default=0.0, help="clip the gradient's norm to this; 0 = only log it")
    label_smoothing: Fraction = HfArg(default=0.1, help="probability mass spread over all classes")
    channels_last: bool = HfArg(default=False, help="NHWC layout in memory: for tensor cores")
    compile: bool = HfArg(default=False, help="torch.compile the model")


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


def peak_rate(config):
    """Return the peak learning rate, and the base rate and the scaling that gave it.

    SGD's rate grows as the batch (Goyal et al., arXiv:1706.02677), Adam's as its square root (Malladi et al.,
    arXiv:2205.10287).
    """
    scaling = config.scaling
    if scaling == "auto":
        scaling = "linear" if config.optimizer in ("sgd", "lars") else "sqrt"
    power = {"linear": 1, "sqrt": 0.5, "none": 0}[scaling]
    base = config.base_learning_rate or BASE_RATES[config.optimizer]
    return base * (config.global_batch_size / config.reference_batch_size) ** power, base, scaling


def describe_rate(config):
    """Return a line with the peak learning rate and how it was computed."""
    rate, base, scaling = peak_rate(config)
    ratio = f"{config.global_batch_size} / {config.reference_batch_size}"
    product = {"linear": f" = {base:g} x {ratio}", "sqrt": f" = {base:g} x sqrt({ratio})", "none": ""}[scaling]
    return f"peak learning rate: {rate:g}{product} ({'no' if scaling == 'none' else scaling} scaling)"


def make_optimizer(groups, config, rate):
    """Return the optimizer: timm's LARS (arXiv:1708.03888), LAMB (arXiv:1904.00962), Lion (arXiv:2302.06675), or
    torch's. Nesterov's SGD is the baseline that the others have to beat (Nado et al., arXiv:2102.06356)."""
    nesterov = config.momentum > 0
    if config.optimizer == "sgd":
        # fused: one pass over weights, gradients and momenta instead of one for each operation.
        return zero_momentum(torch.optim.SGD(groups, rate, config.momentum, nesterov=nesterov, fused=True))
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, rate, fused=True)
    from timm.optim import Lamb, Lars, Lion

    if config.optimizer == "lars":
        return Lars(groups, rate, config.momentum, nesterov=nesterov)
    if config.optimizer == "lamb":
        return Lamb(groups, rate, max_grad_norm=None)  # by default it clips, after --max_grad_norm did
    return Lion(groups, rate)


def build_optimizer(model, config, steps_per_epoch):
    """Return the optimizer and its learning rate scheduler, which counts global steps."""
    optimizer = make_optimizer(parameter_groups(model, config.weight_decay), config, peak_rate(config)[0])
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return optimizer, build_scheduler(optimizer, config.schedule, steps, warmup)


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
    if config.optimizer in ("lars", "lamb", "lion") and find_spec("timm") is None:
        raise UserError(
            f"--optimizer {config.optimizer} needs timm. Install it (pip install timm), or give sgd or adamw."
        )
    if config.optimizer in ("lars", "lamb") and config.weight_decay == 0:
        plain = {"lars": "sgd", "lamb": "adamw"}[config.optimizer]
        raise UserError(
            f"--optimizer {config.optimizer} adapts only weights that decay: with --weight_decay 0 it is {plain}. "
            f"Give a weight decay, or --optimizer {plain}."
        )


def main(run_config, images, config):
    check(run_config, images, config, this_launch())
    accelerator = build_accelerator(run_config.seed, config)
    train_loader, eval_loader = build_loaders(accelerator, run_config, images, config)
    classes, steps_per_epoch = train_loader.dataset.source.classes, train_loader.order.steps_per_epoch
    run = Run(accelerator, run_config, images, config, train_loader, eval_loader)
    if not run.finished:
        run.say(describe_rate(config))
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

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=5.17", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Train a Vision Transformer on augmented, erased and mixed images, and keep an average of its weights.

Base: vit.py. Changes: Images, build_loaders, build_optimizer, train_one_epoch, evaluate, measure, check, main.

    python recipes/vit_augmentation.py --augmentation randaugment --mixup_alpha 0.2 --ema_decay 0.99    # a laptop
    L="accelerate launch --config_file accelerate_configs"
    $L/local_ddp.yaml recipes/vit_augmentation.py --cutmix_alpha 1            # one GPU, or the CPU without one
    $L/local_fsdp.yaml --num_processes 8 recipes/vit_augmentation.py --model L --ema_decay 0.9999       # a node
    $L/local_hsdp.yaml --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 \\
        --num_processes 32 --parallelism_config_dp_replicate_size 4 recipes/vit_augmentation.py --repeats 2

ImageNet (command not yet run), after big_vision's ViT-S/16 (76.5 % in 90 epochs): --data $DSDIR/imagenet/RawImages
--model S --patch_size 16 --image_size 224 --min_crop_area 0.05 --horizontal_flip --eval_crop_ratio 0.875 --epochs 90
--global_batch_size 1024 --learning_rate 1e-3 --warmup_epochs 8 --weight_decay 0.1 --label_smoothing 0 --augmentation
randaugment --mixup_alpha 0.2 --ema_decay 0.9999 --compile, with --mixed_precision bf16 for the launcher.

When: the network sees its images often enough to learn them by heart, as a ViT sees ImageNet's in 90 epochs. On the
digits, 40 epochs, 2 CPU cores, three seeds, it neither helps nor harms: 97.2 % top-1 without it, 98.1 with MixUp and
CutMix, 97.2 with RandAugment and MixUp, 97.2, 97.2 and 96.9 of the averaged weights, where seeds differ by 1.4 to 3.6
points (benchmarks/results/accuracy_vit_augmentation_cpu2_2026-11-30.json).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator, settle_buckets
from shared.config import Fraction, NonNegative, Positive, RunConfig, parse
from shared.images import Loader, build_views, open_data
from shared.images.augment import AugmentConfig
from shared.images.settings import Part
from shared.launch import this_launch
from shared.metrics import Evaluation
from shared.models.ema import Decay, averaged, keep_average
from shared.models.mixing import erase, mix, refuse_odd, soft_labels, summed_loss
from shared.models.vit import Rate, VisionTransformer, load_pretrained, network_sizes, pixel_statistics, vit_config
from shared.models.weights import find_pretrained, init_weights
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups
from shared.run import Run

STRATEGIES = ("ddp", "fsdp", "hsdp")  # ZeRO keeps the weights where no average can follow them


@dataclass
class Images(AugmentConfig):
    """The shared settings, with larger training crops."""

    min_crop_area: Part = HfArg(default=0.8, help="least share of an image in a training crop; ImageNet: 0.05")


@dataclass
class Config:
    """The hyper-parameters; the defaults are those of the digits demonstration."""

    model: Literal["demo", "Ti", "S", "B", "L", "H", "g", "G"] = HfArg(default="demo", help="size; G: 2 billion")
    patch_size: Positive = HfArg(default=8, help="side of a patch, pixels; ImageNet: 16, or 14 from H on")
    pretrained: str = HfArg(default="", help="folder or hub id to fine-tune; it decides model and patch size")
    epochs: Positive = HfArg(default=60, help="passes over the training images")
    global_batch_size: Positive = HfArg(default=64, help="images per step, over all processes and accumulation steps")
    gradient_accumulation_steps: Positive = HfArg(default=1, help="backward passes per step")
    learning_rate: NonNegative = HfArg(default=2e-3, help="peak learning rate, at the end of the warmup")
    warmup_epochs: NonNegative = HfArg(default=5.0, help="epochs of linearly rising learning rate; a cosine follows")
    weight_decay: NonNegative = HfArg(default=0.1, help="AdamW's; norms, biases, class token and positions have none")
    max_grad_norm: NonNegative = HfArg(default=1.0, help="clip the gradient's norm to this; 0 = only log it")
    label_smoothing: Fraction = HfArg(default=0.1, help="probability mass spread over all classes")
    loss: Literal["cross_entropy", "bce"] = HfArg(default="cross_entropy", help="bce: each class by itself, averaged")
    ema_decay: Decay = HfArg(default=0.0, help="part of the weights' average that a step keeps; 0 = no average")
    drop_path: Rate = HfArg(default=0.0, help="share of branches skipped in the last block; rises linearly to it")
    activation_checkpointing: bool = HfArg(default=False, help="recompute each block in the backward: less memory")
    compile: bool = HfArg(default=False, help="torch.compile each block")


def build_loaders(accelerator, run_config, images, config):
    """Return the training and evaluation loaders of this process's share; samples depend on seed and step alone."""
    statistics = pixel_statistics(find_pretrained(config.pretrained)) if config.pretrained else None
    views = build_views(accelerator, run_config, images, config, open_data(*images.source(run_config.seed)))
    augmentations = images.augmentation, "none"
    return [
        Loader(each, accelerator.device, run_config.num_workers, statistics=statistics, augmentation=augmentation)
        for each, augmentation in zip(views, augmentations, strict=True)
    ]


def build_model(images, config, num_classes, seed):
    """Return the whole network on the CPU, pretrained or with weights that depend on seed and parameter name alone."""
    if config.pretrained:
        folder = find_pretrained(config.pretrained)
        model = load_pretrained(folder, images.image_size, num_classes, config.drop_path, seed)
    else:
        sizes = vit_config(config.model, images.image_size, config.patch_size, num_classes, config.drop_path)
        with torch.device("meta"):
            model = VisionTransformer(sizes)
        init_weights(model.to_empty(device=torch.get_default_device()), seed)
    for block in model.vit.layers:
        block.recompute = config.activation_checkpointing
    return model


def build_optimizer(model, config, steps_per_epoch):
    """Return AdamW, which moves the average too, and its learning rate scheduler, which counts global steps."""
    groups = parameter_groups(model, config.weight_decay, no_decay=("cls_token", "position_embeddings"))
    # fused: one pass over weights, gradients and both moments instead of one for each operation.
    optimizer = keep_average(model, torch.optim.AdamW(groups, config.learning_rate, fused=True), config.ema_decay)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return optimizer, build_scheduler(optimizer, "cosine", steps, warmup)


def parallelize(accelerator, model, optimizer, config):
    """Apply the device, precision, replicas and shards of the YAML with `accelerator.prepare`."""
    if config.compile:
        for block in model.vit.layers:
            block.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run, images):
    """Train from the run's step to the end of its epoch, or until the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            seeds = batch.keys.tolist()
            pixels = erase(batch.images, seeds, images.random_erasing)
            pixels, shares = mix(pixels, seeds, images.mixup_alpha, images.cutmix_alpha)
            logits = model(pixels, batch.seeds).float()
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
    network_sizes(images, config)
    refuse_odd(images, config, launch.processes)


def main(run_config, images, config):
    check(run_config, images, config, this_launch())
    accelerator = build_accelerator(run_config.seed, config, STRATEGIES)
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


CONFIGS = (RunConfig, Images, Config)

if __name__ == "__main__":
    main(*parse(*CONFIGS))

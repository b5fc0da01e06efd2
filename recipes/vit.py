# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=5.17", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Train a Vision Transformer, whole on each GPU or sharded over them: the YAML alone decides, the losses are the same.

Base: resnet.py. Changes: Images, build_loaders, build_model, build_optimizer, parallelize, train_one_epoch, check,
main.

    python recipes/vit.py                                                     # a laptop
    L="accelerate launch --config_file accelerate_configs"
    $L/local_ddp.yaml recipes/vit.py                                          # one GPU, or the CPU without one
    $L/local_fsdp.yaml --num_processes 8 recipes/vit.py --model L             # a node; or local_zero1, zero2, zero3
    $L/local_hsdp.yaml --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 \\
        --num_processes 32 --parallelism_config_dp_replicate_size 4 recipes/vit.py --model G   # on each of four nodes

ImageNet (command not yet run), after big_vision's ViT-S/16 (76.5 % in 90 epochs), less its RandAugment and MixUp, and
with a class token, learned positions and a linear head instead of average pooling, sine positions and a hidden layer:
--data $DSDIR/imagenet/RawImages --model S --patch_size 16 --image_size 224 --min_crop_area 0.05 --horizontal_flip
--eval_crop_ratio 0.875 --epochs 90 --global_batch_size 1024 --learning_rate 1e-3 --warmup_epochs 8 --weight_decay 0.1
--label_smoothing 0 --compile, with --mixed_precision bf16 for the launcher.

When: ddp as long as weights, gradients and Adam's state fit, 16 bytes per parameter (ViT-B: 1,321 MiB). Each of 4
processes holds at most 332 MiB of them under fsdp, 662 under hsdp 2x2, 671 under zero2, 413 under zero3
(benchmarks/results/memory_cpu2_2026-11-26.json). Measured on the digits, 2 CPU cores, three seeds: 97.5 to 98.3 %
top-1, median 97.8, in 78 to 152 s (benchmarks/results/accuracy_vit_cpu2_2026-11-29.json).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import cross_entropy
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator, settle_buckets
from shared.config import Fraction, NonNegative, Positive, RunConfig, parse
from shared.images import ImageConfig, Loader, build_views, open_data
from shared.images.settings import Part
from shared.launch import this_launch
from shared.metrics import Evaluation
from shared.models.vit import Rate, VisionTransformer, load_pretrained, network_sizes, pixel_statistics, vit_config
from shared.models.weights import find_pretrained, init_weights
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups
from shared.run import Run

STRATEGIES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")


@dataclass
class Images(ImageConfig):
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
    drop_path: Rate = HfArg(default=0.0, help="share of branches skipped in the last block; rises linearly to it")
    activation_checkpointing: bool = HfArg(default=False, help="recompute each block in the backward: less memory")
    compile: bool = HfArg(default=False, help="torch.compile each block")


def build_loaders(accelerator, run_config, images, config):
    """Return the training and evaluation loaders of this process's share; samples depend on seed and step alone."""
    statistics = pixel_statistics(find_pretrained(config.pretrained)) if config.pretrained else None
    views = build_views(accelerator, run_config, images, config, open_data(*images.source(run_config.seed)))
    return [Loader(each, accelerator.device, run_config.num_workers, statistics=statistics) for each in views]


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
    """Return AdamW and its learning rate scheduler, which counts global steps."""
    groups = parameter_groups(model, config.weight_decay, no_decay=("cls_token", "position_embeddings"))
    # fused: one pass over weights, gradients and both moments instead of one for each operation.
    optimizer = torch.optim.AdamW(groups, config.learning_rate, fused=True)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return optimizer, build_scheduler(optimizer, "cosine", steps, warmup)


def parallelize(accelerator, model, optimizer, config):
    """Apply the device, precision, replicas and shards of the YAML with `accelerator.prepare`."""
    if config.compile:
        for block in model.vit.layers:
            block.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run):
    """Train from the run's step to the end of its epoch, or until the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            logits = model(batch.images, batch.seeds)
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
    """Raise UserError for a missing network, or patches that do not tile the image, before the processes connect."""
    network_sizes(images, config)


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
                train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, config, run)
                if run.evaluation_due:
                    evaluate(accelerator, model, eval_loader, run)
                run.save(model, optimizer, scheduler)
    run.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


CONFIGS = (RunConfig, Images, Config)

if __name__ == "__main__":
    main(*parse(*CONFIGS))

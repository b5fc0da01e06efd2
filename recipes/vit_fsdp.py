# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=5.17", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Shard a Vision Transformer with FSDP2 in code: weights that exist only in shards, and what a YAML cannot set.

Base: vit.py. Changes: build_model, parallelize, main.

    L="accelerate launch --config_file accelerate_configs"
    $L/local_fsdp.yaml recipes/vit_fsdp.py                                            # two processes
    $L/local_fsdp.yaml --num_processes 8 recipes/vit_fsdp.py --model G                # a node
    $L/local_hsdp.yaml --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 \
        --num_processes 32 --parallelism_config_dp_replicate_size 4 recipes/vit_fsdp.py --model G   # on each of four

vit.py under the same YAMLs builds the whole network in every process and, in mixed precision, reduces gradients in 16
bits. Here the network is built without memory, its shards are filled one by one, and gradients are reduced in fp32.

When: no process can hold the whole network. ViT-G has 27.5 GiB of weights, gradients and Adam's state in fp32; each of
8 processes holds 3.4. Of 1,024, rank 0 holds 39 % more than its share, since FSDP2 shards whole rows
(benchmarks/results/memory_cpu2_2026-11-26.json).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator
from shared.config import Fraction, Natural, NonNegative, Positive, RunConfig, parse
from shared.images import ImageConfig, Loader, build_views, open_data
from shared.images.settings import Part
from shared.launch import this_launch
from shared.metrics import Evaluation
from shared.models.vit import Rate, VisionTransformer, load_pretrained, network_sizes, pixel_statistics, vit_config
from shared.models.weights import find_pretrained, init_weights
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups
from shared.run import Run

STRATEGIES = ("fsdp", "hsdp")


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
    reshard_after_forward: bool = HfArg(default=True, help="free a block's weights until its backward: less memory")
    prefetch: Natural = HfArg(default=1, help="blocks whose weights are gathered ahead; 0 leaves it to FSDP2")


def build_loaders(accelerator, run_config, images, config):
    """Return the training and evaluation loaders of this process's share; samples depend on seed and step alone."""
    statistics = pixel_statistics(find_pretrained(config.pretrained)) if config.pretrained else None
    views = build_views(accelerator, run_config, images, config, open_data(*images.source(run_config.seed)))
    return [Loader(each, accelerator.device, run_config.num_workers, statistics=statistics) for each in views]


def build_model(images, config, num_classes, seed):
    """Return the network on the meta device, without memory, or the pretrained one on the CPU."""
    if config.pretrained:
        folder = find_pretrained(config.pretrained)
        model = load_pretrained(folder, images.image_size, num_classes, config.drop_path, seed)
    else:
        sizes = vit_config(config.model, images.image_size, config.patch_size, num_classes, config.drop_path)
        with torch.device("meta"):
            model = VisionTransformer(sizes)
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


def parallelize(accelerator, model, config, seed):
    """Shard each block, and embeddings and head as one unit; then allocate and fill this process's shards."""
    if accelerator.parallelism_config:  # hsdp: sharded within each replica, replicated across replicas
        mesh = accelerator.torch_device_mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    else:
        mesh = accelerator.mesh["dp"]
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    blocks = list(model.vit.layers)
    for block in blocks:
        if config.compile:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    # The root has the head, last in the forward and first in the backward: its weights stay gathered in between.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for number, block in enumerate(blocks if config.prefetch else []):
        block.set_modules_to_forward_prefetch(blocks[number + 1 : number + 1 + config.prefetch])
        block.set_modules_to_backward_prefetch(blocks[max(0, number - config.prefetch) : number][::-1])
    if not config.pretrained:
        init_weights(model.to_empty(device=accelerator.device), seed)
    return model


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
        model = parallelize(accelerator, model, config, run_config.seed)
        optimizer, scheduler = build_optimizer(model, config, steps_per_epoch)
        optimizer = accelerator.prepare_optimizer(optimizer)
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

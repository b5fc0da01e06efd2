# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=5.17", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18",
#   "deepspeed>=0.17; sys_platform == 'linux'",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Train a Vision Transformer with DeepSpeed's ZeRO: weights only in shards, offload, and one whole file at the end.

Base: vit.py. Changes: build_model, fill, build_optimizer, parallelize, all_finite, train_one_epoch, export, main.

    L="accelerate launch --config_file accelerate_configs"
    $L/local_zero1.yaml recipes/vit_zero.py                                           # or zero2, zero3
    $L/local_zero3_offload.yaml recipes/vit_zero.py --model L                         # more than a GPU holds
    $L/local_zero3.yaml --num_processes 8 recipes/vit_zero.py --model G               # a node
    $L/local_zero3.yaml --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 \
        --num_processes 32 recipes/vit_zero.py --model G                              # on each of four nodes

vit.py under the same YAMLs first builds the whole network in every process. Here ZeRO-3 shards each weight as it is
made, offload uses DeepSpeed's own Adam, and the run ends with <run's folder>/pretrained, merged from the last
checkpoint's shards: a folder for transformers, and for every recipe that has --pretrained.

When: the optimizer's state or the weights must stay in the host's memory. Without offload FSDP2 needs less: each of 4
processes holds 413 MiB of ViT-B under zero3 and 332 under fsdp, and DeepSpeed's buckets take 1.9 GiB more
(benchmarks/results/memory_cpu2_2026-11-26.json).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import cross_entropy
from transformers import ViTForImageClassification, ViTImageProcessor
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator
from shared.checkpoint.deepspeed import ZERO
from shared.config import Fraction, NonNegative, Positive, RunConfig, parse
from shared.images import ImageConfig, Loader, build_views, open_data
from shared.images.settings import Part
from shared.launch import mixed_precision, strategy, this_launch
from shared.metrics import Evaluation
from shared.models.vit import Rate, VisionTransformer, load_pretrained, network_sizes, pixel_statistics, vit_config
from shared.models.weights import find_pretrained, initial_value
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups
from shared.run import Run

STRATEGIES = ("zero1", "zero2", "zero3")


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


def build_model(images, config, num_classes, seed, accelerator=None):
    """Return the network on the CPU; under ZeRO-3 each process allocates only its shard of every weight."""
    import deepspeed
    from transformers.initialization import no_init_weights  # as in transformers 5.17

    if config.pretrained:
        folder = find_pretrained(config.pretrained)
        model = load_pretrained(folder, images.image_size, num_classes, config.drop_path, seed)
    else:
        sizes = vit_config(config.model, images.image_size, config.patch_size, num_classes, config.drop_path)
        if accelerator is None:  # the preflight, which needs only shapes
            return VisionTransformer(sizes)
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        with deepspeed.zero.Init(config_dict_or_path=settings, enabled=strategy() == "zero3"), no_init_weights():
            model = VisionTransformer(sizes)
        fill(accelerator, model, seed)
    for block in model.vit.layers:
        block.recompute = config.activation_checkpointing
    return model


def fill(accelerator, model, seed):
    """Fill the weights: under ZeRO-3, gather each in turn, write it on rank 0, and shard it again."""
    import deepspeed

    for name, parameter in model.named_parameters():
        cut = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=cut):
            if accelerator.is_main_process or not cut:
                parameter.data.copy_(initial_value(name, parameter.shape, seed))


def build_optimizer(model, config, steps_per_epoch, accelerator=None):
    """Return AdamW (on the CPU if the YAML offloads it) and its learning rate scheduler, which counts global steps."""
    groups = parameter_groups(model, config.weight_decay, no_decay=("cls_token", "position_embeddings"))
    plugin = accelerator and accelerator.state.deepspeed_plugin
    if plugin and plugin.offload_optimizer_device == "cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        # Accelerate would replace this one with an Adam without decoupled weight decay.
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        optimizer = DeepSpeedCPUAdam(groups, config.learning_rate, adamw_mode=True)
    else:
        optimizer = torch.optim.AdamW(groups, config.learning_rate, fused=True)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return optimizer, build_scheduler(optimizer, "cosine", steps, warmup)


def parallelize(accelerator, model, optimizer, config):
    """Apply the device, precision, replicas and shards of the YAML with `accelerator.prepare`."""
    if config.compile:
        for block in model.vit.layers:
            block.compile()
    return accelerator.prepare(model, optimizer)


def all_finite(accelerator, value):
    """Return whether the value is finite on every process; the answer is the same on all of them."""
    infinite = (~value.isfinite()).any().float()
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(infinite)
    return infinite.item() == 0


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run):
    """Train from the run's step to the end of its epoch, or until the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            logits = model(batch.images, batch.seeds)
            loss = cross_entropy(logits.float(), batch.labels, label_smoothing=config.label_smoothing, reduction="sum")
            loss = loss / batch.step_weight  # this process's share of the step's loss
            run.observe(batch, loss)
            if mixed_precision() != "fp16" and not all_finite(accelerator, loss):
                run.stop()  # before the backward, in which DeepSpeed's engine also updates the weights
            accelerator.backward(loss * batch.parts)
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


def export(model, loader, checkpoint, folder):
    """Merge the checkpoint's shards in fp32, on one process without a GPU, and save them in transformers' format."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=ZERO)
    with torch.device("meta"):
        whole = ViTForImageClassification(model.module.config)
    whole.load_state_dict(weights, assign=True)
    whole.save_pretrained(folder)
    mean, std = ((values.flatten() / 255).tolist() for values in (loader.mean, loader.std))
    ViTImageProcessor(image_mean=mean, image_std=std).save_pretrained(folder)


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
        model = build_model(images, config, len(classes), run_config.seed, accelerator)
        optimizer, scheduler = build_optimizer(model, config, steps_per_epoch, accelerator)
        model, optimizer = parallelize(accelerator, model, optimizer, config)
        if run.checkpoint:
            run.resume(model, optimizer, scheduler)
        with run.profiling(len(eval_loader)):
            while not run.stopping:
                train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, config, run)
                if run.evaluation_due:
                    evaluate(accelerator, model, eval_loader, run)
                run.save(model, optimizer, scheduler)
        if accelerator.is_main_process and not run.interrupted:
            export(model, eval_loader, run.files.newest_checkpoint, run.folder / "pretrained")
            run.say(f"whole weights: {run.folder / 'pretrained'}")
    run.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


CONFIGS = (RunConfig, Images, Config)

if __name__ == "__main__":
    main(*parse(*CONFIGS))

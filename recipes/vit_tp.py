# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.15", "transformers>=5.17", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Split every block of a Vision Transformer over several GPUs: tensor parallelism with DTensor, and DDP or FSDP2.

Base: vit.py. Changes: block_plan, parallelize, check, main.

    L="accelerate launch --config_file accelerate_configs"
    $L/local_tp.yaml recipes/vit_tp.py                              # tensor parallel over two processes
    $L/local_tp.yaml --num_processes 8 recipes/vit_tp.py            # a node: 2 (tensor) x 4 (data parallel)
    $L/local_fsdp.yaml --num_processes 8 recipes/vit_tp.py --model G --tensor_parallel_size 4   # times FSDP2 of 2
    $L/local_fsdp.yaml --num_machines 4 --machine_rank R --main_process_ip HOST --main_process_port 29500 \
        --num_processes 32 recipes/vit_tp.py --model G --tensor_parallel_size 8                 # on each of four nodes

When: a block, or its activations for a batch of one, are too large for a GPU. Stay within a node: every block sends
its activations 4 times a step. ViT-B over 4: 348 MiB of 1,321 (benchmarks/results/memory_cpu2_2026-11-26.json).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator
from shared.collectives import data_parallel
from shared.config import Fraction, NonNegative, Positive, RunConfig, parse
from shared.errors import UserError
from shared.images import ImageConfig, Loader, build_views, open_data
from shared.images.settings import Part
from shared.launch import strategy, this_launch
from shared.metrics import Evaluation
from shared.models.vit import Rate, VisionTransformer, load_pretrained, network_sizes, pixel_statistics, vit_config
from shared.models.weights import find_pretrained, init_weights
from shared.optim import build_scheduler, clip_grad_norm, parameter_groups
from shared.run import Run

STRATEGIES = ("ddp", "fsdp")


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
    tensor_parallel_size: Positive = HfArg(default=2, help="processes that share each block")
    sequence_parallel: bool = HfArg(default=False, help="split norms and residuals by tokens: less memory")


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


def block_plan(sequence_parallel):
    """Return how each part of a block is split (Shoeybi et al., arXiv:1909.08053; by tokens: arXiv:2205.05198).

    The first product of each pair is split by columns, the second by rows, so that the first one's output fits the
    second: one all-reduce after each pair. With sequence_parallel that is a reduce-scatter after it and an all-gather
    before.
    """
    between = Shard(1) if sequence_parallel else Replicate()
    whole = {"desired_input_layouts": (Replicate(), None), "use_local_output": False}
    out = {"output_layouts": between, "use_local_output": not sequence_parallel}
    plan = {
        # One input for q, k and v: its gradient is all-reduced once, not three times.
        "attention": PrepareModuleInput(input_layouts=(between, None), **whole),
        **{f"attention.{name}_proj": ColwiseParallel() for name in "qkv"},
        "attention.o_proj": RowwiseParallel(**out),
        "mlp.fc1": ColwiseParallel(input_layouts=between),
        "mlp.fc2": RowwiseParallel(**out),
    }
    if sequence_parallel:
        plan |= {name: SequenceParallel() for name in ("layernorm_before", "layernorm_after")}
    return plan


def parallelize(accelerator, model, config):
    """Split over `tp`, then shard (fsdp) or replicate (ddp, as FSDP2 with shards of one) over `dp`.

    Accelerate refuses these pairs or gets them wrong, so this calls torch on a mesh of the same processes.
    """
    sizes = (data_parallel(accelerator)[1], 1, config.tensor_parallel_size)
    mesh = init_device_mesh(accelerator.device.type, sizes, mesh_dim_names=("dp", "one", "tp"))
    for block in model.vit.layers:
        parallelize_module(block, mesh["tp"], block_plan(config.sequence_parallel))
    if config.sequence_parallel:
        layouts = {"desired_output_layouts": Shard(1), "output_layouts": Replicate(), "use_local_output": False}
        whole = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True)
        ends = {"vit.embeddings": PrepareModuleOutput(**layouts), "vit.layernorm": whole}
        parallelize_module(model, mesh["tp"], ends)
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for part in (*model.vit.layers, model):
        if config.compile and part is not model:
            part.compile()
        fully_shard(part, mesh=mesh["dp"] if strategy() == "fsdp" else mesh["dp", "one"], mp_policy=policy)
    return model.to(accelerator.device)


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
    """Raise UserError for a network that is missing or cannot be split evenly, before the processes connect."""
    _, heads, mlp_width = network_sizes(images, config)
    for what, size in (("heads", heads), ("MLP columns", mlp_width)):
        if size % config.tensor_parallel_size:
            raise UserError(
                f"--tensor_parallel_size {config.tensor_parallel_size} does not divide the {size} {what}. "
                "Give a divisor, or another --model."
            )
    if launch.precision == "fp16":
        raise UserError("fp16's loss scale is not shared among tensor shards. Set mixed_precision to bf16 or no.")


def main(run_config, images, config):
    check(run_config, images, config, this_launch())
    accelerator = build_accelerator(run_config.seed, config, STRATEGIES)
    train_loader, eval_loader = build_loaders(accelerator, run_config, images, config)
    classes, steps_per_epoch = train_loader.dataset.source.classes, train_loader.order.steps_per_epoch
    run = Run(accelerator, run_config, images, config, train_loader, eval_loader)
    if not run.finished:
        model = build_model(images, config, len(classes), run_config.seed)
        model = parallelize(accelerator, model, config)
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

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.8", "torchvision", "accelerate>=1.10", "transformers>=5.17", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm", "tensorboard"]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Tensor and data parallelism by hand: two conjugate functions and a few all-reduces cut a Vision Transformer up.

Base: none.

    L="accelerate launch --config_file accelerate_configs/local_tp.yaml"
    $L recipes/vit_tp_by_hand.py                          # each layer on two processes (TP 2)
    $L --num_processes 4 recipes/vit_tp_by_hand.py        # the same, and two halves of the batch (TP 2 x DP 2)

To learn from, with Megatron-LM's paper (arXiv:1909.08053) beside it; vit_tp.py is the one to train with. The losses
are those of vit.py. It keeps no checkpoints: a run that was cut off starts anew.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.functional import linear, one_hot
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator, data_parallel, micro_batch_size, mixed_precision
from shared.config import RunConfig, UserError, parse
from shared.data import EvaluationOrder, Loader, TrainingOrder, Views, evaluation_view, open_data, training_view
from shared.metrics import Evaluation
from shared.optim import build_scheduler, parameter_groups
from shared.tracking import Run
from shared.vit import VisionTransformer, initial_value, vit_config

GROUP = {}  # this process's groups "tp" and "dp"; global as in Megatron, since every layer needs them
COLUMN, ROW = ("q_proj", "k_proj", "v_proj", "fc1", "classifier"), ("o_proj", "fc2")


@dataclass
class Config:
    """The hyper-parameters; the defaults are the digits demonstration."""

    tensor_parallel_size: int = HfArg(default=2, help="processes that share each layer; such groups share the batch")
    init: Literal["dense", "shards"] = HfArg(default="dense", help="parts of the dense weights, or drawn part by part")
    model: Literal["demo", "Ti", "S", "B", "L", "H", "g", "G"] = HfArg(default="demo", help="size; G: 2 billion")
    patch_size: int = HfArg(default=8, help="side of a patch, pixels; ImageNet: 16, or 14 from H on")
    image_size: int = HfArg(default=32, help="side of what the network sees, pixels")
    epochs: int = HfArg(default=60, help="passes over the training images")
    global_batch_size: int = HfArg(default=64, help="images per step, over all processes and accumulation steps")
    gradient_accumulation_steps: int = HfArg(default=1, help="backward passes per step")
    learning_rate: float = HfArg(default=2e-3, help="greatest learning rate, at the end of the warmup")
    warmup_epochs: float = HfArg(default=5.0, help="epochs of linearly rising learning rate; a cosine follows")
    weight_decay: float = HfArg(default=0.1, help="AdamW's; norms, biases and embeddings have none")
    max_grad_norm: float = HfArg(default=1.0, help="clip the gradient's norm to this; 0 = only log it")
    label_smoothing: float = HfArg(default=0.1, help="probability mass spread over all classes")


def build_groups(size):
    """Of 4 processes with size 2: {0, 1} and {2, 3} share layers, {0, 2} and {1, 3} share the batch."""
    world, rank = dist.get_world_size(), dist.get_rank()
    # Making a group is itself a collective: all processes make all groups, in one order.
    tensor_groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
    data_groups = [dist.new_group(range(first, world, size)) for first in range(size)]
    GROUP.update(tp=tensor_groups[rank // size], dp=data_groups[rank % size])


def cut(x, dim, group="tp"):
    """This rank's part of a whole tensor; parts may differ by one (10 classes on 4 ranks: 3, 3, 2, 2)."""
    return x if dim is None else x.tensor_split(GROUP[group].size(), dim)[GROUP[group].rank()]


def all_reduced(x, op=dist.ReduceOp.SUM):
    """The sum or maximum over the ranks that share layers; a copy, since x may be autograd's own."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, GROUP["tp"])
    return x


class F(torch.autograd.Function):
    """Megatron's f, where ranks part: each will find a share of the gradient of x, and the backward adds them up."""

    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, gradient: all_reduced(gradient))


class G(torch.autograd.Function):
    """Megatron's g, where ranks meet: each has a term x of a sum, whose gradient is that of every one of its terms."""

    forward = staticmethod(lambda ctx, x: all_reduced(x))
    backward = staticmethod(lambda ctx, gradient: gradient)


def column_linear(layer, x):
    """The rank's own outputs, from the whole x."""
    return linear(F.apply(x), layer.weight, layer.bias)


def row_linear(layer, x):
    """All outputs, from the rank's own inputs. Every rank has the bias, which counts once: so after the sum."""
    return G.apply(linear(x, layer.weight)) + layer.bias


def attention(layer, x, mask=None):
    """The rank's own heads: columns of q, k and v, rows of o. One f for the three of them: the backward sends once."""
    return type(layer).forward(layer, F.apply(x), mask)


def embeddings(layer, images):
    """The table of positions is cut by rows, as a language model's vocabulary is: whoever has a row looks it up."""
    tokens = torch.cat([layer.cls_token.expand(len(images), -1, -1), layer.patch_embeddings(images)], dim=1)
    table, indices = layer.position_embeddings[0], torch.arange(tokens.shape[1], device=tokens.device)
    local = indices - cut(indices, 0)[0]
    mine = (local >= 0) & (local < len(table))
    return tokens + G.apply(table[local.where(mine, 0)] * mine[:, None])


def parallel_cross_entropy(logits, labels, classes, label_smoothing):
    """Mean cross-entropy of logits (B, the rank's own classes): nobody ever holds the whole row."""
    # Less the greatest of all, so that exp cannot overflow; the result does not depend on it, so no gradient either.
    logits = logits.float() - all_reduced(logits.detach().float().amax(1, keepdim=True), dist.ReduceOp.MAX)
    target = cut(one_hot(labels, classes) * (1 - label_smoothing) + label_smoothing / classes, 1)
    exponentials, hits = G.apply(torch.stack([logits.exp().sum(1), (target * logits).sum(1)]))
    return (exponentials.log() - hits).mean()


def build_model(config, sizes, seed, device):
    """shared.vit's network, with the layers above and this rank's parts of its weights."""
    with torch.device("meta"):  # shapes without memory
        model = VisionTransformer(sizes)
    forwards = dict.fromkeys(("fc1", "classifier"), column_linear) | dict.fromkeys(ROW, row_linear)
    forwards |= {"attention": attention, "embeddings": embeddings}
    for name, module in model.named_modules():
        if (last := name.rpartition(".")[2]) in forwards:
            module.forward = partial(forwards[last], module)
    for name, whole in list(model.named_parameters()):
        module, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        part = torch.nn.Parameter(initial_part(name, whole, config.init, seed).to(device, copy=True).contiguous())
        part.is_cut = cut_dim(name) is not None
        setattr(module, last, part)
    return model


def cut_dim(name):
    """Along which dimension the ranks cut a parameter; None: every rank holds it, and finds its whole gradient."""
    owner, last = name.split(".")[-2:]
    if owner in COLUMN:
        return 0
    return 1 if last == "position_embeddings" or (owner in ROW and last == "weight") else None


def initial_part(name, whole, init, seed):
    dim = cut_dim(name)
    if init == "dense" or dim is None:
        return cut(initial_value(name, whole.shape, seed), dim)
    # Another draw on each rank. Seeded alike, as in the course, the parts start equal, get equal gradients and stay
    # equal for ever: so many copies of one part. (Ranks of one "dp" group hold the same part, and draw the same.)
    return initial_value(f"{name}, part {GROUP['tp'].rank()}", cut(whole, dim).shape, seed)


class GradientBuckets:
    """DDP by hand: gradients are averaged over the data-parallel group, bucket by bucket, while the backward runs."""

    def __init__(self, model, bucket_bytes=2**20):
        self.bucket_bytes, self.active, self.ready, self.sent = bucket_bytes, True, [], []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.add)

    def add(self, parameter):
        """Autograd calls this as soon as a gradient is whole: in one order everywhere, since all graphs are alike."""
        if self.active:
            self.ready.append(parameter)
            if sum(parameter.grad.nbytes for parameter in self.ready) >= self.bucket_bytes:
                self.send()

    def send(self):
        flat = torch.cat([parameter.grad.flatten() for parameter in self.ready])
        self.sent.append((self.ready, flat, dist.all_reduce(flat, group=GROUP["dp"], async_op=True)))
        self.ready = []

    def wait(self):
        """Send what is left; then each gradient becomes a view of its bucket's mean."""
        if self.ready:
            self.send()
        for parameters, flat, work in self.sent:
            work.wait()
            means = flat.div_(GROUP["dp"].size()).split([parameter.numel() for parameter in parameters])
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.grad = mean.view_as(parameter)
        self.sent = []


def clip_grad_norm_(model, max_norm):
    """By the norm of the whole network's gradient: parts add up over the ranks, what all ranks hold counts once."""
    parts, wholes = ([p.grad for p in model.parameters() if p.is_cut == cut] for cut in (True, False))
    norm = (all_reduced(get_total_norm(parts) ** 2) + get_total_norm(wholes) ** 2).sqrt()
    clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def build_loaders(accelerator, run_config, config):
    """Loaders by data-parallel rank: processes that share layers see the same samples."""
    sources = train, held_out = open_data(run_config.data, run_config.val_fraction, run_config.seed)
    rank, size = data_parallel(accelerator)
    batch_size = micro_batch_size(accelerator, config.global_batch_size, config.gradient_accumulation_steps)
    order = TrainingOrder(len(train), config.global_batch_size, batch_size, rank, size, run_config.seed)
    orders = order, EvaluationOrder(len(held_out), batch_size, rank, size)
    crop = partial(training_view, min_crop_area=0.8, horizontal_flip=False)
    views = crop, partial(evaluation_view, eval_crop_ratio=1.0)
    images = (Views(*pair, config.image_size, run_config.seed) for pair in zip(sources, views, strict=True))
    return [Loader(*pair, accelerator.device, run_config.num_workers) for pair in zip(images, orders, strict=True)]


def build_optimizer(model, config, steps_per_epoch):
    """AdamW treats each number by itself: on parts it does what it would do on the whole."""
    groups = parameter_groups(model, config.weight_decay, no_decay=("cls_token", "position_embeddings"))
    optimizer = torch.optim.AdamW(groups, config.learning_rate, fused=True)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return optimizer, build_scheduler(optimizer, "cosine", steps, warmup)


def train_one_epoch(accelerator, model, buckets, loader, optimizer, scheduler, config, run):
    """From the run's step to the end of its epoch, or to where the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            buckets.active = accelerator.sync_gradients  # only in the last backward of a step
            with accelerator.autocast():
                logits = model(batch.images)
            loss = parallel_cross_entropy(logits, batch.labels, model.config.num_labels, config.label_smoothing)
            accelerator.backward(loss)
        run.observe(batch, loss)
        if accelerator.sync_gradients:
            buckets.wait()
            grad_norm = clip_grad_norm_(model, config.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            run.end_step(scheduler.get_last_lr()[0], grad_norm)
            run.profiler.step()
            scheduler.step()
            if run.stopping:
                return


def evaluate(accelerator, model, loader, run):
    """Top-1 accuracy and loss over the held-out images, each counted once."""
    model.eval()
    evaluation = Evaluation()
    for batch in loader:
        with torch.no_grad(), accelerator.autocast():
            part = model(batch.images)
        logits = part.new_zeros(len(part), model.config.num_labels)
        cut(logits, 1).copy_(part)  # with 0 for the others' classes, the sum over the ranks is the whole row
        evaluation.add(all_reduced(logits), batch.labels, batch.valid)
        run.profiler.step()
    run.log_evaluation(evaluation.result(accelerator, len(loader.dataset)))


def refuse(run_config, config, sizes):
    """What cannot be cut, or is not done here, ends in one line before a model is built."""
    size, heads, tokens = (
        config.tensor_parallel_size,
        sizes.num_attention_heads,
        1 + (sizes.image_size // sizes.patch_size) ** 2,
    )
    if heads % size or sizes.intermediate_size % size or size > min(sizes.num_labels, tokens):
        raise UserError(
            f"--tensor_parallel_size {size} must divide the {heads} heads and the MLP's {sizes.intermediate_size} columns, "
            f"and leave each process one of {sizes.num_labels} classes. Give another, or another --model."
        )
    if mixed_precision() not in ("no", "bf16"):
        raise UserError("the loss scale of fp16 is not shared among parts. Set mixed_precision to bf16 or no.")
    if run_config.checkpointing_steps != "epoch" or run_config.resume_from_checkpoint not in ("auto", "never"):
        raise UserError("this recipe keeps no checkpoints. Leave those flags out, or train with recipes/vit_tp.py.")


def main(run_config, config):
    accelerator = build_accelerator(run_config.seed, config)
    train_loader, eval_loader = build_loaders(accelerator, run_config, config)
    classes, steps_per_epoch = train_loader.dataset.source.classes, train_loader.order.steps_per_epoch
    sizes = vit_config(config.model, config.image_size, config.patch_size, len(classes), 0.0)
    refuse(run_config, config, sizes)
    run = Run(accelerator, run_config, config, classes, steps_per_epoch)
    if not run.finished:
        build_groups(config.tensor_parallel_size)
        model = build_model(config, sizes, run_config.seed, accelerator.device)
        optimizer, scheduler = build_optimizer(model, config, steps_per_epoch)
        buckets = GradientBuckets(model)
        with run.profiling(len(eval_loader)):
            while not run.stopping:
                train_one_epoch(accelerator, model, buckets, train_loader, optimizer, scheduler, config, run)
                evaluate(accelerator, model, eval_loader, run)
    accelerator.wait_for_everyone()
    run.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*parse(RunConfig, Config))

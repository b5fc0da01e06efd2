# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision", "accelerate>=1.10", "transformers>=5.17", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm", "tensorboard",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Cut a Vision Transformer over the processes by hand: tensor x data parallelism is two functions and a few all-reduces.

Base: none.

    L="accelerate launch --config_file accelerate_configs/local_tp.yaml"
    $L recipes/vit_tp_by_hand.py                          # each layer cut in two
    $L --num_processes 4 recipes/vit_tp_by_hand.py        # the same, on two halves of the batch (TP 2 x DP 2)
    $L recipes/vit_tp_by_hand.py --check                  # each piece against its dense layer and against DTensor

To learn from, after Megatron-LM (Shoeybi et al., arXiv:1909.08053); vit_tp.py is the one to train with. The losses are
those of vit.py. It keeps no checkpoints: a run that was cut off starts anew.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.hf_argparser import HfArg
from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings

from shared.accelerator import build_accelerator, data_parallel, micro_batch_size, mixed_precision
from shared.config import RunConfig, UserError, parse
from shared.data import EvaluationOrder, Loader, TrainingOrder, Views, evaluation_view, open_data, training_view
from shared.metrics import Evaluation
from shared.optim import build_scheduler, parameter_groups
from shared.tracking import Run
from shared.vit import SIZES, VisionTransformer, init_weights, initial_value, vit_config

# The process groups "tp" and "dp", made by build_groups; global as in Megatron, since every layer talks.
GROUP = {}
BUCKET_BYTES = 2**20  # DDP's are of 25 MiB; the demonstration has 2.7 MB of gradients in all


@dataclass
class Config:
    """The hyper-parameters; the defaults are the digits demonstration."""

    tensor_parallel_size: int = HfArg(default=2, help="processes that share each layer; the others share the batch")
    init: Literal["dense", "shards"] = HfArg(default="dense", help="weights cut from the dense ones, or drawn per shard")
    check: bool = HfArg(default=False, help="compare each piece with its dense layer instead of training")
    model: Literal[tuple(SIZES)] = HfArg(default="demo", help="size; G: 2 billion")
    patch_size: int = HfArg(default=4, help="side of a patch, pixels")
    image_size: int = HfArg(default=32, help="side of what the network sees, pixels")
    epochs: int = HfArg(default=40, help="passes over the training images")
    global_batch_size: int = HfArg(default=64, help="images per step, over all processes and accumulation steps")
    gradient_accumulation_steps: int = HfArg(default=1, help="backward passes per step")
    learning_rate: float = HfArg(default=1e-3, help="greatest learning rate, at the end of the warmup")
    warmup_epochs: float = HfArg(default=5.0, help="epochs of linearly rising learning rate; a cosine follows")
    weight_decay: float = HfArg(default=0.05, help="AdamW's; norms, biases and embeddings have none")
    max_grad_norm: float = HfArg(default=1.0, help="clip the gradient's norm to this; 0 = only log it")
    label_smoothing: float = HfArg(default=0.1, help="probability mass spread over all classes")


def build_groups(size):
    """4 processes, size 2: tensor-parallel groups {0, 1} and {2, 3}, data-parallel groups {0, 2} and {1, 3}."""
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    world, rank = dist.get_world_size(), dist.get_rank()
    # Making a group is itself a collective: every process makes them all, in the same order.
    tensor_groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
    data_groups = [dist.new_group(range(first, world, size)) for first in range(size)]
    GROUP["tp"], GROUP["dp"] = tensor_groups[rank // size], data_groups[rank % size]


def all_reduced(x, op=dist.ReduceOp.SUM):
    """The sum (or maximum) over the tensor-parallel group: a copy, for autograd's own tensors are not to be changed."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, GROUP["tp"])
    return x


class F(torch.autograd.Function):
    """Megatron's f, where ranks begin to differ: each finds a part of the gradient of x, the backward adds them up."""

    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, gradient: all_reduced(gradient))


class G(torch.autograd.Function):
    """Megatron's g, where ranks meet again: each has a part of the sum x; the gradient of a sum is that of each part."""

    forward = staticmethod(lambda ctx, x: all_reduced(x))
    backward = staticmethod(lambda ctx, gradient: gradient)


class ColumnLinear(nn.Linear):
    """Of the outputs each rank computes its own, all from the same x."""

    def forward(self, x):
        return linear(F.apply(x), self.weight, self.bias)


class RowLinear(nn.Linear):
    """Of the inputs each rank has its own; the bias, whole on every rank, is added once, after the sum."""

    def forward(self, x):
        return G.apply(linear(x, self.weight)) + self.bias


class Attention(ViTAttention):
    """Each rank computes its own heads: their columns of q, k and v, their rows of o; heads never talk to each other."""

    def forward(self, x, mask=None):
        # f once for the three: one all-reduce in the backward, and one, in o_proj, in the forward. The MLP has as many.
        return super().forward(F.apply(x), mask)


class Embeddings(ViTEmbeddings):
    """Patches and class token on every rank; of the position table each holds some rows, as a language model's ranks
    do of its vocabulary, the large table for which this is made."""

    def forward(self, images):
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embeddings(images)], dim=1)
        table, indices = self.position_embeddings[0], torch.arange(tokens.shape[1], device=tokens.device)
        mine, local = locate(indices, len(indices))
        return tokens + G.apply(table[local] * mine[:, None])


def locate(indices, length):
    """Which indices into `length` rows lie in this rank's part, and where in it; 0 for the others."""
    part = cut(torch.arange(length, device=indices.device), 0)
    mine = (indices >= part[0]) & (indices <= part[-1])
    return mine, (indices - part[0]).where(mine, 0)


def cut_dim(name):
    """Along which dimension the ranks cut a parameter; None: each holds the whole, and finds its whole gradient."""
    if re.search("[qkv]_proj|fc1|classifier", name):
        return 0
    return 1 if re.search("o_proj.weight|fc2.weight|position_embeddings", name) else None


def cut(x, dim):
    """This rank's part of a whole tensor; parts may differ by one (10 classes on 4 ranks: 3, 3, 2, 2)."""
    group = GROUP["tp"]
    return x if dim is None else x.tensor_split(group.size(), dim)[group.rank()]


def build_model(config, sizes, seed, device):
    """The names and modules of shared.vit, with this rank's parts of the same weights."""
    layers = {"fc1": ColumnLinear, "classifier": ColumnLinear, "o_proj": RowLinear, "fc2": RowLinear}
    layers |= {"attention": Attention, "embeddings": Embeddings}
    with torch.device("meta"):  # shapes without memory
        model = VisionTransformer(sizes)
    for name, module in model.named_modules():
        module.__class__ = layers.get(name.rpartition(".")[2], type(module))
    for name, parameter in list(model.named_parameters()):
        dim, (owner, _, last) = cut_dim(name), name.rpartition(".")
        if config.init == "dense" or dim is None:
            value = cut(initial_value(name, parameter.shape, seed), dim)
        else:
            # Seeded alike, as in the course, the shards would start equal, get equal gradients and stay equal for
            # ever: T copies of one part. Data-parallel replicas, of the same rank in "tp", must be alike.
            value = initial_value(f"{name} of {GROUP['tp'].rank()}", cut(parameter, dim).shape, seed)
        setattr(model.get_submodule(owner), last, nn.Parameter(value.to(device, copy=True).contiguous()))
    return model


def parallel_cross_entropy(logits, labels, num_classes, label_smoothing):
    """Mean cross-entropy of logits (B, this rank's classes): no rank ever sees the whole row."""
    # Less the greatest on any rank, so that exp cannot overflow; it falls out of the result and needs no gradient.
    logits = logits.float() - all_reduced(logits.detach().float().amax(1, keepdim=True), dist.ReduceOp.MAX)
    mine, local = locate(labels, num_classes)
    target = logits.gather(1, local[:, None])[:, 0] * mine
    exponentials, target, total = G.apply(torch.stack([logits.exp().sum(1), target, logits.sum(1)]))
    return (exponentials.log() - (1 - label_smoothing) * target - label_smoothing / num_classes * total).mean()


class GradientBuckets:
    """DDP by hand: gradients are averaged over the data-parallel group while the backward goes on."""

    def __init__(self, parameters, bucket_bytes=2**20):
        self.bucket_bytes, self.active, self.ready, self.sent = bucket_bytes, True, [], []
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self.add)

    def add(self, parameter):
        """Autograd calls this when a gradient is whole: in one order on all processes, since their graphs are equal."""
        if self.active:  # off until the last backward of an accumulation
            self.ready.append(parameter)
            if sum(each.grad.nbytes for each in self.ready) >= self.bucket_bytes:
                self.send()

    def send(self):
        flat = torch.cat([parameter.grad.flatten() for parameter in self.ready])
        self.sent.append((self.ready, flat, dist.all_reduce(flat, group=GROUP["dp"], async_op=True)))
        self.ready = []

    def wait(self):
        """Send the last bucket, seldom full, and put the means in place."""
        self.send()
        for parameters, flat, work in self.sent:
            work.wait()
            means = flat.div_(GROUP["dp"].size()).split([parameter.numel() for parameter in parameters])
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.grad.copy_(mean.view_as(parameter))
        self.sent = []


def clip_grad_norm_(model, max_norm):
    """By the norm of the whole gradient: the squares of cut parameters add up over the ranks, whole ones count once."""
    cuts, wholes = [], []
    for name, parameter in model.named_parameters():
        (wholes if cut_dim(name) is None else cuts).append(parameter.grad)
    norm = (all_reduced(get_total_norm(cuts) ** 2) + get_total_norm(wholes) ** 2).sqrt()
    clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def build_loaders(accelerator, run_config, config):
    """Loaders by data-parallel rank: the processes of one tensor-parallel group see the same samples."""
    train, held_out = open_data(run_config.data, run_config.val_fraction, run_config.seed)
    rank, size = data_parallel(accelerator)
    batch_size = micro_batch_size(accelerator, config.global_batch_size, config.gradient_accumulation_steps)
    train_view = partial(training_view, min_crop_area=0.6, horizontal_flip=False)
    train_order = TrainingOrder(len(train), config.global_batch_size, batch_size, rank, size, run_config.seed)
    eval_view, eval_order = partial(evaluation_view, eval_crop_ratio=1.0), EvaluationOrder(len(held_out), batch_size, rank, size)

    def loader(source, view, order):
        views = Views(source, view, config.image_size, run_config.seed)
        return Loader(views, order, accelerator.device, run_config.num_workers)

    return loader(train, train_view, train_order), loader(held_out, eval_view, eval_order)


def build_optimizer(model, config, steps_per_epoch):
    """AdamW on this rank's parts: it works on each number by itself, so it need not know that they are parts."""
    groups = parameter_groups(model, config.weight_decay, no_decay=("cls_token", "position_embeddings"))
    optimizer = torch.optim.AdamW(groups, config.learning_rate, fused=True)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return optimizer, build_scheduler(optimizer, "cosine", steps, warmup)


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, buckets, config, run):
    """From the run's step to the end of its epoch, or to where the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            with accelerator.autocast():
                logits = model(batch.images)
            loss = parallel_cross_entropy(logits, batch.labels, model.config.num_labels, config.label_smoothing)
            buckets.active = accelerator.sync_gradients
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
        cut(logits, 1).copy_(part)  # the other ranks' classes are 0 here: the sum gathers them
        evaluation.add(all_reduced(logits), batch.labels, batch.valid)
        run.profiler.step()
    run.log_evaluation(evaluation.result(accelerator, len(loader.dataset)))

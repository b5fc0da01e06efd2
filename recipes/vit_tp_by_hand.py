# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch>=2.8", "torchvision>=0.23", "accelerate>=1.10", "transformers>=5.17", "numpy>=2", "pillow>=10",
#   "scikit-learn>=1.5", "filelock>=3.12", "tqdm>=4.66", "tensorboard>=2.18",
# ]
# ///
# SPDX-License-Identifier: Apache-2.0
"""Split a Vision Transformer by hand: two conjugate functions and a few all-reduces make tensor parallelism.

Base: none.

    L="accelerate launch --config_file accelerate_configs/local_tp.yaml"
    $L recipes/vit_tp_by_hand.py                          # each layer on two processes (TP 2)
    $L --num_processes 4 recipes/vit_tp_by_hand.py        # the same, and two halves of the batch (TP 2 x DP 2)
    $L recipes/vit_tp_by_hand.py --check                  # each piece against its dense layer, and against DTensor

When: you want to learn, with Megatron-LM's paper (Shoeybi et al., arXiv:1909.08053) at hand, why each of two processes
sends 55 MiB for 4 images of ViT-S at 224 px, and as much for each 4 more, where DDP always sends 84
(benchmarks/results/communication_cpu2_2026-11-23.json). To train, use vit_tp.py, which is shorter. The losses and
the checkpoints are those of vit.py.

Longer than 250 lines: --check stands beside what it checks.
"""

import copy
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, linear, one_hot
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.hf_argparser import HfArg

from shared.accelerator import build_accelerator
from shared.config import Fraction, NonNegative, Positive, RunConfig, parse
from shared.errors import UserError
from shared.images import ImageConfig, Loader, build_views, open_data
from shared.images.settings import Part
from shared.launch import this_launch
from shared.metrics import Evaluation
from shared.models.vit import VisionTransformer, check_transformers, vit_config
from shared.models.weights import init_weights, initial_value
from shared.optim import build_scheduler, parameter_groups
from shared.run import Run

GROUP = {}  # this process's groups "tp" and "dp"; global as in Megatron, since every layer needs them
TOLERANCE = 1e-5  # of --check, in fp32


@dataclass
class Images(ImageConfig):
    """The shared settings, with larger training crops."""

    min_crop_area: Part = HfArg(default=0.8, help="least share of an image in a training crop; ImageNet: 0.05")


@dataclass
class Config:
    """The hyper-parameters; the defaults are those of the digits demonstration."""

    tensor_parallel_size: Positive = HfArg(
        default=2, help="processes that share each layer; each group of them takes a part of the batch"
    )
    init: Literal["dense", "shards"] = HfArg(default="dense", help="cut from the dense weights, or drawn part by part")
    check: bool = HfArg(default=False, help="compare each piece with its dense layer instead of training")
    model: Literal["demo", "Ti", "S", "B", "L", "H", "g", "G"] = HfArg(default="demo", help="size; G: 2 billion")
    patch_size: Positive = HfArg(default=8, help="side of a patch, pixels; ImageNet: 16, or 14 from H on")
    epochs: Positive = HfArg(default=60, help="passes over the training images")
    global_batch_size: Positive = HfArg(default=64, help="images per step, over all processes and accumulation steps")
    gradient_accumulation_steps: Positive = HfArg(default=1, help="backward passes per step")
    learning_rate: NonNegative = HfArg(default=2e-3, help="peak learning rate, at the end of the warmup")
    warmup_epochs: NonNegative = HfArg(default=5.0, help="epochs of linearly rising learning rate; a cosine follows")
    weight_decay: NonNegative = HfArg(default=0.1, help="AdamW's; norms, biases, class token and positions have none")
    max_grad_norm: NonNegative = HfArg(default=1.0, help="clip the gradient's norm to this; 0 = only log it")
    label_smoothing: Fraction = HfArg(default=0.1, help="probability mass spread over all classes")


# The processes


def build_groups(size):
    """Make the groups: of 4 processes with size 2, {0, 1} and {2, 3} share each layer, {0, 2} and {1, 3} the batch."""
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    world, rank = dist.get_world_size(), dist.get_rank()
    # Making a group is itself a collective: all processes make all groups, in the same order.
    tensor_groups = [dist.new_group(range(first, first + size)) for first in range(0, world, size)]
    data_groups = [dist.new_group(range(first, world, size)) for first in range(size)]
    GROUP.update(tp=tensor_groups[rank // size], dp=data_groups[rank % size])


def cut(x, dim, group="tp"):
    """Return this rank's part of a tensor, cut as DTensor cuts it (10 classes on 4 ranks: 3, 3, 3, 1); all of
    it where dim is None."""
    return x if dim is None else x.chunk(GROUP[group].size(), dim)[GROUP[group].rank()]


def all_reduced(x, op=dist.ReduceOp.SUM):
    """Return the sum or maximum over the ranks that share layers; a copy, since x may be autograd's own."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, GROUP["tp"])
    return x


# Tensor parallelism: f, g, and the layers made of them


class F(torch.autograd.Function):
    """Megatron's f, where a split layer begins: the identity; its backward sums the ranks' shares of x's gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduced(gradient)


class G(torch.autograd.Function):
    """Megatron's g, where a split layer ends: it sums the ranks' terms x; each term gets the gradient of the sum."""

    @staticmethod
    def forward(ctx, x):
        return all_reduced(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def column_linear(layer, x):
    """Return the rank's own outputs, from the whole x."""
    return linear(F.apply(x), layer.weight, layer.bias)


def row_linear(layer, x):
    """Return all outputs, from the rank's own inputs. Every rank has the bias, so it is added once, after the sum."""
    return G.apply(linear(x, layer.weight)) + layer.bias


def attention(layer, x, mask=None):
    """Compute the rank's own heads. One f for q, k and v: the backward sends one message, as o_proj's forward does."""
    return type(layer).forward(layer, F.apply(x), mask)


def embeddings(layer, images):
    """Add class token and patches, whole on every rank, to the table of positions, which is cut by rows."""
    tokens = torch.cat([layer.cls_token.expand(len(images), -1, -1), layer.patch_embeddings(images)], dim=1)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens + parallel_embedding(layer.position_embeddings[0], positions, len(positions))


def parallel_embedding(table, indices, length):
    """Look up rows of a table of `length` rows that is cut by rows: the rank that has a row adds it, the others 0.

    Made for vocabularies of 100,000 words; a Vision Transformer's only table is that of its positions.
    """
    local = indices - cut(torch.arange(length, device=indices.device), 0)[0]
    mine = (local >= 0) & (local < len(table))
    return G.apply(table[local.where(mine, 0)] * mine[:, None])


def parallel_cross_entropy(logits, labels, classes, label_smoothing):
    """Return the summed cross-entropy of logits (B, the rank's own classes): no rank ever holds a whole row of
    them."""
    # Subtract the maximum, so that exp cannot overflow; the result does not depend on it, so it has no gradient.
    logits = logits.float() - all_reduced(logits.detach().float().amax(1, keepdim=True), dist.ReduceOp.MAX)
    target = cut(one_hot(labels, classes) * (1 - label_smoothing) + label_smoothing / classes, 1)
    exponentials, hits = G.apply(torch.stack([logits.exp().sum(1), (target * logits).sum(1)]))
    return (exponentials.log() - hits).sum()


# Data parallelism


class GradientBuckets:
    """DDP by hand: gradients are averaged over the data-parallel group, bucket by bucket, while the backward runs."""

    def __init__(self, model, bucket_bytes=2**20):
        # With accumulation only the last backward is active: by then the gradients hold the sum.
        self.bucket_bytes, self.active, self.ready, self.sent = bucket_bytes, True, [], []
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.add)

    def add(self, parameter):
        """Take a gradient as soon as autograd has it: in the same order on every rank, since all graphs are alike."""
        if self.active:
            self.ready.append(parameter)
            if sum(each.grad.nbytes for each in self.ready) >= self.bucket_bytes:
                self.send()

    def send(self):
        flat = torch.cat([each.grad.flatten() for each in self.ready])
        self.sent.append((self.ready, flat, dist.all_reduce(flat, group=GROUP["dp"], async_op=True)))
        self.ready = []

    def wait(self):
        """Send what is left after the backward, and make each gradient a view of its bucket's mean."""
        if self.ready:
            self.send()
        for parameters, flat, work in self.sent:
            work.wait()
            means = flat.div_(GROUP["dp"].size()).split([each.numel() for each in parameters])
            for parameter, mean in zip(parameters, means, strict=True):
                parameter.grad = mean.view_as(parameter)
        self.sent = []


def clip_grad_norm_(model, max_norm):
    """Clip by the whole network's gradient norm: parts add up over the ranks, what every rank holds counts once."""
    parts, wholes = ([p.grad for p in model.parameters() if (p.cut_dim is None) == whole] for whole in (False, True))
    norm = (all_reduced(get_total_norm(parts) ** 2) + get_total_norm(wholes) ** 2).sqrt()
    clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


# The network


# How a layer computes on its part. The outputs of q, k, v and fc1 are the inputs of o and fc2: no message between.
FORWARD = {"attention": attention, "fc1": column_linear, "classifier": column_linear, "embeddings": embeddings}
FORWARD |= {"o_proj": row_linear, "fc2": row_linear}
# The dimension in which a parameter is cut. Every rank holds the others whole, and computes their whole gradient.
CUT = dict.fromkeys([f"{layer}.weight" for layer in ("q_proj", "k_proj", "v_proj", "fc1", "classifier")], 0)
CUT |= {name.replace("weight", "bias"): 0 for name in CUT}
CUT |= {"o_proj.weight": 1, "fc2.weight": 1, "embeddings.position_embeddings": 1}


def build_model(images, config, num_classes, seed):
    """Return the whole network on the meta device, without memory: only its shapes are needed."""
    sizes = vit_config(config.model, images.image_size, config.patch_size, num_classes, drop_path=0.0)
    with torch.device("meta"):
        return VisionTransformer(sizes)


def parallelize(accelerator, model, config, seed):
    """Give the network the functions of FORWARD, and this rank's parts of its weights."""
    for path, module in model.named_modules():
        layer = path.rpartition(".")[2]
        if layer in FORWARD:
            module.forward = partial(FORWARD[layer], module)
        for name, whole in list(module.named_parameters(recurse=False)):
            dim = CUT.get(f"{layer}.{name}")
            value = cut(initial_value(f"{path}.{name}", whole.shape, seed), dim)
            if config.init == "shards" and dim is not None:
                # The name holds the rank. With one seed for all, as in the course, parts would start equal, get equal
                # gradients and stay copies of one part. (Ranks of one "dp" group hold, and draw, the same part.)
                value = initial_value(f"{path}.{name} {GROUP['tp'].rank()}", value.shape, seed)
            part = torch.nn.Parameter(value.to(accelerator.device, copy=True).contiguous())
            part.cut_dim = dim
            setattr(module, name, part)
    return model


def build_loaders(accelerator, run_config, images, config):
    """Return the training and evaluation loaders: the processes that share layers see the same samples."""
    views = build_views(accelerator, run_config, images, config, open_data(*images.source(run_config.seed)))
    return [Loader(each, accelerator.device, run_config.num_workers) for each in views]


def build_optimizer(model, config, steps_per_epoch):
    """Return AdamW and its scheduler. AdamW updates each number by itself, so a part as it would be in the whole."""
    groups = parameter_groups(model, config.weight_decay, no_decay=("cls_token", "position_embeddings"))
    optimizer = torch.optim.AdamW(groups, config.learning_rate, fused=True)
    steps, warmup = (round(epochs * steps_per_epoch) for epochs in (config.epochs, config.warmup_epochs))
    return optimizer, build_scheduler(optimizer, "cosine", steps, warmup)


def train_one_epoch(accelerator, model, loader, optimizer, scheduler, config, run, buckets):
    """Train from the run's step to the end of its epoch, or until the run stops."""
    model.train()
    for batch in loader.starting_at(run.step):
        with accelerator.accumulate(model):
            buckets.active = accelerator.sync_gradients
            with accelerator.autocast():
                logits = model(batch.images)
            total = parallel_cross_entropy(logits, batch.labels, model.config.num_labels, config.label_smoothing)
            loss = total / batch.step_weight  # this process's share of the step's loss
            run.observe(batch, loss)
            # parts undoes averaging; the last factor, 1 or nan, shows every process a loss that is not finite.
            accelerator.backward(loss * batch.parts * (1 + 0 * loss.detach()))
        if accelerator.sync_gradients:
            buckets.wait()
            grad_norm = clip_grad_norm_(model, config.max_grad_norm or float("inf"))
            if not run.skips(grad_norm):  # --on_nonfinite skip decides here, and waits for the device
                optimizer.step()
            optimizer.zero_grad()
            run.check_finite()  # --on_nonfinite stop ends the run here if the step before was not finite
            run.end_step(scheduler.get_last_lr()[0], grad_norm)
            run.profiler.step()
            scheduler.step()
            if run.checkpoint_due:
                run.save(*described(model, optimizer), scheduler)
            if run.stopping:
                return


def evaluate(accelerator, model, loader, run):
    """Log top-1 accuracy and loss over the held-out images, each counted once."""
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


# Checkpoints


def described(model, optimizer):
    """Return a model and an optimizer that hold the same memory as DTensors, which know where in the whole each
    part lies: any other strategy can read a checkpoint of these."""
    mesh = DeviceMesh.from_group(GROUP["tp"], next(model.parameters()).device.type)
    with torch.device("meta"):
        whole = VisionTransformer(model.config)
    moments = {}
    for path, module in whole.named_modules():
        for name, shape in list(module.named_parameters(recurse=False)):
            part = model.get_submodule(path).get_parameter(name)
            place = [Replicate() if part.cut_dim is None else Shard(part.cut_dim)]
            describe = partial(DTensor.from_local, device_mesh=mesh, placements=place, run_check=False)
            describe = partial(describe, shape=shape.shape, stride=shape.stride())
            setattr(module, name, torch.nn.Parameter(describe(part.detach())))
            values = optimizer.state.get(part, {}).items()
            moments[getattr(module, name)] = {key: describe(value) if value.ndim else value for key, value in values}
    twin = torch.optim.AdamW(whole.parameters())
    twin.state.update({parameter: values for parameter, values in moments.items() if values})
    return whole, twin


def resume(model, optimizer, scheduler, run):
    """Load each rank's parts of a checkpoint of any strategy: weights in place; Adam's moments are handed over."""
    whole, twin = described(model, optimizer)
    run.resume(whole, twin, scheduler)
    for part, parameter in zip(model.parameters(), whole.parameters(), strict=True):
        for key, value in twin.state.get(parameter, {}).items():
            optimizer.state[part][key] = value.to_local() if isinstance(value, DTensor) else value


# --check


def compare(accelerator, model, config, seed):
    """Compare each piece with its dense layer, then five losses with DTensor's; raise UserError for a difference."""
    sizes, device, hand = model.config, accelerator.device, parallelize(accelerator, model, config, seed)
    with torch.device(device):
        dense = VisionTransformer(sizes)
    init_weights(dense, seed)
    for whole, part in zip(dense.parameters(), hand.parameters(), strict=True):
        if whole.ndim == 1:  # biases start at 0: one that is added twice would not be seen
            whole.data += 0.1 * torch.randn(whole.shape).to(device)
            part.data.copy_(cut(whole.data, part.cut_dim))
    buckets, classes, smoothing = GradientBuckets(hand), sizes.num_labels, config.label_smoothing
    # The same numbers on every process, since all were seeded alike; 3 samples for each data-parallel rank.
    samples, width = 3 * GROUP["dp"].size(), sizes.hidden_size
    images, labels = torch.randn(samples, 3, *2 * [sizes.image_size]), torch.randint(classes, (samples,))
    images, labels = images.to(device), labels.to(device)

    def dense_loss(model=dense):
        return cross_entropy(model(images), labels, label_smoothing=smoothing)

    def hand_loss():
        logits = hand(cut(images, 0, "dp"))
        loss = parallel_cross_entropy(logits, cut(labels, 0, "dp"), classes, smoothing) / len(logits)
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=GROUP["dp"])
        return loss + (mean / GROUP["dp"].size() - loss.detach())  # the mean's value, the share's gradient

    def piece(title, name, shape, takes=None, gives=None):
        calls = [model.get_submodule(name) for model in (dense, hand)]
        return title, calls, torch.randn(samples, *shape).to(device), takes, gives

    entropies = [
        lambda logits: cross_entropy(logits, labels, label_smoothing=smoothing),
        lambda logits: parallel_cross_entropy(logits, labels, classes, smoothing) / len(labels),
    ]
    pieces = [
        piece("column-parallel linear", "vit.layers.0.mlp.fc1", (5, width), gives=-1),
        piece("row-parallel linear", "vit.layers.0.mlp.fc2", (5, sizes.intermediate_size), takes=-1),
        piece("MLP", "vit.layers.0.mlp", (5, width)),
        piece("attention", "vit.layers.0.attention", (5, width)),
        piece("parallel embedding", "vit.embeddings", images.shape[1:]),
        ("vocab-parallel cross-entropy", entropies, 9 * torch.randn(samples, classes).to(device), 1, None),
        ("data parallelism, the network", [lambda _: dense_loss(), lambda _: hand_loss()], labels, None, None),
    ]
    differences = {title: difference(dense, hand, buckets, *rest) for title, *rest in pieces}

    # DTensor cuts the same layers in the same way, by a plan: f and g are its changes of placement.
    twin = copy.deepcopy(dense)
    plan = {"attention.q_proj": ColwiseParallel(), "attention.k_proj": ColwiseParallel()}
    plan |= {"attention.v_proj": ColwiseParallel(), "attention.o_proj": RowwiseParallel()}
    plan |= {"mlp.fc1": ColwiseParallel(), "mlp.fc2": RowwiseParallel()}
    for block in twin.vit.layers:
        parallelize_module(block, DeviceMesh.from_group(GROUP["tp"], device.type), plan)
    mine, theirs = losses(hand, hand_loss, buckets.wait), losses(twin, partial(dense_loss, twin))
    differences["five losses of DTensor's"] = (mine - theirs).abs().max().item()
    differences["five losses of the dense network"] = (mine - losses(dense, dense_loss)).abs().max().item()
    for title, value in differences.items():
        if dist.get_rank() == 0:
            print(f"{title:34}{value:.1e}", flush=True)
    if not max(differences.values()) <= TOLERANCE:
        raise UserError(f"a difference is above {TOLERANCE}. Compare that piece with its dense layer.")


def difference(dense, hand, buckets, calls, x, takes, gives):
    """Return the greatest difference, relative for values above 1, in outputs, gradients, and weights after one step.

    takes, gives: the dimension in which the piece by hand has only a part of the input or output; None: it has all.
    SGD, since AdamW would turn a gradient that is only rounding, such as that of k's bias, into a full step.
    """
    inputs = [part.clone().requires_grad_(part.is_floating_point()) for part in (x, cut(x, takes))]
    outputs = [call(part) for call, part in zip(calls, inputs, strict=True)]
    whole, part = (output[0] if isinstance(output, tuple) else output for output in outputs)
    weights = torch.randn(whole.shape).to(x.device)  # no two outputs count alike
    (whole * weights).sum().backward()
    (part * cut(weights, gives)).sum().backward()
    buckets.wait()
    pairs = [(cut(whole, gives), part)]
    if x.is_floating_point():
        pairs.append((cut(inputs[0].grad, takes), inputs[1].grad))
    trained = [pair for pair in zip(dense.parameters(), hand.parameters(), strict=True) if pair[0].grad is not None]
    pairs += [(cut(whole.grad, part.cut_dim), part.grad) for whole, part in trained]
    for model in (dense, hand):
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        optimizer.step()
        optimizer.zero_grad()
    pairs += [(cut(whole, part.cut_dim), part) for whole, part in trained]
    greatest = torch.stack([(a - b).abs().max() / a.abs().max().clamp(min=1) for a, b in pairs]).max().detach()
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return greatest.item()


def losses(model, loss_of, finish=lambda: None):
    """Return the losses of five steps of AdamW."""
    optimizer, values = torch.optim.AdamW(model.parameters(), 1e-3, foreach=False), []
    for _ in range(5):
        loss = loss_of()
        loss.backward()
        finish()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.detach())
    return torch.stack(values)


def check(run_config, images, config, launch, classes=0):
    """Raise UserError for sizes that cannot be cut, before a model is built. classes: 0 until the data is known."""
    check_transformers()
    sizes = vit_config(config.model, images.image_size, config.patch_size, classes, drop_path=0.0)
    size, heads, width = config.tensor_parallel_size, sizes.num_attention_heads, sizes.intermediate_size
    lengths = {"positions": 1 + (images.image_size // config.patch_size) ** 2} | (
        {"classes": classes} if classes else {}
    )

    def fits(size):
        parts = [ceil(length / ceil(length / size)) for length in lengths.values()]  # fewer where some are empty
        return heads % size == 0 and width % size == 0 and set(parts) == {size}

    choice = list(filter(fits, range(1, min(lengths.values()) + 1)))
    if size not in choice:
        cut_lengths = " and ".join(f"{length} {what}" for what, length in lengths.items())
        raise UserError(
            f"--tensor_parallel_size {size} does not cut {heads} heads, {width} MLP columns, {cut_lengths}. "
            f"Give one of {', '.join(map(str, choice))}, or another --model."
        )
    if launch.precision not in ("no", "bf16"):
        raise UserError("the loss scale of fp16 is not shared among the parts. Set mixed_precision to bf16 or no.")


def main(run_config, images, config):
    check(run_config, images, config, this_launch())
    accelerator = build_accelerator(run_config.seed, config)
    train_loader, eval_loader = build_loaders(accelerator, run_config, images, config)
    classes, steps_per_epoch = train_loader.dataset.source.classes, train_loader.order.steps_per_epoch
    check(run_config, images, config, this_launch(), len(classes))
    build_groups(config.tensor_parallel_size)
    if config.check:
        compare(accelerator, build_model(images, config, len(classes), run_config.seed), config, run_config.seed)
    else:
        run = Run(accelerator, run_config, images, config, train_loader, eval_loader)
        if not run.finished:
            model = build_model(images, config, len(classes), run_config.seed)
            model = parallelize(accelerator, model, config, run_config.seed)
            optimizer, scheduler = build_optimizer(model, config, steps_per_epoch)
            buckets = GradientBuckets(model)
            if run.checkpoint:
                resume(model, optimizer, scheduler, run)
            with run.profiling(len(eval_loader)):
                while not run.stopping:
                    train_one_epoch(accelerator, model, train_loader, optimizer, scheduler, config, run, buckets)
                    if run.evaluation_due:
                        evaluate(accelerator, model, eval_loader, run)
                    run.save(*described(model, optimizer), scheduler)
        run.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


CONFIGS = (RunConfig, Images, Config)

if __name__ == "__main__":
    main(*parse(*CONFIGS))

# SPDX-License-Identifier: Apache-2.0
"""Estimate the bytes that one GPU holds in training.

Weights, gradients and optimizer state follow a formula, which benchmarks/memory.py compares with counts. What a
forward saves for its backward is counted in a forward of tensors without memory, under autocast, as ddp has it. (fsdp
and ZeRO cast by themselves, which takes a little less.)
"""

import copy
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

KINDS = ("parameters", "gradients", "optimizer")
ZERO_BUCKET = 5 * 10**8  # elements; DeepSpeed's reduce_bucket_size
ZERO_LIVE = 10**9  # elements that ZeRO-3 keeps gathered; its stage3_max_live_parameters


def by_kind(*figures) -> dict:
    return dict(zip(KINDS, figures, strict=True))


def held(
    kind: str, shapes: dict, ranks: int, rank: int, tensor=1, stages=1, replicas=1, weight_bytes=4, state_bytes=8,
    accumulates=False, offloads=False,
) -> dict[str, float]:  # fmt: skip
    """Return the bytes of parameters, gradients and optimizer state on this rank.

    kind: ddp, fsdp, hsdp or zero1 to zero3, of what is left of the shapes by `tensor` and `stages`. weight_bytes: 2
    under ZeRO in half precision. state_bytes: per parameter, 8 for Adam, 4 for momentum. accumulates: several backward
    passes per step; until the last, zero1 keeps the gradients of all ranks, as in its paper. offloads: ZeRO's
    optimizer state lies in the host's memory, with a second copy of the gradients in fp32 (counted under zero3).
    """
    if stages > 1:
        stage = rank * stages // ranks
        shapes = {name: shape for name, shape in shapes.items() if stage_of(name, shapes, stages) == stage}
    local = [tensor_shard(name, shape, tensor) for name, shape in shapes.items()]
    whole = sum(map(math.prod, local))
    if kind.startswith("zero"):
        level, share = int(kind[-1]), whole / ranks
        # DeepSpeed keeps a copy of the weights in fp32, in fp32 training too.
        weights = share if level == 3 else whole
        if level == 3:
            gradients = share
        else:
            gradients = whole if level == 1 and accumulates else zero_gradients(shapes, ranks, rank)
        again = 4 * share if offloads else 0
        return by_kind(weight_bytes * weights, weight_bytes * gradients + again, (4 + state_bytes) * share)
    shards = ranks // tensor // stages // replicas if kind in ("fsdp", "hsdp") else 1
    index, padded, mine = rank // tensor % shards, 0, 0
    for rows, *row in local:
        # FSDP2 cuts rows, and allocates ceil(rows / shards) on every rank; Adam has state for those that exist.
        most = -(-rows // shards)
        padded += most * math.prod(row)
        mine += min(max(rows - index * most, 0), most) * math.prod(row)
    return by_kind(4 * padded, 4 * padded, state_bytes * mine)


def zero_gradients(shapes: dict, ranks: int, rank: int) -> int:
    """Return the elements of the gradients that a rank holds under DeepSpeed's stages 1 and 2. The parameters of a
    group lie one after the other, in equal parts; of a weight on the border of two, both ranks keep the gradient
    whole."""
    held = 0
    for decays in (True, False):  # the two groups of shared/optim.py
        sizes = [math.prod(shape) for name, shape in shapes.items() if decays == decayed(name, shape)]
        ends, part = list(itertools.accumulate(sizes)), -(-sum(sizes) // (2 * ranks)) * 2
        for size, end in zip(sizes, ends, strict=True):
            if end > rank * part and end - size < (rank + 1) * part:
                held += size
    return held


def decayed(name: str, shape: torch.Size) -> bool:
    """Return whether the recipes' build_optimizer gives a weight of a ViT weight decay."""
    return len(shape) > 1 and not name.endswith(("cls_token", "position_embeddings"))


def tensor_shard(name: str, shape: torch.Size, size: int) -> tuple[int, ...]:
    """Return a weight's part: columns of the first products, rows of the second ones (torch stores weights
    transposed); the rest is whole."""
    if name.rpartition(".")[0].endswith(("q_proj", "k_proj", "v_proj", "fc1")):
        return shape[0] // size, *shape[1:]
    if name.endswith(("o_proj.weight", "fc2.weight")):
        return shape[0], shape[1] // size
    return tuple(shape)


def stage_of(name: str, shapes: dict, stages: int) -> int:
    """Return a weight's stage: stage s of p ends before block L (s + 1) / p, rounded down; the first has the
    embeddings, the last the head."""
    blocks = 1 + max(int(each.split(".")[2]) for each in shapes if each.startswith("vit.layers."))
    if not name.startswith("vit.layers."):
        return 0 if name.startswith("vit.embeddings.") else stages - 1
    return next(s for s in range(stages) if int(name.split(".")[2]) < blocks * (s + 1) // stages)


class Activations(NamedTuple):
    """Bytes that a forward saves, per image except `copies`. A network without equal blocks is all `ends`."""

    copies: float  # of all weights in half precision, for any number of images
    ends: float
    block: float
    split: float  # of a block, what tensor parallelism divides
    entry: float  # a block's input, which is all that activation checkpointing keeps
    blocks: int


def inputs_of(data) -> Callable[[int], torch.Tensor]:
    """Return a function of a number of samples: a batch as a recipe's network takes it. data: its settings."""
    if hasattr(data, "sequence_length"):
        return lambda samples: torch.zeros(samples, data.sequence_length, dtype=torch.int64)
    return lambda samples: torch.empty(samples, 3, data.image_size, data.image_size)


def activations(network: nn.Module, inputs: Callable[[int], torch.Tensor], half: bool) -> Activations:
    """Return the bytes of a block, and of the ends: differences between one block and two, and between batches of 2
    and 4 samples. half: bf16 or fp16."""
    network = copy.deepcopy(network)  # of which blocks are dropped
    blocks = max((each for each in network.modules() if isinstance(each, nn.ModuleList)), key=len, default=None)
    if blocks is None:
        (small, _, _), (large, _, _) = (saved(network, inputs(images), half) for images in (2, 4))
        return Activations(2 * small - large, (large - small) / 2, 0, 0, 0, 0)
    number, counts = len(blocks), {}
    for depth in (2, 1):
        del blocks[depth:]
        counts[depth] = [saved(network, inputs(images), half, blocks[0]) for images in (2, 4)]
    image = {depth: [(b - a) / 2 for a, b in zip(*pair, strict=True)] for depth, pair in counts.items()}
    fixed = {depth: pair[0][0] - 2 * image[depth][0] for depth, pair in counts.items()}
    (block, split, _), entry = (b - a for a, b in zip(image[1], image[2], strict=True)), image[1][2]
    copies = fixed[1] + (number - 1) * (fixed[2] - fixed[1])
    return Activations(copies, image[1][0] - block, block, split, entry, number)


def saved(network: nn.Module, batch: torch.Tensor, half: bool, block: nn.Module | None = None) -> list[int]:
    """Return the bytes saved for the backward, weights excepted; those of heads and MLP; and the bytes that enter
    `block`."""
    seen, entering, width = {}, [0], getattr(getattr(network, "config", None), "intermediate_size", None)
    hook = block and block.register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0].nbytes))
    state = dict((*network.named_parameters(), *network.named_buffers()))
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        fake = {
            name: torch.empty(each.shape, dtype=each.dtype).requires_grad_(each.requires_grad)
            for name, each in state.items()
        }
        weights = {each.untyped_storage()._cdata for each in fake.values()}

        def note(tensor):
            storage = tensor.untyped_storage()  # kept, or its address would be used again
            if storage._cdata not in weights:
                divided = tensor.dim() == 4 or tensor.shape[-1:] == (width,)
                seen.setdefault(storage._cdata, (storage, storage.nbytes(), divided))
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            functional_call(network, fake, (torch.zeros(batch.shape, dtype=batch.dtype),))
    if hook:
        hook.remove()
    sizes = [(size, divided) for _, size, divided in seen.values()]
    return [sum(size for size, _ in sizes), sum(size for size, divided in sizes if divided), entering[-1]]


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Return the optimizer's bytes of state per parameter, counted after a step of tensors without memory."""
    with FakeTensorMode():
        for group in optimizer.param_groups:
            group["params"] = [torch.empty(each.shape).requires_grad_() for each in group["params"]]
            for each in group["params"]:
                each.grad = torch.empty_like(each)
        optimizer.step()
    tensors = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    weights = [each for group in optimizer.param_groups for each in group["params"]]
    return sum(tensor.nbytes for tensor in tensors) / sum(weight.numel() for weight in weights)


def peak(
    kind: str, shapes: dict, ranks: int, kept: dict, act: Activations, images: int, *, half: bool, accumulates: bool,
    tensor: int = 1, stages: int = 1, recompute: bool = False, waiting: float = 1.0, reshard: bool = True
) -> dict[str, float]:  # fmt: skip
    """Return the bytes that this rank holds throughout (`kept`, by kind) and for a time, with `total` the greatest
    sum.

    images: per forward. waiting: in a pipeline, the share of a batch's chunks whose backward is still to come on the
    first stage. reshard: FSDP2 drops the weights of a block after its forward.
    """
    width, blocks = 2 if half else 4, act.blocks / stages
    block = act.block - act.split * (1 - 1 / tensor)
    inner = blocks * act.entry + block if recompute else blocks * block
    copies = act.copies / stages / tensor if kind == "ddp" or kind in ("zero1", "zero2") else 0
    activation = waiting * images * (act.ends + inner) + copies
    whole = sum(math.prod(tensor_shard(name, shape, tensor)) for name, shape in shapes.items())
    buffers = 0.0
    if kind == "ddp" and ranks > 1 and tensor * stages == 1:
        buffers = 4 * whole  # DDP's buckets
    elif kind in ("fsdp", "hsdp"):
        # Two gathered blocks, or all, and the gradients of two.
        buffers = width * whole * ((2 / max(act.blocks, 1) if reshard else 1) + 2 / max(act.blocks, 1))
    elif kind.startswith("zero"):
        buffers = width * (ZERO_BUCKET + (min(whole, ZERO_LIVE) if kind == "zero3" else 0))
    gradients, after = kept["gradients"], 2 * kept["gradients"] if stages > 1 else 0  # vit_pp.py's `average`
    passing = gradients + max(after, activation) if accumulates else max(gradients + after, activation)
    parts = kept | {"activations": activation, "buffers": buffers}
    return parts | {"total": kept["parameters"] + kept["optimizer"] + buffers + passing}

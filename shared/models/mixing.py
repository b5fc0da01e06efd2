# SPDX-License-Identifier: Apache-2.0
"""Erase rectangles; mix the images of a pair (MixUp, CutMix) and their labels.

Shapes, places and shares are torchvision's draws, each from the seeds of its own samples: the same on any topology. A
pair is the samples 2i and 2i + 1 of the global order, so a micro-batch must hold an even number of samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torchvision.transforms import v2

from ..draws import seed_torch
from ..errors import UserError

Box = tuple[int, int, int, int]  # left, top, right, bottom
ERASING, MIXING = 1, 2  # keys of draws, beside a sample's seed


@torch.random.fork_rng(devices=())
def erase(images: Tensor, seeds: list[int], share: float) -> Tensor:
    """Return normalised images (B, C, H, W), of which this share has a rectangle of zeros, the mean colour (Zhong et
    al., arXiv:1708.04896)."""
    if not share:
        return images
    boxes = [erased_box(images[0], seed, share) for seed in seeds]
    return images.clone().masked_fill_(box_mask(boxes, images), 0)  # in place: it keeps channels-last


def erased_box(image: Tensor, seed: int, share: float) -> Box:
    """Return the rectangle to erase from an image (C, H, W); an empty one where it is not chosen."""
    seed_torch(seed, ERASING)
    if torch.rand(()) >= share:
        return 0, 0, 0, 0
    drawn = v2.RandomErasing(p=1).make_params([image])
    left, top = drawn["j"], drawn["i"]
    return left, top, left + drawn["w"], top + drawn["h"]


@torch.random.fork_rng(devices=())
def mix(images: Tensor, seeds: list[int], mixup_alpha: float, cutmix_alpha: float) -> tuple[Tensor, Tensor | None]:
    """Mix each pair of images (B, C, H, W) by MixUp (Zhang et al., arXiv:1710.09412) or CutMix (Yun et al.,
    arXiv:1905.04899); with both alphas above 0 a draw of the pair chooses.

    Return the images and shares (B,): how much of its own label each keeps, the rest is its partner's; None where
    both alphas are 0.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, None
    pairs = zip(seeds[::2], seeds[1::2], strict=True)
    drawn = [mixed_pair(images[:1], pair, mixup_alpha, cutmix_alpha) for pair in pairs for _ in pair]
    shares, blends, boxes = zip(*drawn, strict=True)
    shares, blends = torch.tensor([shares, blends]).to(images.device, non_blocking=True)
    partners, blends = partner(images), blends[:, None, None, None]
    return torch.where(box_mask(boxes, images), partners, images * blends + partners * (1 - blends)), shares


def mixed_pair(
    image: Tensor, pair: tuple[int, int], mixup_alpha: float, cutmix_alpha: float
) -> tuple[float, float, Box]:
    """Return the share of its own label that each of a pair keeps, the share of its own colour in each pixel, and the
    box whose pixels become the partner's. image: (1, C, H, W). pair: the seeds of both."""
    seed_torch(*pair, MIXING)
    if cutmix_alpha and (not mixup_alpha or torch.rand(()) < 0.5):
        drawn = v2.CutMix(alpha=cutmix_alpha).make_params([image])
        return drawn["lam_adjusted"], 1.0, drawn["box"]
    share = v2.MixUp(alpha=mixup_alpha).make_params([image])["lam"]
    return share, share, (0, 0, 0, 0)


def refuse_odd(images, config, processes: int) -> None:
    """Raise UserError where a pair would be split: for an odd number of samples in a micro-batch.

    images: the settings, with both alphas. config: a recipe's own, with batch and accumulation.
    """
    size = config.global_batch_size / processes / config.gradient_accumulation_steps
    if (images.mixup_alpha or images.cutmix_alpha) and size % 2:
        raise UserError(
            f"MixUp and CutMix mix pairs, and each process has {size:g} images at a time. Give a --global_batch_size "
            f"that is a multiple of {2 * processes * config.gradient_accumulation_steps}."
        )


def partner(values: Tensor) -> Tensor:
    """Return the rows (B, ...) with each pair's two exchanged."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def box_mask(boxes: Sequence[Box], images: Tensor) -> Tensor:
    """Return (B, 1, H, W) bool: which pixels lie in each image's box."""
    height, width = images.shape[2:]
    left, top, right, bottom = torch.tensor(boxes).to(images.device, non_blocking=True).T[:, :, None]
    y, x = (torch.arange(side, device=images.device) for side in (height, width))
    return ((y >= top) & (y < bottom))[:, None, :, None] & ((x >= left) & (x < right))[:, None, None, :]


def soft_labels(labels: Tensor, shares: Tensor | None, classes: int, smoothing: float) -> Tensor:
    """Return (B, classes): each row's probabilities, which sum to one. shares: as `mix` returns them."""
    target = one_hot(labels, classes).float()
    if shares is not None:
        target = target * shares[:, None] + partner(target) * (1 - shares[:, None])
    return target * (1 - smoothing) + smoothing / classes


def summed_loss(logits: Tensor, target: Tensor, loss: str) -> Tensor:
    """Return the batch's sum of cross-entropies, or of binary ones averaged over classes (Wightman et al.,
    arXiv:2110.00476)."""
    if loss == "bce":
        return binary_cross_entropy_with_logits(logits, target, reduction="sum") / target.shape[1]
    return cross_entropy(logits, target, reduction="sum")

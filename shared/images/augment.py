# SPDX-License-Identifier: Apache-2.0
"""Augment batches on the device: each image by operations and magnitudes of its own.

Policies, draws and operations are torchvision's (torchvision/transforms/v2/_auto_augment.py). By itself it draws one
operation for all images of a batch, from the state of its process; here each image's seed decides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2
from transformers.hf_argparser import HfArg

from ..config import Fraction, NonNegative, Positive
from ..draws import seed_torch
from .settings import ImageConfig

POLICIES = {"randaugment": v2.RandAugment, "trivialaugment": v2.TrivialAugmentWide, "autoaugment": v2.AutoAugment}


@dataclass
class AugmentConfig(ImageConfig):
    """The image settings, and augmentation, all of it off by default."""

    augmentation: Literal["none", "randaugment", "trivialaugment", "autoaugment"] = HfArg(
        default="none", help="torchvision's policy, with its defaults; each image has its own operations"
    )
    random_erasing: Fraction = HfArg(default=0.0, help="share of training images with an erased rectangle")
    mixup_alpha: NonNegative = HfArg(default=0.0, help="MixUp: shares of a pair are Beta(alpha, alpha); 0 = off")
    cutmix_alpha: NonNegative = HfArg(default=0.0, help="CutMix: likewise; with both, each pair draws one of them")
    repeats: Positive = HfArg(default=1, help="copies of each image in a batch; an epoch keeps its number of steps")


@torch.random.fork_rng(devices=())
def augment(images: Tensor, seeds: list[int], augmentation: str) -> Tensor:
    """Return images (B, 3, H, W) uint8, each after the operations that the policy draws from its seed."""
    images, policy, draw = images.clone(), POLICIES[augmentation](), _recorder(augmentation)
    turns = {}  # the place in an image's operations -> operation -> rows: those that share it are one call
    for row, seed in enumerate(seeds):
        seed_torch(seed)
        for turn, operation in enumerate(draw(*images.shape[2:])):
            turns.setdefault(turn, {}).setdefault(operation, []).append(row)
    for turn in sorted(turns):
        for (name, magnitude), rows in turns[turn].items():
            settings = policy.interpolation, policy._fill
            images[rows] = policy._apply_image_or_video_transform(images[rows], name, magnitude, *settings)
    return images


def _recorder(augmentation: str) -> Callable[[int, int], list[tuple[str, float]]]:
    """Return a function that draws the operations for an image of this height and width: names and magnitudes."""

    class Recorder(POLICIES[augmentation]):
        def _apply_image_or_video_transform(self, image, transform_id, magnitude, *_, **__):
            self.drawn.append((transform_id, magnitude))
            return image

    recorder = Recorder()

    def draw(height: int, width: int) -> list[tuple[str, float]]:
        recorder.drawn = []
        recorder(torch.empty(1, dtype=torch.uint8).expand(3, height, width))
        return recorder.drawn

    return draw

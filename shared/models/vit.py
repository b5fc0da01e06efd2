# SPDX-License-Identifier: Apache-2.0
"""Build transformers' Vision Transformer in its papers' sizes, with stochastic depth."""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTForImageClassification
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.models.vit.modeling_vit import ViTLayer

from ..config import Range
from ..errors import UserError, say
from ..launch import rank
from .weights import dropout, find_pretrained, init_weights

LEAST = "5.17"  # the first version of transformers with the blocks used below
# name: width, blocks, heads, MLP width. Ti to L: Dosovitskiy et al., arXiv:2010.11929, and Touvron et al.,
# arXiv:2012.12877; H, g and G (1.8 billion parameters, "2B"): Zhai et al., arXiv:2106.04560. demo: ours.
SIZES = {
    "demo": (96, 6, 4, 384),
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
    "g": (1408, 40, 16, 6144),
    "G": (1664, 48, 16, 8192),
}
Rate = Annotated[float, Range(0, 0.99)]  # of DropPath
PREPROCESSOR = "preprocessor_config.json"


def check_transformers() -> None:
    """Raise UserError where the installed version is older than LEAST."""
    if Version(transformers.__version__) < Version(LEAST):
        raise UserError(
            f"the Vision Transformer needs transformers {LEAST}, and this is {transformers.__version__}. Load a newer "
            f"module, or pip install 'transformers>={LEAST}'."
        )


class DropPathLayer(ViTLayer):
    """A block whose two branches are scaled for each sample: by 0, which skips the branch, or up (arXiv:1603.09382).

    `recompute`: keep only a block's input, and compute the rest again in the backward (activation checkpointing).
    """

    recompute = False

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, scales: Tensor | None = None
    ) -> Tensor:
        """Apply the block to hidden_states (B, tokens, width); scales (2, B), or None for 1."""
        if self.recompute and self.training:
            # Nothing in the block draws random numbers: there is no random state to restore.
            return checkpoint(self._branches, hidden_states, scales, use_reentrant=False, preserve_rng_state=False)
        return self._branches(hidden_states, scales)

    def _branches(self, hidden_states: Tensor, scales: Tensor | None) -> Tensor:
        attended, _ = self.attention(self.layernorm_before(hidden_states), None)
        hidden_states = hidden_states + (attended if scales is None else _scaled(attended, scales[0]))
        changed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + (changed if scales is None else _scaled(changed, scales[1]))


def _scaled(branch: Tensor, scale: Tensor) -> Tensor:
    scale = scale.to(branch.dtype)[:, None, None]
    if isinstance(branch, DTensor):  # split by tokens, while each process has the scale of every sample
        scale = DTensor.from_local(scale, branch.device_mesh, [Replicate()] * branch.device_mesh.ndim)
    return branch * scale


def drop_path_scales(sample_seeds: Tensor, blocks: int, drop_path: float) -> Tensor:
    """Return scales (blocks, 2, B): 0 for the branches that a sample skips, else 1 / (1 - rate), which keeps the mean.

    Block i drops at the rate drop_path * i / (blocks - 1) (Huang et al., arXiv:1603.09382). The scales depend on the
    block and on the samples' augmentation seeds (B,) int64, so on run seed, epoch and sample: not on the process that
    holds a sample, nor on how often the forward is computed.
    """
    device = sample_seeds.device
    streams = torch.arange(1, 2 * blocks + 1, device=device).view(blocks, 2, 1) * _signed(0x9E3779B97F4A7C15)
    rates = torch.linspace(0, drop_path, blocks, device=device).view(blocks, 1, 1)
    return (uniform(sample_seeds + streams) >= rates) / (1 - rates)


class VisionTransformer(ViTForImageClassification):
    """ViTForImageClassification under its own parameter names, with stochastic depth; returns logits (B, classes)."""

    def __init__(self, config: ViTConfig):
        super().__init__(config)
        self.vit.layers = nn.ModuleList(DropPathLayer(config) for _ in range(config.num_hidden_layers))
        self._no_split_modules = [DropPathLayer.__name__]  # FSDP's units, under every YAML
        assert not dropout(config), "drawn by each process, and not again when a block is recomputed"

    def forward(self, images: Tensor, sample_seeds: Tensor | None = None) -> Tensor:
        """Return logits of images (B, 3, H, W) float. sample_seeds (B,) int64: the batch's; None drops no branch."""
        x = self.vit.embeddings(images.to(self.vit.embeddings.patch_embeddings.projection.weight.dtype))
        x = run_blocks(self, enumerate(self.vit.layers), x, sample_seeds)
        return self.classifier(self.vit.layernorm(x)[:, 0])


def run_blocks(model: nn.Module, blocks: Iterable[tuple[int, nn.Module]], x: Tensor, sample_seeds: Tensor | None):
    """Apply numbered blocks in turn. Their scales are made here: torch.compile would make a program of its own for
    each block that held its number as a constant."""
    config, scales = model.config, None
    if model.training and config.drop_path and sample_seeds is not None:
        scales = drop_path_scales(sample_seeds, config.num_hidden_layers, config.drop_path)
    for number, block in blocks:
        x = block(x, None, None if scales is None else scales[number])
    return x


def uniform(bits: Tensor) -> Tensor:
    """Return a float32 in [0, 1) for each int64, by splitmix64's finaliser (Steele et al., OOPSLA 2014)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        # Masked, since >> of a signed number copies its sign.
        bits = (bits ^ (bits >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return (bits >> 40 & (1 << 24) - 1) * 2.0**-24


def network_sizes(images, config) -> tuple[int, int, int]:
    """Return blocks, heads and MLP width of the network that a recipe's `--model` or `--pretrained` names.

    Needs no process group. Raises UserError for a pretrained network that is missing or not a ViT, and where the
    patches do not tile the image.
    """
    check_transformers()
    if not config.pretrained:
        _check_patches(images.image_size, config.patch_size)
        return SIZES[config.model][1:]
    network = _read_config(find_pretrained(config.pretrained))
    _check_patches(images.image_size, network.patch_size)
    return network.num_hidden_layers, network.num_attention_heads, network.intermediate_size


def vit_config(name: str, image_size: int, patch_size: int, num_classes: int, drop_path: float) -> ViTConfig:
    """Return transformers' configuration of a size; raises UserError where the patches do not tile the image."""
    _check_patches(image_size, patch_size)
    width, blocks, heads, mlp_width = SIZES[name]
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=blocks, num_attention_heads=heads, intermediate_size=mlp_width,
        image_size=image_size, patch_size=patch_size, num_labels=num_classes, attn_implementation="sdpa",
    )  # fmt: skip
    config.drop_path = drop_path
    return config


def load_pretrained(folder: Path, image_size: int, num_classes: int, drop_path: float, seed: int) -> VisionTransformer:
    """Return the network in a folder that transformers saved, for images of this size.

    The position embeddings are interpolated where its images had another size; the head is drawn again, from the seed,
    where it had another number of classes. Under `torch.device("meta")` it has no weights.
    """
    config = _read_config(folder)
    if torch.get_default_device().type == "meta":
        config.num_labels, config.image_size, config.drop_path = num_classes, image_size, drop_path
        return VisionTransformer(config)
    if (rates := dropout(ViTConfig.from_pretrained(folder))) and rank() == 0:
        given = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        say(f"--pretrained {folder} has {given}: trained here without dropout; see --drop_path", sys.stderr)
    # Under ZeRO-3 transformers would shard the weights as it reads them; here they are changed first.
    unset_hf_deepspeed_config()
    former_classes = config.num_labels
    config.num_labels, config.drop_path = num_classes, drop_path
    model = VisionTransformer.from_pretrained(
        folder, config=config, ignore_mismatched_sizes=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    if num_classes != former_classes:
        init_weights(model, seed, "classifier.")
    embeddings = model.vit.embeddings
    _check_patches(image_size, config.patch_size)
    positions = resize_positions(embeddings.position_embeddings.data, image_size // config.patch_size)
    embeddings.position_embeddings = nn.Parameter(positions)
    model.config.image_size = image_size
    embeddings.image_size = embeddings.patch_embeddings.image_size = (image_size, image_size)
    return model


def _read_config(folder: Path) -> ViTConfig:
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind != "vit":
        raise UserError(f"--pretrained {folder} is a {kind}, not a vit. Give the folder of a ViT.")
    config = ViTConfig.from_pretrained(folder)
    config.update(dict.fromkeys(dropout(config), 0.0))
    return config


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Interpolate (1, 1 + n * n, width) to (1, 1 + side * side, width), bicubic (arXiv:2010.11929, section 3.2)."""
    former = math.isqrt(positions.shape[1] - 1)
    if former == side:
        return positions
    grid = positions[:, 1:].reshape(1, former, former, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def pixel_statistics(folder: Path) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation, in [0, 255], of the folder's image processor; None where there is none."""
    if not (folder / PREPROCESSOR).is_file():
        return None
    processor = json.loads((folder / PREPROCESSOR).read_text())
    return tuple([255 * value for value in processor[name]] for name in ("image_mean", "image_std"))


def _check_patches(image_size: int, patch_size: int) -> None:
    if image_size % patch_size:
        near = image_size // patch_size * patch_size or patch_size
        raise UserError(f"--image_size {image_size} is not a multiple of the patch size {patch_size}. Give {near}.")


def _signed(bits: int) -> int:
    """Return the int64 with these 64 bits: torch's products of int64 wrap around as unsigned ones do."""
    return bits - (1 << 64) if bits >> 63 else bits

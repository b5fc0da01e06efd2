# SPDX-License-Identifier: Apache-2.0
"""Draw a network's first weights from the seed alone, or find the folder of pretrained ones."""

import hashlib
import os
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PretrainedConfig

from ..draws import hash64
from ..errors import UserError

INITIAL_STD = 0.02


def init_weights(model: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill parameters in place, on any device and in any sharding: each is drawn whole from (seed, its name). On the
    meta device there is nothing to fill.

    Matrices, filters and embeddings: normal with standard deviation 0.02, truncated at two of them; norms 1, biases 0.
    Needs memory for a second copy of the largest parameter. prefix: fill only parameters whose names begin with it.
    """
    for name, parameter in model.named_parameters():
        if name.startswith(prefix) and not parameter.is_meta:
            copy_(parameter.data, initial_value(name, parameter.shape, seed))


def initial_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Return a parameter's initial value, on the CPU in float32."""
    if len(shape) == 1:
        return torch.full(shape, float("norm" in name and name.endswith("weight")))
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    generator = torch.Generator().manual_seed(hash64(seed, key) >> 1)
    value = torch.empty(shape)
    return nn.init.trunc_normal_(value, 0, INITIAL_STD, -2 * INITIAL_STD, 2 * INITIAL_STD, generator=generator)


def copy_(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor, which every process has, into a plain tensor or into this process's part of a DTensor."""
    if not isinstance(target, DTensor):
        target.copy_(value)
        return
    # Declared replicated without a check, then cut down to this process's part: nothing is sent.
    mesh = target.device_mesh
    whole = DTensor.from_local(value.to(target.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    target.copy_(whole.redistribute(placements=target.placements))


def find_pretrained(name: str) -> Path:
    """Return the folder of `--pretrained`: itself, $DSDIR/HuggingFace_Models/<name>, or a download of this hub id.

    Raises UserError with the places that were tried.
    """
    tried = [Path(name)]
    if "DSDIR" in os.environ:
        tried.append(Path(os.environ["DSDIR"]) / "HuggingFace_Models" / name)
    for folder in tried:
        if (folder / "config.json").is_file():
            return folder
    import httpx  # only newer clients of the hub need it

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError, httpx.HTTPError) as error:
        places = ", ".join(str(folder / "config.json") for folder in tried)
        raise UserError(
            f"--pretrained {name} was not found: no {places}, and not on the hub ({type(error).__name__}). "
            "Give a folder that transformers saved, or download it where there is a network."
        ) from error


def dropout(config: PretrainedConfig) -> dict[str, float]:
    """Return the rates above 0, by name. Here DropPath, which is a function of the sample, replaces dropout."""
    return {name: rate for name, rate in vars(config).items() if ("dropout" in name or "pdrop" in name) and rate}

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are complete or absent, and are checked before anything of them is used.

A checkpoint holds what the future depends on: weights, buffers and optimizer state under the plain model's names, in
safetensors files that any number of processes reads (torch.distributed.checkpoint); in state.json the schedule, the
gradient scaler and what a recipe gives of its loader. The sample order and the augmentation are functions of the step,
so no random state is in it. manifest.json, written last, names every file with its size and SHA-256; then the folder
gets its name.
"""

from .load import load_checkpoint, read_state, read_weights
from .retention import checkpoint_to_resume, checkpoints, damage, put_aside, read_manifest
from .save import Checkpoints, SaveError, Saves

__all__ = [
    "Checkpoints",
    "SaveError",
    "Saves",
    "checkpoint_to_resume",
    "checkpoints",
    "damage",
    "load_checkpoint",
    "put_aside",
    "read_manifest",
    "read_state",
    "read_weights",
]

# SPDX-License-Identifier: Apache-2.0
"""Write, verify and load checkpoints: each is complete or absent, and is verified before any of it is used.

A checkpoint holds all that the rest of the run depends on: weights, buffers and optimizer state under the plain
model's names, in safetensors files that any number of processes can read (torch.distributed.checkpoint); in state.json
the learning-rate schedule, what an optimizer counts in its groups, the gradient scaler and the state of a recipe's
loader, if it has one. Sample order and augmentation are functions of the step, so no random state is saved.
manifest.json is written last and lists every file with its size and SHA-256; then the folder gets its name.
"""

from .load import load_checkpoint, read_state, read_weights
from .retention import checkpoint_to_resume, checkpoints, damage, quarantine, read_manifest
from .save import Checkpoints, SaveError, Saves

__all__ = [
    "Checkpoints",
    "SaveError",
    "Saves",
    "checkpoint_to_resume",
    "checkpoints",
    "damage",
    "load_checkpoint",
    "quarantine",
    "read_manifest",
    "read_state",
    "read_weights",
]

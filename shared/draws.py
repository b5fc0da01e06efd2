# SPDX-License-Identifier: Apache-2.0
"""Draw random numbers that are functions of a key alone: the first law in CONTRIBUTING.md.

They are raw 64-bit outputs of Philox (Salmon et al., SC 2011), which NumPy promises never to change, unlike its
distributions.
"""

import hashlib
import struct

import numpy as np
import torch


def hash64(*numbers: int) -> int:
    """Mix integers into 64 bits."""
    packed = struct.pack(f"<{len(numbers)}Q", *[number % 2**64 for number in numbers])
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def random_bits(count: int, *key: int) -> np.ndarray:
    """Return `count` uniform uint64 that are a function of the key alone."""
    return np.random.Philox(key=hash64(*key)).random_raw(count)


def uniforms(count: int, *key: int) -> np.ndarray:
    """Return `count` float64 in [0, 1) that are a function of the key alone."""
    return (random_bits(count, *key) >> np.uint64(11)) * 2.0**-53


def seed_torch(*key: int) -> None:
    """Seed torch's generator of the CPU, from which torchvision draws; call it under torch.random.fork_rng."""
    torch.default_generator.manual_seed(hash64(*key))


def augmentation_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed of one sample's augmentation in one epoch."""
    return hash64(seed, epoch, index)


def digest(indices: list[int], seeds: list[int]) -> int:
    """Hash samples and augmentation seeds, whatever their order: digests of disjoint parts add up (mod 2**64)."""
    return sum(hash64(index, seed) for index, seed in zip(indices, seeds, strict=True)) % 2**64

# SPDX-License-Identifier: Apache-2.0
"""Read documents, cut them into sequences of tokens, and batch those."""

from .corpus import open_corpus
from .evaluation import BITS_PER_BYTE, Evaluation
from .loader import Loader, build_sequences
from .settings import TextConfig

__all__ = ["BITS_PER_BYTE", "Evaluation", "Loader", "TextConfig", "build_sequences", "open_corpus"]

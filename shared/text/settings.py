# SPDX-License-Identifier: Apache-2.0
"""Define a run's text settings: which documents it reads, how they become tokens, and which tokens count."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from transformers.hf_argparser import HfArg

from ..config import Range
from .corpus import NAMED


@dataclass
class TextConfig:
    """The documents and their tokens; parsed beside a recipe's own configuration."""

    _argument_group_name = "data"
    data: str = HfArg(
        default="python",
        help="python (its help), docstrings (to write from a signature), or a folder: txt, jsonl, parquet",
    )
    val_fraction: Annotated[float, Range(0, 0.9)] = HfArg(
        default=0.1, help="documents held out, by a hash of their names, where the data has no folders train and val"
    )
    tokenizer: Literal["bpe", "bytes"] = HfArg(
        default="bpe", help="trained on the training documents, or a token for each byte; --pretrained has its own"
    )
    vocabulary_size: Annotated[int, Range(257, 2**20)] = HfArg(default=1024, help="tokens of a bpe tokenizer")
    sequence_length: Annotated[int, Range(2, 2**20)] = HfArg(default=128, help="tokens that the network sees at once")
    loss_on: Literal["all", "completion"] = HfArg(
        default="all", help="completion: a prompt's tokens, or a user's, are read and not learned"
    )

    def identity(self) -> dict:
        """Return the values that decide what is learned."""
        place = self.data if self.data in NAMED else str(Path(self.data).resolve())
        return dataclasses.asdict(self) | {"data": place}

# SPDX-License-Identifier: Apache-2.0
"""Define a run's image settings: which images it reads, and what the network sees of them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from transformers.hf_argparser import HfArg

from ..config import Fraction, Natural, Positive, Range
from .sources import NAMED

Part = Annotated[float, Range(1e-6, 1)]


@dataclass
class ImageConfig:
    """The images and their views; parsed beside a recipe's own configuration."""

    _argument_group_name = "data"
    data: str = HfArg(default="digits", help="digits, fashion, a folder (class folders, tar shards, tables), or a CSV")
    train_images: Natural = HfArg(default=0, help="training images to use, drawn from the seed; 0 = all")
    val_fraction: Annotated[float, Range(0, 0.9)] = HfArg(
        default=0.0, help="share of images held out, per class, where the data has no split"
    )
    shuffle_block: Natural = HfArg(
        default=0,
        help="tar shards whose images are shuffled together, so that few files are read at a time; 0 = all of them. "
        "A shard's images then always meet within a window of that many shards: shards must be filled at random",
    )
    image_column: str = HfArg(default="", help="column of a table or CSV; empty = the only one with images, or path")
    label_column: str = HfArg(default="", help="column of a table or CSV; empty = the only one with classes, or label")
    max_undecodable: Fraction = HfArg(
        default=0.001, help="share of images that may fail to decode before the run stops"
    )
    image_size: Positive = HfArg(default=32, help="side of the network's input, pixels")
    min_crop_area: Part = HfArg(default=0.6, help="least share of an image in a training crop; ImageNet: 0.08")
    horizontal_flip: bool = HfArg(default=False, help="mirror half of the training images")
    eval_crop_ratio: Part = HfArg(default=1.0, help="side of the centre crop over the shorter side; ImageNet: 0.875")

    def source(self, seed: int) -> tuple:
        """Return the arguments of open_data."""
        return self.data, self.val_fraction, seed, self.shuffle_block, self.image_column, self.label_column

    def identity(self) -> dict:
        """Return the values that decide what is learned; some only where they are given."""
        values = dataclasses.asdict(self) | {"data": self.data}
        if self.data not in NAMED:
            values["data"] = str(Path(self.data).resolve())
        empty = [name for name in ("image_column", "label_column", "train_images") if not values[name]]
        return {name: value for name, value in values.items() if name not in (*empty, "max_undecodable")}

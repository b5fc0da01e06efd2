# SPDX-License-Identifier: Apache-2.0
"""Look at the data: whether it is there, and how many steps an epoch has."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from .plan import Plan, Task


def data(plan: Plan, task: Task) -> Iterator[str]:
    """Open the data, which a batch must not exceed; refuse several nodes without --data."""
    if not task.data:
        return
    if plan.nodes > 1 and "data" not in task.given:
        what = f"without --data the {plan.nodes} nodes train on the demonstration's {task.data.data}"
        yield f"{what}. Give --data FOLDER, or --data {task.data.data} where you mean it."
    if "$" in task.data.data:
        return
    if read := getattr(plan.module, "open_corpus", None):
        read(task.data.data, task.data.val_fraction)
    steps_per_epoch(plan, task)


def steps_per_epoch(plan: Plan, task: Task) -> int | None:
    """Return an epoch's steps; None without images, or where counting them would take long: data without an index."""
    read, images = getattr(plan.module, "open_data", None), task.data
    if not read or not images:
        return None
    if Path(images.data).exists() and not Path(images.data, "train/index.safetensors").exists():
        return None
    batch, seed = task.config.global_batch_size, task.run_config.seed
    train = training_images(read, *images.source(seed)).first(images.train_images, seed)
    return plan.shared("order").TrainingOrder(len(train), batch, batch, 0, 1, seed).steps_per_epoch


@functools.cache
def training_images(read: Callable, *source):
    return read(*source)[0]

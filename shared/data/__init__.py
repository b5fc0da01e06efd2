# SPDX-License-Identifier: Apache-2.0
"""Images in, batches on the device out; which samples make a step depends on seed and step alone."""

from .loaders import Batch, Loader, Views
from .order import EvaluationOrder, TrainingOrder
from .sources import Source, open_data
from .views import evaluation_view, training_view

__all__ = [
    "Batch",
    "EvaluationOrder",
    "Loader",
    "Source",
    "TrainingOrder",
    "Views",
    "evaluation_view",
    "open_data",
    "training_view",
]

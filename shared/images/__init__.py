# SPDX-License-Identifier: Apache-2.0
"""Read images and make batches on the device; which samples make a step depends on seed and step alone."""

from .loader import Batch, Loader, Views, build_views
from .settings import ImageConfig
from .sources import Source, open_data

__all__ = ["Batch", "ImageConfig", "Loader", "Source", "Views", "build_views", "open_data"]

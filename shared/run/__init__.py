# SPDX-License-Identifier: Apache-2.0
"""A run: its folder, its position, its record and what ends it."""

from .run import Run

__all__ = ["Run"]

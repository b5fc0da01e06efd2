# SPDX-License-Identifier: Apache-2.0
"""Keep a run's folder, its position and its record, and end it."""

from .run import Run

__all__ = ["Run"]

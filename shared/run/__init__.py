# SPDX-License-Identifier: Apache-2.0
"""Keep a run's folder, position and record, and end the run."""

from .run import Run

__all__ = ["Run"]

# SPDX-License-Identifier: Apache-2.0
"""These tests are collected where there is a GPU, and nowhere else: `make test`, or `python -m pytest tests/gpu`."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*"]

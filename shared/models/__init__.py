# SPDX-License-Identifier: Apache-2.0
"""Define networks, each under its paper's name."""

# SPDX-License-Identifier: Apache-2.0
"""Networks, each by its paper's name."""

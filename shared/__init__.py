# SPDX-License-Identifier: Apache-2.0
"""Parts that the recipes share; none of them holds the training loop."""

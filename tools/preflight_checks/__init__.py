# SPDX-License-Identifier: Apache-2.0
"""Hold the checks of tools/preflight.py, one subject a module."""

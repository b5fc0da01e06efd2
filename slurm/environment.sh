# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Choose the python that a job uses. Sourced by submit.sh, which checks the job with it, and by launch.sh.

# Put the active environment, of venv or conda, first in PATH: a module that was loaded after it may come before it.
# False where there is none, where it cannot import accelerate, and where a module brought it: that was loaded on the
# login node, for other GPUs.
use_active_environment() {
    local own=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    [[ -x $own/bin/python ]] || return 1
    if [[ -z ${VIRTUAL_ENV:-} ]] && comes_with_module "$own"; then return 1; fi
    "$own/bin/python" -c 'import sys; from importlib.util import find_spec; sys.exit(not find_spec("accelerate"))' ||
        return 1
    export PATH=$own/bin:$PATH
}

comes_with_module() {
    [[ ${LOADEDMODULES:-} ]] && command -v module >/dev/null || return 1
    # shellcheck disable=SC2086  # several names
    module show ${LOADEDMODULES//:/ } 2>&1 | grep -F "$1" >/dev/null
}

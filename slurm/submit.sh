#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Check a job here, on the login node, then submit it:
#   slurm/submit.sh MACHINE STRATEGY [sbatch options] -- RECIPE [flags]
#   slurm/submit.sh h100 fsdp --nodes=16 --time=20:00:00 -A PROJECT@h100 -- recipes/vit.py --global_batch_size 4096
# --dry_run among the options stops before sbatch. slurm/launch.sh says which variables change a job.
set -euo pipefail

main() {
    RECIPES_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    export RECIPES_ROOT
    read_words "$@"
    [[ -f $RECIPES_ROOT/slurm/$machine.slurm ]] || fail "no machine $machine. There are: $(machines)."
    python "$RECIPES_ROOT/tools/preflight.py" "$machine" "$strategy" "${options[@]}" -- "$recipe" "${flags[@]}" || exit 1
    # A sweep's lines differ: each task checks its own.
    [[ " ${flags[*]}" == *" @"* ]] || export RECIPES_PREFLIGHT=passed
    # The log is named after the job: no blanks.
    local name="${recipe##*/}"
    name=${name%.py}-$strategy
    local command=(sbatch --job-name="${name// /_}" "${options[@]}")
    command+=("$RECIPES_ROOT/slurm/$machine.slurm" "$strategy" "$recipe" "${flags[@]}")
    printf '%q ' "${command[@]}"
    echo
    [[ $dry_run ]] || exec "${command[@]}"
}

fail() {
    echo "error: $*" >&2
    exit 2
}

read_words() {
    local usage="give slurm/submit.sh MACHINE STRATEGY [sbatch options] -- RECIPE [flags]"
    (($# >= 4)) || fail "$usage."
    machine=$1 strategy=$2 options=() dry_run=''
    shift 2
    while (($#)) && [[ $1 != -- ]]; do
        if [[ $1 == --dry_run ]]; then dry_run=yes; else options+=("$1"); fi
        shift
    done
    (($# >= 2)) || fail "$usage; no recipe follows --."
    recipe=$2 flags=("${@:3}")
}

machines() {
    local files=("$RECIPES_ROOT"/slurm/*.slurm)
    files=("${files[@]##*/}")
    echo "${files[*]%.slurm}"
}

main "$@"

#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Check a job here, on the login node, then submit it:
#   slurm/submit.sh MACHINE STRATEGY [sbatch options] -- RECIPE [flags]
#   slurm/submit.sh h100 fsdp --nodes=16 --time=20:00:00 -A PROJECT@h100 -- recipes/vit.py --data $SCRATCH/imagenet
# Among the options --dry_run stops before sbatch, and --memory estimates the bytes of a GPU. slurm/launch.sh says which
# variables change a job.
set -euo pipefail

main() {
    RECIPES_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    export RECIPES_ROOT
    read_words "$@"
    [[ -f $RECIPES_ROOT/slurm/$machine.slurm ]] || fail "no machine $machine. There are: $(machines)."
    # shellcheck source=environment.sh
    source "$RECIPES_ROOT/slurm/environment.sh"
    use_active_environment || true
    command -v python >/dev/null || fail "no python to check the job with. Load a module, or activate your environment."
    # The log is named after the job: no blanks.
    local name="${recipe##*/}"
    name=${name%.py}-$strategy
    options=(--job-name="${name// /_}" "${options[@]}")
    python "$RECIPES_ROOT/tools/preflight.py" "$machine" "$strategy" "${memory[@]}" "${options[@]}" -- \
        "$recipe" "${flags[@]}" || exit 1
    # For the job: what has been checked. A sweep's lines differ, so each of its tasks checks its own.
    RECIPES_PREFLIGHT=$(printf '%s\0' "$machine" "$strategy" "$recipe" "${flags[@]}" | cksum)
    export RECIPES_PREFLIGHT
    local command=(sbatch "${options[@]}" "$RECIPES_ROOT/slurm/$machine.slurm" "$strategy" "$recipe" "${flags[@]}")
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
    machine=$1 strategy=$2 options=() memory=() dry_run=''
    shift 2
    while (($#)) && [[ $1 != -- ]]; do
        case $1 in
            --dry_run) dry_run=yes ;;
            --memory) memory=(--memory) ;;
            *) options+=("$1") ;;
        esac
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

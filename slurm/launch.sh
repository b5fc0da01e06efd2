# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# The body of every job, sourced by MACHINE.slurm: STRATEGY RECIPE [flags], on the nodes that Slurm gave.
#
# A flag @FILE stands for the words of one line of FILE: line N in task N of --array=1-M, a sweep.
# A time limit, scancel --signal=USR1 or USR2 end a start with a checkpoint, and the job is requeued; a run that ended,
# failed or found a STOP file is not.
#
# Variables to export before sbatch:
#   RECIPES_ROOT                 the folder of slurm/, where it is not the one that you submit from
#   RECIPES_MODULES              modules to load; empty = none. An active environment with accelerate wins: none is loaded
#   RECIPES_SETUP                a file to source before python is looked for: unpacks an environment, say
#   RECIPES_PREFLIGHT            off = no preflight in the job
#   RECIPES_MAX_RESTARTS         requeues at most (100)
#   RECIPES_PROCESSES_PER_NODE   instead of one a GPU
#   RECIPES_LAUNCH_FLAGS         more flags for accelerate launch, such as --mixed_precision no
#   MASTER_ADDR                  where the first node's name does not resolve

main() {
    trap 'trapped=1 ended=1' TERM
    load_environment
    set -euo pipefail
    command -v python >/dev/null || fail "no python. Activate your environment before sbatch, or see RECIPES_MODULES."
    read_words "$@"
    name_job
    echo "python: $(command -v python)"
    prepare_job_folder
    keep_sources
    begin_preflight
    prepare_environment
    watch_time
    local status=0
    launch || status=$?
    end_preflight
    conclude "$status"
}

# An environment of your own, activated before sbatch, comes with the job; else a module brings python. `module` and
# what activates an environment read variables that nobody set.
load_environment() {
    # shellcheck source=environment.sh
    source "$ROOT/slurm/environment.sh"
    local names=${RECIPES_MODULES-$(fact modules)}
    if ! use_active_environment && [[ $names ]] && command -v module >/dev/null; then
        module purge
        # shellcheck disable=SC2086  # several names
        module load $names
    fi
    # shellcheck disable=SC1090  # the user's
    if [[ ${RECIPES_SETUP:-} ]]; then source "$RECIPES_SETUP" || fail "RECIPES_SETUP failed: $RECIPES_SETUP."; fi
}

# Print a text of the machine's entry in the table; there may be no python yet.
fact() {
    sed -n "/^\[$MACHINE\]/,/^\[/s/^$1 *= *[\"']\([^\"']*\).*/\1/p" "$ROOT/slurm/machines.toml"
}

fail() {
    echo "error: $*" >&2
    exit 1
}

read_words() {
    (($# >= 2)) || fail "give STRATEGY RECIPE [flags] after $MACHINE.slurm."
    strategy=$1 recipe=$2 flags=()
    local word
    for word in "${@:3}"; do
        if [[ $word == @* ]]; then add_line "${word#@}"; else flags+=("$word"); fi
    done
    config=$(fact topologies)
    config=$ROOT/accelerate_configs/${config:-$MACHINE}_$strategy.yaml
    [[ -f $config ]] || fail "no strategy $strategy for $MACHINE: no file $config."
    [[ -f $recipe ]] || fail "no recipe $recipe in $PWD. Submit from its folder's parent, or give its whole path."
}

# Add the words of this task's line of a sweep's file, quoted as in a shell.
add_line() {
    local line words
    [[ -n ${SLURM_ARRAY_TASK_ID:-} ]] || fail "@$1 needs --array=1-N: one task a line."
    line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1") || fail "cannot read $1."
    [[ -n $line ]] || fail "$1 has no line $SLURM_ARRAY_TASK_ID. Give --array=1-$(wc -l <"$1")."
    split words "$line"
    flags+=("${words[@]}")
}

# Split a text into an array, at spaces outside quotes, as the preflight does.
split() {
    local quoted
    quoted=$(python -S -c 'import shlex, sys; print(*map(shlex.quote, shlex.split(sys.argv[1])))' "$2" 2>/dev/null) ||
        fail "cannot split: $2"
    eval "$1=($quoted)"
}

# Name a task by the array's number and its own: SLURM_JOB_ID of the last task is the array's number.
name_job() {
    job=$SLURM_JOB_ID
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    nodes=$SLURM_JOB_NUM_NODES
    per_node=${RECIPES_PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    [[ $per_node ]] || fail "Slurm gave no GPUs. Ask for them (--gres=gpu:4), or export RECIPES_PROCESSES_PER_NODE."
}

# A requeued start runs what the first one found, whatever was edited since: a copy of the recipe, of the modules beside
# it, of shared/ and of the YAML. Where nothing was edited it runs them where they lie.
keep_sources() {
    local place shared=$ROOT/shared
    place=$(cd "$(dirname "$recipe")" && pwd)
    kept=$SLURM_SUBMIT_DIR/.recipes-$job-source
    if [[ -d $place/shared ]]; then shared=$place/shared; fi
    if ((${SLURM_RESTART_COUNT:-0} == 0)); then
        rm -rf "$kept"
        { mkdir "$kept" && cp "$place"/*.py "$kept" && cp "$config" "$kept/topology.yaml" &&
            cp -rL "$shared" "$kept/shared"; } 2>/dev/null || rm -rf "$kept" # no room
    elif [[ -d $kept ]] && edited "$place" "$shared"; then
        echo "edited since the first start of this job, whose sources are run again: $kept"
        recipe=$kept/${recipe##*/} config=$kept/topology.yaml again=1
        export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$place # for packages beside the recipe
    fi
}

edited() {
    local file
    for file in "$kept"/*.py; do cmp -s "$file" "$1/${file##*/}" || return 0; done
    ! cmp -s "$config" "$kept/topology.yaml" || ! diff -qr -x __pycache__ -x '*.so' "$kept/shared" "$2" >/dev/null
}

# The sources stay for a restart, which Slurm may make by itself (`ended`), and where a run's config.json names them.
clean_up() {
    rm -rf "$RECIPES_JOB_FOLDER"
    if [[ ! ${again:-}${ended:-} ]]; then rm -rf "${kept:-}"; fi
}

# submit.sh leaves the sum of what it has checked. Else the preflight runs while the processes start: rank 0 waits for it
# before it writes anything (shared/run/folder.py).
begin_preflight() {
    local sum folder=$RECIPES_JOB_FOLDER
    checker=
    sum=$(printf '%s\0' "$MACHINE" "$strategy" "$recipe" "${flags[@]}" | cksum)
    if [[ ${RECIPES_PREFLIGHT:-} == off || ${RECIPES_PREFLIGHT:-} == "$sum" || ${SLURM_RESTART_COUNT:-0} -gt 0 ]]; then
        return
    fi
    touch "$folder/unchecked"
    (
        words=("$MACHINE" "$strategy" --in_job -- "$recipe" "${flags[@]}")
        if python "$ROOT/tools/preflight.py" "${words[@]}" >"$folder/preflight" 2>&1; then
            cat "$folder/preflight"
        else
            touch "$folder/refused"
        fi
        rm "$folder/unchecked"
    ) &
    checker=$!
}

# Let a refusal be the last thing in the log.
end_preflight() {
    if [[ $checker ]]; then wait_for "$checker"; fi
    if [[ -e $RECIPES_JOB_FOLDER/refused ]]; then
        cat "$RECIPES_JOB_FOLDER/preflight" >&2
        exit 1
    fi
}

prepare_environment() {
    local store=${SCRATCH:-${WORK:-}} key
    # Compute nodes have no internet. What you have set stays, by either of Hugging Face's names.
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-${TRANSFORMERS_OFFLINE:-1}} WANDB_MODE=${WANDB_MODE:-offline}
    export HF_DATASETS_OFFLINE=${HF_DATASETS_OFFLINE:-$HF_HUB_OFFLINE}
    if [[ -d ${WORK:-} ]]; then
        export HF_HOME=${HF_HOME:-$WORK/.cache/huggingface} TORCH_HOME=${TORCH_HOME:-$WORK/.cache/torch}
    fi
    if [[ -d ${SCRATCH:-} ]]; then
        export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/.cache/triton}
        export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SCRATCH/.cache/inductor}
    fi
    if [[ -d $store && -z ${TORCH_EXTENSIONS_DIR:-} ]] && key=$(build_of_torch); then
        export TORCH_EXTENSIONS_DIR=$store/.cache/torch_extensions/$MACHINE-$key
    fi
    if [[ -d ${JOBSCRATCH:-} ]]; then export TMPDIR=$JOBSCRATCH; fi
    # After what the user has: a recipe that was copied alone finds shared/.
    export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$ROOT PYTHONUNBUFFERED=1
    # From 22.05 on srun no longer takes it from sbatch.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
}

# What DeepSpeed compiles fits one kind of processor, one torch and one environment: two that share it rebuild it.
build_of_torch() {
    python -c 'import sys, zlib; from importlib.metadata import version
print("torch" + version("torch"), f"{zlib.crc32(sys.prefix.encode()):08x}", sep="-")' 2>/dev/null
}

# Make the folder in which this shell and the processes of this start leave each other messages, on a file system that
# all nodes see: unchecked and refused, STOP, run_folder, error-RANK.txt.
prepare_job_folder() {
    if [[ -d ${JOBSCRATCH:-} ]]; then
        export RECIPES_JOB_FOLDER=$JOBSCRATCH/recipes-$job
    else
        export RECIPES_JOB_FOLDER=$SLURM_SUBMIT_DIR/.recipes-$job
    fi
    rm -rf "$RECIPES_JOB_FOLDER"
    mkdir "$RECIPES_JOB_FOLDER"
    touch "$RECIPES_JOB_FOLDER/started"
    trap clean_up EXIT
}

# shared/run/interruption.py stops in time for SLURM_JOB_END_TIME, which Slurm sets from 23.02 on.
watch_time() {
    local end=${SLURM_JOB_END_TIME:-} now
    now=$(date +%s)
    # A past one was left over from another job; NONE and UNLIMITED are no time.
    if [[ ! $end =~ ^[0-9]+$ ]] || ((end <= now)); then
        unset SLURM_JOB_END_TIME
        end=$(squeue -h -j "$job" -o %e) && end=$(date -d "${end:-NONE}" +%s 2>/dev/null) || end=0
        if ((end > now)); then export SLURM_JOB_END_TIME=$end; fi
    fi
    trap 'trapped=1; touch "$RECIPES_JOB_FOLDER/STOP"' USR1 USR2
    # --signal=B:USR1@600 comes at the start of a job of ten minutes; such a short job relies on its end time alone.
    if ((end > now && end - now < 1200)); then
        trap 'trapped=1' USR1
    elif [[ ${early:-} ]]; then
        touch "$RECIPES_JOB_FOLDER/STOP"
    fi
}

launch() {
    local hosts=(127.0.0.1) tasks=(--nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1) address more words step
    if ((nodes > 1)); then mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST"); fi
    split more "${RECIPES_LAUNCH_FLAGS:-}"
    words=(--config_file "$config" --num_machines "$nodes" --num_processes $((nodes * per_node)))
    address=${MASTER_ADDR:-${hosts[0]}}
    words+=(--main_process_ip "$address" --main_process_port "$(free_port)")
    # accelerate ignores a YAML's values of these two; the c10d backend would order the nodes by itself.
    words+=(--rdzv_backend static --same_network)
    # Each line of the log carries its node and local rank; on_node says where the files lie.
    words+=(--tee 3)
    if [[ $strategy == hsdp ]]; then words+=(--parallelism_config_dp_replicate_size "$nodes"); fi
    export -f on_node interface_to wait_for report_failure
    # srun would take these as its own options, which a job or a step has left in the shell that you submit from.
    unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" SLURM_GPU_BIND SLURM_GPUS SLURM_GPUS_PER_{NODE,SOCKET,TASK}
    unset SLURM_NTASKS_PER_{CORE,GPU,SOCKET}
    # A process group of its own: Slurm then signals this shell alone. srun would kill processes that have yet to save.
    set -m
    srun --export=ALL "${tasks[@]}" --kill-on-bad-exit=1 --wait=60 --label bash -c 'on_node "$@"' on_node \
        "$address" "${hosts[-1]}" "${words[@]}" "${more[@]}" "$recipe" "${flags[@]}" </dev/null &
    step=$!
    set +m
    wait_for "$step"
}

# Print a free port of the job's first node, which this is. The search begins at a port derived from the job's number
# and takes every 101st: jobs with neighbouring numbers, which may start at the same time, begin at ports next to it.
free_port() {
    python -S - "$((10000 + SLURM_JOB_ID % 20000))" <<'PYTHON'
import socket, sys

for port in range(int(sys.argv[1]), 65536, 101):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            continue
    sys.exit(print(port))
PYTHON
}

# Run once on each node: start its launcher. SLURM_NODEID must be read here, or every node would be the first.
on_node() {
    local trapped launcher logs interface status=0
    trap 'trapped=1; touch "$RECIPES_JOB_FOLDER/STOP"' USR1 USR2
    trap 'trapped=1; trap "trapped=1" TERM; kill -TERM "$launcher"' TERM
    # Three groups of n gloo processes take 3 (n + 3) descriptors of each.
    ulimit -n "$(ulimit -Hn)" 2>/dev/null || true
    if [[ -z ${GLOO_SOCKET_IFNAME:-} ]] && interface=$(interface_to "$1" "$2"); then
        export GLOO_SOCKET_IFNAME=$interface
    fi
    shift 2
    # What the processes print goes through files on the node's own disk: a full quota does not stop it.
    logs=$(mktemp -d -p /tmp recipes-XXXXXX 2>/dev/null) || logs=$(mktemp -d -p "$RECIPES_JOB_FOLDER" log-XXXXXX)
    # In a group of its own too, and signalled once: Slurm repeats SIGTERM, and a second one ends a launcher that waits
    # for its workers to save.
    set -m
    (
        # The launcher would die of them; the training processes have handlers of their own.
        trap '' USR1 USR2
        exec python -m accelerate.commands.launch --machine_rank "$SLURM_NODEID" --role "$SLURMD_NODENAME:" \
            --log_dir "$logs" "$@" 2> >(trap '' TERM INT USR1 USR2; exec tee -i "$logs/launcher" >&2)
    ) &
    launcher=$!
    set +m
    wait_for "$launcher" || status=$?
    if ((status)); then report_failure "$logs"; fi
    rm -rf "$logs"
    # srun ends the other nodes with this one: leave them time to report.
    if ((status && SLURM_JOB_NUM_NODES > 1)); then sleep 5; fi
    return "$status"
}

# Print the interface on the way to the first node; on the first node itself, whose name may stand for the loopback, on
# the way to the last one. gloo would take the interface of the node's own name, which may not reach the others.
interface_to() {
    python -S -c 'import fcntl, socket, struct, sys
SIOCGIFADDR = 0x8915
for address in sys.argv[1:]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 1))
        except OSError:
            continue
        own = probe.getsockname()[0]
        if own.startswith("127.") and not address.startswith("127."):
            continue
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue
            if socket.inet_ntoa(found[20:24]) == own:
                sys.exit(print(name))
sys.exit(1)' "$@"
}

# Write into died-RANK.txt, from torchrun's report: exit status and last lines of the first process that failed.
report_failure() {
    local rank local_rank code
    sleep 0.2 # tee ends a moment later
    read -r rank local_rank code < <(sed -n '/Root Cause/,$p' "$1/launcher" | tr -d '()' |
        awk '$1 == "rank" {rank = $3; inner = $5} $1 == "exitcode" {print rank, inner, $3; exit}') || return 0
    {
        echo "$code"
        tail -n 60 "$1"/*/attempt_0/"$local_rank"/stderr.log
    } >"$RECIPES_JOB_FOLDER/died-$rank.txt" 2>/dev/null || true
}

# A signal's trap ends `wait` early.
wait_for() {
    local status
    while true; do
        trapped='' status=0
        wait "$1" || status=$?
        [[ $trapped ]] || return "$status"
    done
}

# summary.json decides: a launcher reports signals in its own way.
conclude() {
    local status=$1 state reason
    read -r state reason < <(run_state) || true
    if [[ ${ended:-} && $state == interrupted && $(squeue -h -j "$job" -o %r) == TimeLimit ]]; then
        requeue "the time limit"
    elif [[ ${ended:-} ]]; then
        # scancel, or a lost node, after which Slurm requeues by itself.
        echo "ended by Slurm; the same command resumes from the last checkpoint"
    elif [[ $state == finished || $status == 0 && $state != interrupted ]]; then
        exit 0
    elif [[ $state == interrupted && $reason == stop_file ]]; then
        echo "stopped by a STOP file; the same command resumes"
    elif [[ $state == interrupted ]]; then
        requeue "$reason"
    elif ((nodes > 1)) && ! nodes_answer && (($(grep -c '(a node does not answer)' "/proc/$$/fd/1") < 2)); then
        # At most twice, counted in this log: srun may fail for another reason, which must not be retried for ever.
        requeue "a node does not answer"
    else
        show_first_error "$status"
    fi
}

# Print the status (stale: an earlier start's) and stop_reason of the run; nothing where there is no summary.json.
run_state() {
    local summary
    summary=$(cat "$RECIPES_JOB_FOLDER/run_folder" 2>/dev/null)/summary.json
    python -S -c 'import json, os, sys
summary = json.load(open(sys.argv[1]))
fresh = os.path.getmtime(sys.argv[1]) >= os.path.getmtime(sys.argv[2])
status = summary["status"]
print(status if fresh or (status == "finished" and sys.argv[3] == "0") else "stale", summary.get("stop_reason"))
' "$summary" "$RECIPES_JOB_FOLDER/started" "$status" 2>/dev/null
}

requeue() {
    local restarts=${SLURM_RESTART_COUNT:-0} most=${RECIPES_MAX_RESTARTS:-100}
    if [[ " $(scontrol show job -o "$job") " != *" Requeue=1 "* ]]; then
        echo "interrupted ($1); submitted with --no-requeue: the next job of the chain resumes"
        exit 0
    fi
    ((restarts < most)) || fail "interrupted ($1) after $restarts restarts, RECIPES_MAX_RESTARTS. Submit it again: it resumes."
    echo "interrupted ($1); requeued for restart $((restarts + 1))"
    # It ends this shell, too.
    again=1
    scontrol requeue "$job" || fail "Slurm does not requeue this job. Submit it again: it resumes."
    exit 0
}

# False where a node of the job is lost, before Slurm itself has noticed.
nodes_answer() {
    timeout 60 srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --overlap --quiet true </dev/null 2>/dev/null
}

# Print, as the last lines of the log, the error that came first. A process that was killed leaves its peers with an
# error about their connection, at the same moment; one that failed before it had begun leaves no error-RANK.txt.
show_first_error() {
    local first killed rank number
    killed=$(grep -lsxE -- '-(4|7|8|9|11)' "$RECIPES_JOB_FOLDER"/died-*.txt | head -n 1) || true
    first=$(oldest 'error-*.txt')
    first=${first:-$(oldest 'died-*.txt')}
    rank=${killed:-$first} rank=${rank##*-} rank=${rank%.txt}
    if [[ $rank ]]; then echo "The first process that failed is rank $rank:"; fi
    if [[ $killed ]]; then
        sed 1d "$killed"
        read -r number <"$killed"
        echo "error: rank $rank was killed by SIG$(kill -l "${number#-}"), probably because the node ran out of memory." >&2
    elif [[ $first == */died-* ]]; then
        sed 1d "$first"
    elif [[ $first ]]; then
        cat "$first"
    else
        echo "error: exit status $1, and no process has left a traceback: see the lines above, or the memory used." >&2
    fi
    exit $(($1 ? $1 : 1))
}

oldest() {
    find "$RECIPES_JOB_FOLDER" -maxdepth 1 -name "$1" -printf '%T@ %p\n' | sort -n | sed -n '1s/^[^ ]* //p'
}

main "$@"

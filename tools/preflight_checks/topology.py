# SPDX-License-Identifier: Apache-2.0
"""Read a machine's YAML, and refuse keys that have no effect there or belong elsewhere."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import yaml

from .plan import Plan, nearest

# Keys that a machine's YAML must not hold, and why.
MISPLACED = {
    key: reason
    for keys, reason in {
        "rdzv_backend same_network enable_cpu_affinity max_restarts use_cpu": "accelerate ignores it there",
        "num_machines num_processes machine_rank": "Slurm and slurm/launch.sh set it",
        "main_process_ip main_process_port gpu_ids": "Slurm and slurm/launch.sh set it",
        "gradient_accumulation_steps": "the recipe's --gradient_accumulation_steps sets it",
        "gradient_clipping": "the recipe's --max_grad_norm sets it",
        "train_batch_size train_micro_batch_size_per_gpu": "the recipe's --global_batch_size sets it",
    }.items()
    for key in keys.split()
}


def read_topology(root: Path, prefix: str, machine: str, strategy: str) -> dict:
    """Return what accelerate_configs/{prefix}_{strategy}.yaml holds; raises ValueError where it cannot be read."""
    found = sorted(path.stem.split("_", 1)[1] for path in root.glob(f"accelerate_configs/{prefix}_*.yaml"))
    if not found:
        raise ValueError(f"no accelerate_configs/{prefix}_STRATEGY.yaml. Copy one, or see docs/other_clusters.md.")
    if strategy not in found:
        close = f"The nearest is {nearest(strategy, found)}; there are {', '.join(found)}."
        raise ValueError(f"{machine} has no strategy {strategy}. {close}")
    name = f"accelerate_configs/{prefix}_{strategy}.yaml"
    try:
        return yaml.safe_load((root / name).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{name} cannot be read: {error}.") from error


def topology(plan: Plan) -> Iterator[str]:
    """Refuse a precision that the machine lacks, HSDP on one node, the first FSDP, and misplaced or unknown keys."""
    known = plan.facts.precisions
    if plan.precision not in known:
        remedy = f"Set mixed_precision to {known[1:][-1]} in {plan.origins['precision']}"
        yield f"{plan.machine} has no {plan.precision} in hardware. {remedy}."
    if plan.kind == "hsdp" and plan.nodes == 1:
        yield "hsdp replicates the model over nodes, and there is one. Use fsdp, or give more --nodes."
    if plan.kind in ("fsdp", "hsdp") and plan.section("fsdp").get("fsdp_version") != 2:
        yield f"{plan.yaml} asks for FSDP version 1. Set fsdp_version: 2 in its fsdp_config."
    for key, name, known in keys(plan.topology):
        if key in MISPLACED:
            yield f"{key} is set in {plan.yaml}: {MISPLACED[key]}. Remove it."
        elif name not in known:
            yield f"accelerate knows no key {key} of {plan.yaml}. The nearest is {nearest(name, known)}."


def keys(topology: dict) -> Iterator[tuple[str, str, set[str]]]:
    """Yield each key, the name under which accelerate reads it, and all such names."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import launch_command_parser

    yield from ((key, key, {each.name for each in fields(ClusterConfig)}) for key in topology)
    flags = set(vars(launch_command_parser().parse_args(["recipe.py"])))
    for section, values in topology.items():
        prefix = section.replace("config", "") * (section in ("fsdp_config", "fp8_config", "dynamo_config"))
        for key in values if isinstance(values, dict) else ():
            yield key, key if key.startswith(prefix) else prefix + key, flags

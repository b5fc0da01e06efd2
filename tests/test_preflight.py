# SPDX-License-Identifier: Apache-2.0
"""tools/preflight.py: what it resolves and whence, what it refuses in one line, and its estimates beside counts."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, add_made_up_machine, environment

sys.path.append(str(ROOT / "tools"))

import memory_estimate
import preflight
from machines import Machine, read_machines

from shared.models.vit import VisionTransformer, vit_config

MACHINES = read_machines(ROOT)
RECIPES = {path.stem: path for path in (ROOT / "recipes").glob("*.py")}
JEAN_ZAY = (
    "SLURM_",
    "SBATCH_",
    "RECIPES_",
    "PREFLIGHT_",
    "DSDIR",
    "WORK",
    "SCRATCH",
    "HF_",
    "TORCH_",
    "TRITON_",
    "XDG_",
)


@pytest.fixture(autouse=True)
def login_node(monkeypatch):
    """Nothing of a cluster, but for what a test sets."""
    for name in list(os.environ):
        if name.startswith(JEAN_ZAY):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def run(capsys):
    """(exit status, what is printed, error lines) of a command's words, or of its one string."""

    def run(*words: str) -> SimpleNamespace:
        words = words[0].split() if len(words) == 1 else words
        status = preflight.main(list(words))
        out, err = capsys.readouterr()
        assert all(line.startswith("error: ") for line in err.splitlines()), err
        return SimpleNamespace(status=status, out=out, errors=err.splitlines(), rows=rows(out))

    return run


def rows(text: str) -> dict[str, tuple[str, str]]:
    """Name -> value, origin."""
    parts = [re.split(r" {2,}", line) for line in text.splitlines()]
    return {part[0]: tuple(part[1:]) for part in parts if len(part) == 3}


def command_line(words: list[str], cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in environment().items() if not name.startswith(JEAN_ZAY)}
    command = [sys.executable, str(ROOT / "tools/preflight.py"), *words]
    return subprocess.run(command, cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=300)


def sound(machine: str, strategy: str, recipe: str, *flags: str, nodes: int = 2) -> list[str]:
    account = f"abc@{MACHINES[machine].account}"
    data = [] if recipe == "allreduce_pi" or "--data" in flags else ["--data", "digits"]
    return [machine, strategy, "-A", account, "--nodes", str(nodes), "--", str(RECIPES[recipe]), *data, *flags]


# A sound job


def test_the_resolved_job_and_its_origins():
    words = "h100 fsdp -N4 --time 20:00:00 --mail-type END --exclusive -- recipes/vit.py --global_batch_size=1024"
    words += " --data digits --epochs 3 --drop_path=0.1"
    process = command_line(words.split(), SBATCH_ACCOUNT="abc@h100", SBATCH_QOS="qos_gpu_h100-t3")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    lines, table = process.stdout.splitlines(), rows(process.stdout)
    assert lines.pop() == "the warmup takes 0.25 of 3 epochs, as 5 of 60 by default; see --warmup_epochs"
    assert len(lines) <= 35
    assert max(map(len, lines[:-1])) < 140
    assert len({line.index(table[name][0]) for line in lines if (name := line.split("  ")[0]) in table}) == 1
    yaml_name, command, header = "accelerate_configs/h100_fsdp.yaml", "command line", "slurm/h100.slurm"
    expected = {
        "machine": ("h100, 4 GPUs of 80 GB a node", command),
        "strategy": ("fsdp", command),
        "nodes": ("4", command),
        "GPUs a node": ("4", header),
        "world size": ("16 = 4 nodes x 4", "nodes, GPUs a node"),
        "precision": ("bf16", yaml_name),
        "fsdp_reshard_after_forward": ("True", yaml_name),
        "data": ("digits", command),
        "model": ("demo", "vit.py"),
        "image_size": ("32", "vit.py"),
        "epochs": ("3", command),
        "learning_rate": ("0.002", "vit.py"),
        "drop_path": ("0.1", command),  # what else is given
        "data-parallel size": ("16", "world size"),
        "batch": ("1024 = 16 (data-parallel) x 64 (images) x 1 (accumulation)", "command line, vit.py"),
        "checkpoints": ("each epoch", "vit.py"),
        "time": ("20:00:00", command),
        "qos": ("qos_gpu_h100-t3", "$SBATCH_QOS"),
        "account": ("abc@h100", "$SBATCH_ACCOUNT"),
    }
    assert expected.items() <= table.items()
    assert re.fullmatch(r"runs/vit-[0-9a-f]{8}", table["output"][0])
    # 1,437 digits: one step of 1,024 an epoch, three in all; a third of 16 GPUs x 20 h.
    assert "33.3% of the run (106.67 GPU-hours if the run fills the job); never more than the job's 320.0" in lines[-1]


def test_the_output_folder_is_the_one_that_the_run_takes(server, run, tmp_path, monkeypatch):
    words = ["--epochs", "1", "--max_steps", "1", "--report_to", "none"]
    half = run(*sound("v100", "ddp", "resnet", *words)).rows["output"][0]
    monkeypatch.setenv("RECIPES_LAUNCH_FLAGS", "--mixed_precision no")
    job = run(*sound("v100", "ddp", "resnet", *words))
    cpu = server.environment | {"CUDA_VISIBLE_DEVICES": "-1"}
    assert server.python([RECIPES["resnet"], *words], cwd=tmp_path, env=cpu).returncode == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert job.rows["output"][0] == f"runs/{folder.name}" != half  # the precision is part of the configuration
    assert job.rows["precision"] == ("no", "$RECIPES_LAUNCH_FLAGS")


def test_values_come_from_the_command_line_before_the_environment_before_the_header(run, monkeypatch):
    words = sound("a100", "ddp", "resnet", "--global_batch_size", "1024")
    assert run(*words).rows["time"] == ("01:00:00", "slurm/a100.slurm")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "2:00:00")
    assert run(*words).rows["time"] == ("2:00:00", "$SBATCH_TIMELIMIT")
    given = run("a100", "ddp", "-t", "3:00:00", *words[2:])
    assert given.rows["time"] == ("3:00:00", "command line")
    for option in ("--gres=gpu:a100:2", "--gres=gpu:2,lscratch:10", "--gres=lscratch:10,gpu:2"):
        assert run("a100", "ddp", option, *words[2:]).rows["world size"][0] == "4 = 2 nodes x 2"
    # sbatch reads no such variable.
    monkeypatch.setenv("SLURM_ACCOUNT", "abc@a100")
    assert "no account is given" in run("a100", "ddp", *words[4:]).errors[0]
    assert run("v100x8", "ddp", "-p", "gpu_p2l", "-A", "abc@v100", *words[6:]).status == 0  # of the same nodes


def test_in_a_job_slurms_variables_count_and_who_may_submit_is_not_asked(run, monkeypatch):
    variables = {"JOB_ID": "7", "JOB_NUM_NODES": "3", "JOB_QOS": "other", "JOB_PARTITION": "x"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    words = ["--in_job", "--", "recipes/vit.py", "--data", "digits", "--global_batch_size", "96"]
    job = run("h100", "hsdp", *words)
    assert job.status == 0, job.errors
    assert job.rows["nodes"] == ("3", "$SLURM_JOB_NUM_NODES")
    assert job.rows["replicas"] == ("3, each sharded over a node", "nodes")
    assert job.rows["time"] == ("unknown", "default")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")  # by sbatch --gres=gpu:2, which slurm/launch.sh follows
    job = run("h100", "ddp", *words)
    assert job.rows["GPUs a node"] == ("2", "$SLURM_GPUS_ON_NODE")
    assert job.rows["data-parallel size"][0] == "6"
    monkeypatch.setenv("RECIPES_PROCESSES_PER_NODE", "1")
    assert run("h100", "ddp", *words).rows["data-parallel size"][0] == "3"
    # Submitted from an interactive job, it is another one: of a node, and who may submit is asked.
    monkeypatch.delenv("RECIPES_PROCESSES_PER_NODE")
    assert "no account is given" in run("h100", "ddp", *words[1:]).errors[0]
    assert run("h100", "ddp", "-A", "abc@h100", *words[1:]).rows["world size"][0] == "4 = 1 nodes x 4"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("2:30", 150), ("1:00:00", 3600), ("1-0", 86400), ("2-3:30", 185400), ("1-2:03:04", 93784)],
)
def test_times_of_slurm(text, seconds):
    plan, problems = preflight.read_command(["v100", "ddp", f"--time={text}", "--", "x"])
    assert (problems, plan.seconds) == ([], seconds)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--checkpointing_steps", "11"],
            "at most 11 steps, 5.0% of the run (0.40 GPU-hours if the run fills the job)",
        ),
        (["--checkpointing_steps", "33"], "at most 22 steps, 10.0% of the run (0.80 GPU-hours"),
        (["--checkpointing_steps", "11", "--max_steps", "22"], "at most 11 steps, 50.0% of the run"),
        (["--data", "FOLDER"], "at most an epoch, 10.0% of the run (0.80 GPU-hours"),
        (["--data", "FOLDER", "--checkpointing_steps", "9"], "at most 9 steps or an epoch, 10.0% of the run"),
        (
            ["--data", "FOLDER", "--max_steps", "9"],
            "at most an epoch; the images are not counted yet; never more than",
        ),
    ],
)
def test_what_a_crash_costs(run, image_folder, flags, words):
    flags = [str(image_folder) if flag == "FOLDER" else flag for flag in flags]
    job = run(*sound("h100", "ddp", "resnet", *flags))  # 22 steps an epoch, 8 GPUs, an hour
    assert words in job.out.splitlines()[-1], job.out


# Every shipped topology with every recipe


@pytest.mark.parametrize("machine", MACHINES)
def test_every_shipped_topology_passes_with_every_recipe_that_takes_it(run, machine):
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| [`")]
    takes = {re.search(r"`(\w+)\.py`", line)[1]: [cell.strip() for cell in line.split("|")[3:9]] for line in table}
    columns = ["ddp", "fsdp", "hsdp", "zero", "tp", "pp"]
    prefix = MACHINES[machine].topologies or machine
    strategies = [path.stem.split("_", 1)[1] for path in (ROOT / "accelerate_configs").glob(f"{prefix}_*.yaml")]
    assert len(strategies) >= 7
    for strategy, name in itertools.product(strategies, RECIPES):
        taken = takes[name][columns.index("zero" if "zero" in strategy else strategy)]
        if machine != "h100" and taken != "yes" and not taken.startswith("x "):
            continue  # the recipe refuses alike on each machine
        flags = [] if name == "allreduce_pi" else ["--global_batch_size", "1024"]
        job = run(*sound(machine, strategy, name, *flags))
        half = name in ("vit_tp", "vit_pp", "vit_tp_by_hand") and "bf16" not in MACHINES[machine].precisions
        if taken == "yes" or taken.startswith("x "):
            fp16 = half and len(job.errors) == 1 and "fp16" in job.errors[0]
            assert (job.status == 0) is not half, (strategy, name, job.errors)
            assert fp16 or not half, job.errors
        else:
            assert f"{name}.py does not run under {strategy}. Give " in "".join(job.errors), (strategy, name)


# Refusals: one line each

VIT = "-A abc@h100 -- recipes/vit.py"
TP = "--nodes 2 -A abc@h100 -- recipes/vit_tp.py"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("h100", "machine, strategy and recipe are needed"),
        (f"h10 ddp {VIT}", "no machine h10. The nearest is h100; there are v100, v100x8, a100, h100"),
        (f"h100 fsp {VIT}", "h100 has no strategy fsp. The nearest is fsdp; there are ddp, fsdp,"),
        ("v100 tp -A abc@v100 -- recipes/vit_tp.py", "v100 has no strategy tp."),
        ("h100 ddp -A abc@h100 -- recipes/vti.py", "no recipe recipes/vti.py. Give its path; the nearest is"),
        ("h100 ddp -A abc@h100 -- tools/smoke.py", "is no recipe: it has no CONFIGS or no parse"),
        ("h100 fsdp -A abc@h100 -- recipes/resnet.py", "resnet.py does not run under fsdp. Give ddp."),
        ("h100 tp -A abc@h100 -- recipes/vit.py", "vit.py does not run under tp. Give ddp or fsdp or"),
        ("h100 ddp --nodes 1-4 " + VIT, "--nodes 1-4 is not one number."),
        ("h100 ddp --gres=gpu:8 " + VIT, "exceeds a node of h100. Give --gres=gpu:N, with N from 1 to 4."),
        ("h100 ddp --gres=lscratch:10 " + VIT, "--gres=lscratch:10 gives no GPU of h100. Give --gres=gpu:N,"),
        ("h100 ddp --tim 10 " + VIT, "sbatch has no option --tim in full. The nearest is --time."),
        ("h100 ddp --nodez=2 " + VIT, "sbatch has no option --nodez in full. The nearest is --nodes."),
        ("h100 ddp 4 " + VIT, "4 belongs to no option of sbatch. The recipe and its flags come after --."),
        ("h100 ddp --nodes " + VIT, "sbatch's argument -N/--nodes: expected one argument."),
        ("h100 ddp --time soon " + VIT, "--time soon is no time of Slurm."),
        (f"h100 ddp {VIT} --lr 1", "unknown flag --lr. The nearest is --learning_rate"),
        (
            f"h100 ddp --nodes 4 {VIT} --global_batch_size 1000",
            "1000 does not divide by 16 data-parallel processes x 1 accumulation steps. Give 992 or 1008.",
        ),
        (f"h100 ddp {VIT} --global_batch_size 4096", "1437 training images do not fill one global batch."),
        (f"h100 tp {TP} --tensor_parallel_size 3", "3 does not fit into a node of 4 GPUs. Give a divisor of 4."),
        (f"h100 tp {TP} --tensor_parallel_size 8", "--tensor_parallel_size 8 does not fit into a node of 4 GPUs."),
        (f"h100 tp {TP} --model Ti --tensor_parallel_size 4", "4 does not divide the 3 heads."),
        (
            "h100 tp -A abc@h100 -- recipes/vit_tp_by_hand.py --model Ti",
            "--tensor_parallel_size 2 does not cut 3 heads",
        ),
        (
            "h100 pp --nodes 2 -A abc@h100 -- recipes/vit_pp.py --pipeline_parallel_size 3",
            "--pipeline_parallel_size 3 does not divide the 8 GPUs (2 nodes x 4). Change it or --nodes.",
        ),
        ("h100 pp --nodes 2 -A abc@h100 -- recipes/vit_pp.py --pipeline_parallel_size 8", "8 exceeds the 6 blocks."),
        (f"h100 hsdp {VIT}", "there is one. Use fsdp, or give more --nodes."),
        ("h100 ddp -- recipes/vit.py", "no account is given. Add -A PROJECT@h100."),
        ("h100 ddp -A abc@v100 -- recipes/vit.py", "the account abc@v100 has no hours on h100."),
        (f"h100 ddp -C v100-32g {VIT}", "--constraint v100-32g does not select h100. Give -C h100."),
        ("v100x8 ddp -p gpu_p13 -A abc@v100 -- recipes/vit.py", "does not select v100x8. Give -p gpu_p2."),
        ("v100 ddp -C a100 -A abc@v100 -- recipes/vit.py", "--constraint a100 selects a100, not v100. Leave it out,"),
        ("v100 ddp -p gpu_p2 -A abc@v100 -- recipes/vit.py", "--partition gpu_p2 selects v100x8, not v100."),
        (f"h100 ddp -p gpu_p5 {VIT}", "--partition gpu_p5 selects a100, not h100. Leave it out, or name"),
        (f"h100 ddp --time 30:00:00 {VIT}",
         "exceeds the 20 h of qos_gpu_h100-t3, the default QoS. Give --qos=qos_gpu_h100-t4,"),
        ("v100 ddp -N 129 -A abc@v100 -- recipes/vit.py --global_batch_size 516",
         "516 GPUs exceed the 512 of qos_gpu-t3, the default QoS. Give fewer --nodes,"),
        (f"h100 ddp -N 8 --time 30:00:00 {VIT}", "default QoS. Give a shorter --time: a job that is cut off goes on,"),
        ("a100 ddp --time 21:00:00 -A abc@a100 -- recipes/vit.py", "--time 21:00:00 exceeds the 20 h of a100."),
        (f"h100 ddp -t 5:00:00 --qos qos_gpu_h100-dev {VIT}", "2 h of qos_gpu_h100-dev. Give --qos=qos_gpu_h100-t3,"),
        (
            "v100 ddp -N 16 --qos=qos_gpu-dev -A abc@v100 -- recipes/vit.py",
            "64 GPUs exceed the 32 of qos_gpu-dev. Give --qos=qos_gpu-t3, fewer --nodes,",
        ),
        (f"h100 ddp --qos=qos_gpu-dev {VIT}", "no QoS qos_gpu-dev of h100 is known. The nearest is qos_gpu_h100-dev,"),
        (f"h100 ddp {VIT} --data $DSDIR/imagenet", "$DSDIR is not set, and $DSDIR/imagenet needs it."),
        (f"h100 ddp {VIT} --data /imagenet", "or a CSV file. $DSDIR is not set: log in anew, or export it."),
        (f"h100 ddp {VIT} --report_to aim", "--report_to aim is not installed."),
        (f"h100 ddp {VIT} --checkpointing_steps daily", "--checkpointing_steps daily is neither the word epoch nor"),
        (f"h100 zero2 {VIT} --async_checkpoint", "Leave --async_checkpoint out under ZeRO."),
        (f"h100 ddp {VIT} @sweep.txt", "needs a line of flags for each task of an array. Give --array=1-N."),
    ],
    ids=lambda value: value[:40],
)  # fmt: skip
def test_refusals(run, command, words):
    job = run(command)
    assert job.status == 1
    assert any(words in line for line in job.errors), job.errors
    assert all(line.startswith("error: ") and line.endswith(".") for line in job.errors), job.errors
    assert job.out == ""


def test_several_problems_come_at_once(run):
    job = run("h100", "hsdp", "--qos=dev", "--", "recipes/vit.py", "--global_batch_size", "66", "--data", "no/such")
    decisive = [
        "no account is given",
        "no QoS dev",
        "hsdp replicates",
        "does not divide by 4",
        "no/such does not exist",
    ]
    assert [sum(word in line for line in job.errors) for word in decisive] == [1] * 5, job.errors


def test_checks_that_rest_on_hearsay_can_be_left_out(run, monkeypatch):
    command = f"h100 ddp --qos=qos_new {VIT}"
    assert run(command).status == 1
    monkeypatch.setenv("RECIPES_PREFLIGHT_SKIP", "limits,quotas")
    assert run(command).rows["qos"] == ("qos_new", "command line")


def test_the_default_time_is_named(run, collection):
    header = collection / "slurm/h100.slurm"
    header.write_text(header.read_text().replace("#SBATCH --time", "#SBATCH --none"))
    job = run(f"h100 ddp {VIT}")
    assert job.status == 0
    assert "warning: without --time the machine ends a job after 10 minutes." in job.out
    assert job.rows["time"] == ("00:10:00", "default")


def test_uneven_stages_are_named(run):
    job = run("h100 pp -A abc@h100 -- recipes/vit_pp.py --pipeline_parallel_size 4")
    assert "warning: 6 blocks over 4 stages: the larger ones keep the others waiting." in job.out


# Topologies that somebody changed


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """A copy of what a user may edit."""
    for name in ("accelerate_configs", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    for name in ("recipes", "pyproject.toml"):
        (tmp_path / "copy" / name).symlink_to(ROOT / name)
    monkeypatch.setattr(preflight, "ROOT", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    ("machine", "strategy", "change", "words"),
    [
        ("v100", "ddp", {"mixed_precision": "bf16"}, "v100 has no bf16 in hardware. Set mixed_precision to fp16"),
        ("v100", "ddp", {"mixed_precision": "fp8"}, "v100 has no fp8 in hardware. Set mixed_precision to fp16"),
        ("a100", "ddp", {"mixed_precision": "fp8"}, "a100 has no fp8 in hardware. Set mixed_precision to bf"),
        ("h100", "ddp", {"rdzv_backend": "c10d"}, "rdzv_backend stands in accelerate_configs/h100_ddp.yaml: acc"),
        ("h100", "ddp", {"same_network": True}, "same_network stands in"),
        ("h100", "ddp", {"enable_cpu_affinity": True}, "enable_cpu_affinity stands in"),
        ("h100", "ddp", {"max_restarts": 1}, "max_restarts stands in"),
        ("h100", "ddp", {"use_cpu": True}, "use_cpu stands in"),
        ("h100", "ddp", {"num_machines": 2}, "num_machines stands in accelerate_configs/h100_ddp.yaml: Slurm and"),
        ("h100", "ddp", {"machine_rank": 0}, "machine_rank stands in"),
        ("h100", "ddp", {"main_process_ip": "x"}, "main_process_ip stands in"),
        ("h100", "ddp", {"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps says it. Remove it."),
        ("h100", "zero3", {"deepspeed_config": {"gradient_clipping": 1.0}}, "recipe's --max_grad_norm says it."),
        ("h100", "ddp", {"mixed_precison": "no"}, "h100_ddp.yaml. The nearest is mixed_precision."),
        ("h100", "fsdp", {"fsdp_config": {"fsdp_ofload_params": True}}, "The nearest is fsdp_offload_params."),
        ("h100", "fsdp", {"fsdp_config": {"fsdp_version": 1}}, "Set fsdp_version: 2"),
        (
            "h100", "fsdp", {"fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "ViTLayer"}},
            "no module of vit.py's model is a ViTLayer, fsdp_transformer_layer_cls_to_wrap of",
        ),
        ("h100", "fsdp", {"fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": None}}, "The nearest is "),
    ],
    ids=str,
)  # fmt: skip
def test_topologies_that_do_not_do_what_they_say(run, collection, machine, strategy, change, words):
    path = collection / f"accelerate_configs/{machine}_{strategy}.yaml"
    settings = yaml.safe_load(path.read_text())
    for key, value in change.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(settings))
    job = run(*sound(machine, strategy, "vit"))
    (line,) = job.errors
    assert words in line
    assert job.status == 1


# The table of machines


@pytest.mark.parametrize("machine", MACHINES)
def test_each_header_agrees_with_the_table(machine):
    """It gives Slurm whole nodes that the table describes, and launch.sh the machine's name and nothing else."""
    facts, given = MACHINES[machine], preflight.headers(machine)
    assert given["gres"] == f"gpu:{facts.gpus}"
    assert given["cpus-per-task"] == str(facts.gpus * facts.cores)
    assert {name: given[name] for name in ("constraint", "partition") if name in given} == facts.select
    text = (ROOT / f"slurm/{machine}.slurm").read_text()
    for line in (
        "--ntasks-per-node=1",
        "--hint=nomultithread",
        "--signal=B:USR1@600",
        "--requeue",
        "--open-mode=append",
    ):
        assert f"\n#SBATCH {line}\n" in text
    code = [line for line in text.splitlines() if not line.startswith("#")]
    assert f"MACHINE={machine}" in code
    same = (ROOT / "slurm/h100.slurm").read_text().splitlines()
    assert [line for line in code if line != f"MACHINE={machine}"] == [
        line for line in same if not line.startswith(("#", "MACHINE="))
    ]


def test_the_pages_agree_with_the_table():
    """Every key is explained, and Jean Zay's figures are the same."""
    keys = re.findall(r"^\| `(\w+)`", (ROOT / "docs/other_clusters.md").read_text(), re.M)
    assert keys == [each.name for each in dataclasses.fields(Machine)]
    page = (ROOT / "docs/jean_zay.md").read_text()
    rows = {
        "GPUs, cores of a node": lambda each: f"{each.gpus}, {each.gpus * each.cores}",
        "memory of a GPU": lambda each: (
            " or ".join(map(str, [each.gpu_memory, *each.gpu_memory_by_constraint.values()])) + " GB"
        ),
        "account": lambda each: f"`PROJECT@{each.account}`",
        "precision": lambda each: "bf16" if "bf16" in each.precisions else "fp16",
        "longest job": lambda each: f"{each.hours} h",
    }
    machines = [MACHINES[name] for name in re.search(r"(?m)^\| \| (v100 .*) \|$", page)[1].split(" | ")]
    for name, cell in rows.items():
        assert f"\n| {' | '.join([name, *map(cell, machines)])} |\n" in page
    for name, most in (item for each in machines for item in each.qos.items()):
        assert re.search(rf"(?m)^\|.*`{name}`.*\| {most['hours']} h \| {most['gpus']}\b", page)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", ""),
        ("--gres=gpu:4", "--gres=gpu:4 exceeds a node of heron. Give --gres=gpu:N, with N from 1 to 2."),
        ("-c 64", "--cpus-per-task=64 does not fit into the 32 cores of a node."),
        ("-t 3-0", "--time 3-0 exceeds the 48 h of heron."),
        ("-q long", "no QoS long of heron is known. The nearest is "),
        ("-p gpu_p6", "--partition gpu_p6 does not select heron. Give -p gpu."),
        ("--mem=64G", ""),
    ],
)
def test_a_made_up_machine_is_refused_what_it_lacks(run, collection, options, words):
    add_made_up_machine(collection)
    job = run("heron", "fsdp", *options.split(), "--", "recipes/vit.py")
    assert [words in line for line in job.errors] == [True] * bool(words), job.errors
    if not options:
        assert job.rows["machine"] == ("heron, 2 GPUs of 24 GB a node", "command line")
        assert job.rows["precision"] == ("bf16", "accelerate_configs/a100_fsdp.yaml")
        assert job.rows["qos"] == ("normal", "default")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("gpus =", "gpuss ="), "[heron] of slurm/machines.toml: got an unexpected keyword argument 'gpuss'. docs/"),
        (("gpus = 2", ""), "[heron] of slurm/machines.toml: missing 1 required positional argument: 'gpus'. docs/"),
        (("gpus = 2", "gpus = "), "slurm/machines.toml: Invalid value (at line "),
        (('"no", "fp16", "bf16"', '"no", "fp16"'), "heron has no bf16 in hardware. Set mixed_precision to fp16 in "),
        (('topologies = "a100"', ""), "no accelerate_configs/heron_STRATEGY.yaml. Copy one, or see docs/other_clu"),
    ],
    ids=str,
)
def test_entries_that_cannot_be_used(run, collection, change, words):
    add_made_up_machine(collection)
    table = collection / "slurm/machines.toml"
    before, entry = table.read_text().split("[heron]")
    assert change[0] in entry
    table.write_text(before + "[heron]" + entry.replace(*change, 1))
    (line,) = run("heron", "ddp", "--", "recipes/vit.py").errors
    assert words in line
    (collection / "slurm/h100.slurm").unlink()
    table.write_text(before)
    assert "h100 has no slurm/h100.slurm. Write one as docs/other" in run(f"h100 ddp {VIT}").errors[0]


# The place


def test_dsdir_pretrained_and_data(tmp_path, monkeypatch, run):
    words = ["h100", "ddp", "-A", "abc@h100", "--", "recipes/vit.py", "--pretrained", "org/vit"]
    (line,) = run(*words).errors
    assert line.startswith("error: --pretrained org/vit was not found: no org/vit/config.json")
    assert line.endswith("$DSDIR is not set: log in anew, or export it.")
    # In a process of its own: offline from its first import, as a job is.
    (line,) = command_line(words, DSDIR=str(tmp_path)).stderr.splitlines()
    assert "DSDIR" not in line.replace(str(tmp_path), "")
    assert "error: --pretrained org/vit was not found" in line
    assert f"{tmp_path}/HuggingFace_Models/org/vit/config.json" in line
    folder = tmp_path / "HuggingFace_Models/org/vit"
    vit_config("S", 224, 16, 7, 0.0).save_pretrained(folder)
    monkeypatch.setenv("DSDIR", str(tmp_path))
    (line,) = run(*words, "--image_size", "224", "--data", "$DSDIR/images").errors
    assert line.startswith("error: $DSDIR/images was not expanded. Take the single quotes away")
    size = ["--image_size", "224"]
    assert run("h100", "fsdp", *words[2:], *size).status == 0
    memory = run("h100", "ddp", "--memory", *words[2:], *size)
    assert "Memory of a GPU, estimated: 0.1 parameters" in memory.out


def test_caches_in_a_small_home_are_refused_where_there_is_room_elsewhere(run, monkeypatch, tmp_path):
    command = f"h100 ddp {VIT}"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home/hf"))
    assert run(command).status == 0  # a laptop
    monkeypatch.setenv("WORK", str(tmp_path / "work"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    (line,) = run(command).errors
    assert line.endswith(
        "lie in $HOME, which holds 3 GB. Write into ~/.bashrc: export HF_HOME=$WORK/.cache/huggingface"
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "home/triton"))
    remedies = run(command).errors[0].partition("export ")[2].split()
    launch = (ROOT / "slurm/launch.sh").read_text()
    assert len(remedies) == 2
    for name, folder in (remedy.split("=") for remedy in remedies):
        assert f"{name}=${{{name}:-{folder}}}" in launch  # the folder that the job takes
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "home/ops"))
    assert any("TORCH_EXTENSIONS_DIR lies in $HOME" in line for line in run(command).errors)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.delenv("SCRATCH")
    assert "HF_HOME, TRITON_CACHE_DIR lie in $HOME" in run(command).errors[0]
    monkeypatch.delenv("WORK")
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    assert "HF_HOME, TORCH_HOME lie in $HOME" in run(command).errors[0]
    (tmp_path / "home").mkdir()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "home/hf").symlink_to(tmp_path / "scratch")  # as many do with ~/.cache
    (tmp_path / "home/.cache").symlink_to(tmp_path / "scratch")
    assert run(command).status == 0


def test_full_file_systems(run, monkeypatch, tmp_path):
    real, command = os.statvfs(tmp_path), f"h100 ddp {VIT} --output_dir {tmp_path}/new/run"
    state = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
    full = {"f_blocks": 1000, "f_bfree": 50, "f_bavail": 30, "f_files": 10**6, "f_ffree": 500_000}
    full |= {"f_favail": 500_000, "f_frsize": 2**20}
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**state | full))
    (line,) = run(command).errors
    assert line.startswith(f"error: 97% of the disk of {tmp_path} is used, and a run may need more than the rest.")
    assert line.endswith("Remove files, change --output_dir, or RECIPES_PREFLIGHT_SKIP=quotas.")
    # The same share of a petabyte leaves 30 TB.
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(**state | full | {"f_frsize": 2**40}))
    assert run(command).status == 0
    monkeypatch.setattr(
        os, "statvfs", lambda _: SimpleNamespace(**state | full | {"f_bavail": 90, "f_ffree": 1, "f_favail": 1})
    )
    assert "100% of the inodes of" in run(command).errors[0]


def test_quotas_of_lustre(run, monkeypatch, tmp_path):
    """By the output of `lfs quota -q` and `lfs project -d` as Lustre's manual shows them."""
    tool = tmp_path / "bin/lfs"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/bash\n"
        'if [[ $1 == project ]]; then echo " 4242 P $3"; exit; fi\n'
        'if [[ $3 == -p && $4 == 4242 ]]; then echo "$5 90 0 100 - 499000* 450000 500000 -"; exit; fi\n'
        'echo "$5 90 0 0 - 7 0 0 -"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    command = f"h100 ddp {VIT} --output_dir {tmp_path}/run"
    (line,) = run(command).errors
    assert f"100% of the inodes quota (p 4242) of {tmp_path} is used, and" in line
    tool.write_text(tool.read_text().replace("#!/bin/bash\n", f"#!/bin/bash\necho $* >>{tmp_path}/asked\n"))
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("".join(f"--output_dir {tmp_path}/{name}\n" for name in "abc"))
    assert len(run(f"h100 ddp --array=1-3 {VIT} @{sweep}").errors) == 1
    assert len((tmp_path / "asked").read_text().splitlines()) == 4  # once for all, the project and three quotas
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: raise_(subprocess.TimeoutExpired("lfs", 5)))
    late = run(command)
    assert late.status == 0
    assert f"warning: lfs does not tell the quotas of {tmp_path}: TimeoutExpired." in late.out


def raise_(error):
    raise error


def test_versions_below_the_bounds(run, monkeypatch):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"torch": "2.7.1+cu126", "transformers": "5.9.0"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    errors = "\n".join(run(f"h100 zero1 {VIT}").errors)
    assert "error: torch 2.7.1+cu126 is not >=2.8. Load a newer module, or pip install 'torch>=2.8'." in errors
    assert "error: transformers 5.9.0 is not >=5.17." in errors  # the recipe's own bound
    assert "error: deepspeed is not installed." in errors
    assert "error: Python 3.10.4 is not >=3.11. Load another module." in errors


def test_bounds_are_those_of_the_recipe_itself(run, monkeypatch, tmp_path):
    """An older transformers, as a module has it: the Vision Transformer alone asks for more."""
    folder = tmp_path / "transformers-4.57.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.1\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    monkeypatch.delitem(sys.modules, "shared.vit", raising=False)
    for name in ("resnet", "resnet_webdataset", "resnet_hf_datasets", "allreduce_pi"):
        assert run(*sound("h100", "ddp", name)).errors == []
    errors = run(*sound("h100", "ddp", "vit")).errors
    assert (
        "error: transformers 4.57.1 is not >=5.17. Load a newer module, or pip install 'transformers>=5.17'." in errors
    )
    # A bound of the recipe's head, and none of pyproject.toml.
    mine = tmp_path / "mine.py"
    mine.write_text(RECIPES["allreduce_pi"].read_text().replace("transformers>=4.57", "transformers>=4.58"))
    words = sound("h100", "ddp", "allreduce_pi")
    words[words.index("--") + 1] = str(mine)
    assert "transformers 4.57.1 is not >=4.58." in run(*words).errors[0]
    mine.write_text(RECIPES["allreduce_pi"].read_text().replace('"transformers>=4.57", ', ""))
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.1\n")
    assert run(*words).errors == []


def test_nobody_trains_on_the_digits_by_oversight(run):
    words = ["h100", "ddp", "-A", "abc@h100", "--nodes=2", "--", "recipes/resnet.py"]
    assert run(*words, "--data=digits").status == 0
    (line,) = run(*words).errors
    assert line.startswith("error: without --data the 2 nodes train on 1,797 embedded digits. Give --data FOLDER, or")
    assert run(*words[:4], *words[5:]).status == 0  # one node: a demonstration


# Options of sbatch that change what is launched


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            "--ntasks-per-node=4",
            "--ntasks-per-node=4 (command line) starts several launchers on a node. Leave it out:",
        ),
        ("--ntasks-per-node 2", "starts several launchers on a node."),
        ("--ntasks-per-gpu=1", "starts several launchers on a node."),
        ("-n 8", "--ntasks=8 is not the 2 that the other options ask for. Give --nodes=N alone."),
        ("--ntasks=8", "--ntasks=8 is not the 2"),
        ("-n8", "--ntasks=8 is not the 2"),
        ("-G 4", "--gpus=4 is not the 8 that the other options ask for. Give --nodes=N and --gres=gpu:N,"),
        ("--gpus=h100:4", "--gpus=h100:4 is not the 8"),
        ("--gpus-per-node=2", "--gpus-per-node=2 is not the 4 that the other options ask for."),
        ("--gpus-per-task=1", "gives the launcher of a node other GPUs than --gres. Give --gres=gpu:N,"),
        ("--gpus-per-socket 2", "gives a node other GPUs than --gres."),
        ("--gpu-bind=single:1", "hides GPUs of a node from its launcher."),
        ("--tres-bind=gres/gpu:map:0", "hides GPUs of a node from its launcher."),
        ("--cpus-per-gpu=8", "excludes --cpus-per-task. Give --cpus-per-task,"),
        ("-c 97", "--cpus-per-task=97 does not fit into the 96 cores of a node. Give at most 96."),
        ("--cpus-per-task=all", "--cpus-per-task=all does not fit into the 96 cores"),
        ("--export=NONE", "--export=NONE (command line) leaves your environment behind. Give --export=ALL,"),
        ("--export RECIPES_ROOT,PATH", "leaves your environment behind."),
        ("-m arbitrary", "--distribution=arbitrary (command line) changes the order of the nodes."),
        ("--open-mode=truncate", "loses what the former starts of a job wrote."),
        ("--signal=TERM@60", "ends a job in another way than by a checkpoint and a requeue. Give --signal=B:USR1@SEC"),
        ("--container=/image", "runs slurm/launch.sh where there is no srun."),
        (
            "--mem=64G",
            "--mem=64G: Jean Zay gives a job memory with its cores. Leave it out, and give --cpus-per-task,",
        ),
        ("--mem-per-cpu 4G", "--mem-per-cpu=4G: Jean Zay gives a job memory with its cores."),
        ("-D no/such", "--chdir=no/such is no folder."),
        ("--chdir=recipes", "no recipe recipes/resnet.py"),  # sbatch starts the job there
        ("-o no/such/%x-%j.log", "--output=no/such/%x-%j.log (command line) is no file in a folder that exists, and"),
        ("--error no/such.txt/%j", "--error=no/such.txt/%j (command line) is no file in a folder that exists"),
        ("--output=slurm/", "--output=slurm/ (command line) is no file in a folder"),
        ("--output=%j/log", "--output=%j/log (command line) is no file in a folder"),
        ("--job-name=a/b", "--output=%x-%j.log (slurm/h100.slurm) is no file in a folder"),
    ],
)
def test_options_that_change_what_is_launched_are_refused(run, options, words):
    job = run(
        "h100", "ddp", "--nodes=2", "-A", "abc@h100", *options.split(), "--", "recipes/resnet.py", "--data=digits"
    )
    assert job.status == 1
    assert len(job.errors) == 1, job.errors
    assert words in job.errors[0]


def test_the_same_by_variables(run, monkeypatch):
    words = sound("h100", "ddp", "resnet")
    values = {"EXPORT": "NONE", "GPU_BIND": "single:1", "GPUS_PER_TASK": "1", "OUTPUT": "no/log", "SIGNAL": "KILL"}
    values |= {"MEM_PER_NODE": "9G", "OPEN_MODE": "truncate", "GPUS": "1", "DISTRIBUTION": "arbitrary"}
    for name, value in values.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
        (line,) = run(*words).errors
        assert f"={value}" in line
        monkeypatch.delenv(f"SBATCH_{name}")
    # Those that a job or a step leaves in its shell are not sbatch's; slurm/launch.sh takes them away from srun.
    for name in ("EXPORT_ENV=NONE", "NTASKS_PER_NODE=4", "GPUS_PER_TASK=1", "CPUS_PER_TASK=1", "NTASKS=1"):
        monkeypatch.setenv(f"SLURM_{name.split('=')[0]}", name.split("=")[1])
    assert run(*words).status == 0


def test_options_that_change_nothing_pass(run, tmp_path, monkeypatch):
    (tmp_path / "logs h100").mkdir()
    harmless = ["--ntasks=2", "--ntasks-per-node=1", "-G", "8", "--gpus-per-node=h100:4", "-m", "block", "-c", "96"]
    harmless += ["--export=ALL,A=1", "--open-mode=append", "--signal=B:USR2@90", "--gpu-bind=none", "--mem=0"]
    harmless += ["--output", f"{tmp_path}/logs %x/%%%j.log", "--job-name=h100", "--hint=nomultithread", "--hold"]
    words = sound("h100", "ddp", "resnet")
    assert run(*words[:2], *harmless, *words[2:]).errors == []
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for where in (["-D", str(tmp_path)], [f"--chdir={tmp_path}"]):
        monkeypatch.chdir(ROOT)
        job = run("h100", "ddp", *where, "-A", "abc@h100", "--", "recipes/resnet.py")
        assert job.errors == []
        assert Path.cwd() == tmp_path  # where everything else was looked for
    job = run(*words[:2], "--cpus-per-task=24", *words[2:])
    assert "warning: --cpus-per-task=24 is for all 4 processes of a node, whose share is 96 cores. Give" in job.out
    assert "warning" not in run(*words[:2], "--cpus-per-task=24", "--gres=gpu:1", *words[2:]).out


def test_in_a_job_more_than_one_task_on_a_node_is_refused(run, monkeypatch):
    """Their cores are shared out: the one launcher would get a part of them."""
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    monkeypatch.setenv("SBATCH_OUTPUT", "no/such/log")
    monkeypatch.setenv("SBATCH_GPU_BIND", "single:1")
    (line,) = run("h100", "ddp", "--in_job", "--", "recipes/resnet.py").errors
    assert "--ntasks-per-node=4 ($SLURM_NTASKS_PER_NODE) starts several launchers on a node." in line


# Sweeps, copies


def test_every_line_of_a_sweep_is_checked(run, tmp_path):
    file = tmp_path / "sweep.txt"
    file.write_text("--learning_rate 0.1\n--learning_rate 0.2 --output_dir 'a b'\n--global_batch_size 63\n--epoch 1\n")
    words = ["h100", "ddp", "-A", "abc@h100", "--", "recipes/resnet.py", "--epochs", "2", f"@{file}"]
    sweep = run("h100", "ddp", "--array=1-2%1", *words[2:])
    assert sweep.status == 0
    assert "all 2 lines of the array are sound" in sweep.out
    errors = run("h100", "ddp", "-a", "1-5:1", *words[2:]).errors
    assert f"error: {file} line 3: --global_batch_size 63 does not divide by 4" in "".join(errors)
    assert f"error: {file} line 4: unknown flag --epoch." in "".join(errors)
    assert f"error: --array asks for line 5 of {file}, which has 4. Give --array=1-4." in errors
    assert len(errors) == 3
    assert "needs a line of flags for each task" in run(*words).errors[0]
    file.write_text("--learning_rate 0.1\n--output_dir 'a\n")
    assert (
        "line 2 cannot be split into words: No closing quotation." in run("h100", "ddp", "-a2", *words[2:]).errors[0]
    )
    file.write_text("--learning_rate 0.1\n--learning_rate 0.1\n")
    (line,) = run("h100", "ddp", "--array", "1,2", *words[2:]).errors
    assert f"{file} line 1 and {file} line 2 write to the same runs/resnet-" in line


def test_a_copied_recipe_is_read_with_its_own_parts(run, tmp_path):
    """Its `shared` under another name, a flag of its own, another default."""
    shutil.copytree(ROOT / "shared", tmp_path / "my project/parts")
    source = RECIPES["resnet"].read_text().replace("from shared", "from parts")
    source = source.replace("epochs: Positive", "rounds: int = 5\n    epochs: Positive")
    (tmp_path / "my project/mine.py").write_text(source)
    config = tmp_path / "my project/parts/config.py"
    config.write_text(config.read_text().replace('default="epoch"', 'default="77"'))
    words = ["a100", "ddp", "-A", "abc@a100", "--", "my project/mine.py", "--rounds", "3"]
    process = command_line(words, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert rows(process.stdout)["checkpoints"] == ("each 77 steps and each epoch", "mine.py")
    assert rows(process.stdout)["output"][0].startswith("runs/mine-")
    shutil.rmtree(tmp_path / "my project/parts")
    (line,) = run(*words[:5], str(tmp_path / "my project/mine.py"), *words[6:]).errors
    assert "mine.py cannot be imported: ModuleNotFoundError: No module named 'parts'. Install what it needs" in line


# Memory


def test_the_time_of_an_all_reduce_and_its_source(run, collection):
    """ViT-S has 22 million weights; what was measured there wins over what others saw."""
    words = sound("a100", "ddp", "vit", "--model", "S", "--image_size", "224")
    parts = ["a100", "ddp", "--memory", *words[2:]]

    def line() -> str:
        return next(line for line in run(*parts).out.splitlines() if line.startswith("Gradients"))

    # 15/8 of 87 MB at 5 GB/s
    assert line() == "Gradients of 87 MB: about 0.033 s a step by all-reduce at 5 GB/s on the bus (reports of users)."
    results = collection / "benchmarks/results"
    results.mkdir(parents=True)
    for day, per_node, rate in (("2026-01-01", 8, 7.0), ("2026-01-02", 8, 8.6), ("2026-01-03", 16, 200.0)):
        result = {"processes": 16, "processes_per_node": per_node, "rows": [{"bus, GB/s": {"median": rate}}]}
        (results / f"allreduce_a100_{day}.json").write_text(json.dumps(result))
    assert line().endswith("0.019 s a step by all-reduce at 8.6 GB/s on the bus (allreduce_a100_2026-01-02.json).")
    parts[parts.index("2")] = "1"
    assert "at 200 GB/s on the bus (allreduce_a100_2026-01-03.json)" in line()
    words = sound("h100", "ddp", "vit", "--model", "S", "--image_size", "224")
    parts = ["h100", "ddp", "--memory", *words[2:]]
    assert "no bandwidth between nodes of h100 is known. Run benchmarks/allreduce.py there." in line()


@pytest.fixture(scope="module")
def counted() -> list[dict]:
    """What real processes held and took at most, by benchmarks/memory.py."""
    (path,) = (ROOT / "benchmarks/results").glob("memory_cpu2_*.json")
    return [row for row in json.loads(path.read_text())["rows"] if row["how"] == "step"]


@pytest.fixture(scope="module")
def networks() -> dict:
    """Shapes of the weights, and what a forward saves in fp32 and in bf16."""
    found = {}
    for model in ("S", "B"):
        with torch.device("meta"):
            network = VisionTransformer(vit_config(model, 224, 16, 1000, 0.0))
        shapes = {name: weight.shape for name, weight in network.named_parameters()}
        found[model] = shapes, *(memory_estimate.activations(network, 224, half=half) for half in (False, True))
    return found


def test_estimates_beside_what_each_rank_held(counted, networks):
    """Parameters, gradients and optimizer state within 5 %; the peak of a step within 11 %, of tp in bf16 20."""
    names = {row["strategy"] for row in counted}
    assert len({name for name in names if not name.endswith("_bf16")}) == 10
    assert len({name for name in names if name.endswith("_bf16")}) == 8
    for row in counted:
        case = row["strategy"], row["ranks"], row["rank"]
        half, name = row["strategy"].endswith("_bf16"), row["strategy"].removesuffix("_bf16")
        kind = {"tp": "ddp", "pp": "ddp", "tp_fsdp": "fsdp", "zero3_offload": "zero3"}.get(name, name)
        tensor, stages = row.get("tensor", 1), row["ranks"] if name == "pp" else 1
        shapes, *saved = networks[row["model"]]
        split = {"tensor": tensor, "stages": stages}
        own = {"weight_bytes": 2 if half and kind.startswith("zero") else 4, "offloads": name == "zero3_offload"}
        own["replicas"] = 2 if kind == "hsdp" else 1
        held = memory_estimate.held(kind, shapes, row["ranks"], row["rank"], **split, **own)
        assert sum(held.values()) == pytest.approx(sum(row[f"{name}_bytes"] for name in held), rel=0.05), case
        for name, value in held.items():
            assert value == pytest.approx(row[f"{name}_bytes"], rel=0.05), (*case, name)
        if kind in ("zero1", "zero2"):  # with what two ranks keep of a weight on their border
            assert held["gradients"] == row["gradients_bytes"], case
        images = 4 * tensor * stages // row["ranks"]
        peak = memory_estimate.peak(
            kind, shapes, row["ranks"], held, saved[half], images, half=half, accumulates=False, **split
        )
        if row["rank"] == 0:
            assert peak["total"] == pytest.approx(
                row["peak_bytes"], rel=0.2 if row["strategy"] == "tp_bf16" else 0.11
            ), case


def test_saved_bytes_of_a_block_by_hand():
    """ViT-S at 224 px in bf16: 197 tokens of width 384, 6 heads, MLP 1536."""
    with torch.device("meta"):
        network = VisionTransformer(vit_config("S", 224, 16, 1000, 0.0))
    saved, tokens = memory_estimate.activations(network, 224, half=True), 197
    row = tokens * 384
    # In fp32: the input of both norms, two statistics of each a token. In bf16: their output once for each of q, k, v
    # and fc1; q, k, v, what attention gives; fc1's output and the activation's. In fp32: a sum for a head and token.
    norms, products, mlp = 2 * 4 * row + 4 * 4 * tokens, 8 * 2 * row, 2 * 2 * 4 * row
    assert saved.block == norms + products + mlp + 4 * 6 * tokens
    assert saved.split == 4 * 2 * row + mlp
    assert saved.entry == 4 * row
    assert saved.blocks == 12
    weights = {name: weight for name, weight in network.named_parameters() if weight.dim() > 1 and "embed" not in name}
    assert saved.copies == pytest.approx(2 * sum(weight.numel() for weight in weights.values()), rel=0.05)


def test_checkpointing_keeps_the_inputs_of_blocks(networks):
    shapes, saved, _ = networks["S"]
    kept = memory_estimate.held("ddp", shapes, 1, 0)
    how = {"half": False, "accumulates": False}
    plain = memory_estimate.peak("ddp", shapes, 1, kept, saved, 64, **how)
    less = memory_estimate.peak("ddp", shapes, 1, kept, saved, 64, recompute=True, **how)
    assert plain["activations"] == 64 * (saved.ends + 12 * saved.block) + saved.copies
    assert less["activations"] == 64 * (saved.ends + 12 * saved.entry + saved.block) + saved.copies


def test_the_verdict_and_its_remedies(run, monkeypatch):
    words = ["--image_size", "224", "--patch_size", "14", "--model", "G", "--global_batch_size", "1024"]
    job = run("h100", "fsdp", "--memory", *sound("h100", "fsdp", "vit", *words)[2:])
    (line,) = job.errors
    assert job.status == 1
    remedies = re.findall(r"(--gradient_accumulation_steps (\d+)|--activation_checkpointing) \((\d+\.\d) GiB\)", line)
    assert len(remedies) == 2, line
    for flag, _, size in remedies:
        again = run("h100", "fsdp", "--memory", *sound("h100", "fsdp", "vit", *words, *flag.split())[2:])
        assert again.status == 0, again.errors
        assert f"at most {size} GiB at once of 77.4." in again.out
        assert float(size) < 77.4
    # 16 bytes for each of 1.8 billion parameters, and nothing to shard them.
    job = run("v100", "ddp", "--memory", *sound("v100", "ddp", "vit", *words, nodes=128)[2:])
    assert "Give more GPUs, or a strategy that shards more" in job.errors[0]
    assert "6.9 parameters + 6.9 gradients + 13.7 optimizer" in job.errors[0]
    offload = run("v100", "zero3_offload", "--memory", *sound("v100", "zero3_offload", "vit", *words, nodes=128)[2:])
    assert "0.0 parameters + 0.0 gradients + 0.0 optimizer" in "".join([offload.out, *offload.errors])
    # In fp16: weights and gradients 2 bytes each, Adam 12, and the gradients in fp32 again; of 128 nodes.
    assert f"offloaded, estimated: {1.843e9 * 20 / 128 / 2**30:.1f} GiB of 149.0 that" in offload.out
    one = sound("v100", "zero3_offload", "vit", *words[:-1], "4", nodes=1)[2:]
    monkeypatch.setenv("RECIPES_LAUNCH_FLAGS", "--mixed_precision no")
    job = run("v100", "zero3_offload", "--memory", "--gres=gpu:1", *one)
    assert "offloaded, estimated: 41.2 GiB of 37.3 that the job has there.\nwarning: that is too much" in job.out


@pytest.mark.parametrize(
    ("machine", "strategy", "recipe", "state"),
    [
        ("a100", "ddp", "resnet", 4),
        ("h100", "tp", "vit_tp", 8),
        ("h100", "pp", "vit_pp", 8),
        ("h100", "zero2", "vit_zero", 6),  # gradients 2, of 8 GPUs' Adam 12
        ("h100", "ddp", "vit_tp_by_hand", 8),
    ],
)
def test_every_kind_of_recipe_is_estimated(run, machine, strategy, recipe, state):
    """With the optimizer that the recipe builds: bytes of its state for each parameter."""
    size = ["--model", "L"] if recipe != "resnet" else ["--model", "resnet152"]
    words = sound(machine, strategy, recipe, "--global_batch_size", "1024", *size, nodes=1)
    job = run(machine, strategy, "--memory", *words[2:])
    assert job.status == 0, job.errors
    sizes = re.search(r"estimated: ([\d.]+) parameters \+ [\d.]+ gradients \+ ([\d.]+) optimizer .* of 77.4", job.out)
    assert float(sizes[2]) == pytest.approx(float(sizes[1]) * state / 4, abs=0.11 * state / 4), job.out

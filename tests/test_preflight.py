# SPDX-License-Identifier: Apache-2.0
"""Check what tools/preflight.py makes of a command: values and origins, topologies, machines, sweeps and copies."""

import dataclasses
import itertools
import re
import shutil

import preflights
import pytest
from conftest import ROOT, add_made_up_machine
from machines import Machine
from preflight_checks.command import read_command
from preflight_checks.options import headers
from preflights import MACHINES, RECIPES, VIT, command_line, rows, sound

login_node, run, collection = preflights.login_node, preflights.run, preflights.collection


# A sound job


@pytest.mark.slow
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
    plan, problems = read_command(["v100", "ddp", f"--time={text}", "--", "x"], ROOT)
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
        sound_here = taken == "yes" or taken.startswith("x ")
        if machine != "h100" and not sound_here:
            continue  # the recipe refuses alike on each machine
        flags = [] if name == "allreduce_pi" else ["--global_batch_size", "1024"]
        job = run(*sound(machine, strategy, name, *flags))
        if not sound_here:
            assert f"{name}.py does not run under {strategy}. Give " in "".join(job.errors), (strategy, name)
        elif name in ("vit_tp", "vit_pp", "vit_tp_by_hand") and "bf16" not in MACHINES[machine].precisions:
            (line,) = job.errors
            assert "fp16" in line, (strategy, name)
        else:
            assert job.status == 0, (strategy, name, job.errors)


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


# The table of machines


@pytest.mark.parametrize("machine", MACHINES)
def test_each_header_agrees_with_the_table(machine):
    """Each gives Slurm whole nodes as the table has them, and slurm/launch.sh only the machine's name."""
    facts, given = MACHINES[machine], headers(ROOT / f"slurm/{machine}.slurm")
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
    same = [line for line in (ROOT / "slurm/h100.slurm").read_text().splitlines() if not line.startswith("#")]
    assert [line.replace(f"={machine}", "=h100") for line in code] == same


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


# Sweeps, copies


def test_every_line_of_a_sweep_is_checked(run, tmp_path):
    file = tmp_path / "sweep.txt"
    file.write_text("--learning_rate 0.1\n--learning_rate 0.2 --output_dir 'a b'\n--global_batch_size 63\n--epoch 1\n")
    words = ["h100", "ddp", "-A", "abc@h100", "--", "recipes/resnet.py", "--epochs", "2", f"@{file}"]
    sweep = run("h100", "ddp", "--array=1-2%1", *words[2:])
    assert sweep.status == 0
    assert "all 2 lines of the array passed" in sweep.out
    errors = run("h100", "ddp", "-a", "1-5:1", *words[2:]).errors
    assert f"error: {file} line 3: --global_batch_size 63 does not divide by 4" in "".join(errors)
    assert f"error: {file} line 4: unknown flag --epoch." in "".join(errors)
    assert f"error: --array asks for line 5 of {file}, which has 4. Give --array=1-4." in errors
    assert len(errors) == 3
    assert "needs a line of flags for each task" in run(*words).errors[0]
    file.write_text("--learning_rate 0.1\n--output_dir 'a\n")
    (line,) = run("h100", "ddp", "-a2", *words[2:]).errors
    assert "line 2 cannot be split into words: No closing quotation." in line
    file.write_text("--learning_rate 0.1\n--learning_rate 0.1\n")
    (line,) = run("h100", "ddp", "--array", "1,2", *words[2:]).errors
    assert f"{file} line 1 and {file} line 2 write to the same runs/resnet-" in line


@pytest.mark.slow
def test_a_copied_recipe_is_read_with_its_own_parts(run, tmp_path):
    """The copy has its `shared` under another name, a flag of its own and another default."""
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

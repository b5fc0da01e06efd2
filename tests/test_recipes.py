# SPDX-License-Identifier: Apache-2.0
"""The collection keeps its promises: loops that stay alike, recipes that can be copied, files that agree."""

import ast
import importlib
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT, launch_command, python
from packaging.requirements import Requirement
from packaging.version import Version
from test_strategies import CASES, TABLE

from shared.checkpoint.origin import hash_of
from shared.config import parse

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
TRAININGS = {path.name for path in RECIPES} - {"allreduce_pi.py"}
TOPOLOGIES = sorted((ROOT / "accelerate_configs").glob("*.yaml"))

MACHINES = tomllib.loads((ROOT / "slurm/machines.toml").read_text())

# Consistency: a recipe's head says what differs from its base, and nothing else does


def functions(source: str) -> dict[str, str]:
    """Name -> syntax tree, without comments and layout, of each top-level function and class but Config."""
    kinds = ast.FunctionDef | ast.ClassDef
    nodes = [node for node in ast.parse(source).body if isinstance(node, kinds) and node.name != "Config"]
    return {node.name: ast.dump(node) for node in nodes}


def fields(source: str) -> dict[str, str]:
    """Name -> type, default and help of each field of Config."""
    config = next((node for node in ast.parse(source).body if getattr(node, "name", "") == "Config"), None)
    nodes = [node for node in config.body if isinstance(node, ast.AnnAssign)] if config else []
    return {node.target.id: ast.dump(node) for node in nodes}


def check_head(name: str, sources: dict[str, str]) -> None:
    """Assert that `Base: X.py. Changes: a, b.` in a recipe's docstring is what its code does."""
    source = sources[name]
    head = re.search(r"^Base: (?:none|(\w+\.py)\. Changes: ([\w,\s]+))\.$", ast.get_docstring(ast.parse(source)), re.M)
    assert head, f"{name}: the docstring lacks a line `Base: none.` or `Base: x.py. Changes: f, g.`"
    # A lesson that must be longer says why in its head, where its reader sees it.
    reason = re.search(r"^Longer than 250 lines: .{20,}\.$", ast.get_docstring(ast.parse(source)), re.M)
    assert len(source.splitlines()) <= 250 or reason, f"{name} is longer than 250 lines"
    if head[1] is None:
        return
    base, mine = functions(sources[head[1]]), functions(source)
    changed = {function for function in mine if mine[function] != base.get(function)}
    assert changed == set(re.split(r",\s+", head[2])), f"{name} changes {sorted(changed)}, its head says {head[2]}"
    if name.split("_")[0] == Path(head[1]).stem:  # one network: a flag of one name has one default and one meaning
        theirs, ours = fields(sources[head[1]]), fields(source)
        different = [field for field in ours.keys() & theirs.keys() if ours[field] != theirs[field]]
        assert not different, f"{name}: {different} are not those of {head[1]}"
    lines = set(sources[head[1]].splitlines())
    new = [line for line in source.splitlines() if line.strip() and line not in lines]
    assert reason or len(new) <= 0.4 * len(source.splitlines()), f"{name}: {len(new)} lines differ from {head[1]}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_each_recipe_says_what_differs_from_its_base(recipe):
    check_head(recipe.name, {path.name: path.read_text() for path in RECIPES})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_each_recipe_says_when_to_choose_it_by_a_measurement(recipe):
    head = ast.get_docstring(ast.parse(recipe.read_text()))
    (when,) = [part for part in head.split("\n\n") if part.startswith("When: ")]
    results = re.findall(r"benchmarks/results/\w[\w.-]*\.json", head)
    assert results
    assert all((ROOT / path).exists() for path in results)
    assert re.search(r"\d", when)


SIGNATURES = {
    "build_loaders": "accelerator run_config images config",
    "build_model": "images config num_classes seed",
    "build_optimizer": "model config steps_per_epoch",
    "parallelize": "accelerator model",
    "train_one_epoch": "accelerator model loader optimizer scheduler config run",
    "evaluate": "accelerator model loader run",
    "check": "run_config images config launch",
    "main": "run_config images config",
}


OF_TEXT = {"text": "images", "vocabulary": "num_classes"}


def check_signatures(tree: ast.Module) -> None:
    """One signature a function across the recipes, but for the modality's words; a lesson may append arguments of its
    own."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    given = {node.name: [OF_TEXT.get(each.arg, each.arg) for each in node.args.args] for node in functions}
    for name, arguments in SIGNATURES.items():
        assert given[name][: len(arguments.split())] == arguments.split(), name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_each_recipe_carries_its_dependencies_and_shows_its_lesson(recipe):
    source = recipe.read_text()
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", source)[1]
    dependencies = tomllib.loads(re.sub(r"(?m)^# ?", "", block))["dependencies"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    bounds = {Requirement(line).name: bound(line) for line in known}
    assert all(bound(line) >= bounds[Requirement(line).name] for line in dependencies), dependencies
    if recipe.name in TRAININGS:
        check_signatures(ast.parse(source))
    main = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "main")
    assert main.end_lineno - main.lineno < 80
    assert [ast.unparse(node) for node in main.body[-2:]] == [
        "accelerator.wait_for_everyone()",
        "accelerator.end_training()",
    ]
    fields = next(node for node in ast.parse(source).body if getattr(node, "name", "") == "Config").body
    assert sum(isinstance(node, ast.AnnAssign) for node in fields) <= 20
    imported = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    assert not imported & {path.stem for path in RECIPES}


def bound(requirement: str) -> Version:
    """The least version that a requirement takes."""
    return max((Version(part.version) for part in Requirement(requirement).specifier), default=Version("0"))


# Copying


def test_a_copied_recipe_runs_from_an_empty_folder_with_its_own_shared(server, tmp_path):
    """resnet.py needs core and images/: no other modality, and no model of shared/. llm.py needs no images."""
    shutil.copy(ROOT / "recipes/resnet.py", tmp_path)
    shutil.copytree(ROOT / "accelerate_configs", tmp_path / "accelerate_configs")
    shutil.copytree(ROOT / "shared", tmp_path / "shared", ignore=shutil.ignore_patterns("models", "text"))
    flags = ["--max_steps", "2", "--global_batch_size", "8", "--output_dir", "run", "--report_to", "none"]
    copied = python("resnet.py", *flags, cwd=tmp_path)
    assert copied.returncode == 0, copied.stderr
    config = yaml.safe_load((tmp_path / "run/config.json").read_text())
    assert config["shared"] == str(tmp_path / "shared/__init__.py")
    shutil.rmtree(tmp_path / "shared/images")
    shutil.copy(ROOT / "recipes/llm.py", tmp_path)
    for name in ("models", "text"):
        shutil.copytree(ROOT / "shared" / name, tmp_path / "shared" / name)
    text = python("llm.py", *flags[:4], "--output_dir", "text", cwd=tmp_path, server=server)
    assert text.returncode == 0, text.stderr
    shutil.rmtree(tmp_path / "shared")
    orphan = python("resnet.py", *flags, cwd=tmp_path, server=server)
    assert orphan.returncode != 0
    assert "No module named 'shared'" in orphan.stderr


# Topologies


@pytest.mark.parametrize("path", TOPOLOGIES, ids=lambda path: path.name)
def test_each_topology_loads_with_no_key_of_another_home(path, monkeypatch):
    """Where there is no Slurm, a YAML says how many processes there are."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    misplaced = importlib.import_module("preflight_checks.topology").MISPLACED
    text = path.read_text()
    keys = set()
    for name, value in yaml.safe_load(text).items():
        keys |= {name, *value} if isinstance(value, dict) else {name}
    ClusterConfig.from_yaml_file(str(path))  # refuses keys that Accelerate does not know
    local = path.stem.startswith("local_")
    assert not keys & {key for key, reason in misplaced.items() if not (local and "Slurm" in reason)}
    assert text.startswith("# When to use it:")
    assert len(text.splitlines()) < 25


def resolved(path: Path) -> dict:
    """Return accelerate's settings of a topology, without what a machine decides: precision, processes, replicas."""
    settings = load_config_from_file(str(path)).to_dict()
    for name in ("mixed_precision", "num_machines", "num_processes", "machine_rank", "main_process_port"):
        settings.pop(name, None)
    settings.get("parallelism_config", {}).pop("parallelism_config_dp_replicate_size", None)
    return settings


@pytest.mark.parametrize("path", [path for path in TOPOLOGIES if "local" not in path.stem], ids=lambda path: path.stem)
def test_each_machines_topology_does_what_the_local_one_does(path):
    """Whose strategies run on CPU processes in tests/test_strategies.py. In the 16 bits that the machine has, on the
    processes of its nodes, as the table says."""
    machine, strategy = path.stem.split("_", 1)
    facts = MACHINES[machine]
    assert resolved(path) == resolved(path.with_name(f"local_{strategy}.yaml"))
    precision = "bf16" if "bf16" in facts["precisions"] else "fp16"
    assert yaml.safe_load(path.read_text())["mixed_precision"] == precision
    assert f"\n# Nodes of {facts['gpus']} {facts['gpu'].upper()}, {precision}; slurm/launch.sh" in path.read_text()


def test_local_cpu_hides_the_gpus_from_two_processes(server, tmp_path):
    script = tmp_path / "where.py"
    script.write_text(
        "import torch, sys; sys.path.insert(0, sys.argv[1])\n"
        "from shared.accelerator import build_accelerator\n"
        "from types import SimpleNamespace\n"
        "a = build_accelerator(0, SimpleNamespace(gradient_accumulation_steps=1))\n"
        "sys.stdout.write(f'{a.device.type} {a.num_processes} {torch.cuda.device_count()}\\n')\n"
        "a.wait_for_everyone(); a.end_training()\n"
    )
    process = python(*launch_command(2, "local_cpu.yaml"), script, ROOT, server=server)
    assert process.stdout.splitlines() == ["cpu 2 0"] * 2, process.stderr


# Commands, for tests/test_documents.py too

# (recipe, topology) of what tests/test_strategies.py and tests/test_by_hand.py launch.
LAUNCHED = {*TABLE, *(case[:2] for case in CASES.values()), ("vit_tp_by_hand", "tp"), ("allreduce_pi", "ddp")}


def resolve(words: list[str], monkeypatch) -> tuple[str, str]:
    """Return (recipe, topology) of the words after `accelerate launch`, all of which launcher and recipe must know."""
    arguments = launch_command_parser().parse_args(words)
    topology = Path(arguments.config_file)
    assert ROOT / topology in TOPOLOGIES
    recipe = Path(arguments.training_script).stem
    monkeypatch.syspath_prepend(ROOT / "recipes")
    parse(*importlib.import_module(recipe).CONFIGS, arguments=arguments.training_script_args)
    return recipe, topology.stem.removeprefix("local_")


def test_the_lock_pins_every_dependency_without_an_address():
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert all(re.match(r"[A-Za-z0-9_.\[\]-]+==\S+( ; .+)?$", line) for line in lock.splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in (*project["dependencies"], *(d for e in project["optional-dependencies"].values() for d in e)):
        name = re.match(r"[\w-]+", requirement)[0]
        assert name == project["name"] or re.search(rf"(?m)^{name}==", lock), requirement


# The smoke tool


def test_smoke_knows_every_recipe_and_its_launch(server, monkeypatch):
    refused = python("tools/smoke.py", "no_such", server=server)
    assert refused.returncode == 1
    assert refused.stderr.endswith(f"There are: {', '.join(path.stem for path in RECIPES)}.\n")
    for folder in ("tools", "recipes"):
        monkeypatch.syspath_prepend(ROOT / folder)
    for recipe in RECIPES:
        words = importlib.import_module("smoke").command(importlib.import_module(recipe.stem), "folder")
        assert words[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
        assert resolve(words[3:], monkeypatch) in LAUNCHED


def test_smoke_runs_what_is_there_and_reports_a_failure(server, tmp_path):
    """Two networks, and three that train nothing, of which two fail."""
    for name in ("tools", "shared", "accelerate_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/shared").symlink_to("../shared")
    for name in ("resnet", "vit"):
        shutil.copy(ROOT / f"recipes/{name}.py", tmp_path / "recipes")
    (tmp_path / "recipes/absent.py").write_text("import no_such_library\n")
    (tmp_path / "recipes/broken.py").write_text("if __name__ == '__main__':\n    raise SystemExit(3)\n")
    process = python(tmp_path / "tools/smoke.py", server=server)
    assert process.returncode == 1
    assert "--- exit status " in process.stderr
    assert "ModuleNotFoundError: No module named 'no_such_library'\n" in process.stderr
    rows = [row.split() for row in process.stdout.splitlines()[1:]]
    expected = [["absent", "fail"], ["broken", "fail"], ["resnet", "pass"], ["vit", "pass"]]
    assert [row[:2] for row in rows] == expected, process.stderr
    assert all(float(seconds) > 1 and float(mebibytes) > 100 for _, _, seconds, mebibytes, _ in rows[2:])
    (tmp_path / "recipes/broken.py").write_text("print('sound')\n")
    assert python(tmp_path / "tools/smoke.py", "broken", server=server).returncode == 0


# The benchmarks


@pytest.mark.slow
def test_the_loaders_sweep_counts_whole_rounds():
    """One batch of each worker: to stop between them would count too few of two."""
    code = (
        "import types, loaders; batches = iter([types.SimpleNamespace(labels=[0] * 64)] * 9);"
        "print(*(loaders.load_round({'num_workers': workers}, batches) // 64 for workers in (0, 1, 2)));"
        "print(len([*batches]))"
    )
    process = python("-c", code, cwd=ROOT / "benchmarks")
    assert process.stdout.split() == ["1", "1", "2", "5"], process.stderr


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("accuracy", "--seeds 1 --max_steps 3 --num_workers 0"),
        ("overhead", "--epochs 1 --global_batch_size 400 --num_workers 0"),
        ("throughput", "--models Ti/16 --image_sizes 224 --rungs amp --batch_sizes 1,2 --steps 2 --warmup_steps 1"),
        ("memory", "--models S --ranks 2,64 --strategies fsdp"),
        ("communication", "--models demo --ranks 2 --strategies fsdp"),
        ("largest", "--sizes demo,Ti --cases whole --batch_size 4 --image_size 32"),
        ("loaders", "--images 80 --image_size 64 --rounds 1 --seconds 0.1 --num_workers 1"),
        ("augmentation", "--images 32 --batch_size 8 --image_size 64 --rounds 1 --seconds 0.1"),
        ("index", "--samples 300 --shards 3 --repeats 1"),
        ("checkpoint", "--model resnet18 --rounds 1 --checks 1 --starts 0"),
        ("allreduce", "--largest 1 --rounds 2"),
        ("throughput", "--rungs fp32,channels_last --image_sizes 64 --batch_sizes 2 --steps 2 --warmup_steps 1"),
    ],
)
def test_each_benchmark_writes_a_dated_file_with_hardware_and_versions(server, tmp_path, script, flags):
    """In a copy of the project, whose results folder is its own."""
    for name in ("benchmarks", "recipes", "accelerate_configs", "shared", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True)
    shutil.rmtree(tmp_path / "benchmarks/results")
    program = (ROOT / f"benchmarks/{script}.py").read_bytes()
    launcher = launch_command(num_processes=2) if script == "allreduce" else []
    forked = None if script == "checkpoint" else server
    process = python(*launcher, tmp_path / f"benchmarks/{script}.py", *flags.split(), cwd=tmp_path, server=forked)
    assert process.returncode == 0, process.stderr
    (path,) = (tmp_path / "benchmarks/results").glob(f"{script}_*_20??-??-??.json")
    result = json.loads(path.read_text())
    assert process.stdout.splitlines()[-1] == f"benchmarks/results/{path.name}"
    assert result["command"] == f"python benchmarks/{script}.py {flags}"
    assert result["hardware"]["versions"]["torch"]
    files = [path.read_bytes() for folder in ("benchmarks", "recipes") for path in (ROOT / folder).glob("*.py")]
    launched = hash_of(b"".join(sorted(files)))
    assert (result["source"]["program"], result["source"]["recipes"]) == (hash_of(program), launched)
    assert str(tmp_path) not in path.read_text()
    assert len(result["rows"]) >= 2
    if script == "loaders":
        check_loaders(result)
    # Where a formula stands beside what was counted, they agree within 5 %.
    ratios = [row["ratio"] for row in result["rows"] if row.get("ratio") is not None]
    assert all(abs(ratio - 1) < 0.05 for ratio in ratios)
    assert bool(ratios) == (script in ("memory", "communication"))


def check_loaders(result: dict) -> None:
    """Plain figures with their spread; a cold one of our formats; advice that a recipe has a flag for."""
    rows = {row["loader"]: row for row in result["rows"]}
    assert {"decode_only", "shared_folder", "shared_tar", "shared_parquet", "torchvision_reference"} <= set(rows)
    for name, row in rows.items():
        for figure in ("images_per_second", "images_per_core_second"):
            spread = row[f"{figure}_spread"]
            assert spread["min"] <= row[figure] <= spread["max"], row
            assert spread["n"] == 1
        assert ("cold_images_per_second" in row) == name.startswith("shared_")
    assert all(row["images_per_second_spread"]["n"] == 1 for row in result["sweep"])
    assert re.match(r"Give --num_workers \d+: ", result["advice"])
    memory = result["worker_megabytes"]
    assert [memory["first"], memory["last"]] == [memory["epochs"][0], memory["epochs"][19]]


def test_a_loader_that_fails_has_its_reason_in_its_row(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    loaders = importlib.import_module("loaders")

    def broken(args):
        raise RuntimeError("no such reader\nand more")

    monkeypatch.setitem(loaders.LOADERS, "timm", (broken, "timm"))
    monkeypatch.setitem(loaders.LOADERS, "ffcv", (lambda args: os._exit(3), "ffcv"))
    monkeypatch.setitem(loaders.LOADERS, "decode_only", (lambda args: lambda: map(len, [[3**99999] * 5]), "torch"))
    args = SimpleNamespace(rounds=2, seconds=0.3)
    works, fails, ends = loaders.bake_off(["decode_only", "timm", "ffcv"], args)
    assert works["images_per_second"] > 0
    assert works["images_per_second_spread"]["n"] == 2
    assert fails == {"loader": "timm", "images_per_second": None, "images_per_core_second": None} | {
        "left_out": "RuntimeError: no such reader"
    }
    assert ends["left_out"] == "its process was ended"
    loaders.table([works, fails])

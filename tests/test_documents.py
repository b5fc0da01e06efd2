# SPDX-License-Identifier: Apache-2.0
"""README and docs/ are right (links, commands, figures, lists of fields) and short to read."""

import ast
import importlib
import itertools
import json
import os
import pdb
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import BANNED, ROOT, Result, blocks, environment
from forked import Launch, Server
from test_recipes import LAUNCHED, RECIPES, resolve
from tokenizers import Tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)  # fmt: skip

from shared.config import RunConfig
from shared.images import ImageConfig, open_data
from shared.text import open_corpus
from shared.text.tokenizer import END, train_tokenizer

README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)

# Form: short lines, short cells, plain words

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"`[^`]*`")


def plain(path: Path) -> str:
    """Return a document without its code blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.S | re.M)


def visible(text: str) -> str:
    """Return what a reader sees of Markdown: of a link its text."""
    return LINK.sub(r"\1", text).replace("`", "").replace("**", "").strip()


def tables(text: str) -> list[list[list[str]]]:
    """Return each table as rows of bare cells, the header first."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.M)
    lines = [[line for line in table.splitlines() if not re.fullmatch(r"[|-]+", line)] for table in found]
    return [[[cell.strip() for cell in line[1:-1].split("|")] for line in table] for table in lines]


def rows(path: Path) -> list[list[str]]:
    return [row for table in tables(plain(path)) for row in table]


def paragraphs(path: Path) -> list[str]:
    """Return paragraphs and items of lists, each in one line."""
    text = re.sub(r"^(?:#|\|).*$", "", plain(path), flags=re.M)
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.) )", text)
    return [" ".join(part.split()) for part in parts if part.strip()]


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@each_document
def test_cells_and_paragraphs_are_short(path):
    assert [cell for row in rows(path) for cell in map(visible, row) if len(cell) > 120] == []
    assert [text for text in map(visible, paragraphs(path)) if len(text) > 5 * 120] == []
    assert [line for line in path.read_text().splitlines() if len(line) > 130 and not line.startswith("|")] == []


@each_document
def test_no_banned_word(path):
    words = CODE.sub("", plain(path))
    assert [words[max(0, word.start() - 40) : word.end() + 20] for word in BANNED.finditer(words)] == []


def anchors(path: Path) -> set[str]:
    """Return GitHub's name of each heading."""
    headings = re.findall(r"^#+ (.*)$", plain(path), re.M)
    return {re.sub(r"[^\w\- ]", "", visible(heading).lower()).replace(" ", "-") for heading in headings}


@each_document
def test_each_relative_link_resolves(path):
    for _, target in LINK.findall(plain(path)):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            there = (path.parent / name).resolve() if name else path
            assert there.exists(), target
            assert there.is_relative_to(ROOT), target
            assert not anchor or anchor in anchors(there), target


def test_the_first_link_about_images_is_the_page_on_them():
    section = README.read_text().partition("## Train on your own images")[2]
    assert LINK.search(section)[2] == "docs/your_data.md"


# Figures: each one in a row or a sentence that links a results file is a number of that file

SCALES = {"%": [0.01], "MiB": [2**20], "GiB": [2**30], "MB": [1, 1e6], "GB": [1e9], "GB/s": [1], "ms": [1, 1e-3]}
SCALES |= {"s": [1], "images/s": [1], "times": [1]}
UNIT = "|".join(sorted(map(re.escape, SCALES), key=len, reverse=True))
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
FIGURE = re.compile(rf"(?<![\w./-])({NUMBER})(?! x \d)(?: ({UNIT}))?(?![\w/])(?:(?= to ({NUMBER}) ({UNIT})?))?")
RESULTS = re.compile(r"benchmarks/results/[\w.-]+\.json")


def numbers(value) -> Iterator[float]:
    """Return every number of a results file, those within its strings too."""
    if isinstance(value, dict | list):
        yield from itertools.chain.from_iterable(map(numbers, value.values() if isinstance(value, dict) else value))
    elif isinstance(value, str):
        yield from (float(number.replace(",", "")) for number in re.findall(NUMBER, value))
    elif isinstance(value, int | float):
        yield float(value)


def measured(path: Path) -> set[float]:
    content = json.loads(path.read_text())
    return {
        *numbers(
            {name: value for name, value in content.items() if name not in ("date", "command", "source", "hardware")}
        )
    }


def claims(text: str) -> list[tuple[str, list[float]]]:
    """Return the figures of a cell or a sentence, with the scales of the units that each may have: its own one, else
    any that stands there.

    A figure has a unit, a decimal point, a thousands separator or an exponent, or is an end of a range in brackets.
    """
    text = visible(CODE.sub("", text))
    units = set(re.findall(rf"\d ({UNIT})(?![\w/])", text))
    ranges = {end for ends in re.findall(rf"\(({NUMBER}) to ({NUMBER})\)", text) for end in ends}
    found = []
    for number, unit, _, unit_of_range in FIGURE.findall(text):
        own = unit or unit_of_range
        if own or number in ranges or re.search(r"[.,e]", number.rstrip(",")):
            scales = [scale for each in ([own] if own else units) for scale in SCALES[each]] or [1]
            found.append((number.rstrip(","), scales))
    return found


def is_measured(number: str, scales: list[float], values: set[float]) -> bool:
    """Return whether a value, in one of the units, is the number after rounding to its digits."""
    shown, decimals = float(number.replace(",", "")), len(number.partition(".")[2])
    if "e" in number:
        return shown in values
    return any(abs(value / scale - shown) <= 0.5 * 10**-decimals * (1 + 1e-9) for value in values for scale in scales)


def linked(path: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Return each row and each sentence that links results files: the text, its cells or itself, the files."""
    for row in rows(path):
        yield " | ".join(row), row, RESULTS.findall(" ".join(row))
    for paragraph in paragraphs(path):
        for sentence in re.split(r"(?<=[.:;]) (?=[A-Z\d`\[(])", paragraph):
            yield sentence, [sentence], RESULTS.findall(sentence)


@each_document
def test_each_figure_beside_a_results_file_is_in_it(path):
    checked = 0
    for text, cells, names in linked(path):
        values = {value for name in names for value in measured(ROOT / name)}
        for number, scales in [claim for cell in cells for claim in claims(cell) if names]:
            assert is_measured(number, scales, values), f"{number} is not in {names}: {text}"
            checked += 1
    assert checked > {"README.md": 1, "results.md": 150, "your_data.md": 2}.get(path.name, -1)


def test_each_row_of_the_results_links_its_file():
    for header, *body in tables(plain(ROOT / "docs/results.md")):
        if header[-1] == "file":
            assert [row for row in body if not RESULTS.search(row[-1])] == []


def test_each_figure_of_a_recipe_names_a_results_file_that_exists():
    named = {name for path in RECIPES for name in RESULTS.findall(path.read_text())}
    assert named
    assert all((ROOT / name).exists() for name in named), named


# Commands


def commands(path: Path) -> list[str]:
    """Return every line of a document's shell blocks, continuation lines joined; no comments, no here-documents."""
    text = re.sub(r"(<<'(\w+)')\n.*?\n\2$", r"\1", "\n".join(blocks(path)), flags=re.S | re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [re.split(r"\s#\s?", line)[0].strip() for line in lines if line.strip() and not line.startswith("#")]


# tests/slurm runs those of this page on a Slurm with the machine that it adds.
PAGES = [path for path in DOCUMENTS if path.name != "other_clusters.md"]
COMMANDS = [*dict.fromkeys(line for path in PAGES for line in commands(path))]
DEMO = "accelerate launch --config_file accelerate_configs/local_ddp.yaml recipes/resnet.py"  # the `demo` fixture's
LAUNCHES = ("accelerate launch ", "python recipes/", "python -m pdb recipes/")
TRAININGS = [line for line in COMMANDS if line.startswith(LAUNCHES) and line != DEMO]
JOBS = [line for line in COMMANDS if line.startswith(("slurm/submit.sh ", "python tools/preflight.py ", "sbatch "))]
TOOLS = [line for line in COMMANDS if line.startswith("python tools/") and line not in JOBS]
BENCHMARKS = [line for line in COMMANDS if line.startswith("python benchmarks/")]
OTHERS = [line for line in COMMANDS if line not in {DEMO, *TRAININGS, *JOBS, *TOOLS, *BENCHMARKS}]
# What stands in place of a cluster's folders, of a placeholder, and of `...`.
STAND_INS = {"$DSDIR": "dsdir", "$SCRATCH": "scratch", "$WORK": "work", " ...": ""}


def filled(line: str) -> list[str]:
    for name, value in STAND_INS.items():
        line = line.replace(name, value)
    return shlex.split(line)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, image_folder) -> Path:
    """Make a folder in which the commands run as they stand: with the project, and with images in each layout."""
    desk = tmp_path_factory.mktemp("desk")
    for name in ("recipes", "shared", "tools", "benchmarks", "accelerate_configs", "slurm"):
        (desk / name).symlink_to(ROOT / name)
    (desk / "photos").symlink_to(image_folder)
    (desk / "unsplit").symlink_to(image_folder / "train")
    files = sorted(image_folder.rglob("*.*g"))
    lines = [f"{file},{file.parent.name},{file.parent.parent.name}\n" for file in files]
    (desk / "photos.csv").write_text("path,label,split\n" + "".join(lines))
    shutil.make_archive(str(desk / "photos"), "zip", image_folder)
    (desk / "dsdir/imagenet").mkdir(parents=True)
    (desk / "dsdir/imagenet/RawImages").symlink_to(image_folder)
    (desk / "scratch").mkdir()
    (desk / "login/imagenet").mkdir(parents=True)  # $SCRATCH as the preflight finds it, which looks at no image
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).save_pretrained(desk / "vit_weights")
    write_texts(desk)
    return desk


def write_texts(desk: Path) -> None:
    """Write the text, and the language models that commands name; the preflight reads only the config of one."""
    llama = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    llama |= {"vocab_size": 300, "max_position_embeddings": 1024}
    LlamaForCausalLM(LlamaConfig(**llama)).save_pretrained(desk / "llm_weights")
    made = Tokenizer.from_str(train_tokenizer(["some words"], 300).text)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END).save_pretrained(desk / "llm_weights")
    models = desk / "dsdir/HuggingFace_Models/meta-llama"
    models.mkdir(parents=True)
    shutil.copytree(desk / "llm_weights", models / "Llama-3.2-3B")
    for folder in ("texts", "dsdir/HuggingFace/roleplay"):
        (desk / folder).mkdir(parents=True)
        for number in range(60):
            (desk / folder / f"{number}.txt").write_text(f"Document {number}. " * 40)
    (desk / "pairs").mkdir()
    rows = [{"prompt": f"{number}**40 is ", "completion": str(number**40)} for number in range(400)]
    (desk / "pairs/sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def submission(desk) -> Iterator[subprocess.Popen]:
    """Start the first job command, by the real program; it runs while the server imports its libraries."""
    words = filled(JOBS[0].replace("$SCRATCH", "login"))
    words.insert(words.index("--"), "--dry_run")
    variables = environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=desk, env=variables, **pipes) as process:
        yield process


@pytest.fixture(scope="module")
def packed(desk, server, submission) -> Path:
    """Run the commands of tools/pack.py, whose results other commands read."""
    packs = [line for line in TOOLS if line.startswith("python tools/pack.py")]
    assert len(packs) >= 3
    for line in packs:
        process = server.python(filled(line)[1:], cwd=desk)
        assert process.returncode == 0, f"{line}: {process.stderr}"
    return desk


SMOKE_FORM = "--max_steps 1 --global_batch_size 32 --num_workers 1 --report_to none"
SMALL = {"resnet": " --model resnet18 --compile False", "vit": " --model demo --patch_size 8"}
SMALL["llm"] = " --model demo --vocabulary_size 300"


def words_of_launch(line: str) -> list[str]:
    """Return what follows `accelerate launch`."""
    program, *words = filled(line.replace("-m pdb ", ""))
    return words[1:] if program == "accelerate" else ["--config_file", "accelerate_configs/local_ddp.yaml", *words]


@pytest.mark.parametrize("line", TRAININGS)
def test_each_recipe_command_resolves(line, packed, monkeypatch):
    """The launcher and the recipe know its words; its data is there. Without flags of the recipe it is a launch that
    another test makes."""
    words, recipe = words_of_launch(line), recipe_of(line)
    assert resolve(words, monkeypatch) in LAUNCHED | {("resnet", "cpu"), ("vit", "cpu")}
    if "--data" in words and recipe != "resnet_webdataset":  # which reads shards by a rule of its own
        monkeypatch.chdir(packed)
        fraction = float(words[words.index("--val_fraction") + 1]) if "--val_fraction" in words else 0.0
        data = words[words.index("--data") + 1]
        train, held_out = open_corpus(data, 0.1) if recipe.startswith("llm") else open_data(data, fraction, 0)
        assert (
            len(train[0] if recipe.startswith("llm") else train)
            > len(held_out[0] if recipe.startswith("llm") else held_out)
            > 0
        )


def recipe_of(line: str) -> str:
    return re.search(r"recipes/(\w+)\.py", line)[1]


# Without --profile, which is slow: tests/test_training.py runs it. Where only the data is another one, the test above
# opens it.
DATA_ALONE = r"recipes/resnet\.py --data \S+(?: --val_fraction \S+)?(?: --image_size 64)?$"
FLAGGED = [line for line in TRAININGS if re.search(r"\.py (?!--profile)|local_cpu", line)]
FLAGGED = [line for line in FLAGGED if not re.search(DATA_ALONE, line)]


def start(line: str, server: Server, desk: Path) -> tuple[Launch, Path]:
    """Start a command with flags that make it small, on at most two processes; return its launch and its folder."""
    folder, recipe = desk / f"runs/command-{FLAGGED.index(line)}", recipe_of(line)
    words = words_of_launch(re.sub(r"--num_processes \d+", "--num_processes 2", line))
    words += [*(SMOKE_FORM + SMALL[recipe.split("_")[0]]).split(), "--output_dir", str(folder)]
    if not recipe.startswith("llm"):
        words += [] if "--data" in words else ["--data", "photos"]
        words += ["--image_size", "32" if "bf16" in words else "16"]  # on CPUs a ResNet in bf16 needs 32
    if line.startswith("accelerate"):
        return server.start(words, cwd=desk), folder
    # Each `-c` is a line that a person would type.
    debugger = [pdb.__file__, "-c", "continue", "-c", "quit"] if "-m pdb" in line else []
    return server.start_python([*debugger, *words[2:]], cwd=desk), folder


@pytest.fixture(scope="module")
def trained(packed, server) -> dict[str, Result]:
    """Run each command with flags of a recipe, two at a time."""
    results = {}
    for pair in pairs(FLAGGED):
        launches = {line: start(line, server, packed) for line in pair}
        results |= {line: Result(launch.wait(), folder) for line, (launch, folder) in launches.items()}
    return results


def pairs(items: list) -> list[list]:
    return [items[number : number + 2] for number in range(0, len(items), 2)]


@pytest.mark.parametrize("line", FLAGGED)
def test_each_recipe_command_with_flags_runs(trained, line):
    assert trained[line].process.returncode == 0, trained[line].text
    assert trained[line].summary["steps"] == 1


def test_each_job_command_passes_the_preflight(server, packed, submission):
    """submit.sh asks it with the same words."""
    assert len(JOBS) >= 9
    assert JOBS[0].startswith("slurm/submit.sh ")
    (sweep,) = [line for line in OTHERS if line.endswith("> sweep.txt")]
    subprocess.run(["bash", "-c", sweep], cwd=packed, check=True)
    for line in JOBS[1:]:
        words = words_of_preflight(filled(line.replace("$SCRATCH", "login")))
        process = server.python(["tools/preflight.py", *words], cwd=packed)
        assert process.returncode == 0, process.stderr
        assert re.search(r"^world size +\d+", process.stdout, re.M)
    output, errors = submission.communicate(timeout=300)
    assert submission.returncode == 0, errors
    assert re.search(r"^world size +\d+", output, re.M)


def words_of_preflight(words: list[str]) -> list[str]:
    """Return what the preflight is asked for a command of its own, of submit.sh or of sbatch."""
    if words[0] != "sbatch":
        return words[1 + (words[0] == "python") :]
    script = next(number for number, word in enumerate(words) if word.startswith("slurm/"))
    strategy, *recipe = words[script + 1 :]
    return [Path(words[script]).stem, strategy, *words[1:script], "--", *recipe]


def test_each_command_on_a_run_works(trained, packed, server):
    """tools/checkpoints.py and tools/export.py, on the run of a document's command."""
    (packed / "runs/NAME").symlink_to(next(result for line, result in trained.items() if "--ema_decay" in line).folder)
    others = [line for line in TOOLS if "runs/NAME" in line]
    assert len(others) >= 2
    for line in others:
        process = server.python(filled(line)[1:], cwd=packed)
        assert process.returncode == 0, f"{line}: {process.stdout}{process.stderr}"


def test_each_benchmark_command_names_flags_that_are_there(server):
    for line in BENCHMARKS:
        _, script, *words = shlex.split(line)
        text = server.python([script, "--help"]).stdout
        assert all(f"{word} " in text for word in words if word.startswith("--")), line


KNOWN_PROGRAMS = "cat cd cp diff export git make mkdir module pgrep pip printf py-spy python source"


def test_each_other_command_is_one_that_exists():
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    assert {"make demo", "make test", "make smoke"} <= {*OTHERS}
    assert DEMO in COMMANDS
    assert f"DEMO := {DEMO}\n" in (ROOT / "Makefile").read_text()
    for line in OTHERS:
        program, *words = shlex.split(line)
        assert program in KNOWN_PROGRAMS.split(), line
        if program == "make":
            assert words[0] in targets, line
        if program in ("cp", "diff"):
            assert all((ROOT / word).exists() for word in words if "/" in word and "my_project" not in word), line
        if program == "python":
            assert words[0] == "-c", line
            compile(words[1], line, "exec")


# Of other programs: sbatch, srun and squeue, pip, docker, tensorboard.
FOREIGN = (
    "array cpus-per-task exclusive export gpu-bind gpus-per-task gres jobid constraint mem no-deps no-requeue nodes"
)
FOREIGN += " ntasks-per-node overlap partition pid qos shm-size time tim user logdir help me"


def recipe_module(name: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "recipes")
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Return the flags of every recipe, of the launcher, and of what is in tools/, benchmarks/ and slurm/."""
    found = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    configs = [config for path in RECIPES for config in recipe_module(path.stem).CONFIGS]
    found |= {f"--{field.name}" for config in configs for field in fields(config)}
    programs = [
        path for path in ROOT.glob("*/**/*") if path.parts[len(ROOT.parts)] in ("tools", "benchmarks", "slurm")
    ]
    texts = [path.read_text() for path in programs if path.suffix in (".py", ".sh")]
    return found | {*re.findall(r"--[a-z]\w+", " ".join(texts))} | {f"--{name}" for name in FOREIGN.split()}


FILE = re.compile(r"(?:recipes|tools|benchmarks|slurm|accelerate_configs|tests|shared)/[\w/]+\.\w+")


@each_document
def test_each_flag_and_each_program_in_the_text_is_there(path, known_flags):
    for code in CODE.findall(plain(path)):
        assert {*re.findall(r"(?<![\w-])--[a-z][\w-]*", code)} <= known_flags, code
        for name in FILE.findall(code):
            assert (ROOT / name).exists() or re.search("NAME|heron|yours", name), code
        for target in re.findall(r"`make ([a-z-]+)", code):
            assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text()), code


# Lists of fields and of modules


def listed(heading: str) -> tuple[set[str], set[str]]:
    """Return all fields that docs/metrics.md lists below a heading, and those that are always there."""
    below = (ROOT / "docs/metrics.md").read_text().partition(f"# {heading}\n")[2]
    names = {row[0].strip("`"): row[-1] for row in tables(below)[0][1:]}
    return {*names}, {name for name, when in names.items() if not when}


@pytest.fixture(scope="module")
def with_all_fields(server, image_folder, tmp_path_factory) -> Result:
    """Train four steps with a damaged image in each part; the weights explode, and steps are skipped."""
    folder = tmp_path_factory.mktemp("fields")
    shutil.copytree(image_folder, folder / "photos")
    for part in ("train", "val"):
        next((folder / "photos" / part / "digit-3").iterdir()).write_bytes(b"damaged")
    words = ["recipes/resnet.py", "--data", folder / "photos", "--output_dir", folder / "run", "--max_steps", "4"]
    words += ["--norm", "group", "--on_nonfinite", "skip", "--learning_rate", "1e30", "--warmup_epochs", "0"]
    words += ["--logging_steps", "1", "--max_undecodable", "1", "--image_size", "16", "--report_to", "none"]
    process = server.python(words)
    assert process.returncode == 0, process.stderr
    return Result(process, folder / "run")


def test_metrics_has_the_listed_fields(with_all_fields, trained):
    """Together with the runs of the documents' commands, whose images are sound."""
    lines = [line for run in (with_all_fields, *trained.values()) for line in run.lines]
    for heading, mark in (("A step's line", "loss"), ("An evaluation's line", "eval_samples")):
        found = [{*line} for line in lines if mark in line]
        assert (set.union(*found), set.intersection(*found)) == listed(f"{heading} in metrics.jsonl")


def test_summary_and_config_have_the_listed_fields(with_all_fields):
    config = with_all_fields.config
    flags = {field.name for field in fields(recipe_module("resnet").Config)}
    flags |= {field.name for field in fields(ImageConfig)} | {*RunConfig().identity()}
    assert {*with_all_fields.summary} == listed("summary.json")[0]
    assert {*config} == listed("config.json")[0] == listed("config.json")[1]
    assert {*config["identity"]} - flags == listed("identity in config.json")[1]


def test_the_map_of_shared_has_every_module():
    targets = [target for _, target in LINK.findall((ROOT / "docs/shared.md").read_text()) if ".py" in target]
    modules = {path for path in (ROOT / "shared").rglob("*.py") if path.name != "__init__.py"}
    native = ROOT / "shared/images/native/__init__.py"
    assert {(ROOT / "docs" / target).resolve() for target in targets} == modules | {native}


def test_the_map_of_shared_has_every_call_of_a_run():
    text = (ROOT / "docs/shared.md").read_text()
    documented = {*re.findall(r"^\|.*`run\.(\w+)", text, re.M), *re.findall(r"`run\.(\w+)[`(.]", text)}
    used = {name for path in RECIPES for name in re.findall(r"(?<!shared\.)\brun\.([a-z_]+)", path.read_text())}
    assert used <= documented
    facade, position = (
        ast.walk(ast.parse((ROOT / f"shared/run/{name}.py").read_text())) for name in ("run", "position")
    )
    methods, others = [*facade], [*position]
    there = {node.name for node in methods + others if isinstance(node, ast.FunctionDef)}
    stored = [node for node in methods + others if isinstance(getattr(node, "ctx", None), ast.Store)]
    there |= {node.attr for node in stored if isinstance(node, ast.Attribute)}
    assert documented <= there
    assert {node.name for node in methods if isinstance(node, ast.FunctionDef) and node.name[0] != "_"} <= documented

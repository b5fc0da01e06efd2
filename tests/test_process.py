# SPDX-License-Identifier: Apache-2.0
"""How a process begins and ends: streams that are closed, homes that are not there, variables of another launch."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

import psutil
import pytest
from conftest import ROOT, environment
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from shared.config import RunConfig, expand_home, parse
from shared.errors import UserError
from shared.images import ImageConfig
from shared.images.index import cache_folder
from shared.launch import LAUNCH, settle_variables

pytestmark = pytest.mark.slow

BEGIN = """import os, sys
sys.path.insert(0, sys.argv[1])
from shared import errors, launch, lifetime
lifetime.begin()
"""


def script(code: str, redirections: str = "", **variables: str) -> subprocess.CompletedProcess:
    """Run a program that begins as all of ours do, by a shell that redirects its streams."""
    words = ["bash", "-o", "pipefail", "-c", f'"$0" -c "$1" "$2" {redirections}']
    words += [sys.executable, BEGIN + code, str(ROOT)]
    return subprocess.run(words, env=environment(**variables), capture_output=True, text=True, timeout=300)


# Streams

WRITES = """
import subprocess, tempfile
file = tempfile.TemporaryFile()
assert file.fileno() > 2, file.fileno()
for number in range(20000):
    print("a line", number)
print("another", file=sys.stderr, flush=True)
subprocess.run(["sh", "-c", "test -e /dev/fd/0 && test -e /dev/fd/1 && test -e /dev/fd/2"], check=True)
"""


@pytest.mark.parametrize(
    "redirections",
    [
        "<&- ",
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
        "</dev/null | head -1",
        "</dev/null 2>&1 | head -1",
        "</dev/null >/dev/full",
    ],
)
def test_no_output_fails_whatever_the_streams_are(redirections):
    process = script(WRITES, redirections)
    assert process.returncode == 0, process.stderr
    assert "Error" not in process.stderr, process.stderr


def test_a_name_that_is_no_text_is_printed():
    process = script("print(os.fsdecode(b'caf\\xe9'), '\\u2192')", PYTHONIOENCODING="ascii")
    assert (process.returncode, process.stdout) == (0, "caf\\udce9 \\u2192\n"), process.stderr


def test_a_line_is_one_write_also_without_buffers():
    """Else the lines of several processes that write to one file mix."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    code = "import sys; sys.path.insert(0, sys.argv[1]); from shared.errors import say; say('a line')"
    subprocess.run([sys.executable, "-u", "-c", code, str(ROOT)], stdout=theirs, check=True, timeout=300)
    assert ours.recv(100) == b"a line\n"


# Ends


def test_a_refusal_is_told_to_the_launcher(tmp_path):
    file = tmp_path / "error.json"
    process = script("raise errors.UserError('no. Do')", TORCHELASTIC_ERROR_FILE=str(file), RANK="0")
    assert (process.returncode, process.stderr) == (1, "error: no. Do\n")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(file))
    assert failure.message["extraInfo"]["py_callstack"] == failure.message["message"] == "error: no. Do"
    assert abs(failure.timestamp - time.time()) < 60
    process = script("{}['name']", TORCHELASTIC_ERROR_FILE=str(file))
    assert process.returncode == 1
    assert "Traceback" in process.stderr
    assert json.loads(file.read_text())["message"]["message"] == "KeyError: 'name'"


def test_another_rank_speaks_where_rank_0_does_not():
    process = script("lifetime.time.sleep = lambda _: None\nraise errors.UserError('no disk here')", RANK="1")
    assert (process.returncode, process.stderr) == (1, "error: no disk here\n")


def test_what_one_rank_alone_has_seen_it_says_at_once_and_once():
    """A launcher may end it a moment later."""
    code = "lifetime.time.sleep = None\nerror = errors.UserError('rank 1: no worker')\nerror.alone = True\nraise error"
    process = script(code, RANK="1")
    assert (process.returncode, process.stderr) == (1, "error: rank 1: no worker\n")


def test_ctrl_c_before_a_run_is_one_word():
    process = script("os.kill(os.getpid(), 2)")
    assert (process.returncode, process.stderr) == (-signal.SIGINT, "\ninterrupted\n")


def test_children_end_with_a_tool_that_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "tools/smoke.py", "allreduce_pi"], cwd=ROOT, env=environment())
    tool, until = psutil.Process(process.pid), time.monotonic() + 120
    while not (children := tool.children(recursive=True)) and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert children
    assert not alive


# Words


def test_a_tilde_is_the_home_folder_in_every_form(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["--data=~/images", "--output_dir", "~/x", "~", "a~", "--lr=1", "--resume_from_checkpoint=~"]
    expanded = ["--data=/home/me/images", "--output_dir", "/home/me/x", "/home/me", "a~", "--lr=1"]
    assert expand_home(words) == [*expanded, "--resume_from_checkpoint=/home/me"]
    run_config, images = parse(RunConfig, ImageConfig, arguments=["--data=~/images", "--output_dir=~"])
    assert (images.data, run_config.output_dir) == ("/home/me/images", "/home/me")
    with pytest.raises(UserError, match=r"~no_such_user/x: this home folder is not known\. Set HOME"):
        expand_home(["--data=~no_such_user/x"])


def test_a_path_that_is_no_text_is_refused():
    with pytest.raises(UserError, match=r"^--data=caf\\udce9 is not UTF-8\. Rename it"):
        expand_home(["--data=caf\udce9"])


def test_a_user_without_a_home_has_a_cache_of_his_own(monkeypatch, tmp_path):
    for name in ("SCRATCH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "~")  # as expanduser answers where there is none
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_folder().parent
    assert (folder.parent, folder.stat().st_mode & 0o777) == (tmp_path, 0o700)
    if os.getuid() == 0:
        os.chown(folder, 1, 1)
        with pytest.raises(UserError, match=r"belongs to another user\. Set HOME or SCRATCH"):
            cache_folder()


DRAWS = """
import types, torch
from accelerate.utils import set_seed
from shared.accelerator import build_accelerator
config = types.SimpleNamespace(gradient_accumulation_steps=1)
for seed in (1, 2**32 + 1, 2**63 - 1):
    build_accelerator(seed, config)
    print(torch.rand(1).item())
set_seed(1)
print(torch.rand(1).item())
"""


def test_a_seed_has_63_bits():
    with pytest.raises(UserError, match="--seed -1 is out of range"):
        parse(RunConfig, arguments=["--seed", "-1"])
    process = script(DRAWS)
    assert process.returncode == 0, process.stderr
    small, beyond, most, accelerates = process.stdout.split()
    assert small == accelerates
    assert len({small, beyond, most}) == 3


# Variables that a launch left


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ("RANK=0 WORLD_SIZE=2", "RANK=0 WORLD_SIZE=2, but no LOCAL_RANK, MASTER_PORT, MASTER_ADDR"),
        ("LOCAL_RANK=1 WORLD_SIZE=2", "unset LOCAL_RANK WORLD_SIZE"),
        ("RANK=1", "RANK=1: no launch has such a process"),
        ("RANK=2 WORLD_SIZE=2 LOCAL_RANK=0", "unset RANK LOCAL_RANK WORLD_SIZE"),
        (
            "RANK=0 WORLD_SIZE=2 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=x MASTER_PORT=1",
            "no launch has such a process",
        ),
        ("WORLD_SIZE=two", "WORLD_SIZE=two is not a number. It may be left over from another launch: unset"),
        ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE=-1", "unset PARALLELISM_CONFIG_DP_REPLICATE_SIZE"),
        ("OMPI_COMM_WORLD_SIZE=4", "OMPI_COMM_WORLD_SIZE=4, but MPI starts no recipe"),
        ("ACCELERATE_MIXED_PRECISION=yes", "yes is not one of no, fp16, bf16, fp8"),
        ("ACCELERATE_DYNAMO_BACKEND=INDUCTOR", "give --compile"),
        ("ACCELERATE_USE_CPU=maybe", "ACCELERATE_USE_CPU=maybe is neither true nor false"),
    ],
)
def test_what_another_launch_left_is_refused_by_name(monkeypatch, variables, words):
    leave(monkeypatch, variables)
    with pytest.raises(UserError) as caught:
        settle_variables()
    assert words in str(caught.value)
    assert str(caught.value).endswith(tuple(f" {name}" for name in (*LAUNCH, *os.environ)))


@pytest.mark.parametrize(
    ("variables", "settled"),
    [
        ("RANK=0 WORLD_SIZE=1", ""),
        ("LOCAL_RANK=0", ""),
        ("WORLD_SIZE= RANK= OMP_NUM_THREADS= ACCELERATE_MIXED_PRECISION= ACCELERATE_USE_CPU=", ""),
        (
            "ACCELERATE_MIXED_PRECISION=BF16 ACCELERATE_USE_FSDP=1",
            "ACCELERATE_MIXED_PRECISION=bf16 ACCELERATE_USE_FSDP=true",
        ),
        ("ACCELERATE_DYNAMO_BACKEND=NO", "ACCELERATE_DYNAMO_BACKEND=NO"),
        (whole := "RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_PORT=1 MASTER_ADDR=x", whole),
    ],
)
def test_what_says_nothing_is_no_launch(monkeypatch, variables, settled):
    leave(monkeypatch, variables)
    settle_variables()
    left = {name: value for name, value in os.environ.items() if name.startswith(("ACCELERATE_", "OMP_", *LAUNCH))}
    assert left == dict(word.split("=") for word in settled.split())


def leave(monkeypatch, variables: str) -> None:
    """These, and none that this process has."""
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "OMP_", *LAUNCH))]:
        monkeypatch.delenv(name)
    for name, _, value in (word.partition("=") for word in variables.split()):
        monkeypatch.setenv(name, value)


ALONE = """
lifetime.PATIENCE = 1
import torch
with lifetime.meeting():
    torch.distributed.init_process_group("gloo")
"""


def test_a_process_whose_peers_never_come_ends():
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    process = script(ALONE, **variables)
    assert process.returncode == 1
    assert process.stderr.startswith("error: RANK=0 LOCAL_RANK=0 WORLD_SIZE=2"), process.stderr
    assert "not all of these processes connected within 1 s" in process.stderr
    assert process.stderr.endswith("unset RANK LOCAL_RANK WORLD_SIZE MASTER_PORT MASTER_ADDR\n")


# All of it, as a user meets it


def test_a_recipe_in_a_poor_environment(tmp_path):
    """No stream but one whose reader leaves, a tilde, and what a launch left."""
    command = '"$0" recipes/resnet.py --max_steps 1 --num_workers 0 --report_to tensorboard --output_dir=~/run'
    variables = {"HOME": str(tmp_path), "RANK": "0", "WORLD_SIZE": "", "ACCELERATE_MIXED_PRECISION": "NO"}
    variables = {name: value for name, value in environment(**variables).items() if not name.startswith("OMP_")}
    words = ["bash", "-o", "pipefail", "-c", command + " <&- 2>&- | head -1", sys.executable]
    process = subprocess.run(words, cwd=ROOT, env=variables, stdout=subprocess.PIPE, timeout=300)
    assert (process.returncode, process.stdout.decode()) == (0, f"{tmp_path}/run\n")
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"
    # All cores: nothing limits the threads here. The suite's other runs have a limit of one.
    assert json.loads((tmp_path / "run/config.json").read_text())["threads"] == len(os.sched_getaffinity(0))

# SPDX-License-Identifier: Apache-2.0
"""A run's surroundings: limits of open files, the end of a job, what config.json keeps of them."""

import json
import resource
import time
from multiprocessing import get_context

import pytest

from shared import accelerator
from shared.errors import UserError
from shared.images.storage import open_shards
from shared.launch import launcher_variables
from shared.run.interruption import MARGIN, _deadline


def test_no_secret_is_recorded(monkeypatch):
    secrets = ["SLURM_JWT", "SLURM_JOB_COMMENT", "SLURM_SPANK_PASSWORD", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET"]
    secrets += ["ACCELERATE_API_KEY", "ACCELERATE_Hub_Token", "NCCL_AUTH", "FSDP_PASSPHRASE", "SLURM_JOB_ID_TOKEN"]
    told = ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID"]
    told += ["ACCELERATE_MIXED_PRECISION", "FSDP_VERSION", "NCCL_DEBUG", "MASTER_PORT", "LOCAL_RANK", "WORLD_SIZE"]
    for name in (*secrets, *told):
        monkeypatch.setenv(name, f"value of {name}")
    recorded = launcher_variables()
    assert {name: f"value of {name}" for name in told}.items() <= recorded.items()
    assert not {*secrets} & {*recorded}
    assert not any("value of " + name in json.dumps(recorded) for name in secrets)


@pytest.fixture
def no_job(monkeypatch):
    for name in ("RECIPES_JOB_FOLDER", "SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("text", ["1000000000", "NONE", "UNLIMITED", "", "-1", "nan", "inf", "12:30", "0"])
def test_an_end_that_is_none_is_ignored(no_job, monkeypatch, text):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", text)
    assert _deadline(0) == 0
    assert _deadline(50) == pytest.approx(time.time() + 50, abs=5)


def test_an_end_counts_where_there_is_a_job(no_job, monkeypatch, tmp_path):
    end = int(time.time()) + 5000
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    assert _deadline(0) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert _deadline(0) == end - MARGIN
    monkeypatch.setenv("RECIPES_JOB_FOLDER", str(tmp_path))  # by slurm/launch.sh
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end - 5060))
    assert _deadline(0) == end - 5060 - MARGIN  # it has just passed, and Slurm will end the job any moment


def test_open_files_are_raised_or_refused(monkeypatch):
    """512 processes need 1,545 descriptors each; in processes of their own, for a hard limit does not come back."""
    monkeypatch.setenv("WORLD_SIZE", "512")
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        assert pool.apply(limits_of, [5000]) == (2545, 1024, 4096)
        with pytest.raises(UserError, match=r"^512 processes need 1545 open files each, and this machine allows 1500"):
            pool.apply(limits_of, [1500])


def limits_of(hard: int) -> tuple[int, int, int]:
    """The soft limit of a process of the launch, the shards that a source keeps open, the soft limit then."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    accelerator._check_descriptors()
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft, open_shards(), resource.getrlimit(resource.RLIMIT_NOFILE)[0]

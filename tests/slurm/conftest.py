# SPDX-License-Identifier: Apache-2.0
"""One Slurm a session."""

from collections.abc import Iterator

import pytest
from conftest import environment

from slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Find the programs of Debian's slurm-wlm, or another one built for several slurmd on a host."""
    if missing():
        pytest.skip(f"no {', '.join(missing())} on this machine: apt-get install slurm-wlm")
    variables = environment()
    variables.pop("TORCH_EXTENSIONS_DIR")  # the suite's own, in $HOME: jobs are to choose theirs
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), variables)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()

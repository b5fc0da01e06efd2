# SPDX-License-Identifier: Apache-2.0
"""A real Slurm on this machine: its daemons, eight fake nodes, all in one private folder, on free ports."""

import contextlib
import ctypes
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# Name: GPUs, cores, features, partition. As on Jean Zay, but few, and the one of docs/other_clusters.md.
NODES = {f"r1i0n{number}": (4, 96, "h100", "gpu_p6") for number in range(4)}
NODES |= {"r2i0n0": (8, 64, "a100", "gpu_p5"), "r3i0n0": (8, 24, "v100-32g", "gpu_p2")}
NODES |= {"r4i0n0": (4, 40, "v100-16g", "gpu_p13"), "heron0": (2, 32, "a30", "gpu")}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
MOST_SECONDS = 300  # that a test waits for one event

# OverTimeLimit: minutes after its limit until Slurm kills a job; starting one takes half a minute on a busy machine.
SLURM_CONF = """
ClusterName=fake
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
JobSubmitPlugins=lua
ReturnToService=2
SlurmdTimeout=30
KillWait=120
OverTimeLimit=3
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2
SchedulerType=sched/backfill
{nodes}
PartitionName=gpu_p13 Nodes=r4i0n0 Default=YES MaxTime=100:00:00 OverTimeLimit=0
PartitionName=gpu_p2 Nodes=r3i0n0 MaxTime=100:00:00
PartitionName=gpu_p5 Nodes=r2i0n0 MaxTime=20:00:00
PartitionName=gpu_p6 Nodes=r1i0n[0-3] MaxTime=100:00:00
PartitionName=gpu Nodes=heron0 MaxTime=48:00:00
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cores} SocketsPerBoard=2 "
    "CoresPerSocket={half} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{gpus} Feature={feature}"
)

# What IDRIS refuses: no project, or a project of other GPUs than those asked for. A constraint chooses the partition.
JOB_SUBMIT = """
function slurm_job_submit(job, partitions, uid)
    if job.partition == "gpu" then
        return slurm.SUCCESS
    end
    local gpu = (job.account or ""):match("@(%w+)$")
    if not gpu then
        slurm.log_user("no project: give --account=PROJECT@v100, @a100 or @h100")
        return slurm.ERROR
    end
    local feature = (job.features or "v100"):match("^%w+")
    local partitions = {a100 = "gpu_p5", h100 = "gpu_p6"}
    job.partition = job.partition or partitions[feature]
    if feature ~= gpu then
        slurm.log_user("the project's hours are of " .. gpu .. ": give --constraint=" .. gpu)
        return slurm.ERROR
    end
    return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, uid)
    return slurm.SUCCESS
end
"""


def missing() -> list[str]:
    """The programs that are not on this machine."""
    return [name for name in PROGRAMS if not shutil.which(name, path=_path())]


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """Running daemons; `environment` reaches them."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.daemons, self.nodes = folder, [], {}
        self.environment = {**environment, "PATH": f"{Path(sys.executable).parent}:{_path()}"}
        self.environment |= {"SLURM_CONF": f"{folder}/slurm.conf"}

    def start(self) -> None:
        self._configure()
        munge = [f"--{name}={self.folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file")]
        munge += [f"--key-file={self.folder}/munge.key", f"--seed-file={self.folder}/munge.seed"]
        self._daemon("munged", "--foreground", "--force", *munge)
        wait_for((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self.start_node(name)
        wait_for(lambda: self.states() == {"idle"}, "the nodes")

    def _configure(self) -> None:
        ports = _free_ports(1 + len(NODES))
        nodes = []
        for port, (name, (gpus, cores, feature, _)) in zip(ports[1:], NODES.items(), strict=True):
            values = {"gpus": gpus, "cores": cores, "half": cores // 2, "feature": feature}
            nodes.append(NODE.format(name=name, port=port, **values))
        values = {"host": socket.gethostname(), "user": getpass.getuser(), "folder": self.folder, "ports": ports}
        self._write("slurm.conf", SLURM_CONF.format(nodes="\n".join(nodes), **values))
        # Slurm counts device files; which ones they are is nothing to it.
        devices = [path for path in sorted(Path("/dev").iterdir()) if path.is_char_device()]
        assert len(devices) >= 8, "too few device files to call them GPUs"
        lines = [
            f"NodeName={name} Name=gpu File={path}" for name, node in NODES.items() for path in devices[: node[0]]
        ]
        self._write("gres.conf", "\n".join(lines) + "\n")
        self._write("job_submit.lua", JOB_SUBMIT)
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        (self.folder / "state").mkdir()

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def _daemon(self, *words: str) -> subprocess.Popen:
        """Ends with this process, however that ends."""
        with open(self.folder / "daemons.out", "ab") as output:
            process = subprocess.Popen(
                words, env=self.environment, stdout=output, stderr=output, start_new_session=True, preexec_fn=_follow
            )
        self.daemons.append(process)
        return process

    def start_node(self, name: str) -> None:
        (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        self.nodes[name] = self._daemon("slurmd", "-D", "-N", name)

    def stop(self) -> None:
        """Everything, jobs included: whatever carries this cluster's configuration in its environment."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.command("scancel", "--user", getpass.getuser(), timeout=20)
        for _ in range(20):  # a process that is being made has no environment yet
            found = self.processes()
            for pid in found:
                _kill(pid)
            if not found:
                break
            time.sleep(0.2)
        for daemon in self.daemons:
            daemon.wait(20)

    def processes(self, *marks: str) -> list[int]:
        """Those whose environment has this cluster's configuration and all of the marks, such as SLURM_NODEID=1."""
        wanted = {f"SLURM_CONF={self.folder}/slurm.conf", *marks}
        return [pid for pid, words in _environments() if wanted <= words]

    def kill_node(self, name: str) -> None:
        """As a power cut: the daemon, its steps, and all that they started."""
        _kill(self.nodes[name].pid)
        tasks = self.processes(f"SLURMD_NODENAME={name}")
        # A step's daemon stands between two nodes' processes, under a name of its own.
        daemons = {parent for parent in map(_parent, tasks) if _name(parent).startswith("slurmstepd")}
        for pid in [*daemons, *tasks]:
            _kill(pid)

    def sbatch(self, *words: str, cwd: Path, **variables: str) -> "Job":
        """`sbatch` itself, or another program that calls it."""
        words = [*map(str, words)]
        process = self.command(*words, cwd=cwd, env={**self.environment, **variables})
        assert process.returncode == 0, process.stdout + process.stderr
        return Job(self, int(re.findall(r"Submitted batch job (\d+)", process.stdout)[0]), cwd, process.stdout)

    def command(self, *words: str, timeout: float = MOST_SECONDS, **options) -> subprocess.CompletedProcess:
        options = {"env": self.environment, **options}
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, **options)

    def output(self, *words: str) -> str:
        process = self.command(*words)
        assert process.returncode == 0, process
        return process.stdout.strip()

    def states(self) -> set[str]:
        return set(self.command("sinfo", "-h", "-o", "%T").stdout.split())


class Job:
    """A job as Slurm reports it, and its log."""

    def __init__(self, cluster: Cluster, number: int, folder: Path, submitted: str):
        self.cluster, self.number, self.folder, self.submitted = cluster, number, folder, submitted

    @property
    def fields(self) -> dict[str, str]:
        words = self.cluster.output("scontrol", "show", "job", "-o", str(self.number))
        return dict(re.findall(r"(\w+)=(\S*)", words))

    @property
    def log(self) -> str:
        path = Path(self.fields["StdOut"])
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    def gone(self) -> bool:
        """Whether no task of it waits or runs. Slurm 22.05's squeue was seen to fail without a word: ask again."""
        answer = self.cluster.command("squeue", "-h", "-j", str(self.number))
        return answer.returncode == 0 and not answer.stdout.strip()

    def update(self, *changes: str) -> None:
        self.cluster.output("scontrol", "update", f"JobId={self.number}", *changes)

    def wait_until(self, *states: str) -> "Job":
        try:
            wait_for(lambda: self.state in states, f"job {self.number} to be {' or '.join(states)}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.state}\n{self.log}") from None
        return self

    def wait_completed(self) -> "Job":
        self.wait_until(*ENDED)
        assert self.state == "COMPLETED", self.log
        return self

    def wait_requeued(self, restarts: int) -> None:
        """Until it waits for its next start, which Slurm delays by two minutes; `go_on` spares them."""
        what = f"restart {restarts} of job {self.number}"
        wait_for(lambda: self.fields["Restarts"] == str(restarts) or self.state in ENDED, what)
        assert self.fields["Restarts"] == str(restarts), self.log
        self.wait_until("PENDING")

    def go_on(self, *changes: str) -> None:
        time.sleep(3)  # the nodes refuse what the job was allowed to, to the second, before it was requeued
        self.update("StartTime=now", *changes)


def wait_for(condition: Callable, what: str, seconds: float = MOST_SECONDS):
    """The condition's first true value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.5)  # most conditions ask scontrol, which is a process each time
    return value


def _follow() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def _environments():
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(folder.name), set((folder / "environ").read_bytes().decode(errors="replace").split("\0"))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports

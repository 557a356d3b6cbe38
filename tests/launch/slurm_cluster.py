"""A real SLURM of this machine: a controller and two virtual nodes on loopback, which end with the tests."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo", "scontrol")
NODES = ("n1", "n2")
KILL_WAIT = 5
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout={timeout}
KillWait={kill_wait}
MinJobAge=60
UnkillableStepTimeout=300
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=10000
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=2 RealMemory=2000 Gres=gpu:toy:2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n1 MaxTime=30 State=UP
"""


@dataclass
class SlurmCluster:
    """A running cluster; SLURM's programs find it by the environment variable SLURM_CONF."""

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    guard: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        return self.folder / "slurm.conf"

    def start(self) -> None:
        self.guard = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.slurm_cluster", self.folder],
            stdin=subprocess.PIPE,
            start_new_session=True,
            cwd=Path(__file__).parents[2],
        )
        for name in ("state", "munge", "log", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(32))
        ports = dict(zip(("controller", *NODES), free_ports(3), strict=True))
        host = socket.gethostname().partition(".")[0]
        self.config.write_text(CONFIG.format(folder=self.folder, host=host, timeout=5, kill_wait=KILL_WAIT, **ports))
        for number in (0, 1):
            (self.folder / f"toy{number}").touch()
        (self.folder / "gres.conf").write_text(f"NodeName=n2 Name=gpu Type=toy File={self.folder}/toy[0-1]\n")
        munge = [f"--{name}={self.folder}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._daemon("munged", "munged", "--foreground", "--force", "--num-threads=1", f"--key-file={key}", *munge)
        wait_for(lambda: (self.folder / "munge" / "socket").exists())
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)

    def _daemon(self, name: str, *command: str, **environment: str) -> None:
        self.daemons[name] = subprocess.Popen(
            command,
            env={**os.environ, "SLURM_CONF": str(self.config), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start_node(self, node: str) -> None:
        """Start a node and wait until it takes jobs."""
        self._daemon(node, "slurmd", "-D", "-N", node, SLURMD_NODENAME=node)
        wait_for(lambda: self.state(node) in ("idle", "allocated", "completing"))

    def state(self, node: str) -> str:
        return self.call("sinfo", "--Node", "--noheader", f"--nodes={node}", "--partition=all", "--format=%T").strip()

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """The processes of a node, or of the whole cluster: daemons, jobs and what these have started."""
        found = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if (
                    environment.get("SLURM_CONF") == str(self.config)
                    and node in (None, environment.get("SLURMD_NODENAME"))
                    and process.pid != os.getpid()
                    and process.status() != psutil.STATUS_ZOMBIE
                ):
                    found.add(process)
                    # The parent of a job writes its title over its own environment.
                    if (parent := process.parent()) is not None and parent.name() == "slurmstepd":
                        found.add(parent)
        return list(found)

    def kill_node(self, node: str) -> None:
        """Kill a node with all that runs on it, as a loss of power does."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        _kill(lambda: self.processes(node))

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, "SLURM_CONF": str(self.config)}
        )
        return done.stdout

    def clear(self) -> None:
        """Cancel all jobs and wait for their end."""
        self.call("scancel", "--signal=KILL", "--full", "--user=root")
        self.call("scancel", "--user=root")
        wait_for(lambda: not self.call("squeue", "--noheader").strip())

    def end(self) -> None:
        """End all processes, by the guard, which also does it where the tests are killed."""
        if self.guard is not None:
            self.guard.communicate()
        for daemon in self.daemons.values():
            daemon.wait()


def _kill(processes: Callable[[], Sequence[psutil.Process]]) -> None:
    """Kill at one moment, so that none reports the end of another; again until none is left."""
    while left := processes():
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for process in left:
                with suppress(psutil.Error):
                    process.send_signal(number)
        psutil.wait_procs(left, timeout=1)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(condition: Callable[[], object], seconds: float = 90) -> None:
    """Wait until a condition holds; fails after a time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.2)


def why_none() -> str:
    """Reason why no cluster can be started here, or ''."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"needs slurm-wlm and munge: there is no {', '.join(absent)}"
    return "" if os.geteuid() == 0 else "only root starts nodes of SLURM"


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[SlurmCluster]:
    if reason := why_none():
        pytest.skip(reason)
    # Not under pytest's folder: the path of a socket has a hundred characters at most.
    cluster = SlurmCluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()


@pytest.fixture
def slurm(running_cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster of this process, without jobs and with both nodes."""
    monkeypatch.setenv("SLURM_CONF", str(running_cluster.config))
    yield running_cluster
    for node in NODES:
        if running_cluster.daemons[node].poll() is not None:
            running_cluster.start_node(node)
    running_cluster.clear()


def end_with_parent(folder: Path) -> None:
    """Wait for the end of the parent's pipe, then kill the processes of a cluster and remove its folder."""
    sys.stdin.buffer.read()
    _kill(SlurmCluster(folder).processes)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    end_with_parent(Path(sys.argv[1]))

"""The processes of a stage that trains on several devices, seen from rank 0, which has the stage.

rank 0 (the stage's process: lock, files, decisions) ─┬─ python -m lit_llm.runs.rank  (rank 1)
                                                      └─ ...

The other ranks compute the same steps and write nothing. They end when rank 0 ends, since their standard input is a
pipe from it. When one of them dies, the stage is interrupted, and goes on later from its last checkpoint. Communication
with a dead rank fails by itself on a CPU; on GPUs it is aborted.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from lit_llm.config.problems import InputError, Problem
from lit_llm.store.store import Stage
from lit_llm.training.config import ExecutionConfig

if TYPE_CHECKING:
    import torch.distributed

    from lit_llm.training.devices import DeviceGroup

FAILED, OUT_OF_MEMORY, DISCONNECTED = 1, 12, 75
"""Exit codes of a rank: an error of its own, a lack of memory, and the loss of another rank."""
GRACE_SECONDS = 30.0
"""Time for rank 0 to notice that it cannot communicate, and for the others to end after it."""
NODES = "training.execution.nodes"
_EXECUTION = "execution"
"""Key of rank 0's execution settings in the store."""


class LostRank(Exception):
    """A process of the training has died; the training can go on from its last checkpoint."""


@contextmanager
def started_ranks(stage: Stage, execution: ExecutionConfig) -> Iterator[DeviceGroup]:
    """Context with the group of a stage's processes, of which this one is rank 0; alone for one device.

    execution: settings with this machine's kernels and strategy, which all ranks take.

    Raises LostRank where another rank was killed, MemoryError where it ran out of memory, RuntimeError where it failed,
    and InputError where ranks on other nodes cannot be started.
    """
    from lit_llm.training.devices import DeviceGroup, is_connection_error

    if execution.ranks == 1:
        yield DeviceGroup()
        return
    store = _listening_store(everywhere=execution.nodes > 1)
    store.set(_EXECUTION, execution.model_dump_json())
    others = _Others(stage, _start(stage, execution, store.port))
    try:
        yield DeviceGroup(0, execution.ranks, 0, store, others.wait_until_ready)
    except Exception as error:
        if is_connection_error(error) or others.has_lost():  # aborted communication raises errors of many kinds
            raise others.cause() from error
        raise
    finally:
        others.end()


def execution_of_first(store: torch.distributed.Store) -> ExecutionConfig:
    """Rank 0's execution settings with its kernels and strategy, which another node might choose otherwise."""
    return ExecutionConfig.model_validate_json(store.get(_EXECUTION))


def _listening_store(everywhere: bool) -> torch.distributed.TCPStore:
    """A store that other ranks can reach, from other machines only where there are any: its port has no password."""
    from torch.distributed import TCPStore

    listener = socket.create_server(("" if everywhere else "127.0.0.1", 0))
    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _start(stage: Stage, execution: ExecutionConfig, port: int) -> dict[str, subprocess.Popen[bytes]]:
    """Start the other ranks. Returns {name: process}: one for each rank, or srun for all ranks on several nodes."""
    command = [sys.executable, "-P", "-m", "lit_llm.runs.rank", str(stage.folder.parents[1]), stage.fingerprint]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    address = "127.0.0.1" if execution.nodes == 1 else _own_name()
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(execution.ranks),
    }
    if execution.nodes > 1:
        if "SLURM_JOB_ID" not in os.environ or shutil.which("srun") is None:
            message = f"{execution.nodes} nodes, but this is no job of SLURM; start `lit-llm run` in an allocation"
            raise InputError(Problem(message, NODES))
        for name in ("RANK", "LOCAL_RANK"):
            environment.pop(name, None)
        # One task for each rank: the one in the place of rank 0 only waits. A task that dies ends all of them.
        options = {"nodes": execution.nodes, "ntasks": execution.ranks, "ntasks-per-node": execution.devices}
        srun = ["srun", "--overlap", "--kill-on-bad-exit=1", *(f"--{key}={value}" for key, value in options.items())]
        return {"a rank": subprocess.Popen([*srun, *command], stdin=subprocess.PIPE, env=environment)}
    return {
        f"rank {rank}": subprocess.Popen(
            command, stdin=subprocess.PIPE, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(1, execution.ranks)
    }


def _own_name() -> str:
    """Name of this machine for the others: SLURM's where it is an address, too."""
    name = os.environ.get("SLURMD_NODENAME", "")
    with suppress(OSError):
        socket.getaddrinfo(name or None, 0)
        return name or socket.gethostname()
    return socket.gethostname()


class _Others:
    """The processes of the other ranks, and a thread that watches them."""

    def __init__(self, stage: Stage, processes: dict[str, subprocess.Popen[bytes]]) -> None:
        self.stage, self.processes = stage, processes
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def wait_until_ready(self, group: DeviceGroup) -> None:
        """Wait until all ranks are about to connect. Raises an error where one of them has ended instead."""
        assert group.store is not None
        while not group.store.check([group.ready_key(rank) for rank in range(1, group.ranks)]):
            if self.has_lost():
                raise self.cause()
            time.sleep(0.1)

    def cause(self) -> Exception:
        """The error of a training that has lost the connection to the others, by their exit codes."""
        deadline = time.monotonic() + GRACE_SECONDS / 3
        while not (codes := self._codes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5 if codes else 0.0)  # those that have lost a killed one end first, or together with it
        codes = self._codes()
        if OUT_OF_MEMORY in codes.values():
            return MemoryError(f"{_name_with(codes, OUT_OF_MEMORY)} ran out of memory; its error is in the run's log")
        killed = [code for code in codes.values() if code < 0 or code > 128]
        if killed:
            return LostRank(f"{_name_with(codes, killed[0])} {_end_by(killed[0])}")
        if FAILED in codes.values():
            return RuntimeError(f"{_name_with(codes, FAILED)} failed; its error is in the run's log")
        return LostRank("the connection to the other ranks was lost")

    def end(self) -> None:
        """Wait for the others to end, as they do after this rank, and kill those that do not."""
        self._ended.set()
        for process in self.processes.values():
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _codes(self) -> dict[str, int]:
        """{name: exit code} of those that have failed."""
        codes = {name: process.poll() for name, process in self.processes.items()}
        return {name: code for name, code in codes.items() if code}

    def has_lost(self) -> bool:
        return bool(self._codes())

    def _watch(self) -> None:
        """Abort the communication with a rank that has died, and end this process where it still waits for it."""
        while not self._ended.wait(0.2):
            if not self.has_lost():
                continue
            from lit_llm.training.devices import abort_communication

            abort_communication()
            if not self._ended.wait(GRACE_SECONDS):
                self.stage.set_state("interrupted", f"{self.cause()}; rank 0 waited for it and was ended")
                os.kill(os.getpid(), signal.SIGKILL)
            return


def _end_by(code: int) -> str:
    """How a process with this exit code, its own or that of a shell around it, has ended."""
    number = -code if code < 0 else code - 128
    with suppress(ValueError):
        return f"was killed by {signal.Signals(number).name}"
    return f"ended with exit code {code}"


def _name_with(codes: dict[str, int], code: int) -> str:
    return next(name for name, each in codes.items() if each == code)

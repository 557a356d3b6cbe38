"""An engine whose places are processes of this machine, for tests of what follows places."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from lit_llm.launch.engine import Needs, Place
from tests.store.other_hosts import HOSTS, NETWORK_DISK


@dataclass
class ProcessEngine:
    """Starts each place as a process with its output in `place-N.txt`.

    hosts: each place behaves as on a host of its own, with a disk like a network file system's.
    """

    name: str = "processes"
    hosts: bool = False
    requests: list[tuple[int, Needs]] = field(default_factory=list)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def obstacle(self, needs: Needs) -> str | None:
        return f"a place has at most 64 CPUs, not {needs.cpus}" if needs.cpus > 64 else None

    def start(self, command: Sequence[str], needs: Needs, count: int, folder: Path) -> list[str]:
        self.requests.append((count, needs))
        ids = []
        for number in range(count):
            with (folder / f"place-{number}.txt").open("ab") as log:
                host = {"TEST_HOST": f"host-{len(self.processes)}", "PYTHONPATH": str(HOSTS), **NETWORK_DISK}
                environment = {**os.environ, **(host if self.hosts else {})}
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
            ids.append(str(process.pid))
            self.processes[ids[-1]] = process
        return ids

    def places(self, ids: Sequence[str]) -> list[Place]:
        for process in self.processes.values():
            process.poll()
        return [Place(each, "running" if psutil.pid_exists(int(each)) else "ended") for each in ids]

    def stop(self, ids: Sequence[str], grace_seconds: float) -> None:
        for each in ids:
            os.kill(int(each), signal.SIGTERM)

    def log(self, id: str, folder: Path) -> Path:
        return folder / "place-0.txt"

    def kill(self, id: str) -> None:
        """Kill a place as a node dies: all its processes at once."""
        process = psutil.Process(int(id))
        for each in (*process.children(recursive=True), process):
            each.kill()
        self.processes[id].wait()

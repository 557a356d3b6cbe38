"""Processes that behave as on other hosts, with a disk like a network file system's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOSTS = Path(__file__).parent / "hosts"
NETWORK_DISK = {"TEST_FLOCK": "off", "TEST_EXCHANGE": "off"}
HOLDER = """
import sys
from lit_llm.store.claims import Superseded
from lit_llm.store.store import Store
stage = Store(sys.argv[1]).stage(sys.argv[2])
with stage.claim():
    stage.set_state("running")
    print("held", flush=True)
    for line in sys.stdin:
        try:
            if line.strip() == "state":
                stage.set_state("failed", "late")
            else:
                stage.finish({"state": "done", "by": "late"})
            print("written", flush=True)
        except Superseded as reason:
            print(reason, flush=True)
"""
"""Holds a stage, and writes a state or a result for each word that it is sent."""


class Process:
    """A Python process with pipes."""

    def __init__(self, code: str, *arguments: object, host: str = "", skew: float = 0.0, disk: dict[str, str]) -> None:
        here = {"TEST_HOST": host, "TEST_SKEW": str(skew), **disk}
        path = os.pathsep.join([str(HOSTS), *sys.path[:1], os.environ.get("PYTHONPATH", "")])
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, **here, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        """The next line of its output."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().strip()

    def send(self, word: str) -> str:
        """Send a line; returns the answer."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(word + "\n")
        self.popen.stdin.flush()
        return self.line()

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        self.signal(signal.SIGCONT)
        self.popen.kill()
        self.popen.communicate()


class Hosts:
    """Starts processes, and ends them with the test."""

    def __init__(self) -> None:
        self.started: list[Process] = []

    def start(
        self, code: str, *arguments: object, host: str = "", skew: float = 0.0, disk: dict[str, str] = NETWORK_DISK
    ) -> Process:
        self.started.append(Process(code, *arguments, host=host, skew=skew, disk=disk))
        return self.started[-1]

    def holder(self, root: Path, name: str, host: str = "", skew: float = 0.0) -> Process:
        """A process that holds a stage; see HOLDER."""
        process = self.start(HOLDER, root, name, host=host, skew=skew)
        assert process.line() == "held"
        return process


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    starter = Hosts()
    yield starter
    for process in starter.started:
        process.kill()

"""A cluster of Ray on this machine for tests: several nodes, each with its own daemon, of which some may be killed.

    python -m tests.launch.ray_cluster '[{"num_cpus": 1}, {"num_cpus": 1, "num_gpus": 2}]'

starts the nodes, the first one the head, prints their address and processes, and ends them with its standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from lit_llm.launch.ray_settings import RaySettings

ONE_CPU = {"num_cpus": 1}
MARK = "CLUSTER_OF_A_TEST"
"""Variable that all processes of a cluster have."""


class RayCluster:
    """A running cluster, seen from a test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        started = self._answer()
        self.address: str = started["address"]
        self.head = psutil.Process(started["head"])
        """The process whose death is the loss of the head."""
        self.daemons = [psutil.Process(pid) for pid in started["daemons"]]
        """One process for each node, whose death is the loss of the node."""

    def add_node(self, **resources: float) -> psutil.Process:
        assert self._process.stdin is not None
        print(json.dumps(resources), file=self._process.stdin, flush=True)
        self.daemons.append(psutil.Process(self._answer()["daemon"]))
        return self.daemons[-1]

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the cluster has ended"
        return json.loads(line)


@contextmanager
def ray_cluster(log: Path, nodes: Sequence[Mapping[str, float]] = (ONE_CPU, ONE_CPU)) -> Iterator[RayCluster]:
    """A cluster with these nodes, of which no process is left afterwards."""
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAY_USAGE_STATS_ENABLED": "0",
        MARK: mark,
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.launch.ray_cluster", json.dumps(list(nodes))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            env=environment,
            start_new_session=True,
        )
    assert process.stdin is not None
    try:
        yield RayCluster(process)
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        # Helpers of a killed daemon have no parent that ends them.
        for member in psutil.process_iter():
            with suppress(psutil.Error):
                if member.environ().get(MARK) == mark:
                    member.kill()
        process.wait()


def main() -> None:
    """Start the nodes that the first argument describes, and one more for each line of the standard input."""
    from ray.cluster_utils import Cluster

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    usual = {"object_store_memory": 80_000_000, "include_dashboard": False}
    first, *more = json.loads(sys.argv[1])
    head = {**usual, "_system_config": RaySettings().system_config(), **first}
    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))

    def add(resources: dict[str, float]) -> Any:
        return patiently(lambda: cluster.add_node(**usual, **resources))

    def daemon(node: Any) -> int:
        return node.all_processes["raylet"][0].process.pid

    others = [add(each) for each in more]
    started = {
        "address": cluster.address,
        "head": cluster.head_node.all_processes["gcs_server"][0].process.pid,
        "daemons": [daemon(node) for node in (cluster.head_node, *others)],
    }
    print(json.dumps(started), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"daemon": daemon(add(json.loads(line)))}), file=answers, flush=True)
    with suppress(AssertionError):  # its processes that the test has killed are zombies of this one
        cluster.shutdown()


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node, again if need be: Ray gives it half a minute, which a loaded machine misses."""
    for _ in range(2):
        with suppress(Exception):
            return start()
    return start()


if __name__ == "__main__":
    main()

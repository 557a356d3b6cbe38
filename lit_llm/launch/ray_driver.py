"""The process that speaks to Ray for a RayEngine: one JSON request a line, one JSON answer a line.

A process of its own, as Ray ends a process that has lost the head for a minute, and as calls to a lost head wait. A
place is one detached actor, or one for each of its nodes. Actors are found by name, so they outlive this process.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMESPACE = "lit-llm"
RESOURCES = ("CPU", "GPU", "memory")
"""Ray's names."""
GPU_VARIABLE = "CUDA_VISIBLE_DEVICES"
ANSWER_SECONDS = 2.0
"""Time in which a running actor answers, on a loaded machine, too."""


class PlaceActor:
    """Runs one command on a node of Ray, and ends when it does.

    Ray sends this class to the node by value, as it is defined in a program. The node's Ray needs no lit-llm.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        # Where no GPU was asked for, Ray leaves all GPUs of the node visible.
        gpus = os.environ.get(GPU_VARIABLE, "") if order["gpus"] else ""
        log = Path(order["log"])
        log.parent.mkdir(parents=True, exist_ok=True)
        self._socket, theirs = socket.socketpair()
        program = [order["python"], "-m", "lit_llm.launch.supervised", str(order["grace_seconds"]), str(os.getppid())]
        with log.open("ab") as output, theirs:
            subprocess.run(
                [*program, *order["command"]],
                cwd=order["folder"],
                env={**order["environment"], GPU_VARIABLE: gpus},
                stdin=theirs.fileno(),
                stdout=output,
                stderr=output,
                check=True,
            )
        threading.Thread(target=self._end_with_command, daemon=True).start()

    def node(self) -> str:
        """The address of the node."""
        import ray

        return ray.util.get_node_ip_address()

    def stop(self, grace_seconds: float) -> None:
        """Ask the command to save and end, and have it killed after the grace."""
        with suppress(OSError):  # it has just ended
            self._socket.sendall(f"{grace_seconds}\n".encode())

    def _end_with_command(self) -> None:
        import ray

        self._socket.recv(1)  # it only ever returns because the socket is closed
        with suppress(SystemExit):
            ray.actor.exit_actor()
        time.sleep(5)
        os._exit(0)


class Driver:
    """A connection to a cluster. Its public methods are the requests."""

    def __init__(self) -> None:
        self._actors: dict[str, tuple[Any, Any]] = {}  # {name: (handle, the answer of its node())}
        self._is_owner = False
        self._ends: dict[str, str] = {}  # {name: reason}

    def connect(self, address: str | None, cpus: int, system_config: dict[str, int]) -> str:
        """Connect to a cluster, or start one of this machine. Returns the address of its head."""
        import ray

        started_here: dict[str, Any] = {
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": 80 * 2**20,  # the least: lit-llm stores nothing there
            "_system_config": system_config,
        }
        ray.init(
            address=address or "local",
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level="ERROR",
            **(started_here if address is None else {}),
        )
        self._is_owner = address is None
        return ray.get_runtime_context().gcs_address

    def wait_for_places(self) -> None:
        """Wait until a cluster that was started here has no place left: it ends with this process."""
        import ray

        while self._is_owner and ray.util.list_named_actors():
            time.sleep(1)

    def nodes(self) -> list[dict[str, Any]]:
        """Living nodes: {"name": "10.0.0.2", "CPU": 8.0, "GPU": 1.0, "memory": bytes}."""
        import ray

        return [
            {"name": node["NodeManagerAddress"], **{kind: node["Resources"].get(kind, 0.0) for kind in RESOURCES}}
            for node in ray.nodes()
            if node["Alive"]
        ]

    def start(self, orders: dict[str, dict[str, Any]], resources: dict[str, float]) -> None:
        """Create one actor for each order, {name: order}; all or none."""
        import ray

        remote = ray.remote(PlaceActor)
        options = {"num_cpus": resources["CPU"], "num_gpus": resources["GPU"], "memory": resources.get("memory")}
        try:
            for name, order in orders.items():
                actor = remote.options(
                    name=name,
                    lifetime="detached",
                    max_restarts=0,  # the coordinator starts another where there is still work
                    scheduling_strategy="SPREAD",
                    **options,
                ).remote(order)
                self._actors[name] = actor, actor.node.remote()
        except Exception:
            for name in orders.keys() & self._actors.keys():
                ray.kill(self._actors.pop(name)[0])
            raise

    def places(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """State and detail of each actor."""
        import ray

        living = set(ray.util.list_named_actors())
        met = []
        for name in living.intersection(names) - self._actors.keys():
            with suppress(ValueError):  # it has just ended
                actor = ray.get_actor(name)
                self._actors[name] = actor, actor.node.remote()
                met.append(self._actors[name][1])
        if met:
            ray.wait(met, num_returns=len(met), timeout=ANSWER_SECONDS)
        return [self._running_or_queued(name) if name in living else ("ended", self._end(name)) for name in names]

    def stop(self, names: Sequence[str], grace_seconds: float) -> None:
        """Ask running commands to save and end; places in the queue end at once."""
        import ray

        asked = []
        for name, (state, _) in zip(names, self.places(names), strict=True):
            if state == "running":
                asked.append(self._actors[name][0].stop.remote(grace_seconds))
            elif state == "queued":
                ray.kill(self._actors[name][0])
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=ANSWER_SECONDS)

    def _running_or_queued(self, name: str) -> tuple[str, str]:
        import ray

        if name not in self._actors:
            return "ended", ""
        answer = self._actors[name][1]
        try:
            return "running", f"on {ray.get(answer, timeout=0)}"
        except ray.exceptions.GetTimeoutError:
            return "queued", "waits for free resources"
        except ray.exceptions.RayError as error:  # it ended between two questions
            return "ended", reason(str(error))

    def _end(self, name: str) -> str:
        """Ray's reason for the end of an actor, where it is not the end of its command."""
        import ray

        if name not in self._ends:
            self._ends[name] = ""
            if name in self._actors:
                try:
                    ray.get(self._actors.pop(name)[0].node.remote(), timeout=ANSWER_SECONDS)
                except ray.exceptions.RayError as error:
                    self._ends[name] = reason(str(error))
        return self._ends[name]


def reason(message: str) -> str:
    """One line of Ray's message about the death of an actor; '' where its command has ended."""
    if "INTENDED_USER_EXIT" in message:
        return ""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if "creation task" in message:
        return lines[-1]
    death = next((line for line in lines if line.startswith("The actor is dead because")), lines[0])
    return death.partition(" Some common causes")[0]


def main() -> None:
    """Answer requests until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    driver = Driver()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(driver, request["method"])(**request["arguments"])}
        except Exception as error:  # whatever Ray raises, the engine tells the user
            reasons = [f"{type(each).__name__}: {each}" for each in (error, error.__cause__) if each is not None]
            answer = {"error": " ".join(" - ".join(reasons).split())}
        print(json.dumps(answer), file=answers, flush=True)
    driver.wait_for_places()


if __name__ == "__main__":
    main()

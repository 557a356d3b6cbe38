"""Places on a cluster of Ray: each is a detached actor that runs the command in a process of its own.

```
coordinator (RayEngine) ── JSON ──▶ ray_driver ── Ray ──▶ PlaceActor, on a node
                                                            │ socket
                                                            └──▶ supervised ──▶ command
```
The coordinator and its driver may go: places work on, and another coordinator finds them by their ids. When anything
else of this chain dies, the command is asked to save and end, and killed after a grace.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_llm.launch.child import kill_group
from lit_llm.launch.devices import cores
from lit_llm.launch.engine import EngineError, Needs, Place
from lit_llm.launch.process import import_path
from lit_llm.launch.ray_settings import RaySettings

LOST_GRACE = 30.0
"""Seconds in which a command saves and ends after the loss of its actor; more than the 25 of the command itself."""
CONNECT_SECONDS = 120.0
REQUEST_SECONDS = 30.0
DRIVER_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Seconds without the head after which the driver ends; Ray waits for 60.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    "RAY_gcs_server_request_timeout_seconds": "20",
}
NO_CLUSTER = "start it with `ray start --head`, or correct `address`; this machine must be a node of the cluster"
LOST_CLUSTER = "if its head is lost, start a new one and repeat the same command: finished stages are kept"
MOST_NODES = 8
"""Nodes that a message lists."""
MOST_CHARACTERS = 300
"""Length of Ray's words in a message."""


class RayEngine:
    """Supplies places on a cluster of Ray."""

    name = "ray"

    def __init__(self, settings: RaySettings | None = None) -> None:
        self.settings = settings or RaySettings()
        self._driver: _DriverProcess | None = None
        self._address = ""

    def obstacle(self, needs: Needs) -> str | None:
        """Needs that no node of the cluster has, in words, or None."""
        self._connect(self.settings.address)
        return lacking(needs, self._request("nodes"), self._address)

    def start(self, command: Sequence[str], needs: Needs, count: int, folder: Path) -> list[str]:
        """Create `count` actors that run a command. Their ids name the cluster: `10.0.0.1:6379/3f9c2a_0`."""
        self._connect(self.settings.address)
        group, folder = uuid.uuid4().hex[:8], folder.absolute()
        order = {
            "command": list(command),
            "python": sys.executable,
            "folder": os.getcwd(),
            "environment": dict(os.environ),
            "gpus": needs.gpus,
            "grace_seconds": LOST_GRACE,
        }
        names = [f"{group}_{number}" for number in range(count)]
        ids = [f"{self._address}/{name}" for name in names]
        orders = {name: {**order, "log": str(self.log(name, folder))} for name in names}
        resources = {"CPU": needs.cpus, "GPU": needs.gpus}
        if needs.memory_gb is not None:
            resources["memory"] = needs.memory_gb * 1e9
        self._request("start", orders=orders, resources=resources)
        return ids

    def places(self, ids: Sequence[str]) -> list[Place]:
        """The state of places. Those of another cluster than this engine's have ended, as far as it can see."""
        names = self._names_here(ids)
        states = dict(zip(names, self._request("places", names=names) if names else [], strict=True))
        return [Place(id, *states.get(id.rpartition("/")[2], ("ended", ""))) for id in ids]

    def stop(self, ids: Sequence[str], grace_seconds: float) -> None:
        """Ask commands to save and end (SIGTERM), and have them killed after the grace. Queued places end at once."""
        if names := self._names_here(ids):
            self._request("stop", names=names, grace_seconds=grace_seconds)

    def log(self, id: str, folder: Path) -> Path:
        """File with the output of a place."""
        return folder / f"place-{id.rpartition('_')[2]}.txt"

    def close(self) -> None:
        """End the connection. A cluster that was started here ends after its last place."""
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def _names_here(self, ids: Sequence[str]) -> list[str]:
        """Names of the places that the engine's cluster may hold."""
        if not ids:
            return []
        address = self.settings.address
        if self._driver is None and address is None:  # started by another process, or by one that has ended
            address = ids[-1].rpartition("/")[0]
            if not _listens(address):
                return []
        self._connect(address)
        return [name for cluster, _, name in (id.rpartition("/") for id in ids) if cluster == self._address]

    def _connect(self, address: str | None) -> None:
        if self._driver is not None:
            return
        if importlib.util.find_spec("ray") is None:
            raise EngineError("the Ray launcher needs the `ray` library: pip install 'lit-llm[ray]'")
        self._address = address or "this machine"
        if address and ":" in address and not _listens(address):  # Ray would try for a minute
            raise EngineError(f"Ray on {address}: nothing listens there; {NO_CLUSTER}")
        # Ray gives a cluster that it starts for one program a token, which other programs of the user may use.
        mode = {} if self.settings.address else {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token")}
        self._driver = _DriverProcess({**DRIVER_VARIABLES, **mode})
        self._address = self._request(
            "connect",
            CONNECT_SECONDS,
            address=address,
            cpus=cores(),
            system_config=self.settings.system_config(),
        )

    def _request(self, method: str, seconds: float = REQUEST_SECONDS, **arguments: Any) -> Any:
        assert self._driver is not None, "requests follow _connect()"
        try:
            return self._driver.ask(method, arguments, seconds)
        except _DriverError as error:
            self._driver.kill()
            self._driver = None  # the next request connects anew
            advice = NO_CLUSTER if method == "connect" else LOST_CLUSTER
            raise EngineError(f"Ray on {self._address}: {error}; {advice}") from None


class _DriverError(Exception):
    pass


class _DriverProcess:
    """The process of ray_driver.py."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lit_llm.launch.ray_driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env={**os.environ, **import_path(), **variables},
            start_new_session=True,  # Ctrl-C in the terminal is for the coordinator
        )

    def ask(self, method: str, arguments: Mapping[str, Any], seconds: float) -> Any:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = json.dumps({"method": method, "arguments": arguments})
        line = b""
        deadline = time.monotonic() + seconds
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{request}\n".encode())
            self._process.stdin.flush()
            while not line.endswith(b"\n"):
                if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise _DriverError(f"no answer within {seconds:g} s")
                part = os.read(self._process.stdout.fileno(), 65536)
                if not part:
                    break
                line += part
        if not line.endswith(b"\n"):
            raise _DriverError(f"the connection has ended: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise _DriverError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Let the process end: now, or after the last place of a cluster that it has started."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def kill(self) -> None:
        """Kill the process. Ray ends a cluster that it has started."""
        kill_group(self._process.pid)
        self._process.wait()
        self._output.close()

    def _last_words(self) -> str:
        """How the process ended, and the last line of its output that is not a report about a worker."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._output.seek(0)
        lines = [line.strip() for line in self._output.read().decode(errors="replace").split("\n")]
        last = next((line for line in reversed(lines) if line and "(raylet)" not in line), "no message")
        return f"exit status {self._process.returncode}, {last[:MOST_CHARACTERS]}"


def lacking(needs: Needs, nodes: Sequence[Mapping[str, Any]], cluster: str) -> str | None:
    """Needs that no node has, in words; None where a node has them all."""
    if needs.gpus > 1 and not float(needs.gpus).is_integer():
        return f"Ray gives out whole GPUs above 1, not {needs.gpus:g}"
    if needs.nodes > 1:
        return f"a place on Ray is on one node, not on {needs.nodes}"
    wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": (needs.memory_gb or 0) * 1e9}
    if any(all(node[kind] >= amount for kind, amount in wanted.items()) for node in nodes):
        return None
    have = "; ".join(f"{node['name']} has {_amounts(node)}" for node in nodes[:MOST_NODES])
    more = f"; and {len(nodes) - MOST_NODES} more" if len(nodes) > MOST_NODES else ""
    return f"no node of Ray on {cluster} has {_amounts(wanted)}: {have or 'there is none'}{more}"


def _amounts(resources: Mapping[str, Any]) -> str:
    parts = [f"{resources[kind]:g} {kind}{'s' * (resources[kind] != 1)}" for kind in ("CPU", "GPU") if resources[kind]]
    parts += [f"{resources['memory'] / 1e9:.3g} GB of memory"] if resources["memory"] else []
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts or ["nothing"])


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
        return True
    return False

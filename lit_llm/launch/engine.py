"""What a study needs of an engine: places on which a command runs. The store decides what is done.

A place is a process somewhere (an array task of SLURM, an actor of Ray) that runs one command, which takes stages from
the store until none is left for it. What an engine says of a place is a hint for people and for the choice to start
more: a stage is done by its result alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

PlaceState = Literal["queued", "running", "ended"]


@dataclass(frozen=True)
class Needs:
    """Resources of one place."""

    cpus: int = 1
    gpus: float = 0
    """GPUs of one node; a fraction where several places share one."""
    nodes: int = 1
    """Nodes of one place, each with `cpus` and `gpus`."""
    memory_gb: float | None = None
    """Gigabytes of memory of one node; None: what the engine gives."""
    hours: float | None = None
    """Hours of wall-clock time; None: what the engine gives."""


@dataclass(frozen=True)
class Place:
    """One place, as an engine describes it."""

    id: str
    """The engine's own name, such as `4711_0`."""
    state: PlaceState
    detail: str = ""
    """The engine's own words: `PENDING (Resources)`."""


class Engine(Protocol):
    """An engine that supplies places. Its methods raise EngineError for an engine that does not answer."""

    name: str

    def obstacle(self, needs: Needs) -> str | None:
        """Reason why this engine could never start a place with these needs; None where it could."""

    def start(self, command: Sequence[str], needs: Needs, count: int, folder: Path) -> list[str]:
        """Start or queue `count` places that run a command, in the current directory. Returns their ids.

        folder: a new folder of the store for the engine's files and the places' logs.
        """

    def places(self, ids: Sequence[str]) -> list[Place]:
        """The state of places; those that the engine has forgotten have ended."""

    def stop(self, ids: Sequence[str], grace_seconds: float) -> None:
        """Ask places to save and end (SIGTERM), and kill those that outlast the grace. Returns at once."""

    def log(self, id: str, folder: Path) -> Path:
        """File with the output of a place that was started with this folder."""


class EngineError(RuntimeError):
    """An engine cannot be reached, or refused a request; the message has its own words and a next step."""

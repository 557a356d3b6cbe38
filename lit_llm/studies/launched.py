"""Places of an engine that work on a study or a sweep: started, followed, cancelled.

```
studies/<name>/places/<number>/   one request to an engine
    places.json                   the engine, the ids of its places, what each got
    cancelled                     written by `cancel`, which ends whoever follows
    manifest.json                 the stages to compute (a study's)
    ...                           the engine's files and the places' logs
```
A place runs a command that takes work from the store until none is left for it. Whoever follows only reads the store
and the engine's queue, so it may end at any time: the same command follows the same places again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_llm.config.problems import InputError, Problem
from lit_llm.launch.engine import Engine, EngineError, Needs, Place
from lit_llm.launch.settings import Launcher, LaunchSettings, engine_of
from lit_llm.launch.signals import counted_signals
from lit_llm.store.store import read_json, write_json
from lit_llm.studies.observer import Observer

FOLDER = "places"
POLL_SECONDS = 0.5
ENGINE_SECONDS = 5.0
"""Seconds between two questions to an engine; a cluster's controller serves many users."""
ATTEMPTS = 3
"""Requests in a row after which nothing more was finished, before no further place is asked for."""


@dataclass(frozen=True)
class Request:
    """Places that were asked for together."""

    folder: Path
    launcher: Launcher
    ids: tuple[str, ...]

    @property
    def cancelled(self) -> Path:
        """A file that exists once the places were cancelled."""
        return self.folder / "cancelled"

    @classmethod
    def read(cls, folder: Path) -> Request | None:
        """The request in a folder; None where it was never sent. Raises Damaged."""
        content = read_json(folder / "places.json")
        return None if content is None else cls(folder, content["launcher"], tuple(content["ids"]))


def requests_of(study: Path) -> list[Request]:
    """The requests of a study or sweep, in their order."""
    folders = sorted((study / FOLDER).glob("[0-9]*"), key=lambda folder: int(folder.name))
    return [request for folder in folders if (request := Request.read(folder)) is not None]


def cancelled_requests(study: Path) -> set[Path]:
    """Folders of the requests that were cancelled."""
    return {file.parent for file in (study / FOLDER).glob("*/cancelled")}


def living_places(study: Path, settings: LaunchSettings) -> list[tuple[Request, Engine, list[Place]]]:
    """The places that are queued or running, by request. Raises EngineError."""
    living = []
    for request in requests_of(study):
        engine = engine_of(request.launcher, settings)
        assert engine is not None, "the local launcher has no places"
        places = [place for place in engine.places(request.ids) if place.state != "ended"]
        if places:
            living.append((request, engine, places))
    return living


def cancel(study: Path, settings: LaunchSettings, grace_seconds: float) -> int:
    """Ask all places of a study or sweep to save and end. Returns their number. Raises EngineError."""
    living = living_places(study, settings)
    for request, engine, places in living:
        request.cancelled.touch()
        engine.stop([place.id for place in places], grace_seconds)
    return sum(len(places) for _, _, places in living)


@dataclass(frozen=True)
class Progress:
    """How far the work of places is, read from the store."""

    ended: int
    """Stages or trials that have ended."""
    is_over: bool
    """All have ended."""
    can_begin: bool
    """Some could begin now and nobody works on them."""


@dataclass(frozen=True)
class Places:
    """The wish for places of an engine, for the work of one command."""

    launcher: Launcher
    engine: Engine
    settings: LaunchSettings
    needs: Needs
    """Resources of each place."""
    count: int
    """Places wanted at once."""

    def check(self) -> None:
        """Raise InputError where the engine can never serve the needs, or does not answer."""
        try:
            obstacle = self.engine.obstacle(self.needs)
        except EngineError as error:
            obstacle = str(error)
        if obstacle:
            raise InputError(Problem(obstacle, f"--launcher {self.launcher}"))

    def follow(
        self,
        study: Path,
        command: Callable[[Path], Sequence[str]],
        progress: Callable[[], Progress],
        observer: Observer,
        poll: Callable[[], None],
    ) -> bool:
        """Have the work done; returns whether it was interrupted. Places outlive an interrupted follower.

        command: writes what a place needs into a folder, and returns the words of the place's command.
        """
        asked, ended_before, known = 0, -1, ""
        cancelled = cancelled_requests(study)
        with counted_signals() as signals:
            looked = -ENGINE_SECONDS
            while not (now := progress()).is_over:
                if signals.count:
                    observer.message(f"The places go on; `lit-llm cancel {study.name}` stops them.")
                    return True
                if cancelled_requests(study) - cancelled:
                    observer.message("The places were cancelled; the same command asks for new ones.")
                    return True
                if time.monotonic() - looked >= ENGINE_SECONDS:
                    looked = time.monotonic()
                    try:
                        living = [place for _, _, places in living_places(study, self.settings) for place in places]
                        words = summary(living)
                        if words != known:
                            observer.places(self.launcher, words)
                            known = words
                        if len(living) < self.count and now.can_begin:
                            asked, ended_before = (asked + 1 if now.ended == ended_before else 1), now.ended
                            if asked > ATTEMPTS:
                                observer.message(self._given_up(study))
                                return False
                            self._ask(study, command, self.count - len(living))
                            looked = -ENGINE_SECONDS
                        elif not living and not now.can_begin:
                            return False  # what is left waits for something that never comes
                    except EngineError as error:
                        observer.message(str(error))
                        return True
                poll()
                time.sleep(POLL_SECONDS)
        return False

    def _ask(self, study: Path, command: Callable[[Path], Sequence[str]], count: int) -> None:
        number = 1 + max((int(folder.name) for folder in (study / FOLDER).glob("[0-9]*")), default=0)
        folder = study / FOLDER / str(number)
        folder.mkdir(parents=True)
        words = [sys.executable, "-m", "lit_llm", *command(folder)]
        ids = self.engine.start(words, self.needs, count, folder)
        write_json(folder / "places.json", {"launcher": self.launcher, "ids": ids, "needs": asdict(self.needs)})

    def _given_up(self, study: Path) -> str:
        last = requests_of(study)[-1]
        log = self.engine.log(last.ids[0], last.folder)
        return f"{ATTEMPTS} requests for places ended without finishing anything; the log of the last is {log}"


def summary(places: Sequence[Place]) -> str:
    """`2 running, 1 queued: PENDING (Resources)`, or `none`."""
    lines: dict[str, int] = {}
    for place in places:
        name = place.state + (f": {place.detail}" if place.state == "queued" and place.detail else "")
        lines[name] = lines.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in lines.items()) or "none"

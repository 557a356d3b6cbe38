"""Places of an engine that work on a study or a sweep: started, followed, cancelled.

```
studies/<name>/places/<number>/   one request to an engine
    places.json                   the engine, the ids of its places, what each got
    cancelled                     written by `cancel`: it ends whoever follows, and the request's places
    ended-places                  written once all places have ended
    manifest.json                 the stages to compute (a study's)
    ...                           the engine's files and the places' logs
```
A place runs a command that takes work from the store until none is left for it. Whoever follows only reads the store
and the engine's queue, so it may end at any time: the same command follows the same places again.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_llm.config.problems import InputError, Problem, SourceLocation
from lit_llm.launch.engine import Engine, EngineError, Needs, Place
from lit_llm.launch.settings import Launcher, LaunchSettings, engine_of
from lit_llm.launch.signals import counted_signals
from lit_llm.store.locks import locked, locks_of
from lit_llm.store.store import Store, read_json, write_json
from lit_llm.studies.observer import Observer

FOLDER, MANIFEST = "places", "manifest.json"
POLL_SECONDS = 0.5
ENGINE_SECONDS = 5.0
"""Seconds between two questions to an engine; a cluster's controller serves many users."""
ATTEMPTS = 3
"""Requests in a row that ended soon and finished nothing, after which no further place is asked for."""
SHORT_LIFE = 300.0
"""Seconds within which places that finished nothing were of no use; later, a run has been continued."""
TOP_UP_SECONDS = 60.0
"""Seconds between two requests beside living places while nothing is finished."""
REQUEST_SECONDS = 300.0
"""Seconds to wait for another follower's request."""


@dataclass(frozen=True)
class Request:
    """Places that were asked for together."""

    folder: Path
    launcher: Launcher
    ids: tuple[str, ...]

    def engine(self, settings: LaunchSettings) -> Engine:
        """The engine of its places. Raises EngineError where it is not installed."""
        engine = engine_of(self.launcher, settings)
        assert engine is not None, "the local launcher has no places"
        return engine

    @property
    def ended(self) -> Path:
        """A file that exists once all places were seen to have ended."""
        return self.folder / "ended-places"

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


def read_manifest(file: Path) -> dict[str, Any]:
    """The work that a request's places do. Raises InputError for a damaged or missing file."""
    content = read_json(file)
    if content is None:
        raise InputError(Problem("there is no manifest", location=SourceLocation(str(file))))
    return content


def place_command(store: Store, write: Callable[[Path], None]) -> Callable[[Path], list[str]]:
    """Function that writes a manifest into a folder, and returns the words of the command of a place there."""

    def command(folder: Path) -> list[str]:
        write(folder / MANIFEST)
        return ["work", str(folder / MANIFEST), "--store", str(store.root)]

    return command


def cancelled_requests(study: Path) -> set[Path]:
    """Folders of the requests that were cancelled."""
    return {file.parent for file in (study / FOLDER).glob("*/cancelled")}


@contextmanager
def ending_when_cancelled(folder: Path) -> Iterator[None]:
    """Context in which this process, a place, gets SIGTERM once its request is cancelled.

    The engine stops the places that `cancel` knows; this ends those of a request whose ids were never written.
    """
    over = threading.Event()

    def watch() -> None:
        while not (folder / "cancelled").exists():
            if over.wait(ENGINE_SECONDS):
                return
        os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch, name="cancellation", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def living_places(
    study: Path, settings: LaunchSettings, launcher: Launcher | None = None
) -> list[tuple[Request, list[Place]]]:
    """The places that are queued or running, by request; of one launcher, or of all. Raises EngineError."""
    living = []
    for request in requests_of(study):
        if request.ended.exists() or launcher not in (None, request.launcher):
            continue
        places = [place for place in request.engine(settings).places(request.ids) if place.state != "ended"]
        if places:
            living.append((request, places))
        else:
            request.ended.touch()  # its engine is not asked again
    return living


def cancel(study: Path, settings: LaunchSettings, grace_seconds: float) -> int:
    """Ask all places of a study or sweep to save and end. Returns their number.

    Places of a request whose ids were never written, as its command was killed, end by themselves and do not count.

    Raises EngineError for an engine that does not answer, once the places of the others are stopped.
    """
    count, problems = 0, list[str]()
    for folder in (study / FOLDER).glob("[0-9]*"):
        if not (folder / "places.json").exists():
            (folder / "cancelled").touch()
    for launcher in dict.fromkeys(request.launcher for request in requests_of(study)):
        try:
            for request, places in living_places(study, settings, launcher):
                request.cancelled.touch()
                request.engine(settings).stop([place.id for place in places], grace_seconds)
                count += len(places)
        except EngineError as error:
            problems.append(str(error))
    if problems:
        raise EngineError("; ".join(problems))
    return count


def patience_of_places(store: Path) -> float:
    """Seconds that a place without work waits: until the lease of a dead host has run out. 0 for kernel locks."""
    locks = locks_of(store / "store.json")
    return 1.5 * locks.lease_seconds if locks.kind == "lease" else 0.0


@dataclass(frozen=True)
class Progress:
    """Progress of the work of places, read from the store."""

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
        """Wait for places to do the work; returns whether it was interrupted. Places outlive an interrupted follower.

        command: writes what a place needs into a folder, and returns the words of the place's command.
        """
        follower = _Follower(self, study, command, observer)
        with counted_signals() as signals:
            while not (now := progress()).is_over:
                if signals.count:
                    observer.message(f"The places go on; `lit-llm cancel {study.name}` stops them.")
                    return True
                if follower.is_cancelled():
                    observer.message("The places were cancelled; the same command asks for new ones.")
                    return True
                try:
                    if (reason := follower.look(now)) is not None:
                        observer.message(reason)
                        return False
                except EngineError as error:
                    observer.message(str(error))
                    return True
                poll()
                time.sleep(POLL_SECONDS)
        return False

    def ask(self, study: Path, command: Callable[[Path], Sequence[str]]) -> None:
        """Ask the engine for the places that are still missing. Raises EngineError."""
        with locked(study / FOLDER / "lock", patience=REQUEST_SECONDS):  # beside another follower
            living = sum(len(places) for _, places in living_places(study, self.settings, self.launcher))
            if (count := self.count - living) < 1:
                return
            number = 1 + max((int(folder.name) for folder in (study / FOLDER).glob("[0-9]*")), default=0)
            folder = study / FOLDER / str(number)
            folder.mkdir(parents=True)
            words = [sys.executable, "-m", "lit_llm", *command(folder)]
            ids = self.engine.start(words, self.needs, count, folder)
            write_json(folder / "places.json", {"launcher": self.launcher, "ids": ids, "needs": asdict(self.needs)})


class _Follower:
    """Keeps as many places as are wanted while there is work for them."""

    def __init__(self, wish: Places, study: Path, command: Callable[[Path], Sequence[str]], observer: Observer) -> None:
        self.wish, self.study, self.command, self.observer = wish, study, command, observer
        self._cancelled = cancelled_requests(study)
        self._looked = self._asked = -math.inf
        """Monotonic times of the last question to the engine, and of the last request."""
        self._ended_then = -1
        self._in_vain = 0
        """Requests in a row whose places ended within `SHORT_LIFE` seconds and finished nothing."""
        self._words = ""

    def is_cancelled(self) -> bool:
        """A request was cancelled since this follower began."""
        return bool(cancelled_requests(self.study) - self._cancelled)

    def look(self, now: Progress) -> str | None:
        """Ask the engine for the places, and for more where there is work. Returns the reason to give up, or None.

        Raises EngineError for an engine that does not answer, or refuses the first place.
        """
        if time.monotonic() - self._looked < ENGINE_SECONDS:
            return None
        self._looked = time.monotonic()
        living: list[Place] = []
        try:
            for _, places in living_places(self.study, self.wish.settings, self.wish.launcher):
                living += places
            self._report(summary(living))
            if len(living) < self.wish.count and now.can_begin:
                return self._ask(now, living)
        except EngineError as error:
            if not living:
                raise
            self._report(str(error))
        return None

    def _ask(self, now: Progress, living: Sequence[Place]) -> str | None:
        age, idle = time.monotonic() - self._asked, now.ended == self._ended_then
        if living and idle and age < TOP_UP_SECONDS:
            return None  # a node that ends each place at once must not be asked again and again
        self._in_vain = self._in_vain + 1 if idle and not living and age < SHORT_LIFE else 0
        if self._in_vain >= ATTEMPTS:
            last = requests_of(self.study)[-1]
            log = self.wish.engine.log(last.ids[0], last.folder)
            return f"{ATTEMPTS} requests for places ended without finishing anything; the log of the last is {log}"
        self._ended_then, self._asked, self._looked = now.ended, time.monotonic(), -math.inf
        self.wish.ask(self.study, self.command)
        return None

    def _report(self, words: str) -> None:
        if words != self._words:
            self.observer.places(self.wish.launcher, words)
            self._words = words


def summary(places: Sequence[Place]) -> str:
    """`2 running, 1 queued: PENDING (Resources)`, or `none`."""
    lines: dict[str, int] = {}
    for place in places:
        name = place.state + (f": {place.detail}" if place.state == "queued" and place.detail else "")
        lines[name] = lines.get(name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in lines.items()) or "none"

"""The search of a sweep on places of an engine: each place draws trials from the one budget and trains them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_llm.store.store import Store, write_json
from lit_llm.studies.launched import Places, Progress, patience_of_places, place_command, read_manifest
from lit_llm.studies.supervise import Supervision
from lit_llm.sweeps.coordinator import Coordinator, SweepObserver
from lit_llm.sweeps.storage import storage_errors
from lit_llm.sweeps.sweep import open_sweep
from lit_llm.sweeps.trials import Trials


@dataclass(frozen=True)
class SweepManifest:
    """A search for places. The sweep itself is frozen in the store."""

    sweep: str
    """Name of the sweep."""
    storage: str | None
    """URL of the trials' database; None: the store's journal."""
    max_parallel: int
    """Trials at once in each place."""
    supervision: Supervision

    def write(self, file: Path) -> None:
        """Write the manifest, which only its owner may read: a URL may have a password."""
        before = os.umask(0o077)
        try:
            write_json(file, asdict(self), signed=True)
        finally:
            os.umask(before)

    @classmethod
    def read(cls, file: Path) -> SweepManifest:
        """Read a manifest. Raises InputError for a damaged or missing file."""
        content = read_manifest(file)
        return cls(**{**content, "supervision": Supervision(**content["supervision"])})


def follow_trials(places: Places, manifest: SweepManifest, coordinator: Coordinator, news: Callable[[], None]) -> bool:
    """Let places run the trials of a sweep; returns whether it was interrupted, or given up before its end."""
    trials, command = coordinator.trials, place_command(coordinator.store, manifest.write)
    last = Progress(0, False, False)

    def progress() -> Progress:
        nonlocal last
        with suppress(*storage_errors()):  # a database that is away for a while
            ended = sum(trial.counts and trial.state != "running" for trial in coordinator.seen)
            last = Progress(ended, trials.over, trials.can_draw)
        return last

    def poll() -> None:
        coordinator.poll()
        news()

    return places.follow(trials.folder, command, progress, coordinator.observer, poll) or not trials.over


def draw_on(file: Path, store: Store, observer: SweepObserver) -> bool:
    """Run trials of a sweep until none is left for this place; returns whether it was interrupted."""
    manifest = SweepManifest.read(file)
    search = open_sweep(manifest.sweep, (), store)
    trials = Trials(search, store, manifest.storage)
    with trials.coordinating(joins=True):
        coordinator = Coordinator(search, store, trials, observer, manifest.supervision)
        coordinator.refresh()
        return coordinator.run(manifest.max_parallel, patience=patience_of_places(store.root))

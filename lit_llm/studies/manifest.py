"""The list of stages that the places of an engine compute, and the work of one place on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_llm.store.store import Store, write_json
from lit_llm.studies.launched import Places, Progress, patience_of_places, place_command, read_manifest
from lit_llm.studies.observer import Observer
from lit_llm.studies.stage_executor import StageExecutor, Work, picker_of, slots_for
from lit_llm.studies.supervise import Supervision


@dataclass(frozen=True)
class Manifest:
    """Stages for places. Their configurations are frozen in the store, so later edits of files change nothing."""

    stages: tuple[Work, ...]
    max_parallel: int
    """Stages at once in each place."""
    supervision: Supervision

    def write(self, file: Path) -> None:
        content: dict[str, Any] = {"stages": [asdict(work) for work in self.stages], "max_parallel": self.max_parallel}
        write_json(file, content | {"supervision": asdict(self.supervision)}, signed=True)

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """Read a manifest. Raises InputError for a damaged or missing file."""
        content = read_manifest(file)
        stages = tuple(Work(**{**each, "parents": tuple(each["parents"])}) for each in content["stages"])
        return cls(stages, content["max_parallel"], Supervision(**content["supervision"]))


def follow_stages(
    places: Places, study: Path, manifest: Manifest, store: Store, observer: Observer, poll: Callable[[], None]
) -> bool:
    """Let places compute the stages of a manifest; returns whether it was interrupted."""
    picker = picker_of(store, manifest.stages)

    def progress() -> Progress:
        if (name := picker.take()) is not None:
            picker.put_back(name)
        return Progress(picker.count, picker.over, can_begin=name is not None)

    return places.follow(study, place_command(store, manifest.write), progress, observer, poll)


def work_on(file: Path, store: Store, observer: Observer) -> bool:
    """Compute stages of a manifest until none is left for this place; returns whether it was interrupted."""
    manifest = Manifest.read(file)
    return StageExecutor(
        store,
        manifest.stages,
        slots=slots_for(manifest.stages, manifest.max_parallel),
        observer=observer,
        supervision=manifest.supervision,
        picker=picker_of(store, manifest.stages, random.random(), file.parent / "ended"),
        patience=patience_of_places(store.root),
    ).execute()

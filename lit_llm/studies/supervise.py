"""Restarts runs that die, make no progress or run out of memory, within limits."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_llm.launch import Outcome, Task
from lit_llm.runs.stage_config import halve_micro_batch
from lit_llm.store.disk import check_exists
from lit_llm.store.store import FINAL, Stage, Store
from lit_llm.studies.observer import Observer

SHORTEST = 7200.0
"""Default seconds that a run may be silent: longer than any validation between two steps."""
USUAL = 20
"""Factor on the longest silence that a run came back from: the limit of the next one."""
_COUNTED = 5.0
"""Most seconds counted between two checks: if the coordinator slept, its runs may have slept too."""
_NO_SIGN = ("lock", "claim.json", "log.txt", "state.json", "config.yaml", "retries.jsonl")


@dataclass(frozen=True)
class Supervision:
    """Limits for restarts, silence and stopping."""

    retries: int = 2
    """Restarts of a killed or stalled run by one command. 0: none, not even after out of memory."""
    stall_seconds: float | None = None
    """Seconds without progress after which a run is stopped; 0: never. None: the longer of two hours and 20 times the
    run's longest silence so far, once it has logged a step."""
    grace_seconds: float = 25.0
    """Seconds between the request to stop and the kill; fewer than a batch system grants (SLURM: 30)."""


@dataclass
class _Signs:
    """Signs of progress of one run: changes of its files."""

    files: object = None
    silence: float = 0.0
    longest: float | None = None
    """Seconds of the longest silence that it came back from; None before it has logged anything."""
    longest_yet: float = 0.0
    """Seconds of the longest silence, including the time before it logged."""
    checked: float = field(default_factory=time.monotonic)
    reported: bool = False


class Supervisor:
    """Watches the runs of one command."""

    def __init__(self, store: Store, supervision: Supervision, observer: Observer) -> None:
        self.store, self.supervision, self.observer = store, supervision, observer
        self._restarts: Counter[str] = Counter()
        self._signs: dict[str, _Signs] = {}

    # --- runs that have ended --------------------------------------------------------------------------------------

    def restart(self, outcome: Outcome) -> bool:
        """Restart a run that has ended where the limits allow it. Returns whether it restarts."""
        task, stages = outcome.task, self._stages(outcome.task)
        if (signs := self._signs.pop(task.name, None)) is not None and signs.reported:
            self.observer.silent(task.name, 0.0)
        stage = next((stage for stage in stages if stage.status()["state"] not in FINAL), None)
        if stage is None or not self.supervision.retries or outcome.status in ("raised", "interrupted"):
            return False
        if outcome.status == "killed":
            return self._counted(task, stage, outcome.error or "killed")
        state = stage.status()["state"]
        if state == "interrupted":
            return self._counted(task, stage, f"its process was interrupted: {stage.status()['error']}")
        if state != "out_of_memory":
            return False
        size = halve_micro_batch(stage)
        if size is None:
            return False
        sequences = f"{size} sequence{'s' if size > 1 else ''} at a time"
        self._begin(task, stage, f"out of memory; it goes on with {sequences}, in batches of the same size", size)
        return True

    def times(self, name: str) -> int:
        """Number of times that a run's process was killed or stopped in this command."""
        return self._restarts[name]

    def _counted(self, task: Task, stage: Stage, reason: str) -> bool:
        self._restarts[task.name] += 1
        number, most = self._restarts[task.name], self.supervision.retries
        if number > most:
            return False
        self._begin(task, stage, f"{reason}; it goes on from its last checkpoint (retry {number} of {most})")
        return True

    def _begin(self, task: Task, stage: Stage, reason: str, micro_batch_size: int | None = None) -> None:
        stage.note_retry(reason, micro_batch_size)
        stage.set_state("pending", reason)
        self.observer.restarting(task.name)
        self.observer.message(f"{task.name}: {reason}")

    # --- runs that go on -------------------------------------------------------------------------------------------

    def to_stop(self, task: Task) -> str | None:
        """Reason to stop a run without progress, else None. Raises DiskError without a store."""
        signs, now = self._signs.get(task.name), time.monotonic()
        if signs is None:
            check_exists(self.store)
            signs = self._signs[task.name] = _Signs(self._files(task))
        elif now - signs.checked >= self._between:
            check_exists(self.store)
            self._check(task, signs, now)
        limit = self._limit(signs)
        if limit is None or signs.silence < limit:
            return None
        return f"no progress for {_duration(signs.silence)}"

    @property
    def _between(self) -> float:
        """Seconds between two checks of a run's files."""
        return min(_COUNTED, 2.0, (self.supervision.stall_seconds or SHORTEST) / 10)

    def _check(self, task: Task, signs: _Signs, now: float) -> None:
        files = self._files(task)
        signs.silence += min(now - signs.checked, _COUNTED)
        signs.checked = now
        if files != signs.files:
            signs.files, signs.longest_yet = files, max(signs.longest_yet, signs.silence)
            if any(name in ("metrics.jsonl", "progress.json") for name, *_ in files):
                signs.longest = max(signs.longest or 0.0, signs.longest_yet)
            signs.silence = 0.0
        limit = self._limit(signs)
        if limit is not None and signs.silence > limit / 2:
            signs.reported = True
            self.observer.silent(task.name, signs.silence)
        elif signs.reported:
            signs.reported = False
            self.observer.silent(task.name, 0.0)

    def _limit(self, signs: _Signs) -> float | None:
        given = self.supervision.stall_seconds
        if given is not None:
            return given or None
        return None if signs.longest is None else max(SHORTEST, USUAL * signs.longest)

    def _stages(self, task: Task) -> list[Stage]:
        names: str | Sequence[str] = task.arguments[1]
        return [self.store.stage(name) for name in ([names] if isinstance(names, str) else names)]

    def _files(self, task: Task) -> tuple[tuple[str, int, int], ...]:
        """(name, size, time of change) of each file that shows progress."""
        files = []
        for stage in self._stages(task):
            for folder in (stage.folder, stage.checkpoints):
                files += [entry for entry in _entries(folder) if entry[0] not in _NO_SIGN]
        return tuple(sorted(files))


def _entries(folder: Path) -> list[tuple[str, int, int]]:
    entries = []
    try:
        for entry in os.scandir(folder):
            state = entry.stat()
            entries.append((entry.name, state.st_size, state.st_mtime_ns))
    except OSError:  # not begun, a file that is just being replaced, or a folder that cannot be read
        pass
    return entries


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 120 else f"{seconds / 60:.0f} min"

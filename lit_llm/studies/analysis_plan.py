"""The frozen analysis of a study: what it compares, and how, fixed before the results; later changes and comparisons.

```
<store>/studies/<study>/
  analysis.json       the analysis as the first run froze it, written once
  analysis.jsonl      one line for each later change and each comparison, appended
  analysis.lock       held while either is written
```

A change is never refused. The report says whether the analysis is the frozen one, else what changed after how many
results.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llm.config.hashing import fingerprint
from lit_llm.statistics.comparison import Comparison
from lit_llm.store.locks import Busy, locked
from lit_llm.store.store import Store, write_json
from lit_llm.studies.load import Ablation

FROZEN, LOG, LOCK = "analysis.json", "analysis.jsonl", "analysis.lock"
PATIENCE = 10.0
"""Seconds to wait for another process that writes a line."""
COMPARED = ("metric", "margin", "correction", "variance", "baseline", "stratify_by", "front", "scaling", "gate")
"""Keys of `compare` that decide verdicts and the gate. Keys that only name or print are left out."""


def analysis_of(ablation: Ablation) -> dict[str, Any]:
    """The settings that decide a study's comparisons and verdicts, as plain data."""
    study = ablation.study
    compare = study.compare.model_dump(mode="json")
    return {
        "question": study.question,
        **{key: compare[key] for key in COMPARED},
        "baselines": ablation.baselines,
        "seeds": list(study.seeds),
        "more_seeds": study.more_seeds.model_dump(mode="json") if study.more_seeds else None,
    }


@dataclass(frozen=True)
class Change:
    """A change of the analysis after it was frozen."""

    time: float
    """Seconds since 1970."""
    finished: int
    """Runs that had finished at that time."""
    changes: Mapping[str, tuple[Any, Any]]
    """{key: (old value, new value)}."""
    seeds_analysed: int = 0
    """Seeds of the last look before the change, where seeds are added in rounds."""


@dataclass(frozen=True)
class LoggedComparison:
    """A logged comparison with at least one verdict."""

    time: float
    finished: int
    key: str
    """Digest of the results and of the analysis: the same comparison is not logged twice."""
    seeds: int = 0
    """Largest number of seeds of any difference in the comparison."""


@dataclass(frozen=True)
class Registration:
    """The frozen analysis with its later changes and comparisons."""

    plan: Mapping[str, Any]
    """The analysis as it was frozen; empty where it cannot be read."""
    time: float
    """Time of freezing, in seconds since 1970."""
    finished: int
    """Runs that had finished before: other studies' runs, or this one's if it began without a frozen analysis."""
    changes: tuple[Change, ...] = ()
    comparisons: tuple[LoggedComparison, ...] = ()
    problems: tuple[str, ...] = ()
    """Damages of its files, as sentences."""

    @property
    def hash(self) -> str:
        return fingerprint(self.plan) if self.plan else ""

    @property
    def current(self) -> dict[str, Any]:
        """The analysis after the last change."""
        now = dict(self.plan)
        for change in self.changes:
            for key, (_, new) in change.changes.items():
                now[key] = new
        return now

    def as_json(self) -> dict[str, Any]:
        """The object that `report --json` prints under `analysis`. Keys may be added, none is renamed."""
        return {
            "hash": self.hash,
            "frozen": self.time,
            "finished_before": self.finished,
            "changes": [
                {
                    "time": change.time,
                    "finished": change.finished,
                    "changes": {key: list(pair) for key, pair in change.changes.items()},
                }
                for change in self.changes
            ],
            "looks": [{"time": logged.time, "finished": logged.finished} for logged in self.comparisons],
            "problems": list(self.problems),
        }


# --- reading --------------------------------------------------------------------------------------------------------


def registration_of(folder: Path) -> Registration | None:
    """The registration in a study's folder; None where nothing was frozen. Damaged files become `problems`."""
    frozen, log = folder / FROZEN, folder / LOG
    if not frozen.exists() and not log.exists():
        return None
    problems: list[str] = []
    plan, when, finished = dict[str, Any](), 0.0, 0
    try:
        content = json.loads(frozen.read_text())
        plan, when, finished = dict(content["plan"]), float(content["time"]), int(content["finished"])
        _check_seeds(plan)
        if content["hash"] != fingerprint(plan):
            problems.append(f"{frozen} was edited after it was frozen: its hash is {content['hash']}")
    except FileNotFoundError:
        problems.append(f"{frozen} is missing: what was frozen is not known")
    except (OSError, ValueError, LookupError, TypeError):
        plan = {}
        problems.append(f"{frozen} cannot be read: what was frozen is not known")
    changes, comparisons = list[Change](), list[LoggedComparison]()
    for event in _events(log, problems):
        (changes if isinstance(event, Change) else comparisons).append(event)  # type: ignore[arg-type]
    if not comparisons and not problems and _was_compared(folder):
        problems.append(f"{log} holds no comparison, though there was one: changes and comparisons are not known")
    return Registration(plan, when, finished, tuple(changes), tuple(comparisons), tuple(problems))


def _was_compared(folder: Path) -> bool:
    """True where a study's folder holds a comparison with a verdict, which somebody may have read."""
    try:
        rows = json.loads((folder / "comparison.json").read_text())["rows"]
        return any(row["verdict"] for row in rows)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _events(log: Path, problems: list[str]) -> Iterator[Change | LoggedComparison]:
    """Events of the log. A line that cannot be read is added to `problems`."""
    try:
        lines = log.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{log} cannot be read: {error.strerror}")
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _event(json.loads(line))
        except (ValueError, LookupError, TypeError, AttributeError):
            problems.append(f"{log}:{number} cannot be read: a change or a comparison is missing here")


def _check_seeds(plan: Mapping[str, Any]) -> None:
    """Raise ValueError, TypeError or LookupError where a plan's seeds give no test levels."""
    seeds, more = plan["seeds"], plan["more_seeds"]
    numbers = [*seeds, *((more["max"], more["step"]) if more else ())]
    if not seeds or not all(isinstance(number, int) for number in numbers):
        raise ValueError("seeds")


def _event(line: Mapping[str, Any]) -> Change | LoggedComparison:
    when, finished = float(line["time"]), int(line["finished"])
    if line["event"] == "change":
        changes = {str(key): (old, new) for key, (old, new) in line["changes"].items()}
        _check_seeds({"seeds": [0], "more_seeds": None} | {key: new for key, (_, new) in changes.items()})
        return Change(when, finished, changes, int(line.get("looked", 0)))
    if line["event"] == "look":
        return LoggedComparison(when, finished, str(line["key"]), int(line.get("seeds", 0)))
    raise ValueError(line["event"])


# --- writing --------------------------------------------------------------------------------------------------------


def register(
    store: Store, ablation: Ablation, finished: Callable[[], int], seeds_analysed: Callable[[], int] = lambda: 0
) -> list[str]:
    """Freeze the analysis of a study, or log how it differs from the one in force.

    A study of one arm compares nothing and freezes nothing.

    Args:
        finished: counts the study's finished runs; called only when something is written.
        seeds_analysed: counts the seeds of the last look under the analysis in force; likewise.

    Returns:
        Why nothing could be written, as sentences; empty on success.
    """
    if not _compares(ablation):
        return []
    folder, plan = store.study(ablation.study.study), analysis_of(ablation)
    try:
        with locked(folder / LOCK, PATIENCE):
            registration = registration_of(folder)
            if registration is None:
                content = {"plan": plan, "hash": fingerprint(plan), "time": _now(), "finished": finished()}
                write_json(folder / FROZEN, content)
            elif registration.plan and (changes := changed(registration.current, plan)):
                line = {"event": "change", "time": _now(), "finished": finished(), "looked": seeds_analysed()}
                _append(folder / LOG, {**line, "changes": changes})
    except (Busy, OSError) as error:
        return [_write_failure(folder, error)]
    return []


def log_comparison(store: Store, ablation: Ablation, comparison: Comparison) -> list[str]:
    """Log a comparison with a verdict, once for the same results.

    A study that never ran in this store has no frozen analysis and no log.

    Returns:
        Why nothing could be written, and damages of the log, as sentences.
    """
    folder = store.study(ablation.study.study)
    if not (folder / FROZEN).exists() or not any(row.verdict for row in comparison.rows):
        return []
    key = comparison_key(ablation, comparison)
    try:
        with locked(folder / LOCK, PATIENCE):
            registration = registration_of(folder)
            if registration is None or key in {logged.key for logged in registration.comparisons}:
                return []
            seeds = max(row.difference.seeds for row in comparison.rows if row.verdict and row.difference)
            line = {"event": "look", "time": _now(), "finished": count_finished(comparison), "key": key, "seeds": seeds}
            _append(folder / LOG, line)
    except (Busy, OSError) as error:
        return [_write_failure(folder, error)]
    return [problem for problem in registration.problems if problem.startswith(str(folder / LOG))]


def comparison_key(ablation: Ablation, comparison: Comparison) -> str:
    """Digest of the results and of the analysis that judges them."""
    seen = [[row.arm, row.seeds, row.mean, row.deviation, dict(row.states)] for row in comparison.rows]
    return fingerprint({"seen": seen, "analysis": analysis_of(ablation)})


def count_finished(comparison: Comparison) -> int:
    """Number of runs that have ended with a result, divergence included."""
    return sum(row.states.get("done", 0) + row.states.get("diverged", 0) for row in comparison.rows)


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """{key: [old value, new value]} of the keys that differ."""
    return {key: [old.get(key), new.get(key)] for key in (*old, *(set(new) - set(old))) if old.get(key) != new.get(key)}


def _compares(ablation: Ablation) -> bool:
    return any(arm.name != arm.baseline for arm in ablation.arms)


def _append(log: Path, event: Mapping[str, Any]) -> None:
    """Append one line, and end the half line that a killed process may have left."""
    with log.open("a+b") as file:
        torn = b""
        if file.seek(0, 2):
            file.seek(-1, 2)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + json.dumps(event).encode() + b"\n")


def _write_failure(folder: Path, error: Exception) -> str:
    why = "another process holds its lock" if isinstance(error, Busy) else getattr(error, "strerror", "") or str(error)
    return f"{folder / LOG} was not written ({why}): a change or a comparison is missing there"


def _now() -> float:
    return round(time.time(), 3)


def earlier_plans(registration: Registration | None) -> Sequence[tuple[Mapping[str, Any], int]]:
    """Each analysis that a change of `seeds` or `more_seeds` ended, with the seeds at the last look under it."""
    if registration is None or not registration.plan:
        return ()
    plans, now, since = [], dict(registration.plan), 0.0
    for change in registration.changes:
        if {"seeds", "more_seeds"} & change.changes.keys():
            plans.append(
                (dict(now), change.seeds_analysed or _seeds_analysed_between(now, registration, since, change.time))
            )
            since = change.time
        for key, (_, new) in change.changes.items():
            now[key] = new
    return plans


def seeds_analysed_fixed(registration: Registration) -> int:
    """Number of seeds at the last look under the analysis in force, for a fixed number of seeds."""
    changes = [change.time for change in registration.changes if {"seeds", "more_seeds"} & change.changes.keys()]
    return _seeds_analysed_between(registration.current, registration, max(changes, default=0.0), float("inf"))


def _seeds_analysed_between(plan: Mapping[str, Any], registration: Registration, since: float, until: float) -> int:
    """Number of seeds at the last look between two times, for an analysis without rounds; else 0."""
    if plan.get("more_seeds"):
        return 0
    seen = [logged.seeds for logged in registration.comparisons if since <= logged.time <= until]
    return max(seen, default=0)

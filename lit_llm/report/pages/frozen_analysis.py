"""The frozen analysis in sentences: one line for the terminal, and every change for the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lit_llm.report import text
from lit_llm.statistics.estimates import joined
from lit_llm.studies.analysis_plan import Change, Registration

NAMED = 3
"""Largest number of arms that a sentence names."""


def summary(registration: Registration | None) -> str:
    """One line: hash, date of freezing, later changes, and number of logged comparisons."""
    if registration is None:
        return ""
    clauses = [_frozen(registration)]
    if registration.changes:
        late = [change for change in registration.changes if change.finished]
        keys = ", ".join(dict.fromkeys(key for change in late or registration.changes for key in change.changes))
        after = f"after {text.several(max(c.finished for c in late), 'result')}" if late else "before any result"
        clauses.append(f"CHANGED {after}: {keys}" if late else f"changed {after}: {keys}")
    clauses.append(f"{text.several(len(registration.comparisons), 'comparison')} logged")
    clauses += registration.problems
    return "; ".join(clauses)


def details(registration: Registration | None) -> list[str]:
    """Sentences on the freezing, each change, and the logged comparisons; none where nothing was frozen."""
    return [*_details(registration)] if registration is not None else []


def _details(registration: Registration) -> Iterator[str]:
    yield f"{_frozen(registration)}."
    for change in registration.changes:
        when = f"after {text.several(change.finished, 'result')}" if change.finished else "before any result"
        yield f"changed on {text.utc(change.time)}, {when}: {'; '.join(_changes(change))}."
    if registration.comparisons:
        counts = ", ".join(str(logged.finished) for logged in registration.comparisons)
        yield f"{text.several(len(registration.comparisons), 'comparison')} logged, after {counts} finished runs."
    yield from (f"{problem}." for problem in registration.problems)


def _frozen(registration: Registration) -> str:
    if not registration.plan:
        return "analysis: not known as it was frozen"
    before = f"after {text.several(registration.finished, 'result')}" if registration.finished else "before any result"
    state = "frozen" if registration.changes else "as frozen"
    return f"analysis {registration.hash}: {state} on {text.utc(registration.time)} {before}"


def _changes(change: Change) -> Iterator[str]:
    for key, (old, new) in change.changes.items():
        if key == "baselines" and isinstance(old, dict) and isinstance(new, dict):
            yield from _baselines(old, new)
        else:
            yield f"{key} {_value(old)} → {_value(new)}"


def _baselines(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for what, names in (
        ("added", [arm for arm in new if arm not in old]),
        ("removed", [arm for arm in old if arm not in new]),
        ("with another baseline", [arm for arm in new if arm in old and old[arm] != new[arm]]),
    ):
        if names:
            yield f"{text.several(len(names), 'arm')} {what} ({joined(names, NAMED)})"


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace('"', "")

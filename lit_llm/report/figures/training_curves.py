"""What stages left on disk, read once and no more of it than a figure can show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_llm.config.metrics import SPLITS
from lit_llm.report.figures.lines import Places
from lit_llm.store.store import metric_lines

POINTS = 200
"""Points of a curve at most: more than the width of a panel can tell apart."""
_VALIDATED = f'"{SPLITS["validation"]}'.encode()
"""What a line of metrics.jsonl holds where there was a validation."""

AXES = {
    "steps": "optimiser steps",
    "tokens": "tokens read",
    "flops": "training FLOPs",
    "seconds": "seconds since the first logged step",
}
"""What a course can be drawn over, and how it is called on the axis."""


def read_course(file: Path, points: int = POINTS) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl, at most `points` of those with a validation and as many of the others, evenly spread.

    The first and the last are among them. Only these are parsed: a long run has 100,000 lines.
    """
    try:
        lines = file.read_bytes().split(b"\n")[:-1]  # the last may be half written
    except OSError:
        return []
    validated = [number for number, line in enumerate(lines) if _VALIDATED in line]
    chosen = {*thinned(range(len(lines)), points), *thinned(validated, points)}
    return metric_lines(lines[number] for number in sorted(chosen))


def thinned(places: Sequence[int], most: int) -> list[int]:
    """At most so many, evenly spread, with the first and the last."""
    if len(places) <= most:
        return list(places)
    return [places[round(i * (len(places) - 1) / (most - 1))] for i in range(most)]


def _along(line: dict[str, Any], over: str, course: Sequence[dict[str, Any]]) -> float | None:
    """How far a line of a course is along an axis."""
    if over == "steps":
        return float(line["step"])
    if over == "seconds":
        return float(line["time"] - course[0]["time"])
    along: float | None = line["metrics"].get({"tokens": "tokens_seen"}.get(over, over))
    return along


def places(course: Sequence[dict[str, Any]], metric: str, over: str, most: int = POINTS) -> Places:
    """{step: (x, value)} of one metric, where it is a finite number and x is known; at most so many."""
    found: dict[float, tuple[float, float]] = {}
    for line in course:
        value, x = line["metrics"].get(metric), _along(line, over, course)
        if value is not None and x is not None and math.isfinite(value):
            found[line["step"]] = (float(x), float(value))
    steps = list(found)
    return {steps[i]: found[steps[i]] for i in thinned(range(len(steps)), most)}


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The records of an evaluation."""
    if file.exists():
        with file.open() as lines:
            yield from map(json.loads, lines)

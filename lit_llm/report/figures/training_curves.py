"""Training curves and records of stages, read from disk and thinned to what a figure can show."""

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
"""Largest number of points of a curve: more than the width of a panel can show."""
_VALIDATED = f'"{SPLITS["validation"]}'.encode()
"""Part of a line of metrics.jsonl with a validation."""

AXES = {
    "steps": "optimiser steps",
    "tokens": "tokens read",
    "flops": "training FLOPs",
    "seconds": "seconds since the first logged step",
}
"""{x axis of a training curve: its label}"""


def read_curve(file: Path, points: int = POINTS) -> list[dict[str, Any]]:
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
    """At most `most` of the places, evenly spread, with the first and the last."""
    if len(places) <= most:
        return list(places)
    return [places[round(i * (len(places) - 1) / (most - 1))] for i in range(most)]


def _x_of(line: dict[str, Any], over: str, curve: Sequence[dict[str, Any]]) -> float | None:
    """x of a line of a training curve; None where it was not measured."""
    if over == "steps":
        return float(line["step"])
    if over == "seconds":
        return float(line["time"] - curve[0]["time"])
    x: float | None = line["metrics"].get({"tokens": "tokens_seen"}.get(over, over))
    return x


def places(curve: Sequence[dict[str, Any]], metric: str, over: str, most: int = POINTS) -> Places:
    """{step: (x, value)} of one metric, where it is finite and x was measured; at most `most` points."""
    points: dict[float, tuple[float, float]] = {}
    for line in curve:
        value, x = line["metrics"].get(metric), _x_of(line, over, curve)
        if value is not None and x is not None and math.isfinite(value):
            points[line["step"]] = (float(x), float(value))
    steps = list(points)
    return {steps[i]: points[steps[i]] for i in thinned(range(len(steps)), most)}


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The records of an evaluation."""
    if file.exists():
        with file.open() as lines:
            yield from map(json.loads, lines)

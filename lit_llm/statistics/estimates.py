"""A number with a 95% interval, read from draws of its distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_llm.statistics.paired import CONFIDENCE


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval."""

    value: float
    low: float | None = None
    """None without degrees of freedom."""
    high: float | None = None


def estimate(value: float, draws: Any | None) -> Estimate:
    """The value with the middle 95% of its draws; a draw that is not a number counts as beyond both ends."""
    if draws is None:
        return Estimate(value)
    ends = interval(draws)
    return Estimate(value, float(ends[0]), float(ends[1]))


def interval(draws: Any) -> Any:
    """(low, high) of the middle 95% of each column, or of one column: 2, or 2 x columns."""
    import numpy as np

    draws = np.asarray(draws)
    outside = math.floor((1 - CONFIDENCE) / 2 * (len(draws) + 1))  # draws beyond an end
    at = max(0, outside - 1)
    low = np.sort(np.where(np.isnan(draws), -np.inf, draws), axis=0)[at]
    high = np.sort(np.where(np.isnan(draws), np.inf, draws), axis=0)[-1 - at]
    return np.stack([low, high])


def exponentials(log: Estimate) -> Estimate:
    """The estimate of e^x from that of x."""
    return Estimate(*(None if end is None else _exponential(end) for end in (log.value, log.low, log.high)))  # type: ignore[arg-type]


def _exponential(value: float) -> float:
    return math.inf if value >= 700 else math.exp(value)  # nan stays nan


def evenly(low: float, high: float, points: int = 21) -> list[float]:
    """Evenly spaced numbers from low to high, both included."""
    return [low + (high - low) * i / (points - 1) for i in range(points)]


def holds(estimated: Estimate, value: float) -> bool:
    """True where the interval contains a value; an estimate without an interval contains every value."""
    low, high = estimated.low, estimated.high
    return (low is None or low <= value) and (high is None or value <= high)


def joined(names: Sequence[str], most: int = 5) -> str:
    """`a, b and 3 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

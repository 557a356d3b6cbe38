"""Quality against cost: which arms no other arm beats in both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lit_llm.config.metrics import direction


@dataclass(frozen=True)
class Point:
    """One arm."""

    arm: str
    cost: float
    value: float
    """Mean over seeds."""
    beaten_by: str | None
    """An arm that costs no more and is no worse, and is better in one of the two; None on the front."""


@dataclass(frozen=True)
class ParetoFront:
    """All arms that have a value, the cheapest first."""

    figure: str
    metric: str
    points: tuple[Point, ...]


def pareto_front(
    figure: str, metric: str, costs: Mapping[str, float], means: Mapping[str, float | None]
) -> ParetoFront:
    """The Pareto front of the arms' means. Seeds' scatter is not in it: see the differences for how sure each is."""
    sign = -1.0 if direction(metric) == "higher" else 1.0
    known = {arm: (costs[arm], sign * mean) for arm, mean in means.items() if mean is not None}

    def beaten(arm: str) -> str | None:
        cost, loss = known[arm]
        beating = [
            other for other, point in known.items() if point[0] <= cost and point[1] <= loss and point != (cost, loss)
        ]
        return min(beating, key=lambda other: (known[other][1], known[other][0])) if beating else None

    points = [Point(arm, cost, sign * loss, beaten(arm)) for arm, (cost, loss) in known.items()]
    return ParetoFront(figure, metric, tuple(sorted(points, key=lambda point: (point.cost, point.arm))))

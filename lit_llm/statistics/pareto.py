"""Pareto front of quality against cost: the arms that no other arm dominates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lit_llm.config.metrics import direction


@dataclass(frozen=True)
class Point:
    """Cost and mean of one arm."""

    arm: str
    cost: float
    value: float
    """Mean over seeds."""
    beaten_by: str | None
    """Arm that dominates this one: no costlier and no worse, and better in one of the two; None on the front."""


@dataclass(frozen=True)
class ParetoFront:
    """All arms that have a value, in ascending order of cost."""

    figure: str
    metric: str
    points: tuple[Point, ...]


def pareto_front(
    figure: str, metric: str, costs: Mapping[str, float], means: Mapping[str, float | None]
) -> ParetoFront:
    """The Pareto front of the arms' means, without regard to their scatter over seeds."""
    sign = -1.0 if direction(metric) == "higher" else 1.0
    coordinates = {arm: (costs[arm], sign * mean) for arm, mean in means.items() if mean is not None}

    def dominating_arm(arm: str) -> str | None:
        cost, loss = coordinates[arm]
        dominating = [
            other for other, (x, y) in coordinates.items() if x <= cost and y <= loss and (x, y) != (cost, loss)
        ]
        return min(dominating, key=lambda other: coordinates[other][::-1], default=None)

    points = [Point(arm, cost, sign * loss, dominating_arm(arm)) for arm, (cost, loss) in coordinates.items()]
    return ParetoFront(figure, metric, tuple(sorted(points, key=lambda point: (point.cost, point.arm))))

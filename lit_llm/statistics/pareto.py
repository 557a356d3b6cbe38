"""Quality against cost: which arms no other arm beats in both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


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
    sign = -1.0 if better(metric) == "higher" else 1.0
    known = {arm: (costs[arm], sign * mean) for arm, mean in means.items() if mean is not None}

    def beaten(arm: str) -> str | None:
        cost, loss = known[arm]
        beating = [
            other for other, point in known.items() if point[0] <= cost and point[1] <= loss and point != (cost, loss)
        ]
        return min(beating, key=lambda other: (known[other][1], known[other][0])) if beating else None

    points = [Point(arm, cost, sign * loss, beaten(arm)) for arm, (cost, loss) in known.items()]
    return ParetoFront(figure, metric, tuple(sorted(points, key=lambda point: (point.cost, point.arm))))


def better(metric: str) -> Literal["lower", "higher"] | None:
    """Which way a metric is better: losses when lower, the harness's scores and speed when higher; None for others."""
    parts = metric.split("/")
    if metric.startswith("throughput/") or ("tasks" in parts and _SCORES & {*parts}):
        return "higher"
    return "lower" if _LOSSES & {*parts} else None


_SCORES = {"acc", "acc_all", "acc_norm", "exact_match", "f1", "mcc", "bleu", "chrf", "chrf++", "likelihood"}
_LOSSES = {"target_nll", "masked_nll", "nll", "perplexity", "bits_per_byte", "objective_loss"} | {
    f"mean_over_{what}" for what in ("sources", "corpora", "tasks")
}

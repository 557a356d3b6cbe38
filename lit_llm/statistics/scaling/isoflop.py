"""IsoFLOP profiles: which size of a group has the lowest loss at equal training FLOPs?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lit_llm.statistics.estimates import evenly
from lit_llm.statistics.scaling.runs import ScalingRun

SAME_BUDGET = 1.1
"""Runs whose FLOPs differ by no more than this factor have the same budget."""


@dataclass(frozen=True)
class IsoFlop:
    """The runs of one group with the same training FLOPs, and the size of their lowest loss."""

    group: str
    train_flops: float
    sizes: int
    parameters: float | None
    """Parameters at the lowest loss, by a parabola in log parameters; None without a minimum between the sizes."""
    loss: float | None
    points: tuple[tuple[float, float], ...] = ()
    """(parameters, loss) of the runs."""
    parabola: tuple[tuple[float, float], ...] = ()
    """(parameters, loss) of the fit, from the smallest to the largest size."""


def isoflop_minima(runs: Sequence[ScalingRun]) -> Iterator[IsoFlop]:
    """Best size for each group and budget with at least three sizes (arXiv 2203.15556, section 3.2)."""
    import numpy as np

    for group in dict.fromkeys(run.group for run in runs):
        for budget in _budgets([run for run in runs if run.group == group]):
            sizes = np.log([run.parameters for run in budget])
            count, flops = len(set(sizes)), statistics.geometric_mean(run.train_flops for run in budget)
            if count < 3:
                continue
            middle = sizes.mean()
            bend, slope, level = np.polyfit(sizes - middle, [run.loss for run in budget], 2)
            lowest = -slope / (2 * bend) + middle if bend > 0 else math.inf
            places = evenly(sizes.min() - middle, sizes.max() - middle)
            drawn = [(math.exp(at + middle), float(bend * at**2 + slope * at + level)) for at in places]
            best, loss = None, None
            if sizes.min() <= lowest <= sizes.max():
                best, loss = math.exp(lowest), float(level - slope**2 / (4 * bend))
            points = tuple((run.parameters, run.loss) for run in budget)
            yield IsoFlop(group, flops, count, best, loss, points, tuple(drawn))


def _budgets(runs: Sequence[ScalingRun]) -> Iterator[list[ScalingRun]]:
    """Runs grouped by budget, in ascending order."""
    budget: list[ScalingRun] = []
    for run in sorted(runs, key=lambda run: run.train_flops):
        if budget and run.train_flops > SAME_BUDGET * budget[0].train_flops:
            yield budget
            budget = []
        budget.append(run)
    if budget:
        yield budget

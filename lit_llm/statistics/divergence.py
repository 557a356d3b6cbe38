"""Divergence as an outcome: the diverged runs of an arm and of its baseline.

Diverged runs are in no mean, so a mean is conditional on training to the end, and an arm that loses its worst runs
looks better than it is. Therefore the rates themselves are compared, by McNemar's exact test over the seeds that both
arms ran (1947, Psychometrika 12: of the seeds with which only one diverged, half are expected to be the arm's). A
difference of losses is shown with bounds, in which each diverged run counts with its loss at initialisation.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of the runs of one arm, {seed: value}."""

    values: Mapping[int, float]
    """Values of the runs that were trained to the end."""
    diverged: Mapping[int, float | None]
    """Loss before the first step of each run that diverged, None where it was not measured."""

    @property
    def ended(self) -> set[int]:
        return {*self.values, *self.diverged}


@dataclass(frozen=True)
class Divergence:
    """Diverged runs of an arm and of its baseline."""

    arm: str
    baseline: str
    diverged: int
    runs: int
    """Runs that ended, diverged ones included."""
    baseline_diverged: int
    baseline_runs: int
    p: float | None
    """Two-sided p-value of equal rates; None without a seed that both have run."""
    bounds: tuple[float, float] | None
    """Least and greatest difference of the mean losses, with diverged runs counted at their loss at initialisation.
    None where that was not measured or the metric is not a loss."""


def divergences(
    outcomes: Mapping[str, Outcomes], baselines: Mapping[str, str], is_loss: bool
) -> tuple[Divergence, ...]:
    """Every arm that lost a run to divergence, or whose baseline did. baselines: {arm: the arm it is compared with}."""
    return tuple(_divergences(outcomes, baselines, is_loss))


def _divergences(outcomes: Mapping[str, Outcomes], baselines: Mapping[str, str], is_loss: bool) -> Iterator[Divergence]:
    for arm, one in outcomes.items():
        baseline = baselines[arm]
        other = outcomes.get(baseline)
        if arm == baseline or other is None or not (one.diverged or other.diverged):
            continue
        counts = (len(one.diverged), len(one.ended), len(other.diverged), len(other.ended))
        yield Divergence(arm, baseline, *counts, mcnemar(one, other), _bounds(one, other) if is_loss else None)


def mcnemar(one: Outcomes, other: Outcomes) -> float | None:
    """Two-sided exact p-value that both diverge equally often, over the seeds that both ran; None without one."""
    from scipy.stats import binomtest

    shared = one.ended & other.ended
    if not shared:
        return None
    alone = len(shared & one.diverged.keys() - other.diverged.keys())
    others = len(shared & other.diverged.keys() - one.diverged.keys())
    return float(binomtest(alone, alone + others).pvalue) if alone + others else 1.0


def _bounds(one: Outcomes, other: Outcomes) -> tuple[float, float] | None:
    shared = one.ended & other.ended
    ends = [_mean_range(outcomes, shared) for outcomes in (one, other)]
    if ends[0] is None or ends[1] is None:
        return None
    (best, worst), (other_best, other_worst) = ends[0], ends[1]
    return best - other_worst, worst - other_best


def _mean_range(outcomes: Outcomes, seeds: set[int]) -> tuple[float, float] | None:
    """Mean loss with each diverged run at the arm's lowest loss, and at its loss at initialisation."""
    lost = [outcomes.diverged[seed] for seed in seeds & outcomes.diverged.keys()]
    finished = [outcomes.values[seed] for seed in seeds & outcomes.values.keys()]
    worst = [value for value in lost if value is not None]
    if not finished or len(worst) < len(lost):
        return None
    low = statistics.fmean([*finished, *[min(finished)] * len(lost)])
    return low, statistics.fmean([*finished, *worst])

"""Fit of a power law to the sizes of one group, with draws of the law."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_llm.statistics.scaling.isoflop import SAME_BUDGET
from lit_llm.statistics.scaling.laws import Laws
from lit_llm.statistics.scaling.runs import Scale
from lit_llm.statistics.scaling.size_means import (
    LackOfFit,
    Size,
    deviation_draws,
    lack_of_fit,
    luck_draws,
    means_of,
    model_draws,
    size_weights,
)


@dataclass(frozen=True)
class GroupFit:
    """The power law of one group's sizes, with draws of the law."""

    sizes: Sequence[Size]
    log_x: Any
    law: Laws
    """The fitted law, one row."""
    drawn: Laws | None
    """One row per draw, without the common effects of seeds and models; None without degrees of freedom."""
    seeds_share: Any
    """Draws of the common effect of the seeds on every size."""
    models_share: Any
    """Draws of the common effect of the models on every size."""
    residuals: Any
    """Residuals of the size means, in log loss."""
    numbers: int
    """Number of fitted parameters."""
    lack: LackOfFit | None

    @property
    def level(self) -> Any:
        """Draws of the common effect of seeds and models on every size."""
        return self.seeds_share + self.models_share

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the largest log x."""
        return float(self.log_x.min()), float(self.log_x.max())


def fit_sizes(sizes: Sequence[Size], x: Scale, irreducible: bool, draws: int, random: Any) -> GroupFit:
    """Fit the law to the means of the sizes, and draw laws from its uncertainty.

    Raises:
        ValueError: fewer different x than parameters.
    """
    import numpy as np

    log_x, means = np.array([size.logs[x] for size in sizes]), means_of(sizes)
    numbers = numbers_of(irreducible)
    if different(log_x) < numbers:
        raise ValueError(f"a power law {'with E ' if irreducible else ''}needs {numbers} different x or more")
    law, residuals = _fitted(log_x, means, np.ones(len(sizes)), irreducible)
    weights = size_weights(sizes, residuals, numbers)
    if (weights < 1).any():
        law, residuals = _fitted(log_x, means, weights, irreducible)
    deviations = deviation_draws(residuals, weights, numbers, draws, random)
    drawn = None
    if deviations is not None:
        drawn = Laws.fit(log_x, law.log_loss(log_x) + deviations, weights, irreducible, near=law)
    counts = np.array([size.count for size in sizes], float)
    even = (counts == counts[0]).all()
    by_run = residuals if even else _fitted(log_x, means, counts, irreducible)[1]
    lack = lack_of_fit(sizes, by_run, numbers)
    shares = luck_draws(sizes, (), draws, random), model_draws(sizes, residuals, draws, random)
    return GroupFit(sizes, log_x, law, drawn, *shares, residuals, numbers, lack)


def _fitted(log_x: Any, means: Any, weights: Any, irreducible: bool) -> tuple[Laws, Any]:
    law = Laws.fit(log_x, means[None], weights, irreducible)
    return law, means - law.log_loss(log_x)[0]


def numbers_of(irreducible: bool) -> int:
    """Number of parameters of a power law: A and a, and E where it has one."""
    return 3 if irreducible else 2


def different(log_x: Any) -> int:
    """Number of x that differ by more than the factor `SAME_BUDGET`."""
    count, last = 0, -math.inf
    for value in sorted(log_x):
        if value > last + math.log(SAME_BUDGET):
            count, last = count + 1, value
    return count

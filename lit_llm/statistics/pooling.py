"""Pooled variance of all arms: the additive model arm + seed of a randomised block design.

An opt-in (`compare.variance: pooled`). It assumes that all arms have one variance and that a seed has one effect on all
of them. Where this holds, intervals are narrow. Where a family, an arm or the baseline differs, a 95% interval covers
as little as 61% (docs/statistics.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_llm.statistics.paired import Values


def pooled_variance(arms: Sequence[Values]) -> tuple[float, int] | None:
    """(residual variance, degrees of freedom) of the model arm + seed; runs may be missing.

    None for fewer than two arms or two seeds, or without degrees of freedom.
    """
    import numpy as np

    seeds = sorted({seed for values in arms for seed in values})
    cells = [(arm, seeds.index(seed), value) for arm, values in enumerate(arms) for seed, value in values.items()]
    if len(arms) < 2 or len(seeds) < 2:
        return None
    design = np.zeros((len(cells), len(arms) + len(seeds)))
    for row, (arm, seed, _) in enumerate(cells):
        design[row, arm] = design[row, len(arms) + seed] = 1.0
    y = np.array([value for _, _, value in cells])
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    degrees = len(cells) - int(rank)
    if degrees < 1:
        return None
    return float(((y - design @ solution) ** 2).sum()) / degrees, degrees

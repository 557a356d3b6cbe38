"""The sizes of a scaling study: means over seeds, deviations from a law, and draws of a law.

Runs of one size share the deviation of that size from a power law, so they are no independent evidence of the law: the
unit of resampling is the size (the cluster of its seeds). A law is fitted to the means of the sizes. The variance of
these means about the law, with (sizes - fitted parameters) degrees of freedom, includes both the variance over seeds
and the lack of fit.

With four to seven sizes a bootstrap over sizes degenerates: there are too few different samples, many of only two
sizes. Instead, the deviations of the sizes are drawn from a normal distribution. Its variance is drawn too (residual
sum of squares over a chi-square variate), and the law is fitted again to each draw. For a law without E the interval of
the exponent is then Student's t on the size means, exactly; other intervals are generalised confidence intervals
(Weerahandi 1993, J. Am. Stat. Assoc. 88; Hannig, Iyer, Patterson 2006, J. Am. Stat. Assoc. 101). Sizes with unequal
numbers of seeds are weighted as in a random-effects meta-regression with the variance of Knapp and Hartung (2003, Stat.
Med. 22).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Size:
    """The runs of one arm over its seeds."""

    name: str
    logs: Mapping[str, float]
    """Logarithm of each scale (train_flops, parameters, tokens, seconds), mean over the runs."""
    log_losses: Mapping[int, float]
    """{seed: log loss}"""
    seconds_squares: float = 0.0
    """Sum of squared deviations of the runs' log seconds from their mean."""
    model: str = ""
    """Sizes of one model (a named arm at several budgets) may share a deviation from a law."""

    @property
    def count(self) -> int:
        return len(self.log_losses)

    @property
    def mean(self) -> float:
        return sum(self.log_losses.values()) / self.count

    @property
    def squares(self) -> float:
        """Sum of squared deviations of the seeds' log losses from their mean."""
        return sum((value - self.mean) ** 2 for value in self.log_losses.values())


def means_of(sizes: Sequence[Size]) -> Any:
    """Mean log loss of each size."""
    import numpy as np

    return np.array([size.mean for size in sizes])


def seed_variance(sizes: Sequence[Size]) -> tuple[float, int]:
    """(variance of log losses over the seeds of a size, degrees of freedom), pooled over sizes; (0, 0) for one seed."""
    degrees = sum(size.count - 1 for size in sizes)
    return (sum(size.squares for size in sizes) / degrees, degrees) if degrees else (0.0, 0)


def seconds_variance(sizes: Sequence[Size]) -> tuple[float, int]:
    """(variance of log seconds over the runs of a size, degrees of freedom), pooled over sizes; (0, 0) for one run."""
    degrees = sum(size.count - 1 for size in sizes)
    return (sum(size.seconds_squares for size in sizes) / degrees, degrees) if degrees else (0.0, 0)


def size_weights(sizes: Sequence[Size], residuals: Any, numbers: int) -> Any:
    """Weights of the size means, 1 for the most precise, from the residuals of an unweighted fit of `numbers`
    parameters.

    The variance of a mean is the variance of the lack of fit plus (variance over seeds / number of seeds). With equal
    numbers of seeds all weights are 1.
    """
    import numpy as np

    counts = np.array([size.count for size in sizes], float)
    within, _ = seed_variance(sizes)
    if within <= 0 or (counts == counts[0]).all() or len(sizes) <= numbers:
        return np.ones(len(sizes))
    total = float((residuals**2).sum()) / (len(sizes) - numbers)
    between = max(0.0, total - within * float((1 / counts).mean()))
    variances = between + within / counts
    return variances.min() / variances


def deviation_draws(residuals: Any, weights: Any, numbers: int, draws: int, random: Any) -> Any:
    """Draws of the deviations of size means from their law: draws x sizes; None without degrees of freedom.

    residuals: of the size means, for a fit of `numbers` parameters with these weights.
    """
    degrees = len(residuals) - numbers
    if degrees < 1:
        return None
    squares = float((weights * residuals**2).sum())
    deviations = (squares / random.chisquare(degrees, draws)) ** 0.5
    return deviations[:, None] * random.normal(size=(draws, len(residuals))) / weights**0.5


def shared_seeds(*groups: Sequence[Size]) -> list[int]:
    """Seeds that every size of these groups has."""
    return sorted(set.intersection(*(set(size.log_losses) for group in groups for size in group)))


PRIOR = 0.5
"""Prior degrees of freedom, from independent runs, of the variance of the seeds' mean differences."""


def luck_draws(sizes: Sequence[Size], others: Sequence[Size], draws: int, random: Any) -> Any:
    """Draws of the common effect of the seeds on all sizes of a group, minus that on another group with the same seeds.

    This effect is not in the scatter of size means about their law. Its variance is the variance of the seeds' mean
    differences, moderated by half a degree of freedom, minus the variance expected from independent runs (a generalised
    pivot: never below zero). Zero with fewer than two shared seeds, which do not identify it.

    others: sizes of the other group; empty for one group alone.
    """
    import numpy as np

    groups = [group for group in (sizes, others) if group]
    seeds = shared_seeds(*groups)
    if len(seeds) < 2:
        return np.zeros(draws)
    difference, noise, expected = np.zeros(len(seeds)), np.zeros(draws), 0.0
    for sign, group in zip((1.0, -1.0), groups, strict=False):
        table = np.array([[size.log_losses[seed] for seed in seeds] for size in group])
        table = table - table.mean(axis=1, keepdims=True)
        shared = table.mean(axis=0)
        difference += sign * shared
        degrees = (len(seeds) - 1) * (len(group) - 1)
        if degrees:
            squares = float(((table - shared) ** 2).sum()) / len(group)
            noise += squares / random.chisquare(degrees, draws)
            expected += squares / degrees
    moderated_squares = (difference**2).sum() + PRIOR * expected
    total = moderated_squares / random.chisquare(len(seeds) - 1 + PRIOR, draws)
    return random.normal(size=draws) * np.sqrt(np.maximum(0.0, total - noise) / len(seeds))


def model_draws(sizes: Sequence[Size], residuals: Any, draws: int, random: Any) -> Any:
    """Draws of the common effect of the models on all their sizes, as a mean over the models.

    Where each of several models is trained at several budgets, a model that is good or bad at all of them is one
    deviation, not one per budget. Its variance is the variance of the models' mean residuals, minus the variance
    expected from independent sizes (a generalised pivot: never below zero). Zero where each size is a model, or all
    sizes are one.
    """
    import numpy as np

    names = list(dict.fromkeys(size.model or size.name for size in sizes))
    groups = [residuals[[(size.model or size.name) == name for size in sizes]] for name in names]
    inner = len(sizes) - len(groups)
    if len(groups) < 2 or inner < 1:
        return np.zeros(draws)
    means = np.array([group.mean() for group in groups])
    within = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    total = float(((means - means.mean()) ** 2).sum()) / random.chisquare(len(groups) - 1, draws)
    noise = within / random.chisquare(inner, draws) * np.mean([1 / len(group) for group in groups])
    return random.normal(size=draws) * np.sqrt(np.maximum(0.0, total - noise) / len(groups))


@dataclass(frozen=True)
class LackOfFit:
    """F test of a law against free means of the sizes: do the sizes deviate from it by more than seeds explain?"""

    f: float
    p: float
    degrees: tuple[int, int]
    """Degrees of freedom of the lack of fit and of the variance over seeds."""
    deviation: float
    """Standard deviation of the sizes about the law beyond the seeds' scatter, relative to the loss."""


def lack_of_fit(sizes: Sequence[Size], residuals: Any, numbers: int) -> LackOfFit | None:
    """The classical lack-of-fit test from replicates; None without replicates or without spare sizes.

    residuals: of the size means, for the fit to all runs, in which the weight of a size is its number of seeds.
    """
    import numpy as np
    from scipy.special import fdtrc

    within, inner = seed_variance(sizes)
    outer = len(sizes) - numbers
    if not inner or within <= 0 or outer < 1:
        return None
    counts = np.array([size.count for size in sizes], float)
    between = float((counts * residuals**2).sum()) / outer
    deviation = (max(0.0, between - within) / float(counts.mean())) ** 0.5
    f = between / within
    return LackOfFit(f, float(fdtrc(outer, inner, f)), (outer, inner), deviation)

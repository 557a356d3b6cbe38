"""Many comparisons at once: p-values and intervals that hold for all of them.

Of twenty true zeros one looks like an effect at 5%. Holm's and Dunnett's procedures bound the chance that any does (the
family-wise error rate), Benjamini's and Hochberg's the share of false ones among those found (the false discovery
rate). Dunnett's (1955, J. Am. Stat. Assoc. 50) is for several arms against one baseline with a pooled variance: it
knows that their differences share the baseline, so it gives away less than Holm's, and it has intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

Correction = Literal["none", "holm", "fdr_bh", "dunnett"]


def two_sided_p(t: float, degrees: float) -> float:
    """Of Student's t; of an infinite one 0."""
    from scipy.special import stdtr  # scipy.stats, which stands on it, takes a hundred times as long

    return float(2 * stdtr(degrees, -abs(t)))


@lru_cache
def two_sided_critical(level: float, degrees: float) -> float:
    """What |t| exceeds with this probability."""
    from scipy.special import stdtrit

    return float(-stdtrit(degrees, level / 2))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: those below 5% are the ones that Holm's procedure rejects (1979, Scand. J. Stat. 6)."""
    adjusted, highest = {}, 0.0
    for passed, name in enumerate(sorted(p, key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - passed) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}


def fdr_bh(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of Benjamini and Hochberg (1995, J. R. Stat. Soc. B 57)."""
    from scipy.stats import false_discovery_control

    return dict(zip(p, map(float, false_discovery_control(list(p.values()))), strict=True)) if p else {}


def dunnett_p(t: float, arms: int, degrees: float) -> float:
    """The probability that any of so many arms, none of which differs from the baseline, has a |t| of this or more.

    degrees: of the variance that is pooled over the arms and the baseline, which have equally many runs.
    """
    import numpy as np
    from scipy.special import ndtr

    # Given the baseline's deviation z and the standard deviation s, the arms are independent; both are integrated over.
    z, z_weight, s, s_weight = _nodes(degrees)
    window_sides = math.sqrt(2) * abs(t) * s[:, None]
    inside = (ndtr(z + window_sides) - ndtr(z - window_sides)) ** arms
    return float(np.clip(s_weight @ (1 - inside) @ z_weight, 0, 1))


@lru_cache
def dunnett_critical(level: float, arms: int, degrees: float) -> float:
    """What no |t| of so many arms without a difference exceeds, but with this probability."""
    from scipy.optimize import brentq

    # Between the critical value of one arm and that of Bonferroni.
    low, high = two_sided_critical(level, degrees), two_sided_critical(level / arms, degrees)
    if arms == 1:
        return low
    return float(brentq(lambda t: dunnett_p(t, arms, degrees) - level, low * 0.99, high * 1.01))


@lru_cache
def _nodes(degrees: float) -> tuple[Any, Any, Any, Any]:
    """Gauss' quadrature, nodes and weights, over a standard normal and over the root of chi-square by its degrees."""
    import numpy as np
    from scipy.stats import chi2

    z, z_weight = np.polynomial.hermite_e.hermegauss(96)
    u, u_weight = np.polynomial.legendre.leggauss(96)
    return z, z_weight / z_weight.sum(), np.sqrt(chi2.ppf((u + 1) / 2, degrees) / degrees), u_weight / 2

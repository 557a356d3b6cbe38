"""Multiple comparisons: p-values and intervals that hold for all of them together.

At 5%, one of twenty true zeros looks like an effect. The procedures of Holm and Dunnett bound the chance of any false
call (the family-wise error rate). The procedure of Benjamini and Hochberg bounds the share of false ones among the
calls (the false discovery rate). Dunnett's (1955, J. Am. Stat. Assoc. 50) is for several arms against one baseline with
a pooled variance. It uses that the differences share the baseline, so it has more power than Holm's, and it has
intervals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

Correction = Literal["none", "holm", "fdr_bh", "dunnett"]
AUTHORS: Mapping[Correction, str] = {"holm": "Holm", "fdr_bh": "Benjamini and Hochberg", "dunnett": "Dunnett"}
"""{correction: authors of its method}"""


def two_sided_p(t: float, degrees: float) -> float:
    """Two-sided p-value of Student's t; 0 for an infinite t."""
    from scipy.special import stdtr  # scipy.stats.t takes a hundred times as long

    return float(2 * stdtr(degrees, -abs(t)))


@lru_cache
def two_sided_critical(level: float, degrees: float) -> float:
    """Critical value that |t| exceeds with probability `level`."""
    from scipy.special import stdtrit

    return float(-stdtrit(degrees, level / 2))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of Holm's procedure (1979, Scand. J. Stat. 6), which rejects those below the level."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}


def fdr_bh(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values of Benjamini and Hochberg (1995, J. R. Stat. Soc. B 57)."""
    from scipy.stats import false_discovery_control

    return dict(zip(p, map(float, false_discovery_control(list(p.values()))), strict=True)) if p else {}


def dunnett_p(t: float, arms: int, degrees: float) -> float:
    """Probability that any of `arms` arms without a difference from the baseline has |t| or more (Dunnett).

    degrees: degrees of freedom of the variance pooled over the arms and the baseline, which have equally many runs.
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
    """Critical value that any |t| of `arms` arms without a difference exceeds with probability `level` (Dunnett)."""
    from scipy.optimize import brentq

    # Between the critical value of one arm and that of Bonferroni.
    low, high = two_sided_critical(level, degrees), two_sided_critical(level / arms, degrees)
    if arms == 1:
        return low
    return float(brentq(lambda t: dunnett_p(t, arms, degrees) - level, low * 0.99, high * 1.01))


@lru_cache
def _nodes(degrees: float) -> tuple[Any, Any, Any, Any]:
    """Nodes and weights of Gaussian quadrature over a standard normal, and over the root of (chi-square / degrees)."""
    import numpy as np
    from scipy.stats import chi2

    z, z_weight = np.polynomial.hermite_e.hermegauss(96)
    u, u_weight = np.polynomial.legendre.leggauss(96)
    return z, z_weight / z_weight.sum(), np.sqrt(chi2.ppf((u + 1) / 2, degrees) / degrees), u_weight / 2

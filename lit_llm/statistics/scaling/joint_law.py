"""The law of parameters and tokens, L = E + A N^-a + B D^-b (Hoffmann et al. 2022, arXiv 2203.15556, approach 3).

It needs sizes in which parameters N and tokens D vary independently. With one ratio of tokens to parameters, or if one
of the two hardly varies, their terms are not identified, and no law is given.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_llm.statistics.estimates import Estimate, estimate, exponentials
from lit_llm.statistics.scaling.laws import fit_sums
from lit_llm.statistics.scaling.size_means import LackOfFit, Size, deviation_draws, lack_of_fit, means_of, size_weights

NUMBERS = 5
"""E, A, a, B, b."""
SPREAD = 2.0
"""Smallest factor from the least to the largest N, and D, that identifies the law."""
ALIKE = 0.95
"""Largest correlation of log N with log D that identifies the law."""
SHARES, EXPONENTS = (0.0, 0.3, 0.6, 0.9), (0.1, 0.3, 0.6)
"""Starting values of the search: E as a share of the lowest loss, a, b."""


@dataclass(frozen=True)
class JointLaw:
    """The law of one group. Estimates have no intervals without degrees of freedom."""

    group: str
    sizes: int
    irreducible: Estimate
    """E."""
    parameters_coefficient: Estimate
    """A."""
    parameters_exponent: Estimate
    """a, of N."""
    tokens_coefficient: Estimate
    """B."""
    tokens_exponent: Estimate
    """b, of D."""
    best_size_exponent: Estimate
    """b / (a + b): the best N grows with this power of the compute N D."""
    scatter: float
    """Standard deviation of the size means about the law, relative to the loss; 0 without degrees of freedom."""
    lack_of_fit: LackOfFit | None = None

    def at(self, parameters: float, tokens: float) -> float:
        """Loss of a model with this number of parameters after this number of tokens."""
        by_size = self.parameters_coefficient.value * parameters**-self.parameters_exponent.value
        return self.irreducible.value + by_size + self.tokens_coefficient.value * tokens**-self.tokens_exponent.value


def joint_laws(
    members: Mapping[str, Sequence[Size]], draws: int, random: Any
) -> tuple[tuple[JointLaw, ...], tuple[str, ...]]:
    """(the law of each group whose sizes identify it, notes on the others). members: {group: its sizes}."""
    laws, reasons = [], dict[str, list[str]]()
    for group, sizes in members.items():
        if reason := unidentified(sizes):
            reasons.setdefault(reason, []).append(group)
        else:
            laws.append(joint_law(group, sizes, draws, random))
    return tuple(laws), tuple(
        f"no law E + A/N^a + B/D^b of {', '.join(groups)}: {reason}" for reason, groups in reasons.items()
    )


def unidentified(sizes: Sequence[Size]) -> str:
    """Reason why these sizes do not identify the law; '' where they do."""
    import numpy as np

    if len(sizes) < NUMBERS:
        return f"it has {NUMBERS} numbers, and there are {len(sizes)} sizes"
    logs = {name: np.array([size.logs[name] for size in sizes]) for name in ("parameters", "tokens")}
    for name, values in logs.items():
        spread, different = math.exp(values.max() - values.min()), len(set(np.round(values, 6)))
        if spread < SPREAD:
            return f"{name} vary {spread:.2g} times, and it needs {SPREAD:g}"
        if different < 3:
            return f"{name} have {different} values, and it needs 3"
    together = float(np.corrcoef(logs["parameters"], logs["tokens"])[0, 1])
    if abs(together) > ALIKE:
        return f"parameters and tokens vary together (correlation {together:.2f} of their logarithms)"
    return ""


def joint_law(group: str, sizes: Sequence[Size], draws: int, random: Any) -> JointLaw:
    """The law of sizes that identify it, with intervals in which each size counts once."""
    import numpy as np

    logs = np.array([[size.logs["parameters"], size.logs["tokens"]] for size in sizes])
    middle = logs.mean(axis=0)
    u, means = logs - middle, means_of(sizes)
    fitted = _fit(u, means, np.ones(len(sizes)))
    weights = size_weights(sizes, means - _losses(u, fitted)[0], NUMBERS)
    if (weights < 1).any():
        fitted = _fit(u, means, weights)
    curve = _losses(u, fitted)[0]
    drawn, deviations = None, deviation_draws(means - curve, weights, NUMBERS, draws, random)
    if deviations is not None:
        drawn = fit_sums(u, curve + deviations, weights, [np.repeat(fitted, draws, axis=0)])
    counts = np.array([size.count for size in sizes], float)
    even = (counts == counts[0]).all()
    by_run = means - (curve if even else _losses(u, _fit(u, means, counts))[0])
    degrees = len(sizes) - NUMBERS

    def number(of: Any) -> Estimate:
        return estimate(float(of(fitted)[0]), None if drawn is None else of(drawn))

    return JointLaw(
        group,
        len(sizes),
        exponentials(number(lambda p: p[:, 0])),
        exponentials(number(lambda p: p[:, 1] + p[:, 2] * middle[0])),
        number(lambda p: p[:, 2]),
        exponentials(number(lambda p: p[:, 3] + p[:, 4] * middle[1])),
        number(lambda p: p[:, 4]),
        number(_best_size),
        float(((means - curve) ** 2).sum() / degrees) ** 0.5 if degrees else 0.0,
        lack_of_fit(sizes, by_run, NUMBERS),
    )


def _best_size(numbers: Any) -> Any:
    import numpy as np

    with np.errstate(invalid="ignore"):
        return numbers[:, 4] / (numbers[:, 2] + numbers[:, 4])


def _fit(u: Any, means: Any, weights: Any) -> Any:
    """Best fit over searches from many starting values: 1 x numbers."""
    import numpy as np

    starts = []
    losses = np.exp(means)
    for share, a, b in itertools.product(SHARES, EXPONENTS, EXPONENTS):
        floor = share * losses.min()
        powers = np.exp(-u * [a, b])
        scales = np.linalg.lstsq(powers, losses - floor, rcond=None)[0]
        scales = np.maximum(scales, 0.01 * losses.mean())
        starts.append(np.array([[math.log(max(floor, 1e-5 * losses.min())), *_pairs(np.log(scales), (a, b))]]))
    return fit_sums(u, means[None], weights, starts)


def _pairs(scales: Any, exponents: tuple[float, float]) -> list[float]:
    return [float(value) for pair in zip(scales, exponents, strict=True) for value in pair]


def _losses(u: Any, numbers: Any) -> Any:
    """log loss of each law at each size: rows x sizes."""
    import numpy as np

    total = np.broadcast_to(numbers[:, :1], (len(numbers), len(u)))
    for k in range(u.shape[1]):
        total = np.logaddexp(total, numbers[:, 1 + 2 * k, None] - numbers[:, 2 + 2 * k, None] * u[:, k])
    return total

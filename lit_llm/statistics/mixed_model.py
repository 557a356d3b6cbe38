"""Differences of a study's arms by a linear mixed model, an opt-in that pools all arms of a study.

The model is y[arm, seed] = arm + seed + family x seed + residual. Arms are fixed effects; seeds, and the reaction of a
family of architectures to a seed, are random. Variances are estimated by restricted maximum likelihood, and each
difference has Satterthwaite's degrees of freedom, as in R's lme4 and lmerTest (Kuznetsova, Brockhoff and Christensen
2017, J. Stat. Softw. 82(13); Fai and Cornelius 1996, J. Stat. Comput. Simul. 54). A missing run costs that run only:
an arm is compared over all its runs, and runs whose seed the baseline lacks have less weight.

It assumes that all arms have one residual variance, that the reactions of all families have one variance, and that the
families are specified correctly. Where this holds, intervals are narrower than those of paired t tests. Where it does
not, they are too narrow. Simulated coverage of nominal 95% intervals: .78 at 8 arms and .64 at 60 where an arm or the
baseline has three times the standard deviation of the others, .90 where two families are not specified.
More seeds do not help. `benchmarks/coverage_paired.py` has the table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LOG_ZERO = -16.0
"""Logarithm of (variance / residual variance) below which a variance counts as zero."""
STARTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 7.0, 12.0)
"""Starting values of each logarithm; the search starts at the best few of their combinations."""
BEST_STARTS = 3
NO_WORSE = 1e-7
"""Least decrease of the deviance for which a variance counts as different from zero."""
NO_RESIDUAL = 1e-12
"""Share of the sum of squares around the arms' means that counts as rounding error."""
FLAT = 1e-8
"""Curvature of the deviance, in log variances, below which a direction is not identified; lmerTest's tolerance."""


@dataclass(frozen=True)
class VarianceComponents:
    """Estimated variances, in the squared unit of the metric."""

    seed: float
    """Variance of the effect of a seed on all arms."""
    family_seed: float | None
    """Variance of the effect of a seed on one family; None where it is not identified."""
    residual: float

    @property
    def note(self) -> str:
        """The standard deviations in words, for a table's notes."""
        family = "" if self.family_seed is None else f", family × seed {math.sqrt(self.family_seed):.3g}"
        return (
            f"mixed model, standard deviations: seed {math.sqrt(self.seed):.3g}{family}, "
            f"residual {math.sqrt(self.residual):.3g}; assumes that all arms scatter alike"
        )


@dataclass(frozen=True)
class MixedEstimate:
    """An arm's mean minus its baseline's, by the mixed model of the study."""

    mean: float
    error: float
    """Standard error of the mean."""
    degrees: float
    """Satterthwaite's degrees of freedom of the standard error."""
    components: VarianceComponents
    """The same for all arms of a study."""


def mixed_differences(
    values: Mapping[str, Mapping[int, float]], baseline: str, families: Mapping[str, str]
) -> dict[str, MixedEstimate | None]:
    """Difference of every arm from the baseline by one mixed model of all arms.

    Args:
        values: {arm: {seed: value}}, the baseline's among them. Arms with the same values count as one arm: they share
            their runs.
        baseline: the arm that all others are compared with.
        families: {arm: family}. Family x seed is left out where all arms have one family, or no two arms share one.

    Returns:
        An estimate for every arm but the baseline. None for an arm that shares no seed with the baseline, and for all
        arms where the variances cannot be estimated: one seed, or values without any residual.
    """
    others = [arm for arm in values if arm != baseline]
    runs: dict[tuple[tuple[int, float], ...], str] = {}
    for arm in [baseline, *others]:
        if values.get(arm):
            runs.setdefault(tuple(sorted(values[arm].items())), arm)
    arms = list(runs.values())
    same_runs = {arm: runs.get(tuple(sorted(values[arm].items()))) for arm in others}
    comparable = {arm for arm in others if values[arm].keys() & values.get(baseline, {}).keys()}
    model = _Model.of({arm: values[arm] for arm in arms}, families) if comparable else None
    fit = None if model is None else model.fit()
    if model is None or fit is None:
        return dict.fromkeys(others)
    estimates = {arm: model.difference(fit, arms.index(arm)) for arm in comparable.intersection(arms)}
    nothing = MixedEstimate(0.0, 0.0, float(model.degrees), model.components(fit))
    estimates[baseline] = nothing  # for arms that share their runs with the baseline
    return {arm: estimates[str(same_runs[arm])] if arm in comparable else None for arm in others}


@dataclass(frozen=True)
class _Fit:
    """The maximum of the restricted likelihood."""

    ratios: Any
    """Variance of seed, and of family x seed, over the residual variance."""
    residual: float
    shrinkage: Any
    """T of `_Model._at`."""
    curvature: tuple[Any, Any]
    """Positive eigenvalues, and eigenvectors in rows, of the deviance's second derivatives by the logarithms of the
    ratios and of the residual variance."""


@dataclass(frozen=True)
class _Model:
    """The data of a mixed model, reduced to matrices of the size of its few random effects.

    With Z for random effects and X for arms, M = I - X (X'X)^-1 X' subtracts each arm's mean. Restricted maximum
    likelihood needs only Z'MZ, Z'My and y'My.
    """

    cross: Any
    """Z'MZ, [effect, effect]."""
    projected: Any
    """Z'My, [effect]."""
    squares: float
    """y'My, the sum of squares around the arms' means."""
    degrees: int
    """Number of runs minus number of arms."""
    means: Any
    """Each arm's mean, [arm]."""
    shares: Any
    """Z'X (X'X)^-1: share of an arm's runs in which an effect takes part, [effect, arm]."""
    counts: Any
    """Number of runs of each arm."""
    blocks: tuple[slice, ...]
    """Indices of the effects of seed, and of family x seed."""

    @classmethod
    def of(cls, values: Mapping[str, Mapping[int, float]], families: Mapping[str, str]) -> _Model | None:
        """The model of these runs; None where no seed has two arms, or no arm two seeds."""
        import numpy as np

        cells = [(number, arm, seed) for number, arm in enumerate(values) for seed in values[arm]]
        seeds = {seed: at for at, seed in enumerate(sorted({seed for _, _, seed in cells}))}
        pairs = {pair: at for at, pair in enumerate(dict.fromkeys((families[arm], seed) for _, arm, seed in cells))}
        x, z_seed, z_family = (np.zeros((len(cells), size)) for size in (len(values), len(seeds), len(pairs)))
        for row, (number, arm, seed) in enumerate(cells):
            x[row, number] = z_seed[row, seeds[seed]] = z_family[row, pairs[families[arm], seed]] = 1
        y = np.array([values[arm][seed] for _, arm, seed in cells])
        counts = x.sum(axis=0)
        means = x.T @ y / counts
        for parts in ((z_seed, z_family), (z_seed,)) if len(pairs) > len(seeds) else ((z_seed,),):
            centred = [part - x @ (x.T @ part / counts[:, None]) for part in parts]
            if _distinguishable(centred, len(cells) - len(values)):
                break
        else:
            return None
        z, mz, my = np.hstack(parts), np.hstack(centred), y - x @ means
        ends = np.cumsum([0, *(part.shape[1] for part in parts)])
        blocks = tuple(slice(int(a), int(b)) for a, b in itertools.pairwise(ends))
        degrees = len(cells) - len(values)
        return cls(mz.T @ mz, mz.T @ my, float(my @ my), degrees, means, z.T @ x / counts, counts, blocks)

    def fit(self) -> _Fit | None:
        """Maximum of the restricted likelihood, variances of zero included; None where it has none.

        A maximum at the boundary is the inner maximum of the model without that variance. So the model with the lowest
        deviance is chosen, and among equal ones the model with the fewest variances.
        """
        import numpy as np

        effects_fixed = self.projected @ np.linalg.pinv(self.cross, rcond=1e-10, hermitian=True) @ self.projected
        if self.squares - effects_fixed <= NO_RESIDUAL * self.squares:
            return None
        best = np.zeros(len(self.blocks))
        lowest = self.deviance(best)
        for inner in [[0]] if len(self.blocks) == 1 else [[0], [1], [0, 1]]:
            logs = self._inner_maximum(inner)
            ratios = np.zeros(len(self.blocks))
            ratios[inner] = np.exp(logs)
            if min(logs) > LOG_ZERO and (deviance := self.deviance(ratios)) < lowest - NO_WORSE:
                best, lowest = ratios, deviance
        _, _, remaining, shrinkage = self._at(best)
        values, vectors = np.linalg.eigh(self._curvature(best, remaining / self.degrees, shrinkage))
        curved = values > FLAT
        return _Fit(best, float(remaining) / self.degrees, shrinkage, (values[curved], vectors.T[curved]))

    def _inner_maximum(self, inner: Sequence[int]) -> Any:
        """Logarithms of these ratios at the lowest deviance, all other ratios zero."""
        import numpy as np
        from scipy.optimize import minimize

        def ratios(logs: Any) -> Any:
            every = np.zeros(len(self.blocks))
            every[inner] = np.exp(logs)
            return every

        def deviance(logs: Any) -> tuple[float, Any]:
            at, slopes, _, _ = self._at(ratios(logs))
            return at, (slopes * ratios(logs))[inner]

        def curvature(logs: Any) -> Any:
            _, slopes, remaining, shrinkage = self._at(ratios(logs))
            second = self._curvature(ratios(logs), remaining / self.degrees, shrinkage)
            along = second[:-1, -1]  # the residual variance follows the ratios
            second = second[:-1, :-1] - np.outer(along, along) / self.degrees + np.diag(slopes * ratios(logs))
            return second[np.ix_(inner, inner)]

        starts = sorted(itertools.product(STARTS, repeat=len(inner)), key=lambda logs: deviance(logs)[0])
        options: Any = {"gtol": 1e-7, "max_trust_radius": 4.0, "maxiter": 60}
        searches = [
            minimize(deviance, np.array(start), jac=True, hess=curvature, method="trust-exact", options=options)
            for start in starts[:BEST_STARTS]
        ]
        return min(searches, key=lambda search: search.fun).x

    def deviance(self, ratios: Any) -> float:
        """Minus twice the restricted log-likelihood up to a constant, maximised over the residual variance."""
        return float(self._at(ratios)[0])

    def _at(self, ratios: Any) -> tuple[float, Any, float, Any]:
        """(deviance, its derivatives by the ratios, remaining sum of squares, shrinkage matrix T).

        T = (G^-1 + Z'MZ)^-1 where G has the ratio of every effect, computed so that G may have zeros.
        """
        import numpy as np

        root = np.sqrt(np.repeat(ratios, [block.stop - block.start for block in self.blocks]))
        inner = np.eye(len(root)) + root[:, None] * self.cross * root
        shrinkage = root[:, None] * np.linalg.inv(inner) * root
        left = self.projected - self.cross @ shrinkage @ self.projected
        remaining = max(self.squares - self.projected @ shrinkage @ self.projected, self.squares * 1e-14)
        deviance = self.degrees * math.log(remaining) + float(np.linalg.slogdet(inner)[1])
        unexplained = np.diag(self.cross - self.cross @ shrinkage @ self.cross)
        slopes = [unexplained[b].sum() - left[b] @ left[b] * self.degrees / remaining for b in self.blocks]
        return deviance, np.array(slopes), remaining, shrinkage

    def difference(self, fit: _Fit, arm: int) -> MixedEstimate:
        """Difference of an arm, by its index, from the first arm, which is the baseline.

        Satterthwaite: 2 V^2 / Var(V), where Var(V) follows from the derivatives of V by the variances and the curvature
        of the deviance. A variance that is estimated as zero takes no part, as in lmerTest: the deviance and V are even
        functions of its square root, so V has no slope there.
        """
        contrast = self.shares[:, arm] - self.shares[:, 0]
        mean = self.means[arm] - self.means[0] - contrast @ fit.shrinkage @ self.projected
        spread = float(1 / self.counts[arm] + 1 / self.counts[0] + contrast @ fit.shrinkage @ contrast)
        loading = contrast - self.cross @ fit.shrinkage @ contrast
        slopes = [
            *(ratio * loading[b] @ loading[b] for ratio, b in zip(fit.ratios, self.blocks, strict=True)),
            spread,
        ]
        values, vectors = fit.curvature
        degrees = spread**2 / float(((vectors @ slopes) ** 2 / values).sum())
        return MixedEstimate(float(mean), math.sqrt(spread * fit.residual), degrees, self.components(fit))

    def _curvature(self, ratios: Any, residual: float, shrinkage: Any) -> Any:
        """Second derivatives of the deviance by the logarithms of the ratios and of the residual variance."""
        import numpy as np

        left = self.projected - self.cross @ shrinkage @ self.projected
        unexplained = self.cross - self.cross @ shrinkage @ self.cross
        size = len(self.blocks)
        second = np.zeros((size + 1, size + 1))
        for i, a in enumerate(self.blocks):
            for j, b in enumerate(self.blocks):
                part = unexplained[a, b]
                curved = 2 * left[a] @ part @ left[b] / residual - (part**2).sum()
                second[i, j] = ratios[i] * ratios[j] * curved
            second[i, size] = second[size, i] = ratios[i] * left[a] @ left[a] / residual
        second[size, size] = self.degrees
        return second

    def components(self, fit: _Fit) -> VarianceComponents:
        """The variances, in the squared unit of the metric."""
        seed, *family = (float(ratio) * fit.residual for ratio in fit.ratios)
        return VarianceComponents(seed, family[0] if family else None, fit.residual)


def _distinguishable(centred: Sequence[Any], degrees: int) -> bool:
    """True where the random effects' covariances and the residual's are linearly independent around the arms' means."""
    import numpy as np

    overlap = np.full((len(centred) + 1, len(centred) + 1), float(degrees))
    for i, a in enumerate(centred):
        overlap[i, -1] = overlap[-1, i] = (a**2).sum()
        for j, b in enumerate(centred):
            overlap[i, j] = ((a.T @ b) ** 2).sum()
    scale = np.sqrt(np.diag(overlap))
    return bool((scale > 0).all() and np.linalg.eigvalsh(overlap / np.outer(scale, scale))[0] > 1e-10)

"""Documents as a second source of noise: the formula by explicit matrices, statsmodels' clusters, and coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats

from lit_llm.evaluation.unit_losses import Units
from lit_llm.statistics.baselines import Noise, block_differences
from lit_llm.statistics.comparison import compare
from lit_llm.statistics.document_noise import clustered, combined, document_spread, influence
from lit_llm.statistics.paired import Spread
from lit_llm.statistics.run_results import RunResult
from tests.statistics.simulated import within

NLL = "test/target_nll"


def units(losses: np.ndarray, weights: np.ndarray) -> Units:
    return {f"{g:03}": (float(x * w), float(w)) for g, (x, w) in enumerate(zip(losses, weights, strict=True))}


def test_variance_and_degrees_are_those_of_the_matrices() -> None:
    random = np.random.default_rng(0)
    shares, effect = random.dirichlet(np.ones(9)), random.normal(size=9)
    centre = np.eye(9) - np.outer(np.ones(9), shares)
    b = centre.T @ np.diag(shares**2) @ centre
    found = clustered(effect, shares)
    variance = (effect**2).sum() * (shares**2).sum() / np.trace(b)
    assert found.error == pytest.approx(math.sqrt(variance))
    assert found.degrees == pytest.approx(np.trace(b) ** 2 / np.trace(b @ b))


def test_documents_of_one_size_have_the_textbooks_standard_error() -> None:
    losses = np.random.default_rng(1).normal(3, 1, 12)
    part = influence(units(losses, np.full(12, 7.0)))
    assert part is not None
    found = clustered(part.values, part.shares)
    assert found.error == pytest.approx(stats.sem(losses))
    assert found.degrees == pytest.approx(11)


def test_documents_of_many_sizes_are_statsmodels_clusters() -> None:
    """Tokens in documents: cluster-robust variance of their mean, without its small-sample factor, is Σ u²."""
    random = np.random.default_rng(2)
    sizes = random.integers(1, 40, 15)
    document = np.repeat(np.arange(15), sizes)
    tokens = random.normal(3, 1, len(document)) + random.normal(0, 1, 15)[document]
    fit = sm.OLS(tokens, np.ones(len(tokens))).fit(
        cov_type="cluster", cov_kwds={"groups": document, "use_correction": False}
    )
    losses = np.array([tokens[document == g].mean() for g in range(15)])
    part = influence(units(losses, sizes))
    assert part is not None
    assert (part.values**2).sum() == pytest.approx(fit.cov_params().item())


def test_a_perplexity_moves_by_its_slope() -> None:
    """Doubling a document's loss by a little moves e^mean as its influence says, per share of change."""
    losses, weights = np.array([2.0, 3.0, 4.0]), np.array([1.0, 2.0, 5.0])
    part, plain = (influence(units(losses, weights), exponential) for exponential in (True, False))
    assert part is not None
    assert plain is not None
    assert part.values == pytest.approx(math.exp((losses * weights).sum() / 8) * plain.values)


def test_errors_add_by_satterthwaite() -> None:
    found = combined(Spread(3.0, 2), Spread(4.0, 10))
    assert (found.error, found.degrees) == pytest.approx((5.0, 625 / (81 / 2 + 256 / 10)))


def two_arms(random: np.random.Generator, seeds: int, documents: int, sd: tuple[float, float]):
    """Two arms that differ by nothing but by seed and by document."""
    weights = random.lognormal(0, 1, documents)
    shift = random.normal(0, sd[1], documents)
    values: dict[str, dict[int, float]] = {"0": {}, "1": {}}
    influences = {}
    for seed in range(seeds):
        own = random.normal(0, sd[0])
        for arm, extra in (("0", np.zeros(documents)), ("1", shift + own)):
            losses = 3 + extra + random.normal(0, 0.1, documents)
            values[arm][seed] = float((losses * weights).sum() / weights.sum())
            influences[arm, seed] = influence(units(losses, weights))
    return values, influences


@pytest.mark.parametrize("sd", [(0.05, 0.0), (0.05, 0.5), (0.0, 0.5)])
def test_the_second_interval_covers_and_the_first_does_not_where_documents_matter(sd: tuple[float, float]) -> None:
    """27 documents of lognormal size, three seeds, as the quickstart has them."""
    random, count, both, seeds = np.random.default_rng(3), 150, 0, 0
    for _ in range(count):
        values, influences = two_arms(random, 3, 27, sd)
        d = block_differences(values, "0", Noise(influences=influences))["1"]
        assert d is not None
        assert d.low is not None
        assert d.high is not None
        assert d.seeds_low is not None
        assert d.seeds_high is not None
        assert d.documents == 27
        assert d.low <= d.seeds_low <= d.seeds_high <= d.high
        both += d.low <= 0 <= d.high
        seeds += d.seeds_low <= 0 <= d.seeds_high
    assert both / count >= 0.93 - within(0.93, count)
    assert (seeds / count < 0.9) == (sd[1] > 0)


def test_runs_that_were_not_judged_on_the_same_documents_have_no_such_interval() -> None:
    _, influences = two_arms(np.random.default_rng(4), 2, 5, (0.1, 0.1))
    weights = {"1": 1.0, "0": -1.0}
    assert document_spread(weights, [0, 1], influences) is not None
    few = influence(units(np.ones(4), np.ones(4)))
    assert document_spread(weights, [0, 1], influences | {("1", 0): few}) is None
    del influences["0", 1]
    assert document_spread(weights, [0, 1], influences) is None
    assert influence(units(np.ones(1), np.ones(1))) is None


def test_a_comparison_goes_by_seeds_and_documents_where_runs_have_recorded_them() -> None:
    """Judge: the sum of the paired t's variance and of that over documents."""
    random = np.random.default_rng(5)
    weights, losses = random.lognormal(0, 1, 10), random.normal(3, 1, (2, 4, 10))
    runs = [
        RunResult(
            f"{arm}",
            "0",
            seed,
            "done",
            {
                "metrics": {NLL: float((losses[arm, seed] * weights).sum() / weights.sum())},
                "parameters": 1,
                "flops": 1.0,
            },
            read_units={NLL: units(losses[arm, seed], weights)}.get,
        )
        for arm in range(2)
        for seed in range(4)
    ]
    table = compare(runs, NLL)
    d = table.rows[1].difference
    assert d is not None
    shares = weights / weights.sum()
    delta = (losses[1] - losses[0]).mean(axis=0)
    spread = clustered(shares * (delta - shares @ delta), shares)
    seeds = np.array([shares @ (losses[1, s] - losses[0, s]) for s in range(4)])
    assert d.error == pytest.approx(math.hypot(spread.error, stats.sem(seeds)))
    assert (d.seeds_error, d.documents) == pytest.approx((stats.sem(seeds), 10))
    assert any("of other seeds and other documents, of which there are 10" in note for note in table.notes)

"""The expected share of false findings over many studies: judged by statsmodels, and by counting them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lit_llm.statistics.false_discoveries import DifferenceTest, false_discoveries


def made_up(ps: list[float]) -> list[DifferenceTest]:
    return [
        DifferenceTest(f"study{at // 5}", str(at), p, "better" if p < 0.05 else "undecided") for at, p in enumerate(ps)
    ]


def test_q_values_are_those_of_statsmodels() -> None:
    ps = list(map(float, np.random.default_rng(0).uniform(size=40) ** 3))
    found = false_discoveries(made_up(ps))
    expected = multipletests(ps, method="fdr_bh")[1]
    assert [q for _, q in found.q_values] == pytest.approx(expected)
    assert (found.studies, found.tested, found.called) == (8, 40, sum(p < 0.05 for p in ps))
    assert found.expected_false == pytest.approx(max(q for q, p in zip(expected, ps, strict=True) if p < 0.05))


def test_nothing_called_expects_nothing_false() -> None:
    assert false_discoveries([]).expected_false is None
    assert false_discoveries(made_up([0.2, 0.9])).expected_false is None


def test_no_more_of_the_called_are_false_than_expected() -> None:
    """Of 200 differences 150 are true zeros; over many stores the share of false ones among those called at 5%."""
    random, shares, expected = np.random.default_rng(1), [], []
    for _ in range(200):
        z = random.normal(size=200) + np.where(np.arange(200) < 150, 0.0, 3.0)
        found = false_discoveries(made_up(list(2 * stats.norm.sf(np.abs(z)))))
        called = [int(test.arm) for test, _ in found.q_values if test.called]
        shares.append(np.mean([at < 150 for at in called]))
        expected.append(found.expected_false)
    assert np.mean(shares) < np.mean(expected) < 2 * np.mean(shares)

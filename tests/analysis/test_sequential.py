"""Seeds in rounds: judged by published bounds, by scipy's multivariate normal, and by false alarms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from simulated import study, within

from lit_llm.analysis.baselines import against_baselines
from lit_llm.analysis.sequential import Rounds, Standing, pocock_spending, spent_levels, standings
from lit_llm.analysis.verdicts import judgements

NLL = "val/target_nll"
ROUNDS = Rounds(first=3, most=10)


def test_five_looks_have_the_published_bounds() -> None:
    """R's ldbounds, `ldBounds(t = 1:5/5, iuse = c(2, 2), alpha = c(0.025, 0.025))`, as in Reboussin et al. 2000."""
    bounds = [stats.norm.isf(level / 2) for level in spent_levels((1, 2, 3, 4, 5), 0.05)]
    assert bounds == pytest.approx([2.4380, 2.4268, 2.4102, 2.3966, 2.3859], abs=2e-4)


@pytest.mark.parametrize("sizes", [(3, 5, 10), (2, 3, 4, 20)])
def test_what_is_passed_up_to_each_look_is_what_was_to_be_spent(sizes: tuple[int, ...]) -> None:
    """The z of two looks at m ≤ n seeds correlate as √(m/n); scipy's multivariate normal is the judge."""
    bounds = np.array([stats.norm.isf(level / 2) for level in spent_levels(sizes, 0.05)])
    correlation = np.sqrt(np.minimum.outer(sizes, sizes) / np.maximum.outer(sizes, sizes))
    for looks in range(1, len(sizes) + 1):
        normal = stats.multivariate_normal(cov=correlation[:looks, :looks], seed=0)
        stayed = normal.cdf(bounds[:looks], lower_limit=-bounds[:looks])
        assert 1 - stayed == pytest.approx(pocock_spending(sizes[looks - 1] / sizes[-1], 0.05), abs=2e-4)


def in_rounds(values: dict[str, dict[int, float]], margin: float | None = None) -> dict[str, Standing]:
    return standings(values, "0", NLL, range(ROUNDS.most), ROUNDS, margin)


@pytest.mark.parametrize(("arms", "count"), [(1, 1000), (2, 300)])
def test_looking_after_every_seed_raises_five_false_alarms_in_a_hundred(arms: int, count: int) -> None:
    """Up to eight looks at an arm that does not differ; alone with its baseline, and beside others to pool with."""
    random = np.random.default_rng(0)
    alarms = [in_rounds(study(random, [0.0] * (arms + 1), ROUNDS.most))["1"].decided for _ in range(count)]
    assert np.mean(alarms) == pytest.approx(0.05, abs=within(0.05, count))


def test_looking_at_five_percent_each_time_would_raise_far_more() -> None:
    random, count, alarms, pair = np.random.default_rng(1), 300, 0, {"0": "0", "1": "0"}
    for _ in range(count):
        values = study(random, [0.0, 0.0], ROUNDS.most)
        looks = [{arm: dict([*v.items()][:size]) for arm, v in values.items()} for size in ROUNDS.sizes]
        found = [judgements(against_baselines(look, pair), pair, NLL)["1"] for look in looks]
        alarms += any(judgement.verdict != "undecided" for judgement in found)
    assert alarms / count > 0.12


def test_a_difference_as_large_as_the_margin_is_denied_in_one_of_twenty_studies_at_most() -> None:
    random, count, denied = np.random.default_rng(2), 1000, 0
    for _ in range(count):
        judgement = in_rounds(study(random, [0.0, 0.15], ROUNDS.most), margin=0.15)["1"].judgement
        assert judgement is not None
        denied += judgement.verdict.startswith("no difference")
    assert denied / count <= 0.05 + within(0.05, count)


def test_seeds_are_added_where_the_difference_is_not_decided_and_nowhere_else() -> None:
    """An arm that lies half a nat off stands after three seeds; one that may be equal goes on, and so the baseline."""
    values = study(np.random.default_rng(3), [0.0, 0.5, 0.0], ROUNDS.most, scatter=0.01)
    first = {arm: {seed: v for seed, v in by_seed.items() if seed < 3} for arm, by_seed in values.items()}
    found = in_rounds(first)
    assert {arm: (standing.decided, standing.more) for arm, standing in found.items()} == {
        "0": (False, 4), "1": (True, 3), "2": (False, 4),
    }  # fmt: skip
    end = in_rounds(values)
    assert (end["1"], end["2"].more) == (found["1"], ROUNDS.most)
    equal = in_rounds(values, margin=0.1)
    assert equal["2"].decided
    assert equal["2"].judgement is not None
    assert equal["2"].judgement.verdict == "no difference larger than 0.1"


def test_interrupted_in_a_round_it_goes_on_with_that_round() -> None:
    """The results alone say what is next: a round that is not over changes nothing, one that is asks for the next."""
    values = study(np.random.default_rng(4), [0.0, 0.0], ROUNDS.most)
    upto = {arm: {seed: v for seed, v in by_seed.items() if seed < 4} for arm, by_seed in values.items()}
    assert [in_rounds({arm: {} for arm in values})[arm].more for arm in values] == [3, 3]
    assert in_rounds(upto)["1"].more == 5
    del upto["0"][3]
    waiting = in_rounds(upto)["1"]
    assert (waiting.seeds, waiting.more) == (3, 4)


def test_a_seed_that_diverged_is_over_and_is_no_value() -> None:
    values = study(np.random.default_rng(5), [0.0, 0.0], ROUNDS.first)
    del values["1"][2]
    assert in_rounds(values)["1"].seeds == 0
    found = standings(values, "0", NLL, range(ROUNDS.most), ROUNDS, lost={"1": {2}})["1"]
    assert found.seeds == 3
    assert found.judgement is not None
    assert found.judgement.difference.seeds == 2


def test_the_interval_is_that_of_its_looks_level() -> None:
    values = study(np.random.default_rng(6), [0.0, 0.0], 3)
    found = in_rounds(values)["1"].judgement
    assert found is not None
    deltas = [values["1"][seed] - values["0"][seed] for seed in range(3)]
    interval = stats.ttest_1samp(deltas, 0).confidence_interval(1 - pocock_spending(0.3, 0.05))
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high), rel=1e-6)


@pytest.mark.parametrize(("first", "most", "step"), [(1, 5, 1), (3, 3, 1), (3, 9, 0)])
def test_rounds_that_are_none_are_refused(first: int, most: int, step: int) -> None:
    with pytest.raises(ValueError, match="two first seeds"):
        Rounds(first, most, step)
    assert Rounds(3, 10, 3).sizes == (3, 6, 9, 10)

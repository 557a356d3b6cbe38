"""Seeds in rounds: judged by published bounds, by scipy's multivariate normal, and by false alarms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lit_llm.statistics.alpha_spending import chain
from lit_llm.statistics.baselines import differences_from_baselines
from lit_llm.statistics.sequential import (
    ArmStatus,
    InterimRule,
    PastInterims,
    Rounds,
    arm_statuses,
    bias_adjusted,
    judgements_at_interims,
    pocock_spending,
    repeated_p,
    round_levels,
    t_test_p,
    unbiased,
)
from lit_llm.statistics.verdicts import judgements
from tests.statistics.simulated import study, within

NLL = "val/target_nll"
ROUNDS = Rounds(first=3, most=10)


def test_five_looks_have_the_published_bounds() -> None:
    """R's ldbounds, `ldBounds(t = 1:5/5, iuse = c(2, 2), alpha = c(0.025, 0.025))`, as in Reboussin et al. 2000.

    They are of a known variance: with 20 seeds a look Student's t asks for nearly the same levels."""
    levels = chain(Rounds(20, 100, 20), 0.05).levels
    published = 2 * stats.norm.sf([2.4380, 2.4268, 2.4102, 2.3966, 2.3859])
    assert levels == pytest.approx(published, rel=0.06)


@pytest.mark.parametrize("level", [0.05, 0.05 / 20])
def test_what_is_passed_up_to_each_look_is_what_was_to_be_spent(level: float) -> None:
    """Two hundred thousand studies of three to eight seeds, counted; the whole level and an arm's share of it."""
    count, rounds = 200_000, Rounds(3, 8)
    data = np.random.default_rng(0).normal(size=(count, rounds.most))
    passed = np.zeros(count, bool)
    for size, look, share in zip(rounds.sizes, chain(rounds, level).levels, rounds.shares, strict=True):
        seen = data[:, :size]
        t = np.abs(seen.mean(1)) / seen.std(1, ddof=1) * size**0.5
        passed |= 2 * stats.t.sf(t, size - 1) < look
        assert passed.mean() == pytest.approx(level * share, abs=within(level * share, count))


def test_the_second_look_has_the_level_of_a_double_integral() -> None:
    """Two looks, at two seeds and at three: the plane of (direction, variance) is integrated by scipy's dblquad.

    Given the sum and the sum of squares of three differences, the first two are a point on a circle: the chance that
    their t has passed the first level is an arc."""
    first, second = chain(Rounds(2, 3), 0.05).levels
    angles = np.linspace(0, 2 * np.pi, 20_001)[:-1]
    axis, across = np.array([1, -1, 0]) / 2**0.5, np.array([1, 1, -2]) / 6**0.5

    def stayed(p: float) -> float:
        t = stats.t.isf(p / 2, 2)
        u = t / (t * t + 2) ** 0.5
        ring = (1 - u * u) ** 0.5 * (np.outer(np.cos(angles), axis) + np.outer(np.sin(angles), across))
        d = ring + u / 3**0.5
        now = np.abs(d[:, 0] + d[:, 1]) / np.maximum(np.abs(d[:, 0] - d[:, 1]), 1e-300)
        return float(np.mean(2 * stats.t.sf(now, 1) >= first))

    ps = np.linspace(0, second, 401)[1:]
    assert np.mean([stayed(p) for p in ps]) * second == pytest.approx(0.05 - first, rel=0.01)


@pytest.mark.parametrize("arms", [1, 4])
def test_p_is_below_five_percent_exactly_where_its_looks_level_is_passed(arms: int) -> None:
    for look, level in enumerate(chain(ROUNDS, 0.05 / arms).levels):
        assert repeated_p(level, look, ROUNDS, arms) == pytest.approx(0.05, rel=1e-9)
        assert repeated_p(level * 0.99, look, ROUNDS, arms) < 0.05 < repeated_p(level * 1.01, look, ROUNDS, arms)
        # Of any other level the same, up to the interpolation between the levels that are known.
        other = chain(ROUNDS, 0.02 / arms).levels[look]
        assert repeated_p(other, look, ROUNDS, arms) == pytest.approx(0.02, rel=0.02)
        assert repeated_p(1.0, look, ROUNDS, arms) == 1.0


def test_p_holds_whatever_stops_the_looks() -> None:
    """Stopped at the look with the smallest p of all, fewer than one study in twenty is below 5%."""
    count = 2000
    data = np.random.default_rng(10).normal(size=(count, ROUNDS.most))
    raw = np.array([stats.ttest_1samp(data[:, :size], 0, axis=1).pvalue for size in ROUNDS.sizes])
    least = np.array([min(repeated_p(p, look, ROUNDS) for look, p in enumerate(one)) for one in raw.T])
    for level in (0.01, 0.05, 0.2):
        assert np.mean(least < level) == pytest.approx(level, abs=within(level, count))


def in_rounds(values: dict[str, dict[int, float]], margin: float | None = None) -> dict[str, ArmStatus]:
    return arm_statuses(values, "0", InterimRule(NLL, range(ROUNDS.most), ROUNDS, margin))


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
        found = [judgements(differences_from_baselines(look, pair), pair, NLL)["1"] for look in looks]
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
    assert {arm: (statuses.decided, statuses.more) for arm, statuses in found.items()} == {
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
    found = arm_statuses(values, "0", InterimRule(NLL, range(ROUNDS.most), ROUNDS), lost={"1": {2}})["1"]
    assert found.seeds == 3
    assert found.judgement is not None
    assert found.judgement.difference.seeds == 2


def test_the_interval_is_that_of_its_looks_level() -> None:
    values = study(np.random.default_rng(6), [0.0, 0.0], 3)
    found = in_rounds(values)["1"].judgement
    assert found is not None
    deltas = [values["1"][seed] - values["0"][seed] for seed in range(3)]
    interval = stats.ttest_1samp(deltas, 0).confidence_interval(1 - pocock_spending(0.3, 0.05))
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high), rel=1e-3)


@pytest.mark.parametrize(("first", "most", "step"), [(1, 5, 1), (3, 3, 1), (3, 9, 0)])
def test_rounds_that_are_none_are_refused(first: int, most: int, step: int) -> None:
    with pytest.raises(ValueError, match="two first seeds"):
        Rounds(first, most, step)
    assert Rounds(3, 10, 3).sizes == (3, 6, 9, 10)


# --- the number of seeds is changed after a look --------------------------------------------------------------------


def after(most: int, *past: PastInterims) -> Rounds:
    return Rounds(3, most, past=past)


def test_past_looks_keep_their_levels_and_the_rest_is_spent_over_those_that_remain() -> None:
    """Raised from 8 to 12 after the look at 5: shares of Lan and DeMets up to there, one at the end."""
    before, raised = Rounds(3, 8), after(12, PastInterims((3, 4, 5), 8))
    assert raised.sizes == tuple(range(3, 13))
    assert raised.shares[:3] == before.shares[:3]
    assert raised.shares[-1] == pytest.approx(1)
    assert list(raised.shares) == sorted(raised.shares)
    assert [level.difference for level in round_levels(raised)[:3]] == pytest.approx(
        [level.difference for level in round_levels(before)[:3]]
    )
    # By hand: at 6 of 12 seeds, the part of the rest that the function spends between 5/12 and 6/12.
    f = [pocock_spending(seeds / 12, 1.0) for seeds in (5, 6)]
    spent = pocock_spending(5 / 8, 1.0)
    assert raised.shares[3] == pytest.approx(spent + (1 - spent) * (f[1] - f[0]) / (1 - f[0]))


def test_what_is_spent_is_spent() -> None:
    """After the last look, or a look at a fixed number of seeds, no later look can call anything."""
    for rounds in (after(12, PastInterims(tuple(range(3, 9)), 8)), after(12, PastInterims((3,), 3))):
        coming = rounds.sizes.index(rounds.past_sizes[-1]) + 1
        assert [level.difference for level in round_levels(rounds)[coming:]] == [0.0] * (12 - rounds.past_sizes[-1])
    lowered = after(5, PastInterims((3, 4, 5, 6), 8))
    assert lowered.sizes == (3, 4, 5)
    assert after(6, PastInterims((3, 4), 8)).shares[-1] == 1
    elsewhere = Rounds(3, 8, lost=0.6)  # on looks at seeds that were replaced
    assert chain(elsewhere, 0.05).levels[0] == pytest.approx(0.05 * 0.4 * pocock_spending(3 / 8, 1.0), rel=1e-3)


def test_a_look_without_a_level_decides_nothing_however_large_the_difference() -> None:
    rounds = after(5, PastInterims((3,), 3))
    values = study(np.random.default_rng(8), [0.0, 0.0], 3, scatter=0.5)
    for seed in (3, 4):
        values["0"][seed], values["1"][seed] = 0.0, values["1"][0] - values["0"][0]
    found = arm_statuses(values, "0", InterimRule(NLL, range(5), rounds))["1"]
    assert (found.seeds, found.decided) == (5, False)
    assert found.judgement is not None
    assert found.judgement.verdict == "undecided"
    assert found.judgement.p is not None
    assert found.judgement.p >= 0.05


def test_holms_arms_share_the_five_percent_over_their_looks() -> None:
    """Four arms: the first look's level is a quarter of what one arm has, and p is four times its own."""
    values = study(np.random.default_rng(9), [0.0, 0.3, 0.0, 0.0, 0.0], 3)
    alone, shared = (
        arm_statuses(values, "0", InterimRule(NLL, range(10), ROUNDS, comparisons=m))["1"].judgement for m in (1, 4)
    )
    assert alone is not None
    assert shared is not None
    assert round_levels(ROUNDS, 4)[0].difference == pytest.approx(round_levels(ROUNDS)[0].difference / 4, rel=1e-3)
    assert shared.p == pytest.approx(min(1.0, 4 * (alone.p or 0)), rel=1e-3)


# --- estimates of arms that stopped ---------------------------------------------------------------------------------


def test_the_unbiased_estimate_is_the_first_looks_mean_given_the_data_and_that_it_went_on() -> None:
    """By definition, counted: among simulated pairs of two seeds with the sum and squares that three have."""
    rounds, d = Rounds(2, 3), (0.9, 0.2, 0.5)
    total, squares = sum(d), sum(x * x for x in d)
    radius = (squares - total**2 / 3) ** 0.5
    angles = np.linspace(0, 2 * np.pi, 100_001)[:-1]
    axis, across = np.array([1, -1, 0]) / 2**0.5, np.array([1, 1, -2]) / 6**0.5
    points = total / 3 + radius * (np.outer(np.cos(angles), axis) + np.outer(np.sin(angles), across))
    t = np.abs(points[:, 0] + points[:, 1]) / np.abs(points[:, 0] - points[:, 1])
    went_on = 2 * stats.t.sf(t, 1) >= chain(rounds, 0.05).levels[0]
    expected = points[went_on, :2].mean()
    assert unbiased(d, 1, rounds) == pytest.approx(expected, rel=0.01)
    assert unbiased([-x for x in d], 1, rounds) == pytest.approx(-expected, rel=0.01)
    assert unbiased(d[:2], 0, rounds) == pytest.approx(np.mean(d[:2]), rel=1e-3)


def test_estimates_are_given_where_looks_at_the_arms_own_t_stop_it_where_it_was_stopped() -> None:
    d = [0.9, 0.2, 0.5, 0.62, 0.55, 0.5, 0.6, 0.55, 0.5, 0.6]
    values = {"0": dict.fromkeys(range(10), 0.0), "1": dict(enumerate(d))}
    levels = [level.difference for level in round_levels(ROUNDS)]
    stop = next(look for look, size in enumerate(ROUNDS.sizes) if t_test_p(d[:size]) < levels[look])
    assert stop > 0
    found = in_rounds(values)
    assert (found["1"].interim_index, found["1"].decided) == (stop, True)
    adjusted = bias_adjusted(found, ROUNDS)["1"]
    assert adjusted == pytest.approx(unbiased(d[: ROUNDS.sizes[stop]], stop, ROUNDS))
    assert 0 < adjusted < np.mean(d[: ROUNDS.sizes[stop]])
    assert bias_adjusted(found, ROUNDS, margin=0.1) == {}


def test_no_estimate_is_given_of_an_arm_whose_own_t_would_have_stopped_it_before() -> None:
    """Ten differences of 1 ± 0.02 that something else kept open have no chance among paths of their own t."""
    random = np.random.default_rng(11)
    d = tuple(1 + 0.02 * random.normal(size=10))
    judgement = in_rounds({"0": dict.fromkeys(range(3), 0.0), "1": dict(enumerate(d[:3]))})["1"].judgement
    later = ArmStatus(5, judgement, True, 5, 2, d[:5])
    assert bias_adjusted({"1": later}, ROUNDS) == {}
    assert bias_adjusted({"1": ArmStatus(10, judgement, False, 10, 7, d)}, ROUNDS) == {}


# --- one metric stops, another is compared --------------------------------------------------------------------------


def test_another_metric_is_judged_at_the_looks_where_the_first_has_stopped_the_arms() -> None:
    """Arm 1 is stopped at three seeds: of the other metric, too, only three seeds count, at the first look's level."""
    stopping = study(np.random.default_rng(3), [0.0, 0.5, 0.0], ROUNDS.most, scatter=0.01)
    other = study(np.random.default_rng(12), [0.0, 0.0, 0.0], ROUNDS.most)
    del other["1"][9], other["1"][8]  # it was never run so often
    statuses = in_rounds(stopping)
    found = judgements_at_interims(statuses, other, "0", InterimRule(NLL, range(ROUNDS.most), ROUNDS))
    assert {arm: own.difference.seeds for arm, own in found.items()} == {"1": 3, "2": ROUNDS.most}
    first = {arm: {seed: v for seed, v in by_seed.items() if seed < 3} for arm, by_seed in other.items()}
    level = pocock_spending(0.3, 0.05)
    assert round_levels(ROUNDS)[0].difference == pytest.approx(level, rel=1e-3)
    pair = dict.fromkeys(first, "0")
    expected = judgements(differences_from_baselines(first, pair), pair, NLL, levels=round_levels(ROUNDS)[0])["1"]
    assert found["1"].difference == expected.difference
    same = judgements_at_interims(statuses, stopping, "0", InterimRule(NLL, range(ROUNDS.most), ROUNDS))
    assert same == {arm: own.judgement for arm, own in statuses.items() if arm != "0"}


def test_an_arm_that_lacks_a_seed_holds_up_no_other() -> None:
    values = study(np.random.default_rng(4), [0.0, 0.0, 0.0], ROUNDS.most)
    del values["1"][4]  # its run has failed
    found = in_rounds(values)
    assert {arm: own.seeds for arm, own in found.items()} == {"0": 10, "1": 4, "2": 10}
    assert (found["1"].more, found["2"].more) == (5, 10)

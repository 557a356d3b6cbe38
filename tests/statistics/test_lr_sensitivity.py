"""LR sensitivity: judged by its definition on curves whose answer is known in closed form, and by scipy."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from lit_llm.statistics.baselines import block_differences
from lit_llm.statistics.lr_sensitivity import LRRun, best_lr, loss_table, lr_sensitivity, widest_range

PAPER_LRS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
EVEN = tuple(10.0**power for power in (-4, -3, -2, -1, 0))


def parabola(arm="a", seed=0, floor=2.0, rise=0.5, centre=-2.0, lrs=EVEN):
    """loss = floor + rise (log10 lr - centre)²."""
    return [LRRun(arm, lr, seed, floor + rise * (math.log10(lr) - centre) ** 2) for lr in lrs]


def lost(runs, *lrs):
    return [replace(run, loss=None) if run.lr in lrs else run for run in runs]


def one(runs, initial=10.0, **more):
    arm = runs[0].arm
    return lr_sensitivity(loss_table(runs), {(arm, run.seed): initial for run in runs}, **more)[arm]


def test_of_a_parabola_it_is_the_mean_square_distance_from_the_best():
    """Decades -2..2 from the best: 0.5 x mean(4, 1, 0, 1, 4) = 1."""
    found = one(parabola())
    assert found.mean == pytest.approx(1.0)
    assert (found.capped, found.lrs, found.left_out) == (0, EVEN, ())


def test_a_loss_counts_up_to_that_at_initialisation():
    """ℓ₀ - ℓ* = 1.2 caps both ends, 2 above the best: mean(1.2, 0.5, 0, 0.5, 1.2)."""
    found = one(parabola(), initial=3.2)
    assert found.mean == pytest.approx((1.2 + 0.5 + 0 + 0.5 + 1.2) / 5)
    assert found.capped == 2


def test_a_run_that_diverged_stands_with_the_loss_at_initialisation_and_in_no_mean():
    runs = lost(parabola(), 1e-1, 1.0)
    found = one(runs, initial=10.0)
    assert found.mean == pytest.approx((2.0 + 0.5 + 0 + 8.0 + 8.0) / 5)
    assert found.capped == 2
    cell = loss_table(runs)[-1]
    assert (cell.lr, cell.mean, cell.losses, cell.diverged) == (1.0, None, {}, (0,))


def test_it_is_the_definition_on_random_curves():
    """Judge: the formula over arrays, on the paper's own learning rates."""
    random = np.random.default_rng(0)
    losses, initial = random.uniform(2, 6, len(PAPER_LRS)), 5.0
    runs = [LRRun("a", lr, 0, float(loss)) for lr, loss in zip(PAPER_LRS, losses, strict=True)]
    assert one(runs, initial).mean == pytest.approx(np.mean(np.minimum(losses, initial) - losses.min()))


def test_it_does_not_change_when_all_losses_rise_alike():
    assert one(parabola(floor=3.0), 11.0).mean == pytest.approx(one(parabola(floor=2.0), 10.0).mean)


def test_the_best_is_the_best_of_the_range():
    """From 1e-4 to 1e-3 the best is at 1e-3: the mean of 1.5 and 0."""
    found = one(parabola(), between=(1e-4, 1e-3))
    assert (found.lrs, found.mean) == (EVEN[:2], pytest.approx(0.75))


def test_the_interval_over_seeds_is_scipys():
    rises = (0.3, 0.5, 0.6, 0.9)
    runs = [run for seed, rise in enumerate(rises) for run in parabola(seed=seed, rise=rise)]
    found = one(runs)
    by_seed = [2 * rise for rise in rises]
    assert list(found.by_seed.values()) == pytest.approx(by_seed)
    interval = stats.ttest_1samp(by_seed, 0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(by_seed), interval.low, interval.high))


def test_arms_are_compared_seed_by_seed():
    """The second arm is half as sensitive whatever the seed."""
    runs = [run for seed in range(3) for run in parabola("a", seed, rise=0.5 + seed)]
    runs += [run for seed in range(3) for run in parabola("b", seed, rise=(0.5 + seed) / 2)]
    found = lr_sensitivity(loss_table(runs), {(run.arm, run.seed): 90.0 for run in runs})
    difference = block_differences({arm: s.by_seed for arm, s in found.items()}, "a")["b"]
    assert difference is not None
    assert difference.mean == pytest.approx(-np.mean([1.0, 3.0, 5.0]) / 2)


def test_a_seed_without_all_learning_rates_gives_no_value():
    """Of any arm: the mean over fewer would be another quantity."""
    runs = parabola("a", 0) + parabola("a", 1)[:-1] + parabola("b", 0, lrs=EVEN[1:])
    found = lr_sensitivity(loss_table(runs), {("a", 0): 10, ("a", 1): 10, ("b", 0): 10})
    assert (found["a"].by_seed, found["a"].left_out) == ({0: pytest.approx(1.0)}, (1,))
    assert (found["b"].mean, found["b"].low, found["b"].left_out) == (None, None, (0,))


def test_where_nothing_trained_there_is_no_number():
    every = lost(parabola(), *EVEN)
    assert one(every).mean is None
    assert one(parabola(floor=12.0), initial=10.0).left_out == (0,)


def test_the_loss_at_initialisation_has_to_be_handed_in():
    with pytest.raises(ValueError, match="a, seed 0: LR sensitivity needs the loss at initialisation"):
        lr_sensitivity(loss_table(parabola()), {})


def test_the_table_goes_from_the_lowest_learning_rate_to_the_highest_arm_by_arm():
    runs = parabola("z", 0)[::-1] + parabola("z", 1, floor=4.0) + lost(parabola("b"), 1.0)
    table = loss_table(runs)
    assert [(cell.arm, cell.lr) for cell in table] == [(arm, lr) for arm in "zb" for lr in EVEN]
    assert (table[2].mean, table[2].deviation) == (pytest.approx(3.0), pytest.approx(math.sqrt(2)))
    assert table[5].deviation is None


def test_a_loss_that_is_not_finite_and_a_run_twice_are_refused():
    with pytest.raises(ValueError, match="the loss is nan; a run that diverged has none"):
        loss_table([LRRun("a", 1e-3, 0, math.nan)])
    with pytest.raises(ValueError, match="a, lr 0.001, seed 0: there are two runs"):
        loss_table([LRRun("a", 1e-3, 0, 2.0)] * 2)


def test_the_best_learning_rate_is_one_at_which_no_seed_diverged():
    runs = parabola(seed=0) + lost(parabola(seed=1), 1e-2)
    assert best_lr(loss_table(parabola())).lr == 1e-2
    assert best_lr(loss_table(runs)).lr == 1e-3  # as good as 1e-1, and lower
    assert best_lr(loss_table(lost(parabola(), *EVEN))) is None


@pytest.mark.parametrize(("margin", "decades"), [(0.0, 0), (0.4, 0), (0.5, 2), (1.9, 2), (2.0, 4)])
def test_a_margin_reaches_as_far_as_the_parabola_says(margin, decades):
    """The loss is margin above the best at √(margin / 0.5) decades on either side."""
    found = widest_range(loss_table(parabola()), margin + 1e-9)
    assert found.decades == pytest.approx(decades)
    assert math.log10(found.low * found.high) == pytest.approx(-4)  # around the best


def test_a_range_has_no_diverged_seed_in_it():
    runs = parabola(seed=0) + lost(parabola(seed=1), 1e-3)
    found = widest_range(loss_table(runs), 5.0)
    assert (found.low, found.high) == (1e-2, 1.0)
    assert widest_range(loss_table(lost(parabola(), *EVEN)), 5.0) is None


def test_ranges_are_of_one_arm():
    with pytest.raises(ValueError, match="one arm at a time, not of a, b"):
        widest_range(loss_table(parabola("a") + parabola("b")), 1.0)


def test_the_table_holds_what_was_unstable_of_diverged_runs_too():
    calm = LRRun("a", 1.0, 0, 2.0, spikes=1.0, max_attention_logit=8.0, max_grad_norm=2.0)
    wild = LRRun("a", 1.0, 1, None, spikes=4.0, max_attention_logit=500.0, max_grad_norm=70.0)
    (cell,) = loss_table([calm, wild])
    assert (cell.spikes, cell.max_attention_logit, cell.max_grad_norm) == (2.5, 500.0, 70.0)
    assert (cell.losses, cell.diverged) == ({0: 2.0}, (1,))
    assert loss_table([LRRun("a", 1.0, 0, 2.0)])[0].spikes is None

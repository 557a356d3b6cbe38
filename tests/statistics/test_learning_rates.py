"""What a comparison says of learning rates: judged by the definition of LR sensitivity by hand, and by scipy."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from lit_llm.report.answer import answer
from lit_llm.report.tables.comparison import render_comparison
from lit_llm.statistics.comparison import Design, compare
from lit_llm.statistics.interims import InterimAnalyses
from lit_llm.statistics.learning_rates import LRFactor, LRGroup
from lit_llm.statistics.run_results import RunResult
from lit_llm.statistics.sequential import Rounds
from lit_llm.statistics.unadjusted import UNTESTED

NLL, LR = "val/target_nll", "pretrain.training.optimizer.lr"
LRS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
PLAIN, LONG = "red", "red/qkv_norm=none/output_norm=none"
INITIAL = 7.0


def factor(*groups, name=LR, lrs=LRS):
    return LRFactor(name, tuple(LRGroup(g, PLAIN, {arm_of(g, lr): lr for lr in lrs}) for g in groups))


def arm_of(group, lr):
    return group if lr == LRS[0] else f"{group}/lr={lr:g}"


def ended(group, lr, seed, loss, *, metric=NLL, initial=INITIAL, **stability):
    """A run that ended with this loss; with None it diverged."""
    measured = {f"stability/{name}": value for name, value in stability.items()}
    result = {
        "metrics": measured | ({metric: loss} if loss is not None else {}),
        "initial": {metric: initial} if initial is not None else {},
        "provenance": {"code": "one"},
        "parameters": 1,
        "flops": 1.0,
        "finished": 2.0,
    }
    return RunResult(arm_of(group, lr), arm_of(PLAIN, lr), seed, "done" if loss is not None else "diverged", result)


def curve(group, losses, seed=0, **more):
    return [ended(group, lr, seed, loss, **more) for lr, loss in zip(LRS, losses, strict=True)]


def rates(runs, metric=NLL, of=None):
    (found,) = compare(runs, metric, Design(lr_factors=[of or factor(PLAIN, LONG)])).learning_rates
    return found


def test_a_diverged_run_is_counted_and_stands_with_the_loss_at_initialisation_in_the_sensitivity_alone():
    """min(loss, 7) - 4 over the learning rates is 1, .5, 0, 1, 3 (ended at 9) and 3 (diverged): 8.5 / 6."""
    row = rates(curve(PLAIN, [5, 4.5, 4, 5, 9, None])).rows[0]
    assert row.sensitivity.mean == pytest.approx(8.5 / 6)
    assert row.sensitivity.capped == 2
    assert [(cell.lr, cell.mean, cell.diverged) for cell in row.cells[-2:]] == [(1e-1, 9, ()), (3e-1, None, (0,))]
    assert row.best == 1e-2


def test_groups_are_compared_by_paired_differences_of_their_sensitivity():
    random = np.random.default_rng(0)
    losses = {(g, seed): random.uniform(4, 9, len(LRS)) for g, seed in itertools.product((PLAIN, LONG), range(4))}
    found = rates([run for (g, seed), own in losses.items() for run in curve(g, own.tolist(), seed)])
    by_hand = {key: np.mean(np.minimum(own, INITIAL)) - own.min() for key, own in losses.items()}
    plain, long = ([by_hand[group, seed] for seed in range(4)] for group in (PLAIN, LONG))
    assert list(found.rows[1].sensitivity.by_seed.values()) == pytest.approx(long)
    interval = stats.ttest_rel(long, plain).confidence_interval()
    difference = found.rows[1].difference
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert difference.mean == pytest.approx(np.mean(long) - np.mean(plain))
    assert found.rows[0].difference is None


def test_the_range_is_of_neighbours_within_a_tenth_and_none_diverged():
    found = rates(curve(PLAIN, [4.05, 4.09, 4.3, 4, 4.05, 4.02]) + curve(LONG, [5, 4.05, 4, 4.1, None, 4.01])).rows
    assert (found[0].range.low, found[0].range.high) == (3e-2, 3e-1)
    assert (found[1].range.low, found[1].range.high) == (3e-3, 3e-2)
    assert [row.best for row in found] == [3e-2, 1e-2]


def test_of_all_runs_the_diverged_included_the_largest_logit_and_gradient_and_the_mean_of_spikes():
    calm = {"loss_spikes": 1.0, "max_attention_logit": 9.0, "max_grad_norm": 3.0}
    wild = {"loss_spikes": 4.0, "max_attention_logit": 800.0, "max_grad_norm": None}
    runs = [ended(PLAIN, 1e-2, 0, 4.0, **calm), ended(PLAIN, 1e-2, 1, None, **wild)]
    (cell,) = rates(runs).rows[0].cells
    assert (cell.spikes, cell.max_attention_logit, cell.max_grad_norm) == (2.5, 800.0, 3.0)


def test_while_a_learning_rate_is_not_run_there_is_a_table_and_no_sensitivity():
    """The mean over fewer learning rates would be another quantity."""
    found = rates(curve(PLAIN, [5, 4.5, 4, 5, 9, 8])[:-1])
    assert [cell.mean for cell in found.rows[0].cells] == [5, 4.5, 4, 5, 9]
    assert found.rows[0].sensitivity.mean is None
    assert any(note.startswith("red: LR sensitivity without seed 0") for note in found.notes)
    assert (found.rows[1].cells, found.rows[1].sensitivity) == ((), None)


def test_results_without_a_loss_at_initialisation_have_no_sensitivity():
    found = rates(curve(PLAIN, [5, 4.5, 4, 5, 9, None], initial=None))
    assert found.rows[0].sensitivity is None
    assert found.rows[0].best == 1e-2
    assert any("no LR sensitivity without the loss at initialisation" in note for note in found.notes)


def test_the_loss_at_initialisation_is_that_of_the_learning_rates_own_stage():
    """Finetuning begins where the pretraining's learning rate has led, at another loss for each."""
    tuned, losses = f"finetune/{NLL}", [5, 4.5, 4, 5, 9, 8]
    runs = curve(PLAIN, losses, metric=tuned)
    assert rates(runs, tuned, factor(PLAIN, name=LR)).rows[0].sensitivity is None
    own = rates(runs, tuned, factor(PLAIN, name="finetune.training.optimizer.lr")).rows[0]
    assert own.sensitivity.mean == pytest.approx((1 + 0.5 + 0 + 1 + 3 + 3) / 6)


def test_what_is_no_validation_loss_has_no_table():
    runs = [ended(PLAIN, lr, 0, 1.0, metric="stability/loss_spikes") for lr in LRS]
    assert compare(runs, "stability/loss_spikes", Design(lr_factors=[factor(PLAIN)])).learning_rates == ()
    assert compare([], NLL, Design(lr_factors=[factor(PLAIN)])).learning_rates == ()


def test_results_of_other_code_are_left_out():
    runs = curve(PLAIN, [5, 4.5, 4, 5, 9, 8])
    old = replace(runs[0], result=runs[0].result | {"provenance": {"code": "older"}, "finished": 1.0})
    assert len(rates([old, *runs[1:]]).rows[0].cells) == 5


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_and_say_what_diverged(width):
    seen = {"loss_spikes": 11.0, "max_attention_logit": 1.2e4, "max_grad_norm": 1.5e3}
    losses = {0: [15.123, 14.567, 14.012, 15.5, None, None], 1: [15.124, 14.5, 14.012, 15.5, 16.0, None]}
    runs = [run for g in (PLAIN, LONG) for seed, own in losses.items() for run in curve(g, own, seed, **seen)]
    comparison = compare(runs, NLL, Design(lr_factors=[factor(PLAIN, LONG)]))
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_comparison(comparison, width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    shown = text.partition(f"{NLL} by {LR}")[2]
    assert "…" not in shown
    assert re.search(r"^red .* 16\.000 †1 +†2 *$", shown, re.MULTILINE)
    for title in ("loss spikes per run", "largest attention logit", "largest gradient norm"):
        assert title in shown
    assert "12k" in shown


def test_in_rounds_of_seeds_no_sensitivity_is_tested():
    """More sensitive by a half, with little scatter: shown with a fixed number of seeds."""
    runs = [
        run
        for seed in range(3)
        for group, more in ((PLAIN, 0.0), (LONG, 3.0 + 0.1 * seed))
        for run in curve(group, [5, 4.5, 4, 4.1, 4.2, 4.3 + more], seed, initial=9.0)
    ]
    of = [factor(PLAIN, LONG)]
    fixed = compare(runs, NLL, Design(lr_factors=of))
    looked = compare(runs, NLL, Design(lr_factors=of, interims=InterimAnalyses((0, 1, 2, 3), Rounds(3, 4))))
    assert any("sensitive than" in sentence for sentence in answer(fixed))
    assert not any("sensitiv" in sentence for sentence in answer(looked))
    assert [UNTESTED in found.learning_rates[0].notes for found in (fixed, looked)] == [False, True]


def test_the_json_holds_all_of_it():
    comparison = compare(curve(PLAIN, [5, 4.5, 4, 5, 9, None]), NLL, Design(lr_factors=[factor(PLAIN)]))
    (found,) = json.loads(json.dumps(comparison.as_json(), allow_nan=False))["learning_rates"]
    assert found["factor"] == LR
    assert found["rows"][0]["sensitivity"]["mean"] == pytest.approx(8.5 / 6)
    assert found["rows"][0]["cells"][-1]["diverged"] == [0]

"""Searches for what is known before training: they find what brute force finds, and say when nothing is left."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache

import pytest

from lit_llm.experiment.cost import COST_FIGURES, cost_of
from lit_llm.experiment.load import load_experiment
from lit_llm.sweeps.coordinator import SweepObserver
from lit_llm.sweeps.run import run_sweep
from lit_llm.sweeps.sweep import load_sweep

HEADS, KV, D_MODEL = "model.attention.heads", "model.attention.kv_heads", "model.d_model"
D_FF, ENCODER, DECODER = "model.feed_forward.d_ff", "model.encoder.layers", "model.decoder.layers"
LR, DROPOUT = "pretrain.training.optimizer.lr", "pretrain.training.dropout"

SPACE = f"""
space:
  {KV}: {{choice: [null, 1, 4], when: {{{HEADS}: [4, 2]}}}}
  {HEADS}: {{choice: [2, 4, 8]}}
  {D_FF}: {{int: [128, 256], step: 64}}
  {DECODER}: {{int: [1, 3]}}
constraints:
  - parameters >= 250000
  - {D_FF} <= 64 * {HEADS}
"""


@cache
def every_experiment():
    """Those of SPACE without its constraints, as the command line makes them; 4 key heads divide no 2 heads."""
    found = []
    for heads, kv, d_ff, layers in itertools.product((2, 4, 8), (None, 1, 4), (128, 192, 256), (1, 2, 3)):
        keys = {HEADS: heads, D_FF: d_ff, DECODER: layers}
        if heads < 8:
            keys[KV] = kv
        elif kv is not None:
            continue
        if (heads, kv) != (2, 4):
            found.append(load_experiment("redllm-tiny", [f"{key}={json.dumps(value)}" for key, value in keys.items()]))
    return found


@cache
def feasible():
    """Those that fulfil the constraints of SPACE."""
    return [
        experiment
        for experiment in every_experiment()
        if cost_of(experiment).parameters >= 250_000
        and experiment.model.feed_forward.d_ff <= 64 * experiment.model.attention.heads
    ]


class Listener(SweepObserver):
    """Keeps what is said."""

    def __init__(self):
        self.messages = []

    def message(self, text):
        self.messages.append(text)


@pytest.fixture
def searched(tmp_path, store, request):
    """Run a sweep under a name of its own in the tests' common store: searched(text, trials=8) -> how it ended."""
    count = itertools.count()

    def run(text, trials, *, name=None, extends="redllm-tiny"):
        name = name or f"{re.sub(r'[^a-z0-9_]+', '-', request.node.name)}-{next(count)}"
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"sweep: {name}\nextends: {extends}\ntrials: {trials}\n{text}")
        observer = Listener()
        ended = run_sweep(load_sweep(path), store, observer=observer, max_parallel=1)
        assert ended.exit_code == 0
        return ended, observer.messages

    return run


def done(ended, arm="baseline"):
    """The trials that count, none of which may be one that was there before."""
    trials = [trial for trial in ended.trials if trial.arm == arm and trial.state == "done"]
    space = ended.search.spaces[arm]
    experiments = [space.experiment(trial.point).model_dump_json() for trial in trials]
    assert len(set(experiments)) == len(experiments), "a trial was repeated"
    return trials


def settings(ended, arm="baseline"):
    """The experiments of the trials that count."""
    return {ended.search.spaces[arm].experiment(trial.point).model_dump_json() for trial in done(ended, arm)}


# --- the optimum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "direction"), [("tpe", "minimize"), ("random", "maximize"), ("nsga2", "minimize")])
def test_a_search_of_a_small_space_finds_its_optimum_and_says_that_nothing_is_left(searched, sampler, direction):
    """All feasible points are tried, none twice, and then it ends, however many trials it might have had."""
    goal = f"optimize: [{{metric: decode_flops_per_token, direction: {direction}}}]\n"
    ended, messages = searched(f"{SPACE}{goal}sampler: {sampler}\n", trials=500)
    expected = feasible()
    assert 10 < len(expected) < len(every_experiment())
    assert settings(ended) == {experiment.model_dump_json() for experiment in expected}
    costs = [cost_of(experiment).decode_flops_per_token for experiment in expected]
    (summary,) = ended.summaries
    assert summary.best.values == ((min if direction == "minimize" else max)(costs),)
    best = ended.search.spaces["baseline"].experiment(summary.best.point)
    assert cost_of(best).decode_flops_per_token == summary.best.values[0]
    assert load_experiment(ended.best[0]) == best
    (message,) = [text for text in messages if text.startswith("baseline: ")]
    assert f"no further point after {len(expected)} trials" in message


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "nsga3"])
def test_the_best_compromises_are_those_that_brute_force_finds_no_better_for(searched, sampler):
    goals = "optimize: [{metric: train_flops}, {metric: parameters, direction: maximize}]\n"
    ended, _ = searched(f"{SPACE}{goals}sampler: {sampler}\n", trials=500)
    costs = [cost_of(experiment) for experiment in feasible()]
    found = [(cost.train_flops, cost.parameters) for cost in costs]
    front = {
        (flops, size)
        for flops, size in found
        if not any(f <= flops and s >= size and (f, s) != (flops, size) for f, s in found)
    }
    assert 1 < len(front) < len(set(found))
    (summary,) = ended.summaries
    assert {trial.values for trial in summary.front} == front
    assert len(summary.front) == sum(pair in front for pair in found)
    assert len(ended.best) == len(summary.front)
    for path in ended.best:
        cost = cost_of(load_experiment(path))
        assert (cost.train_flops, cost.parameters) in front


def test_every_figure_that_is_known_before_training_is_a_goal(searched):
    goals = ", ".join(f"{{metric: {figure}}}" for figure in COST_FIGURES)
    ended, _ = searched(f"space: {{{D_FF}: {{choice: [64, 256]}}}}\noptimize: [{goals}]\n", trials=5)
    experiments = {"256": load_experiment("redllm-tiny"), "64": load_experiment("redllm-tiny", [f"{D_FF}=64"])}
    assert {trial.point[D_FF]: trial.values for trial in done(ended)} == {
        label: tuple(of(cost_of(experiment)) for of in COST_FIGURES.values())
        for label, experiment in experiments.items()
    }


def test_each_arm_is_searched_for_its_own_optimum_with_the_same_budget(searched):
    text = f"""
arms: {{red: {{}}, dec: {{extends: decllm-tiny}}}}
space:
  {D_FF}: {{int: [64, 512], step: 64}}
  {ENCODER}: {{int: [1, 3], when: {{model.family: encoder_decoder}}}}
optimize: [{{metric: parameters, direction: maximize}}]
constraints: [parameters <= 400000]
"""
    ended, messages = searched(text, trials=12)
    red = [
        cost_of(load_experiment("redllm-tiny", [f"{D_FF}={d}", f"{ENCODER}={n}"])).parameters
        for d, n in itertools.product(range(64, 513, 64), (1, 2, 3))
    ]
    dec = [cost_of(load_experiment("decllm-tiny", [f"{D_FF}={d}"])).parameters for d in range(64, 513, 64)]
    possible = {arm: [n for n in found if n <= 400_000] for arm, found in {"red": red, "dec": dec}.items()}
    assert len(possible["red"]) > 12 > len(possible["dec"])
    assert len(done(ended, "red")) == 12
    assert len(done(ended, "dec")) == len(possible["dec"])
    best = {summary.arm: summary.best.values[0] for summary in ended.summaries}
    assert best["dec"] == max(possible["dec"])
    assert best["red"] in possible["red"]
    assert [text.split(":")[0] for text in messages if "no further point" in text] == ["dec"]


# --- hard spaces ---------------------------------------------------------------------------------------------------


def test_the_only_other_feasible_point_among_a_thousand_is_found(searched):
    """A space that can be listed is searched to its end, though hardly a draw of it is feasible."""
    text = f"""
space: {{{D_FF}: {{int: [8, 4008], step: 8}}, {ENCODER}: {{int: [2, 3]}}}}
constraints: ["{D_FF} == 256 + 3000 * ({ENCODER} - 2)"]
optimize: [{{metric: parameters, direction: maximize}}]
sampler: random
"""
    ended, messages = searched(text, trials=3)
    assert [trial.point for trial in done(ended)] == [{D_FF: 256, ENCODER: 2}, {D_FF: 3256, ENCODER: 3}]
    assert any("no further point after 2 trials" in text for text in messages)


def test_a_grid_of_six_numbers_has_six_trials(searched):
    """The own 0.3 is the grid's 3 x 0.1, though no float says so."""
    text = f"""
base: {{pretrain: {{training: {{dropout: 0.3}}}}}}
space: {{{DROPOUT}: {{uniform: [0.0, 0.5], step: 0.1}}}}
optimize: [{{metric: parameters}}]
"""
    ended, _ = searched(text, trials=50)
    assert sorted(trial.point[DROPOUT] for trial in done(ended)) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_two_labels_of_one_setting_are_one_trial(searched):
    same = "{a: {model.encoder.layers: 2}, b: {model.encoder.layers: 2}, c: {model.encoder.layers: 3}}"
    ended, _ = searched(f"space: {{depth: {{choice: {same}}}}}\noptimize: [{{metric: parameters}}]\n", trials=9)
    assert [trial.point["depth"] for trial in done(ended)] == ["a", "c"]


def test_draws_that_break_a_constraint_take_nothing_from_the_budget(searched):
    text = f"""
space: {{{D_FF}: {{int: [64, 256], step: 8}}, {LR}: {{log_uniform: [1e-4, 1e-2]}}}}
constraints: [{D_FF} >= 224]
optimize: [{{metric: parameters}}]
sampler: random
"""
    ended, _ = searched(text, trials=15)
    trials = done(ended)
    assert len(trials) == 15
    assert all(trial.point[D_FF] >= 224 for trial in trials)
    vain = [trial for trial in ended.trials if trial.state == "infeasible"]
    assert vain
    assert all(trial.point[D_FF] < 224 for trial in vain)
    assert len(vain) + len(trials) == len(ended.trials)


# --- samplers ------------------------------------------------------------------------------------------------------

NUMBERS = f"""
space:
  {D_FF}: {{int: [8, 256], step: 8}}
  {ENCODER}: {{int: [1, 8]}}
  {LR}: {{log_uniform: [1e-4, 1e-2]}}
first: [{{{ENCODER}: 1}}]
constraints: [parameters <= 400000]
optimize: [{{metric: parameters}}]
"""


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cma_es", "nsga2", "nsga3", "random", "qmc"])
def test_each_sampler_tries_so_many_feasible_settings_none_twice_the_own_before_all(searched, sampler):
    ended, _ = searched(f"{NUMBERS}sampler: {sampler}\n", trials=8)
    trials = done(ended)
    assert len(trials) == 8
    assert trials[0].point == {D_FF: 256, ENCODER: 2, LR: 3e-3}
    assert trials[1].point == {D_FF: 256, ENCODER: 1, LR: 3e-3}
    for trial in trials:
        d_ff, layers, rate = (trial.point[name] for name in (D_FF, ENCODER, LR))
        assert d_ff % 8 == 0
        assert 8 <= d_ff <= 256
        assert 1 <= layers <= 8
        assert 1e-4 <= rate <= 1e-2
        size = cost_of(load_experiment("redllm-tiny", [f"{D_FF}={d_ff}", f"{ENCODER}={layers}"])).parameters
        assert trial.values == (size,)
        assert size <= 400_000


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_search_cut_in_two_draws_the_points_of_one_that_was_not(searched, sampler):
    """Each draw is seeded by its number and goes by what the storage holds, so it does not see the interruption."""
    text = f"{NUMBERS}sampler: {sampler}\n"
    whole, _ = searched(text, trials=8)
    half, _ = searched(text, trials=4, name=f"cut-{sampler}")
    assert len(done(half)) == 4
    rest, _ = searched(text, trials=8, name=f"cut-{sampler}")
    drawn = [[(trial.number, trial.state, trial.point) for trial in ended.trials] for ended in (whole, half, rest)]
    assert drawn[2] == drawn[0]
    assert drawn[1] == drawn[0][: len(drawn[1])]


def test_another_seed_draws_other_points_after_those_that_are_always_tried(searched):
    zero, one = (
        [trial.point for trial in done(searched(f"{NUMBERS}sampler: random\nseeds: [{seed}]\n", trials=6)[0])]
        for seed in (0, 1)
    )
    assert zero[:2] == one[:2]
    assert not any(point in zero for point in one[2:])


def test_a_search_that_is_over_draws_nothing_more(searched):
    first, _ = searched(f"{NUMBERS}sampler: random\n", trials=4, name="over")
    again, _ = searched(f"{NUMBERS}sampler: random\n", trials=4, name="over")
    assert again.trials == first.trials

"""What follows a search: each arm as it was and at its best, over seeds that the search has not seen."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lit_llm.config.tree import leaves
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.report.figures.sweep import tuning_figure
from lit_llm.store.store import Store
from lit_llm.studies.audit.findings import Finding
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.sweeps.confirmation import confirmation_study, summary, write_best
from lit_llm.sweeps.sweep import Search, load_sweep
from lit_llm.sweeps.trial import Trial
from lit_llm.sweeps.trials import Trials
from tests.sweeps.tiny_sweeps import ALONE, LR, ONE, TWO, Seen, counted, of, rates, result, stages, sweep

pytestmark = pytest.mark.xdist_group("confirmation")
"""Their trials have the same seeds, so that one process trains what several of them search once."""
Write = Callable[..., Path]
STEPS = "pretrain.training.max_steps"
WARMUP = "pretrain.training.schedule.warmup_steps"
BETTER = f"first: [{{{LR}: 1e-2}}]"
"""In so few steps a larger rate than the arms' own is sure to win."""


def flat(experiment: Experiment) -> dict[str, object]:
    return dict(leaves(experiment.model_dump(mode="json")))


def test_the_winners_are_compared_over_three_fresh_seeds(write_sweep: Write, store: Store) -> None:
    path = write_sweep("won", f"{TWO}\n{rates()}\n{BETTER}\nseeds: [600]", trials=2)
    ended = sweep(path, store)
    assert ended.winners is not None
    assert ended.exit_code == ended.winners.exit_code == 0
    assert [row.arm for row in ended.winners.comparison.rows] == ["red", "red_tuned", "dec", "dec_tuned"]
    assert {(run.arm.name, run.seed) for run in ended.winners.runs} == {
        (arm, seed) for arm in ("red", "red_tuned", "dec", "dec_tuned") for seed in (601, 602, 603)
    }
    baselines = {run.arm.name: run.arm.baseline for run in ended.winners.runs}
    assert (baselines["red_tuned"], baselines["dec"], baselines["dec_tuned"]) == ("red", "red", "red_tuned")
    seen = {name for trial in ended.trials for name in trial.fingerprints}
    assert not seen & {run.last.fingerprint for run in ended.winners.runs}
    for run in ended.winners.runs:  # each differs from its arm in the seed alone, or in what was found too
        name, _, tuned = run.arm.name.partition("_")
        own = flat(ended.search.ablation.arm(name).experiment)
        assert flat(run.experiment) == own | {"seed": run.seed} | ({LR: 1e-2} if tuned else {})

    figure = tuning_figure(ended.search, Trials(ended.search, store))
    assert figure is not None
    drawn = [line.get_ydata() for line in figure.axes[0].lines if line.get_marker() not in ("None", None, "")]
    for ends, arm in zip(drawn, ("red", "dec"), strict=True):
        for end, name in zip(ends, (arm, f"{arm}_tuned"), strict=True):
            losses = [run.metrics()["test/target_nll"] for run in ended.winners.runs if run.arm.name == name]
            assert end == pytest.approx(statistics.fmean(losses))

    again = Seen()
    second = sweep(path, store, again)
    assert (again.begun, again.trained) == ([], [])
    assert second.winners is not None
    assert second.winners.comparison == ended.winners.comparison


def test_the_study_of_the_winners_is_a_file_that_passes_the_audit(write_sweep: Write, store: Store) -> None:
    path = write_sweep("audited", f"{TWO}\n{rates()}\n{BETTER}\nseeds: [600]\nwinners: {{seeds: [601]}}", trials=2)
    ended = sweep(path, store)
    file = store.study("audited") / "winners.yaml"
    study = load_study(file)
    planned = plan(study)
    planned.check()
    assert not [finding for finding in planned.findings if finding.kind in ("refused", "no_op", "confound")]
    assert study.study.study == "audited-winners"
    assert study.study.seeds == (601,)
    content = yaml.safe_load(file.read_text())
    assert content["compare"] == {"baseline": "red", "metric": "test/target_nll"}
    assert [rule["key"] for rule in content["allow"]] == ["budget", LR]  # what the sweep allows, and what it found
    assert "audited" in content["allow"][1]["because"]
    assert ended.winners is not None
    assert {run.seed for run in ended.winners.runs} == {601}


@pytest.mark.parametrize("bounds", ["", "tokens <= 3072", "tokens >= 1", "train_flops <= 1e30"])
def test_a_winner_by_its_budget_is_excused_by_no_bound_that_permits_it(
    write_sweep: Write, tmp_path: Path, bounds: str
) -> None:
    """24 steps against 12. The sweep itself is refused; were it not, its winners' study would be."""
    search, findings = after_steps(write_sweep, tmp_path, 24, f"\nconstraints: ['{bounds}']" if bounds else "")
    assert plan(search.ablation, built=False).refused
    assert findings[STEPS].kind == "allowed"
    assert findings["budget.tokens"].kind == "refused"
    assert findings["budget.tokens"].message.startswith("2.0 times the tokens")


@pytest.mark.parametrize("best", [6, 13])
def test_a_winner_of_a_smaller_or_about_equal_budget_passes_the_audit(
    write_sweep: Write, tmp_path: Path, best: int
) -> None:
    """From 12 steps of 128 tokens, with the bound that the audit advises."""
    search, findings = after_steps(write_sweep, tmp_path, best, f"\nconstraints: ['tokens <= {12 * 128 * 1.1}']")
    assert not plan(search.ablation, built=False).refused
    assert not [finding for finding in findings.values() if finding.kind == "refused"]
    assert ("budget.tokens" in findings) == (best == 6)


def after_steps(write_sweep: Write, tmp_path: Path, best: int, constraints: str) -> tuple[Search, dict[str, Finding]]:
    """A search of max_steps and the findings of its winners' study, where the best trial has so many steps."""
    search = load_sweep(
        write_sweep("longer", f"{ONE}\nspace: {{{STEPS}: {{int: [6, 24]}}}}{constraints}", allow_budgets=False)
    )
    own = Trial("red", 0, {STEPS: 12}, "done", values=(3.0,))
    trials = [own, Trial("red", 1, {STEPS: best}, "done", values=(2.0,))]
    path = confirmation_study(search, [summary(search, "red", trials)], tmp_path)
    assert path is not None
    write_best(search, [summary(search, "red", trials)], tmp_path)
    return search, {finding.key: finding for finding in plan(load_study(path), built=False).findings}


def test_the_best_settings_are_files_that_train_takes(write_sweep: Write, store: Store) -> None:
    rest = f"{TWO}\nspace: {{{LR}: {{log_uniform: [1e-4, 1e-1]}}, {WARMUP}: {{int: [0, 4]}}}}"
    ended = sweep(write_sweep("best", f"{rest}\nseeds: [600]\n{ALONE}", trials=4), store)
    assert [path.name for path in ended.best] == ["red.yaml", "dec.yaml"]
    for arm, path in zip(("red", "dec"), ended.best, strict=True):
        best = min(counted(ended, arm), key=lambda trial: trial.values or ())
        own = flat(ended.search.ablation.arm(arm).experiment)
        loaded = load_experiment(str(path))
        assert flat(loaded) == own | best.point
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert f"{best.values[0]:.6g}" in head[0]
        assert best.name in head[0]
        assert {f"{LR}: {best.point[LR]}" in line for line in head[1:]} == {True, False}
        (stage,) = stages(store, best)
        frozen = yaml.safe_load(stage.config_file.read_text())["experiment"]
        assert dict(leaves(frozen)) == flat(loaded) | {"seed": 600}


def test_an_arm_that_was_at_its_best_already_has_no_tuned_one(write_sweep: Write, store: Store) -> None:
    """A rate of 1e-4 learns nothing in twelve steps."""
    worse = f"{rates()}\nfirst: [{{{LR}: 1e-4}}]"
    alone = sweep(write_sweep("alone", f"{ONE}\n{worse}\nseeds: [600]", trials=2), store)
    assert alone.summaries[0].best == alone.summaries[0].default
    assert alone.winners is None
    assert not (store.study("alone") / "winners.yaml").exists()
    both = sweep(write_sweep("both", f"{TWO}\n{worse}\nseeds: [600]\nwinners: {{seeds: [601]}}", trials=2), store)
    assert both.winners is not None
    assert [run.arm.name for run in both.winners.runs] == ["red", "dec"]


def test_only_one_arm_tuned_is_compared_with_the_first_as_it_stands(write_sweep: Write, store: Store) -> None:
    """The first arm has the best rate already; what the second found is compared with that."""
    arms = "arms: {red: {pretrain: {training: {optimizer: {lr: 1e-2}}}}, dec: {extends: decllm-tiny}}"
    arms += f"\nallow: [{{key: {LR}, because: it is what is searched}}]"
    space = f"space: {{{LR}: {{choice: [1e-4, 3e-3, 1e-2]}}}}"
    ended = sweep(write_sweep("uneven", f"{arms}\n{space}\nseeds: [600]\nwinners: {{seeds: [601]}}", trials=3), store)
    assert [summary.best.point for summary in ended.summaries if summary.best] == [{LR: "0.01"}] * 2
    assert ended.winners is not None
    assert {run.arm.name: run.arm.baseline for run in ended.winners.runs}["dec_tuned"] == "red"
    assert [run.arm.name for run in ended.winners.runs] == ["red", "dec", "dec_tuned"]


def test_an_arm_called_as_a_winner_would_be_is_not_lost(write_sweep: Write, store: Store) -> None:
    """Six fits: `red`, `red_tuned` and what was found for each; or the file is refused before anything is trained."""
    arms = "arms: {red: {}, red_tuned: {extends: decllm-tiny}, red-own: {model: {attention: {output_norm: none}}}}"
    path = write_sweep("namesakes", f"{arms}\n{rates()}\n{BETTER}\nseeds: [600]\nwinners: {{seeds: [601]}}", trials=2)
    ended = sweep(path, store)
    assert ended.winners is not None
    found = [flat(run.experiment) for run in ended.winners.runs]
    for arm in load_sweep(path).ablation.arms:
        for lr in (3e-3, 1e-2):
            assert flat(arm.experiment) | {"seed": 601, LR: lr} in found, f"{arm.name} at {lr}"


def test_several_goals_end_with_the_trials_that_no_other_beats(write_sweep: Write, store: Store) -> None:
    """By comparing each with each: loss and size, both to be small."""
    width = "model.feed_forward.d_ff"
    space = f"space: {{{width}: {{choice: [16, 32, 64]}}, {LR}: {{choice: [1e-4, 3e-3, 1e-2]}}}}"
    goals = "optimize: [{metric: val/target_nll}, {metric: parameters}]"
    ended = sweep(write_sweep("goals", f"{ONE}\n{space}\n{goals}\nseeds: [600]", trials=9), store)
    trials = {trial.number: trial for trial in counted(ended, "red")}
    assert len(trials) == 9
    values = {number: trial.values or () for number, trial in trials.items()}
    for trial in trials.values():
        (stage,) = stages(store, trial)
        found = result(stage)
        assert trial.values == (found["metrics"]["val/target_nll"], found["parameters"])
    front = {
        number
        for number, mine in values.items()
        if not any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in values.values())
    }
    assert 0 < len(front) < 9
    assert {trial.number for trial in ended.summaries[0].front} == front
    assert {path.name for path in ended.best} == {f"red-trial-{number:03}.yaml" for number in front}
    for path in ended.best:
        number = int(path.stem.rpartition("-")[2])
        experiment = load_experiment(str(path))
        assert experiment == ended.search.spaces["red"].experiment(trials[number].point)
        assert str(experiment.model.feed_forward.d_ff) == trials[number].point[width]
    assert ended.winners is None
    assert not (store.study("goals") / "winners.yaml").exists()


def test_winners_that_cannot_be_compared_are_told_and_the_search_is_not_lost(write_sweep: Write, store: Store) -> None:
    """The name of their study is another sweep's."""
    sweep(write_sweep("blocked-winners", f"{ONE}\n{rates()}\nseeds: [600]\n{ALONE}", trials=1), store)
    observer = Seen()
    ended = sweep(write_sweep("blocked", f"{ONE}\n{rates()}\n{BETTER}\nseeds: [600]", trials=2), store, observer)
    assert ended.winners is None
    assert [path.name for path in ended.best] == ["red.yaml"]
    assert any("blocked-winners is the name of a sweep" in message for message in observer.messages)
    assert ended.exit_code == 1


def test_more_trials_bring_another_winner_and_the_study_follows(write_sweep: Write, store: Store) -> None:
    path = write_sweep("followed", f"{ONE}\n{rates()}\n{BETTER}\nseeds: [600]\nwinners: {{seeds: [601]}}", trials=2)
    first = sweep(path, store)
    path.write_text(path.read_text().replace("trials: 2", "trials: 8"))
    second = sweep(path, store)
    assert first.winners is not None
    assert second.winners is not None
    lowest = min(of(second, "red"), key=lambda trial: trial.values or ())
    assert lowest.number >= 2
    tuned = [run for run in second.winners.runs if run.arm.name == "red_tuned"]
    assert [run.experiment.pretrain.training.optimizer.lr for run in tuned] == [lowest.point[LR]]
    assert second.exit_code == 0

"""What is given up, and when: where Optuna's pruner says so, at that very step, and so that it can be gone on with."""

from __future__ import annotations

import os
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import optuna
import pytest

from lit_llm.report.tables.sweep import trials_table
from lit_llm.store.store import Store, read_json, read_metrics, write_json
from lit_llm.studies.load import load_study
from lit_llm.studies.run import run_study
from lit_llm.sweeps.run import Searched
from lit_llm.sweeps.samplers import make_pruner
from lit_llm.sweeps.sweep import load_sweep
from lit_llm.sweeps.trial import Trial
from lit_llm.sweeps.trials import Trials
from tests.sweeps.tiny_sweeps import (
    ALONE,
    LR,
    ONE,
    STEP,
    STEPS,
    TWO,
    Coordinator,
    Seen,
    beside,
    counted,
    pid_of,
    rates,
    result,
    stages,
    sweep,
    validations,
)

Write = Callable[..., Path]
NINE = ["pretrain.training.max_steps=18", "pretrain.validation.times=9"]
"""A validation after every second step."""
HALVED = f"{ONE}\n{rates()}\nfirst: [{{{LR}: 1e-4}}]\npruner: successive_halving\n{ALONE}"
"""A rate of 1e-4 learns nothing in twelve steps, and is given up at the first validation."""


def stopped(ended: Searched, arm: str, trials: Sequence[Trial]) -> Iterator[int | None]:
    """Where Optuna stops each trial, in a study that is told the recorded reports one trial after another."""
    pruner = make_pruner(ended.search.sweep, ended.search.ablation.arm(arm).experiment)
    study = optuna.create_study(study_name=f"{ended.search.name}/{arm}", pruner=pruner)
    for trial in trials:
        asked = study.ask()
        assert asked.number == trial.number
        stop = None
        for progress, value in trial.reports:
            assert stop is None, "it was asked after it had said no"
            asked.report(value, progress)
            if asked.should_prune():
                stop = progress
        yield stop
        states = {"done": optuna.trial.TrialState.COMPLETE, "pruned": optuna.trial.TrialState.PRUNED}
        study.tell(asked, trial.values, states[trial.state])


PRUNERS = {
    "median": optuna.pruners.MedianPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
}


@pytest.mark.parametrize("kind", PRUNERS)
def test_a_trial_ends_at_the_validation_at_which_optuna_says_so(write_sweep: Write, store: Store, kind: str) -> None:
    """The reports are the validations on disk; the last step there is the one of the verdict."""
    seed = 340 + list(PRUNERS).index(kind)  # each trains its own: what is there already is not trained again
    rest = f"{ONE}\n{rates()}\nseeds: [{seed}]\npruner: {kind}\nsampler: random\n{ALONE}"
    ended = sweep(write_sweep(f"pruned_{kind}", rest, trials=9), store, max_parallel=1, overrides=NINE)
    trials = counted(ended, "red")
    own = ended.search.ablation.arm("red").experiment
    assert isinstance(make_pruner(ended.search.sweep, own), PRUNERS[kind])
    assert {trial.state for trial in trials} == {"done", "pruned"}
    assert trials[0].state == "done"
    for trial, stop in zip(trials, stopped(ended, "red", trials), strict=True):
        (stage,) = stages(store, trial)
        found = validations(stage)
        last = 18 if stop is None else 2 * stop
        assert trial.state == ("done" if stop is None else "pruned")
        assert list(found) == list(range(2, last + 1, 2))
        assert read_metrics(stage.metrics_file)[-1]["step"] == last
        assert trial.reports == tuple((step // 2, line["val/target_nll"]) for step, line in found.items() if step < 18)
        assert trial.tokens == last * STEP
        assert (trial.values is None) == (stage.result() is None) == (stop is not None)
        if stop is not None:
            assert stage.status()["error"] == f"pruned at step {last}"
            assert (stage.checkpoints / "last.ckpt").exists()
    assert ended.summaries[0].tokens == sum(trial.tokens for trial in trials) < 9 * 18 * STEP
    assert ended.exit_code == 0


def test_median_gives_up_what_is_worse_than_half_of_the_finished_trials(write_sweep: Write, store: Store) -> None:
    """By arithmetic: the best value so far is above the median of what finished trials had at that point; a trial that
    went on was not above it at its last judgement, once three had finished and a third of the training was over."""
    rest = f"{ONE}\n{rates()}\nseeds: [321]\npruner: median\nsampler: random\n{ALONE}"
    ended = sweep(write_sweep("median_halves", rest, trials=10), store, max_parallel=1, overrides=NINE)
    finished: list[dict[int, float]] = []
    pruned = 0
    for trial in counted(ended, "red"):
        reports = dict(trial.reports)
        for progress in reports:
            best = min(value for at, value in reports.items() if at <= progress)
            worse = bool(finished) and best > statistics.median(done[progress] for done in finished)
            is_last = trial.state == "pruned" and progress == max(reports)
            if is_last:
                assert worse
                assert progress > 9 // 3
                pruned += 1
            elif len(finished) >= 3 and progress > 9 // 3 + 1:
                assert not worse
        if trial.state == "done":
            finished.append(reports)
    assert pruned


def test_a_study_goes_on_with_what_a_search_gave_up(
    write_sweep: Write, write_study: Write, store: Store, tmp_path: Path
) -> None:
    """The lines before the stop stay as they were written, and the end is the one of a run that nobody disturbed."""
    rest = f"{ONE}\n{rates()}\nfirst: [{{{LR}: 1e-4}}]\nseeds: [322]\npruner: successive_halving\n{ALONE}"
    path = write_sweep("given_up", rest, trials=2)
    ended = sweep(path, store, max_parallel=1)
    trial = ended.trials[1]
    assert (trial.state, trial.point) == ("pruned", {LR: 1e-4})
    before = read_metrics(stages(store, trial)[0].metrics_file)
    assert before[-1]["step"] == 4
    arms = f"arms: {{red: {{pretrain: {{training: {{optimizer: {{lr: {trial.point[LR]}}}}}}}}}}}"
    study = load_study(write_study("goes_on", arms, seeds=[322]))
    (run,) = run_study(study, store, observer=Seen(), max_parallel=1).runs
    assert run.last.fingerprint == trial.fingerprints[0]
    lines = read_metrics(run.last.metrics_file)
    assert lines[: len(before)] == before
    assert [line["step"] for line in lines] == [4, 8, 12]
    other, tracking = beside(store, tmp_path / "undisturbed")
    (whole,) = run_study(study, other, observer=Seen(), max_parallel=1, tracking=tracking).runs
    weights = [run.last.checkpoints / "model.safetensors" for run in (run, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    # To the search it stays given up.
    observer = Seen()
    assert sweep(path, store, observer, max_parallel=1).trials == ended.trials
    assert observer.begun == []


def test_by_tokens_trials_are_compared_after_equally_many_tokens(write_sweep: Write, store: Store) -> None:
    """The arm itself reads 4 x 32 x 4 tokens between two validations. What others have read when they are judged at the
    same point is as much, to half a step of either."""
    key = "pretrain.data.batch_size"
    space = f"space: {{{key}: {{choice: [2, 4, 6, 8]}}}}"
    firsts = f"first: [{{{key}: 2}}, {{{key}: 6}}, {{{key}: 8}}]"
    rest = f"{ONE}\n{space}\n{firsts}\nseeds: [323]\npruner: {{kind: median, by: tokens}}\n{ALONE}"
    ended = sweep(write_sweep("by_tokens", rest, trials=4), store, max_parallel=1)
    trials = {int(trial.point[key]): trial for trial in counted(ended, "red")}
    assert set(trials) == {2, 4, 6, 8}
    assert [progress for progress, _ in trials[4].reports] == [1, 2]
    for size, trial in trials.items():
        (stage,) = stages(store, trial)
        read = {line["val/target_nll"]: line["tokens_seen"] for line in validations(stage).values()}
        assert trial.reports
        for progress, value in trial.reports:
            assert abs(read[value] - progress * 4 * STEP) <= (STEP + size * 32) / 2, f"batch_size {size}"


def test_by_steps_they_are_compared_after_equally_many_steps(write_sweep: Write, store: Store) -> None:
    key = "pretrain.data.batch_size"
    rest = f"{ONE}\nspace: {{{key}: {{choice: [2, 4, 8]}}}}\nseeds: [324]\npruner: median\n{ALONE}"
    ended = sweep(write_sweep("by_steps", rest, trials=3), store, max_parallel=1)
    for trial in counted(ended, "red"):
        (stage,) = stages(store, trial)
        found = {step: line["val/target_nll"] for step, line in validations(stage).items() if step < STEPS}
        assert trial.reports == tuple((step // 4, value) for step, value in found.items())


def test_wilcoxon_stops_after_four_seeds_that_are_all_worse(write_sweep: Write, store: Store) -> None:
    """The least p of a one-sided signed-rank test over n pairs is 2^-n: 1/8 after three, 1/16 < 0.1 after four."""
    assert 2**-4 < 0.1 < 2**-3
    seeds = [325, 326, 327, 328, 329, 330]
    rest = f"{ONE}\n{rates()}\nfirst: [{{{LR}: 1e-4}}]\nseeds: {seeds}\npruner: wilcoxon\n{ALONE}"
    ended = sweep(write_sweep("ranks", rest, trials=2), store, max_parallel=1)
    own, worse = counted(ended, "red")
    assert (own.state, worse.state, worse.values) == ("done", "pruned", None)
    results = [[stage.result() for stage in stages(store, trial)] for trial in (own, worse)]
    assert [sum(found is not None for found in of_trial) for of_trial in results] == [6, 4]
    assert not any(stage.metrics_file.exists() for stage in stages(store, worse)[4:])
    four, best = (
        [result(stage)["metrics"]["val/target_nll"] for stage in stages(store, trial)[:4]] for trial in (worse, own)
    )
    assert worse.reports == tuple(enumerate(four))
    assert all(left > right for left, right in zip(four, best, strict=True))
    assert (own.tokens, worse.tokens) == (6 * STEPS * STEP, 4 * STEPS * STEP)


def test_hyperband_has_one_schedule_for_all_arms_and_from_the_first_draw_on(write_sweep: Write) -> None:
    """Optuna's own goes by the study's name, in which the arm is. Of nine validations there are three brackets, which
    get trials as ceil(3 x 3^s / (s + 1)) for s = 2, 1, 0: 9, 5 and 3 of 17 (Li et al. 2018, algorithm 1)."""
    search = load_sweep(write_sweep("brackets", f"{TWO}\n{rates()}\npruner: hyperband", trials=2), NINE)
    trials = [optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING) for _ in range(1700)]
    for number, trial in enumerate(trials):
        trial.number = number
    brackets: list[list[int]] = []
    for arm in ("red", "dec"):
        pruner = make_pruner(search.sweep, search.ablation.arm(arm).experiment)
        assert isinstance(pruner, optuna.pruners.HyperbandPruner)
        study = optuna.create_study(study_name=f"brackets/{arm}", pruner=pruner)
        brackets.append([pruner._get_bracket_id(study, trial) for trial in trials])
    assert brackets[0] == brackets[1]
    for bracket, share in enumerate((9, 5, 3)):
        assert abs(brackets[0].count(bracket) - share * 100) < 5 * (share * 100) ** 0.5


@pytest.mark.parametrize("kind", ["hyperband", "successive_halving"])
def test_an_arms_own_setting_is_not_given_up_and_others_are_ranked_with_it(
    write_sweep: Write, store: Store, kind: str
) -> None:
    """The last of three at every point, and then the best of four: Optuna keeps the best third of those at a rung."""
    path = write_sweep(f"own_{kind}", f"{ONE}\n{rates()}\npruner: {kind}\nseeds: [343]", trials=4)
    trials = Trials(load_sweep(path), store)
    with trials.coordinating():
        own, *others, last = [found for _ in range(4) if (found := trials.next()) is not None]
        for value, trial in enumerate(others):
            trials.report(trial, 1, value)
        assert not trials.report(own, 1, 9.0)
        assert trials.report(last, 1, 9.5)
        assert not next(trial for trial in trials.all() if trial.number == own.number).pruned


@pytest.mark.parametrize(
    ("pruner", "seeds", "reports", "note"),
    [
        ("median", [346], (1, 2), "pruned at validation 2 of 3"),
        ("wilcoxon", [346, 347, 348, 349, 350], (0, 1, 2, 3), "pruned after 4 of 5 seeds"),
    ],
)
def test_the_table_of_trials_says_where_one_was_pruned(
    write_sweep: Write, store: Store, pruner: str, seeds: list[int], reports: Sequence[int], note: str
) -> None:
    """Validations are counted from one, and a seed is reported by its index."""
    rest = f"{ONE}\n{rates()}\npruner: {pruner}\nseeds: {seeds}"
    search = load_sweep(write_sweep(f"noted_{pruner}", rest, trials=2))
    trials = Trials(search, store)
    with trials.coordinating():
        trial = trials.next()
        assert trial is not None
        for progress in reports:
            trials.report(trial, progress, 1.0)
        trials.finish(trial, "pruned")
        (row,) = trials_table(search, trials.all()).rows
        assert (row[0], row[1], row[-1]) == ("red/trial 000", "pruned", note)


def test_another_name_for_the_sweep_finds_the_same_in_what_is_there(write_sweep: Write, store: Store) -> None:
    """What the first has trained and given up is judged by the second as it was by the first, and costs no step."""
    rest = f"{HALVED}\nseeds: [344]"
    first = sweep(write_sweep("first_name", rest, trials=2), store, max_parallel=1)
    assert [trial.state for trial in first.trials] == ["done", "pruned"]
    observer = Seen()
    second = sweep(write_sweep("second_name", rest, trials=2), store, observer, max_parallel=1)
    for left, right in zip(first.trials, second.trials, strict=True):
        assert (left.state, left.values, left.reports, left.tokens) == (
            right.state,
            right.values,
            right.reports,
            right.tokens,
        )
    assert observer.begun == ["red/trial 000"]


def test_a_checkpoint_of_other_code_tells_the_pruner_nothing(write_sweep: Write, store: Store) -> None:
    """It is not gone on from, so the lines beside it are of no run of this search."""
    rest = f"{HALVED}\nseeds: [345]"
    first = sweep(write_sweep("old_lines", rest, trials=2), store, max_parallel=1)
    (stage,) = stages(store, first.trials[1])
    note = stage.checkpoints / "provenance.json"
    write_json(note, {**(read_json(note) or {}), "code": "older"}, signed=True)
    lines = stage.metrics_file.read_text()
    stage.metrics_file.write_text(lines.replace('"val/target_nll": ', '"val/target_nll": 1'))
    second = sweep(write_sweep("new_lines", rest, trials=2), store, max_parallel=1)
    assert second.trials[1].reports == first.trials[1].reports
    assert stage.metrics_file.read_text() != lines.replace('"val/target_nll": ', '"val/target_nll": 1')


# --- a verdict holds whatever dies ---------------------------------------------------------------------------------


def test_a_trial_whose_process_dies_of_the_verdict_stays_given_up(
    write_sweep: Write, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before it could write the checkpoint of the step at which it was judged."""
    report, killed = Trials.report, list[int]()

    def report_and_kill(trials: Trials, trial: Trial, progress: int, value: float) -> bool:
        verdict = report(trials, trial, progress, value)
        if verdict and not killed:
            killed.append(pid_of(store.stage(trial.fingerprints[0])))
            os.kill(killed[0], signal.SIGKILL)
        return verdict

    monkeypatch.setattr(Trials, "report", report_and_kill)
    ended = sweep(write_sweep("verdict", f"{HALVED}\nseeds: [331]", trials=2), store, max_parallel=1)
    assert killed
    trial = ended.trials[1]
    assert (trial.state, trial.values, trial.pruned) == ("pruned", None, True)
    assert trial.reports[-1][0] == 1
    assert trial.tokens == 4 * STEP


@pytest.mark.slow
def test_a_coordinator_that_dies_of_the_verdict_has_spent_what_was_spent(
    write_sweep: Write, store: Store, tmp_path: Path
) -> None:
    """Killed when it was about to write down that the trial is given up; the next one writes the same."""
    fault = """
finish = Trials.finish
Trials.finish = lambda self, trial, ended, *rest, **more: (
    die() if ended == "pruned" else finish(self, trial, ended, *rest, **more)
)
"""
    path = write_sweep("last_words", f"{HALVED}\nseeds: [332]", trials=2)
    first = Coordinator(tmp_path, path, store.root, fault=fault)
    assert first.wait() == -signal.SIGKILL
    observer = Seen()
    ended = sweep(path, store, observer)
    assert observer.begun == []
    assert [trial.state for trial in ended.trials] == ["done", "pruned"]
    assert ended.trials[1].tokens == 4 * STEP


def test_a_validation_that_nobody_heard_of_is_judged_by_the_next_coordinator(
    write_sweep: Write, store: Store, tmp_path: Path
) -> None:
    """Killed when it was asked, at the first validation, at which the trial is given up where nobody dies."""
    fault = """
report = Trials.report
Trials.report = lambda self, trial, *found: die() if trial.number == 1 else report(self, trial, *found)
"""
    path = write_sweep("unheard", f"{HALVED}\nseeds: [334]", trials=2)
    assert Coordinator(tmp_path, path, store.root, fault=fault).wait() == -signal.SIGKILL
    observer = Seen()
    ended = sweep(path, store, observer, max_parallel=1)
    assert [trial.state for trial in ended.trials] == ["done", "pruned"]
    assert [progress for progress, _ in ended.trials[1].reports] == [1]
    assert observer.begun == []


def test_mlflow_shows_what_was_given_up_as_such(write_sweep: Write, store: Store) -> None:
    ended = sweep(write_sweep("shown_pruned", f"{HALVED}\nseeds: [333]", trials=2), store, max_parallel=1)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store.root}/mlflow.db")
    experiment = client.get_experiment_by_name("shown_pruned")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`lit_llm.trial` = '1'")
    assert ended.trials[1].state == "pruned"
    (child,) = runs
    assert (child.info.status, child.data.tags["lit_llm.state"]) == ("KILLED", "pruned")
    assert "objective/val/target_nll" not in child.data.metrics
    history = client.get_metric_history(child.info.run_id, "val/target_nll")
    assert [(point.step, point.value) for point in history] == [(4, ended.trials[1].reports[0][1])]

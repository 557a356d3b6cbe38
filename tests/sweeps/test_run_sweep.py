"""Running a sweep: the same budget for each arm, nothing done twice, nothing lost by what goes wrong."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.launch import local
from lit_llm.runs.fingerprints import pretrain_fingerprint
from lit_llm.runs.provenance import CODE
from lit_llm.runs.worker import preloaded
from lit_llm.store.store import Store, read_json, write_json
from lit_llm.studies.load import load_study
from lit_llm.studies.run import run_study
from lit_llm.sweeps.space import ArmSpace, Point
from lit_llm.sweeps.sweep import load_sweep
from lit_llm.sweeps.trials import Trials
from tests.sweeps.tiny_sweeps import (
    ALONE,
    LR,
    ONE,
    STEP,
    STEPS,
    TWO,
    Seen,
    counted,
    of,
    rates,
    result,
    stages,
    sweep,
)

Write = Callable[..., Path]


# --- the budget ----------------------------------------------------------------------------------------------------


def test_each_arm_gets_its_trials_and_each_trial_is_the_mean_over_its_seeds(write_sweep: Write, store: Store) -> None:
    """Judge: the results of the stages on disk; tokens are steps x batch_size x sequence_length x seeds."""
    path = write_sweep("budget", f"{TWO}\n{rates()}\nseeds: [300, 301]\n{ALONE}", trials=3)
    ended = sweep(path, store)
    assert ended.exit_code == 0
    assert ended.winners is None
    for arm in ("red", "dec"):
        trials = counted(ended, arm)
        assert [trial.number for trial in trials] == [0, 1, 2]
        assert trials[0].point == {LR: ended.search.ablation.arm(arm).experiment.pretrain.training.optimizer.lr}
        assert len({trial.point[LR] for trial in trials}) == 3
        for trial in trials:
            results = [result(stage) for stage in stages(store, trial)]
            assert len(results) == 2
            assert trial.values == (statistics.fmean(found["metrics"]["val/target_nll"] for found in results),)
            assert trial.tokens == 2 * STEPS * STEP
            assert trial.flops == sum(found["flops"] for found in results)
            written = [stage.config_file.read_text() for stage in stages(store, trial)]
            assert [f"seed: {seed}" in text for seed, text in zip((300, 301), written, strict=True)] == [True, True]
        best = min(trials, key=lambda trial: trial.values or ())
        (found,) = [summary for summary in ended.summaries if summary.arm == arm]
        assert (found.best, found.default, found.counted, found.tokens) == (best, trials[0], 3, 3 * 2 * STEPS * STEP)


def test_a_second_run_trains_nothing_and_a_larger_number_of_trials_goes_on(write_sweep: Write, store: Store) -> None:
    path = write_sweep("again", f"{TWO}\n{rates()}\nseeds: [302]\n{ALONE}", trials=2)
    first = sweep(path, store)
    again = Seen()
    assert sweep(path, store, again).trials == first.trials
    assert again.begun == []
    more = Seen()
    path.write_text(path.read_text().replace("trials: 2", "trials: 4"))
    second = sweep(path, store, more)
    assert sorted(more.begun) == [f"{arm}/trial 00{number}" for arm in ("dec", "red") for number in (2, 3)]
    for arm in ("red", "dec"):
        assert counted(second, arm)[:2] == counted(first, arm)
        assert len(counted(second, arm)) == 4
    fewer = Seen()
    path.write_text(path.read_text().replace("trials: 4", "trials: 1"))
    assert sweep(path, store, fewer).trials == second.trials
    assert fewer.begun == []


@pytest.mark.parametrize("sampler", ["tpe", "qmc"])
def test_a_search_that_stops_in_between_draws_what_it_would_have_drawn(
    write_sweep: Write, store: Store, sampler: str
) -> None:
    """One at a time, a draw depends on what was found before and on its number, not on how often it was begun."""
    rest = f"{ONE}\n{rates()}\nseeds: [303]\nsampler: {sampler}\n{ALONE}"
    whole = sweep(write_sweep(f"whole_{sampler}", rest, trials=6), store, max_parallel=1)
    for trials in (1, 3, 6):
        parts = sweep(write_sweep(f"parts_{sampler}", rest, trials=trials), store, max_parallel=1)
    assert [trial.point for trial in parts.trials] == [trial.point for trial in whole.trials]


def test_a_small_space_is_tried_out_once_and_the_search_says_why_it_ends(write_sweep: Write, store: Store) -> None:
    """3 x 2 points and ten trials: each point once."""
    space = (
        f"space: {{{LR}: {{choice: [1e-3, 3e-3, 1e-2]}}, pretrain.training.schedule.warmup_steps: {{choice: [0, 2]}}}}"
    )
    observer = Seen()
    ended = sweep(write_sweep("small", f"{ONE}\n{space}\nseeds: [304]\n{ALONE}", trials=10), store, observer)
    points = [tuple(trial.point.values()) for trial in counted(ended, "red")]
    assert len(points) == len(set(points)) == 6
    assert any("red: no further point after 6 trials" in message for message in observer.messages)
    assert ended.exit_code == 0


def test_a_finite_space_is_listed_once(write_sweep: Write, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wait while it is: every point is resolved to an experiment. 24 points, all of them drawn."""
    space = f"space: {{pretrain.training.schedule.warmup_steps: {{int: [0, 11]}}, {LR}: {{choice: [1e-3, 3e-3]}}}}"
    search = load_sweep(write_sweep("listed", f"{ONE}\n{space}\nsampler: random", trials=30))
    listed: list[str] = []
    every_point = ArmSpace.every_point

    def counted_every_point(space: ArmSpace, most: int) -> list[Point] | None:
        listed.append(space.arm.name)
        return every_point(space, most)

    monkeypatch.setattr(ArmSpace, "every_point", counted_every_point)
    trials = Trials(search, store)
    drawn = []
    with trials.coordinating():
        while (trial := trials.next()) is not None:
            drawn.append(str(trial.point))
    assert len(drawn) == len(set(drawn)) == 24
    assert listed == ["red"]


def test_what_a_study_has_trained_is_not_trained_again(
    write_sweep: Write, write_study: Write, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arm's own setting is an experiment like any other: its result is the study's, to the file. Both ask the fork
    server for the same modules."""
    asked: list[list[str]] = []
    warm_up = local.warm_up
    monkeypatch.setattr(local, "warm_up", lambda modules, grace: (asked.append([*modules]), warm_up(modules, grace)))
    study = run_study(load_study(write_study("before", ONE, seeds=[305])), store, observer=Seen(), max_parallel=1)
    (run,) = study.runs
    written = (run.last.folder / "result.json").stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # one fork server has what studies and sweeps need
        ended = sweep(write_sweep("after", f"{ONE}\n{rates()}\nseeds: [305]\n{ALONE}", trials=1), store)
    assert asked == [preloaded()] * 2
    assert ended.trials[0].fingerprints == (run.last.fingerprint,)
    assert ended.trials[0].values == (result(run.last)["metrics"]["val/target_nll"],)
    assert (run.last.folder / "result.json").stat().st_mtime_ns == written


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_failed_trial_is_recorded_stops_nothing_and_is_repeated_on_request(write_sweep: Write, store: Store) -> None:
    """A folder lies where the arm's own setting has to write a file."""
    path = write_sweep("failing", f"{ONE}\n{rates()}\nseeds: [306]\n{ALONE}", trials=3)
    own = load_sweep(path).ablation.arm("red").experiment.model_copy(update={"seed": 306})
    stage = store.stage(pretrain_fingerprint(own))
    stage.progress_file.mkdir(parents=True)
    ended = sweep(path, store)
    assert [trial.state for trial in counted(ended, "red")] == ["failed", "done", "done"]
    failed = ended.trials[0]
    assert (failed.values, failed.tokens) == (None, 0)
    assert "Is a directory" in (failed.error or "")
    assert ended.exit_code == 1
    assert ended.summaries[0].best is not None

    kept = Seen()
    assert sweep(path, store, kept).trials == ended.trials
    assert kept.begun == []

    stage.progress_file.rmdir()
    repeated = Seen()
    mended = sweep(path, store, repeated, rerun="failed")
    assert repeated.begun == ["red/trial 003"]
    assert mended.exit_code == 0
    assert [(trial.number, trial.state) for trial in counted(mended, "red")] == [(1, "done"), (2, "done"), (3, "done")]
    assert mended.trials[3].point == failed.point
    assert mended.summaries[0].default == mended.trials[3]
    assert mended.trials[0].retried
    nothing = Seen()
    assert sweep(path, store, nothing, rerun="failed").trials == mended.trials
    assert nothing.begun == []


def test_a_trial_without_a_number_for_the_goal_has_failed_and_says_so(write_sweep: Write, store: Store) -> None:
    goal = "optimize: [{metric: val/target_nll/nobody}]"
    ended = sweep(write_sweep("nameless", f"{ONE}\n{rates()}\n{goal}\nseeds: [307]\n{ALONE}", trials=2), store)
    assert [trial.state for trial in counted(ended, "red")] == ["failed", "failed"]
    assert all("val/target_nll/nobody" in (trial.error or "") for trial in ended.trials)
    assert (ended.exit_code, ended.summaries[0].best, ended.best) == (1, None, ())


def test_a_diverged_trial_counts_has_no_value_and_is_never_the_best(write_sweep: Write, store: Store) -> None:
    """1e20 is no learning rate; where large is better too, and where nothing else is left."""
    arms = "arms: {red: {model: {attention: {qkv_norm: []}}}}"
    for number, goal in enumerate(("minimize", "maximize")):
        rest = f"{arms}\n{rates(1e-4, 1e21)}\nfirst: [{{{LR}: 1e20}}]\nseeds: [{308 + number}]\n{ALONE}"
        goals = f"optimize: [{{metric: val/target_nll, direction: {goal}}}]"
        ended = sweep(write_sweep(f"diverging_{goal}", f"{rest}\n{goals}", trials=2), store)
        assert [trial.state for trial in counted(ended, "red")] == ["done", "diverged"]
        assert ended.trials[1].values is None
        assert 0 < ended.trials[1].tokens < STEPS * STEP
        assert ended.summaries[0].best == ended.trials[0]
        assert ended.summaries[0].front == (ended.trials[0],)
        assert ended.exit_code == 0
    arms = "arms: {red: {model: {attention: {qkv_norm: []}}, pretrain: {training: {optimizer: {lr: 1e20}}}}}"
    ended = sweep(write_sweep("lost", f"{arms}\n{rates(1e19, 1e21)}\nseeds: [310]", trials=2), store)
    assert [trial.state for trial in counted(ended, "red")] == ["diverged", "diverged"]
    assert (ended.summaries[0].best, ended.best, ended.winners, ended.exit_code) == (None, (), None, 0)


# --- whose trials they are -----------------------------------------------------------------------------------------


def test_another_space_under_the_same_name_is_refused_with_the_keys_that_changed(
    write_sweep: Write, store: Store
) -> None:
    ended = sweep(write_sweep("changed", f"{ONE}\n{rates()}\nseeds: [311]\n{ALONE}", trials=1), store)
    others = {
        f"{ONE}\n{rates(1e-5)}\nseeds: [311]\n{ALONE}": "log_uniform",
        f"{ONE}\n{rates()}\nseeds: [312]\n{ALONE}": "seeds",
        f"{ONE}\n{rates()}\nseeds: [311]\nsampler: random\n{ALONE}": "sampler",
        f"arms: {{red: {{model: {{d_model: 32}}}}}}\n{rates()}\nseeds: [311]\n{ALONE}": "arms.red.model.d_model",
        f"{TWO}\n{rates()}\nseeds: [311]\n{ALONE}": "arms",
    }
    for rest, key in others.items():
        with pytest.raises(InputError, match=f"{key}.* changed.* another name"):
            sweep(write_sweep("changed", rest, trials=2), store)
    # What is asked of the search, and how many trials, may change.
    words = "question: What now?\nwinners: {seeds: []}"
    again = sweep(write_sweep("changed", f"{ONE}\n{rates()}\nseeds: [311]\n{words}", trials=1), store)
    assert again.trials == ended.trials


def test_trials_of_other_code_are_refused_or_begun_anew(write_sweep: Write, store: Store) -> None:
    """The records say that older code has done them."""
    path = write_sweep("of_other_code", f"{ONE}\n{rates()}\nseeds: [313]\n{ALONE}", trials=2)
    first = sweep(path, store)
    journal = store.study("of_other_code") / "optuna.journal"
    journal.write_text(journal.read_text().replace(first.trials[0].origin, "older"))
    for trial in first.trials:
        (stage,) = stages(store, trial)
        old = result(stage)
        write_json(stage.folder / "result.json", old | {"provenance": old["provenance"] | {"code": "older"}})
    refused = Seen()
    with pytest.raises(InputError, match="red/trial 000.*other code.*--rerun stale"):
        sweep(path, store, refused)
    assert refused.begun == []
    anew = Seen()
    second = sweep(path, store, anew, rerun="stale")
    assert anew.begun == ["red/trial 000", "red/trial 001"]
    assert second.trials[0].point == first.trials[0].point
    for trial in second.trials:
        assert trial.origin == first.trials[0].origin
        assert [result(stage)["provenance"]["code"] for stage in stages(store, trial)] == [CODE]
    assert [path.name for path in journal.parent.glob("optuna.journal.*[0-9]")] == ["optuna.journal.1"]
    assert sweep(path, store).trials == second.trials


@pytest.mark.parametrize(
    ("key", "values", "word"), [("dropout", [0.0, 0.1], "drops"), ("precision", ["fp32", "bf16_master"], "rounds")]
)
def test_a_search_of_what_tells_origins_apart_goes_on(
    write_sweep: Write, store: Store, key: str, values: list[object], word: str
) -> None:
    """With dropout, and in bfloat16, the micro-batch is a part of the origin: of each trial by its own setting."""
    space = f"space: {{pretrain.training.{key}: {{choice: {values}}}}}"
    path = write_sweep(word, f"{ONE}\n{space}\nseeds: [317]\n{ALONE}", trials=2)
    ended = sweep(path, store)
    assert len({trial.origin for trial in ended.trials}) == 2
    observer = Seen()
    assert sweep(path, store, observer).trials == ended.trials
    assert observer.begun == []
    # Another micro-batch changes what one of them is, and not the arm's own.
    key = "pretrain.training.execution.micro_batch_size"
    with pytest.raises(InputError, match=r"red/trial 001 was done with other code.*--rerun stale"):
        sweep(path, store, overrides=[f"{key}=2"])


def test_two_that_begin_together_with_other_code_do_not_both_search(
    write_sweep: Write, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is refused before the first has drawn a trial, and puts nothing aside while the first is alive."""
    search = load_sweep(write_sweep("together", f"{TWO}\n{rates()}\nseeds: [318]", trials=1))
    with Trials(search, store).coordinating():
        monkeypatch.setattr("lit_llm.runs.provenance.CODE", "newer")
        with pytest.raises(InputError, match="red, dec were done with other code"):
            Trials(search, store).coordinating().__enter__()
        with pytest.raises(InputError, match="another process works on together with other code"):
            Trials(search, store).coordinating("stale").__enter__()
    with Trials(search, store).coordinating("stale"):
        pass
    with Trials(search, store).coordinating():
        pass


def test_a_result_of_other_code_is_put_aside_and_its_trial_is_trained(
    write_sweep: Write, write_study: Write, store: Store
) -> None:
    """A study has left it, long ago; the study then has the new one, and the old one is kept."""
    study = load_study(write_study("long_ago", ONE, seeds=[319]))
    (run,) = run_study(study, store, observer=Seen(), max_parallel=1).runs
    now = result(run.last)
    old = now | {"provenance": now["provenance"] | {"code": "older"}, "metrics": {"val/target_nll": 0.0}}
    write_json(run.last.folder / "result.json", old)
    observer = Seen()
    ended = sweep(write_sweep("today", f"{ONE}\n{rates()}\nseeds: [319]\n{ALONE}", trials=1), store, observer)
    assert [(trial.state, trial.fingerprints) for trial in ended.trials] == [("done", (run.last.fingerprint,))]
    assert ended.trials[0].values == (now["metrics"]["val/target_nll"],)
    assert result(run.last)["provenance"] == now["provenance"]
    assert read_json(run.last.folder / "attempt-1" / "result.json") == old
    assert any("red/trial 000" in message and "other code" in message for message in observer.messages)
    assert not run.stale()


def test_a_sweep_and_a_study_do_not_share_a_name(write_sweep: Write, write_study: Write, store: Store) -> None:
    run_study(load_study(write_study("taken", ONE, seeds=[314])), store, observer=Seen(), max_parallel=1)
    with pytest.raises(InputError, match="taken is the name of a study"):
        sweep(write_sweep("taken", f"{ONE}\n{rates()}\nseeds: [314]", trials=1), store)
    sweep(write_sweep("occupied", f"{ONE}\n{rates()}\nseeds: [314]\n{ALONE}", trials=1), store)
    with pytest.raises(InputError, match="occupied is the name of a sweep"):
        run_study(load_study(write_study("occupied", ONE, seeds=[314])), store, observer=Seen(), max_parallel=1)


# --- as MLflow shows it --------------------------------------------------------------------------------------------


def test_mlflow_holds_a_child_for_each_trial_and_seed(write_sweep: Write, store: Store) -> None:
    """Judge: MLflow's own client reading the store's database."""
    ended = sweep(write_sweep("shown", f"{TWO}\n{rates()}\nseeds: [315, 316]\n{ALONE}", trials=2), store)
    assert ended.mirrored
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store.root}/mlflow.db")
    experiment = client.get_experiment_by_name("shown")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {
        (run.data.tags["lit_llm.arm"], run.data.tags["lit_llm.seed"]): run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert len(children) == len(runs) - 1 == 8
    for trial in ended.trials:
        for seed, stage in zip(("315", "316"), stages(store, trial), strict=True):
            child = children[trial.name, seed]
            assert child.data.tags["lit_llm.trial"] == str(trial.number)
            assert child.data.tags["lit_llm.fingerprint"] == stage.fingerprint
            assert (child.info.status, child.data.tags["lit_llm.state"]) == ("FINISHED", "done")
            assert float(child.data.params[LR]) == trial.point[LR]
            assert float(child.data.params[f"arm.{LR}"]) == trial.point[LR]
            assert (child.data.metrics["objective/val/target_nll"],) == trial.values
            assert child.data.metrics["val/target_nll"] == result(stage)["metrics"]["val/target_nll"]
    assert parent.info.status == "FINISHED"
    for arm in ("red", "dec"):
        lowest = min(trial.values[0] for trial in of(ended, arm) if trial.values)
        assert parent.data.metrics[f"{arm}/best val/target_nll"] == lowest

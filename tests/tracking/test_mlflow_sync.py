"""What MLflow shows is what the stages left on disk, whatever happened in between. Judged with MLflow's own client."""

import json
import multiprocessing
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before the import
from mlflow import MlflowClient

from lit_llm.tracking.address import default_tracking, ui_command
from lit_llm.tracking.mlflow_links import latest_study, study_page
from lit_llm.tracking.mlflow_sync import MlflowSync, RunRecord, SyncUnavailable
from lit_llm.tracking.mlflow_views import experiment_tags
from lit_llm.tracking.sync_thread import SyncThread

STUDY = "positions"
START = 1_700_000_000.25
LATER = 1_700_001_000.0  # fewer digits, so that the old end of a file is not the end of a line of the resumed run


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A migrated database without a study: copying it saves each test the two seconds of the migrations."""
    store = tmp_path_factory.mktemp("empty") / "mlruns"
    MlflowSync(default_tracking(store), study="unused").sync([])
    return store


@pytest.fixture
def tracking(empty_store, tmp_path):
    store = tmp_path / "my mlruns"
    store.mkdir()
    with (
        closing(sqlite3.connect(empty_store / "mlflow.db")) as source,
        closing(sqlite3.connect(store / "mlflow.db")) as copy,
    ):
        source.backup(copy)
    return default_tracking(store)


def line(step, *, time=START, **metrics):
    return json.dumps({"step": step, "time": time + step, "metrics": metrics}) + "\n"


def lines(steps, *, time=START):
    return "".join(
        line(step, time=time, **{"train/loss": 10 - step / 100, "val/target_nll": step / 7}) for step in steps
    )


def record(path, **changes):
    base = RunRecord(
        arm="red",
        seed=0,
        fingerprint="f0",
        state="running",
        params={"model.d_model": 64},
        config_yaml="model: {d_model: 64}\n",
        metrics=[("", path)],
    )
    return replace(base, **changes)


def runs(tracking, study=STUDY):
    """The study's parent and its children by run name."""
    client = MlflowClient(tracking)
    found = client.search_runs([client.get_experiment_by_name(study).experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) == len(found) - 1
    return parents[0], children


def child(tracking):
    _, children = runs(tracking)
    assert len(children) == 1
    return children[0]


def history(tracking, run, name="train/loss"):
    points = MlflowClient(tracking).get_metric_history(run.info.run_id, name)
    return [(point.step, point.value, point.timestamp) for point in sorted(points, key=lambda point: point.step)]


def steps(tracking, run, name="train/loss"):
    return [step for step, _, _ in history(tracking, run, name)]


def open_store(tracking, seed, problems):
    try:
        MlflowSync(tracking, study=STUDY).sync([record(Path("absent"), seed=seed)])
        problems.put(None)
    except BaseException as problem:
        problems.put(repr(problem))


def test_eight_processes_open_one_fresh_store_together(tmp_path):
    """MLflow alone lets 8 of 8 crash in its migrations. They also agree on one experiment and one parent."""
    tracking = default_tracking(tmp_path / "mlruns")
    fork = multiprocessing.get_context("fork")
    problems = fork.Queue()
    processes = [fork.Process(target=open_store, args=(tracking, seed, problems)) for seed in range(8)]
    for process in processes:
        process.start()
    assert [problems.get(timeout=400) for _ in processes] == [None] * 8
    for process in processes:
        process.join()
    _, children = runs(tracking)
    assert sorted(run.info.run_name for run in children) == [f"red/seed {seed:03}" for seed in range(8)]


def test_points_keep_step_time_and_value_and_a_second_sync_adds_nothing(tracking, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(1500)))  # more than one batch
    mirror = MlflowSync(tracking, study=STUDY)
    mirror.sync([record(path)])
    mirror.sync([record(path)])
    expected = [(step, 10 - step / 100, int((START + step) * 1000)) for step in range(1500)]
    assert history(tracking, child(tracking)) == expected


def test_later_points_are_added_also_for_a_step_already_seen(tracking, tmp_path):
    """Validation writes a line of its own, after the training line of the same step."""
    path = tmp_path / "metrics.jsonl"
    mirror = MlflowSync(tracking, study=STUDY)
    mirror.sync([record(path)])  # no file yet
    path.write_text(line(10, **{"train/loss": 3.0}))
    mirror.sync([record(path)])
    with path.open("a") as file:
        file.write(line(10, **{"val/target_nll": 2.0}) + line(11, **{"train/loss": 2.9}))
    mirror.sync([record(path)])
    run = child(tracking)
    assert (steps(tracking, run), steps(tracking, run, "val/target_nll")) == ([10, 11], [10])


def test_null_and_non_finite_values_are_no_points(tracking, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, a=None, b=float("nan"), c=float("inf"), d=1))
    MlflowSync(tracking, study=STUDY).sync([record(path)])
    assert child(tracking).data.metrics == {"d": 1.0}


def test_half_written_line_waits(tracking, tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = lines([1, 2])
    mirror = MlflowSync(tracking, study=STUDY)
    path.write_text(whole[:-30])
    mirror.sync([record(path)])
    assert steps(tracking, child(tracking)) == [1]
    path.write_text(whole)
    mirror.sync([record(path)])
    assert steps(tracking, child(tracking)) == [1, 2]


@pytest.mark.parametrize("written", [60, 120, 150], ids=["shorter", "equally long", "longer"])
@pytest.mark.parametrize("remembers", [True, False], ids=["same mirror", "new mirror"])
def test_file_cut_back_and_continued_adds_no_duplicates(tracking, tmp_path, written, remembers):
    """A worker killed at step 120 resumes from its checkpoint at 50: the same values again, at a later time."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(120)))
    mirror = MlflowSync(tracking, study=STUDY)
    mirror.sync([record(path)])
    path.write_text(lines(range(50)) + lines(range(50, written), time=LATER))
    mirror = mirror if remembers else MlflowSync(tracking, study=STUDY)
    mirror.sync([record(path)])
    with path.open("a") as file:
        file.write(lines(range(written, 160), time=LATER))
    mirror.sync([record(path)])
    run = child(tracking)
    assert steps(tracking, run) == list(range(160))
    assert steps(tracking, run, "val/target_nll") == list(range(160))


def test_mirror_that_knows_nothing_continues_the_same_runs(tracking, tmp_path):
    """A coordinator that was killed, or one on another machine: MLflow itself knows how far it is."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(5)))
    MlflowSync(tracking, study=STUDY, description="**Why?**").sync([record(path)])
    before_parent, [before] = runs(tracking)
    path.write_text(lines(range(8)))
    MlflowSync(tracking, study=STUDY, description="**Why?**").sync([record(path)])
    parent, [after] = runs(tracking)
    assert (parent.info.run_id, after.info.run_id) == (before_parent.info.run_id, before.info.run_id)
    assert parent.data.tags["mlflow.note.content"] == "**Why?**"
    assert steps(tracking, after) == list(range(8))


def test_creation_that_was_cut_off_is_completed(tracking, tmp_path, monkeypatch):
    """Killed after some params and some points, before the mark: nothing is missing and nothing twice."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(5)))
    first = record(path, params={f"p{index}": index for index in range(250)})

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_text", interrupt)
        with pytest.raises(KeyboardInterrupt):
            MlflowSync(tracking, study=STUDY).sync([first])
    assert "lit_llm.replayed" not in child(tracking).data.tags
    MlflowSync(tracking, study=STUDY).sync([replace(first, params={**first.params, "p0": "moved"})])
    run = child(tracking)
    assert run.data.params == {f"p{index}": str(index) for index in range(250)}
    assert (
        Path(MlflowClient(tracking).download_artifacts(run.info.run_id, "config.yaml")).read_text() == first.config_yaml
    )
    assert steps(tracking, run) == list(range(5))


def test_shared_stage_is_replayed_into_every_run_that_uses_it(tracking, tmp_path):
    pretrain, finetune = tmp_path / "pretrain.jsonl", tmp_path / "finetune.jsonl"
    pretrain.write_text(lines(range(3)))
    finetune.write_text(lines(range(4)))
    both = [("", pretrain), ("finetune/", finetune)]
    chain = [record(pretrain, arm="dec"), record(pretrain, arm="dec+bi", fingerprint="f1", metrics=both)]
    MlflowSync(tracking, study=STUDY).sync(chain)
    _, children = runs(tracking)
    found = {run.data.tags["lit_llm.arm"]: run for run in children}
    assert [steps(tracking, found[arm]) for arm in ("dec", "dec+bi")] == [[0, 1, 2]] * 2
    assert steps(tracking, found["dec+bi"], "finetune/train/loss") == [0, 1, 2, 3]
    assert "finetune/train/loss" not in found["dec"].data.metrics


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("running", "RUNNING"),
        ("done", "FINISHED"),
        ("diverged", "FINISHED"),
        ("failed", "FAILED"),
        ("out_of_memory", "FAILED"),
        ("interrupted", "KILLED"),
    ],
)
def test_state_becomes_status_and_tag(tracking, tmp_path, state, status):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(9)))
    MlflowSync(tracking, study=STUDY).sync([record(path, state=state, tags={"host": "a100"})])
    run = child(tracking)
    assert run.info.status == status
    expected = {"lit_llm.state": state, "lit_llm.arm": "red", "lit_llm.seed": "0", "lit_llm.fingerprint": "f0"}
    assert {**expected, "host": "a100"}.items() <= run.data.tags.items()
    if status not in ("RUNNING",):  # the duration is the chain's, not that of the catch-up
        assert (run.info.start_time, run.info.end_time) == (int(START * 1000), int((START + 8) * 1000))


def test_pending_run_is_not_shown_before_it_ran(tracking, tmp_path):
    mirror = MlflowSync(tracking, study=STUDY)
    mirror.sync([record(tmp_path / "absent", state="pending")])
    assert runs(tracking)[1] == []
    mirror.sync([record(tmp_path / "absent", state="running")])
    mirror.sync([record(tmp_path / "absent", state="pending")])
    assert child(tracking).info.status == "SCHEDULED"


def test_resumed_run_is_the_same_run_and_sheds_its_error(tracking, tmp_path):
    path = tmp_path / "metrics.jsonl"
    mirror = MlflowSync(tracking, study=STUDY)
    seen = []
    for state, error in [
        ("failed", "CUDA: no kernel\n" * 1000),
        ("running", None),
        ("interrupted", None),
        ("running", None),
    ]:
        mirror.sync([record(path, state=state, error=error)])
        run = child(tracking)
        seen.append((run.info.status, "lit_llm.error" in run.data.tags))
    assert seen == [("FAILED", True), ("RUNNING", False), ("KILLED", False), ("RUNNING", False)]


@pytest.mark.parametrize("change", [{"fingerprint": "f1"}, {"code": "other"}])
def test_changed_configuration_or_code_supersedes_the_old_run_until_it_is_back(tracking, tmp_path, change):
    """With other code the history is not the old one's continuation, so the points are not skipped either."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(3)))
    old = record(path)
    for now, others in [(old, []), (replace(old, **change), [old]), (old, [replace(old, **change)])]:
        MlflowSync(tracking, study=STUDY).sync([now])
        _, children = runs(tracking)
        state = {
            (run.data.tags["lit_llm.fingerprint"], run.data.tags.get("lit_llm.code", "")): run.data.tags.get(
                "lit_llm.superseded"
            )
            for run in children
        }
        expected = {(now.fingerprint, now.code): None} | {(other.fingerprint, other.code): "true" for other in others}
        assert state == expected
        assert [steps(tracking, run) for run in children] == [[0, 1, 2]] * len(children)


def test_the_view_lists_runs_by_arm_as_in_the_study_then_by_seed_without_the_superseded(tracking, tmp_path):
    """Asked of MLflow as its UI asks: with the saved view's own filter and order."""
    records = [
        record(tmp_path / "absent", arm=arm, seed=seed, place=place)
        for seed in (10, 9)
        for place, arm in enumerate(("red", "dec", "baseline"))
    ]
    tags = experiment_tags("**Why?**", [], [("LINE", "val/target_nll")])
    mirror = MlflowSync(tracking, study=STUDY, tags=tags)
    mirror.sync([replace(records[0], fingerprint="older")])
    mirror.sync(records)
    client = MlflowClient(tracking)
    experiment = client.get_experiment_by_name(STUDY)
    view = json.loads(json.loads(experiment.tags["mlflow.sharedViewState.arms"])["state"])
    found = client.search_runs([experiment.experiment_id], view["searchFilter"], order_by=[f"{view['orderByKey']} ASC"])
    expected = [f"{arm}/seed {seed:03}" for arm in ("red", "dec", "baseline") for seed in (9, 10)]
    assert [run.info.run_name for run in found] == expected
    assert view["orderByAsc"]
    assert len(runs(tracking)[1]) == len(expected) + 1
    mirror.sync([replace(records[0], fingerprint="older")])
    found = client.search_runs([experiment.experiment_id], "tags.arm = 'red' AND tags.seed = '10'")
    assert [run.data.tags["lit_llm.fingerprint"] for run in found] == ["older"]


def test_the_answer_takes_the_place_of_the_description_and_stays_until_there_is_another(tracking, tmp_path):
    """Both are Markdown; what MLflow has no room for is cut after a whole line."""
    tags = experiment_tags("**Why?**", [], [])
    first = MlflowSync(tracking, study=STUDY, description="**Why?**", tags=tags)
    first.sync([record(tmp_path / "absent")])

    def notes():
        found = MlflowClient(tracking).get_experiment_by_name(STUDY).tags, runs(tracking)[0].data.tags
        return [tags["mlflow.note.content"] for tags in found]

    assert notes() == ["**Why?**"] * 2
    row = "| red | 4.9 |\n"
    first.finish("done", note=row * 1000)
    of_experiment, of_parent = notes()
    for note, most in ((of_experiment, 5000), (of_parent, 8000)):
        assert most - len(row) - 4 <= len(note) <= most
        assert set(note.splitlines()) == {row.strip(), "..."}
    again = MlflowSync(tracking, study=STUDY, description="**Why?**", tags=tags)
    again.sync([record(tmp_path / "absent")])
    assert notes()[0] == of_experiment
    again.finish("done", note="Because.")
    assert notes() == ["Because."] * 2


def test_the_ui_is_led_to_the_study_that_was_written_last(tracking, tmp_path):
    database = Path(tracking.removeprefix("sqlite:///"))
    MlflowSync(tracking, study=STUDY, tags=experiment_tags("", [], [])).sync([])
    MlflowSync(tracking, study="plain").sync([])  # by a version that saved no view
    client = MlflowClient(tracking)
    number, plain = (client.get_experiment_by_name(name).experiment_id for name in (STUDY, "plain"))
    shown = f"/#/experiments/{number}/runs?workflowType=machine_learning&viewStateShareKey=arms"
    assert study_page(database, STUDY) == shown
    assert study_page(database, "plain") == f"/#/experiments/{plain}/runs?workflowType=machine_learning"
    assert study_page(database, "absent") == study_page(tmp_path / "absent.db", STUDY) == ""
    studies = tmp_path / "studies"
    assert latest_study(studies) == ""
    for age, name in enumerate(("new", "old", "older")):
        (studies / name).mkdir(parents=True)
        os.utime(studies / name, (START - age, START - age))
    assert latest_study(studies) == "new"


def test_long_and_odd_params_survive(tracking, tmp_path):
    params = {"long": "x" * 6000, "longer": "y" * 9000, "model.decoder.layers[0-2]": None, "empty": "", "list": [1e-3]}
    MlflowSync(tracking, study=STUDY).sync([record(tmp_path / "absent", params=params)])
    assert child(tracking).data.params == {
        "long": "x" * 6000,
        "longer": "y" * 6000,
        "model.decoder.layers_0-2_": "None",
        "empty": "",
        "list": "[0.001]",
    }


def test_one_refused_run_does_not_hold_up_the_others(tracking, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines([1]))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(line(1, **{"../loss": 1.0}))
    with pytest.raises(SyncUnavailable, match="refused 1 of 2 runs: bad/seed 0"):
        MlflowSync(tracking, study=STUDY).sync([record(bad, arm="bad"), record(path)])
    found = {run.data.tags["lit_llm.arm"]: run for run in runs(tracking)[1]}
    assert steps(tracking, found["red"]) == [1]


def test_run_deleted_by_the_user_comes_back_whole(tracking, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines([1]))
    mirror = MlflowSync(tracking, study=STUDY)
    mirror.sync([record(path)])
    MlflowClient(tracking).delete_run(child(tracking).info.run_id)
    path.write_text(lines([1, 2]))
    with pytest.raises(SyncUnavailable, match="active"):
        mirror.sync([record(path)])
    mirror.sync([record(path)])
    assert steps(tracking, child(tracking)) == [1, 2]


def test_moved_store_finds_its_artifacts(tracking, tmp_path):
    mirror = MlflowSync(tracking, study=STUDY)
    mirror.sync([record(tmp_path / "absent")])
    (tmp_path / "my mlruns").rename(tmp_path / "moved")
    moved = default_tracking(tmp_path / "moved")
    MlflowSync(moved, study=STUDY).sync([record(tmp_path / "absent"), record(tmp_path / "absent", seed=1)])
    for run in runs(moved)[1]:
        assert [file.path for file in MlflowClient(moved).list_artifacts(run.info.run_id)] == ["config.yaml"]
    assert not (tmp_path / "my mlruns").exists()


def test_finish_closes_the_parent_and_another_run_of_the_study_opens_it_again(tracking, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("<p>")
    (tmp_path / "effects.csv").write_text("arm\n")
    mirror = MlflowSync(tracking, study=STUDY)
    mirror.sync([])
    mirror.finish("done", [tmp_path / "report", tmp_path / "effects.csv"], {"effect": -0.1, "unknown": None})
    parent, _ = runs(tracking)
    assert (parent.info.status, parent.data.metrics) == ("FINISHED", {"effect": -0.1})
    files = MlflowClient(tracking).list_artifacts(parent.info.run_id)
    assert {file.path for file in files} == {"report", "effects.csv"}
    mirror.sync([])
    assert runs(tracking)[0].info.status == "RUNNING"


def test_files_are_attached_to_a_study_that_is_known_and_change_nothing_else(tracking, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "front.png").write_text("png")
    assert not MlflowSync(tracking, study=STUDY).attach([tmp_path / "figures"])
    assert MlflowClient(tracking).get_experiment_by_name(STUDY) is None
    mirror = MlflowSync(tracking, study=STUDY)
    mirror.sync([record(tmp_path / "absent")])
    mirror.finish("failed")
    before = runs(tracking)
    assert MlflowSync(tracking, study=STUDY).attach([tmp_path / "figures"])
    after = runs(tracking)
    assert [run.data.tags for run in (after[0], *after[1])] == [run.data.tags for run in (before[0], *before[1])]
    assert (after[0].info.status, after[0].info.end_time) == ("FAILED", before[0].info.end_time)
    files = MlflowClient(tracking).list_artifacts(after[0].info.run_id, "figures")
    assert [file.path for file in files] == ["figures/front.png"]


def test_attaching_makes_no_database_where_there_is_none(tmp_path):
    assert not MlflowSync(default_tracking(tmp_path), study=STUDY).attach([])
    assert not list(tmp_path.iterdir())


def test_a_study_is_complete_as_long_as_the_database_has_it_as_it_was_closed(tracking, tmp_path):
    path, red = tmp_path / "metrics.jsonl", {("red", "0", "f0")}
    path.write_text(lines(range(3)))
    mirror = MlflowSync(tracking, study=STUDY)
    mirror.sync([record(path, state="done")])
    assert not mirror.is_complete("", red)
    mirror.finish("done", complete="digest")
    assert MlflowSync(tracking, study=STUDY).is_complete("digest", red)
    assert not mirror.is_complete("other", red)
    assert not mirror.is_complete("digest", red | {("dec", "0", "f1")})
    assert not MlflowSync(tracking, study="another").is_complete("digest", red)
    mirror.sync([record(path, state="done")])  # opened, and not closed
    assert not mirror.is_complete("digest", red)
    mirror.finish("done", complete="digest")
    MlflowClient(tracking).delete_run(child(tracking).info.run_id)
    assert not mirror.is_complete("digest", red)
    mirror.sync([record(path, state="done")])
    mirror.finish("done")
    assert not mirror.is_complete("digest", red)
    assert not mirror.is_complete("", red)


def test_a_study_is_not_complete_in_a_database_that_is_gone_broken_moved_or_behind_a_server(tracking, tmp_path):
    mirror = MlflowSync(tracking, study=STUDY)
    mirror.sync([])
    mirror.finish("done", complete="digest")
    assert mirror.is_complete("digest", set())
    store = Path(tracking.removeprefix("sqlite:///")).parent
    copy = shutil.copytree(store, tmp_path / "moved")
    assert not MlflowSync(default_tracking(copy), study=STUDY).is_complete("digest", set())
    (copy / "mlflow.db").write_bytes(b"no database " * 999)
    assert not MlflowSync(default_tracking(copy), study=STUDY).is_complete("digest", set())
    assert not MlflowSync(default_tracking(tmp_path / "gone"), study=STUDY).is_complete("digest", set())
    assert not (tmp_path / "gone").exists()
    assert not MlflowSync("http://127.0.0.1:9", study=STUDY).is_complete("digest", set())


def test_thread_mirrors_live_and_closes_with_everything(tracking, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(3)))
    state = ["running"]
    thread = SyncThread(MlflowSync(tracking, study=STUDY), lambda: [record(path, state=state[0])], seconds=0.05)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not MlflowClient(tracking).get_experiment_by_name(STUDY):
        time.sleep(0.05)
    state[0] = "done"
    path.write_text(lines(range(6)))
    assert thread.close("done")
    parent, [run] = runs(tracking)
    assert (parent.info.status, run.info.status, steps(tracking, run)) == ("FINISHED", "FINISHED", list(range(6)))


def test_catching_up_waits_for_all_that_is_there_now_however_rarely_the_thread_looks(tracking, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(range(3)))
    thread = SyncThread(MlflowSync(tracking, study=STUDY), lambda: [record(path)], seconds=600)
    assert thread.catch_up(timeout=300)
    path.write_text(lines(range(6)))
    assert thread.catch_up(timeout=300)
    _, [run] = runs(tracking)
    assert steps(tracking, run) == list(range(6))
    assert thread.close("done")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_gone_server_is_told_once_within_seconds(tmp_path):
    tracking = f"http://user:secret@127.0.0.1:{free_port()}"
    start = time.monotonic()
    with pytest.raises(SyncUnavailable) as told:
        MlflowSync(tracking, study=STUDY).sync([record(tmp_path / "absent")])
    assert time.monotonic() - start < 5
    assert "secret" not in str(told.value)
    thread = SyncThread(MlflowSync(tracking, study=STUDY), list, seconds=0.01)
    told, deadline = None, time.monotonic() + 200
    while told is None and time.monotonic() < deadline:
        told = thread.take_news()
    assert told is not None
    assert "Nothing is lost" in told
    assert not thread.catch_up(timeout=60)  # at once
    time.sleep(0.3)  # some more attempts
    assert not thread.close("done", timeout=5)
    assert thread.take_news() is None


def test_unusable_address_says_what_is_possible():
    with pytest.raises(ValueError, match="sqlite:////absolute"):
        MlflowSync("./mlruns", study=STUDY)


@pytest.mark.slow
def test_everything_is_caught_up_when_the_server_is_back(tmp_path):
    """The server that `ui_command` starts: gone, there, gone again in the middle, back."""
    path, port = tmp_path / "metrics.jsonl", free_port()
    command = ui_command(default_tracking(tmp_path / "server"), port)
    tracking = f"http://127.0.0.1:{port}"
    mirror = MlflowSync(tracking, study=STUDY, description="d")
    (tmp_path / "server").mkdir()

    def sync_until_it_answers():
        deadline = time.monotonic() + 200
        while True:
            try:
                return mirror.sync([record(path, code="c", error="e"), record(path, seed=1)])
            except SyncUnavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    for count in (4, 9):
        path.write_text(lines(range(count)))
        with pytest.raises(SyncUnavailable):
            mirror.sync([record(path)])
        server = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            sync_until_it_answers()
            _, children = runs(tracking)
            assert [steps(tracking, run) for run in children] == [list(range(count))] * 2
            assert [file.path for file in MlflowClient(tracking).list_artifacts(children[0].info.run_id)] == [
                "config.yaml"
            ]
        finally:
            os.killpg(server.pid, 15)
            server.wait(20)
    assert sys.executable == command[0]

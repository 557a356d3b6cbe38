"""The truth is on disk: whole or not at all, one process at a time, and honest about what died."""

import json
import math
import multiprocessing
import os
import signal
import threading
import time

import pytest

from lit_llm.config.problems import InputError
from lit_llm.store import store as module
from lit_llm.store.locks import Busy, is_locked, locked
from lit_llm.store.store import SCHEMA, MetricsFile, Store, finite, read_json, read_metrics, write_json

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def place(tmp_path):
    return Store(tmp_path / "my store").open()


@pytest.fixture
def stage(place):
    return place.stage("0123456789abcdef")


# --- the folder ----------------------------------------------------------------------------------------------------


def test_a_store_is_made_once_and_opened_again(tmp_path):
    root = tmp_path / "deep" / "store"
    Store(root).check()
    assert not root.exists()
    Store(root).open()
    assert json.loads((root / "store.json").read_text()) == {"schema": SCHEMA, "locks": "kernel"}
    Store(root).open()


def test_a_relative_store_stays_where_it_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("mlruns")
    monkeypatch.chdir("/")
    assert store.root == tmp_path / "mlruns"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *[(content, "this version reads 1; use the version that wrote it, or another --store")
          for content in ('{"schema": 2}', '{"schema": 0}', '{"schema": "1"}')],
        *[(content, "is damaged; remove it if this version wrote") for content in ("{}", "[]", "not json", "")],
    ],
)  # fmt: skip
def test_a_store_of_another_version_is_refused_and_left_as_it_is(tmp_path, content, message):
    marker = tmp_path / "store.json"
    marker.write_text(content)
    for use in (Store(tmp_path).open, Store(tmp_path).check):
        with pytest.raises(InputError, match=message):
            use()
    assert marker.read_text() == content
    assert list(tmp_path.iterdir()) == [marker]


def test_a_marker_that_is_no_file_is_refused(tmp_path):
    (tmp_path / "store.json").mkdir()
    with pytest.raises(InputError, match="store.json: is damaged; remove it"):
        Store(tmp_path).check()


def test_a_file_is_no_store_and_neither_is_anything_below_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"--store: {tmp_path}/file is not a directory"):
        Store(tmp_path / "file").open()
    with pytest.raises(InputError, match=f"--store: {tmp_path}/file/below cannot be used as a store: Not a directory"):
        Store(tmp_path / "file" / "below").open()


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "a/b", "/tmp/x", "a/../../x"])
def test_a_study_cannot_leave_the_store(place, name):
    with pytest.raises(InputError, match="leaves the store"):
        place.study(name)


def test_a_study_has_a_folder_of_its_own(place):
    assert place.study("stability") == place.root / "studies" / "stability"
    assert place.study("a..b").name == "a..b"


# --- locks and states ----------------------------------------------------------------------------------------------


def hold(path, pipe):
    with locked(path):
        pipe.send("held")
        pipe.poll(30)


@pytest.fixture
def holder():
    """holder(path) starts a process that holds the lock; it ends with the test."""
    started = []

    def start(path):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=hold, args=(path, theirs), daemon=True)
        process.start()
        assert ours.poll(30)
        started.append((process, ours))
        return process

    yield start
    for process, ours in started:
        ours.close()  # an Event would wait for those that were killed
        process.kill()
        process.join(30)


def test_looking_at_a_lock_never_keeps_the_worker_out(stage):
    """`status` looks at a lock by taking it for an instant; a run that claims its stage meanwhile is not told Busy."""
    (stage.folder).mkdir(parents=True)
    (stage.folder / "lock").touch()
    done = threading.Event()

    def watch():
        while not done.is_set():
            is_locked(stage.folder / "lock")

    observer = threading.Thread(target=watch)
    observer.start()
    try:
        for _ in range(20):
            with stage.claim():
                pass
    finally:
        done.set()
        observer.join()


def test_a_stage_that_is_claimed_is_busy_for_others(stage, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    with stage.claim(), pytest.raises(Busy), stage.claim():
        pass
    with stage.claim():
        pass


def test_a_stage_is_pending_then_what_its_process_says_then_its_result(stage):
    assert stage.status() == {"state": "pending"}
    with stage.claim():
        stage.set_state("running")
        assert (stage.status()["state"], stage.status()["pid"]) == ("running", os.getpid())
        stage.finish({"state": "done", "metrics": {"val/target_nll": 1.5}})
        assert stage.status() == {"state": "done", "metrics": {"val/target_nll": 1.5}}
    assert stage.status()["state"] == "done"


@pytest.mark.parametrize("state", ["failed", "out_of_memory", "interrupted"])
def test_what_went_wrong_is_kept_with_its_reason_and_outlives_the_process(stage, state):
    stage.set_state(state, "it broke", "Traceback ...")
    status = stage.status()
    assert (status["state"], status["error"], status["traceback"]) == (state, "it broke", "Traceback ...")


def test_a_stage_that_runs_without_a_lock_was_killed(stage, holder):
    process = holder(stage.folder / "lock")
    stage.set_state("running")
    assert stage.status()["state"] == "running"
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    status = stage.status()
    assert (status["state"], status["error"]) == ("interrupted", "its process ended without a word")


def test_a_stage_that_finishes_while_it_is_looked_at_is_not_called_interrupted(stage, monkeypatch):
    """Between the look for a result and the look at the lock, its process may write the one and free the other."""
    stage.set_state("running")

    def finish_just_now(path):
        stage.finish({"state": "done"})
        return False

    monkeypatch.setattr(module, "is_locked", finish_just_now)
    assert stage.status() == {"state": "done"}


def test_forgetting_a_result_keeps_it_as_an_attempt_and_starts_anew(stage):
    stage.folder.mkdir(parents=True)
    stage.config_file.write_text("frozen")
    for attempt in (1, 2):
        with stage.claim():
            stage.set_state("running")
            MetricsFile(stage.metrics_file).append(attempt, {"a": 1.0})
            stage.checkpoints.mkdir()
            (stage.checkpoints / "last.ckpt").touch()
            stage.log_file.write_text(f"log {attempt}")
            stage.finish({"state": "failed", "attempt": attempt})
        stage.forget()
        kept = stage.folder / f"attempt-{attempt}"
        assert {path.name for path in kept.iterdir()} == {"result.json", "metrics.jsonl", "state.json", "log.txt"}
        assert read_json(kept / "result.json")["attempt"] == attempt
        assert read_metrics(kept / "metrics.jsonl")[0]["step"] == attempt
        assert stage.status() == {"state": "pending"}
        assert not stage.checkpoints.exists()
        assert stage.config_file.read_text() == "frozen"


def test_forgetting_what_another_process_works_on_is_refused(stage, holder, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.05)
    stage.set_state("running")
    holder(stage.folder / "lock")
    with pytest.raises(Busy):
        stage.forget()
    assert stage.status()["state"] == "running"


# --- metrics -------------------------------------------------------------------------------------------------------


def steps(path):
    return [line["step"] for line in read_metrics(path)]


def test_metrics_are_there_as_soon_as_they_are_written(tmp_path):
    path, before = tmp_path / "stage" / "metrics.jsonl", time.time()
    file = MetricsFile(path)
    file.append(1, {"train/loss": 2.5})
    (line,) = read_metrics(path)
    assert (line["step"], line["metrics"]) == (1, {"train/loss": 2.5})
    assert before - 1 <= line["time"] <= time.time() + 1
    file.append(2, {"train/loss": 2})
    assert steps(path) == [1, 2]
    file.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_in_metrics_and_results(tmp_path, stage, value):
    """NaN is no JSON: other readers of the file would stumble, and a diverged loss is no number."""
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(3, {"train/loss": value, "tokens_seen": 5})
    stage.folder.mkdir(parents=True)
    stage.finish({"state": "diverged", "metrics": {"train/loss": value}, "list": [value, 1.0, {"a": value}]})

    def strict(text):
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    assert strict(path.read_text())["metrics"] == {"train/loss": None, "tokens_seen": 5}
    result = strict((stage.folder / "result.json").read_text())
    assert {key: result[key] for key in ("state", "metrics", "list")} == {
        "state": "diverged",
        "metrics": {"train/loss": None},
        "list": [None, 1.0, {"a": None}],
    }


def test_finite_leaves_the_rest_as_it_is():
    content = {"a": [1, 2.5, None, True, "x", {"b": ()}]}
    assert finite(content) == {"a": [1, 2.5, None, True, "x", {"b": []}]}


def test_a_resume_goes_on_after_the_lines_of_its_checkpoint_whatever_the_file_holds(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    lines = [file.append(step, {"a": step}) for step in (10, 20, 30, 40)]
    file.close()
    for content in (path.read_bytes(), b"", path.read_bytes()[:70], path.read_bytes().replace(b"10", b"\xff1"), None):
        path.unlink() if content is None else path.write_bytes(content)
        resumed = MetricsFile(path, lines[:2])
        assert path.read_text() == "".join(lines[:2])
        resumed.append(30, {"a": 31})
        assert [line["metrics"]["a"] for line in read_metrics(path)] == [10, 20, 31]


def test_a_fresh_start_drops_everything(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path).append(10, {"a": 1})
    MetricsFile(path)
    assert steps(path) == []
    assert read_metrics(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("rest", ['{"step": 3', '{"step": 3, "metrics": {}}', "{"])
def test_a_line_that_was_cut_by_a_kill_is_ignored(tmp_path, rest):
    """A line counts from its newline on: without one it may look complete and not be."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (1, 2):
        file.append(step, {"a": step})
    with path.open("a") as file:
        file.write(rest)
    assert steps(path) == [1, 2]


@pytest.mark.parametrize("bad", [b"{", b"\xff\xfe", b"[1]", b"{}", b'{"step": 2, "metrics": 3}', b""])
def test_a_damaged_line_is_left_out(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    first, last = (file.append(step, {"a": step}).encode() for step in (1, 3))
    path.write_bytes(first + bad + b"\n" + last)
    assert steps(path) == [1, 3]


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    """Twenty thousand numbers take several writes: a reader in between must not see half of them."""
    path, done = tmp_path / "state.json", threading.Event()
    write_json(path, {"number": 0, "bulk": [0] * 20_000})
    seen = []

    def watch():
        while not done.is_set():
            content = read_json(path)
            assert set(content["bulk"]) == {content["number"]}
            seen.append(content["number"])

    observer = threading.Thread(target=watch)
    observer.start()
    for number in range(1, 8):
        write_json(path, {"number": number, "bulk": [number] * 20_000})
    done.set()
    observer.join()
    assert seen == sorted(seen)
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert read_json(tmp_path / "absent.json") is None

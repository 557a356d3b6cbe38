"""Running a study: what goes wrong in one run leaves the others whole, and nothing is done twice."""

from __future__ import annotations

import filecmp
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from lit_llm.config.problems import InputError
from lit_llm.report.progress.json_lines import Lines
from lit_llm.store.store import Stage, Store, read_metrics, write_json
from lit_llm.studies.coordinators import coordinating
from lit_llm.studies.load import Ablation, load_study
from lit_llm.studies.plan import plan
from lit_llm.studies.run import Finished, Observer, run_study
from lit_llm.studies.runs import Run
from lit_llm.studies.status import status_rows
from lit_llm.studies.supervise import Supervision
from tests.commands import command, lit_llm
from tests.mlflow_runs import mirrored
from tests.studies import killed, out_of_memory

Study = Callable[..., Path]


class Silent(Observer):
    """A observer that remembers what it was told."""

    def __init__(self, on_poll: Callable[[Sequence[Run]], None] = lambda _: None) -> None:
        self.messages: list[str] = []
        self.todo: list[str] = []
        self.ended: list[str] = []
        """Stages that this process has computed."""
        self.still: list[tuple[str, float]] = []
        self.runs: Sequence[Run] = ()
        self.on_poll = on_poll

    def message(self, text: str) -> None:
        self.messages.append(text)

    def stage_ended(self, name: str, state: str) -> None:
        self.ended += [name] * (state == "done")

    def silent(self, name: str, seconds: float) -> None:
        self.still.append((name, seconds))

    def launching(self, runs: Sequence[Run], todo: Sequence[Run], max_parallel: int) -> None:
        self.runs, self.todo = runs, [run.name for run in todo]

    def poll(self) -> None:
        self.on_poll(self.runs)


def run(path: Path, store: Store, observer: Silent | None = None, max_parallel: int = 2, **options: object) -> Finished:
    return run_study(load_study(path), store, observer=observer or Silent(), max_parallel=max_parallel, **options)


def states(finished: Finished) -> dict[str, str]:
    return {run.name: run.last.status()["state"] for run in finished.runs}


TWO = "arms: {red: {}, dec: {extends: decllm-tiny}}"


def test_a_study_runs_once_and_a_second_run_has_nothing_to_do(write_study: Study, store: Store) -> None:
    path = write_study("once", TWO, seeds=[100, 101])
    first = run(path, store)
    assert set(states(first).values()) == {"done"}
    assert first.exit_code == 0
    assert [row.arm for row in first.comparison.rows] == ["red", "dec"]
    assert [row.seeds for row in first.comparison.rows] == [2, 2]
    again = Silent()
    second = run(path, store, again)
    assert again.todo == []
    assert second.comparison == first.comparison


def test_a_result_is_shared_by_every_study_that_asks_for_the_same(write_study: Study, store: Store) -> None:
    """The name of a study or an arm is not part of what was computed."""
    run(write_study("shared_a", TWO, seeds=[110]), store)
    observer = Silent()
    arms = "arms: {left: {}, other: {model: {attention: {output_norm: none}}}}"
    run(write_study("shared_b", arms, [110]), store, observer)
    assert observer.todo == ["other/seed 110"]


def test_one_run_or_two_at_once_gives_the_same_bits(write_study: Study, store: Store, tmp_path: Path) -> None:
    path = write_study("slots", TWO, seeds=[120])
    alone, together = run(path, store, max_parallel=1), run(path, Store(tmp_path / "other"), max_parallel=2)
    for one, two in zip(alone.runs, together.runs, strict=True):
        assert (one.last.checkpoints / "model.safetensors").read_bytes() == (
            two.last.checkpoints / "model.safetensors"
        ).read_bytes()
        assert one.last.result()["metrics"]["val/target_nll"] == two.last.result()["metrics"]["val/target_nll"]


BROKEN = """
arms:
  red: {}
  broken: {model: {attention: {output_norm: none}}, pretrain: {training: {execution: {accelerator: gpu}}}}
  lost: {pretrain: {training: {optimizer: {lr: 1e20}}}, model: {attention: {qkv_norm: []}}}
  dec: {extends: decllm-tiny}
allow:
  - {key: pretrain.training.execution.accelerator, because: this machine has no such device}
  - {key: pretrain.training.optimizer.lr, because: it should diverge}
"""


def test_an_exception_and_a_divergence_leave_the_others_whole(write_study: Study, store: Store) -> None:
    path = write_study("broken", BROKEN, seeds=[130])
    observer = Silent()
    finished = run(path, store, observer)
    assert states(finished) == {
        "red/seed 130": "done",
        "broken/seed 130": "failed",
        "lost/seed 130": "diverged",
        "dec/seed 130": "done",
    }
    assert finished.exit_code == 1
    lost = next(row for row in finished.comparison.rows if row.arm == "lost")
    assert (lost.diverged, lost.mean, lost.difference) == (1, None, None)
    broken = finished.runs[1].last.status()
    assert "gpu" in broken["error"].lower() or "cuda" in broken["error"].lower()
    assert "Traceback" in broken["traceback"]

    kept = Silent()
    run(path, store, kept)
    assert kept.todo == []
    assert any("--rerun failed" in message for message in kept.messages)
    # What was wrong is mended (how a machine does it is not part of a run's identity); only that run is repeated.
    path.write_text(path.read_text().replace("accelerator: gpu", "accelerator: cpu"))
    mended = Silent()
    assert states(run(path, store, mended, rerun="failed"))["broken/seed 130"] == "done"
    assert mended.todo == ["broken/seed 130"]


def long(text: str, steps: int = 400) -> str:
    """Enough steps for a signal to arrive in the middle."""
    return text.replace("max_steps: 12", f"max_steps: {steps}").replace(
        "log_every: 4", "log_every: 4, checkpoint_every: 8"
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_in_the_same_command_and_ends_as_if_nothing_had_been(
    write_study: Study, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice; the third time it is left for the next command, which has as many retries again."""
    path = write_study("killed", TWO, seeds=[140])
    path.write_text(long(path.read_text(), 40))
    observer = Silent()
    with monkeypatch.context() as patch:
        patch.setattr("lit_llm.studies.stage_executor.run_stage", killed.run_stage)
        (store.open().root / "kills").write_text("4")
        first = run(path, store, observer)
        assert states(first) == {"red/seed 140": "interrupted", "dec/seed 140": "done"}
        assert "SIGKILL" in first.runs[0].last.status()["error"]
        told = [message for message in observer.messages if "SIGKILL" in message]
        assert [message.rpartition("(")[2] for message in told] == ["retry 1 of 2)", "retry 2 of 2)"]
        second = run(path, store, Lines(lines := io.StringIO(), Console(file=io.StringIO())))
    events = [json.loads(line)["event"] for line in lines.getvalue().splitlines()]
    stage_events = [event for event in events if event in ("started", "retried", "finished")]
    assert stage_events == ["started", "retried", "started", "finished"]
    assert set(states(second).values()) == {"done"}
    assert len(second.runs[0].last.result()["retries"]) == 3
    assert [row["retries"] for row in status_rows(second.runs)] == [3, 0]
    untouched = run(path, Store(tmp_path / "untouched"), only="red", tracking=f"sqlite:///{store.root}/mlflow.db")
    weights = [done.runs[0].last.checkpoints / "model.safetensors" for done in (second, untouched)]
    assert filecmp.cmp(*weights, shallow=False)
    losses = [
        [(line["step"], line["metrics"]["train/loss"]) for line in read_metrics(finished.runs[0].last.metrics_file)]
        for finished in (second, untouched)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_a_run_that_stands_still_is_shown_stopped_and_goes_on(write_study: Study, store: Store) -> None:
    """Its process is stopped (SIGSTOP) once, so that it neither steps nor listens; the grace ends it."""
    path = write_study("still", "arms: {red: {}}", seeds=[141])
    path.write_text(long(path.read_text()))
    stopped: list[int] = []

    def stop_once(runs: Sequence[Run]) -> None:
        stage = runs[0].last
        if not stopped and (stage.checkpoints / "last.ckpt").exists():
            stopped.append(json.loads((stage.folder / "state.json").read_text())["pid"])
            os.kill(stopped[0], signal.SIGSTOP)

    observer = Silent(stop_once)
    finished = run(path, store, observer, supervision=Supervision(stall_seconds=5.0, grace_seconds=0.2))
    assert states(finished) == {"red/seed 141": "done"}
    assert next(name for name, seconds in observer.still if seconds) == "red/seed 141"
    assert observer.still[-1] == ("red/seed 141", 0.0)
    (retry,) = finished.runs[0].last.retries()
    assert retry["reason"].startswith("no progress for 5")


def test_a_run_out_of_memory_goes_on_with_half_the_micro_batch(
    write_study: Study, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as it takes: 4 sequences at once, 2, then 1. The result says so, and is the one that was asked for."""
    path = write_study("memory", "arms: {red: {}}", seeds=[142])
    monkeypatch.setattr("lit_llm.studies.stage_executor.run_stage", out_of_memory.run_stage)
    observer = Silent()
    finished = run(path, store, observer)
    result = finished.runs[0].last.result()
    assert result is not None
    assert result["provenance"]["micro_batch_size"] == 1
    assert [(retry["micro_batch_size"], retry["reason"].partition(";")[0]) for retry in result["retries"]] == [
        (2, "out of memory"),
        (1, "out of memory"),
    ]
    assert any("1 sequence at a time" in message for message in observer.messages)
    assert not finished.runs[0].stale()


def stages_of(store: Store, seed: int) -> list[Stage]:
    """Those of other tests in the same store are left out."""
    found = [path.parent for path in store.root.glob("stages/*/config.yaml") if f"seed: {seed}\n" in path.read_text()]
    return [Stage(folder) for folder in found]


def wait_for_training(store: Store, seed: int, count: int, seconds: float = 300) -> list[int]:
    """Process ids of runs that have logged something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = [stage.folder for stage in stages_of(store, seed) if read_metrics(stage.metrics_file)]
        if len(found) >= count:
            return [json.loads((folder / "state.json").read_text())["pid"] for folder in found]
        time.sleep(0.05)
    raise AssertionError("no run began in time")


def started(path: Path, store: Path, *options: str) -> subprocess.Popen[str]:
    line = command("run", path, "--store", store, *options)
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_the_same_command_goes_on(write_study: Study, store: Store, tmp_path: Path) -> None:
    path = write_study("ctrl_c", TWO, seeds=[150])
    path.write_text(long(path.read_text(), 300))
    process = started(path, store.open().root, "-j", "2")
    wait_for_training(store, 150, 2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "goes on" in output
    assert {stage.status()["state"] for stage in stages_of(store, 150)} == {"interrupted"}
    assert all((stage.checkpoints / "last.ckpt").exists() for stage in stages_of(store, 150))

    resumed = run(path, store)
    assert set(states(resumed).values()) == {"done"}
    whole = run(path, Store(tmp_path / "whole"))
    for one, two in zip(resumed.runs, whole.runs, strict=True):
        weights = [run.last.checkpoints / "model.safetensors" for run in (one, two)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_killed_coordinator_leaves_no_orphan_and_its_runs_resume(write_study: Study, store: Store) -> None:
    path = write_study("orphans", TWO, seeds=[160])
    path.write_text(long(path.read_text(), 100_000))
    process = started(path, store.open().root, "-j", "2")
    pids = wait_for_training(store, 160, 2)
    family = {*pids, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))}
    process.kill()
    process.wait()
    gone = psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=200)
    assert gone[1] == []
    assert {stage.status()["state"] for stage in stages_of(store, 160)} == {"interrupted"}


@pytest.mark.slow
def test_two_processes_share_a_study_and_compute_each_run_once(write_study: Study, store: Store) -> None:
    path = write_study("shared", TWO, seeds=[170, 171])
    path.write_text(long(path.read_text(), 40))
    first = started(path, store.open().root, "-j", "1")
    wait_for_training(store, 170, 1)
    observer = Silent()
    finished = run(path, store, observer, max_parallel=1)
    assert first.wait(timeout=200) == 0
    assert finished.exit_code == 0
    assert any("another process runs this study too" in message for message in observer.messages)
    assert 0 < len(observer.ended) < 4  # the others were computed there
    assert set(observer.ended) <= set(states(finished))
    assert run(path, store).comparison == finished.comparison


def test_a_study_of_other_settings_waits_for_those_who_run_it(write_study: Study, store: Store) -> None:
    path = write_study("twice", TWO, seeds=[172])
    run(path, store)
    path.write_text(long(path.read_text(), 7))
    with coordinating(store.study("twice")), pytest.raises(InputError, match="run with other settings by another"):
        run(path, store, new_version=True)
    assert run(path, store, new_version=True).exit_code == 0


def test_results_of_other_code_are_named_and_not_mixed(write_study: Study, store: Store) -> None:
    path = write_study("stale", TWO, seeds=[180])
    first = run(path, store)
    old = first.runs[0].last.result()
    assert old is not None
    write_json(first.runs[0].last.folder / "result.json", old | {"provenance": old["provenance"] | {"code": "older"}})
    observer = Silent()
    mixed = run(path, store, observer)
    assert observer.todo == []
    assert any("--rerun stale" in message for message in observer.messages)
    assert all(row.difference is None for row in mixed.comparison.rows)
    assert any("other code" in note for note in mixed.comparison.notes)
    repeated = Silent()
    fresh = run(path, store, repeated, rerun="stale")
    assert repeated.todo == ["red/seed 180"]
    assert fresh.comparison.rows[1].difference is not None


def test_mlflow_shows_one_child_per_run_with_its_metrics(write_study: Study, store: Store) -> None:
    """Judge: MLflow's own client reading the store's database."""
    finished = run(write_study("mirrored", TWO, seeds=[190, 191]), store)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store.root}/mlflow.db")
    experiment = client.get_experiment_by_name("mirrored")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    assert len(parents) == 1
    assert parents[0].info.status == "FINISHED"
    assert {(r.data.tags["lit_llm.arm"], r.data.tags["lit_llm.seed"]) for r in children} == {
        (arm, seed) for arm in ("red", "dec") for seed in ("190", "191")
    }
    by_fingerprint = {r.data.tags["lit_llm.fingerprint"]: r for r in children}
    for planned in finished.runs:
        child, lines = by_fingerprint[planned.last.fingerprint], read_metrics(planned.last.metrics_file)
        history = client.get_metric_history(child.info.run_id, "val/target_nll")
        assert [(m.step, m.value) for m in history] == [
            (line["step"], line["metrics"]["val/target_nll"]) for line in lines if "val/target_nll" in line["metrics"]
        ]
        assert child.data.params["model.d_model"] == "16"
        assert "config.yaml" in [f.path for f in client.list_artifacts(child.info.run_id)]
    assert {"comparison.csv", "comparison.json"} <= {f.path for f in client.list_artifacts(parents[0].info.run_id)}


@pytest.mark.slow
def test_sixteen_commands_start_on_one_fresh_store(write_study: Study, tmp_path: Path) -> None:
    """All at once: the store, the tokenised corpus and MLflow's database are each made once."""
    store = tmp_path / "store"
    paths = [write_study(f"crowd_{n}", "arms: {red: {}}", seeds=[200 + n]) for n in range(16)]
    processes = [started(path, store, "-j", "1") for path in paths]
    outputs = [process.communicate(timeout=2000)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 16, "\n".join(outputs)
    # Who waits too long for MLflow's database says so, and catches up: in the same command, or by the next one.
    for path, output in zip(paths, outputs, strict=True):
        if "Nothing is lost" in output and "MLflow is back and has caught up" not in output:
            assert run(path, Store(store)).exit_code == 0
    assert len(list(store.glob("data/*/meta.json"))) == 1
    assert len(list(store.glob("stages/*/result.json"))) == 16
    assert list(mirrored(store).values()) == [1] * 16


def test_running_some_arms_is_judged_by_those(write_study: Study, store: Store) -> None:
    path = write_study("some", TWO, seeds=[210])
    finished = run(path, store, only="red")
    assert finished.exit_code == 0
    assert states(finished) == {"red/seed 210": "done", "dec/seed 210": "pending"}
    with pytest.raises(InputError, match="did you mean 'red'"):
        run(path, store, only="rod")


def test_a_corpus_that_was_edited_in_between_makes_other_runs(
    write_study: Study, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one process, as in a notebook: for the loaded study, and for the study loaded again."""
    monkeypatch.setattr("lit_llm.studies.execute.Execution.execute", lambda *_: True)
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number} " * 100)
    corpus = f"corpus: {{kind: text, files: ['{tmp_path}/*.txt']}}, validation_fraction: 0.3"
    path = write_study("edited", f"arms: {{red: {{pretrain: {{data: {{{corpus}}}}}}}}}")

    def fingerprint(ablation: Ablation) -> str:
        (only,) = run_study(ablation, store, observer=Silent(), max_parallel=1).runs
        return only.last.fingerprint

    ablation = load_study(path)
    first = fingerprint(ablation)
    assert fingerprint(ablation) == first
    (tmp_path / "0.txt").write_text("edited")
    second = fingerprint(ablation)
    (tmp_path / "0.txt").write_text("edited again")
    assert plan(load_study(path)).arms[0].fingerprints[0] not in (first, second)
    assert first != second


def test_a_wrong_tracking_address_is_told_before_anything_starts(write_study: Study, tmp_path: Path) -> None:
    path = write_study("address", TWO, seeds=[220])
    with pytest.raises(InputError, match="sqlite:////absolute"):
        run(path, Store(tmp_path / "store"), tracking="foo")
    assert not (tmp_path / "store").exists()


def test_results_of_another_thread_count_can_be_repeated_too(write_study: Study, store: Store) -> None:
    path = write_study("threads", TWO, seeds=[230])
    result = run(path, store).runs[0].last.result()
    assert result is not None
    stage = store.stage(load_and_name(path))
    write_json(stage.folder / "result.json", result | {"provenance": result["provenance"] | {"threads": 7}})
    run(path, store)  # MLflow sees it
    repeated = Silent()
    fresh = run(path, store, repeated, rerun="stale")
    assert repeated.todo == ["red/seed 230"]
    assert fresh.comparison.rows[1].difference is not None
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store.root}/mlflow.db")
    experiment = client.get_experiment_by_name("threads")
    assert experiment is not None
    red = client.search_runs([experiment.experiment_id], f"tags.`lit_llm.fingerprint` = '{stage.fingerprint}'")
    assert sorted(r.data.tags.get("lit_llm.superseded", "false") for r in red) == ["false", "true"]


def load_and_name(path: Path) -> str:
    from lit_llm.studies.runs import runs_of

    return runs_of(load_study(path), Store("/nonexistent"))[0].last.fingerprint


@pytest.mark.slow
def test_two_studies_that_share_a_stage_compute_it_once(write_study: Study, store: Store) -> None:
    """The second begins while the first computes it: it waits for the result, and both end well."""
    first, second = (write_study(name, "arms: {red: {}}", seeds=[240]) for name in ("left", "right"))
    for path in (first, second):
        path.write_text(long(path.read_text()))
    process = started(first, store.open().root)
    wait_for_training(store, 240, 1)
    waited = lit_llm("run", second, "--store", store.root)
    output, _ = process.communicate(timeout=600)
    assert (process.returncode, waited.returncode) == (0, 0), output + waited.stdout + waited.stderr
    assert all("red/seed 240: done" in told for told in (output, waited.stdout)), output + waited.stdout
    (stage,) = stages_of(store, 240)
    steps = [line["step"] for line in read_metrics(stage.metrics_file)]
    assert steps == sorted(set(steps))


def test_an_arm_that_shows_nothing_is_told_of_before_it_runs_and_not_again(write_study: Study, store: Store) -> None:
    """Heads of two entries have one frequency, which is one whatever theta."""
    path = write_study("nothing", "grid: {factors: {model.attention.rope_theta: [1e4, 5e5]}}", seeds=[190])
    ablation, first, second = load_study(path, ["model.attention.head_dim=2"]), Silent(), Silent()
    run_study(ablation, store, observer=first, max_parallel=2)
    assert [message.split(",")[0] for message in first.messages if "building" not in message] == [
        "baseline/rope_theta=500000: is the same function as baseline"
    ]
    run_study(ablation, store, observer=second, max_parallel=2)
    assert second.messages == []

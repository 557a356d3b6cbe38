"""MLflow's database is there whole or not at all, and a broken one is made anew from disk."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before the import
from mlflow import MlflowClient

from lit_llm.config.problems import InputError
from lit_llm.store.locks import locked
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.rebuild_mlflow import rebuild_mlflow
from lit_llm.studies.runs import runs_of
from lit_llm.studies.stored import keep
from lit_llm.tracking import mlflow_database
from lit_llm.tracking.address import default_tracking
from lit_llm.tracking.mlflow_links import study_page
from lit_llm.tracking.mlflow_sync import MlflowSync, SyncBroken, SyncUnavailable
from lit_llm.tracking.relocation import moved
from lit_llm.tracking.sync_thread import SyncThread
from tests.made_up_results import finish


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database without a study: copying it saves each test the seconds of the migrations."""
    store = tmp_path_factory.mktemp("migrated") / "mlruns"
    MlflowSync(default_tracking(store), study="unused").sync([])
    with closing(sqlite3.connect(store / "mlflow.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return store / "mlflow.db"


@pytest.fixture
def quick(migrated: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Migrations that take no time; the addresses that were migrated."""
    asked: list[str] = []

    def migrate(address: str) -> None:
        asked.append(address)
        shutil.copy(migrated, address.removeprefix("sqlite:///"))

    monkeypatch.setattr(mlflow_database, "_migrate", migrate)
    return asked


def cut_off(database: Path) -> None:
    """As MLflow leaves a first migration that was killed: some tables, and no revision."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE experiments (experiment_id INTEGER, name TEXT)")
        connection.execute("CREATE TABLE runs (run_uuid TEXT)")


def test_a_migration_that_fails_leaves_no_database_and_the_next_one_succeeds(
    tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(address: str) -> None:
        cut_off(Path(address.removeprefix("sqlite:///")))
        raise OSError(28, "No space left on device")

    mirror = MlflowSync(default_tracking(tmp_path), study="first")
    monkeypatch.setattr(mlflow_database, "_migrate", full)
    with pytest.raises(SyncUnavailable, match="No space left"):
        mirror.sync([])
    assert not [path for path in tmp_path.iterdir() if path.name != "mlflow.db.lock"]
    monkeypatch.setattr(
        mlflow_database, "_migrate", lambda address: shutil.copy(migrated, address.removeprefix("sqlite:///"))
    )
    mirror.sync([])
    assert MlflowClient(default_tracking(tmp_path)).get_experiment_by_name("first") is not None


@pytest.mark.parametrize("leave", [cut_off, Path.touch])
def test_what_a_killed_first_migration_has_left_is_made_anew(
    leave: Callable[[Path], None], tmp_path: Path, quick: list[str]
) -> None:
    leave(tmp_path / "mlflow.db")
    MlflowSync(default_tracking(tmp_path), study="first").sync([])
    assert len(quick) == 1
    MlflowSync(default_tracking(tmp_path), study="second").sync([])
    assert len(quick) == 1  # what is whole is left as it is


def test_a_database_of_another_mlflow_is_put_aside_and_never_deleted(tmp_path: Path, quick: list[str]) -> None:
    """It has no run, and may hold what is none."""
    cut_off(tmp_path / "mlflow.db")
    before = (tmp_path / "mlflow.db").read_bytes()
    MlflowSync(default_tracking(tmp_path), study="first").sync([])
    assert (tmp_path / "mlflow.db.old-1").read_bytes() == before


def test_a_broken_file_is_said_to_be_broken_with_the_command_that_helps(tmp_path: Path) -> None:
    (Store(tmp_path).open().root / "mlflow.db").write_bytes(b"no database " * 999)
    mirror = MlflowSync(default_tracking(tmp_path), study="first")
    with pytest.raises(SyncBroken, match="is broken .*lit-llm store rebuild-mlflow --store"):
        mirror.sync([])
    thread = SyncThread(mirror, list, seconds=0.01)
    assert not thread.close("done")
    news = thread.take_news()
    assert news is not None
    assert "rebuild-mlflow" in news
    assert "caught up" not in news


def test_a_rebuilt_database_has_every_study_of_the_store(
    tmp_path: Path, quick: list[str], write_study: Callable[..., Path]
) -> None:
    store = Store(tmp_path / "store").open()
    ablation = load_study(write_study("again", "arms: {a: {}, b: {model: {attention: {output_norm: none}}}}"))
    runs = runs_of(ablation, store)
    for run in runs:
        finish(run, 3.0)
    store.study("again").mkdir(parents=True)
    keep(store, ablation, {run.arm.name: {0: {"pretrain": run.last.fingerprint}} for run in runs})
    (store.root / "mlflow.db").write_bytes(b"no database " * 999)
    (store.root / "studies" / "damaged").mkdir()
    (store.root / "studies" / "damaged" / "study.json").write_text("{")
    lock = store.root / "studies" / "sweep" / "coordinators" / "one.lock"
    lock.parent.mkdir(parents=True)
    with locked(lock), pytest.raises(InputError, match="sweep is being run by another process"):
        rebuild_mlflow(store)
    done = rebuild_mlflow(store)
    assert done.studies == ("again",)
    assert "damaged/study.json: is damaged" in done.unread[0]
    assert done.aside is not None
    assert done.aside.read_bytes() == b"no database " * 999
    client = MlflowClient(default_tracking(store.root))
    experiment = client.get_experiment_by_name("again")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in found) == ["a/seed 000", "again", "b/seed 000"]
    assert {run.info.status for run in found} == {"FINISHED"}
    assert {run.data.metrics.get("val/target_nll") for run in found if "/" in run.info.run_name} == {3.0}


def test_where_there_is_no_store_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no store in"):
        rebuild_mlflow(Store(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


def test_a_store_may_lie_in_a_folder_of_any_name(tmp_path: Path, quick: list[str]) -> None:
    root = tmp_path / "50% of #1? a&b"
    MlflowSync(default_tracking(root), study="odd").sync([])
    assert (root / "mlflow.db").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [root.name]
    assert study_page(root / "mlflow.db", "odd").startswith("/#/experiments/")
    assert moved(root / "mlflow.db") == {}
    experiment = MlflowClient(default_tracking(root)).get_experiment_by_name("odd")
    assert experiment is not None
    assert "%3F" in experiment.artifact_location

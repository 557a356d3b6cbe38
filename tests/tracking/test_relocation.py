"""A store can be moved or copied: MLflow finds every artifact in the new place, and in no other."""

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before the import
from mlflow import MlflowClient

from lit_llm.config.problems import InputError
from lit_llm.store.locks import locked
from lit_llm.store.store import Store
from lit_llm.tracking.address import default_tracking
from lit_llm.tracking.mlflow_sync import MlflowSync, RunRecord
from lit_llm.tracking.relocation import moved, notice, rebase


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Two studies, and an experiment and a model of somebody else whose files are in the store or elsewhere."""
    root = tmp_path_factory.mktemp("place") / "my mlruns"
    tracking = default_tracking(Store(root).open().root)
    for study in ("norms", "masks"):
        mirror = MlflowSync(tracking, study=study)
        mirror.sync([RunRecord("red", 0, study, "running", config_yaml=f"study: {study}\n")])
        (root / "table.csv").write_text(study)
        mirror.finish("done", [root / "table.csv"])
    client = MlflowClient(tracking)
    client.create_run(client.create_experiment("elsewhere", artifact_location="file:///somewhere/artifacts/elsewhere"))
    client.create_experiment("inside", artifact_location=(root / "notes").as_uri())
    model = client.create_logged_model(client.get_experiment_by_name("norms").experiment_id, name="weights")
    assert model.artifact_location.startswith(root.as_uri())
    return root


@pytest.fixture
def place(original, tmp_path):
    """Moved, as far as it can tell: the paths in its database are those of another place."""
    root = tmp_path / "new place"
    root.mkdir()
    (root / "store.json").write_bytes((original / "store.json").read_bytes())
    with closing(sqlite3.connect(original / "mlflow.db")) as old, closing(sqlite3.connect(root / "mlflow.db")) as new:
        old.backup(new)
    for file in (original / "artifacts").rglob("*"):
        if file.is_file():
            copy = root / file.relative_to(original)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return Store(root)


def paths(root):
    """Every text in the database that names a path, with its table and column."""
    found = {}
    with closing(sqlite3.connect(root / "mlflow.db")) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for _, column, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
                for (value,) in connection.execute(f'SELECT "{column}" FROM "{table}"'):
                    if isinstance(value, str) and "file://" in value:
                        found.setdefault(f"{table}.{column}", []).append(value)
    return found


def test_every_path_of_the_old_place_is_one_of_the_new_and_the_rest_is_left(place, original):
    before = paths(place.root)
    done = rebase(place)
    assert (done.old, done.new) == ((original,), place.root)
    expected = {
        column: [value.replace(f"{original.as_uri()}/", f"{place.root.as_uri()}/") for value in values]
        for column, values in before.items()
    }
    assert paths(place.root) == expected
    assert "file:///somewhere/artifacts/elsewhere" in expected["experiments.artifact_location"]
    # Two studies and the notes; a parent and a child of each study; one model.
    assert done.rows == {"experiments": 3, "runs": 4, "logged_models": 1}


def test_mlflow_lists_and_reads_the_artifacts_in_the_new_place(place, tmp_path):
    client = MlflowClient(default_tracking(place.root))
    for study in ("norms", "masks"):
        (place.root / "artifacts" / study / "proof").touch()
    rebase(place)
    for study in ("norms", "masks"):
        experiment = client.get_experiment_by_name(study)
        assert Path(experiment.artifact_location.removeprefix("file://").replace("%20", " "), "proof").exists()
        runs = client.search_runs([experiment.experiment_id])
        files = {file.path for run in runs for file in client.list_artifacts(run.info.run_id)}
        assert files == {"config.yaml", "table.csv"}
        [child] = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
        copy = client.download_artifacts(child.info.run_id, "config.yaml", str(tmp_path))
        assert Path(copy).read_text() == f"study: {study}\n"


def test_a_second_time_nothing_is_to_do(place):
    rebase(place)
    before = paths(place.root)
    assert rebase(place).old == ()
    assert paths(place.root) == before


def test_a_store_moved_below_its_old_place_is_not_rewritten_twice(place, original):
    """Its new paths begin with the old one, like those that are yet to be rewritten."""
    inner = Path(f"{place.root}/deeper/store")
    inner.mkdir(parents=True)
    for name in ("mlflow.db", "store.json"):
        (inner / name).write_bytes((place.root / name).read_bytes())
    with closing(sqlite3.connect(inner / "mlflow.db")) as connection, connection:
        # As one study looks after its own mirror has mended it, and the other as `place` was.
        for name, where in (("norms", inner), ("masks", place.root)):
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE name = ?",
                ((where / "artifacts" / name).as_uri(), name),
            )
    assert rebase(Store(inner)).old == (place.root,)
    locations = paths(inner)["experiments.artifact_location"]
    assert {(inner / "artifacts" / name).as_uri() for name in ("norms", "masks")} <= set(locations)
    assert str(original) != str(inner)


def test_a_store_moved_into_a_parent_of_its_old_place_is_rewritten(place):
    """Its old paths begin with the new one."""
    old = place.root / "deeper" / "store"
    with closing(sqlite3.connect(place.root / "mlflow.db")) as connection, connection:
        for name in ("norms", "masks"):
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE name = ?",
                ((old / "artifacts" / name).as_uri(), name),
            )
    assert rebase(place).old == (old,)
    locations = paths(place.root)["experiments.artifact_location"]
    assert {(place.root / "artifacts" / name).as_uri() for name in ("norms", "masks")} <= set(locations)
    assert moved(place.root / "mlflow.db") == {}


def test_a_store_whose_database_is_a_link_is_whole(original, tmp_path):
    """The mirror follows the link: artifacts lie beside the file itself, and so does the lock."""
    store = Store(tmp_path / "store").open()
    (store.root / "mlflow.db").symlink_to(original / "mlflow.db")
    before = paths(original)
    done = rebase(store)
    assert (done.old, done.new) == ((), original)
    assert paths(original) == before


def test_a_mirror_leaves_the_paths_of_an_experiment_that_is_not_ours(place):
    client, tracking = MlflowClient(default_tracking(place.root)), default_tracking(place.root)
    location = "file:///somewhere/artifacts/elsewhere"
    assert client.get_experiment_by_name("elsewhere").artifact_location == location
    MlflowSync(tracking, study="elsewhere").sync([])
    assert client.get_experiment_by_name("elsewhere").artifact_location == location


def test_a_moved_store_is_noticed_until_it_is_rebased(place, original):
    assert moved(place.root / "mlflow.db") == {"masks": original, "norms": original}
    assert notice(place) == (
        f"This store was moved from {original}: MLflow still looks there for the files of masks, norms. "
        f"`lit-llm store rebase --store '{place.root}'` puts that right."
    )
    rebase(place)
    assert notice(place) is None


def test_a_mirror_mends_the_paths_of_every_study_of_a_moved_store(place, tmp_path):
    """The same rows as `rebase` writes, and so nothing is left for it."""
    copy = tmp_path / "copy"
    shutil.copytree(place.root, copy)
    rebase(Store(copy))
    here, there = place.root.as_uri(), copy.as_uri()
    expected = {key: [value.replace(there, here) for value in found] for key, found in paths(copy).items()}
    assert paths(place.root) != expected
    MlflowSync(default_tracking(place.root), study="norms").sync([])
    assert paths(place.root) == expected
    assert rebase(place).old == ()


def test_a_store_reached_by_a_link_was_not_moved(original, tmp_path):
    (tmp_path / "link").symlink_to(original)
    assert notice(Store(tmp_path / "link")) is None
    assert rebase(Store(tmp_path / "link")).old == ()


@pytest.mark.parametrize("lock", ["studies/norms/lock", "stages/0123456789abcdef/lock", "mlflow.db.lock"])
def test_a_store_in_use_is_left_alone(place, monkeypatch, lock):
    before = paths(place.root)
    monkeypatch.setattr("lit_llm.tracking.relocation.PATIENCE", 0.1)
    with locked(place.root / lock), pytest.raises(InputError, match="in use by another process"):
        rebase(place)
    assert paths(place.root) == before


def test_where_there_is_no_database_of_mlflow_nothing_is_rebased(tmp_path):
    with pytest.raises(InputError, match="holds no MLflow database"):
        rebase(Store(tmp_path).open())
    (tmp_path / "mlflow.db").write_text("not a database, only a text of more than a hundred characters " * 3)
    assert notice(Store(tmp_path)) is None
    with pytest.raises(InputError, match="cannot be rewritten: file is not a database"):
        rebase(Store(tmp_path))

"""A finished study that is run again: nothing is made anew that is whole, and nothing damaged passes for whole."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lit_llm.store.store import Store
from lit_llm.studies import run as module
from tests.commands import command, lit_llm
from tests.mlflow_runs import mirrored

HEAVY = ("torch", "lightning", "mlflow", "optuna", "transformers", "matplotlib")
LOADED = """
import json, sys
from lit_llm.cli import main
code = None
try:
    main()
except SystemExit as ended:
    code = ended.code
print(json.dumps([code, [name for name in sys.argv[1:] if name in sys.modules]]))
"""


@pytest.fixture
def ran(write_study: Callable[..., Path], tmp_path: Path) -> tuple[Path, Store]:
    """A finished study with its store."""
    path, store = write_study("again", "arms: {red: {}}"), Store(tmp_path / "store")
    assert lit_llm("run", path, "--store", store.root, cwd=tmp_path).returncode == 0
    return path, store


def reopened(path: Path, store: Store, *options: str, code: int = 0) -> bool:
    """Whether `run` opens MLflow again."""
    with pytest.MonkeyPatch.context() as patch:
        opened: list[object] = []
        threads = module.SyncThread
        patch.setattr(module, "SyncThread", lambda *given: opened.append(given) or threads(*given))
        assert lit_llm("run", path, "--store", store.root, *options, cwd=path.parent).returncode == code
    return bool(opened)


def test_it_loads_no_heavy_library_and_prints_the_same(ran: tuple[Path, Store]) -> None:
    path, store = ran
    arguments = ["run", str(path), "--store", str(store.root)]
    before = {file: file.read_bytes() for file in store.study("again").rglob("*") if file.is_file()}
    code = LOADED.replace("sys.argv[1:]", repr(HEAVY)).replace(
        "main()", f"sys.argv = {['lit-llm', *arguments]!r}; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=path.parent)
    *printed, last = done.stdout.splitlines()
    assert json.loads(last) == [0, []], done.stderr
    assert {file: file.read_bytes() for file in store.study("again").rglob("*") if file.is_file()} == before
    (store.root / "mlflow.db").unlink()  # so that all is made again
    anew = lit_llm(*arguments, cwd=path.parent)
    assert [line for line in printed if line] == [line for line in anew.stdout.splitlines() if line]


def test_what_is_damaged_or_gone_is_made_again(ran: tuple[Path, Store]) -> None:
    path, store = ran
    page = store.study("again") / "report.html"
    assert not reopened(path, store)
    page.write_text("<html>")
    assert reopened(path, store)
    assert "Does it hold?" in page.read_text()
    assert not reopened(path, store)
    client = MlflowClient(f"sqlite:///{store.root}/mlflow.db")
    experiment = client.get_experiment_by_name("again")
    (child,) = [run for run in client.search_runs([experiment.experiment_id]) if "lit_llm.arm" in run.data.tags]
    client.delete_run(child.info.run_id)
    assert reopened(path, store)
    assert set(mirrored(store.root).values()) == {1}
    assert not reopened(path, store)
    (store.study("again") / "comparison.md").unlink()
    (store.root / "mlflow.db").unlink()
    again = subprocess.run(command("run", path, "--store", store.root), capture_output=True, text=True, cwd=path.parent)
    assert again.returncode == 0, again.stderr
    assert (store.study("again") / "comparison.md").exists()
    with closing(sqlite3.connect(store.root / "mlflow.db")) as connection:  # this process's MLflow has the file deleted
        arms = connection.execute("SELECT value FROM tags WHERE key = 'lit_llm.arm'").fetchall()
    assert arms == [("red",)]
    assert not reopened(path, store)


def test_a_damaged_result_is_noticed(ran: tuple[Path, Store]) -> None:
    path, store = ran
    (file,) = store.root.glob("stages/*/metrics.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert reopened(path, store, code=1)
    file.write_bytes(whole)
    assert reopened(path, store)  # MLflow has it as failed
    assert not reopened(path, store)


def test_another_question_or_another_command_is_reported_anew(ran: tuple[Path, Store]) -> None:
    path, store = ran
    path.write_text(path.read_text().replace("Does it hold?", "Is it so?"))
    assert reopened(path, store)
    assert "Is it so?" in (store.study("again") / "report.html").read_text()

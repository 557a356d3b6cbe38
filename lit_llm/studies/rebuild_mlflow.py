"""Rebuilds a broken MLflow database from a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lit_llm.config.problems import InputError, Problem
from lit_llm.store.locks import held
from lit_llm.store.store import FINAL, Store
from lit_llm.studies.analysis_plan import FROZEN, LOG
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.coordinators import is_running
from lit_llm.studies.mlflow_connection import open_sync, summary
from lit_llm.studies.mlflow_runs import description, description_with_tables, record, tags_of
from lit_llm.studies.palette import arm_styles
from lit_llm.studies.plan import PLAN, plan, with_earlier_findings
from lit_llm.studies.runs import runs_of
from lit_llm.studies.stored import SWEEP, open_study, studies_in
from lit_llm.tracking.mlflow_database import put_aside
from lit_llm.tracking.relocation import PATIENCE, lock_of

FILES = (PLAN, FROZEN, LOG, "comparison.csv", "comparison.json", "comparison.md", "report.html", "tables", "figures")
"""Files of a study's folder that are logged with it, where they exist."""


@dataclass(frozen=True)
class Rebuilt:
    """Outcome of a rebuild."""

    aside: Path | None
    """New place of the old database."""
    studies: tuple[str, ...]
    left: tuple[str, ...]
    """Sweeps, which the new database lacks until they run again."""
    unread: tuple[str, ...]
    """Problems of the studies that cannot be read, and are not in the new database."""


def rebuild_mlflow(store: Store, log: Callable[[str], None] = lambda _: None) -> Rebuilt:
    """Move a store's MLflow database aside and write a new one with every study of the store.

    Args:
        log: called with the name of each study.

    Raises:
        InputError: a study is running, or there is no store.
        SyncUnavailable: the new database cannot be written either.
    """
    store.check()
    if not (store.root / "store.json").exists():
        raise InputError(Problem(f"there is no store in {store.root}", "--store"))
    running = sorted(folder.name for folder in store.root.glob("studies/*") if is_running(folder))
    if running:
        raise InputError(
            Problem(f"{', '.join(running)} is being run by another process; wait for it to end", "--store")
        )
    database = (store.root / "mlflow.db").resolve()
    busy = Problem(f"{database} is in use by another process; wait for it to end", "--store")
    with held(lock_of(database), PATIENCE, busy):
        aside = put_aside(database)
    names, unread = list[str](), list[str]()
    for name in studies_in(store):
        log(name)
        try:
            _replay(store, name)
            names.append(name)
        except InputError as error:
            unread += map(str, error.problems)
    kept = {path.parent.name for path in store.root.glob(f"studies/*/{SWEEP}")}
    return Rebuilt(aside, tuple(names), tuple(sorted(kept)), tuple(unread))


def _replay(store: Store, name: str) -> None:
    ablation, folder = open_study(str(store.study(name)), store=store), store.study(name)
    runs = runs_of(ablation, store)
    comparison = comparison_of(ablation, runs)
    planned = plan(ablation, built=False, runs=runs)
    planned = with_earlier_findings(planned, folder / PLAN) or planned
    places, styles = {arm.name: place for place, arm in enumerate(ablation.arms)}, arm_styles(ablation)
    sync = open_sync(store, name, None, description(planned, store), tags_of(planned, store))
    sync.sync(record(run, places[run.arm.name], styles[run.arm.name].colour) for run in runs)
    state = "done" if all(run.status()["state"] in FINAL for run in runs) else "interrupted"
    files = [folder / file for file in FILES if (folder / file).exists()]
    sync.finish(state, files, summary(comparison), description_with_tables(planned, folder, store))

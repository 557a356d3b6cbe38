"""Connection of a study or a sweep to MLflow: opened and checked before the runs, closed after them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lit_llm.config.problems import InputError, Problem
from lit_llm.statistics.comparison import Comparison
from lit_llm.store.store import Store
from lit_llm.studies.observer import Observer
from lit_llm.tracking.address import default_tracking
from lit_llm.tracking.mlflow_sync import MlflowSync, SyncUnavailable
from lit_llm.tracking.sync_thread import SyncThread


def open_sync(
    store: Store, name: str, tracking: str | None, description: str, tags: Mapping[str, str] | None = None
) -> MlflowSync:
    """The MLflow sync of a study, checked; at the store's own address by default. Raises InputError.

    description: text of the parent run; tags: tags of the experiment.
    """
    try:
        address, lock = tracking or default_tracking(store.root), store.study(name) / "mirror.lock"
        sync = MlflowSync(address, study=name, description=description, lock=lock, tags=tags)
        sync.check()
    except ValueError as error:
        raise InputError(Problem(str(error), "--tracking")) from None
    return sync


def attach_files(store: Store, name: str, tracking: str | None, files: Sequence[Path]) -> str:
    """Log files with a study that is in MLflow. Returns why that failed, or ''. Raises InputError."""
    sync = open_sync(store, name, tracking, "")
    try:
        sync.attach(files)
    except SyncUnavailable as problem:
        return f"{problem}. The files are in the store; the same command logs them."
    return ""


def close_sync(
    follower: SyncThread,
    state: str,
    files: Iterable[Path],
    metrics: Mapping[str, float | None],
    observer: Observer,
    note: str = "",
    complete: str = "",
) -> bool:
    """Bring MLflow up to date, and report where that fails. Returns whether it is up to date."""
    mirrored = follower.close(state, files, metrics, note, complete)
    report_news(follower, observer)
    return mirrored


def report_news(follower: SyncThread, observer: Observer) -> None:
    """Report once why MLflow is not up to date."""
    if news := follower.take_news():
        observer.message(news)


def summary(comparison: Comparison) -> dict[str, float | None]:
    """Metrics of the study's own run in MLflow: the mean of each arm."""
    return {f"{row.arm}/{comparison.metric}": row.mean for row in comparison.rows}

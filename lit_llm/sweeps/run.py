"""Run a sweep: draw trials, train several at once, prune bad ones, and end with a confirmation study."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lit_llm.config.metrics import TRAIN_LOSS
from lit_llm.config.problems import InputError
from lit_llm.runs.fingerprints import pretrain_fingerprint
from lit_llm.runs.trainer_parts import of_settings
from lit_llm.store.disk import check_exists, disk_errors
from lit_llm.store.locks import Busy, locked
from lit_llm.store.store import Store
from lit_llm.studies.disk_space import check_free_space
from lit_llm.studies.launched import Places
from lit_llm.studies.load import load_study
from lit_llm.studies.mlflow_connection import close_sync, open_sync, report_news
from lit_llm.studies.pending_stages import Rerun
from lit_llm.studies.plan import plan
from lit_llm.studies.preflight import check_held_out, check_kernels, check_leaks
from lit_llm.studies.prepare_data import prepare_data
from lit_llm.studies.run import Finished, Report, run_study
from lit_llm.studies.supervise import Supervision
from lit_llm.sweeps.confirmation import Summary, confirmation_study, summary, write_best
from lit_llm.sweeps.coordinator import Coordinator, SweepObserver
from lit_llm.sweeps.places import SweepManifest, follow_trials
from lit_llm.sweeps.storage import storage_errors, warning_of
from lit_llm.sweeps.sweep import Search
from lit_llm.sweeps.trial import Trial
from lit_llm.sweeps.trials import Trials
from lit_llm.tracking.mlflow_sync import RunRecord
from lit_llm.tracking.mlflow_views import Chart, column, experiment_tags
from lit_llm.tracking.sync_thread import SyncThread


@dataclass(frozen=True)
class Searched:
    """Result of a sweep."""

    search: Search
    summaries: tuple[Summary, ...]
    """One for each arm."""
    trials: tuple[Trial, ...]
    interrupted: bool
    mirrored: bool
    best: tuple[Path, ...] = ()
    """Experiment files of the best settings, for `train`."""
    winners: Finished | None = None
    """Result of the confirmation study, where it was run."""
    confirmation_refused: bool = False
    """Whether the confirmation study could not be started."""

    @property
    def failed(self) -> bool:
        """True where there are failed trials that were not retried."""
        return any(trial.state in ("failed", "out_of_memory") and not trial.retried for trial in self.trials)

    @property
    def exit_code(self) -> int:
        """0: done; 1: some trials or runs of the confirmation study failed; 130: interrupted."""
        if self.interrupted or (self.winners is not None and self.winners.exit_code == 130):
            return 130
        lost = self.confirmation_refused or (self.winners is not None and self.winners.exit_code != 0)
        return 1 if self.failed or lost else 0


def run_sweep(
    search: Search,
    store: Store,
    *,
    observer: SweepObserver,
    max_parallel: int,
    storage: str | None = None,
    tracking: str | None = None,
    rerun: Rerun | None = None,
    report: Report = lambda *_: (),
    supervision: Supervision = Supervision(),
    places: Places | None = None,
) -> Searched:
    """Search every arm to its number of trials, then compare each arm's best setting over fresh seeds.

    Several processes, on several machines that share the store, may run one sweep: they draw from one budget.

    Args:
        search: The sweep, from `load_sweep`.
        store: Directory of results.
        observer: Receives the events, for progress.
        max_parallel: Number of trials at once.
        storage: URL of a database for the trials: postgresql://, mysql:// or sqlite:///; a journal in the store by
            default.
        tracking: Address of MLflow; the store's own database by default.
        rerun: As for `run_study`.
        report: As for `run_study`.
        supervision: As for `run_study`.
        places: As for `run_study`.

    Returns:
        The trials, and the study of the best settings where the sweep has one.

    Raises:
        InputError: Before anything has started: an unfair comparison, a search that differs from the one begun under
            this name, a storage, an address or a disk that cannot be used, or additions to the Trainer that cannot be
            imported.
        DiskError: As for `run_study`.
    """
    store.check()
    of_settings().check()
    if places is not None:
        places.check()
    elif search.trains:
        check_kernels(search.ablation)
    planned = plan(search.ablation, log=observer.message, built=search.trains, store=store)
    planned.check()
    trials = Trials(search, store, storage)
    sync = open_sync(store, search.name, tracking, _description(search), _tags(search))
    if search.trains:
        arms = [(arm.experiment, store.stage(pretrain_fingerprint(arm.experiment))) for arm in search.ablation.arms]
        check_free_space(store, [(experiment, "pretrain", stage) for experiment, stage in arms], max_parallel)
    store.open()
    if warning := warning_of(storage):
        observer.message(warning)
    with disk_errors(store) as disk, trials.coordinating(rerun, trains=places is None):
        coordinator = Coordinator(search, store, trials, observer, supervision)

        def records() -> list[RunRecord]:
            check_exists(store)  # MLflow would create a new database in its place
            return [record for trial in coordinator.seen for record in coordinator.records(trial)]

        follower = SyncThread(sync, records)
        news = partial(report_news, follower, observer)
        interrupted = True
        try:
            if search.trains:
                prepare_data(
                    [arm.experiment for arm in search.ablation.arms], store, observer, bool(search.ablation.identities)
                )
                check_held_out(search.ablation, store)
                check_leaks(search.ablation, store)
            observer.searching(search, coordinator.refresh(), max_parallel)
            disk.started = True
            if places is None:
                interrupted = coordinator.run(max_parallel, news)
            else:
                manifest = SweepManifest(search.name, storage, max_parallel, supervision)
                interrupted = follow_trials(places, manifest, coordinator, news)
        finally:
            observer.finished()
            seen = coordinator.refresh()
            summaries = tuple(summary(search, arm, seen) for arm in search.spaces)
            mirrored = close_sync(
                follower, "interrupted" if interrupted else "done", (), _metrics(search, summaries), observer
            )
    with suppress(*storage_errors()):  # a database that is away; the sweep is then interrupted
        for reason in trials.exhausted.values():
            observer.message(reason)
    ended = Searched(search, summaries, tuple(seen), interrupted, mirrored)
    if interrupted:
        return ended
    ended = replace(ended, best=write_best(search, summaries, trials.folder))

    def confirm(path: Path) -> Finished:
        return run_study(
            replace(load_study(path), identities=search.ablation.identities),
            store,
            observer=observer,
            max_parallel=max_parallel,
            rerun=rerun,
            tracking=tracking,
            report=report,
            supervision=supervision,
            new_version=True,  # a continued search may have better settings
            places=places,
        )

    return _with_confirmation(ended, trials.folder, store, observer, confirm)


def _with_confirmation(
    ended: Searched, folder: Path, store: Store, observer: SweepObserver, confirm: Callable[[Path], Finished]
) -> Searched:
    """The result with the confirmation study, run by `confirm`, where the sweep has one."""
    path = confirmation_study(ended.search, ended.summaries, folder)
    if path is None:
        return ended
    observer.comparing(path)
    try:
        with locked(folder / "winners.lock"):
            return replace(ended, winners=confirm(path))
    except Busy:
        command = shlex.join(["lit-llm", "status", str(path), *store.option()])
        observer.message(f"another process runs the study of the winners: `{command}`")
        return ended
    except InputError as error:  # the search is done, so its results are still returned
        observer.message(f"the study of the winners cannot be run: {error}")
        return replace(ended, confirmation_refused=True)


def _description(search: Search) -> str:
    lines = [f"**{search.sweep.question}**", "", f"{search.sweep.trials} trials of each arm, {search.sweep.sampler}."]
    lines += [f"- `{name}`" for name in search.sweep.space]
    return "\n".join(lines)


def _tags(search: Search) -> dict[str, str]:
    """Tags that set the columns and charts of the trials in MLflow's UI."""
    goals = [f"objective/{goal}" for goal in search.goals]
    columns = [column("metrics", goal) for goal in goals] + [
        column("params", f"arm.{key}") for key in search.sweep.space
    ]
    charts: list[Chart] = [
        *(("LINE", name) for name in (TRAIN_LOSS.name, *search.goals)),
        *(("SCATTER", goal) for goal in goals),
    ]
    return experiment_tags(_description(search), [*columns, column("tags", "lit_llm.state")], charts, grouped=False)


def _metrics(search: Search, summaries: Sequence[Summary]) -> dict[str, float | None]:
    goal = search.goals[0]
    return {
        f"{summary.arm}/best {goal}": summary.best.values[0]
        for summary in summaries
        if summary.best and summary.best.values
    }

"""Runs a study: execute pending runs, resume interrupted ones, write the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lit_llm.config.code_digest import digest_of_package
from lit_llm.config.hashing import fingerprint
from lit_llm.config.problems import InputError, Problem, some
from lit_llm.config.user_settings import user_file
from lit_llm.runs.fingerprints import reset_identities
from lit_llm.runs.provenance import installed_version
from lit_llm.runs.trainer_parts import TrainerParts, given, of_settings
from lit_llm.statistics.comparison import Comparison
from lit_llm.store.disk import check_exists, disk_errors
from lit_llm.store.files import file_digest
from lit_llm.store.garbage_collection import list_runs
from lit_llm.store.locks import Busy, locked
from lit_llm.store.store import FINAL, Store, write_json, write_text
from lit_llm.studies.analysis_plan import FROZEN, LOG
from lit_llm.studies.comparison import comparison_of, note_comparison
from lit_llm.studies.coordinators import FOLDER as COORDINATORS
from lit_llm.studies.coordinators import coordinating, others, wait_for_others
from lit_llm.studies.disk_space import check_free_space
from lit_llm.studies.execute import Execution
from lit_llm.studies.launched import FOLDER as PLACES
from lit_llm.studies.launched import Places
from lit_llm.studies.load import Ablation
from lit_llm.studies.mlflow_connection import close_sync, open_sync, summary
from lit_llm.studies.mlflow_runs import description, description_with_tables, record, tags_of
from lit_llm.studies.observer import Observer
from lit_llm.studies.palette import arm_styles
from lit_llm.studies.pending_stages import Rerun, pending_stages, selected_runs
from lit_llm.studies.plan import PLAN, Plan, plan, with_earlier_findings
from lit_llm.studies.preflight import check_held_out, check_kernels, check_leaks
from lit_llm.studies.prepare_data import prepare_data
from lit_llm.studies.runs import Run, register_analysis, runs_of
from lit_llm.studies.stored import STORED, SWEEP, another_version, changes, damage_of, keep, set_aside
from lit_llm.studies.supervise import Supervision
from lit_llm.tracking.mlflow_sync import MlflowSync, RunRecord
from lit_llm.tracking.sync_thread import SyncThread

if TYPE_CHECKING:
    import pandas

Report = Callable[[Plan, Sequence[Run], Comparison, Store], Sequence[Path]]
"""Writes the report into the study's folder; returns its files and folders, which are logged with the study."""


@dataclass(frozen=True)
class Finished:
    """Outcome of running a study."""

    plan: Plan
    runs: tuple[Run, ...]
    chosen: tuple[Run, ...]
    """Runs selected by `only`; all by default."""
    comparison: Comparison
    interrupted: bool
    folder: Path
    """The study's folder, with its results and its report."""
    mirrored: bool = False
    """Whether MLflow is up to date; if not, the same command catches up."""

    def to_frame(self) -> pandas.DataFrame:
        """The runs as a data frame: a row for each run, with its factor levels, state, costs and metrics.

        `comparison.to_frame()` has the arms, and `to_frame()` of one of `runs` its logged steps.
        """
        import pandas

        return pandas.DataFrame([run.row(run.result()) for run in self.runs])

    @property
    def exit_code(self) -> int:
        """0: done, divergence included; 1: some runs failed; 130: interrupted."""
        if self.interrupted:
            return 130
        return 0 if all(run.status()["state"] in FINAL for run in self.chosen) else 1


def run_study(
    ablation: Ablation,
    store: Store,
    *,
    observer: Observer,
    max_parallel: int,
    only: str | None = None,
    rerun: Rerun | None = None,
    tracking: str | None = None,
    report: Report = lambda *_: (),
    supervision: Supervision = Supervision(),
    new_version: bool = False,
    places: Places | None = None,
    trainer: TrainerParts = TrainerParts(),
) -> Finished:
    """Execute the runs of a study and compare its arms.

    Each stage has a process of its own. Stages with a result in the store are not repeated; interrupted ones go on from
    their checkpoints. Several processes, on several machines that share the store, may run one study: each stage is
    computed by one of them.

    Args:
        ablation: The study, from `load_study`.
        store: Directory of results.
        observer: Is told what happens, for progress.
        max_parallel: Number of runs at once, in each place where there are several.
        only: Pattern for names of arms or runs (`red*`); other runs stay as they are.
        rerun: `"failed"` repeats failed runs, `"stale"` those computed by other code.
        tracking: Address of MLflow; the store's own database by default.
        report: Writes the report at the end, unless the study was interrupted, or has the same report already.
        supervision: Limits for restarting runs that die, make no progress or run out of memory.
        new_version: Keep results of other settings under the study's name as an earlier version. Those of a single
            experiment are always kept.
        places: Places of an engine that compute the runs; this machine by default.
        trainer: Callbacks, loggers, plugins, a strategy and a profiler for Lightning's Trainer in every run, besides
            those of the user's settings file.

    Returns:
        The runs and their comparison.

    Raises:
        InputError: Before anything has started: an unfair comparison, an unreadable corpus, a store of another schema,
            a disk that is too small or cannot be written, results of other settings, a wrong tracking address, an
            engine that cannot serve the needs, or additions to the Trainer that a run's process cannot import.
        DiskError: The store can no longer be written. The runs were asked to save and stop.
    """
    store.check()
    _check_trainer(trainer, ablation, places)
    with given(trainer):
        reset_identities(ablation.identities)
        runs = runs_of(ablation, store)
        chosen = selected_runs(runs, only)
        to_do = any(run.status()["state"] not in FINAL for run in chosen)
        if to_do or rerun:
            _check_machine(ablation, chosen, rerun, places)
        planned = _fair_plan(ablation, store, observer, runs, to_do)
        study = _StudyRun(planned, store, observer, runs, chosen, only)
        other = study.other_settings(new_version)
        if not to_do:
            earlier = with_earlier_findings(planned, study.folder / PLAN)
            study.planned = earlier or plan(ablation, log=observer.message, store=store, runs=runs)
        sync = open_sync(store, study.name, tracking, description(study.planned, store), tags_of(study.planned, store))
        study.check_free_space(max_parallel)
        store.open()
        follower = cache(lambda: SyncThread(sync, study.records))
        execution = Execution(store, study.folder, max_parallel, observer, follower, supervision, places, trainer)
        with disk_errors(store) as disk, ExitStack() as stack:
            with _exclusively(study.folder, observer):
                if other:
                    study.set_aside(other)
                coordinator = stack.enter_context(coordinating(study.folder))
                study.prepare(rerun)
            disk.started = True
            study.report_others(coordinator)
            interrupted = study.execute(execution, rerun)
            with _exclusively(study.folder, observer):
                return study.end(interrupted, sync, follower, report)


@dataclass
class _StudyRun:
    """The parts of a study's run, in their order."""

    planned: Plan
    store: Store
    observer: Observer
    runs: list[Run]
    chosen: list[Run]
    only: str | None

    @property
    def ablation(self) -> Ablation:
        return self.planned.ablation

    @property
    def name(self) -> str:
        return self.ablation.study.study

    @property
    def folder(self) -> Path:
        return self.store.study(self.name)

    def other_settings(self, new_version: bool) -> list[Problem]:
        """Settings that differ from those of the results under the study's name, which are then set aside.

        Raises InputError where they may not be, or where the name is a sweep's. new_version: as for `run_study`.
        """
        other = changes(self.store, self.ablation)
        if other and not (new_version or self.ablation.is_experiment):
            raise another_version(self.store, self.ablation, other)
        if (self.folder / SWEEP).exists():
            message = f"{self.name} is the name of a sweep in this store; give the study another"
            raise InputError(Problem(message, "study"))
        return other

    def check_free_space(self, max_parallel: int) -> None:
        """Raise InputError for a disk that is too small for the runs' checkpoints and results."""
        steps = [(run, step) for run in self.chosen for step in run.trained]
        trained = [(run.experiment_at(step), step.node.after, step.stage) for run, step in steps]
        trunks = {step.node.fingerprint for _, step in steps if step.node.kind == "trunk"}
        check_free_space(self.store, trained, max_parallel, trunks)

    def set_aside(self, changes: Sequence[Problem]) -> None:
        """Keep the results of other settings as an earlier version. Raises InputError while somebody computes them."""
        if wait_for_others(self.folder, None):
            status = self.ablation.command("status", self.store)
            message = f"{self.name} is being run with other settings by another process; `{status}` shows how far it is"
            raise InputError(Problem(message, "study"))
        kept = set_aside(self.store, self.name)
        self.observer.message(f"What was trained otherwise is kept as {kept}: {'; '.join(map(str, changes))}.")

    def prepare(self, rerun: Rerun | None) -> None:
        """Register the study and its analysis, and prepare its data. Raises InputError."""
        ablation, store, observer = self.ablation, self.store, self.observer
        for problem in damage_of(store, self.name):
            observer.message(problem)
        self._register_runs()
        for problem in register_analysis(store, ablation, self.runs):
            observer.message(problem)
        is_stored = bool(ablation.identities)  # then only the texts of pending runs are read
        ended = {run.name for run in self.chosen if is_stored and not rerun and run.status()["state"] in FINAL}
        reading = [run for run in self.chosen if run.name not in ended]
        try:
            experiments = [run.experiment_at(step) for run in reading for step in run.trained]
            prepare_data(experiments, store, observer, is_stored)
            check_held_out(ablation, store)
            check_leaks(ablation, store)
        except BaseException:
            observer.finished()
            raise

    def _register_runs(self) -> None:
        ablation, listed = self.ablation, [each for run in self.runs for each in _listed(run)]
        keep(self.store, ablation, _stages(self.runs))
        list_runs(self.store, self.name, ablation.source, ablation.overrides, listed)

    def report_others(self, coordinator: str) -> None:
        """Report that other processes run the study too."""
        if names := others(self.folder, coordinator):
            count = "another process runs" if len(names) == 1 else f"{len(names)} other processes run"
            self.observer.message(f"{count} this study too ({some(names)}); each run is computed once.")

    def execute(self, execution: Execution, rerun: Rerun | None) -> bool:
        """Execute the pending stages, in further rounds those of added seeds. Returns whether it was interrupted."""
        try:
            interrupted = execution.round(self.chosen, pending_stages(self.chosen, rerun, self.observer))
            while self.ablation.study.more_seeds and not interrupted:
                with _exclusively(self.folder, self.observer):
                    if not self.add_seeds():
                        break
                interrupted = execution.round(self.chosen, pending_stages(self.chosen, None, self.observer))
        finally:
            self.observer.finished()
        return interrupted

    def add_seeds(self) -> bool:
        """Add the seeds that the results so far ask for; returns False where there are none."""
        more = runs_of(self.ablation, self.store)
        if len(more) == len(self.runs):
            return False
        self.observer.finished()
        self.runs, self.chosen = more, selected_runs(more, self.only)
        self._register_runs()
        return True

    def records(self) -> list[RunRecord]:
        """The runs for MLflow."""
        check_exists(self.store)  # MLflow would create a new store in its place
        places = {arm.name: place for place, arm in enumerate(self.ablation.arms)}
        styles = arm_styles(self.ablation)
        return [record(run, places[run.arm.name], styles[run.arm.name].colour) for run in self.runs]

    def end(self, interrupted: bool, sync: MlflowSync, follower: Callable[[], SyncThread], report: Report) -> Finished:
        """Write comparison and report, and bring MLflow up to date."""
        ablation, store, runs, folder = self.ablation, self.store, self.runs, self.folder
        comparison = comparison_of(ablation, runs)
        for problem in note_comparison(store, ablation, runs, comparison):
            self.observer.message(problem)
        files = _write_results(folder, self.planned, comparison)
        files += [file for file in (folder / FROZEN, folder / LOG) if file.exists()]
        ending = Finished(self.planned, tuple(runs), tuple(self.chosen), comparison, interrupted, folder)
        state = "interrupted" if interrupted else "done" if ending.exit_code == 0 else "failed"
        complete, whole = "", state == "done" and all(run.status()["state"] in FINAL for run in runs)
        if whole:
            named = {(run.arm.name, str(run.seed), run.trained[-1].node.fingerprint) for run in runs}
            if sync.is_complete(_digest_of_ending(ending, store, report), named):
                return replace(ending, mirrored=True)
        if not interrupted:
            follower().catch_up()  # the report links to its runs
            files += report(self.planned, runs, comparison, store)
            complete = _digest_of_ending(ending, store, report) if whole else ""
        note = "" if interrupted else description_with_tables(self.planned, folder, store)
        mirrored = close_sync(follower(), state, files, summary(comparison), self.observer, note, complete)
        return replace(ending, mirrored=mirrored)


@contextmanager
def _exclusively(folder: Path, observer: Observer) -> Iterator[None]:
    """Hold the lock of a study's folder, for preparing and ending; waits while another process has it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "lock", patience=1.0))
        except Busy:
            observer.message("another process prepares or ends this study; waiting for it")
            stack.enter_context(locked(folder / "lock", patience=math.inf))
        yield


def _check_trainer(trainer: TrainerParts, ablation: Ablation, places: Places | None) -> None:
    """Raise InputError for additions to Lightning's Trainer that a run's process could not make."""
    several = any(arm.experiment.section(stage).training.execution.ranks > 1
                  for arm in ablation.arms for stage in arm.experiment.trained)  # fmt: skip
    if trainer and (places is not None or several):
        where = "places of an engine" if places is not None else "processes of a run on several devices"
        message = f"parts from Python do not reach the {where}; name them in the section [trainer] of {user_file()}"
        raise InputError(Problem(message, "trainer"))
    (of_settings() + trainer).check()


def _check_machine(ablation: Ablation, chosen: Sequence[Run], rerun: Rerun | None, places: Places | None) -> None:
    """Raise InputError where this machine, or the places of an engine, cannot compute the runs."""
    if places is None:
        check_kernels(ablation, {run.arm.name for run in chosen})
        return
    if rerun == "stale":
        message = "compares with this machine; give it without a launcher, on a machine of the kind"
        raise InputError(Problem(message, "--rerun stale"))
    places.check()


def _fair_plan(ablation: Ablation, store: Store, observer: Observer, runs: Sequence[Run], built: bool) -> Plan:
    """The plan, with its warnings reported. Raises InputError for an unfair comparison. built: as for `plan`."""
    planned = plan(ablation, log=observer.message, built=built, store=store, runs=runs)
    planned.check()
    for finding in planned.findings:
        if finding.kind in ("no_op", "confound"):
            observer.message(str(finding))
    return planned


def _listed(run: Run) -> list[dict[str, object]]:
    return [{"arm": run.arm.name, "seed": run.seed, "fingerprint": step.node.fingerprint} for step in run.steps]


def _stages(runs: Iterable[Run]) -> dict[str, dict[int, dict[str, str]]]:
    """{arm: {seed: {stage that trains: its fingerprint}}}, for `keep`."""
    stages: dict[str, dict[int, dict[str, str]]] = {}
    for run in runs:
        stages.setdefault(run.arm.name, {})[run.seed] = {s.node.name: s.node.fingerprint for s in run.trained}
    return stages


def _digest_of_ending(ending: Finished, store: Store, report: Report) -> str:
    """Digest of all that a finished study's report and its copy in MLflow are made from, and of the report's files.

    Where MLflow has this digest, neither is made again. Damage of a file, other code, another command or another
    release of MLflow changes it.
    """
    ablation, folder = ending.plan.ablation, ending.folder
    skipped = {STORED, "lock", "mirror.lock", COORDINATORS, PLACES}
    files = [path for path in sorted(folder.rglob("*")) if not skipped & {*path.relative_to(folder).parts}]
    results = [step.stage.folder / "result.json" for run in ending.runs for step in run.steps]
    content = {
        "code": digest_of_package("lit_llm"),
        "mlflow": installed_version("mlflow"),
        "report": f"{report.__module__}.{getattr(report, '__qualname__', report)}",
        "command": ablation.command("run", store),
        "study": ablation.study.model_dump(mode="json"),
        "file": ablation.file,
        "files": {str(path.relative_to(folder)): file_digest(path) for path in files if path.is_file()},
        # A stage after one that diverged has no result.
        "results": {path.parent.name: file_digest(path) for path in results if path.exists()},
    }
    return fingerprint(content)


def _write_results(folder: Path, planned: Plan, comparison: Comparison) -> list[Path]:
    """Write CSV and JSON of the comparison and the plan. A comparison without results replaces no earlier one."""
    table, whole = folder / "comparison.csv", folder / "comparison.json"
    write_json(folder / PLAN, planned.as_json())
    if comparison.has_results or not whole.exists():
        write_text(table, comparison.csv())
        write_json(whole, comparison.as_json())
    return [table, whole, folder / PLAN]

"""Runs a study: execute pending runs, resume interrupted ones, write the comparison."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lit_llm.config.code_digest import digest_of_package
from lit_llm.config.hashing import fingerprint
from lit_llm.config.problems import InputError, Problem, did_you_mean, some
from lit_llm.config.user_settings import user_file
from lit_llm.data.sources import error_context
from lit_llm.experiment.schema import Experiment
from lit_llm.runs.fingerprints import digest_of_examples, identity_of_data, reset_identities
from lit_llm.runs.provenance import installed_version
from lit_llm.runs.trained_model import has_lost_weights
from lit_llm.runs.trainer_parts import TrainerParts, given, in_force, of_settings
from lit_llm.statistics.comparison import Comparison
from lit_llm.store.disk import check_exists, disk_errors
from lit_llm.store.files import file_digest
from lit_llm.store.garbage_collection import list_runs
from lit_llm.store.locks import Busy, locked
from lit_llm.store.store import FINAL, Store, write_json, write_text
from lit_llm.studies.analysis_plan import FROZEN, LOG
from lit_llm.studies.coordinators import FOLDER as COORDINATORS
from lit_llm.studies.coordinators import coordinating, others, wait_for_others
from lit_llm.studies.disk_space import check_free_space
from lit_llm.studies.execute import Execution, Todo, report_news
from lit_llm.studies.launched import FOLDER as PLACES
from lit_llm.studies.launched import Places
from lit_llm.studies.load import Ablation
from lit_llm.studies.mlflow_runs import description, description_with_tables, record, tags_of
from lit_llm.studies.observer import Observer
from lit_llm.studies.palette import arm_styles
from lit_llm.studies.plan import PLAN, Plan, plan, with_earlier_findings
from lit_llm.studies.preflight import check_held_out, check_kernels, check_leaks
from lit_llm.studies.runs import Run, comparison_of, left_out, note_comparison, register_analysis, runs_of
from lit_llm.studies.stored import STORED, SWEEP, another_version, changes, damage_of, keep, set_aside
from lit_llm.studies.supervise import Supervision
from lit_llm.tracking.address import default_tracking
from lit_llm.tracking.mlflow_sync import MlflowSync, RunRecord, SyncUnavailable
from lit_llm.tracking.sync_thread import SyncThread

if TYPE_CHECKING:
    import pandas

Rerun = Literal["failed", "stale"]
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
    name = ablation.study.study
    store.check()
    _check_trainer(trainer, ablation, places)
    with given(trainer):
        reset_identities(ablation.identities)
        runs = runs_of(ablation, store)
        chosen = _chosen(runs, only)
        to_do = any(run.status()["state"] not in FINAL for run in chosen)
        if places is not None and rerun == "stale":
            raise InputError(
                Problem(
                    "compares with this machine; give it without a launcher, on a machine of the kind", "--rerun stale"
                )
            )
        if places is not None and (to_do or rerun):
            places.check()
        elif to_do or rerun:
            check_kernels(ablation, {run.arm.name for run in chosen})
        planned = plan(ablation, log=observer.message, built=to_do, store=store, runs=runs)
        planned.check()
        for finding in planned.findings:
            if finding.kind in ("no_op", "confound"):
                observer.message(str(finding))
        folder = store.study(name)
        other = changes(store, ablation)
        if other and not (new_version or ablation.is_experiment):
            raise another_version(store, ablation, other)
        if not to_do:
            earlier = with_earlier_findings(planned, folder / PLAN)
            planned = earlier or plan(ablation, log=observer.message, store=store, runs=runs)
        if (folder / SWEEP).exists():
            raise InputError(Problem(f"{name} is the name of a sweep in this store; give the study another", "study"))
        sync = open_sync(store, name, tracking, description(planned, store), tags_of(planned, store))
        trained = [(run.experiment_at(step), step.node.after, step.stage) for run in chosen for step in run.trained]
        trunks = {step.node.fingerprint for run in chosen for step in run.trained if step.node.kind == "trunk"}
        check_free_space(store, trained, max_parallel, trunks)
        store.open()
        study = _StudyRun(planned, store, observer, runs, chosen, only)
        with disk_errors(store) as disk, ExitStack() as stack:
            with _exclusively(folder, observer):
                if other:
                    study.set_aside(other)
                coordinator = stack.enter_context(coordinating(folder))
                study.prepare(rerun)
            disk.started = True
            study.report_others(coordinator)
            follower = cache(lambda: SyncThread(sync, study.records))
            execution = Execution(store, folder, max_parallel, observer, follower, supervision, places, trainer)
            try:
                interrupted = execution.round(study.chosen, _todo(chosen, rerun, observer))
                while ablation.study.more_seeds and not interrupted:
                    with _exclusively(folder, observer):
                        if not study.add_seeds():
                            break
                    interrupted = execution.round(study.chosen, _todo(study.chosen, None, observer))
            finally:
                observer.finished()
            with _exclusively(folder, observer):
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
    def folder(self) -> Path:
        return self.store.study(self.ablation.study.study)

    def set_aside(self, changes: Sequence[Problem]) -> None:
        """Keep the results of other settings as an earlier version. Raises InputError while somebody computes them."""
        name = self.ablation.study.study
        if wait_for_others(self.folder, None):
            status = self.ablation.command("status", self.store)
            message = f"{name} is being run with other settings by another process; `{status}` shows how far it is"
            raise InputError(Problem(message, "study"))
        kept = set_aside(self.store, name)
        self.observer.message(f"What was trained otherwise is kept as {kept}: {'; '.join(map(str, changes))}.")

    def prepare(self, rerun: Rerun | None) -> None:
        """Register the study and its analysis, and prepare its data. Raises InputError."""
        ablation, store, observer = self.ablation, self.store, self.observer
        for problem in damage_of(store, ablation.study.study):
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
        ablation, store, name = self.ablation, self.store, self.ablation.study.study
        keep(store, ablation, _stages(self.runs))
        list_runs(
            store, name, ablation.source, ablation.overrides, [each for run in self.runs for each in _listed(run)]
        )

    def report_others(self, coordinator: str) -> None:
        """Report that other processes run the study too."""
        if names := others(self.folder, coordinator):
            count = "another process runs" if len(names) == 1 else f"{len(names)} other processes run"
            self.observer.message(f"{count} this study too ({some(names)}); each run is computed once.")

    def add_seeds(self) -> bool:
        """Add the seeds that the results so far ask for; returns False where there are none."""
        more = runs_of(self.ablation, self.store)
        if len(more) == len(self.runs):
            return False
        self.observer.finished()
        self.runs, self.chosen = more, _chosen(more, self.only)
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


def _check_trainer(trainer: TrainerParts, ablation: Ablation, places: Places | None) -> None:
    """Raise InputError for additions to Lightning's Trainer that a run's process could not make."""
    several = any(arm.experiment.section(stage).training.execution.ranks > 1
                  for arm in ablation.arms for stage in arm.experiment.trained)  # fmt: skip
    if trainer and (places is not None or several):
        where = "places of an engine" if places is not None else "processes of a run on several devices"
        message = f"parts from Python do not reach the {where}; name them in the section [trainer] of {user_file()}"
        raise InputError(Problem(message, "trainer"))
    (of_settings() + trainer).check()


def _chosen(runs: list[Run], only: str | None) -> list[Run]:
    if only is None:
        return runs
    chosen = [run for run in runs if fnmatch.fnmatch(run.arm.name, only) or fnmatch.fnmatch(run.name, only)]
    if not chosen:
        names = dict.fromkeys(run.arm.name for run in runs)
        raise InputError(Problem(f"no arm matches {only!r}{did_you_mean(only, names)}", "--only"))
    return chosen


def prepare_data(
    experiments: Iterable[Experiment], store: Store, observer: Observer, keep_prepared: bool = False
) -> None:
    """Tokenise the texts that are not tokenised yet, each once. Raises InputError for unreadable texts.

    keep_prepared: use tokenised texts even where their files have changed.
    """
    from lit_llm.data.prepare import is_prepared, open_prepared, prepare, prepare_held_out, tokenizer_folder

    seen: set[tuple[str, int]] = set()
    for experiment in experiments:
        config = experiment.pretrain.data
        identity = identity_of_data(experiment)
        key = (identity.digest, config.sequence_length)
        if key not in seen and not (keep_prepared and is_prepared(store.data, identity.digest)):
            prepare(config, store.data, observer.preparing, identity)
        seen.add(key)
        if texts := experiment.evaluate and experiment.evaluate.likelihood and experiment.evaluate.likelihood.corpora:
            with error_context("evaluate.likelihood.corpora", instead_of="corpora"):
                prepare_held_out(texts, open_prepared(config, store.data, identity.digest), observer.preparing)
        examples = digest_of_examples(experiment)
        if experiment.finetune is not None and (examples, 0) not in seen:
            from lit_llm.data.examples import prepare_examples

            folder = tokenizer_folder(store.data, identity.tokenizer)
            prepare_examples(
                experiment.finetune.data, config.tokenizer, folder, store.data, examples, observer.preparing
            )
            seen.add((examples, 0))


def _todo(runs: list[Run], rerun: Rerun | None, observer: Observer) -> list[Todo]:
    """The stages to execute, each computation once, parents before children.

    Children of a repeated stage are repeated; children of a stage that did not end well are left out. A stage that is
    repeated because a file is damaged gives the same result as before, so its children stay.
    """
    for line in left_out(runs) if rerun != "failed" else ():
        observer.message(line)
    todo: dict[str, Todo] = {}
    repeated: set[str] = set()
    lost: set[str] = set()
    skipped: dict[str, set[str]] = {"failed": set(), "stale": set()}
    trainer = in_force()
    for run in runs:
        for step in run.steps:
            name, parents, state = step.node.fingerprint, {*step.node.parents}, step.status()["state"]
            if name in todo or name in lost:
                continue
            if parents & lost:
                lost.add(name)
                continue
            final = state in FINAL
            damaged = final and rerun == "failed" and has_lost_weights(step.stage)
            if damaged:
                with suppress(Busy):
                    step.stage.forget()
            elif parents & repeated or (final and rerun == "stale" and run.stale_at(step, trainer=trainer)):
                if state != "pending":
                    with suppress(Busy):  # another study has begun to repeat it
                        step.stage.forget()
                repeated.add(name)
            elif final:
                # An evaluation that was added later begins with it.
                if not parents & todo.keys() and run.stale_at(step, trainer=trainer):
                    skipped["stale"].add(run.name)
                if state != "done":
                    lost.add(name)
                continue
            elif state in ("failed", "out_of_memory"):
                if rerun != "failed":
                    skipped["failed"].add(run.name)
                    lost.add(name)
                    continue
                with suppress(Busy):
                    step.stage.retry()
            todo[name] = (run, step)
    if skipped["failed"]:
        message = f"{len(skipped['failed'])} failed run(s) stay as they are; `--rerun failed` tries them again."
        observer.message(message)
    if skipped["stale"]:
        message = f"{len(skipped['stale'])} stale run(s), of another provenance, stay as they are"
        observer.message(f"{message}; `--rerun stale` repeats them.")
    return list(todo.values())


def _listed(run: Run) -> list[dict[str, object]]:
    return [{"arm": run.arm.name, "seed": run.seed, "fingerprint": step.node.fingerprint} for step in run.steps]


def _stages(runs: Iterable[Run]) -> dict[str, dict[int, dict[str, str]]]:
    """{arm: {seed: {stage that trains: its fingerprint}}}, for `keep`."""
    stages: dict[str, dict[int, dict[str, str]]] = {}
    for run in runs:
        stages.setdefault(run.arm.name, {})[run.seed] = {s.node.name: s.node.fingerprint for s in run.trained}
    return stages


def summary(comparison: Comparison) -> dict[str, float | None]:
    """Metrics of the study's own run in MLflow: the mean of each arm."""
    return {f"{row.arm}/{comparison.metric}": row.mean for row in comparison.rows}


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

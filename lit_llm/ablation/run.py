"""Run a study: do what is not done, resume what was interrupted, end with the comparison."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lit_llm.ablation.analysis_plan import FROZEN, LOG
from lit_llm.ablation.arms import Ablation
from lit_llm.ablation.early import check_held_out, check_leaks
from lit_llm.ablation.mirrored import answered, description, record, tags_of
from lit_llm.ablation.palette import looks_of
from lit_llm.ablation.plan import PLAN, Plan, plan, remembered
from lit_llm.ablation.runs import Run, Step, comparison_of, left_out, note_comparison, register_analysis, runs_of
from lit_llm.analysis.comparison import Comparison
from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.data.sources import blamed_at
from lit_llm.experiment.config import Experiment
from lit_llm.experiment.finished import has_lost_weights
from lit_llm.experiment.frozen import freeze, is_frozen
from lit_llm.experiment.identity import digest_of_examples, identity_of_data, read_corpora_again
from lit_llm.experiment.run import run_one
from lit_llm.launch import Interrupted, Outcome, Task, run_tasks, stop_requested
from lit_llm.tracking.address import default_tracking
from lit_llm.tracking.garbage import list_runs
from lit_llm.tracking.mirror_thread import MirrorThread
from lit_llm.tracking.mlflow_mirror import Mirror, MirrorUnavailable
from lit_llm.tracking.store import FINAL, Busy, Stage, Store, locked, write_json, write_text

PRELOAD = (__name__, "lit_llm.experiment.stages")
"""What every stage needs: imported once, by the server that the processes are forked from."""

Rerun = Literal["failed", "stale"]
Report = Callable[[Plan, Sequence[Run], Comparison, Store], Sequence[Path]]
"""Writes what is to be read into the study's folder; returns files and folders, which are logged with the study."""


class Watcher:
    """Looks on and says nothing; a subclass shows what it is told. Called in the coordinator, never in a run."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """A corpus is being tokenised."""

    def message(self, text: str) -> None:
        """Something to know that is no error."""

    def launching(self, runs: Sequence[Run], todo: Sequence[Run], slots: int) -> None:
        """The runs of the study, and those that will be executed now."""

    def tick(self) -> None:
        """Time to look at the store again."""

    def finished(self) -> None:
        """The last run has ended."""


@dataclass(frozen=True)
class Finished:
    """How running a study ended."""

    plan: Plan
    runs: tuple[Run, ...]
    chosen: tuple[Run, ...]
    """Those that were asked for; all, unless `only` chose."""
    comparison: Comparison
    interrupted: bool
    folder: Path
    """Of the study, with its results and its report."""
    mirrored: bool = False
    """Whether MLflow holds everything; where not, the same command catches up."""

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
    watcher: Watcher,
    slots: int,
    only: str | None = None,
    rerun: Rerun | None = None,
    tracking: str | None = None,
    report: Report = lambda *_: (),
) -> Finished:
    """Execute a study's runs, `slots` at once, each in a process of its own.

    only: a pattern for the names of arms; rerun: repeat what failed, or what other code has done; report: called at the
    end, unless the study was interrupted.

    Raises InputError, before anything has started, for an unfair comparison, an unreadable corpus, a store of another
    schema, a tracking address that is none, or a study that is running already.
    """
    name = ablation.study.study
    store.check()
    read_corpora_again()
    runs = runs_of(ablation, store)
    chosen = _chosen(runs, only)
    to_do = any(run.status()["state"] not in FINAL for run in chosen)
    planned = plan(ablation, tell=watcher.message, built=to_do, store=store, runs=runs)
    planned.check()
    for finding in planned.findings:
        if finding.kind in ("no_op", "confound"):
            watcher.message(str(finding))
    folder = store.study(name)
    if not to_do:
        planned = remembered(planned, folder / PLAN)
    if (folder / "sweep.json").exists():
        raise InputError(Problem(f"{name} is the name of a sweep in this store; give the study another", "study"))
    mirror = opened_mirror(store, name, tracking, description(planned), tags_of(planned))
    places, looks = {arm.name: place for place, arm in enumerate(ablation.arms)}, looks_of(ablation)
    store.open()
    try:
        with locked(folder / "lock"):
            try:
                list_runs(store, name, ablation.source, ablation.overrides, [x for run in runs for x in _listed(run)])
                for problem in register_analysis(store, ablation, runs):
                    watcher.message(problem)
                prepare_data([run.experiment_at(step) for run in chosen for step in run.trained], store, watcher)
                check_held_out(ablation, store)
                check_leaks(ablation, store)
                follower = MirrorThread(
                    mirror, lambda: [record(run, places[run.arm.name], looks[run.arm.name].colour) for run in runs]
                )
                interrupted = _execute_round(chosen, rerun, store, slots, watcher, follower)
                while ablation.study.more_seeds and not interrupted:
                    more = runs_of(ablation, store)  # what the results up to now ask for
                    if len(more) == len(runs):
                        break
                    watcher.finished()
                    runs, chosen = more, _chosen(more, only)
                    list_runs(store, name, ablation.source, ablation.overrides, [x for r in runs for x in _listed(r)])
                    interrupted = _execute_round(chosen, None, store, slots, watcher, follower)
            finally:
                watcher.finished()
            comparison = comparison_of(ablation, runs)
            for problem in note_comparison(store, ablation, runs, comparison):
                watcher.message(problem)
            files = _write_results(folder, planned, comparison)
            files += [file for file in (folder / FROZEN, folder / LOG) if file.exists()]
            if not interrupted:
                follower.catch_up()  # for links to its runs
                files += report(planned, runs, comparison, store)
            ending = Finished(planned, tuple(runs), tuple(chosen), comparison, interrupted, folder)
            state = "interrupted" if interrupted else "done" if ending.exit_code == 0 else "failed"
            note = "" if interrupted else answered(planned, folder)
            return replace(ending, mirrored=close(follower, state, files, _summary(comparison), watcher, note))
    except Busy:
        message = f"{name} is being run by another process; `lit-llm status` shows how far it is"
        raise InputError(Problem(message, "study")) from None


def opened_mirror(
    store: Store, name: str, tracking: str | None, description: str, tags: Mapping[str, str] | None = None
) -> Mirror:
    """MLflow's side of a study, at the store's own address unless told otherwise. Raises InputError.

    description: of its parent run; tags: of its experiment.
    """
    try:
        address, lock = tracking or default_tracking(store.root), store.study(name) / "mirror.lock"
        mirror = Mirror(address, study=name, description=description, lock=lock, tags=tags)
        mirror.check()
    except ValueError as error:
        raise InputError(Problem(str(error), "--tracking")) from None
    return mirror


def attached(store: Store, name: str, tracking: str | None, files: Sequence[Path]) -> str:
    """Log files with a study that MLflow knows already; what has kept it from that, or ''. Raises InputError."""
    mirror = opened_mirror(store, name, tracking, "")
    try:
        mirror.attach(files)
    except MirrorUnavailable as problem:
        return f"{problem}. The files are in the store; the same command logs them."
    return ""


Work = tuple[Run, Step]
"""A stage to be computed, with the first of the runs that need it."""


def _execute_round(
    chosen: list[Run], rerun: Rerun | None, store: Store, slots: int, watcher: Watcher, follower: MirrorThread
) -> bool:
    """Run what these runs need; returns whether it was interrupted."""
    for line in left_out(chosen) if rerun != "failed" else ():
        watcher.message(line)
    todo = _todo(chosen, rerun, watcher)
    for run, step in todo:
        freeze(store, step.link, run.experiment)
    for run in chosen:
        for step in run.steps:
            if step.stage.result() is not None and not is_frozen(step.stage):
                freeze(store, step.link, run.experiment)
                watcher.message(f"{step.stage.config_file} was damaged or missing; it is written again")
    watcher.launching(chosen, list({run.name: run for run, _ in todo}.values()), slots)
    return _execute(todo, store, slots, watcher, follower)


def _execute(todo: Sequence[Work], store: Store, slots: int, watcher: Watcher, follower: MirrorThread) -> bool:
    """Run them all; returns whether it was interrupted."""
    if not todo:
        return False
    running: set[str] = set()

    def tick() -> None:
        watcher.tick()
        tell_news(follower, watcher)

    def finish(outcome: Outcome) -> None:
        running.discard(outcome.task.arguments[1])
        _note_death(outcome)

    try:
        run_tasks(
            _tasks(todo, store, running),
            slots=slots,
            preload=PRELOAD,
            on_finish=finish,
            on_tick=tick,
            grace_seconds=30.0,
        )
    except Interrupted:
        return True
    return False


def _tasks(todo: Sequence[Work], store: Store, running: set[str]) -> Iterator[Task | None]:
    """Each stage when the one it begins with is done; never where that has ended otherwise."""
    waiting = list(todo)

    def begins_with(work: Work) -> set[str]:
        """What has yet to be done before it."""
        return {name for name in work[1].link.parents if store.stage(name).status()["state"] != "done"}

    while waiting:
        for work in waiting:
            run, step = work
            if begins_with(work):
                continue
            waiting.remove(work)
            running.add(step.link.fingerprint)
            yield _task(run, step, store)
            break
        else:
            coming = running | {step.link.fingerprint for _, step in waiting}
            waiting = [work for work in waiting if begins_with(work) <= coming]
            if waiting:
                yield None


def close(
    follower: MirrorThread,
    state: str,
    files: Iterable[Path],
    metrics: Mapping[str, float | None],
    watcher: Watcher,
    note: str = "",
) -> bool:
    """Bring MLflow up to date, and say so where that cannot be done."""
    mirrored = follower.close(state, files, metrics, note)
    tell_news(follower, watcher)
    return mirrored


def tell_news(follower: MirrorThread, watcher: Watcher) -> None:
    """Pass on what keeps MLflow from being up to date, once."""
    if news := follower.take_news():
        watcher.message(news)


def _chosen(runs: list[Run], only: str | None) -> list[Run]:
    if only is None:
        return runs
    chosen = [run for run in runs if fnmatch.fnmatch(run.arm.name, only) or fnmatch.fnmatch(run.name, only)]
    if not chosen:
        names = dict.fromkeys(run.arm.name for run in runs)
        raise InputError(Problem(f"no arm matches {only!r}{did_you_mean(only, names)}", "--only"))
    return chosen


def prepare_data(experiments: Iterable[Experiment], store: Store, watcher: Watcher) -> None:
    """Tokenise what is not there yet, each text once. Raises InputError where it cannot be read."""
    from lit_llm.data.prepare import open_prepared, prepare, prepare_held_out, tokenizer_folder

    seen: set[tuple[str, int]] = set()
    for experiment in experiments:
        config = experiment.pretrain.data
        identity = identity_of_data(experiment)
        key = (identity.digest, config.sequence_length)
        if key not in seen:
            prepare(config, store.data, watcher.preparing, identity)
            seen.add(key)
        if texts := experiment.evaluate and experiment.evaluate.likelihood and experiment.evaluate.likelihood.corpora:
            with blamed_at("evaluate.likelihood.corpora", instead_of="corpora"):
                prepare_held_out(texts, open_prepared(config, store.data, identity.digest), watcher.preparing)
        examples = digest_of_examples(experiment)
        if experiment.finetune is not None and (examples, 0) not in seen:
            from lit_llm.data.examples import prepare_examples

            folder = tokenizer_folder(store.data, identity.tokenizer)
            prepare_examples(
                experiment.finetune.data, config.tokenizer, folder, store.data, examples, watcher.preparing
            )
            seen.add((examples, 0))


def _todo(runs: list[Run], rerun: Rerun | None, watcher: Watcher) -> list[Work]:
    """The stages to execute, each computation once, parents before children.

    What begins with a stage that is repeated is repeated, what begins with one that did not end well is left. A stage
    that is computed again because a file of it is damaged gives what it gave before: what begins with it stays.
    """
    todo: dict[str, Work] = {}
    repeated: set[str] = set()
    lost: set[str] = set()
    skipped: dict[str, set[str]] = {"failed": set(), "stale": set()}
    for run in runs:
        for step in run.steps:
            name, parents, state = step.link.fingerprint, {*step.link.parents}, step.status()["state"]
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
            elif parents & repeated or (final and rerun == "stale" and run.stale_at(step)):
                if state != "pending":
                    with suppress(Busy):  # another study has begun to repeat it
                        step.stage.forget()
                repeated.add(name)
            elif final:
                # What is left to do after it, an evaluation that was added, begins with it.
                if not parents & todo.keys() and run.stale_at(step):
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
        watcher.message(message)
    if skipped["stale"]:
        watcher.message(
            f"{len(skipped['stale'])} run(s) done with other code, device, threads or weights stay as they are; "
            "`--rerun stale` repeats them."
        )
    return list(todo.values())


def _task(run: Run, step: Step, store: Store) -> Task:
    execution = run.experiment_at(step).section(step.link.after).training.execution
    name = run.name if len(run.steps) == 1 else f"{run.name}: {step.link.name}"
    arguments = (store.root, step.link.fingerprint)
    return Task(name, execute, arguments, log=step.stage.log_file, threads=execution.threads)


def execute(root: Path, fingerprint: str) -> str:
    """What a run's process does."""
    return run_one(root, fingerprint, should_stop=stop_requested)


def _note_death(outcome: Outcome) -> None:
    root, fingerprint = outcome.task.arguments
    if outcome.status in ("killed", "raised"):
        note_death(Store(root).stage(fingerprint), outcome)


def note_death(stage: Stage, outcome: Outcome) -> None:
    """Of a process that could not write its own state: killed from outside, or dead before it began."""
    with suppress(Busy), stage.claim():  # else it was waiting for another study, which goes on with the stage
        if stage.result() is None:
            # A kill can be answered by going on from the last checkpoint; an error would only come again.
            state: Literal["interrupted", "failed"] = "interrupted" if outcome.status == "killed" else "failed"
            stage.set_state(state, outcome.error, outcome.traceback)


def _listed(run: Run) -> list[dict[str, object]]:
    return [{"arm": run.arm.name, "seed": run.seed, "fingerprint": step.link.fingerprint} for step in run.steps]


def _summary(comparison: Comparison) -> dict[str, float | None]:
    return {f"{row.arm}/{comparison.metric}": row.mean for row in comparison.rows}


def _write_results(folder: Path, planned: Plan, comparison: Comparison) -> list[Path]:
    """For programs; `report` writes what people read."""
    write_json(folder / PLAN, planned.as_json())
    write_text(folder / "comparison.csv", comparison.csv())
    write_json(folder / "comparison.json", comparison.as_json())
    return [folder / name for name in ("comparison.csv", "comparison.json", PLAN)]

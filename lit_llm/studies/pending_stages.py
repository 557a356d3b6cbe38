"""Runs that a command selects, and their stages that are still to be executed."""

from __future__ import annotations

import fnmatch
from contextlib import suppress
from typing import Literal

from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.runs.trained_model import has_lost_weights
from lit_llm.runs.trainer_parts import in_force
from lit_llm.store.locks import Busy
from lit_llm.store.store import FINAL
from lit_llm.studies.execute import Todo
from lit_llm.studies.observer import Observer
from lit_llm.studies.runs import Run
from lit_llm.studies.status import left_out

Rerun = Literal["failed", "stale"]


def selected_runs(runs: list[Run], only: str | None) -> list[Run]:
    """The runs whose arm's name or own name matches a pattern; all without one. Raises InputError where none does."""
    if only is None:
        return runs
    chosen = [run for run in runs if fnmatch.fnmatch(run.arm.name, only) or fnmatch.fnmatch(run.name, only)]
    if not chosen:
        names = dict.fromkeys(run.arm.name for run in runs)
        raise InputError(Problem(f"no arm matches {only!r}{did_you_mean(only, names)}", "--only"))
    return chosen


def pending_stages(runs: list[Run], rerun: Rerun | None, observer: Observer) -> list[Todo]:
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

"""What evaluations will need, looked for before anything is trained: hours later it would be too late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lit_llm.ablation.arms import Ablation, Arm
from lit_llm.config.problems import InputError, Problem, noted
from lit_llm.config.tree import split_path
from lit_llm.evaluation.task_names import check_names
from lit_llm.experiment.identity import identity_of_data
from lit_llm.tracking.store import Store


def check_tasks(ablation: Ablation, tell: Callable[[str], None] = lambda _: None) -> None:
    """Raise InputError for tasks that do not exist, and where the harness is not installed.

    tell: told what is done where it takes some seconds.
    """
    problems: list[Problem] = []
    for arm in ablation.arms:
        if (evaluate := arm.experiment.evaluate) is not None and evaluate.tasks is not None:
            with noted(problems), _written(arm, "evaluate.tasks"):
                check_names(evaluate.tasks, tell)
    if problems:
        raise InputError(*problems)


def check_held_out(ablation: Ablation, store: Store) -> None:
    """Raise InputError for evaluations that ask for longer texts than are held out. Of a text that is not tokenised yet
    nothing is known, and nothing is said."""
    from lit_llm.data.prepare import is_prepared, open_prepared

    problems: list[Problem] = []
    for arm in ablation.arms:
        data, evaluate = arm.experiment.pretrain.data, arm.experiment.evaluate
        if evaluate is None or not is_prepared(store.data, digest := identity_of_data(arm.experiment).digest):
            continue
        held_out = {
            source.name: source.count("validation") for source in open_prepared(data, store.data, digest).sources
        }
        with noted(problems), _written(arm, "evaluate"):
            if found := evaluate.too_short(data.sequence_length, held_out):
                raise InputError(*(Problem(message, key) for key, message in found))
    if problems:
        raise InputError(*problems)


@contextmanager
def _written(arm: Arm, section: str) -> Iterator[None]:
    """What is wrong with a section is told at its keys, with the file and line where they were written."""
    try:
        yield
    except InputError as error:
        keys = [f"{section}.{problem.key}" for problem in error.problems]
        marks = [arm.keys.mark_of(split_path(key)) for key in keys]
        found = zip(error.problems, keys, marks, strict=True)
        raise InputError(*(Problem(problem.message, key, mark) for problem, key, mark in found)) from None

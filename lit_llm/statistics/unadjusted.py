"""Estimates of a study in rounds that no level of its looks is for: effects, levels, F tests, changes by finetuning.

The number of seeds depends on the results there, and the 5% are spent on the arms' differences alone. A test at 5% of
anything else would be one look of several at the whole level, so the estimates are kept and the tests are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from lit_llm.statistics.anova import Anova
from lit_llm.statistics.effects import Effects
from lit_llm.statistics.verdicts import P_VALUES

UNTESTED = (
    "not adjusted for the looks after each round of seeds: estimates and intervals as of a fixed number of seeds, "
    "without p-values and verdicts"
)
UNTESTED_CHANGES = f"changes by finetuning are {UNTESTED}"

Tested = TypeVar("Tested", bound=Any)


def untested_effects(every: Sequence[Effects]) -> tuple[Effects, ...]:
    """The same estimates and intervals without p-values and verdicts, and with a note on why."""
    return tuple(replace(group, rows=tuple(map(_untested, group.rows)), notes=_notes(group.notes)) for group in every)


def untested_anova(every: Sequence[Anova]) -> tuple[Anova, ...]:
    """The same tables without p-values and verdicts, and with a note on why."""
    return tuple(
        replace(
            one,
            terms=tuple(map(_untested, one.terms)),
            levels=tuple(map(_untested, one.levels)),
            notes=_notes(one.notes),
        )
        for one in every
    )


def _untested(row: Tested) -> Tested:
    says = {"p", "verdict", "detectable"} & {field.name for field in fields(row)}
    untested: Tested = replace(row, **dict.fromkeys(says))
    return untested


def _notes(notes: Sequence[str]) -> tuple[str, ...]:
    """Without what is said of p-values that are not given."""
    begin = tuple({told.partition(" {n}")[0] for told in P_VALUES.values()})
    return (*(note for note in notes if not note.startswith(begin)), UNTESTED)

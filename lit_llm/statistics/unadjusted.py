"""Unadjusted estimates of a study in rounds: effects, levels, F tests, changes by finetuning.

The number of seeds depends on the results, and the 5% are spent on the arms' differences alone. Any other test at 5%
would be one of several interim analyses at the full level. So the estimates are kept and their tests are removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from lit_llm.statistics.anova import Anova
from lit_llm.statistics.effects import Effects
from lit_llm.statistics.verdicts import P_VALUES

UNTESTED = (
    "not adjusted for the interim analyses after each round of seeds: estimates and intervals as of a fixed number "
    "of seeds, without p-values and verdicts"
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
    test_fields = {"p", "verdict", "detectable"} & {field.name for field in fields(row)}
    untested: Tested = replace(row, **dict.fromkeys(test_fields))
    return untested


def _notes(notes: Sequence[str]) -> tuple[str, ...]:
    """The notes without those on p-values, and with the reason."""
    on_p_values = tuple({note.partition(" {n}")[0] for note in P_VALUES.values()})
    return (*(note for note in notes if not note.startswith(on_p_values)), UNTESTED)

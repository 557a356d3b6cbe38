"""Comparison of two studies with arms in common: do their differences agree?

The second may have another size, length, corpus or budget, so the comparison shows how far a result generalises. For
each common arm: its mean in both studies, its difference from its baseline in both, and the change of that difference,
paired over the seeds that both ran (a difference in differences, as for finetuning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lit_llm.statistics.baselines import Noise
from lit_llm.statistics.before_after import BeforeAfter, before_after
from lit_llm.statistics.comparison import Comparison
from lit_llm.statistics.paired import Difference, Values
from lit_llm.statistics.verdicts import DIFFERENT, LEVEL


@dataclass(frozen=True)
class Agreement:
    """Verdicts of two studies on one arm against its common baseline."""

    arm: str
    verdicts: tuple[str | None, str | None]
    says: str
    """`the same`, `the opposite`, `neither`, `one is missing`. Where only one study shows a difference: `only <study>`
    if the change between the studies is significant, otherwise `compatible`."""


@dataclass(frozen=True)
class TwoStudies:
    """Comparison of two studies: which of their differences agree, and which changed."""

    names: tuple[str, str]
    questions: tuple[str, str]
    metric: str
    arms: BeforeAfter
    """`before` is the first study, `after` the second."""
    agreements: tuple[Agreement, ...]
    differs: Mapping[str, Mapping[str, Sequence[Any]]]
    """{arm: {key: [value in the first, in the second]}}: differences between the experiments."""
    alone: tuple[tuple[str, ...], tuple[str, ...]]
    """Arms of the first study alone, and of the second alone."""
    baselines: tuple[str, ...]
    """Arms whose baselines in the two studies differ; only their means are shown."""
    references: tuple[str, ...] = ()
    """Arms that are baselines in both studies."""

    def as_json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        return asdict(self)


def two_studies(
    names: tuple[str, str],
    questions: tuple[str, str],
    comparisons: tuple[Comparison, Comparison],
    values: tuple[Mapping[str, Values], Mapping[str, Values]],
    differs: Mapping[str, Mapping[str, Sequence[Any]]],
    noise: tuple[Noise, Noise] = (Noise(), Noise()),
    same_documents: bool = False,
) -> TwoStudies:
    """Compare two studies on one metric.

    values: {arm: {seed: value}} of each study; differs: {arm: differences between its experiments}; noise: of each
    study; same_documents: whether both studies judge their arms on the same documents.
    """
    first, second = ({row.arm: row for row in comparison.rows} for comparison in comparisons)
    common = [arm for arm in first if arm in second]
    moved = tuple(arm for arm in common if first[arm].baseline != second[arm].baseline)
    # An arm whose baseline the other study lacks becomes its own baseline: it is shown and not compared.
    baselines = {
        arm: first[arm].baseline if arm not in moved and first[arm].baseline in common else arm for arm in common
    }
    before, after = ({arm: each.get(arm, {}) for arm in common} for each in values)
    arms = before_after(comparisons[0].metric, before, after, baselines, noise, same_documents)
    changes = {row.arm: row.change for row in arms.rows}
    agreements = tuple(
        Agreement(arm, verdicts, _agreement(names, *verdicts, changes[arm]))
        for arm in common
        if baselines[arm] != arm
        for verdicts in [(first[arm].verdict, second[arm].verdict)]
    )
    return TwoStudies(
        names,
        questions,
        comparisons[0].metric,
        arms,
        agreements,
        {arm: differs[arm] for arm in common if differs.get(arm)},
        (tuple(arm for arm in first if arm not in second), tuple(arm for arm in second if arm not in first)),
        moved,
        tuple(arm for arm in common if arm == first[arm].baseline == second[arm].baseline),
    )


def _agreement(names: tuple[str, str], one: str | None, other: str | None, change: Difference | None) -> str:
    if one is None or other is None:
        return "one is missing"
    if one in DIFFERENT and other in DIFFERENT:
        return "the same" if one == other else "the opposite"
    if one in DIFFERENT or other in DIFFERENT:
        # A significant and a non-significant difference may be equal: only the test of their change decides.
        if change is None or change.error is None or change.p() >= LEVEL:
            return "compatible"
        return f"only {names[0] if one in DIFFERENT else names[1]}"
    return "neither"

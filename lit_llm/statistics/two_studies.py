"""Two studies with arms in common: do they say the same?

The second may be of another size, length, corpus or budget: then this is how far a finding carries. For each arm that
both have, its mean in both, its difference from its baseline in both, and how much that has changed, paired over the
seeds that both ran: a difference of differences, as of finetuning.
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
    """What two studies say of one arm against the baseline that it has in both."""

    arm: str
    verdicts: tuple[str | None, str | None]
    says: str
    """`the same`, `the opposite`, `only <study>` where one alone shows a difference and the change between the studies
    is shown too, `compatible` where it is not, `neither`, `one is missing`."""


@dataclass(frozen=True)
class TwoStudies:
    """Both, side by side."""

    names: tuple[str, str]
    questions: tuple[str, str]
    metric: str
    arms: BeforeAfter
    """The first study stands for before, the second for after."""
    agreements: tuple[Agreement, ...]
    differs: Mapping[str, Mapping[str, Sequence[Any]]]
    """{arm: {key: [in the first, in the second]}} of the experiments."""
    alone: tuple[tuple[str, ...], tuple[str, ...]]
    """Arms that only the one and only the other has."""
    baselines: tuple[str, ...]
    """Arms that are compared with another arm in the second study than in the first; only their means are shown."""
    references: tuple[str, ...] = ()
    """Arms that are baselines of both."""

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
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
    """values: {arm: {seed: value}} of each study's metric, which is the same; differs: for each common arm.

    noise: of each study; same_documents: whether both judge their arms on the same ones.
    """
    first, second = ({row.arm: row for row in comparison.rows} for comparison in comparisons)
    common = [arm for arm in first if arm in second]
    moved = tuple(arm for arm in common if first[arm].baseline != second[arm].baseline)
    # One whose baseline the other study does not have is its own: it is shown, and compared with nothing.
    baselines = {
        arm: first[arm].baseline if arm not in moved and first[arm].baseline in common else arm for arm in common
    }
    before, after = ({arm: each.get(arm, {}) for arm in common} for each in values)
    arms = before_after(comparisons[0].metric, before, after, baselines, noise, same_documents)
    changes = {row.arm: row.change for row in arms.rows}
    agreements = tuple(
        Agreement(arm, verdicts, _says(names, *verdicts, changes[arm]))
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


def _says(names: tuple[str, str], one: str | None, other: str | None, change: Difference | None) -> str:
    if one is None or other is None:
        return "one is missing"
    if one in DIFFERENT and other in DIFFERENT:
        return "the same" if one == other else "the opposite"
    if one in DIFFERENT or other in DIFFERENT:
        # A difference that is shown and one that is not may be the same: only a test of their change tells.
        if change is None or change.error is None or change.p() >= LEVEL:
            return "compatible"
        return f"only {names[0] if one in DIFFERENT else names[1]}"
    return "neither"

"""Before against after finetuning: does the order of the arms change?

For each arm: the metric of the same evaluation after pretraining and after finetuning, its difference from the baseline
at both times, and the change of that difference, all paired over seeds. The change is a difference in differences, in
which the effect of the seed and the effect of finetuning on every arm cancel.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lit_llm.statistics.baselines import Noise, differences_from_baselines
from lit_llm.statistics.contrasts import Sample, contrast, estimates
from lit_llm.statistics.document_noise import Influences, combined, document_spread
from lit_llm.statistics.paired import Difference, Values


@dataclass(frozen=True)
class Change:
    """One arm before and after finetuning."""

    arm: str
    baseline: str
    before: float | None
    """Mean over seeds after pretraining."""
    after: float | None
    """Mean over seeds after finetuning."""
    difference_before: Difference | None
    difference_after: Difference | None
    """Both from the baseline; None for a baseline."""
    change: Difference | None
    """Change of the difference by finetuning."""


@dataclass(frozen=True)
class BeforeAfter:
    """All arms before and after finetuning."""

    metric: str
    """Name without the stage's prefix."""
    rows: tuple[Change, ...]
    rank_correlation: float | None
    """Spearman's correlation, over the arms, of the means before and after; None for fewer than three arms with both,
    or where all are equal."""


def before_after(
    metric: str,
    before: Mapping[str, Values],
    after: Mapping[str, Values],
    baselines: Mapping[str, str],
    noise: tuple[Noise, Noise] = (Noise(), Noise()),
    same_documents: bool = True,
) -> BeforeAfter:
    """Compare the arms before and after finetuning, and their changes.

    before, after: {arm: {seed: value}}; baselines: {arm: the arm it is compared with}; noise: of both times;
    same_documents: whether both times are judged on the same documents, so that their choice cancels in the change.
    """
    at = (before, after)
    differences = [differences_from_baselines(values, baselines, each) for values, each in zip(at, noise, strict=True)]
    changes = _changes(at, baselines, noise, same_documents)
    rows = tuple(
        Change(
            arm,
            baselines[arm],
            _mean(before[arm]),
            _mean(after[arm]),
            *(by_arm.get(arm) for by_arm in (*differences, changes)),
        )
        for arm in before
    )
    return BeforeAfter(metric, rows, _rank_correlation(rows))


def _changes(
    at: tuple[Mapping[str, Values], Mapping[str, Values]],
    baselines: Mapping[str, str],
    noise: tuple[Noise, Noise],
    same_documents: bool,
) -> dict[str, Difference | None]:
    """Change of every arm's difference from its baseline: a contrast of four means."""
    times = ("before", "after")
    values = {f"{time}/{arm}": by_seed for time, arms in zip(times, at, strict=True) for arm, by_seed in arms.items()}
    influences: Influences = {}
    if same_documents:
        influences = {
            (f"{time}/{arm}", seed): value
            for time, each in zip(times, noise, strict=True)
            for (arm, seed), value in each.influences.items()
        }

    def changed(arm: str, baseline: str) -> Sample:
        weights = {f"after/{arm}": 1.0, f"after/{baseline}": -1.0, f"before/{arm}": -1.0, f"before/{baseline}": 1.0}
        sample = contrast(weights, values, influences)
        if same_documents and sample.documents is not None:
            return sample
        # The documents differ, or differ in part (windows of another length): the sum of the variances is conservative.
        return replace(sample, **_independent(arm, baseline, sample, noise))

    changes: dict[str, Difference | None] = {}
    for baseline in dict.fromkeys(baselines.values()):
        samples = {arm: changed(arm, baseline) for arm in at[0] if baselines[arm] == baseline and arm != baseline}
        changes |= estimates(samples, "paired" if noise[1].variance == "paired" else "moderated")
    return changes


def _independent(arm: str, baseline: str, sample: Sample, noise: tuple[Noise, Noise]) -> dict[str, Any]:
    """Spread over documents of a change between two sets of documents: the sum of their variances."""
    spreads = [document_spread({arm: 1.0, baseline: -1.0}, [*sample.values], each.influences) for each in noise]
    recorded = [spread for spread in spreads if spread is not None] if sample.values else []
    if len(recorded) < 2:
        return {}
    return {"documents": combined(*(spread for spread, _ in recorded)), "document_count": sum(n for _, n in recorded)}


def _mean(values: Values) -> float | None:
    return statistics.fmean(values.values()) if values else None


def _rank_correlation(rows: tuple[Change, ...]) -> float | None:
    from scipy.stats import spearmanr

    pairs = [(row.before, row.after) for row in rows if row.before is not None and row.after is not None]
    before, after = ([pair[side] for pair in pairs] for side in (0, 1))
    if len(pairs) < 3 or len(set(before)) < 2 or len(set(after)) < 2:
        return None
    return float(spearmanr(before, after).statistic)

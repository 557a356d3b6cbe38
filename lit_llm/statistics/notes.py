"""Notes under a comparison: meaning and assumptions of its intervals, and their adjustment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lit_llm.statistics.estimates import joined
from lit_llm.statistics.paired import Difference
from lit_llm.statistics.procedure import ASSUMPTIONS, CORRECTIONS, Procedure
from lit_llm.statistics.verdicts import Judgement


def comparison_notes(
    judged: Mapping[str, Judgement],
    differences: Mapping[str, Difference | None],
    procedure: Procedure,
    adjusted: bool = False,
) -> Iterator[str]:
    """Notes on the differences from the baselines.

    adjusted: whether the levels of the interim analyses are already adjusted for the number of comparisons.
    """
    tested = [judgement for judgement in judged.values() if judgement.detectable is not None]
    if any(d is not None and d.low is None for d in differences.values()):
        yield "one seed has no interval; add seeds to see how sure a difference is"
    if not tested:
        return
    yield ASSUMPTIONS[procedure.variance]
    if procedure.variance in ("pooled", "mixed"):
        yield from _unpooled_notes(judged, procedure)
    yield from _documents_notes({arm: each.difference for arm, each in judged.items() if each.detectable is not None})
    if len(tested) > 1 and not adjusted:
        yield CORRECTIONS[procedure.correction].format(n=len(tested))
    yield _power_note(tested)


NAMED = 6
"""Largest number of arms that a note names."""


def _unpooled_notes(judged: Mapping[str, Judgement], procedure: Procedure) -> Iterator[str]:
    """A note on arms with too few runs for the variance of the procedure."""
    unpooled = [arm for arm, each in judged.items() if each.detectable is not None and not each.difference.pooled]
    if unpooled:
        kind = "the variance of all arms" if procedure.variance == "pooled" else "the mixed model"
        yield f"the runs are too few to estimate {kind} for {joined(unpooled, NAMED)}: own differences alone"


def _documents_notes(differences: Mapping[str, Difference]) -> Iterator[str]:
    counts = sorted({d.documents for d in differences.values() if d.documents})
    without = [arm for arm, d in differences.items() if not d.documents]
    why = (
        "the losses of single documents are not recorded, or not of the baseline's documents, or one outweighs the rest"
    )
    if not counts:
        yield f"each interval is of other seeds on the same documents: {why}"
        return
    if without:
        yield f"of other seeds on the same documents alone: {joined(without, NAMED)}; {why}"
    span = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    yield (
        f"[95%]: of other seeds and other documents, of which there are {span}; ± seeds: half of the 95% interval of "
        "other seeds on the same documents"
    )


def _power_note(tested: list[Judgement]) -> str:
    sizes = sorted({f"{judgement.detectable:.2g}" for judgement in tested}, key=float)
    seeds = sorted({judgement.difference.seeds for judgement in tested})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    span = sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}, by arm,"
    return f"with {count} seeds a true difference of {span} is detected with 80% power"

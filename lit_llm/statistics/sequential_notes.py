"""Notes under the tables of a study that adds seeds in rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lit_llm.statistics.sequential import ArmStatus, Rounds


def rounds_notes(
    statuses: Mapping[str, ArmStatus], rounds: Rounds, comparisons: int, adjusted: Mapping[str, float]
) -> Iterator[str]:
    """Notes on the levels of the interim analyses, the arms that stopped early, and the bias of stopping."""
    share = "5% for all interim analyses together"
    if comparisons > 1:
        share = (
            f"5% for all interim analyses of all {comparisons} arms together, an equal share for each arm (Bonferroni)"
        )
    yield (
        "intervals and p: adjusted for the interim analyses after each round of seeds, up to "
        f"{rounds.most} seeds: {share}"
    )
    yield from _past_notes(rounds)
    if stopped := {arm: s.seeds for arm, s in statuses.items() if s.decided and s.seeds < rounds.most}:
        named = ", ".join(f"{arm} ({seeds})" for arm, seeds in stopped.items())
        yield (
            f"decided before the most seeds: {named}; a difference is of the seeds that decided it, by the validation "
            "split where the metric has one"
        )
    if adjusted:
        pairs = ", ".join(
            f"{arm} {_mean_difference(statuses[arm]):+.3f} → {value:+.3f}" for arm, value in adjusted.items()
        )
        yield (
            "stopping early makes differences too large on average; without that bias (Emerson-Fleming), in the "
            f"metric that seeds are added by: {pairs}"
        )


def _past_notes(rounds: Rounds) -> Iterator[str]:
    """A note on the level that was spent before the number of seeds was changed."""
    past, sizes, shares = rounds.past_sizes, rounds.sizes, rounds.shares
    spent = shares[sizes.index(past[-1])] if past else rounds.lost
    if not spent:
        return
    at = f" at {', '.join(map(str, past))} seeds" if past else ""
    kept = f"the number of seeds was changed after interim analyses{at}: they keep their levels"
    if spent >= 1:
        yield (
            f"{kept}, and all of the 5% is spent: no further interim analysis of this study can decide an arm, "
            "and an interval is that of the last one that could; new seeds in a study of another name can"
        )
    else:
        left = f"the {1 - spent:.0%} of the 5% that is left"
        yield f"{kept}, and {left} is spent over the interim analyses that remain"


def _mean_difference(status: ArmStatus) -> float:
    assert status.judgement is not None
    return status.judgement.difference.mean

"""Interim analyses of a study that adds seeds in rounds, including those before its number of seeds changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_llm.statistics.alpha_spending import PastInterims, Rounds
from lit_llm.statistics.interims import InterimAnalyses, interim_statuses
from lit_llm.statistics.procedure import Procedure
from lit_llm.statistics.run_results import RunResult, of_newest_provenance
from lit_llm.studies.analysis_plan import Registration, earlier_plans, seeds_analysed_fixed
from lit_llm.studies.load import Ablation

ResultsOf = Callable[[Sequence[int]], Sequence[RunResult]]
"""Reads the results of every arm with the given seeds from the store."""


def interims_of(ablation: Ablation, registration: Registration | None, results_of: ResultsOf) -> InterimAnalyses | None:
    """The interim analyses of a study; None where its number of seeds is fixed.

    A change of `seeds` or `more_seeds` counts even before it is logged: all looks up to now are past.
    """
    study = ablation.study
    if study.more_seeds is None:
        return None
    seen = [*earlier_plans(registration)]
    if registration is not None and _differs(registration.current, ablation):
        seen.append((registration.current, seeds_analysed_in_force(ablation, registration, results_of)))
    past, lost = _past(seen, study.all_seeds)
    rounds = Rounds(len(study.seeds), study.more_seeds.max, study.more_seeds.step, past, lost)
    return InterimAnalyses(study.all_seeds, rounds, comparisons_of(ablation, study.compare.correction != "none"))


def comparisons_of(ablation: Ablation, corrected: bool) -> int:
    """Number of arms that share the 5% of a study; 1 without a correction."""
    if not corrected:
        return 1
    return max(1, len({arm.name for arm in ablation.arms if arm.name != arm.baseline}))


def procedure_of(ablation: Ablation, plan: Mapping[str, Any] = {}) -> Procedure:
    """The procedure that judges differences, by the frozen analysis `plan` where one is given."""
    compare = ablation.study.compare
    families = {arm.name: arm.experiment.model.family for arm in ablation.arms}
    return Procedure(
        plan.get("variance", compare.variance),
        plan.get("correction", compare.correction),
        plan.get("margin", compare.margin),
        families,
    )


def seeds_analysed_in_force(ablation: Ablation, registration: Registration | None, results_of: ResultsOf) -> int:
    """Number of seeds at the last look under the logged analysis, if the study file differs from it; else 0."""
    if registration is None or not registration.plan or not _differs(registration.current, ablation):
        return 0
    plan = registration.current
    rounds = _rounds(plan, *_past([*earlier_plans(registration)], all_seeds(plan)))
    if rounds is None:
        return seeds_analysed_fixed(registration)
    # With the metric and procedure of that analysis: another margin may decide an arm earlier or later.
    procedure = procedure_of(ablation, plan)
    interims = InterimAnalyses(all_seeds(plan), rounds, comparisons_of(ablation, procedure.correction != "none"))
    kept = of_newest_provenance(results_of(interims.seeds), [])
    metric = plan.get("metric", ablation.study.compare.metric)
    statuses = interim_statuses(kept, ablation.baselines, metric, interims, procedure)
    return max((status.seeds for status in statuses.values()), default=0)


def all_seeds(plan: Mapping[str, Any]) -> tuple[int, ...]:
    """All seeds that a frozen analysis may use, in the order in which they are added."""
    seeds, more = plan["seeds"], plan["more_seeds"]
    further = max(0, more["max"] - len(seeds)) if more else 0
    return (*seeds, *range(max(seeds) + 1, max(seeds) + 1 + further))


def _differs(plan: Mapping[str, Any], ablation: Ablation) -> bool:
    study = ablation.study
    more = study.more_seeds.model_dump(mode="json") if study.more_seeds else None
    return bool(plan) and (plan["seeds"] != list(study.seeds) or plan["more_seeds"] != more)


def _rounds(plan: Mapping[str, Any], past: tuple[PastInterims, ...], lost: float) -> Rounds | None:
    more = plan["more_seeds"]
    return Rounds(len(plan["seeds"]), more["max"], more["step"], past, lost) if more else None


def _past(
    seen: Sequence[tuple[Mapping[str, Any], int]], seeds: Sequence[int]
) -> tuple[tuple[PastInterims, ...], float]:
    """Looks under earlier analyses, and the share of the level spent on seeds that are no longer used."""
    past, lost = tuple[PastInterims, ...](), 0.0
    for plan, analysed in seen:
        if not analysed:
            continue
        rounds = _rounds(plan, past, lost)
        before = past[-1].sizes[-1] if past else 0
        if rounds is None:  # one look at all seeds, at the whole level
            now = PastInterims((analysed,), analysed) if analysed > before else None
        else:
            sizes = tuple(size for size in rounds.sizes if before < size <= analysed)
            now = PastInterims(sizes, rounds.most) if sizes else None
        if now is None:
            continue
        past = (*past, now)
        if list(all_seeds(plan)[:analysed]) != list(seeds[:analysed]):
            spent = Rounds(2, max(now.most, analysed), 1, past, lost)
            past, lost = (), max(spent.shares[spent.sizes.index(size)] for size in spent.past_sizes)
    return past, lost

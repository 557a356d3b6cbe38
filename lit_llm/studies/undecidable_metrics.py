"""Findings of a plan on metrics that cannot decide, as far as earlier runs of this size show.

The earlier runs are those that `plan --power` takes the scatter from. They show how far arms of this size lie from
their baselines, too. Where the planned seeds detect only larger differences, the plan says so. Each arm is judged by
the runs that are nearest to it, so a study of several sizes has a finding for the arms of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from lit_llm.config.metrics import EVALUATED, FINETUNED, direction
from lit_llm.config.problems import some
from lit_llm.evaluation.suites import SUITES
from lit_llm.statistics.power import pooled
from lit_llm.store.store import Store
from lit_llm.studies.audit.findings import Finding
from lit_llm.studies.audit.tuning import ALL
from lit_llm.studies.earlier_arms import FEWEST_DEGREES, EarlierArm, earlier_arms, nearest_arms
from lit_llm.studies.plan import Plan, PlannedArm

TASKS = f"{EVALUATED}tasks/"


@dataclass(frozen=True)
class _Undecidable:
    """A metric whose differences between arms are smaller than the planned seeds detect."""

    metric: str
    study: str
    arms: int
    seen: float
    """Root mean square of the arms' true differences from their baselines; 0 where noise explains all of them."""
    detectable: float


def with_undecidable_metrics(planned: Plan, store: Store) -> Plan:
    """The plan with findings on its primary metric and its tasks, where earlier runs of this size show too much noise.

    Reads the reports of the store's studies. Without any, or with one planned seed, nothing is found.
    """
    arms = [arm for arm in planned.arms if arm.arm.name != arm.arm.baseline]
    seeds = len(planned.ablation.study.all_seeds)
    if not arms or seeds < 2:
        return planned
    primary, tasks = planned.ablation.study.compare.metric, _planned_tasks(planned)
    earlier = earlier_arms(store, lambda name: name == primary or _is_score_of(name, tasks))
    if not earlier:
        return planned
    ratio = _detectable_ratio(planned, seeds)
    found: dict[_Undecidable, list[str]] = {}
    for metric, others in earlier.items():
        for arm in arms:
            if (each := _undecidable(metric, arm, others, ratio)) is not None:
                found.setdefault(each, []).append(arm.arm.name)
    named = {each: (ALL,) if len(names) == len(arms) else tuple(names) for each, names in found.items()}
    return replace(planned, findings=(*planned.findings, *_findings(named, primary, seeds)))


def _detectable_ratio(planned: Plan, seeds: int) -> float:
    """Smallest difference that the planned seeds detect with 80% power, in standard deviations of a paired difference.

    Imports what most plans do not need: those of a store without earlier runs.
    """
    from lit_llm.statistics.multiple_comparisons import two_sided_critical
    from lit_llm.statistics.verdicts import detectable_ratio
    from lit_llm.studies.seeds_needed import test_level

    (level, _), degrees = test_level(planned.ablation), seeds - 1
    return detectable_ratio(two_sided_critical(level, degrees), degrees) / math.sqrt(seeds)


def _planned_tasks(planned: Plan) -> frozenset[str]:
    """Names of the tasks that an arm is evaluated on, those of suites included."""
    sections = [arm.arm.experiment.evaluate for arm in planned.arms]
    names = {name for each in sections if each is not None and each.tasks for name in each.tasks.names}
    return frozenset(task for name in names for task in SUITES.get(name, (name,)))


def _is_score_of(name: str, tasks: frozenset[str]) -> bool:
    bare = name.removeprefix(FINETUNED)
    return bare.startswith(TASKS) and bare.removeprefix(TASKS).split("/")[0] in tasks and direction(name) is not None


def _undecidable(metric: str, planned: PlannedArm, earlier: Sequence[EarlierArm], ratio: float) -> _Undecidable | None:
    """None where the metric decides, or is not known at this size. ratio: from `_detectable_ratio`."""
    # In one order for every planned arm, so that arms with the same earlier ones have equal results.
    alike = sorted(
        (other for other in nearest_arms(planned, earlier) if not other.is_far(planned)), key=lambda other: other.arm
    )
    scatter = pooled(other.scatter for other in alike)
    if scatter is None or scatter.degrees < FEWEST_DEGREES:
        return None
    # The square of a mean over seeds holds the variance of that mean.
    squared = fmean(other.difference**2 - scatter.sd**2 / other.seeds for other in alike)
    seen = math.sqrt(max(0.0, squared))
    if ratio * scatter.sd <= seen:
        return None
    return _Undecidable(metric, alike[0].study, len(alike), seen, ratio * scatter.sd)


def _findings(found: Mapping[_Undecidable, tuple[str, ...]], primary: str, seeds: int) -> Iterator[Finding]:
    """A finding for each planned arm, of the same words where the same earlier runs are near. found: with the arms."""
    by_arms: dict[tuple[str, ...], list[_Undecidable]] = {}
    for each, names in found.items():
        if each.metric == primary:
            for name in names:
                yield Finding("note", name, "compare.metric", _message(each, seeds))
        else:
            by_arms.setdefault(names, []).append(each)
    for names, tasks in by_arms.items():
        listed = some(list(dict.fromkeys(each.metric for each in tasks)))
        message = f"{listed}: too noisy for {seeds} seeds to decide differences of the size that earlier runs show; "
        for name in names:
            yield Finding("note", name, "evaluate.tasks", f"{message}{_advice(tasks[0])}")


def _message(each: _Undecidable, seeds: int) -> str:
    arms = "the arm differs from its baseline" if each.arms == 1 else f"{each.arms} arms differ from their baselines"
    size = f"by {each.seen:.2g} (root mean square without noise)" if each.seen else "by no more than noise"
    return (
        f"{each.metric} may not decide: in {each.study}, of this size, {arms} {size}, and {seeds} seeds detect "
        f"{each.detectable:.2g} with 80% power; {_advice(each)}"
    )


def _advice(each: _Undecidable) -> str:
    power = f", `plan --power {each.seen:.2g}` the seeds" if each.seen else ""
    return f"`lit-llm noise {each.study}` shows which metrics are less noisy{power}"

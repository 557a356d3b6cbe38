"""Number of seeds that a study needs, from the scatter of earlier runs and the power of a paired t-test.

Scatter is the standard deviation of an arm's differences from its baseline over shared seeds. Its source is the pilot
study if one is named; else this study's finished runs; else the study of this store with the same metric whose arms are
nearest in parameters and training tokens. Every row names the source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lit_llm.config.problems import InputError, Problem
from lit_llm.statistics.power import (
    MOST_SEEDS,
    POWER,
    Scatter,
    minimum_detectable_difference,
    pooled,
    scatter_of,
    seeds_for,
)
from lit_llm.statistics.run_results import of_newest_provenance, values_by_arm
from lit_llm.statistics.sequential import Rounds, round_levels
from lit_llm.statistics.verdicts import LEVEL
from lit_llm.store.store import Store
from lit_llm.studies.earlier_arms import FEWEST_DEGREES, EarlierArm, earlier_arms, nearest_arms
from lit_llm.studies.load import Ablation
from lit_llm.studies.plan import Plan, PlannedArm
from lit_llm.studies.runs import runs_of
from lit_llm.studies.stored import open_study


@dataclass(frozen=True)
class SeedsNeeded:
    """Seeds that one arm needs."""

    arm: str
    baseline: str
    sd: float | None
    """Standard deviation of the paired differences, in the metric's unit; None without earlier runs."""
    source: str
    """Study and runs that give the standard deviation."""
    seeds: int | None
    """Seeds that detect the difference with 80% power; None without a scatter, or beyond `MOST_SEEDS`."""
    cautious_seeds: int | None
    """Seeds at the upper 80% confidence limit of the standard deviation."""
    detectable: float | None
    """Smallest difference that the planned seeds detect with 80% power; None without a scatter or with one seed."""


@dataclass(frozen=True)
class PowerPlan:
    """The seeds that a study needs to show a difference."""

    metric: str
    difference: float
    """True difference to detect, in the metric's unit."""
    power: float
    level: float
    """Level of the two-sided test of one arm, after correction."""
    planned: int
    """Seeds of the study; with `more_seeds` the maximum."""
    rows: tuple[SeedsNeeded, ...]
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The object that `plan --power --json` prints under `power`. Keys may be added, none is renamed."""
        return asdict(self)


def seeds_needed(planned: Plan, store: Store, difference: float, pilot: str | None = None) -> PowerPlan:
    """The seeds with which each arm's true difference from its baseline would be detected with 80% power.

    Args:
        planned: the study's plan.
        store: holds earlier runs; nothing is written.
        difference: in the primary metric's unit.
        pilot: a study file whose runs in this store give the scatter; this study and earlier ones when None.

    Raises:
        InputError: the pilot is no study, or has no arm with two finished seeds in this store.
    """
    study = planned.ablation.study
    metric = study.compare.metric
    arms = [arm for arm in planned.arms if arm.arm.name != arm.arm.baseline]
    scatters = (
        _scatters_of_pilot(pilot, metric, arms, store)
        if pilot
        else _scatters_of_store(planned.ablation, metric, arms, store)
    )
    level, notes = test_level(planned.ablation)
    most = len(study.all_seeds)
    rows = []
    for arm in arms:
        scatter, source = scatters.get(arm.arm.name, (None, "–"))
        if scatter is None:
            rows.append(SeedsNeeded(arm.arm.name, arm.arm.baseline, None, source, None, None, None))
            continue
        needed, cautious = (seeds_for(difference, sd, POWER, level) for sd in (scatter.sd, scatter.upper))
        detectable = minimum_detectable_difference(scatter.sd, most, POWER, level) if most > 1 else None
        rows.append(SeedsNeeded(arm.arm.name, arm.arm.baseline, scatter.sd, source, needed, cautious, detectable))
    notes += [*_notes(rows, planned)]
    return PowerPlan(metric, difference, POWER, level, most, tuple(rows), tuple(notes))


def test_level(ablation: Ablation) -> tuple[float, list[str]]:
    """(level of the two-sided test of one arm in a study, notes that explain it)."""
    study = ablation.study
    count = len({arm.name for arm in ablation.arms if arm.name != arm.baseline})
    correction = study.compare.correction
    level = LEVEL if correction == "none" or not count else LEVEL / count
    notes = [
        "test: paired t over shared seeds, n - 1 degrees of freedom, two-sided, "
        f"power by the noncentral t distribution; level {level:.3g}"
        + (f" = {LEVEL:g} / {count} arms ({correction}: its strictest step, Bonferroni's)" if level < LEVEL else "")
    ]
    if study.more_seeds is not None:
        rounds = Rounds(len(study.seeds), study.more_seeds.max, study.more_seeds.step)
        level = round_levels(rounds, LEVEL / level)[-1].difference
        last = f"the level of the last of {len(rounds.sizes)} interim analyses is {level:.3g}"
        notes.append(f"more_seeds: {last}; earlier ones add power")
    return level, notes


def _notes(rows: Sequence[SeedsNeeded], planned: Plan) -> Iterator[str]:
    if any(row.sd is not None for row in rows):
        yield "cautious: with the scatter at the upper end of its one-sided 80% interval; few seeds know it roughly"
    if any(row.sd is not None and row.cautious_seeds is None for row in rows):
        yield f"–: more than {MOST_SEEDS:,} seeds"
    if any(row.sd is None for row in rows):
        few = planned.ablation.study.seeds[:3] if len(planned.ablation.study.seeds) > 1 else (0, 1, 2)
        yield (
            f"no earlier runs with {planned.ablation.study.compare.metric} in two shared seeds are in this store: run "
            f"this study with `seeds: {list(few)}` first and ask again, or name such a study by `--pilot STUDY`"
        )


# --- where the scatter comes from -----------------------------------------------------------------------------------


def _scatters_of_pilot(
    pilot: str, metric: str, arms: Sequence[PlannedArm], store: Store
) -> dict[str, tuple[Scatter, str]]:
    """{arm: (scatter, source)} from a pilot study: of the arm with this name, else of all its arms pooled."""
    ablation = open_study(pilot, store=store)
    scatters = _scatters(ablation, metric, store)
    if not scatters:
        message = f"{ablation.study.study} has no arm with {metric} in two seeds that its baseline shares"
        raise InputError(Problem(f"{message}; `{ablation.command('run', store)}` with two or three seeds", "--pilot"))
    return _named_or_pooled(scatters, arms, f"pilot {ablation.study.study}")


def _scatters_of_store(
    ablation: Ablation, metric: str, arms: Sequence[PlannedArm], store: Store
) -> dict[str, tuple[Scatter, str]]:
    """{arm: (scatter, source)} from this study's finished runs, else from the nearest earlier study."""
    scatters = _scatters(ablation, metric, store)
    if scatters:
        return _named_or_pooled(scatters, arms, "this study")
    earlier = earlier_arms(store, metric.__eq__, ablation.study.study).get(metric)
    return {arm.arm.name: _nearest(arm, earlier) for arm in arms} if earlier else {}


def _scatters(ablation: Ablation, metric: str, store: Store) -> dict[str, Scatter]:
    """{arm: scatter of its differences from its baseline} over finished runs."""
    kept = of_newest_provenance([run.result() for run in runs_of(ablation, store)], [])
    values = values_by_arm(kept, [arm.name for arm in ablation.arms], metric)
    scatters = {arm.name: scatter_of(values[arm.name], values[arm.baseline]) for arm in ablation.arms}
    return {name: scatter for name, scatter in scatters.items() if scatter is not None}


def _named_or_pooled(
    scatters: Mapping[str, Scatter], arms: Sequence[PlannedArm], where: str
) -> dict[str, tuple[Scatter, str]]:
    everything = pooled(scatters.values())
    assert everything is not None
    chosen = {}
    for arm in arms:
        arm_scatter = scatters.get(arm.arm.name)
        if arm_scatter is not None and arm_scatter.degrees >= FEWEST_DEGREES:
            chosen[arm.arm.name] = arm_scatter, f"{where}, {arm_scatter.degrees + 1} seeds"
        else:
            chosen[arm.arm.name] = everything, f"{where}, {_pooled_over(len(scatters))}"
    return chosen


def _pooled_over(arms: int) -> str:
    return f"pooled over {arms} arm{'' if arms == 1 else 's'}"


def _nearest(arm: PlannedArm, earlier: Sequence[EarlierArm]) -> tuple[Scatter, str]:
    """(pooled scatter, source) of the arms nearest to this one, within the study that has the nearest."""
    alike = nearest_arms(arm, earlier)
    scatter = pooled(other.scatter for other in alike)
    assert scatter is not None
    far = f", far: {_ratios(alike[0], arm)}" if alike[0].is_far(arm) else ""
    return scatter, f"{alike[0].study}, {_pooled_over(len(alike))}{far}"


def _ratios(earlier: EarlierArm, arm: PlannedArm) -> str:
    """`0.1 times the parameters, 0.02 times the tokens`."""
    pairs = (("parameters", earlier.parameters, arm.cost.parameters), ("tokens", earlier.tokens, arm.cost.tokens))
    return ", ".join(f"{mine / theirs:.2g} times the {what}" for what, mine, theirs in pairs if theirs)

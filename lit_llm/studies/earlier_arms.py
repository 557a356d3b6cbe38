"""Arms of the studies that a store has reported: their differences from their baselines, and the scatter over seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from lit_llm.statistics.power import Scatter, scatter_of
from lit_llm.store.store import Store
from lit_llm.studies.plan import PlannedArm

FEWEST_DEGREES = 2
"""Degrees of freedom that a scatter needs for use by itself."""
FAR = 4.0
"""Largest ratio of parameters or tokens, either way, above which an earlier arm is called far."""
ALIKE = math.log(1.1)
"""Arms whose distances differ by less are equally near."""


@dataclass(frozen=True)
class EarlierArm:
    """An arm of an earlier study with its size, and its differences from its baseline over shared seeds."""

    study: str
    arm: str
    difference: float
    """Mean over the seeds, in the metric's unit."""
    scatter: Scatter
    parameters: float
    tokens: float

    @property
    def seeds(self) -> int:
        return self.scatter.degrees + 1

    def distance(self, planned: PlannedArm) -> float:
        """The larger of the two log ratios, of parameters and of training tokens."""
        pairs = ((self.parameters, planned.cost.parameters), (self.tokens, planned.cost.tokens))
        return max(abs(math.log(mine / theirs)) if mine > 0 and theirs > 0 else math.inf for mine, theirs in pairs)

    def is_far(self, planned: PlannedArm) -> bool:
        """True where the earlier arm has another size than the planned one."""
        return self.distance(planned) > math.log(FAR)


def earlier_arms(store: Store, wanted: Callable[[str], bool], besides: str = "") -> dict[str, list[EarlierArm]]:
    """{metric: arms of all reported studies that share two seeds of it with their baselines}, for the wanted metrics.

    besides: a study to leave out.
    """
    found: dict[str, list[EarlierArm]] = {}
    for file in sorted((store.root / "studies").glob("*/runs.csv")):
        if file.parent.name != besides:
            for metric, arm in _reported_arms(file, wanted):
                found.setdefault(metric, []).append(arm)
    return found


def nearest_arms(planned: PlannedArm, earlier: Sequence[EarlierArm]) -> list[EarlierArm]:
    """The arms nearest to a planned one, within the study that has the nearest; the nearest first."""
    best = min(earlier, key=lambda other: other.distance(planned))
    near = best.distance(planned) + ALIKE
    return [best, *(o for o in earlier if o is not best and o.study == best.study and o.distance(planned) <= near)]


def _reported_arms(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, EarlierArm]]:
    """(metric, arm) of one study, read from the runs.csv of its report."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    baselines: dict[str, str] = {}
    sizes: dict[str, tuple[float, float]] = {}
    try:
        with file.open(newline="") as lines:
            reader = csv.reader(lines)
            at = {name: column for column, name in enumerate(next(reader, ()))}
            metrics = [name for name in at if wanted(name)]
            for row in reader if metrics else ():
                if row[at["state"]] != "done":
                    continue
                arm = row[at["arm"]]
                for metric in metrics:
                    if value := row[at[metric]]:
                        values.setdefault(metric, {}).setdefault(arm, {})[int(row[at["seed"]])] = float(value)
                baselines[arm] = row[at["baseline"]]
                sizes[arm] = float(row[at["parameters"]]), float(row[at["tokens"]])
    except (OSError, ValueError, LookupError, csv.Error):
        return  # a report of another version, or half a file, counts as absent
    for metric, arms in values.items():
        for arm, mine in arms.items():
            theirs = arms.get(baselines[arm], {})
            if (scatter := scatter_of(mine, theirs)) is not None:
                difference = fmean(mine[seed] - theirs[seed] for seed in mine.keys() & theirs.keys())
                yield metric, EarlierArm(file.parent.name, arm, difference, scatter, *sizes[arm])

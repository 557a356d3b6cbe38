"""Loss and LR sensitivity of a study's groups of arms over learning rates, compared with the baseline's group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lit_llm.statistics.baselines import differences_from_baselines
from lit_llm.statistics.lr_sensitivity import (
    ArmAtRate,
    LRRun,
    Range,
    Sensitivity,
    best_lr,
    loss_table,
    lr_sensitivity,
    widest_range,
)
from lit_llm.statistics.paired import Difference

MARGIN = 0.1
"""Largest distance from the best loss, in the loss's unit, at which a learning rate counts as good."""


@dataclass(frozen=True)
class LRGroup:
    """Arms that differ in the learning rate alone."""

    name: str
    baseline: str
    """Group that this one is compared with: itself for a baseline, an arm's name where the arm is in no group."""
    arms: Mapping[str, float]
    """{arm: learning rate}"""


@dataclass(frozen=True)
class LRFactor:
    """A factor that is a learning rate."""

    name: str
    """Key of the factor."""
    groups: tuple[LRGroup, ...]


@dataclass(frozen=True)
class LRRow:
    """One group of arms over all learning rates."""

    group: str
    baseline: str
    cells: tuple[ArmAtRate, ...]
    """One for each learning rate at which a run has ended, in ascending order."""
    sensitivity: Sensitivity | None
    """None where the loss at initialisation was not measured."""
    difference: Difference | None
    """Difference in LR sensitivity from the baseline's group, paired over seeds; None for a baseline."""
    best: float | None
    """Learning rate with the lowest mean loss among those at which no seed diverged."""
    range: Range | None
    """Widest range of neighbouring learning rates within the margin of the best, none with a diverged seed."""


@dataclass(frozen=True)
class LearningRates:
    """Sensitivity of each group of arms to one learning rate."""

    factor: str
    margin: float
    rows: tuple[LRRow, ...]
    notes: tuple[str, ...]

    @property
    def lrs(self) -> tuple[float, ...]:
        """Every learning rate at which a run has ended."""
        return tuple(sorted({cell.lr for row in self.rows for cell in row.cells}))


def learning_rates(
    factor: LRFactor, runs: Sequence[LRRun], loss_at_init: Mapping[tuple[str, int], float], margin: float = MARGIN
) -> LearningRates:
    """Loss against learning rate, LR sensitivity, and measures of stability.

    runs: with a group's name as `arm`; loss_at_init: {(group, seed): loss before the first step}. A group that lacks
    one of these losses has no LR sensitivity.
    """
    cells = loss_table(runs)
    measured = {run.arm for run in runs} - {run.arm for run in runs if (run.arm, run.seed) not in loss_at_init}
    lrs = sorted({lr for group in factor.groups for lr in group.arms.values()})
    sensitivities = lr_sensitivity([cell for cell in cells if cell.arm in measured], loss_at_init, lrs=lrs)
    baselines = {group.name: group.baseline for group in factor.groups}
    differences = differences_from_baselines({name: s.by_seed for name, s in sensitivities.items()}, baselines)
    rows = []
    for group in factor.groups:
        group_cells = tuple(cell for cell in cells if cell.arm == group.name)
        best = best_lr(group_cells)
        rows.append(
            LRRow(
                group.name,
                group.baseline,
                group_cells,
                sensitivities.get(group.name),
                differences.get(group.name),
                best.lr if best else None,
                widest_range(group_cells, margin),
            )
        )
    return LearningRates(factor.name, margin, tuple(rows), tuple(_notes(rows, margin)))


def _notes(rows: Sequence[LRRow], margin: float) -> Iterator[str]:
    sensitivities = {row.group: row.sensitivity for row in rows if row.sensitivity is not None}
    if sensitivities:
        yield (
            "LR sensitivity (arXiv 2309.14322): mean over all learning rates of min(loss, loss at initialisation) less "
            "the best loss; 0: none of them does harm"
        )
    if any(sensitivity.capped for sensitivity in sensitivities.values()):
        yield (
            "capped: runs that diverged, or ended above the loss at initialisation; LR sensitivity counts that loss "
            "for them, by its definition"
        )
    if any(cell.diverged for row in rows for cell in row.cells):
        yield "†: number of seeds that diverged; they are in no mean of losses"
    for name, sensitivity in sensitivities.items():
        if seeds := ", ".join(map(str, sensitivity.left_out)):
            yield (
                f"{name}: LR sensitivity without seed {seeds}, which lacks the result of a learning rate, or never got "
                "below the loss at initialisation"
            )
    if any(row.cells and row.sensitivity is None for row in rows):
        yield "no LR sensitivity without the loss at initialisation, measured in this stage and by this code"
    yield f"range: neighbouring learning rates within {margin:g} of the best, no seed diverged"

"""LR sensitivity of an arm, and its stability at each learning rate.

LR sensitivity (Wortsman et al. 2023, arXiv 2309.14322, section 2.2) over learning rates η in a range [a, b], with the
final loss ℓ(η), the best loss ℓ* = min ℓ(η) and the loss at initialisation ℓ₀:

    E over η of min(ℓ(η), ℓ₀) − ℓ*

It is 0 for an arm that no learning rate of the range harms. The expectation is the plain mean over the learning rates
that were run, as in the paper, whose grid has two per decade (3e-4, 1e-3, ... 3e-1). They should be evenly spaced in
decades, and the same for all arms. The definition caps a run's loss at ℓ₀, so a diverged run counts with ℓ₀; in no
other mean does a diverged run have a number. ℓ₀ is measured by the caller.

LR sensitivity has a value for each seed, so `baselines.block_differences` compares arms by it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_llm.statistics.paired import Values, mean_spread


@dataclass(frozen=True)
class LRRun:
    """Result of one run at one learning rate."""

    arm: str
    lr: float
    seed: int
    loss: float | None
    """Final loss; None for a diverged run."""
    spikes: float | None = None
    """Number of loss spikes. This and the next two are None where not measured; a diverged run has them too."""
    max_attention_logit: float | None = None
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class ArmAtRate:
    """One arm at one learning rate."""

    arm: str
    lr: float
    losses: Values
    """Losses of the seeds that did not diverge."""
    diverged: tuple[int, ...]
    """Seeds that diverged."""
    spikes: float | None
    """Mean loss spikes per run; this and the next two include diverged runs."""
    max_attention_logit: float | None
    """Largest over all runs."""
    max_grad_norm: float | None

    @property
    def mean(self) -> float | None:
        """Mean of the losses; None where every seed diverged."""
        return statistics.fmean(self.losses.values()) if self.losses else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None


def loss_table(runs: Sequence[LRRun]) -> tuple[ArmAtRate, ...]:
    """Loss against learning rate: arms in the order of the runs, learning rates in ascending order.

    Raises ValueError for a loss that is not finite and for two runs of one arm, learning rate and seed.
    """
    cells: dict[tuple[str, float], dict[int, LRRun]] = {}
    for run in runs:
        name = f"{run.arm}, lr {run.lr:g}, seed {run.seed}"
        if run.loss is not None and not math.isfinite(run.loss):
            raise ValueError(f"{name}: the loss is {run.loss}; a run that diverged has none (None)")
        if run.seed in cells.setdefault((run.arm, run.lr), {}):
            raise ValueError(f"{name}: there are two runs")
        cells[run.arm, run.lr][run.seed] = run
    order = {arm: place for place, arm in enumerate(dict.fromkeys(run.arm for run in runs))}
    return tuple(_cell(*key, cells[key]) for key in sorted(cells, key=lambda key: (order[key[0]], key[1])))


def _cell(arm: str, lr: float, runs: Mapping[int, LRRun]) -> ArmAtRate:
    losses = {seed: run.loss for seed, run in sorted(runs.items()) if run.loss is not None}
    spikes, logits, norms = (
        [value for run in runs.values() if (value := getattr(run, name)) is not None]
        for name in ("spikes", "max_attention_logit", "max_grad_norm")
    )
    lost = tuple(sorted(runs.keys() - losses.keys()))
    mean = statistics.fmean(spikes) if spikes else None
    return ArmAtRate(arm, lr, losses, lost, mean, max(logits, default=None), max(norms, default=None))


# --- one arm --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sensitivity:
    """LR sensitivity of one arm, in the loss's unit."""

    lrs: tuple[float, ...]
    """Learning rates over which the mean is taken."""
    by_seed: Values
    mean: float | None
    """None without a seed."""
    low: float | None
    """Lower end of the 95% interval over seeds; None for fewer than two."""
    high: float | None
    capped: int
    """Runs counted with the loss at initialisation, because they diverged or ended above it."""
    left_out: tuple[int, ...]
    """Seeds that lack a learning rate, or with which no run got below the loss at initialisation."""


def lr_sensitivity(
    cells: Sequence[ArmAtRate],
    loss_at_init: Mapping[tuple[str, int], float],
    between: tuple[float, float] = (0.0, math.inf),
    lrs: Sequence[float] | None = None,
) -> dict[str, Sensitivity]:
    """LR sensitivity of every arm, over the learning rates within `between`, ends included.

    loss_at_init: {(arm, seed): ℓ₀}, measured like the final loss. Raises ValueError where one is missing.
    lrs: all planned learning rates; those at which any arm was run when None.
    """
    within = [cell for cell in cells if between[0] <= cell.lr <= between[1]]
    distinct = {cell.lr for cell in within} if lrs is None else {lr for lr in lrs if between[0] <= lr <= between[1]}
    every = tuple(sorted(distinct))
    return {
        arm: _sensitivity(arm, {cell.lr: cell for cell in within if cell.arm == arm}, every, loss_at_init)
        for arm in dict.fromkeys(cell.arm for cell in within)
    }


def _sensitivity(
    arm: str, cells: Mapping[float, ArmAtRate], lrs: tuple[float, ...], loss_at_init: Mapping[tuple[str, int], float]
) -> Sensitivity:
    by_seed, left_out, capped = {}, [], 0
    for seed in sorted({seed for cell in cells.values() for seed in (*cell.losses, *cell.diverged)}):
        if (arm, seed) not in loss_at_init:
            raise ValueError(f"{arm}, seed {seed}: LR sensitivity needs the loss at initialisation, measured")
        initial = loss_at_init[arm, seed]
        losses = [cells[lr].losses.get(seed, math.inf) for lr in lrs if lr in cells and _ran(cells[lr], seed)]
        if len(losses) < len(lrs) or min(losses) >= initial:
            left_out.append(seed)
            continue
        by_seed[seed] = statistics.fmean(min(loss, initial) for loss in losses) - min(losses)
        capped += sum(loss > initial for loss in losses)
    mean, spread = statistics.fmean(by_seed.values()) if by_seed else None, mean_spread(by_seed)
    half = spread.half_width() if spread else None
    low, high = (None, None) if mean is None or half is None else (mean - half, mean + half)
    return Sensitivity(lrs, by_seed, mean, low, high, capped, tuple(left_out))


def _ran(cell: ArmAtRate, seed: int) -> bool:
    return seed in cell.losses or seed in cell.diverged


@dataclass(frozen=True)
class Range:
    """Range of neighbouring learning rates."""

    low: float
    high: float

    @property
    def decades(self) -> float:
        """Width in decades; 0 for a single learning rate."""
        return math.log10(self.high / self.low)


def best_lr(cells: Sequence[ArmAtRate]) -> ArmAtRate | None:
    """The learning rate of one arm with the lowest mean loss and no diverged seed; None where each has one."""
    whole = [
        (cell.mean, cell.lr, cell) for cell in _check_one_arm(cells) if cell.mean is not None and not cell.diverged
    ]
    return min(whole, key=lambda candidate: candidate[:2])[2] if whole else None


def widest_range(cells: Sequence[ArmAtRate], margin: float) -> Range | None:
    """The widest range of neighbouring learning rates of one arm within `margin` of its best mean loss.

    No seed diverged in the range. Of two ranges of the same width, the lower one. None where every learning rate has a
    diverged seed.
    """
    best = best_lr(cells)
    if best is None or best.mean is None:
        return None
    ranges: list[Range] = []
    first: float | None = None
    for cell in sorted(_check_one_arm(cells), key=lambda cell: cell.lr):
        if cell.diverged or cell.mean is None or cell.mean > best.mean + margin:
            first = None
            continue
        first = cell.lr if first is None else first
        ranges.append(Range(first, cell.lr))
    return max(ranges, key=lambda each: each.decades)


def _check_one_arm(cells: Sequence[ArmAtRate]) -> Sequence[ArmAtRate]:
    if len(arms := dict.fromkeys(cell.arm for cell in cells)) > 1:
        raise ValueError(f"the learning rates of one arm at a time, not of {', '.join(arms)}")
    return cells

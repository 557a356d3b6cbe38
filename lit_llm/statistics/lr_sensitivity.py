"""How much the learning rate matters to an arm: LR sensitivity, and what was unstable at which learning rate.

LR sensitivity (Wortsman et al. 2023, arXiv 2309.14322, section 2.2), of the learning rates η in a range [a, b], with
ℓ(η) the final loss, ℓ* = min ℓ(η) the best of them and ℓ₀ the loss at initialisation:

    E over η of min(ℓ(η), ℓ₀) − ℓ*

0 is an arm that no learning rate of the range harms. The expectation is the plain mean over the learning rates that
were run, as in the paper, whose grid has two to a decade (3e-4, 1e-3, ... 3e-1): they should be even in decades, and
the same for all arms. The definition itself caps a run's loss at ℓ₀, so a run that diverged stands in it with ℓ₀. That
is its only use: such runs are counted, and no mean of losses holds a number for them. ℓ₀ is measured, and handed in.

Per seed it is a value like any other: `baselines.block_differences` compares arms by it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_llm.statistics.paired import Values, mean_spread


@dataclass(frozen=True)
class LRRun:
    """How one run at one learning rate ended."""

    arm: str
    lr: float
    seed: int
    loss: float | None
    """The final one; None: it diverged."""
    spikes: float | None = None
    """Loss spikes; these three None where nobody looked. A diverged run has them too."""
    max_attention_logit: float | None = None
    max_grad_norm: float | None = None


@dataclass(frozen=True)
class ArmAtRate:
    """One arm at one learning rate."""

    arm: str
    lr: float
    losses: Values
    """Of the seeds that did not diverge."""
    diverged: tuple[int, ...]
    """Seeds that did."""
    spikes: float | None
    """Per run, diverged ones included, like the next two."""
    max_attention_logit: float | None
    """The largest of all runs."""
    max_grad_norm: float | None

    @property
    def mean(self) -> float | None:
        """Of the losses; None where every seed diverged."""
        return statistics.fmean(self.losses.values()) if self.losses else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.losses.values()) if len(self.losses) > 1 else None


def loss_table(runs: Sequence[LRRun]) -> tuple[ArmAtRate, ...]:
    """Loss against learning rate: the arms in the order they come, each from its lowest learning rate to its highest.

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
    """The learning rates that it is the mean over."""
    by_seed: Values
    mean: float | None
    """None without a seed."""
    low: float | None
    """Lower end of the 95% interval over seeds; None for fewer than two."""
    high: float | None
    capped: int
    """Runs that stand in it with the loss at initialisation: those that diverged, and those that ended above it."""
    left_out: tuple[int, ...]
    """Seeds that lack a learning rate, or with which no run got below the loss at initialisation."""


def lr_sensitivity(
    cells: Sequence[ArmAtRate],
    loss_at_init: Mapping[tuple[str, int], float],
    between: tuple[float, float] = (0.0, math.inf),
    lrs: Sequence[float] | None = None,
) -> dict[str, Sensitivity]:
    """LR sensitivity of every arm, over the learning rates of `between`, ends included, that any arm was run at.

    loss_at_init: {(arm, seed): ℓ₀}, measured like the final loss. Raises ValueError where one is missing.
    lrs: those that there are, where some may not have been run by any arm yet.
    """
    within = [cell for cell in cells if between[0] <= cell.lr <= between[1]]
    there = {cell.lr for cell in within} if lrs is None else {lr for lr in lrs if between[0] <= lr <= between[1]}
    every = tuple(sorted(there))
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
    """Neighbouring learning rates of an arm."""

    low: float
    high: float

    @property
    def decades(self) -> float:
        """0 for a single learning rate."""
        return math.log10(self.high / self.low)


def best_lr(cells: Sequence[ArmAtRate]) -> ArmAtRate | None:
    """Of one arm: the lowest mean loss where no seed diverged; None where there is no such learning rate."""
    whole = [(cell.mean, cell.lr, cell) for cell in _of_one_arm(cells) if cell.mean is not None and not cell.diverged]
    return min(whole, key=lambda found: found[:2])[2] if whole else None


def widest_range(cells: Sequence[ArmAtRate], margin: float) -> Range | None:
    """Of one arm: the widest run of neighbouring learning rates at which no seed diverged and the mean loss is at most
    `margin` above that of the best; of two as wide the lower. None where every learning rate has a diverged seed.
    """
    best = best_lr(cells)
    if best is None or best.mean is None:
        return None
    found: list[Range] = []
    first: float | None = None
    for cell in sorted(_of_one_arm(cells), key=lambda cell: cell.lr):
        if cell.diverged or cell.mean is None or cell.mean > best.mean + margin:
            first = None
            continue
        first = cell.lr if first is None else first
        found.append(Range(first, cell.lr))
    return max(found, key=lambda part: part.decades)


def _of_one_arm(cells: Sequence[ArmAtRate]) -> Sequence[ArmAtRate]:
    if len(arms := dict.fromkeys(cell.arm for cell in cells)) > 1:
        raise ValueError(f"the learning rates of one arm at a time, not of {', '.join(arms)}")
    return cells

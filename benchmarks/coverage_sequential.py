"""False alarms and bias of studies that add seeds in rounds, by simulation.

Differences are normal, of arms that share a baseline; the levels are those of `lit_llm.statistics.sequential`, asked of
each arm's own paired t or of one whose variance is moderated by the other open arms (`compare.variance: moderated`).
`false alarms` is the share of null studies in which any arm is called different; `bias` the mean error of the printed
difference over all studies, in standard deviations of a seed's difference.

    python benchmarks/coverage_sequential.py [replicates]
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from lit_llm.statistics import contrasts
from lit_llm.statistics.sequential import PastInterims, Rounds, round_levels, unbiased

Array = NDArray[Any]
LEVEL = 0.05


def null_arms(
    random: np.random.Generator, replicates: int, arms: int, seeds: int, effect: float = 0.0, wide: float = 1.0
) -> Array:
    """Differences [replicate, arm, seed] with standard deviation 1; arms share their baseline's half of the noise.

    wide: how many times as wide as that of the others the own noise of the first arm is.
    """
    own, shared = random.normal(size=(replicates, arms, seeds)), random.normal(size=(replicates, 1, seeds))
    own[:, 0] *= wide
    return effect + (own - shared) / np.sqrt(2)


def p_values(differences: Array, is_open: Array, moderated: bool) -> Array:
    """Two-sided p [replicate, arm] of the look at these seeds. is_open: arms that are looked at, and share noise."""
    seeds = differences.shape[-1]
    mean, variance, degrees = differences.mean(-1), differences.var(-1, ddof=1), float(seeds - 1)
    df: Array | float = degrees
    if moderated:
        count = is_open.sum(1, keepdims=True) - is_open
        others = (np.where(is_open, variance, 0).sum(1, keepdims=True) - np.where(is_open, variance, 0)) / np.maximum(
            count, 1
        )
        variance, df = contrasts.moderated(variance, degrees, np.where(count > 0, others, np.nan))
    return np.asarray(2 * stdtr(df, -np.abs(mean) / np.sqrt(variance / seeds)))


def decided_at(differences: Array, rounds: Rounds, comparisons: int = 1, moderated: bool = False) -> Array:
    """Seeds [replicate, arm] at which each arm was called different; 0 where it never was."""
    found = np.zeros(differences.shape[:2], int)
    for size, levels in zip(rounds.sizes, round_levels(rounds, comparisons), strict=True):
        is_open = found == 0
        passed = p_values(differences[..., :size], is_open, moderated) < levels.difference
        found = np.where(is_open & passed, size, found)
    return found


def _row(procedure: str, design: str, quantity: str, value: float, replicates: int, nominal: float) -> dict[str, Any]:
    error = float(np.sqrt(max(value * (1 - value), 1e-12) / replicates))
    return {
        "procedure": procedure,
        "design": design,
        "quantity": quantity,
        "value": round(value, 4),
        "simulation_error": round(error, 4),
        "nominal": nominal,
    }


def _alarms(procedure: str, design: str, found: Array) -> dict[str, Any]:
    return _row(procedure, design, "false alarms", float((found > 0).any(1).mean()), len(found), LEVEL)


def false_alarms(replicates: int, random: np.random.Generator) -> list[dict[str, Any]]:
    """One arm under its own level, and many under one family-wise level."""
    rows = []
    for most in (8, 10):
        rounds, design = Rounds(3, most), f"1 arm, 3 to {most} seeds"
        data = null_arms(random, replicates, 1, most)
        rows.append(_alarms("own t, spent levels", design, decided_at(data, rounds)))
        naive = np.zeros((replicates, 1), bool)
        for size in rounds.sizes:
            naive |= p_values(data[..., :size], ~naive, False) < LEVEL
        rows.append(_alarms("own t, 5% at each look (not offered)", design, naive))
    for arms, wide in ((2, 1), (4, 1), (8, 1), (20, 1), (4, 3), (4, 10)):
        data, design = null_arms(random, replicates, arms, 8, wide=wide), f"{arms} arms, 3 to 8 seeds"
        design += f", one {wide} x as wide" if wide > 1 else ""
        for moderated in (False, True):
            name = f"{'moderated' if moderated else 'own'} t, Bonferroni x spent levels"
            rows.append(_alarms(name, design, decided_at(data, Rounds(3, 8), arms, moderated)))
        each = decided_at(data, Rounds(3, 8), 1, True)
        rows.append(_row("moderated t, spent levels, each arm alone", design, "false alarms of an arm",
                         float((each > 0).mean()), replicates, LEVEL))  # fmt: skip
    return rows


def extensions(replicates: int, random: np.random.Generator) -> list[dict[str, Any]]:
    """`more_seeds.max` raised from 8 to 12 after looks, with the levels of past looks kept or computed anew."""
    data = null_arms(random, replicates, 1, 20)
    eight, anew = Rounds(3, 8), Rounds(3, 12)
    first = decided_at(data, eight)
    rows = []

    def after(size: int, most: int = 12) -> Rounds:
        return Rounds(3, most, past=(PastInterims(tuple(range(3, size + 1)), 8),))

    at_end = (first > 0) | (decided_at(data, anew) > 0)
    rows.append(_alarms("levels computed anew (not offered)", "8 to 12 after all looks", at_end))
    again = at_end | (decided_at(data, Rounds(3, 20)) > 0)
    rows.append(_alarms("levels computed anew (not offered)", "8 to 12 to 20 after all looks", again))
    rows.append(_alarms("past looks keep their levels", "8 to 12 after all looks", decided_at(data, after(8))))
    for size in (3, 5, 7):
        extended = decided_at(data, after(size))
        rows.append(_alarms("past looks keep their levels", f"8 to 12 after the look at {size}", extended))
        p = p_values(data[..., :size], np.ones((replicates, 1), bool), False)
        for low, high in ((0.0, 0.1), (0.1, 0.4), (0.4, 1.0)):
            chosen = np.where((p >= low) & (p < high), extended, first)
            design = f"8 to 12 after the look at {size}, only where its p is {low:g} to {high:g}"
            rows.append(_alarms("past looks keep their levels", design, chosen))
    fixed = Rounds(3, 10, past=(PastInterims((3,), 3),))
    rows.append(_alarms("past looks keep their levels", "3 fixed seeds, then up to 10", decided_at(data, fixed)))
    return rows


def estimates(data: Array, rounds: Rounds, moderated: bool = False) -> tuple[Array, Array]:
    """(naive, bias-adjusted) differences [replicate] of the first arm as a report prints them."""
    found = decided_at(data, rounds, 1, moderated)[:, 0]
    size = np.where(found > 0, found, rounds.most)
    naive = np.array([row[:n].mean() for row, n in zip(data[:, 0], size, strict=True)])
    looks = [rounds.sizes.index(n) for n in size]
    adjusted = [unbiased(row[:n], look, rounds) for row, n, look in zip(data[:, 0], size, looks, strict=True)]
    return naive, np.array(adjusted)


def biases(replicates: int, random: np.random.Generator) -> list[dict[str, Any]]:
    """Mean error of the printed difference, naive and adjusted."""
    rows, rounds = [], Rounds(3, 10)
    for effect in (0.5, 1.0, 1.5, 2.0):
        for arms, variance in ((1, "own"), (4, "moderated")):
            data = null_arms(random, replicates, arms, 10, effect)
            for name, found in zip(("naive", "bias-adjusted"), estimates(data, rounds, arms > 1), strict=True):
                design = f"{arms} arm{'s' if arms > 1 else ''}, 3 to 10 seeds, {variance} t, effect {effect:g} sd"
                row = _row(name, design, "bias", 0.0, replicates, 0.0)
                row["value"] = round(float(found.mean() - effect), 4)
                row["simulation_error"] = round(float(found.std() / np.sqrt(replicates)), 4)
                rows.append(row)
    return rows


def coverage_table(replicates: int, seed: int) -> list[dict[str, Any]]:
    """Every row of the simulation.

    Args:
        replicates: studies for each row.
        seed: of the random numbers.

    Returns:
        {"procedure", "design", "quantity", "value", "simulation_error", "nominal"} each.
    """
    random = np.random.default_rng(seed)
    return [*false_alarms(replicates, random), *extensions(replicates, random), *biases(replicates, random)]


def main() -> None:
    replicates = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    for row in coverage_table(replicates, seed=0):
        print(
            f"{row['procedure']:48} {row['design']:62} {row['quantity']:22} {row['value']:+.4f} "
            f"± {row['simulation_error']:.4f}  (nominal {row['nominal']:g})"
        )


if __name__ == "__main__":
    main()

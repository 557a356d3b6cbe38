"""Two arms on the same items (documents, examples, questions): where they differ, and whether other items agree.

A metric is a sum over items divided by a sum of weights, so the difference of two arms is a sum over items, too. Two
questions have answers of their own:

- Would other seeds differ on this item? The differences of one item over the seeds are a sample, tested like the
  differences of arms (`contrasts`), or for answers that are right or wrong by the sign test. With many items some
  differ by chance: p-values are adjusted by Benjamini and Hochberg.
- Would these trained models differ on other items of the kind? Signs of the items' differences are flipped at random;
  for right or wrong answers of one seed this is McNemar's exact test (1947, Psychometrika 12).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from lit_llm.evaluation.unit_losses import Units
from lit_llm.statistics.contrasts import Sample, contrast, estimates
from lit_llm.statistics.document_noise import influence
from lit_llm.statistics.multiple_comparisons import fdr_bh
from lit_llm.statistics.paired import Difference

FLIPS = 9999
"""Random flips of signs, and the seed of their generator."""
BATCH = 5_000_000
"""Most numbers of a batch of flips."""

UnitsBySeed = Mapping[int, Units]


@dataclass(frozen=True)
class ItemDifference:
    """One item, or all items of one source."""

    item: str
    share: float
    """Share of the metric's weight."""
    means: tuple[float, float]
    """Value of each arm on it, averaged over seeds."""
    difference: Difference
    """The second arm minus the first."""
    part: float
    """Part of the whole difference; the parts of all items sum to it."""
    p: float | None
    """p-value of no difference over seeds, adjusted for all items; None for one seed."""


@dataclass(frozen=True)
class ItemTest:
    """Test that two arms do equally well on items of the kind, for the seeds that were trained."""

    method: Literal["McNemar", "sign flips"]
    seeds: tuple[int, ...]
    lower: int
    """Items on which the second arm has a lower value."""
    higher: int
    p: float


@dataclass(frozen=True)
class ItemComparison:
    """Comparison of two arms, item by item."""

    metric: str
    arms: tuple[str, str]
    seeds: tuple[int, ...]
    whole: Difference
    """The second arm minus the first, over all common items."""
    items: tuple[ItemDifference, ...]
    """By the size of their part, the largest first."""
    sources: tuple[ItemDifference, ...]
    """The same for each source; empty for a single one."""
    tests: tuple[ItemTest, ...]
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The object that `diff --items --json` prints. Keys may be added, none is renamed."""
        return asdict(self)


def item_comparison(
    metric: str, arms: tuple[str, str], first: UnitsBySeed, second: UnitsBySeed, notes: Sequence[str] = ()
) -> ItemComparison:
    """Compare two arms on the items that all their runs have.

    first, second: {seed: units} of the two arms, for the same seeds.

    Raises:
        ValueError: the runs have no item in common.
    """
    seeds = tuple(sorted(first))
    pairs = [(first[seed], second[seed]) for seed in seeds]
    every = [units for pair in pairs for units in pair]
    common = set.intersection(*({name for name, (_, weight) in units.items() if weight > 0} for units in every))
    if not common:
        raise ValueError("no item is common to all runs")
    names = [name for name in every[0] if name in common]
    kept = [({name: a[name] for name in names}, {name: b[name] for name in names}) for a, b in pairs]
    left_out = len(set().union(*every)) - len(names)
    said = [*notes, *[f"items left out, since not all runs were judged on them: {left_out}"] * bool(left_out)]
    if uneven := sum(not _same([units[name][1] for units in every]) for name in names):
        said.append(
            f"{uneven} of {len(names)} items have another weight in some runs: other tokens of them are targets, by "
            "their prefix, window or tokenizer, or their source has another share"
        )
    binary = all(total in (0, 1) and weight == 1 for pair in kept for units in pair for total, weight in units.values())
    items = _differences(seeds, kept, {name: [name] for name in names}, binary)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    sources = _differences(seeds, kept, groups, binary=False) if len(groups) > 1 else ()
    if len(seeds) == 1:
        said.append("one seed: no item has an interval; other seeds may differ elsewhere")
    elif binary and 2 / 2 ** len(seeds) > 0.05:
        said.append(f"single questions need 6 seeds or more: the sign test of {len(seeds)} gives no p below 0.05")
    return ItemComparison(
        metric, arms, seeds, _whole(seeds, kept), items, sources, _tests(seeds, kept, binary), tuple(said)
    )


def _same(weights: Sequence[float]) -> bool:
    return all(math.isclose(weight, weights[0]) for weight in weights)


Pairs = Sequence[tuple[Units, Units]]
"""Units of the two arms, for each seed."""


def _whole(seeds: Sequence[int], pairs: Pairs) -> Difference:
    """The difference over all items, with intervals over seeds, and over seeds and items."""
    arms = dict(zip(("first", "second"), zip(*pairs, strict=True), strict=True))
    values = {arm: {seed: _ratio(u) for seed, u in zip(seeds, units, strict=True)} for arm, units in arms.items()}
    influences = {
        (arm, seed): found
        for arm, units in arms.items()
        for seed, u in zip(seeds, units, strict=True)
        if (found := influence(u)) is not None
    }
    sample = contrast({"second": 1.0, "first": -1.0}, values, influences)
    whole = estimates({"": sample})[""]
    assert whole is not None
    return whole


def _ratio(units: Units) -> float:
    return math.fsum(total for total, _ in units.values()) / math.fsum(weight for _, weight in units.values())


def _differences(
    seeds: Sequence[int], pairs: Pairs, groups: Mapping[str, Sequence[str]], binary: bool
) -> tuple[ItemDifference, ...]:
    """A difference for each group of items, by the size of its part. binary: test by signs, not by Student's t."""
    whole = [[math.fsum(weight for _, weight in units.values()) for units in pair] for pair in pairs]
    samples: dict[str, Sample] = {}
    rows: dict[str, tuple[float, tuple[float, float], float]] = {}
    for name, members in groups.items():
        sums = [[_sum(units, members) for units in pair] for pair in pairs]
        first, second = ([pair[arm][0] / pair[arm][1] for pair in sums] for arm in (0, 1))
        shares = [
            [weight / of for (_, weight), of in zip(pair, wholes, strict=True)]
            for pair, wholes in zip(sums, whole, strict=True)
        ]
        parts = [b * share_b - a * share_a for a, b, (share_a, share_b) in zip(first, second, shares, strict=True)]
        share = fmean(each for pair in shares for each in pair)
        # A mean over more tokens scatters less: the variances of items are comparable times their shares.
        samples[name] = Sample({seed: b - a for seed, a, b in zip(seeds, first, second, strict=True)}, 1 / share)
        rows[name] = share, (fmean(first), fmean(second)), fmean(parts)
    estimated = {name: d for name, d in estimates(samples).items() if d is not None}
    if binary:  # no interval by Student's t for answers that are right or wrong
        raw = {name: _sign_p([*sample.values.values()]) for name, sample in samples.items()}
        estimated = {name: Difference(d.mean, d.seeds, None, None) for name, d in estimated.items()}
    else:
        raw = {name: d.p() for name, d in estimated.items() if d.error is not None}
    adjusted = fdr_bh(raw) if len(seeds) > 1 else {}
    found = [
        ItemDifference(name, *rows[name][:2], d, rows[name][2], adjusted.get(name)) for name, d in estimated.items()
    ]
    return tuple(sorted(found, key=lambda each: -abs(each.part)))


def _sum(units: Units, members: Sequence[str]) -> tuple[float, float]:
    return math.fsum(units[name][0] for name in members), math.fsum(units[name][1] for name in members)


def _sign_p(differences: Sequence[float]) -> float:
    """Two-sided exact p-value that a difference is as often positive as negative, zeros left out."""
    from scipy.stats import binomtest

    positive, negative = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return float(binomtest(positive, positive + negative).pvalue) if positive + negative else 1.0


def _tests(seeds: Sequence[int], pairs: Pairs, binary: bool) -> tuple[ItemTest, ...]:
    """McNemar's test of each seed for right or wrong answers; with several seeds, or for losses, flips of signs."""
    import numpy as np

    # seeds x arms x items x (sum, weight)
    table = np.array([[list(units.values()) for units in pair] for pair in pairs], dtype=np.float64)
    parts = table[..., 0] / table[..., 1].sum(axis=2, keepdims=True)
    differences = parts[:, 1] - parts[:, 0]
    tests = []
    if binary:
        tests = [
            ItemTest("McNemar", (seed,), *_signs(each), _sign_p(each))
            for seed, each in zip(seeds, differences, strict=True)
        ]
    if not binary or len(seeds) > 1:
        mean = differences.mean(axis=0)
        tests.append(ItemTest("sign flips", tuple(seeds), *_signs(mean), _flip_p(mean)))
    return tuple(tests)


def _signs(differences: Any) -> tuple[int, int]:
    return int((differences < 0).sum()), int((differences > 0).sum())


def _flip_p(differences: Any) -> float:
    """Two-sided p-value of a sum of zero, by random signs of the items' differences."""
    import numpy as np
    from scipy.stats import permutation_test

    def total(values: Any, axis: int = -1) -> Any:
        return values.sum(axis=axis)

    found = permutation_test(
        (differences,),
        total,
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        batch=max(1, BATCH // len(differences)),
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)

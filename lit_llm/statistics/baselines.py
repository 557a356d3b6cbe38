"""Differences of every arm from its baseline, by the procedure that the study asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lit_llm.statistics.contrasts import Sample, contrast, estimates, with_documents
from lit_llm.statistics.document_noise import Influences
from lit_llm.statistics.mixed_model import mixed_differences
from lit_llm.statistics.paired import Difference, Spread, Values, Variance
from lit_llm.statistics.pooling import pooled_variance

Differences = dict[str, Difference | None]


@dataclass(frozen=True)
class Noise:
    """Sources of the intervals of a comparison."""

    variance: Variance = "moderated"
    influences: Influences = field(default_factory=dict)
    """Influences of the runs' documents; empty where they are not recorded."""
    families: Mapping[str, str] = field(default_factory=dict)
    """{arm: its model's family}, for `mixed`."""


def differences_from_baselines(
    values: Mapping[str, Values], baselines: Mapping[str, str], noise: Noise = Noise()
) -> Differences:
    """The difference of every arm from its baseline; a baseline without a baseline of its own is left out.

    values: {arm: {seed: value}}; baselines: {arm: the arm it is compared with}.
    """
    differences: Differences = {}
    for baseline in dict.fromkeys(baselines.values()):
        # In a step-wise comparison a baseline has a baseline too.
        block = {arm: values[arm] for arm in values if arm == baseline or baselines[arm] == baseline}
        if baseline in block:
            differences |= block_differences(block, baseline, noise)
    return differences


def block_differences(block: Mapping[str, Values], baseline: str, noise: Noise = Noise()) -> Differences:
    """Differences of every arm of a block from its baseline.

    Arms that share their runs (DecLLM and DecLLM + BiAttn after pretraining) count as one.
    """
    arms = [arm for arm in block if arm != baseline]
    samples = {arm: contrast({arm: 1.0, baseline: -1.0}, block, noise.influences) for arm in arms}
    differences = estimates(samples, noise.variance)
    if noise.variance == "mixed":
        return _mixed(differences, samples, block, baseline, noise)
    if noise.variance == "pooled":
        distinct = {tuple(sorted(values.items())): values for values in block.values()}
        return pooled_contrasts(differences, samples, list(distinct.values()))
    return differences


def pooled_contrasts(differences: Differences, samples: Mapping[str, Sample], arms: Sequence[Values]) -> Differences:
    """The same estimates with the pooled variance of all arms, where it can be estimated. arms: the runs of each."""
    common = pooled_variance(arms)
    if common is None:
        return differences
    variance, degrees = common
    return {
        name: d
        and _with_pooled_spread(d, Spread(math.sqrt(samples[name].scale * variance / d.seeds), degrees), samples[name])
        for name, d in differences.items()
    }


def _mixed(
    differences: Differences, samples: Mapping[str, Sample], block: Mapping[str, Values], baseline: str, noise: Noise
) -> Differences:
    estimated = mixed_differences(block, baseline, noise.families)
    return {
        arm: d
        and (_with_pooled_spread(replace(d, mean=fit.mean), Spread(fit.error, fit.degrees), samples[arm]) if fit else d)
        for arm, d in differences.items()
        for fit in [estimated.get(arm)]
    }


def _with_pooled_spread(d: Difference, spread: Spread, sample: Sample) -> Difference:
    """The difference with an interval whose variance is estimated from all arms."""
    if d.error is None or not any(sample.values.values()):
        return d  # one seed, or the same runs as the baseline
    return replace(with_documents(d, spread, sample), pooled=True)

"""Every arm against its baseline, by the procedure that the study asks for."""

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
    """Where the intervals of a comparison come from."""

    variance: Variance = "moderated"
    influences: Influences = field(default_factory=dict)
    """Of the runs' documents; empty where they are not recorded."""
    families: Mapping[str, str] = field(default_factory=dict)
    """{arm: its model's family}, for `mixed`."""


def differences_from_baselines(
    values: Mapping[str, Values], baselines: Mapping[str, str], noise: Noise = Noise()
) -> Differences:
    """The difference of every arm from its baseline, baseline by baseline; a baseline without one is left out.

    values: {arm: {seed: value}}; baselines: {arm: the arm it is compared with}.
    """
    found: Differences = {}
    for baseline in dict.fromkeys(baselines.values()):
        # A baseline may have one of its own, in a step-wise comparison.
        block = {arm: values[arm] for arm in values if arm == baseline or baselines[arm] == baseline}
        if baseline in block:
            found |= block_differences(block, baseline, noise)
    return found


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
    """The same estimates with the variance that all arms have in common, where there is one. arms: each one's runs."""
    common = pooled_variance(arms)
    if common is None:
        return differences
    variance, degrees = common
    return {
        name: d and _shared(d, Spread(math.sqrt(samples[name].scale * variance / d.seeds), degrees), samples[name])
        for name, d in differences.items()
    }


def _mixed(
    differences: Differences, samples: Mapping[str, Sample], block: Mapping[str, Values], baseline: str, noise: Noise
) -> Differences:
    known = mixed_differences(block, baseline, noise.families)
    return {
        arm: d and (_shared(replace(d, mean=own.mean), Spread(own.error, own.degrees), samples[arm]) if own else d)
        for arm, d in differences.items()
        for own in [known.get(arm)]
    }


def _shared(d: Difference, spread: Spread, sample: Sample) -> Difference:
    """An interval whose variance other arms have a full part in."""
    if d.error is None or not any(sample.values.values()):
        return d  # of one seed, or of the baseline's own runs
    return replace(with_documents(d, spread, sample), pooled=True)

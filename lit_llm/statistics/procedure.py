"""Statistical procedure of a study: variance, correction and margin, with notes on their assumptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lit_llm.statistics.multiple_comparisons import Correction
from lit_llm.statistics.paired import Variance


@dataclass(frozen=True)
class Procedure:
    """Choices by which differences are judged; see `compare` in a study's file."""

    variance: Variance = "moderated"
    correction: Correction = "none"
    margin: float | None = None
    families: Mapping[str, str] = field(default_factory=dict)
    """{arm: its model's family}, for the mixed model."""


ASSUMPTIONS: Mapping[Variance, str] = {
    "moderated": "intervals: each uses the spread of its arm's own seed-by-seed differences, steadied a little by the "
    "other arms' spread",
    "paired": "intervals: each uses the spread of its arm's own seed-by-seed differences alone",
    "pooled": "intervals: one variance for all arms, which assumes that they scatter alike and react to a seed alike",
    "mixed": "intervals: a mixed model, which assumes that each family reacts to a seed as one and that all arms "
    "scatter alike",
}
_BONFERRONI = (
    "intervals hold for all {n} at once (Bonferroni's), which is wider: a verdict goes by p, so the interval of a "
    "difference that is called may contain zero"
)
CORRECTIONS: Mapping[Correction, str] = {
    "none": "intervals are not adjusted for {n} comparisons: an arm with no true difference is still called different "
    "1 time in 20; see `compare.correction`",
    "holm": "p: adjusted for {n} comparisons by Holm's method; " + _BONFERRONI,
    "fdr_bh": "p: adjusted for {n} comparisons by Benjamini and Hochberg's method, so that of those below 0.05 at "
    "most 1 in 20 is expected to be false; " + _BONFERRONI,
    "dunnett": "intervals and p: adjusted for {n} comparisons by Dunnett's method, which assumes that all arms scatter "
    "alike",
}

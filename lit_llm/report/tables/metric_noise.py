"""Signal and noise of metrics, as a table."""

from __future__ import annotations

from lit_llm.report import text
from lit_llm.report.tables.table import Table
from lit_llm.statistics.estimates import Estimate
from lit_llm.studies.metric_noise import MetricNoise, NoiseReport

NAME = "noise"
NOTES = (
    "signal: spread of the arms' means; noise: scatter of a run over seeds, paired: without what a seed does to all "
    "arms, checkpoints: over the last validations of a run; all relative to the mean",
    "ratio: signal / paired noise. Differences of two arms are blurred by 1.41 times the paired noise / root of seeds",
    "the signal's interval holds for all pairs of arms at once (Tukey): where it begins at 0, no two arms are shown to "
    "differ. Intervals assume that arms scatter alike",
)
DECISIONS = (
    "decides: share of the pairs of arms that this size orders as the largest does; the interval is for other arms"
)


def noise_table(report: NoiseReport, title: str = "") -> Table:
    """A row for each metric at each size."""
    several = len({row.size for row in report.rows}) > 1
    compared = any(row.decisions for row in report.rows)
    head = ["metric", *["size"] * several, "params", "arms", "seeds", "mean", "ratio", *["decides"] * compared]
    head += ["signal", "noise", "paired", "checkpoints"]
    rows = [_row(row, several, compared) for row in report.rows]
    notes = (*NOTES, *[DECISIONS] * compared) if rows else ()
    return Table(NAME, title, head, rows, len(head), (*notes, *report.notes), 1 + several, keys=1 + several)


def _row(row: MetricNoise, several: bool, compared: bool) -> list[str]:
    found = row.values
    numbers = [text.count(row.parameters), str(found.arms), str(found.seeds), text.value(found.mean)]
    relative = [_share(each) for each in (found.signal, found.noise, found.paired_noise)]
    alone = "–" if row.checkpoint_noise is None else f"{row.checkpoint_noise:.2%}"
    decides = _whole(row.decisions.share) if row.decisions else "–"
    name = [row.metric, *[row.size] * several]
    return [*name, *numbers, text.short(found.ratio), *[decides] * compared, *relative, alone]


def _share(estimate: Estimate | None) -> str:
    """1.23% [0.80, 2.10]."""
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.2%}"
    return f"{estimate.value:.2%} [{100 * estimate.low:.2f}, {100 * estimate.high:.2f}]"


def _whole(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.0%}"
    return f"{estimate.value:.0%} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"

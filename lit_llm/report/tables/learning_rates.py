"""Tables of learning rates: sensitivity of the groups, and each measure by learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lit_llm.report import text
from lit_llm.report.tables.table import Table, slug, without
from lit_llm.statistics.learning_rates import LearningRates, LRRow
from lit_llm.statistics.lr_sensitivity import ArmAtRate, Range, Sensitivity


def lr_tables(rates: LearningRates, metric: str) -> Iterator[Table]:
    """Final loss by learning rate, sensitivity and range of each group, then spikes, logits and gradients."""
    by = f"by {rates.factor}"
    yield _by_lr(rates, "metric", f"{metric} {by}", _loss)
    yield _groups(rates, metric)
    for name, title, cell_text in (
        ("spikes", "loss spikes per run", lambda cell: "–" if cell.spikes is None else f"{cell.spikes:.2g}"),
        ("logits", "largest attention logit of all runs", lambda cell: text.short(cell.max_attention_logit)),
        ("gradients", "largest gradient norm of all runs", lambda cell: text.short(cell.max_grad_norm)),
    ):
        table = _by_lr(rates, name, f"{title}, {by}", cell_text)
        if any(value not in ("–", "0") for row in table.rows for value in row[1:]):
            yield table


def _by_lr(rates: LearningRates, name: str, title: str, cell_text: Callable[[ArmAtRate], str]) -> Table:
    lrs = rates.lrs
    rows = []
    for row in rates.rows:
        cells = {cell.lr: cell_text(cell) for cell in row.cells}
        rows.append([row.group, *(cells.get(lr, "–") for lr in lrs)])
    head = ["arm", *(f"{lr:g}" for lr in lrs)]
    return Table(f"{slug(rates.factor)}-{name}", title, head, rows, 1 + (len(lrs) + 1) // 2)


def _loss(cell: ArmAtRate) -> str:
    """`5.123 †1`: mean over the seeds that did not diverge, and number of seeds that did."""
    parts = [text.value(cell.mean)] * (cell.mean is not None) + [f"†{len(cell.diverged)}"] * bool(cell.diverged)
    return " ".join(parts)


GROUPS = ("arm", "LR sensitivity [95%]", "difference [95%]", "baseline", "best lr", "range", "decades", "capped")


def _groups(rates: LearningRates, metric: str) -> Table:
    """Sensitivity of each group; the baseline has a column where it is not the same for all groups."""
    hidden = {"baseline"} if len({row.baseline for row in rates.rows}) == 1 else set()
    head, rows = without(hidden, GROUPS, [_group(row) for row in rates.rows])
    title = f"sensitivity of {metric} to {rates.factor}"
    return Table(f"{slug(rates.factor)}-sensitivity", title, head, rows, head.index("best lr"), rates.notes)


def _group(row: LRRow) -> list[str]:
    baseline, sensitivity = row.group == row.baseline, row.sensitivity
    return [
        row.group,
        _sensitivity(sensitivity),
        text.difference(row.difference, "baseline" if baseline else "–"),
        "" if baseline else row.baseline,
        "–" if row.best is None else f"{row.best:g}",
        _range(row.range),
        "–" if row.range is None else f"{row.range.decades:.1f}",
        "–" if sensitivity is None else str(sensitivity.capped),
    ]


def _sensitivity(value: Sensitivity | None) -> str:
    if value is None or value.mean is None:
        return "–"
    if value.low is None or value.high is None:
        return text.value(value.mean)
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _range(lrs: Range | None) -> str:
    if lrs is None:
        return "–"
    return f"{lrs.low:g}" if lrs.low == lrs.high else f"{lrs.low:g} to {lrs.high:g}"

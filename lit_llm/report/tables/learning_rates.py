"""Tables of what learning rates do: one of the groups, and for each thing that was measured one by learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lit_llm.report import text
from lit_llm.report.tables.table import Table, slug, without
from lit_llm.statistics.learning_rates import LearningRates, LRRow
from lit_llm.statistics.lr_sensitivity import ArmAtRate, Range, Sensitivity


def lr_tables(found: LearningRates, metric: str) -> Iterator[Table]:
    """Final loss by learning rate, sensitivity and range of each group, then spikes, logits and gradients."""
    by = f"by {found.factor}"
    yield _by_lr(found, "metric", f"{metric} {by}", _loss)
    yield _groups(found, metric)
    for name, title, shown in (
        ("spikes", "loss spikes per run", lambda cell: "–" if cell.spikes is None else f"{cell.spikes:.2g}"),
        ("logits", "largest attention logit of all runs", lambda cell: text.short(cell.max_attention_logit)),
        ("gradients", "largest gradient norm of all runs", lambda cell: text.short(cell.max_grad_norm)),
    ):
        table = _by_lr(found, name, f"{title}, {by}", shown)
        if any(value not in ("–", "0") for row in table.rows for value in row[1:]):
            yield table


def _by_lr(found: LearningRates, name: str, title: str, shown: Callable[[ArmAtRate], str]) -> Table:
    lrs = found.lrs
    rows = []
    for row in found.rows:
        cells = {cell.lr: shown(cell) for cell in row.cells}
        rows.append([row.group, *(cells.get(lr, "–") for lr in lrs)])
    head = ["arm", *(f"{lr:g}" for lr in lrs)]
    return Table(f"{slug(found.factor)}-{name}", title, head, rows, 1 + (len(lrs) + 1) // 2)


def _loss(cell: ArmAtRate) -> str:
    """`5.123 †1`: the mean of those that did not diverge, and the number of those that did."""
    parts = [text.value(cell.mean)] * (cell.mean is not None) + [f"†{len(cell.diverged)}"] * bool(cell.diverged)
    return " ".join(parts)


GROUPS = ("arm", "LR sensitivity [95%]", "difference [95%]", "baseline", "best lr", "range", "decades", "capped")


def _groups(found: LearningRates, metric: str) -> Table:
    """With which group one is compared is said where that is not the same for all."""
    hidden = {"baseline"} if len({row.baseline for row in found.rows}) == 1 else set()
    head, rows = without(hidden, GROUPS, [_group(row) for row in found.rows])
    title = f"sensitivity of {metric} to {found.factor}"
    return Table(f"{slug(found.factor)}-sensitivity", title, head, rows, head.index("best lr"), found.notes)


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


def _sensitivity(found: Sensitivity | None) -> str:
    if found is None or found.mean is None:
        return "–"
    if found.low is None or found.high is None:
        return text.value(found.mean)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _range(found: Range | None) -> str:
    if found is None:
        return "–"
    return f"{found.low:g}" if found.low == found.high else f"{found.low:g} to {found.high:g}"

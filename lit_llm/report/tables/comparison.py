"""The comparison of a study as tables: arms, effects of factors, before against after, cost, rates, scaling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType

from lit_llm.report import text
from lit_llm.report.tables.anova import anova_tables
from lit_llm.report.tables.learning_rates import lr_tables
from lit_llm.report.tables.scaling import scaling_tables
from lit_llm.report.tables.scaling_gate import gate_tables
from lit_llm.report.tables.table import Table, slug, stacked, without
from lit_llm.runs.stage_graph import validation_metric
from lit_llm.statistics.before_after import BeforeAfter
from lit_llm.statistics.comparison import Comparison, Row
from lit_llm.statistics.effects import Effects
from lit_llm.statistics.pareto import ParetoFront
from lit_llm.statistics.verdicts import LOST
from lit_llm.studies.design.factors import short_names


def comparison_tables(comparison: Comparison) -> list[Table]:
    """All tables for which the study has numbers; the first is of its arms."""
    return [*_tables(comparison)]


def render_comparison(comparison: Comparison, width: int) -> RenderableType:
    """The tables of a comparison for the terminal."""
    return Group(*stacked(comparison_tables(comparison), width))


def _tables(comparison: Comparison) -> Iterator[Table]:
    yield _arms(comparison)
    for group in comparison.effects:
        yield _effects(group, comparison)
    if comparison.before_after is not None:
        yield change_table(comparison.before_after)
    if comparison.front is not None:
        yield _front(comparison.front)
    for table in comparison.anova:
        yield from anova_tables(table, comparison.metric, len(comparison.anova) > 1, redundant_columns(comparison))
    for rates in comparison.learning_rates:
        yield from lr_tables(rates, validation_metric(comparison.metric))
    if comparison.scaling is not None:
        yield from scaling_tables(comparison.scaling)
    if comparison.gate is not None:
        yield from gate_tables(comparison.gate)


EFFECT = ("arm", "n", "{metric}", "difference [95%]", "± seeds", "p", "verdict", "baseline")
COST = ("params", "FLOPs", "tok/s", "spikes")


def _arms(comparison: Comparison) -> Table:
    """Mean, difference and cost of every arm.

    The baseline has a column where it is not the same for all arms; p and the verdict where they add to the interval.
    """
    head = [name.format(metric=comparison.metric) for name in (*EFFECT, *COST)]
    hidden = ({"baseline"} if len({row.baseline for row in comparison.rows}) == 1 else set()) | redundant_columns(
        comparison
    )
    hidden |= set() if any(row.difference and row.difference.documents for row in comparison.rows) else {"± seeds"}
    head, rows = without(hidden, head, [*map(_row, comparison.rows)])
    return Table("arms", "", head, rows, len(head) - len(COST), comparison.notes)


def redundant_columns(comparison: Comparison) -> set[str]:
    """Columns that add nothing to the interval: p without a correction, the verdict without a margin too."""
    hidden = {"p"} if comparison.correction == "none" else set()
    lost = any(row.verdict == LOST for row in comparison.rows)
    plain = comparison.correction == "none" and comparison.margin is None and not lost
    return hidden | ({"verdict"} if plain else set())


def _row(row: Row) -> list[str]:
    baseline = "baseline" if row.arm == row.baseline else "–"
    return [
        row.arm,
        _seeds(row),
        text.mean_and_deviation(row.mean, row.deviation),
        text.difference(row.difference, baseline),
        text.seeds_half(row.difference),
        text.p_value(row.p),
        row.verdict or "",
        "" if row.arm == row.baseline else row.baseline,
        text.count(row.parameters) if row.parameters else "–",
        text.short(row.train_flops),
        text.short(row.tokens_per_second),
        "–" if row.spikes is None else f"{row.spikes:.2g}",
    ]


def _seeds(row: Row) -> str:
    """Number of seeds, and of runs in other states than done: `3`, or `2 +1 diverged`."""
    rest = [f"+{number} {state}" for state, number in row.states.items() if state != "done" and number]
    return " ".join([str(row.seeds), *rest])


def _effects(group: Effects, comparison: Comparison) -> Table:
    """Effects of a two-level design, with a column of aliases where there are any."""
    where = f" in {group.group}" if len(comparison.effects) > 1 else ""
    title = f"effects on {comparison.metric}{where}: second level minus first, {group.arms} arms, "
    title += text.several(len(group.seeds), "seed")
    short = short_names(list(dict.fromkeys(name for row in group.rows for name in row.factors)))
    hidden = redundant_columns(comparison) | (set() if any(row.aliases for row in group.rows) else {"aliased with"})
    hidden |= set() if any(row.effect and row.effect.documents for row in group.rows) else {"± seeds"}
    head = ["", "factor", "effect [95%]", "± seeds", "p", "verdict", "aliased with"]
    rows = []
    for row in group.rows:
        levels = f": {' → '.join(row.levels)}" if row.levels else ""
        label = " × ".join(short[name] for name in row.factors) + levels
        cells = [text.difference(row.effect), text.seeds_half(row.effect), text.p_value(row.p)]
        rows.append([row.name, label, *cells, row.verdict or "", row.aliases])
    head, rows = without(hidden, head, rows)
    return Table(_table_name("effects", comparison.effects, group.group), title, head, rows, len(head), group.notes, 4)


def _table_name(what: str, groups: Sequence[object], group: str) -> str:
    return f"{what}-{slug(group)}" if len(groups) > 1 else what


CHANGE = ("arm", "before", "after", "difference before", "after [95%]", "changed by [95%]")


def change_table(changes: BeforeAfter) -> Table:
    """The arms before and after finetuning."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    rows = []
    for row in changes.rows:
        empty = "baseline" if row.arm == row.baseline else "–"
        before = text.difference(row.difference_before, empty)
        if (d := row.difference_before) and d.mean == 0 and d.low == d.high:
            before = "the same runs"
        after = text.difference(row.difference_after, "")
        rows.append([row.arm, number(row.before), number(row.after), before, after, text.difference(row.change, "")])
    notes = ["changed by: how much finetuning has moved an arm against its baseline"]
    if changes.rank_correlation is not None:
        arms = sum(row.before is not None and row.after is not None for row in changes.rows)
        notes.append(f"rank correlation of {arms} arms before and after (Spearman): {changes.rank_correlation:+.2f}")
    return Table("before-after", f"{changes.metric} before and after finetuning", CHANGE, rows, 4, tuple(notes))


def _front(front: ParetoFront) -> Table:
    """The arms in order of cost, with the Pareto front."""
    figure = front.figure.replace("_", " ").replace("flops", "FLOPs")
    rows = []
    for point in front.points:
        place = f"below {point.beaten_by}" if point.beaten_by else "front"
        rows.append([point.arm, text.short(point.cost), text.value(point.value), place])
    return Table("front", f"{front.metric} against {figure}", ["arm", figure, "mean", ""], rows, 4)

"""Tables and sentences of a study with printed names; the arms of a factorial become columns of factors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lit_llm.config.metrics import direction
from lit_llm.report.answer import answer
from lit_llm.report.shared_settings import shared_by_all
from lit_llm.report.tables.comparison import comparison_tables
from lit_llm.report.tables.table import Table
from lit_llm.statistics.comparison import Comparison, Row
from lit_llm.studies.load import Ablation
from lit_llm.studies.names import NONE, ArmName, Names

BETTER = "better"
"""Verdict of arms whose mean may be bold."""
BOLD = "bold: of the arms with one baseline, the best mean of those that are shown to be better than it"


@dataclass(frozen=True)
class PrintedStudy:
    """A comparison with printed names; its names, sentences and tables are computed once."""

    ablation: Ablation
    comparison: Comparison

    @cached_property
    def names(self) -> Names:
        return Names(self.ablation)

    @cached_property
    def renamed(self) -> Comparison:
        """The comparison with printed names, its rows in the order of the strata."""
        return self.names.put_into(self.ordered)

    @cached_property
    def ordered(self) -> Comparison:
        """The comparison with its rows in the order of the strata."""
        return replace(self.comparison, rows=_by_stratum(self.comparison.rows, self.names))

    @cached_property
    def answer(self) -> tuple[str, ...]:
        # Sentences name arms in the study's order, not in the order of the strata.
        same = self.ordered.rows == self.comparison.rows
        renamed = self.renamed if same else self.names.put_into(self.comparison)
        return tuple(self.names.text(sentence) for sentence in answer(renamed))

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        names, comparison = self.names, self.ordered
        plain, renamed = comparison_tables(comparison), comparison_tables(self.renamed)
        first, *others = [replace(printed(new, names), name=old.name) for old, new in zip(plain, renamed, strict=True)]
        first = replace(first, above=shared_by_all(self.ablation), bold=_bold(first, comparison, names))
        return (_without_empty_columns(_without_common_baseline(first, names)), *others)


_latest: list[PrintedStudy] = []


def printed_study(ablation: Ablation, comparison: Comparison) -> PrintedStudy:
    """The printed study of a comparison, cached.

    A report prints a comparison in the terminal, in Markdown, in LaTeX and on a page. With a thousand arms it takes a
    second to compute, so the latest one is kept.
    """
    if not _latest or _latest[0].ablation is not ablation or _latest[0].comparison is not comparison:
        _latest[:] = [PrintedStudy(ablation, comparison)]
    return _latest[0]


def printed_answer(ablation: Ablation, comparison: Comparison) -> list[str]:
    """The sentences of the answer."""
    return list(printed_study(ablation, comparison).answer)


def printed_tables(ablation: Ablation, comparison: Comparison) -> list[Table]:
    """The tables of the comparison; the first has a line on common settings, and the best means in bold.

    A table's `name` keeps the study's names, so that files and anchors do not depend on labels.
    """
    return list(printed_study(ablation, comparison).tables)


def _without_empty_columns(table: Table) -> Table:
    """The table without columns that are empty in all rows."""
    kept = [
        at for at in range(len(table.head)) if at < table.keys or any(row[at] not in ("", NONE) for row in table.rows)
    ]
    return _select_columns(table, kept)


def _select_columns(table: Table, places: Sequence[int]) -> Table:
    """Some columns of a table, the first of which name its rows."""
    return replace(
        table,
        head=[table.head[at] for at in places],
        rows=[[row[at] for at in places] for row in table.rows],
        first=sum(at < table.first for at in places),
        left=sum(at < table.left for at in places),
        bold=tuple((row, places.index(column)) for row, column in table.bold if column in places),
    )


def _by_stratum(rows: Sequence[Row], names: Names) -> tuple[Row, ...]:
    """Rows sorted by stratum, in the order of its levels; unchanged without strata."""
    if not names.strata or not names.spread:
        return tuple(rows)
    arms, factors = {arm.name: arm for arm in names.ablation.arms}, names.ablation.factors

    def place(row: Row) -> list[int]:
        levels = names.stratum(arms[row.arm])
        return [factors[name].index(level) for name, level in zip(names.strata, levels, strict=False)]

    return tuple(sorted(rows, key=place))


def _bold(table: Table, comparison: Comparison, names: Names) -> tuple[tuple[int, int], ...]:
    """Cells in bold: for each baseline, the best mean among the arms that are significantly better than it.

    Whether the best differs from the second best is not tested, and the note does not claim it.
    """
    metric, best = names.text(comparison.metric), dict[str, tuple[float, int]]()
    if metric not in table.head:
        return ()
    sign = -1.0 if direction(comparison.metric) == "higher" else 1.0
    for at, row in enumerate(comparison.rows):
        if row.verdict == BETTER and row.mean is not None:
            best[row.baseline] = min(best.get(row.baseline, (math.inf, at)), (sign * row.mean, at))
    column = list(table.head).index(metric)
    return tuple((at, column) for _, at in best.values())


def _without_common_baseline(table: Table, names: Names) -> Table:
    """The table with a note in place of the column `baseline`, where each stratum has the same arm as baseline."""
    arms = {arm.name: arm for arm in names.ablation.arms}
    baselines = {arms[arm.baseline].group for arm in arms.values()}
    if "baseline" not in table.head or not names.strata or len(baselines) > 1:
        return table
    baseline = arms[names.ablation.arms[0].baseline]
    first = {name: levels[0] for name, levels in names.ablation.factors.items() if name not in names.strata}
    levels = [f"{names.factor(name)} {names.level(name, level)}" for name, level in first.items()]
    where = [names.arm(baseline.group)] * names.grouped + levels * names.spread
    note = f"each arm is compared with {', '.join(where)} at its own {' and '.join(map(names.factor, names.strata))}"
    removed = list(table.head).index("baseline")
    return replace(
        _select_columns(table, [at for at in range(len(table.head)) if at != removed]), notes=(note, *table.notes)
    )


def with_arm_names(table: Table, names: Names) -> Table:
    """The table with printed names in its first column, which has the names of arms."""
    return replace(table, rows=[[names.arm(first), *rest] for first, *rest in table.rows])


def printed(table: Table, names: Names) -> Table:
    """The table with printed names, and with a column for each factor in place of the arm."""
    table = split_arms(table)
    return replace(
        table,
        title=names.text(table.title),
        head=[names.text(cell) for cell in table.head],
        notes=tuple(map(names.text, table.notes)),
    )


def split_arms(table: Table) -> Table:
    """The table with a column for each factor in place of the arm, where arms are named by levels of factors."""
    cells = [row[0].columns if isinstance(row[0], ArmName) else {} for row in table.rows]
    heads = list(dict.fromkeys(head for columns in cells for head in columns))
    if not heads or heads == ["arm"]:
        return table
    rows = []
    for columns, (first, *rest) in zip(cells, table.rows, strict=True):
        # An arm without levels of factors has its name in the first column.
        key = [columns.get(head, NONE) for head in heads] if columns else [first, *[NONE] * (len(heads) - 1)]
        rows.append([*key, *rest])
    more = len(heads) - 1
    return replace(
        table,
        head=[*heads, *table.head[1:]],
        rows=rows,
        first=table.first + more,
        left=table.left + more,
        keys=len(heads),
        bold=tuple((row, column + more) for row, column in table.bold),
    )


# --- LaTeX ------------------------------------------------------------------------------------------------------------


def paper_tables(ablation: Ablation, comparison: Comparison) -> list[Table]:
    """The tables for LaTeX, with captions, the chosen columns of the arms, and notes without keys."""
    arms, *others = printed_tables(ablation, comparison)
    metric = printed_study(ablation, comparison).names.text(comparison.metric)
    arms = _choose_columns(arms, ablation.study.compare.columns, metric)
    arms = replace(arms, title=arms.title or f"{metric} of the arms", notes=(*arms.notes, *[BOLD] * bool(arms.bold)))
    return [_without_keys(table) for table in (arms, *others)]


def _choose_columns(table: Table, wanted: Sequence[str], metric: str) -> Table:
    """The table with the columns that name the row, then the wanted ones that exist."""
    places = list(range(table.keys))
    for name in wanted:
        begins = metric if name == "mean" else name
        places += [
            at
            for at in range(table.keys, len(table.head))
            if table.head[at] == begins or _begins_with(table.head[at], begins)
        ]
    return _select_columns(table, places)


def _begins_with(head: str, name: str) -> bool:
    """True where a heading is a column's name with an addition, as `difference [95%]` is."""
    return re.match(rf"{re.escape(name)}\b[ ,[(]", head) is not None


_KEY = re.compile(r"`[^`]*`|\b(?:compare|grid|pretrain|finetune|evaluate|model|match)\.[a-z_]")


def _without_keys(table: Table) -> Table:
    """The table without clauses in its notes that refer to keys of the study file, which a paper's reader lacks."""
    notes = []
    for note in table.notes:
        clauses = [clause for clause in re.split(r";\s+|(?<=\.)\s+", note) if not _KEY.search(clause)]
        notes += ["; ".join(clause.rstrip(".") for clause in clauses)] * bool(clauses)
    return replace(table, notes=tuple(notes), above=table.above)

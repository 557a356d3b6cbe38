"""The tables and sentences of a study with the names that a paper prints; a factorial's arms as columns of factors."""

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
"""The verdict by which a mean is bold."""
BOLD = "bold: of the arms with one baseline, the best mean of those that are shown to be better than it"


@dataclass(frozen=True)
class PrintedStudy:
    """A comparison with the study's printed names; names, sentences and tables are each made once."""

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
        # In the study's order of arms, by which sentences name those that are not ranked.
        same = self.ordered.rows == self.comparison.rows
        renamed = self.renamed if same else self.names.put_into(self.comparison)
        return tuple(self.names.text(sentence) for sentence in answer(renamed))

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        names, comparison = self.names, self.ordered
        plain, renamed = comparison_tables(comparison), comparison_tables(self.renamed)
        first, *others = [replace(printed(new, names), name=old.name) for old, new in zip(plain, renamed, strict=True)]
        first = replace(first, above=shared_by_all(self.ablation), bold=_bold(first, comparison, names))
        return (_known(_against(first, names)), *others)


_latest: list[PrintedStudy] = []


def printed_study(ablation: Ablation, comparison: Comparison) -> PrintedStudy:
    """The printed study of two objects: for one comparison the same, wherever a report prints it.

    A report prints a comparison in the terminal, in Markdown, in LaTeX and on a page; of a thousand arms it takes a
    second to make, so the latest one is kept.
    """
    if not _latest or _latest[0].ablation is not ablation or _latest[0].comparison is not comparison:
        _latest[:] = [PrintedStudy(ablation, comparison)]
    return _latest[0]


def printed_answer(ablation: Ablation, comparison: Comparison) -> list[str]:
    """The sentences of the answer."""
    return list(printed_study(ablation, comparison).answer)


def printed_tables(ablation: Ablation, comparison: Comparison) -> list[Table]:
    """The tables of the comparison; the first says what all arms share, and has in bold what is shown to be better.

    A table is called as it is with the study's names, so that files and places do not depend on labels.
    """
    return list(printed_study(ablation, comparison).tables)


def _known(table: Table) -> Table:
    """Without the columns in which nothing is known of any row."""
    kept = [
        at for at in range(len(table.head)) if at < table.keys or any(row[at] not in ("", NONE) for row in table.rows)
    ]
    return _of_columns(table, kept)


def _of_columns(table: Table, places: Sequence[int]) -> Table:
    """Some columns of a table, those that name its rows among them and first."""
    return replace(
        table,
        head=[table.head[at] for at in places],
        rows=[[row[at] for at in places] for row in table.rows],
        first=sum(at < table.first for at in places),
        left=sum(at < table.left for at in places),
        bold=tuple((row, places.index(column)) for row, column in table.bold if column in places),
    )


def _by_stratum(rows: Sequence[Row], names: Names) -> tuple[Row, ...]:
    """The rows of one stratum together, in the order of its levels; else as they are."""
    if not names.strata or not names.spread:
        return tuple(rows)
    arms, factors = {arm.name: arm for arm in names.ablation.arms}, names.ablation.factors

    def place(row: Row) -> list[int]:
        levels = names.stratum(arms[row.arm])
        return [factors[name].index(level) for name, level in zip(names.strata, levels, strict=False)]

    return tuple(sorted(rows, key=place))


def _bold(table: Table, comparison: Comparison, names: Names) -> tuple[tuple[int, int], ...]:
    """Of the arms that share a baseline, the best mean of those that are shown to be better than it; none elsewhere.

    That the best differs from the second best is not tested, and the note does not say so.
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


def _against(table: Table, names: Names) -> Table:
    """Without the column of what each arm is compared with, where a note says it of all: the same arm at each level of
    the strata, which are columns."""
    arms = {arm.name: arm for arm in names.ablation.arms}
    baselines = {arms[arm.baseline].group for arm in arms.values()}
    if "baseline" not in table.head or not names.strata or len(baselines) > 1:
        return table
    baseline = arms[names.ablation.arms[0].baseline]
    first = {name: levels[0] for name, levels in names.ablation.factors.items() if name not in names.strata}
    levels = [f"{names.factor(name)} {names.level(name, level)}" for name, level in first.items()]
    where = [names.arm(baseline.group)] * names.grouped + levels * names.spread
    note = f"each arm is compared with {', '.join(where)} at its own {' and '.join(map(names.factor, names.strata))}"
    gone = list(table.head).index("baseline")
    return replace(_of_columns(table, [at for at in range(len(table.head)) if at != gone]), notes=(note, *table.notes))


def with_names(table: Table, names: Names) -> Table:
    """A table whose first column are the names of arms, with their printed names in it."""
    return replace(table, rows=[[names.arm(first), *rest] for first, *rest in table.rows])


def printed(table: Table, names: Names) -> Table:
    """A table with printed names, whose rows of arms begin with their factors."""
    table = spread(table)
    return replace(
        table,
        title=names.text(table.title),
        head=[names.text(cell) for cell in table.head],
        notes=tuple(map(names.text, table.notes)),
    )


def spread(table: Table) -> Table:
    """The first column as several, where its cells are arms that are known by the levels of their factors."""
    cells = [row[0].columns if isinstance(row[0], ArmName) else {} for row in table.rows]
    heads = list(dict.fromkeys(head for columns in cells for head in columns))
    if not heads or heads == ["arm"]:
        return table
    rows = []
    for columns, (first, *rest) in zip(cells, table.rows, strict=True):
        # A name without cells, of an arm that no factor applies to, stands in the first column.
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
    """The tables for LaTeX: with a caption, the wanted columns of the arms, and notes that name no key."""
    arms, *others = printed_tables(ablation, comparison)
    metric = printed_study(ablation, comparison).names.text(comparison.metric)
    arms = _chosen(arms, ablation.study.compare.columns, metric)
    arms = replace(arms, title=arms.title or f"{metric} of the arms", notes=(*arms.notes, *[BOLD] * bool(arms.bold)))
    return [_without_keys(table) for table in (arms, *others)]


def _chosen(table: Table, wanted: Sequence[str], metric: str) -> Table:
    """The wanted columns that there are, after those that name the row."""
    places = list(range(table.keys))
    for name in wanted:
        begins = metric if name == "mean" else name
        places += [
            at for at in range(table.keys, len(table.head)) if table.head[at] == begins or _is(table.head[at], begins)
        ]
    return _of_columns(table, places)


def _is(head: str, name: str) -> bool:
    """`difference [95%]` is a difference, and so are those with other intervals."""
    return re.match(rf"{re.escape(name)}\b[ ,[(]", head) is not None


_KEY = re.compile(r"`[^`]*`|\b(?:compare|grid|pretrain|finetune|evaluate|model|match)\.[a-z_]")


def _without_keys(table: Table) -> Table:
    """Notes without the clauses that send to a key of the study file: a paper's reader has none."""
    notes = []
    for note in table.notes:
        clauses = [clause for clause in re.split(r";\s+|(?<=\.)\s+", note) if not _KEY.search(clause)]
        notes += ["; ".join(clause.rstrip(".") for clause in clauses)] * bool(clauses)
    return replace(table, notes=tuple(notes), above=table.above)

"""Two arms item by item, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_llm.report import text
from lit_llm.report.tables.table import Table
from lit_llm.statistics.item_differences import ItemComparison, ItemDifference, ItemTest

PARTS = "part: what the item adds to the whole difference; the parts of all items sum to it"
ADJUSTED = "p: over seeds, adjusted for all rows (Benjamini-Hochberg); intervals are not adjusted"


def item_tables(comparison: ItemComparison, most: int) -> Iterator[Table]:
    """The whole difference with the tests over items, the sources if there are several, and `most` items."""
    first, second = comparison.arms
    title = f"{comparison.metric}, {second} minus {first}"
    seeds, items = text.several(len(comparison.seeds), "seed"), text.several(len(comparison.items), "item")
    whole = f"{text.difference(comparison.whole)} over {seeds} and {items}"
    head = ["test over items", "seeds", "lower", "higher", "p"]
    rows = [_test(test) for test in comparison.tests]
    lines = (
        f"A: {first}; B: {second}",
        "lower, higher: items with a lower and with a higher value of B",
        "these tests are of other items, for the trained seeds; the interval above is of other seeds"
        + (" and other items" if comparison.whole.documents else ""),
        *comparison.notes,
    )
    yield Table("item-tests", title, head, rows, len(head), lines, above=whole)
    if comparison.sources:
        yield _table("sources", "by source", comparison.sources, ())
    more = len(comparison.items) - most
    adjusted = any(row.p is not None for row in comparison.items)
    notes = (PARTS, *[ADJUSTED] * adjusted, *[f"{more:,} more: --top, or --json"] * (more > 0))
    yield _table("items", "the items with the largest parts", comparison.items[:most], notes)


def _test(test: ItemTest) -> list[str]:
    return [test.method, ", ".join(map(str, test.seeds)), f"{test.lower:,}", f"{test.higher:,}", text.p_value(test.p)]


def _table(name: str, title: str, rows: Sequence[ItemDifference], notes: tuple[str, ...]) -> Table:
    adjusted = any(row.p is not None for row in rows)
    head = [name.removesuffix("s"), "weight", "A", "B", "B - A", "part", *["p"] * adjusted]
    return Table(name, title, head, [_row(row, adjusted) for row in rows], len(head), notes)


def _row(row: ItemDifference, adjusted: bool) -> list[str]:
    means = [text.value(mean) for mean in row.means]
    cells = [row.item, f"{row.share:.2%}", *means, text.difference(row.difference), f"{row.part:+.2g}"]
    return [*cells, *[text.p_value(row.p)] * adjusted]

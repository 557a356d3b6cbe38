"""A benchmark as tables: one for each comparison, with both variants of the heap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lit_llm.report import text
from lit_llm.report.tables.table import Table, slug
from lit_llm.statistics.estimates import joined

if TYPE_CHECKING:
    from lit_llm.bench.results import Bench, Comparison, Measured, Quartiles


def bench_tables(bench: Bench) -> Iterator[Table]:
    """The machine, then a table for each comparison."""
    yield _machine(bench)
    for title in dict.fromkeys(one.title for one in bench.comparisons):
        yield _table(title, [one for one in bench.comparisons if one.title == title])


def _machine(bench: Bench) -> Table:
    machine, settings = bench.machine, bench.settings
    size = settings.shape
    rows = [
        ["machine", machine.gpu if settings.device == "cuda" and machine.gpu else machine.cpu],
        ["cores", f"{machine.cores}, of them used: {settings.threads}"],
        ["memory", text.size(machine.memory_bytes)],
        ["load before", f"{machine.load:.2f} per core"],
        ["versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())],
        ["measured", f"{machine.measured} UTC, {text.several(settings.turns, 'turn')}, {settings.precision}"],
        ["size", f"{settings.size}: {size.layers} layers of {size.d_model}, vocabulary {size.vocabulary:,}"],
    ]
    return Table("machine", "benchmark", ["", ""], rows, 2, left=2)


def _table(title: str, comparisons: Sequence[Comparison]) -> Table:
    first = comparisons[0]
    baseline = first.measured[0].contestant
    quantities = dict.fromkeys(row.quantity for row in first.measured)
    rows = [
        _row(row, one.heap)
        for quantity in quantities
        for one in comparisons
        for row in one.measured
        if row.quantity == quantity
    ]
    head = ["measure", "heap", "model", "median", f"/ {baseline}", "quartiles", "ceiling", "quartiles of ms"]
    return Table(slug(title), title, head, rows, len(head) - 1, tuple(_notes(comparisons)), left=3, keys=3)


def _row(row: Measured, heap: str) -> list[str]:
    of_machine = "" if row.of_machine is None else f"{row.of_machine:.0%}"
    low, high = row.ratio.low, row.ratio.high
    ratio = [f"{row.ratio.median:.2f}", f"{low:.2f} to {high:.2f}" if low < high else ""]
    median, quartiles = _value(row.value, row.unit)
    return [row.quantity, heap, row.contestant, median, *ratio, of_machine, quartiles]


def _value(value: Quartiles, unit: str) -> list[str]:
    if unit == "bytes":
        return [text.size(value.median), ""]
    low, median, high = (text.milliseconds(seconds) for seconds in (value.low, value.median, value.high))
    return [f"{median} ms", f"{low} to {high}"]


def _notes(comparisons: Sequence[Comparison]) -> Iterator[str]:
    first = comparisons[0]
    if first.same:
        yield f"the same function: {joined(first.same)}"
    yield "parameters: " + ", ".join(f"{name} {text.count(count)}" for name, count in first.parameters.items())
    if any(one.heap == "kept" for one in comparisons):
        yield "heap kept: all keep freed memory, as a run on a CPU does; default: none does"
    for one in comparisons:
        if one.ceilings:
            yield (
                f"this machine, heap {one.heap}: {text.short(one.ceilings.product_flops)}FLOP/s in a product of "
                f"2048 x 2048 matrices, {text.size(one.ceilings.read_bytes)}/s read, "
                f"{text.size(one.ceilings.copy_bytes)}/s copied"
            )
    if first.ceilings:
        yield "ceiling: share of that product's FLOP/s (step, prefill), or of the read bytes per second (token)"
    yield from dict.fromkeys(note for one in comparisons for note in one.notes)

"""The figure of a benchmark: medians and quartiles of the contestants, a panel for each measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_llm.report.figures.style import legend, line_styles, panels, scale, short, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lit_llm.bench.results import Bench, Measured

DRAWN = {"step": "ms", "prefill": "ms", "token": "ms", "peak": "MB"}
"""{measure: unit of its axis}; the others follow from these."""


@styled
def bench_figure(bench: Bench) -> Figure:
    """Median and quartiles of each contestant; colours are the variants of the heap."""
    drawn: dict[tuple[str, str], dict[str, list[Measured]]] = {}
    for one in bench.comparisons:
        for row in one.measured:
            if row.quantity in DRAWN:
                drawn.setdefault((one.title, row.quantity), {}).setdefault(f"heap: {one.heap}", []).append(row)
    heaps = list(dict.fromkeys(name for by_heap in drawn.values() for name in by_heap))
    look = line_styles(heaps)
    machine, settings = bench.machine, bench.settings
    title = f"{settings.size}, {settings.precision}, {settings.threads} of {machine.cores} cores of {machine.cpu}"
    figure, every = panels(title, len(drawn), 1.6, named=heaps)
    handles = {}
    for axes, ((name, quantity), by_heap) in zip(every, drawn.items(), strict=True):
        contestants = list(dict.fromkeys(row.contestant for rows in by_heap.values() for row in rows))
        for number, (heap, rows) in enumerate(by_heap.items()):
            factor = 1e3 if rows[0].unit == "s" else 1e-6
            places = [contestants.index(row.contestant) + 0.2 * (number - (len(by_heap) - 1) / 2) for row in rows]
            medians = [factor * row.value.median for row in rows]
            below = [factor * (row.value.median - row.value.low) for row in rows]
            above = [factor * (row.value.high - row.value.median) for row in rows]
            style = look[heap]
            handles[heap] = axes.errorbar(
                medians, places, xerr=[below, above], color=style.colour, marker=style.marker, linestyle="none"
            )
        axes.set_yticks(range(len(contestants)), [short(contestant, 24) for contestant in contestants])
        axes.set_ylim(len(contestants) - 0.5, -0.5)
        axes.set_title(name, loc="left")
        axes.set_xlabel(f"{quantity}, {DRAWN[quantity]}")
        scale(axes, "x", [], False)
        axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
    legend(figure, handles)
    return figure

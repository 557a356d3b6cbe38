"""Timings of contestants that take turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from lit_llm.bench.machine import measure_ceilings
from lit_llm.bench.progress import progress
from lit_llm.bench.results import Ceilings, Measured, Quartiles
from lit_llm.bench.settings import BenchSettings

WARM_UP = 2
"""Turns before the timed ones: the first allocate memory, choose kernels and compile."""
Turn = Callable[[], Mapping[str, float]]
"""One turn of a contestant: {quantity: value}."""
Values = dict[str, dict[str, list[float]]]
"""{contestant: {quantity: its value in each turn}}"""


def quartiles(values: Sequence[float]) -> Quartiles:
    """Median and quartiles, interpolated; a single value is all three."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median, low, high)


def take_turns(contestants: Mapping[str, Turn], turns: int, log: Callable[[int], None]) -> Values:
    """Values of each contestant in `turns` turns, after `WARM_UP` others.

    Every turn begins with the next contestant, so that none always follows the same one. log: called with the number of
    timed turns so far.
    """
    names = list(contestants)
    values: Values = {name: {} for name in names}
    for turn in range(-WARM_UP, turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for quantity, value in contestants[name]().items():
                if turn >= 0:
                    values[name].setdefault(quantity, []).append(value)
        log(max(0, turn + 1))
    return values


def measured(values: Values, unit: str = "s") -> list[Measured]:
    """One `Measured` for each contestant and quantity, quantities together; the first contestant is the baseline."""
    baseline = next(iter(values.values()))
    return [
        Measured(
            name,
            quantity,
            unit,
            quartiles(of_name[quantity]),
            quartiles([value / base for value, base in zip(of_name[quantity], bases, strict=True)]),
        )
        for quantity, bases in baseline.items()
        for name, of_name in values.items()
    ]


def measure_between_ceilings(
    contestants: Mapping[str, Turn], settings: BenchSettings, title: str
) -> tuple[list[Measured], Ceilings]:
    """Measurements in turns, and the better of the machine's ceilings just before and just after them."""
    before = measure_ceilings(settings)
    values = take_turns(contestants, settings.turns, progress(title, settings.turns))
    return measured(values), before.or_better(measure_ceilings(settings))

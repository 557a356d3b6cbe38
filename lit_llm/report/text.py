"""Numbers, durations and dates as text."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lit_llm.statistics.paired import Difference

_UNITS = [(1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")]


def short(number: float | None, digits: int = 3) -> str:
    """1.23M, 45.6k, 789; an en dash for no number."""
    if number is None:
        return "–"
    number = float(f"{number:.{digits}g}")  # first, so that 999,999 is 1M and not 1e+03k
    for size, unit in _UNITS:
        if abs(number) >= size:
            return f"{number / size:.{digits}g}{unit}"
    return f"{number:.{digits}g}"


def value(number: float | None) -> str:
    """A loss or another goal: 5.890, 45.67k."""
    return f"{number:.3f}" if number is not None and 0.01 <= abs(number) < 1000 else short(number, 4)


def several(number: int, what: str) -> str:
    """1 seed, 3 seeds."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def span(numbers: Sequence[int], what: str) -> str:
    """3 seeds; 2 to 3 seeds."""
    low, high = min(numbers), max(numbers)
    return several(high, what) if low == high else f"{low:,} to {several(high, what)}"


def count(number: float) -> str:
    """A count of parameters or tokens, with B for a billion: 8.72B, 360k."""
    return short(number).replace("G", "B").replace("P", "Q")


def size(number: float) -> str:
    """Bytes: 24.6 MB."""
    text = short(number)
    return f"{text[:-1]} {text[-1]}B" if text[-1:].isalpha() else f"{text} B"


def mean_and_deviation(mean: float | None, deviation: float | None) -> str:
    """3.412 ± 0.021; the deviation is over seeds."""
    if mean is None:
        return "–"
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def difference(d: Difference | None, empty: str = "–") -> str:
    """-0.120 [-0.151, -0.089]: the difference and its 95% interval."""
    if d is None:
        return empty
    if d.low is None or d.high is None:
        return f"{d.mean:+.3f}"
    return f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]"


def seeds_half(d: Difference | None) -> str:
    """0.022: half of the 95% interval over seeds on the same documents; empty where documents are not counted."""
    if d is None or not d.documents or d.seeds_high is None:
        return ""
    return f"{d.seeds_high - d.mean:.3f}"


def p_value(p: float | None) -> str:
    """0.03, 0.0004, < 0.0001; empty for none."""
    if p is None:
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def about(seconds: float) -> str:
    """A rounded duration: 4.2 s, 2.4 min, 3.1 h, 12 days, 3.4 years."""
    for unit, size, most in (("s", 1, 99.5), ("min", 60, 99.5), ("h", 3600, 48), ("days", 86400, 730)):
        if seconds < most * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{count(seconds / (365.25 * 86400))} years"


def milliseconds(seconds: float) -> str:
    """Milliseconds, without the unit: 0.123, 45.6, 1,234."""
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def duration(seconds: float) -> str:
    """0:42, 1:03:20."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def utc(seconds: float) -> str:
    """2026-11-29 02:09 UTC, from seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))

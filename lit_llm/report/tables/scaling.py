"""Tables of scaling: power laws of the groups, multipliers over the baseline, crossings, best sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lit_llm.report import text
from lit_llm.report.tables.table import Table
from lit_llm.statistics.estimates import Estimate
from lit_llm.statistics.scaling.comparison import Curve, LackOfFit, Multiplier, Scaling

NAMES = {"train_flops": "training FLOPs", "parameters": "parameters", "tokens": "tokens"}


def scaling_tables(scaling: Scaling) -> Iterator[Table]:
    """Tables of the curves, multipliers, crossings, joint laws and isoFLOP minima, where there are any."""
    yield _curves(scaling)
    if scaling.multipliers:
        yield from _multipliers(scaling)
    if scaling.joint:
        yield _joint(scaling)
    if scaling.isoflops:
        yield _isoflops(scaling)


def _curves(scaling: Scaling) -> Table:
    x = NAMES[scaling.x]
    law = "E + A x^-a" if scaling.irreducible else "A x^-a"
    head = ["group", "sizes", "runs", f"{x} from", "to", "a [95%]", *["E [95%]"] * scaling.irreducible]
    head += ["scatter", "of seeds", "lack of fit, p"]
    rows = [_curve(curve, scaling.irreducible) for curve in scaling.curves]
    return Table("scaling", f"{scaling.metric} against {x}: {law}", head, rows, len(head), scaling.notes)


def _curve(curve: Curve, irreducible: bool) -> list[str]:
    return [
        curve.group,
        str(curve.sizes),
        str(curve.runs),
        text.short(curve.low),
        text.short(curve.high),
        interval(curve.exponent),
        *[interval(curve.irreducible)] * irreducible,
        f"{curve.scatter:.2%}",
        "–" if curve.seed_scatter is None else f"{curve.seed_scatter:.2%}",
        _lack(curve.lack_of_fit),
    ]


def _lack(test: LackOfFit | None) -> str:
    return "–" if test is None else text.p_value(test.p)


def _multipliers(scaling: Scaling) -> Iterator[Table]:
    x = NAMES[scaling.x]
    head = ["group", "baseline", f"times the {x} [95%]", "at the worst loss [95%]", "at the best loss [95%]", "losses"]
    rows = [
        [m.group, m.baseline, *map(interval, (m.mean, m.at_worst, m.at_best)), f"{m.best:.3f} to {m.worst:.3f}"]
        for m in scaling.multipliers
    ]
    yield Table("multipliers", f"{x} for the same {scaling.metric}", head, rows, len(head), left=2)
    crossing = [m for m in scaling.multipliers if m.crossing is not None]
    if crossing:
        head = ["group", "baseline", f"at {x} [95%]", "at a loss of [95%]", "lower before it", "after it", ""]
        title = "curves that cross within their data"
        yield Table("crossings", title, head, [_crossing(m) for m in crossing], len(head), left=2)


def _crossing(m: Multiplier) -> list[str]:
    assert m.crossing is not None
    crossing = m.crossing
    x, loss = (
        f"{format_(at.value)} [{format_(at.low)}, {format_(at.high)}]"
        for at, format_ in ((crossing.x, text.short), (crossing.loss, text.value))
    )
    certainty = "shown" if crossing.shown else "not shown"
    return [m.group, m.baseline, x, loss, crossing.below_at_low_x, crossing.below_at_high_x, certainty]


def _joint(scaling: Scaling) -> Table:
    head = ["group", "sizes", "E [95%]", "A [95%]", "a [95%]", "B [95%]", "b [95%]", "best N ~ C^ [95%]"]
    head += ["scatter", "lack of fit, p"]
    rows = [
        [
            law.group,
            str(law.sizes),
            *map(
                interval,
                (
                    law.irreducible,
                    law.parameters_coefficient,
                    law.parameters_exponent,
                    law.tokens_coefficient,
                    law.tokens_exponent,
                    law.best_size_exponent,
                ),
            ),
            f"{law.scatter:.2%}",
            _lack(law.lack_of_fit),
        ]
        for law in scaling.joint
    ]
    note = "N: parameters; D: tokens; the best N for a compute C grows as C^(b / (a + b))"
    return Table("joint-law", f"{scaling.metric}: E + A/N^a + B/D^b", head, rows, len(head), (note,))


def _isoflops(scaling: Scaling) -> Table:
    head = ["group", "training FLOPs", "sizes", "best parameters", "its loss"]
    rows = [
        [
            iso.group,
            text.short(iso.train_flops),
            str(iso.sizes),
            "beyond the sizes" if iso.parameters is None else text.count(iso.parameters),
            text.value(iso.loss),
        ]
        for iso in scaling.isoflops
    ]
    return Table("isoflops", f"best size for equal training FLOPs, by {scaling.metric}", head, rows, len(head))


def interval(estimate: Estimate | None) -> str:
    """`0.117 [0.094, 0.142]`; an infinite end as ∞, no number as –."""
    if estimate is None or math.isnan(estimate.value):
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3g}"
    return f"{_number(estimate.value)} [{_number(estimate.low)}, {_number(estimate.high)}]"


def _number(value: float) -> str:
    return f"{value:.3g}".replace("inf", "∞")


def scaling_sentences(scaling: Scaling) -> Iterator[str]:
    """Sentence on each group against the baseline: one ratio, or both sides of a crossing."""
    x = NAMES[scaling.x]
    for times in scaling.multipliers:
        if times.crossing is not None:
            yield f"{_both_sides(times, scaling.metric, x)}{_lost(times, scaling)}."
            continue
        open_ = ", which does not tell them apart" if _holds_one(times.mean) else ""
        yield (
            f"for the same {scaling.metric}, {times.group} needs {interval(times.mean)} times the {x} of "
            f"{times.baseline}{open_}, over losses from {times.best:.3f} to {times.worst:.3f}{_lost(times, scaling)}."
        )


def _lost(times: Multiplier, scaling: Scaling) -> str:
    lost = [group for group in (times.group, times.baseline) if group in scaling.lost]
    return f"; runs of {' and '.join(lost)} were lost, so this is not decided" if lost else ""


def _holds_one(estimate: Estimate) -> bool:
    return estimate.low is not None and estimate.high is not None and estimate.low <= 1 <= estimate.high


def _both_sides(times: Multiplier, metric: str, x: str) -> str:
    crossing = times.crossing
    assert crossing is not None
    at = text.short(crossing.x.value)
    if crossing.x.low is not None:
        at += f" [{text.short(crossing.x.low)}, {text.short(crossing.x.high)}]"
    verb = "cross" if crossing.shown else "seem to cross, but an end of the data does not tell them apart,"
    return (
        f"the curves of {times.group} and {times.baseline} in {metric} {verb} at {at} {x}, at a loss of "
        f"{text.value(crossing.loss.value)}: for the same loss {times.group} needs {interval(times.at_worst)} "
        f"times the {x} at {times.worst:.3f}, and {interval(times.at_best)} times at {times.best:.3f}"
    )

"""Figures of a scaling study: power laws, and profiles of equal training FLOPs."""

from __future__ import annotations

from collections.abc import Iterator

from lit_llm.report import text
from lit_llm.report.figures.inputs import MOST_LINES, Drawn, FigureData
from lit_llm.report.figures.lines import Line
from lit_llm.report.figures.pareto import Profile, isoflop_figure, scaling_figure
from lit_llm.statistics.scaling.comparison import Curve
from lit_llm.statistics.scaling.runs import X

SCALES: dict[X, str] = {"train_flops": "training FLOPs", "parameters": "parameters", "tokens": "tokens read"}


def scaling(study: FigureData) -> Iterator[Drawn]:
    """Losses over training FLOPs, parameters and tokens, with the power law, and isoFLOP profiles."""
    laws = study.comparison.scaling
    if laws is None or len(laws.runs) < 2:
        return
    groups = {run.group: study.series(run.group) for run in laws.runs}
    groups = dict(list(groups.items())[:MOST_LINES])
    ylabel = study.labelled(laws.metric)
    points = {
        label: {
            series: [(getattr(run, x), run.loss) for run in laws.runs if run.group == group]
            for group, series in groups.items()
        }
        for x, label in SCALES.items()
    }
    curves = {groups[curve.group]: _curve(curve) for curve in laws.curves if curve.group in groups}
    law = "E + A x^-a" if laws.irreducible else "A x^-a"
    band = "; bands: where the law lies, 95% over sizes and seeds" * any(curve.band for curve in laws.curves)
    crossings = [m.crossing.x.value for m in laws.multipliers if m.crossing is not None and m.group in groups]
    crossed = "; dotted: where laws cross" * bool(crossings)
    yield Drawn(
        "scaling",
        f"{laws.metric} of every finished run ({len(laws.runs)}) over training FLOPs, parameters and tokens; lines: "
        f"the power law {law} in {SCALES[laws.x]}, fitted to each group{band}{crossed}.",
        scaling_figure(
            f"{laws.metric} against scale", points, {SCALES[laws.x]: curves}, ylabel, {SCALES[laws.x]: crossings}
        ),
    )
    profiles = {
        study.names.arm(group): [
            Profile(
                # Rounded to two digits, so that budgets of all families share a name.
                f"{text.short(float(f'{iso.train_flops:.2g}'))} training FLOPs",
                iso.points,
                iso.parabola,
                None if iso.parameters is None or iso.loss is None else (iso.parameters, iso.loss),
            )
            for iso in laws.isoflops
            if iso.group == group
        ]
        for group in dict.fromkeys(iso.group for iso in laws.isoflops)
    }
    if profiles:
        yield Drawn(
            "isoflop",
            f"{laws.metric} by model size at equal training FLOPs (within a tenth); each mark is a run, lines: a "
            "parabola in the logarithm of the parameters, stars: its lowest point, where it lies between the sizes.",
            isoflop_figure(f"{laws.metric} at equal training FLOPs", profiles, ylabel=ylabel),
        )


def _curve(curve: Curve) -> Line:
    """Points of the law within its data, with its band where it has one."""
    steps = 21
    ratio = (curve.high / curve.low) ** (1 / (steps - 1))
    x = [at for at, _, _ in curve.band] or [curve.low * ratio**i for i in range(steps)]
    low, high = ([each[end] for each in curve.band] for end in (1, 2))
    return Line(x, [curve.law.at(at) for at in x], low, high)

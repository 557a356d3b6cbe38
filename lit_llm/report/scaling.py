"""Tables of how groups scale: their power laws, the compute they need beside the baseline's, the best sizes."""

from __future__ import annotations

from collections.abc import Iterator

from lit_llm.analysis.estimates import Estimate
from lit_llm.analysis.scaling import Scaling
from lit_llm.report import text
from lit_llm.report.parts import Part

NAMES = {"train_flops": "training FLOPs", "parameters": "parameters", "tokens": "tokens"}


def scaling_parts(found: Scaling) -> Iterator[Part]:
    """The curves of all groups, the multipliers, the minima of equal FLOPs; each where there is any."""
    x = NAMES[found.x]
    law = "E + A x^-a" if found.irreducible else "A x^-a"
    head = ["group", "runs", f"{x} from", "to", "a [95%]", *["E [95%]"] * found.irreducible, "scatter"]
    rows = [
        [curve.group, str(curve.runs), text.short(curve.low), text.short(curve.high), _estimate(curve.exponent)]
        + [_estimate(curve.irreducible)] * found.irreducible
        + [f"{curve.scatter:.2%}"]
        for curve in found.curves
    ]
    title = f"{found.metric} against {x}: {law}"
    yield Part("scaling", title, head, rows, len(head), found.notes)
    if found.multipliers:
        head = ["group", "against", f"times the {x} [95%]", "at the best loss [95%]", "losses"]
        rows = [
            [m.group, m.baseline, _estimate(m.mean), _estimate(m.at_best), f"{m.best:.3f} to {m.worst:.3f}"]
            for m in found.multipliers
        ]
        yield Part("multipliers", f"{x} for the same {found.metric}", head, rows, len(head))
    if found.isoflops:
        head = ["group", "training FLOPs", "sizes", "best parameters", "its loss"]
        rows = [
            [
                iso.group,
                text.short(iso.train_flops),
                str(iso.sizes),
                "beyond the sizes" if iso.parameters is None else text.count(iso.parameters),
                text.value(iso.loss),
            ]
            for iso in found.isoflops
        ]
        yield Part("isoflops", f"best size for equal training FLOPs, by {found.metric}", head, rows, len(head))


def _estimate(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return f"{found.value:.3g}"
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"

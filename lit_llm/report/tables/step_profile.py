"""The parts of a training step as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_llm.report import text
from lit_llm.report.tables.table import Table

if TYPE_CHECKING:
    from lit_llm.runs.step_profile import PartTime, StepProfile


def profile_table(profiled: StepProfile) -> Table:
    """A row for each part, and one for the whole step."""
    ceiling = profiled.ceiling_flops
    flops = sum(part.flops for part in profiled.parts)
    rows = [_row(part, profiled) for part in profiled.parts]
    rows.append(["step", text.milliseconds(profiled.seconds), "100%", *_rate(flops, profiled.seconds, ceiling)])
    notes = (
        f"mean of {text.several(profiled.steps, 'step')} on random tokens, forward and backward; {profiled.device}, "
        f"{text.several(profiled.threads, 'thread')}, {profiled.precision}",
        f"this machine: {text.short(ceiling)}FLOP/s in a product of 2048 x 2048 matrices, "
        f"{text.size(profiled.ceiling_bytes)}/s read and written by a copy",
        "products: their FLOPs per second and share of that ceiling, in their own time (step: in the step's); those of "
        "fused attention kernels are not counted",
    )
    head = ["part", "ms", "share", "FLOP/s of products", "of ceiling"]
    return Table("profile", "where the time of a training step goes", head, rows, len(head), notes)


def _row(part: PartTime, profiled: StepProfile) -> list[str]:
    rate = _rate(part.flops, part.product_seconds, profiled.ceiling_flops)
    return [part.name, text.milliseconds(part.seconds), f"{part.seconds / profiled.seconds:.0%}", *rate]


def _rate(flops: float, seconds: float, ceiling: float) -> list[str]:
    if not flops:
        return ["–", "–"]
    return [text.short(flops / seconds), f"{flops / seconds / ceiling:.0%}"]

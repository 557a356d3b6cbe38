"""Ceilings of a machine that does not exist: everything is free but what a test names."""

from dataclasses import replace
from typing import Any

from lit_llm.runs.machine_benchmark import OPTIMIZERS, MachineBenchmark

FREE = float("inf")
NOTHING = MachineBenchmark(
    layer={16: FREE},
    scores={1: {8: FREE}},
    layer_seconds=0.0,
    cross_seconds=0.0,
    logits={1: FREE},
    logit_width=0.0,
    update=dict.fromkeys(OPTIMIZERS, (0.0, 0.0)),
    resident_bytes=0,
    device="cpu",
    device_bytes=None,
    load=0.0,
    measured="2026-01-01",
)
USUAL = replace(
    NOTHING,
    layer={32: 2e10, 512: 8e10},
    scores={128: {16: 1e10, 128: 4e10}, 1024: {16: 2e10, 128: 5e10}},
    layer_seconds=1e-3,
    cross_seconds=5e-4,
    logits={1 << 19: 5e8, 1 << 24: 1e8},
    logit_width=6e-11,
    update=dict.fromkeys(OPTIMIZERS, (1e-5, 1e-9)),
    resident_bytes=300_000_000,
)


def only(**costs: Any) -> MachineBenchmark:
    """A machine on which nothing but these costs anything."""
    return replace(NOTHING, **costs)

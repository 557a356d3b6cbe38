"""A size that takes milliseconds, and a benchmark written by hand."""

from __future__ import annotations

import pytest

from lit_llm.bench import machine, settings
from lit_llm.bench.results import Bench, Ceilings, Comparison, Machine, Measured, Quartiles
from lit_llm.bench.settings import BenchSettings, Lengths, Size

SIZE = Size(d_model=32, layers=4, heads=4, d_ff=48, vocabulary=1024, batch=2, length=16)
CEILINGS = Ceilings(product_flops=1e9, copy_bytes=2e9, read_bytes=4e9)


def small_settings(monkeypatch: pytest.MonkeyPatch, **changes: object) -> BenchSettings:
    """Settings of one turn at `SIZE`, whose ceilings are `CEILINGS` and take no time."""
    monkeypatch.setitem(settings.SIZES, "tiny", SIZE)
    for name, value in (
        ("product", CEILINGS.product_flops),
        ("copy", CEILINGS.copy_bytes),
        ("read", CEILINGS.read_bytes),
    ):
        monkeypatch.setattr(machine, f"{name}_ceiling", lambda *_, value=value: value)
    return BenchSettings(**{"size": "tiny", "turns": 1, "lengths": (Lengths(5, 4),), **changes})


def made_up() -> Bench:
    """Two contestants, of which the peer takes twice the time."""

    def row(contestant: str, quantity: str, seconds: float, ratio: float, share: float | None) -> Measured:
        around = Quartiles(seconds, 0.9 * seconds, 1.2 * seconds)
        return Measured(contestant, quantity, "s", around, Quartiles(ratio, 0.8 * ratio, 1.1 * ratio), share)

    steps = (row("ours", "step", 0.1, 1.0, 0.5), row("Llama", "step", 0.2, 2.0, 0.25))
    counts = {"ours": 1_230_000, "Llama": 1_230_000}
    same = ("ours", "Llama (transformers)")
    missing = ("without litgpt of litgpt: `pip install --no-deps litgpt` installs it",)
    comparisons = [
        Comparison("training", "training step, decoder", heap, steps, counts, same, CEILINGS, missing)
        for heap in ("default", "kept")
    ]
    peak = Measured("ours", "peak", "bytes", Quartiles(3e6, 3e6, 3e6), Quartiles(1, 1, 1))
    comparisons.append(Comparison("memory", "memory of a step, decoder", "kept", (peak,), {"ours": 1_230_000}, ()))
    here = Machine("a CPU", 2, 8_000_000_000, None, 0.25, "2026-01-02 03:04", {"torch": "2.13"})
    return Bench(here, BenchSettings(size="tiny", turns=3), tuple(comparisons))

"""All that needs one GPU: the tests marked `gpu`, then speed beside peers at the sizes 150m and 1b.

`make test-gpu`, or `python tests/gpu/run.py`. The last lines are tables for the page docs/speed.md. Ends with 1 where a
test or a measurement failed. Without a GPU it says so and ends with 0.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lit_llm.bench.results import Bench
from lit_llm.bench.settings import BenchSettings, Lengths, What

ROOT = Path(__file__).resolve().parents[2]
BENCHES: tuple[tuple[str, tuple[What, ...]], ...] = (("150m", ("training", "decode", "memory")), ("1b", ("training",)))
"""(size, what is measured), the quick one first."""


def settings_of(size: str) -> BenchSettings:
    """bfloat16 on the GPU, few turns, since a GPU's times hardly vary."""
    return BenchSettings(size, "bf16", turns=5, lengths=(Lengths(1000, 64),), prompts=8, device="cuda")


def markdown(bench: Bench) -> Iterator[str]:
    """Lines of a table in Markdown for each comparison: contestants with medians, ratios and shares of the ceiling."""
    machine = bench.machine
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions.items())
    yield f"{machine.gpu or machine.cpu}, {versions}, {bench.settings.precision}, size {bench.settings.size}:"
    for one in bench.comparisons:
        baseline = one.measured[0].contestant
        yield from ("", f"| {one.title} | measure | median | / {baseline} | of ceiling |", "|---|---|---|---|---|")
        for row in one.measured:
            value = row.value.median
            median = f"{value / 1e9:.2f} GB" if row.unit == "bytes" else f"{1000 * value:.1f} ms"
            share = "" if row.of_machine is None else f"{row.of_machine:.0%}"
            yield f"| {row.contestant} | {row.quantity} | {median} | {row.ratio.median:.2f} | {share} |"
        yield from ("", *one.notes)
    yield from (f"failed: {line}" for line in bench.failed)


def main(benches: Sequence[tuple[str, tuple[What, ...]]] = BENCHES) -> int:
    import torch

    if not torch.cuda.is_available():
        print("skipped: torch finds no GPU on this machine")
        return 0
    from lit_llm.bench.run import run_benchmarks

    arguments = ["-o", "addopts=", "-q", "-m", "gpu", "tests"]
    failed = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT).returncode != 0
    results = [run_benchmarks(what, settings_of(size), ("default",)) for size, what in benches]
    print("", *(line for result in results for line in (*markdown(result), "")), sep="\n")
    return int(failed or any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())

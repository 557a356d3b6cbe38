"""All that needs one GPU, in about eight minutes: tests, and speeds for the page docs/speed.md.

`make test-gpu`, or `python tests/gpu/run.py [PART ...]`; without a part all of them, in this order:

attention  masked attention by FlexAttention and by torch's other kernels
slots      tokens per second of a small model with 1, 2 and 4 runs on one card
tests      the tests marked `gpu`
150m, 1b   speed beside peers at these sizes

A part that does not begin in time is named at the end, with the command that runs it. The last lines are tables. Ends
with 1 where a test or a measurement failed. Without a GPU it says so and ends with 0.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from lit_llm.bench.results import Bench
from lit_llm.bench.settings import BenchSettings, Lengths, What

ROOT = Path(__file__).resolve().parents[2]
BUDGET_SECONDS = 480.0
BENCHES: Mapping[str, tuple[What, ...]] = {"150m": ("training", "decode", "memory"), "1b": ("training",)}
"""{size: what is measured}, the quick one first."""
LEAST_SECONDS = {"attention": 90.0, "slots": 120.0, "tests": 60.0, "150m": 120.0, "1b": 60.0}
"""{part: seconds that must be left for it to begin}"""
SLOTS = (1, 2, 4)
SMALL_RUN = [
    "model.d_model=256", "model.decoder.layers=8", "model.attention.heads=4", "model.feed_forward.d_ff=704",
    "model.vocabulary=8192", "pretrain.data.batch_size=16", "pretrain.data.sequence_length=512",
    "pretrain.training.precision=bf16",
]  # fmt: skip
"""Overrides of decllm-tiny: the model of `lit-llm bench --size small`."""
WINDOW_SECONDS = 10.0
"""Seconds for which the steps of one run are counted; runs start some tenths of a second apart."""
TURNS = 5


class Failed(Exception):
    """A test or a measurement has failed."""


def settings_of(size: str) -> BenchSettings:
    """bfloat16 on the GPU, few turns, since a GPU's times hardly vary."""
    return BenchSettings(size, "bf16", turns=TURNS, lengths=(Lengths(1000, 64),), prompts=8, device="cuda")


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


def attention_lines(left: float) -> Iterator[str]:
    """A table of masks: milliseconds of both contestants, medians over turns."""
    from tests.gpu.attention_speed import Sizes, compare_attention

    sizes = Sizes()
    yield f"attention alone, {sizes}, bf16, medians of {TURNS} turns; the mask is made once for all layers:"
    yield from (
        "",
        "| mask | torch: mask | torch: attention | flex: mask | flex: attention | flex / torch |",
        "|---|---|---|---|---|---|",
    )
    for kind, rows in compare_attention(sizes, "cuda", TURNS):
        of = {(row.contestant, row.quantity): row for row in rows}
        cells = [
            f"{1000 * of[name, quantity].value.median:.2f} ms"
            for name in ("torch", "flex")
            for quantity in ("mask", "attention")
        ]
        yield f"| {kind} | {' | '.join(cells)} | {of['flex', 'attention'].ratio.median:.2f} |"


def slots_lines(left: float) -> Iterator[str]:
    """A table of runs that share one card: tokens per second of all of them together."""
    from lit_llm.experiment.load import load_experiment
    from lit_llm.runs.step_timing import Setting, TimedStep, steps_per_second

    experiment = load_experiment("decllm-tiny", SMALL_RUN)
    data = experiment.pretrain.data
    yield f"training at once on one card, 8 x 256, bf16, {data.batch_size} x {data.sequence_length} tokens a step:"
    yield from ("", "| slots | tokens per second, together | / one slot |", "|---|---|---|")
    first = 0.0
    for slots in SLOTS:
        steps = steps_per_second(TimedStep(experiment, "pretrain", Setting("cuda", 1, slots)), WINDOW_SECONDS)
        first = first or steps
        yield f"| {slots} | {steps * data.batch_size * data.sequence_length:,.0f} | {steps / first:.2f} |"


def tests_lines(left: float) -> Iterator[str]:
    """The tests marked `gpu`, which print for themselves."""
    arguments = ["-o", "addopts=", "-q", "-m", "gpu", "tests"]
    try:
        code = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, timeout=left).returncode
    except subprocess.TimeoutExpired:
        raise Failed(f"the tests did not end within {left:.0f} s") from None
    if code:
        raise Failed("the tests")
    yield "the tests passed"


def bench_lines(size: str) -> Iterator[str]:
    """Tables of speeds beside peers."""
    from lit_llm.bench.run import run_benchmarks

    result = run_benchmarks(BENCHES[size], settings_of(size), ("default",))
    yield from markdown(result)
    if result.failed:
        raise Failed(f"size {size}")


PARTS: Mapping[str, Callable[[float], Iterator[str]]] = {
    "attention": attention_lines,
    "slots": slots_lines,
    "tests": tests_lines,
    **{size: lambda left, size=size: bench_lines(size) for size in BENCHES},
}
"""{part: its lines, given the seconds that are left}"""


def main(names: Sequence[str] = ()) -> int:
    import torch

    if unknown := [name for name in names if name not in PARTS]:
        print(f"unknown: {', '.join(unknown)}; the parts are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("skipped: torch finds no GPU on this machine")
        return 0
    end = time.monotonic() + BUDGET_SECONDS
    tables, failed, late = list[str](), list[str](), list[str]()
    for name in names or PARTS:
        if (left := end - time.monotonic()) < LEAST_SECONDS[name]:
            late.append(name)
            continue
        try:
            for line in PARTS[name](left):
                tables.append(line)
                print(line, flush=True)  # should the machine be taken away
        except Exception as error:  # the other parts are measured all the same
            failed.append(f"failed: {name}: {error}")
        tables.append("")
    print("", *tables, *failed, sep="\n")
    if late:
        print(f"not begun within {BUDGET_SECONDS:.0f} s: python tests/gpu/run.py {' '.join(late)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))

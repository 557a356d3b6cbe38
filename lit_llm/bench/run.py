"""A whole benchmark: each measurement in a process of its own, one after the other.

malloc's settings hold for a whole process and cannot be taken back, so both variants of the heap need processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

from lit_llm.bench.generation import measure_decode, measure_families
from lit_llm.bench.machine import describe_machine
from lit_llm.bench.memory import compare_peaks, measure_peak, names_of
from lit_llm.bench.results import Bench, Comparison
from lit_llm.bench.settings import BenchSettings, What
from lit_llm.bench.training_step import measure_training
from lit_llm.launch import Outcome, Task, run_tasks

IN_TURNS = {"training": measure_training, "decode": measure_decode, "families": measure_families}
"""{what: function that measures it in one process}"""


def heaps_of(keep: bool | None, device: str) -> tuple[str, ...]:
    """Variants of the heap to measure: one, or both where `keep` is None. A GPU has memory of its own, so one alone."""
    both = ("default", "kept")
    return both if keep is None and device == "cpu" else (both[bool(keep)],)


def run_benchmarks(what: Sequence[What], settings: BenchSettings, heaps: Sequence[str]) -> Bench:
    """Measure this machine.

    Args:
        what: What to measure, in this order.
        settings: Settings of all measurements.
        heaps: Variants of the heap, `default` and `kept`, as in `Comparison`.

    Returns:
        All comparisons. A measurement that failed, for lack of memory say, is named in `failed`.
    """
    machine = describe_machine()
    comparisons, failed = list[Comparison](), list[str]()
    for each in what:
        for heap in heaps:
            outcomes = _outcomes(each, settings, heap)
            done = [outcome.value for outcome in outcomes if outcome.status == "returned"]
            failed += [f"{outcome.task.name}: {outcome.error}" for outcome in outcomes if outcome.status != "returned"]
            comparisons += (
                compare_peaks(settings, heap, done) if each == "memory" else [one for of in done for one in of]
            )
    return Bench(machine, settings, tuple(comparisons), tuple(failed))


def _outcomes(what: What, settings: BenchSettings, heap: str) -> list[Outcome]:
    """Results of the processes of one measurement."""
    if what == "memory":
        tasks = [
            Task(f"memory of {name}, {kind}, {heap} heap", measure_peak, (settings, heap, kind, name))
            for kind, name in names_of(settings)
        ]
    else:
        tasks = [Task(f"{what}, {heap} heap", IN_TURNS[what], (settings, heap))]
    tasks = [replace(task, threads=settings.threads) for task in tasks]
    return run_tasks(tasks, max_parallel=1, preload=_preloaded())


def _preloaded() -> list[str]:
    """Modules that every process needs, imported once: those of transformers take seconds."""
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "t5gemma")]
    return [__name__, *(models if find_spec("transformers") else [])]

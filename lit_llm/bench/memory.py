"""Peak memory of a training step, each contestant in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from lit_llm.bench.entries import KINDS, Entry, available, same_function
from lit_llm.bench.machine import parameters_of, set_heap
from lit_llm.bench.progress import progress
from lit_llm.bench.results import Comparison
from lit_llm.bench.settings import BenchSettings, Size
from lit_llm.bench.training_step import random_text, training_step
from lit_llm.bench.turns import Turn, measured
from lit_llm.config.problems import InputError, Problem

SMALLEST = Size(d_model=32, layers=2, heads=2, d_ff=32, vocabulary=1024, batch=1, length=8)
STEPS = 2
"""Measured steps: the first makes the optimiser's state, the second has it during the backward pass."""


def names_of(settings: BenchSettings) -> list[tuple[str, str]]:
    """(kind, name) of every contestant."""
    return [(kind, entry.name) for kind, entries in KINDS.items() for entry in entries(settings.shape)]


class Peak(NamedTuple):
    """Peak of one contestant."""

    kind: str
    name: str
    bytes: float | None
    """Beyond those of the process before the model was built; None for a peer that is not installed."""
    note: str = ""
    """Why there is none."""


def measure_peak(settings: BenchSettings, heap: str, kind: str, name: str) -> Peak:
    """Peak of a training step in this process, which keeps its heap setting afterwards."""
    set_heap(heap)
    (entry,) = [entry for entry in KINDS[kind](settings.shape) if entry.name == name]
    _, missing = available([entry])
    if missing:
        return Peak(kind, name, None, missing[0])
    # So that libraries and their buffers are there, which are no memory of the model.
    (small,) = [entry for entry in KINDS[kind](SMALLEST) if entry.name == name]
    _step_of(small, SMALLEST, settings)()
    before = _bytes_now(settings.device)
    step = _step_of(entry, settings.shape, settings)
    _forget_peak(settings.device)
    log = progress(f"memory of a step, {name}, {heap} heap", STEPS)
    for number in range(STEPS):
        step()
        log(number + 1)
    return Peak(kind, name, _peak(settings.device) - before)


def compare_peaks(settings: BenchSettings, heap: str, peaks: Sequence[Peak]) -> list[Comparison]:
    """One comparison for each kind of model."""
    comparisons = []
    for kind, entries in KINDS.items():
        found = {peak.name: peak.bytes for peak in peaks if peak.kind == kind and peak.bytes is not None}
        there = [entry for entry in entries(settings.shape) if entry.name in found]
        if there:
            rows = measured({entry.name: {"peak": [found[entry.name]]} for entry in there}, "bytes")
            counts = parameters_of({entry.name: entry.model for entry in there})
            notes = tuple(peak.note for peak in peaks if peak.kind == kind and peak.note)
            title = f"memory of a step, {kind}"
            comparisons.append(
                Comparison("memory", title, heap, tuple(rows), counts, same_function(there), notes=notes)
            )
    return comparisons


def _step_of(entry: Entry, size: Size, settings: BenchSettings) -> Turn:
    contestant = entry.build(entry.model, None)
    contestant.module.to(settings.device).train()
    return training_step(contestant, random_text(size, bool(entry.model.encoder)).to(settings.device), settings)


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _bytes_now(device: str) -> float:
    return float(torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss)


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        CLEAR.write_text("5")  # proc(5): the peak of resident memory becomes the memory of now
    except OSError as error:
        message = f"the peak of a process is measured on Linux, by writing to {CLEAR}: {error.strerror}"
        raise InputError(Problem(message, "memory")) from None


def _peak(device: str) -> float:
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024.0 * int(line.split()[1])

"""Where the time of a training step goes: its parts, beside what this machine can do.

The parts are ranges that hooks on a model's modules open, so that a step that is not profiled pays nothing. A backward
operation belongs to the part of the forward operation with the same sequence number, which autograd gives both.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.layer_part import LayerPart
from lit_llm.components.norm import module as norms
from lit_llm.components.norm.module import Norm
from lit_llm.components.rope import rotate
from lit_llm.config.problems import InputError, Problem
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import Trained
from lit_llm.models.build import build_model
from lit_llm.runs.step_timing import train_on_random_tokens
from lit_llm.training.fit import accelerator_of
from lit_llm.training.module import LitModel

WARM_UP = 3
"""Steps before the profile; the first ones allocate memory and choose kernels."""
PREFIX = "part: "
"""Begins the name of a range, in the profiler's events and in the trace."""
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
"""Operations whose FLOPs the profiler counts and which the machine's ceiling is about."""
CLIPPING, DATA, OPTIMISER = "clipping", "data", "optimiser"
REST, WAITING = "additions, dropout, masks", "Python and waiting"


@dataclass(frozen=True)
class PartTime:
    """Time of one part, per step."""

    name: str
    seconds: float
    flops: float
    """FLOPs of its matrix products; fused attention kernels are not counted."""
    product_seconds: float
    """Seconds of these products."""


@dataclass(frozen=True)
class StepProfile:
    """The parts of a training step."""

    device: str
    threads: int
    precision: str
    steps: int
    seconds: float
    """Wall-clock seconds of a step under the profiler, which slows steps of small tensors."""
    parts: tuple[PartTime, ...]
    """In falling order of their time; the last one is what is left of the wall-clock time."""
    ceiling_flops: float
    """FLOP/s of a large matrix product on this machine, in the precision of the step."""
    ceiling_bytes: float
    """Bytes per second read and written by a copy of tensors larger than the cache."""


def profile_step(experiment: Experiment, stage: Trained, steps: int, trace: Path | None = None) -> StepProfile:
    """Profile training steps on random tokens.

    Args:
        experiment: The experiment; nothing of it is prepared or stored.
        stage: Which of its trainings.
        steps: Profiled steps, after `WARM_UP` others.
        trace: File for the trace of these steps, as JSON for ui.perfetto.dev; compressed where it ends with .gz.

    Raises:
        InputError: The blocks would be compiled.
        RuntimeError: The device that the experiment asks for is absent.
    """
    training = experiment.section(stage).training
    if training.execution.kernels == "compiled":
        key = f"{stage}.training.execution.kernels"
        message = f"a compiled block has no parts to time; profile the eager one by `-o {key}=auto`"
        raise InputError(Problem(message, key))
    on_gpu = accelerator_of(training.execution.accelerator) == "cuda"
    torch.set_num_threads(training.execution.threads)
    profiler, seconds = _profiled(experiment, stage, steps, on_gpu)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    # FLOPs are counted from the shapes of tensors; to record these would slow the steps that are timed.
    counted, _ = _profiled(experiment, stage, 1, on_gpu, with_flops=True)
    parts = _parts(_events_of(profiler), _flops(_events_of(counted)), (steps, seconds), on_gpu)
    low = torch.float32 if training.precision == "fp32" else torch.bfloat16
    device = torch.device("cuda" if on_gpu else "cpu")
    return StepProfile(
        torch.cuda.get_device_name() if on_gpu else "cpu",
        training.execution.threads,
        training.precision,
        steps,
        seconds,
        tuple(parts),
        product_ceiling(low, device),
        copy_ceiling(device),
    )


def _profiled(
    experiment: Experiment, stage: Trained, steps: int, on_gpu: bool, with_flops: bool = False
) -> tuple[profile, float]:
    """(profiler of these steps, seconds of a step)."""
    model, ends = build_model(experiment.model), list[float]()
    profiler = profile(
        activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu],
        schedule=schedule(wait=WARM_UP, warmup=1, active=steps, repeat=1),
        with_flops=with_flops,
    )

    def after_each_step() -> bool:
        if on_gpu:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        profiler.step()
        return False

    with _ranges(model), profiler:
        train_on_random_tokens(model, experiment, stage, after_each_step, WARM_UP + 1 + steps)
    return profiler, (ends[-1] - ends[-1 - steps]) / steps


def _events_of(profiler: profile) -> Sequence[FunctionEvent]:
    return profiler.events() or []


@contextmanager
def _ranges(model: nn.Module) -> Iterator[None]:
    """Ranges around the model's modules, its functions without a module, the loss, clipping and the optimiser."""
    with ExitStack() as stack:
        for module, name in _named_parts(model):
            opened: list[record_function] = []

            def enter(*_: Any, name: str = name, opened: list[record_function] = opened) -> None:
                opened.append(record_function(PREFIX + name))
                opened[-1].__enter__()

            def leave(*_: Any, opened: list[record_function] = opened) -> None:
                opened.pop().__exit__(None, None, None)

            stack.enter_context(_removed(module.register_forward_pre_hook(enter)))
            # Also where activation checkpointing ends a recomputation early, by an exception.
            stack.enter_context(_removed(module.register_forward_hook(leave, always_call=True)))
        functions: dict[Callable[..., Any], str] = {
            rotate: "rotation",
            norms.rms_norm: "norms",
            norms.layer_norm: "norms",
        }
        for user, attribute, function in _users(functions):
            ranged = _ranged(function, functions[function])
            stack.enter_context(mock.patch.object(user, attribute, ranged))
        stack.enter_context(mock.patch.object(LitModel, "_losses", _ranged(LitModel._losses, "loss")))
        stack.enter_context(mock.patch.object(LitModel, "_clip", _ranged(LitModel._clip, CLIPPING)))
        yield


def _named_parts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(module, name of its part). A module inside of another one of these counts for itself alone."""
    for part in model.modules():
        if isinstance(part, Norm):
            yield part, "norms"
        elif isinstance(part, nn.Embedding):
            yield part, "embedding"
        elif isinstance(part, DotProduct):
            yield part, "attention"
        elif isinstance(part, LayerPart):
            kind = type(part).__name__
            attends = any(isinstance(inner, DotProduct) for inner in part.modules())
            name = "attention, other" if attends else _in_words(kind)
            yield part, name
            for inner in part.modules():
                if isinstance(inner, nn.Linear):
                    yield inner, "projections" if attends else name


def _in_words(name: str) -> str:
    """FeedForward -> feed forward."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


def _users(functions: dict[Callable[..., Any], str]) -> Iterator[tuple[ModuleType, str, Callable[..., Any]]]:
    """(module, attribute, function) of each module that calls one of the functions by a name of its own."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module.__name__ not in (__name__, norms.__name__):
            for attribute, value in list(vars(module).items()):
                for function in functions:
                    if value is function:
                        yield module, attribute, function


def _ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(function)
    def ranged(*arguments: Any, **named: Any) -> Any:
        with record_function(PREFIX + name):
            return function(*arguments, **named)

    return ranged


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _parts(
    events: Sequence[FunctionEvent], flops: dict[str, float], timed: tuple[int, float], on_gpu: bool
) -> Iterator[PartTime]:
    """The parts of `timed` = (steps, seconds of a step)."""
    steps, seconds = timed
    times, products = defaultdict[str, float](float), defaultdict[str, float](float)
    for event, name in _with_part(events):
        took = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 / steps
        times[name] += took
        products[name] += took * (event.name in PRODUCTS)
    for name in sorted(times, key=times.__getitem__, reverse=True):
        if times[name] > 0:
            yield PartTime(name, times[name], flops.get(name, 0.0), products[name])
    yield PartTime(WAITING, max(0.0, seconds - sum(times.values())), 0.0, 0.0)


def _flops(events: Sequence[FunctionEvent]) -> dict[str, float]:
    """{part: FLOPs of its matrix products} in one profiled step."""
    flops = defaultdict[str, float](float)
    for event, name in _with_part(events):
        flops[name] += (event.flops or 0) * (event.name in PRODUCTS)
    return flops


def _with_part(events: Sequence[FunctionEvent]) -> Iterator[tuple[FunctionEvent, str]]:
    """Operations with their parts, without kernels: the operation that launched one has its time on the device."""
    forward = _part_of_sequence(events)
    for event in events:
        if event.device_type == DeviceType.CPU and (name := _part(event, forward)) is not None:
            yield event, name


def _part_of_sequence(events: Sequence[FunctionEvent]) -> dict[int, str]:
    """{sequence number: part} of the forward operations inside of ranges."""
    parts = {}
    for event in events:
        if event.sequence_nr >= 0 and not _is_backward(event) and (name := _range_around(event)) is not None:
            parts[event.sequence_nr] = name
    return parts


BACKWARD = "autograd::engine::evaluate_function: "


def _is_backward(event: FunctionEvent) -> bool:
    return any(above.name.startswith(BACKWARD) for above in _with_parents(event))


def _range_around(event: FunctionEvent) -> str | None:
    names = (above.name for above in _with_parents(event))
    return next((name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)), None)


def _with_parents(event: FunctionEvent) -> Iterator[FunctionEvent]:
    above: FunctionEvent | None = event
    while above is not None:
        yield above
        above = above.cpu_parent


def _part(event: FunctionEvent, forward: dict[int, str]) -> str | None:
    """Part of an event; None for a range, whose own time is Python's."""
    if event.name.startswith((PREFIX, "ProfilerStep")):
        return None
    for above in _with_parents(event):
        if above.name.startswith(PREFIX):
            return above.name.removeprefix(PREFIX)
        if above.name.startswith(BACKWARD):
            return forward.get(above.sequence_nr, REST)
        if above.name.startswith("Optimizer."):
            return OPTIMISER
        if above.name.startswith("enumerate(DataLoader)"):
            return DATA
    return REST


def product_ceiling(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """FLOP/s of a product of two square matrices: the best of several."""
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: left @ right, device)


def copy_ceiling(device: torch.device, entries: int = 1 << 26) -> float:
    """Bytes read and written per second by a copy of a tensor of 256 MiB: the best of several."""
    source, target = torch.zeros(entries, device=device), torch.empty(entries, device=device)
    return 2 * 4 * entries / _fastest(lambda: target.copy_(source), device)


def read_ceiling(device: torch.device, entries: int = 1 << 26) -> float:
    """Bytes read per second by the sum of a tensor of 256 MiB: the best of several."""
    source = torch.zeros(entries, device=device)
    return 4 * entries / _fastest(source.sum, device)


def _fastest(run: Callable[[], Any], device: torch.device, times: int = 8) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)

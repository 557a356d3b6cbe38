"""Slots of this machine: the GPUs, or shares of the cores, that processes run in at the same time. Loads no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

VISIBLE = "CUDA_VISIBLE_DEVICES"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, for `CUDA_VISIBLE_DEVICES`."""
    present = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    if not present:
        return []
    if (chosen := os.environ.get(VISIBLE)) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    # CUDA numbers those that a container was given from 0, whatever the numbers of their device files.
    return [str(number) for number in range(len(present))]


def has_gpu() -> bool:
    """True where this process may use an NVIDIA GPU, without torch, whose import takes seconds."""
    return bool(visible_gpus())


def machine_slots(count: int, use_gpus: bool = True) -> list[dict[str, str]]:
    """`count` slots of this machine, each with its environment variables; spread over the GPUs in turn, if any."""
    gpus = visible_gpus() if use_gpus else []
    return [{VISIBLE: gpu} for gpu in islice(cycle(gpus), count)] if gpus else [{} for _ in range(count)]


def take_slots(free: Sequence[Mapping[str, str]], count: int) -> list[Mapping[str, str]] | None:
    """The last `count` of these slots, on as many different GPUs; None where there are too few."""
    taken: list[Mapping[str, str]] = []
    for slot in reversed(free):
        if len(taken) < count and (VISIBLE not in slot or slot not in taken):
            taken.append(slot)
    return taken if len(taken) == count else None


def environment_of(slots: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Environment variables of a process that takes these slots; it sees the GPUs of all."""
    merged = {name: value for slot in slots for name, value in slot.items()}
    if VISIBLE in merged:
        merged[VISIBLE] = ",".join(slot[VISIBLE] for slot in slots)
    return merged

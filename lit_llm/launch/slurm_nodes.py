"""The nodes of a SLURM cluster, as sinfo lists them, and what they lack for a place."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_llm.launch.engine import Needs


@dataclass(frozen=True)
class Node:
    """Resources of one node, used or free."""

    cpus: int
    memory_gb: float
    gres: str
    """Generic resources in SLURM's words: `gpu:a100:4(S:0-1),shard:8`."""

    def gpus(self, gpu_type: str | None) -> int:
        """Number of GPUs of a type, or of all types."""
        count = 0
        for word in re.sub(r"\([^)]*\)", "", self.gres).split(","):
            name, *rest = word.split(":")
            if name == "gpu" and (gpu_type is None or (len(rest) > 1 and rest[0] == gpu_type)):
                count += int(rest[-1]) if rest and rest[-1].isdigit() else 1
        return count


@dataclass(frozen=True)
class Partition:
    """A partition with its nodes, whether they are up or down."""

    name: str
    is_default: bool
    hours: float
    """Longest time limit; infinite where there is none."""
    nodes: tuple[Node, ...]


def read_partitions(text: str) -> list[Partition]:
    """The partitions of `sinfo --Node --format=%P|%c|%m|%G|%l|%N`."""
    nodes: dict[tuple[str, str], dict[str, Node]] = {}
    for line in text.splitlines():
        name, cpus, memory, gres, limit, node = (word.strip() for word in line.split("|"))
        nodes.setdefault((name, limit), {})[node] = Node(int(cpus), int(memory) * 2**20 / 1e9, gres)
    return [
        Partition(name.removesuffix("*"), name.endswith("*"), _hours(limit), tuple(found.values()))
        for (name, limit), found in nodes.items()
    ]


def missing(needs: Needs, partitions: Sequence[Partition], gpu_type: str | None = None) -> str | None:
    """Needs of a place that no partition has, in words; None where one has them all."""
    name = " and ".join(partition.name for partition in partitions)
    gpu = f"{gpu_type} GPUs" if gpu_type else "GPUs"
    amounts: list[tuple[str, float, Callable[[Node], float]]] = [
        ("CPUs", needs.cpus, lambda node: node.cpus),
        ("GB of memory", needs.memory_gb or 0, lambda node: node.memory_gb),
        (gpu, needs.gpus, lambda node: node.gpus(gpu_type)),
    ]
    fitting = [
        sum(all(has(node) >= amount for _, amount, has in amounts) for node in partition.nodes)
        for partition in partitions
    ]
    within = [partition.hours >= (needs.hours or 0) for partition in partitions]
    if any(count >= needs.nodes and enough for count, enough in zip(fitting, within, strict=True)):
        return None
    reasons = []
    for unit, amount, has in amounts:
        most = max((has(node) for partition in partitions for node in partition.nodes), default=0)
        if most < amount:
            reasons.append(f"{unit}: a place needs {amount:g}, a node has at most {most:.4g}")
    if not any(within):
        longest = max(partition.hours for partition in partitions)
        reasons.append(f"hours: a place needs {needs.hours:g}, the time limit is {longest:.4g}")
    if not reasons:
        wanted = ", ".join(f"{amount:g} {unit}" for unit, amount, _ in amounts if amount)
        most = max(count for count, enough in zip(fitting, within, strict=True) if enough)
        reasons.append(f"nodes with {wanted}: a place needs {needs.nodes} in one partition, there are {most}")
    return f"partition {name}: {'; '.join(reasons)}"


def _hours(limit: str) -> float:
    """Hours of a time limit in SLURM's words: `infinite`, `30:00`, `12:00:00` or `1-00:00:00`."""
    if not limit[:1].isdigit():  # infinite, n/a
        return math.inf
    days, _, clock = limit.rpartition("-")
    seconds = 0
    for part in clock.split(":"):
        seconds = seconds * 60 + int(part)
    return int(days or 0) * 24 + seconds / 3600

"""The runs that a scaling law is fitted to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_llm.statistics.estimates import joined
from lit_llm.statistics.scaling.size_means import Size

X = Literal["train_flops", "parameters", "tokens"]
Scale = Literal["train_flops", "parameters", "tokens", "seconds"]


@dataclass(frozen=True)
class ScalingRun:
    """One finished run."""

    group: str
    train_flops: float
    parameters: float
    tokens: float
    loss: float
    arm: str = ""
    """Runs of one arm are one size; without it, runs with the same FLOPs, parameters and tokens are."""
    seed: int | None = None
    """Runs of different groups with one seed are paired; a run without a seed is not."""
    seconds: float | None = None
    """Wall-clock seconds of training; None where they were not measured."""
    model: str = ""
    """Name of the arm that is trained at several budgets; without it each size counts as another model."""


def lost_notes(lost: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A note on each group of which runs diverged. lost: {group: its sizes that lost runs}."""
    for group, sizes in lost.items():
        yield (
            f"{group} lost runs to divergence, which are in no law and no multiplier: {joined(sizes)}; what is left of "
            "a size looks better than the size is"
        )


def sizes_of(runs: Sequence[ScalingRun]) -> list[Size]:
    """The sizes of one group, in the order of their training FLOPs."""
    return sorted(_sizes(runs), key=lambda size: size.logs["train_flops"])


def sizes_by_group(runs: Sequence[ScalingRun]) -> dict[str, list[Size]]:
    """{group: its sizes}, in the order of the runs."""
    groups = dict.fromkeys(run.group for run in runs)
    return {group: sizes_of([run for run in runs if run.group == group]) for group in groups}


def _sizes(runs: Sequence[ScalingRun]) -> Iterator[Size]:
    members: dict[object, list[ScalingRun]] = {}
    for run in runs:
        members.setdefault(run.arm or (run.train_flops, run.parameters, run.tokens), []).append(run)
    for index, same in enumerate(members.values()):
        scales = ("train_flops", "parameters", "tokens", "seconds")
        values = {scale: [value for run in same if (value := getattr(run, scale))] for scale in scales}
        logs = {scale: _mean_log(measured) for scale, measured in values.items() if len(measured) == len(same)}
        # A run without a seed gets a negative one, so that it is paired with no other run.
        seeds = [-1 - place if run.seed is None else run.seed for place, run in enumerate(same)]
        losses = {seed: math.log(run.loss) for seed, run in zip(seeds, same, strict=True)}
        squares = (
            sum((math.log(value) - logs["seconds"]) ** 2 for value in values["seconds"]) if "seconds" in logs else 0
        )
        yield Size(same[0].arm or f"size {index + 1}", logs, losses, squares, same[0].model)


def _mean_log(values: Sequence[float]) -> float:
    return sum(map(math.log, values)) / len(values)

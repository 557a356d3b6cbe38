"""Matches an arm with its baseline in one quantity, by moving the key that sets it.

tokens, loss_tokens, train_flops: `max_steps`, with warm-ups and decay scaled along, an adaptation's warm-up too.
parameters: `d_ff`, in steps of 8 below d_model 512 and of 64 above. The audit refuses a residual above 1%.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lit_llm.config.section import validate
from lit_llm.config.tree import at, difference, merge, tree
from lit_llm.experiment.cost import COST_FIGURES, cost_of
from lit_llm.experiment.load import changed
from lit_llm.experiment.schema import Experiment
from lit_llm.models.cost import count_parameters
from lit_llm.models.resolve import resolve_model
from lit_llm.studies.schema import By

TOLERANCE = 0.01
"""Largest relative difference after matching; above it the audit refuses the comparison."""


@dataclass(frozen=True)
class Matched:
    """An arm after matching."""

    experiment: Experiment
    moved: dict[str, list[Any]]
    """{key: [before, after]} of the changed keys."""
    residual: float
    """(arm - baseline) / baseline, in the matched quantity."""


def matched(arm: Experiment, baseline: Experiment, by: By) -> Matched:
    """Move max_steps or d_ff of `arm` until it equals `baseline` as nearly as whole steps allow."""
    if by == "none":
        return Matched(arm, {}, 0.0)
    computed: dict[int, float] = {}

    def quantity(experiment: Experiment) -> float:
        if (key := id(experiment)) not in computed:  # all of them live until the return
            if by == "parameters":  # without the FLOPs and the memory that `cost_of` computes too
                computed[key] = count_parameters(resolve_model(experiment.model)).total
            else:
                computed[key] = COST_FIGURES[by](cost_of(experiment))
        return computed[key]

    wanted = quantity(baseline)
    candidates = _widths(arm, wanted) if by == "parameters" else _lengths(arm, by, wanted)
    best = min((arm, *candidates), key=lambda experiment: abs(quantity(experiment) - wanted))
    moved = difference(arm.model_dump(mode="json"), best.model_dump(mode="json"))
    return Matched(best, moved, (quantity(best) - wanted) / wanted)


def _lengths(arm: Experiment, by: By, wanted: float) -> list[Experiment]:
    """The arm with the two numbers of steps nearest to the quantity `wanted`.

    The source's share of the quantity counts, and is not moved.
    """
    training, cost = arm.pretrain.training, cost_of(arm)
    fixed = getattr(cost.before, by)
    exact = training.max_steps * (wanted - fixed) / (COST_FIGURES[by](cost) - fixed)
    alone = arm.adapt.warmup_steps if arm.adapt else 0
    doublings = training.sequence_warmup.doublings(arm.pretrain.data.sequence_length) if training.sequence_warmup else 0
    # One step of each shorter row and one of whole rows; one of the new parameters alone and one of all.
    least = 1 + max(doublings, alone > 0)
    candidates = []
    for steps in {max(least, int(exact)), max(least, int(exact) + 1)}:
        ratio = steps / training.max_steps
        schedule = training.schedule.scaled(ratio)
        keys: dict[str, Any] = {"max_steps": steps, "schedule": schedule.model_dump(mode="json")}
        if (averaging := training.weight_averaging) is not None:
            keys["weight_averaging"] = averaging.scaled(ratio).model_dump(mode="json")
        if warmup := training.batch_warmup:
            fewest = warmup.sizes(arm.pretrain.data.batch_size)
            keys["batch_warmup"] = {"steps": max(fewest, round(warmup.steps * ratio))}
        if rows := training.sequence_warmup:
            keys["sequence_warmup"] = {"steps": max(doublings, min(steps - 1, round(rows.steps * ratio)))}
        moved = at("pretrain.training", tree(keys))
        if alone:
            moved = merge(moved, at("adapt.warmup_steps", tree(max(1, min(steps - 1, round(alone * ratio))))))
        candidates.append(changed(arm, moved))
    return candidates


def _widths(arm: Experiment, parameters: float) -> list[Experiment]:
    """The arm with the two widths of its feed-forward networks between which `parameters` lies."""
    step = 8 if arm.model.d_model < 512 else 64

    def count(d_ff: int) -> float:
        keys = merge(tree(arm.model.model_dump(mode="json")), at("feed_forward.d_ff", tree(d_ff)))
        return count_parameters(resolve_model(validate(type(arm.model), keys, ("model",)))).total

    # Parameters are linear in d_ff, so two points give the line.
    least = count(step)
    slope = (count(2 * step) - least) / step
    if not slope:  # every layer sets a d_ff of its own
        return []
    steps = ((parameters - least) / slope + step) / step
    return [
        changed(arm, at("model.feed_forward.d_ff", tree(step * n)))
        for n in {max(1, int(steps)), max(1, int(steps) + 1)}
    ]

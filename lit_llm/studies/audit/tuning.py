"""Audit of tuning: one learning rate for all arms, or a sweep that searches arms unequally."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lit_llm.config.problems import some
from lit_llm.config.tree import leaves, under
from lit_llm.experiment.cost import Cost, cost_of
from lit_llm.models.resolve import resolve_model
from lit_llm.studies.audit.budgets import TOLERANCE, Excess, excesses
from lit_llm.studies.audit.findings import INTERVENTION, Finding, ruled
from lit_llm.studies.load import Ablation, Arm, SearchedKeys

LR = "pretrain.training.optimizer.lr"
ALL = "all arms"
"""Arm's name in findings on the whole study."""


def one_learning_rate(ablation: Ablation) -> Iterator[Finding]:
    """A note where different networks share one learning rate that is tuned for none of them."""
    arms = ablation.arms
    if any(under(LR, *arm.intervened_keys) for arm in arms) or any(
        LR in searched.ranges for searched in ablation.searches.values()
    ):
        return
    optimizers = [arm.experiment.pretrain.training.optimizer for arm in arms]
    one = len({(optimizer.kind, optimizer.lr) for optimizer in optimizers}) == 1
    if one and len({resolve_model(arm.experiment.model) for arm in arms}) > 1:
        message = (
            f"one learning rate ({optimizers[0].lr:g}) for all arms, tuned for none: an arm may prefer another one. "
        )
        message += "Make it a factor, or tune each arm alike by a sweep, as sweeps/fair_lr.yaml does"
        yield Finding("note", ALL, LR, message)


def unequal_searches(ablation: Ablation, costs: Mapping[str, Cost]) -> Iterator[Finding]:
    """Findings on a sweep that tunes only one arm, or lets a trial win by its budget."""
    for name, searched in ablation.searches.items():
        arm = ablation.arm(name)
        yield from _unequal_ranges(ablation, arm, searched)
        yield from _searched_budgets(ablation, arm, searched, costs[name])


def _unequal_ranges(ablation: Ablation, arm: Arm, searched: SearchedKeys) -> Iterator[Finding]:
    """Findings on keys of both arms that only one searches, or that each searches over other values."""
    baseline = ablation.arm(arm.baseline)
    if baseline is arm:
        return
    other = ablation.searches[baseline.name]
    both = dict(leaves(arm.flat)).keys() & dict(leaves(baseline.flat)).keys()
    for key in dict.fromkeys((*searched.ranges, *other.ranges)):
        values, baseline_values = searched.ranges.get(key), other.ranges.get(key)
        if values == baseline_values or not any(under(each, key) for each in both):
            continue
        if values and baseline_values:
            message = f"is searched over {values}, and over {baseline_values} in {baseline.name}"
            yield Finding("note", arm.name, key, message)
            continue
        where = "here" if values else f"in {baseline.name}"
        reason = f"is searched {where} alone, and both arms have it: one of them is tuned and the other is not"
        if under(key, *INTERVENTION):
            yield Finding("note", arm.name, key, reason)
        else:
            advice = "; leave out the `when`, or `allow` it with its reason"
            yield ruled(ablation, "refused", arm, key, reason, advice)


def _searched_budgets(ablation: Ablation, arm: Arm, searched: SearchedKeys, cost: Cost) -> Iterator[Finding]:
    """Findings on budgets that a searched key raises, as the best trial may be the one with the largest budget."""
    moved: dict[str, tuple[Excess, list[str]]] = {}
    for key, experiment in searched.ends:
        for excess in excesses(cost_of(experiment), cost):
            budget = excess.budgets[0]
            learned = budget.name == "loss_tokens" and under(key, "pretrain.objective")  # intended there
            if budget.blocks and not learned and excess.ratio > 1:
                largest, keys = moved.setdefault(budget.name, (excess, []))
                keys.append(key)
                moved[budget.name] = (max(largest, excess, key=lambda each: each.ratio), keys)
    for excess, keys in moved.values():
        budget, names = excess.budgets[0], list(dict.fromkeys(keys))
        reason = f"searching {some(names)} reaches {excess.sentence(f'the setting of {arm.name} in the file')}"
        if searched.traded:
            yield Finding("note", arm.name, budget.key, f"{reason}: a cost is a goal beside the metric")
        else:
            most = f"{0.999 * (1 + TOLERANCE) * budget.of(cost):.4g}"  # rounded, still within it
            advice = (
                f": a trial may win by its budget; bound it (`constraints: [{budget.name} <= {most}]`), hold it, or "
            )
            advice += f"`allow: [{{key: {budget.key}, because: ...}}]`"
            yield ruled(ablation, "refused", arm, budget.key, reason, advice)

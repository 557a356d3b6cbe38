"""Budgets of each arm against its baseline: what it may read, spend and hold, and whether that is the same.

An arm that reads eight times the tokens, or has twenty times the parameters, is expected to be better whatever is
switched. Each figure outside of 10% is therefore a finding that names the ratio. Tokens, loss tokens, training FLOPs,
parameters and finetuning tokens block the study; `match` or an `allow` with its reason are the ways out. Training
memory and the cost of decoding are notes: they are part of the answer, not of what a model learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Literal

from lit_llm.config.metrics import THROUGHPUT
from lit_llm.config.tree import under
from lit_llm.experiment.cost import FIGURES, GENERATE, PROMPT, Cost
from lit_llm.statistics.scaling.group_fit import different, numbers_of
from lit_llm.statistics.scaling.runs import X
from lit_llm.studies.audit.findings import Finding, differs, ruled
from lit_llm.studies.load import Ablation, Arm
from lit_llm.studies.schema import ScalingGate, ScalingLaw

BUDGET = "budget"
"""The section that a budget's key begins with in `allow`; alone it allows all budgets of a study."""
TOLERANCE = 0.1
"""Largest relative difference between an arm's figure and its baseline's that is no finding."""
LARGEST = 4.0
"""Largest ratio that matching by one compute budget may leave in the other two, which are then notes."""
SHARE_OF_STEPS, FEWEST_STEPS = 0.1, 10
"""Floors: the smallest share of its baseline's steps that an arm may take, and the fewest that matching may leave."""
COMPUTE = ("tokens", "loss_tokens", "train_flops")
"""Budgets that the length of training moves together."""
MOVES = {
    "train_flops": (*COMPUTE, "parameters"),
    "parameters": ("parameters", "train_flops"),
    "tokens": COMPUTE,
}
"""{x of a power law: the budgets that differ between its sizes}. FLOPs may be spent in any way."""

STEPS, WARMUP = "pretrain.training.max_steps", "pretrain.training.schedule.warmup_steps"


@dataclass(frozen=True)
class Budget:
    """A figure of a run that is compared with the baseline's."""

    name: str
    """In `allow` its key is `budget.NAME`."""
    words: str
    """What it is called in a sentence."""
    of: Callable[[Cost], float]
    blocks: bool = True
    """Whether a difference stops the study."""

    @property
    def key(self) -> str:
        return f"{BUDGET}.{self.name}"


BUDGETS = (
    Budget("tokens", "tokens", FIGURES["tokens"]),
    Budget("loss_tokens", "loss tokens", FIGURES["loss_tokens"]),
    Budget("train_flops", "training FLOPs", FIGURES["train_flops"]),
    Budget("parameters", "parameters", FIGURES["parameters"]),
    Budget("finetune_tokens", "finetuning tokens", lambda cost: cost.finetune_tokens),
    Budget("memory", "training memory", FIGURES["memory_bytes"], blocks=False),
    Budget(
        "decode",
        "inference FLOPs",
        lambda cost: (PROMPT * cost.prefill_flops_per_token + GENERATE * cost.decode_flops_per_token) * cost.generates,
        blocks=False,
    ),
    Budget("kv_cache", "key-value cache", lambda cost: FIGURES["kv_cache_bytes"](cost) * cost.generates, blocks=False),
)
"""All of them. The cost of inference is that of a prompt and an answer of 1000 tokens each."""


@dataclass(frozen=True)
class Excess:
    """Budgets of an arm that differ from its baseline's by about one ratio."""

    budgets: tuple[Budget, ...]
    """The one that names it first, then those that follow from it."""
    ratio: float
    """The arm's figure over the baseline's."""

    def sentence(self, baseline: str) -> str:
        """`8.0 times the tokens (loss tokens and training FLOPs alike) of base`; without a baseline, no `of`."""
        first, *rest = (budget.words for budget in self.budgets)
        alike = f" ({' and '.join(rest)} alike)" if rest else ""
        return f"{times(self.ratio)} the {first}{alike}" + f" of {baseline}" * bool(baseline)


def times(ratio: float) -> str:
    """A ratio as people read it: `8.0 times`, `0.56 times`."""
    digits = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.1f}" if ratio >= 1 else f"{ratio:.2g}"
    return f"{digits} times"


def is_outside(ratio: float) -> bool:
    """Whether a ratio of two budgets is more than 10% from one, either way."""
    return not 1 / (1 + TOLERANCE) <= ratio <= 1 + TOLERANCE


def excesses(cost: Cost, baseline: Cost) -> Iterator[Excess]:
    """Budgets outside of 10%. Those that the number of tokens moves along are said with it, not once more each."""
    ratios = {budget: budget.of(cost) / budget.of(baseline) for budget in BUDGETS if budget.of(baseline)}
    outside = {budget: ratio for budget, ratio in ratios.items() if is_outside(ratio)}
    tokens = BUDGETS[0]
    for budget, ratio in outside.items():
        alike: tuple[Budget, ...] = ()
        if budget is tokens:
            followers = (other for other in outside if other.name in COMPUTE and other is not tokens)
            alike = tuple(other for other in followers if not is_outside(outside[other] / ratio))
        elif budget.name in COMPUTE and tokens in outside and not is_outside(ratio / outside[tokens]):
            continue
        yield Excess((budget, *alike), ratio)


def audit_budgets(ablation: Ablation, arm: Arm, costs: Mapping[str, Cost]) -> Iterator[Finding]:
    """Findings of an arm whose budgets are not its baseline's, and of a training that is too short.

    costs: of every arm of the study, by its name.
    """
    baseline = ablation.arm(arm.baseline)
    cost = costs[arm.name]
    scaling, across = ablation.study.compare.scaling, _across(ablation, arm, costs)
    excused = MOVES[across] if across is not None else ()
    if scaling is not None and across == scaling.x and (partner := _at_the_same_size(ablation, scaling, arm, costs)):
        excused = MOVES["train_flops"]  # the partner stands in for the baseline
        for excess in excesses(cost, costs[partner.name]):
            if excess.budgets[0].blocks and not _follows_from_the_objective(excess, arm, partner):
                yield _stop(ablation, arm, excess, f"{partner.name}, of as many {_words(scaling.x)}")
    named = "its baseline" if ablation.study.compare.stratify_by else baseline.name
    notes: dict[str, list[Excess]] = {}
    for excess in excesses(cost, costs[baseline.name]):
        if _follows_from_the_objective(excess, arm, baseline):
            continue  # which the audit of the objective says
        if (why := _noted_only(ablation, excess, across, excused)) is not None:
            notes.setdefault(why, []).append(excess)
        else:
            yield _stop(ablation, arm, excess, named, "" if across else _sizes_lacking(ablation, excess))
    for why, group in notes.items():
        *parts, last = (excess.sentence("") for excess in group)
        message = f"{', '.join(parts)} and {last}" if parts else last
        yield Finding("note", arm.name, group[0].budgets[0].key, f"{message} of {named}{why}")
    yield from _floors(ablation, arm, baseline, across is not None)


def _sizes_lacking(ablation: Ablation, excess: Excess) -> str:
    """What sizes a study across sizes needs, for the advice where it lacks them; else nothing."""
    compare = ablation.study.compare
    laws = [(name, law) for name in ("scaling", "gate") if (law := getattr(compare, name)) is not None]
    needs = [
        f"`compare.{name}` excuses it where a group has {numbers_of(law.irreducible) + 1} sizes or more, within the "
        f"{_words(x)} of the baseline's"
        for name, law in laws
        if excess.budgets[0].name in MOVES[x := "train_flops" if isinstance(law, ScalingGate) else law.x]
    ]
    return "".join(f"; {need}" for need in needs)


def _stop(ablation: Ablation, arm: Arm, excess: Excess, baseline: str, besides: str = "") -> Finding:
    budget = excess.budgets[0]
    by, way = ablation.study.match.by, "; make it equal"
    if budget.name in (*COMPUTE, "parameters") and by != budget.name and not ablation.searches:
        instead = f" instead of by {by}" if by != "none" else ""
        way = f"; `match: {{by: {budget.name}}}`{instead}"
    advice = f"{way}, or `allow: [{{key: {budget.key}, because: ...}}]`{besides}"
    return ruled(ablation, "refused", arm, budget.key, excess.sentence(baseline), advice)


def _noted_only(ablation: Ablation, excess: Excess, across: str | None, excused: Collection[str]) -> str | None:
    """How a sentence about a budget that does not block ends, None of one that does.

    across: as `_across` says. excused: names of the budgets that may differ across it.
    """
    study, budget = ablation.study, excess.budgets[0]
    if not budget.blocks:
        return ""
    if any(searched.traded for searched in ablation.searches.values()):
        return ": a cost is a goal of the sweep"
    if study.compare.metric.startswith(THROUGHPUT):
        return ": speed is compared, not what is learned"
    if across is not None and budget.name in excused:
        return f": the study compares across {_words(across)}"
    if study.match.by in COMPUTE and budget.name in COMPUTE and 1 / LARGEST <= excess.ratio <= LARGEST:
        return f": {_words(study.match.by)} are matched"
    return None


def _follows_from_the_objective(excess: Excess, arm: Arm, baseline: Arm) -> bool:
    """Whether only the number of loss tokens differs, between arms whose objectives differ."""
    if excess.budgets[0].name != "loss_tokens":
        return False
    return any(under(key, "pretrain.objective") for key in differs(arm, baseline))


def _words(name: str) -> str:
    return next(budget.words for budget in BUDGETS if budget.name == name)


def _across(ablation: Ablation, arm: Arm, costs: Mapping[str, Cost]) -> str | None:
    """The figure by whose power laws an arm is compared, whatever its size; None where no law will stand.

    `compare.scaling` fits a law to each group, `compare.gate` one to the baseline's group alone. Two groups are
    compared where their sizes overlap: what lies beyond is only extrapolated.
    """
    compare, root = ablation.study.compare, ablation.root(arm)
    if (law := compare.scaling) is not None:
        arm_sizes, baseline_sizes = (_log_sizes(ablation, costs, law.x, law.by, each) for each in (arm, root))
        if (
            _has_enough_sizes(arm_sizes, law.irreducible)
            and _has_enough_sizes(baseline_sizes, law.irreducible)
            and _overlap(arm_sizes, baseline_sizes)
        ):
            return law.x
    if (gate := compare.gate) is not None:
        arm_sizes, baseline_sizes = (_log_sizes(ablation, costs, "train_flops", gate.by, each) for each in (arm, root))
        if _has_enough_sizes(baseline_sizes, gate.irreducible) and _overlap(arm_sizes, baseline_sizes):
            return "train_flops"
    return None


def _log_sizes(
    ablation: Ablation, costs: Mapping[str, Cost], x: X, by: Literal["arm", "family"], member: Arm
) -> list[float]:
    """The logarithms of x of all arms of a member's group."""
    group = _group(by, member)
    return [log(FIGURES[x](costs[arm.name])) for arm in ablation.arms if _group(by, arm) == group]


def _has_enough_sizes(sizes: Sequence[float], irreducible: bool) -> bool:
    """Whether a group has more sizes than a power law has numbers: with as many, any sizes lie on one."""
    return different(sizes) > numbers_of(irreducible)


def _overlap(sizes: Sequence[float], others: Sequence[float]) -> bool:
    """Whether the ranges of the sizes of two groups have a part in common, give or take what is no finding."""
    return max(min(sizes), min(others)) <= min(max(sizes), max(others)) + log(1 + TOLERANCE)


def _at_the_same_size(ablation: Ablation, scaling: ScalingLaw, arm: Arm, costs: Mapping[str, Cost]) -> Arm | None:
    """The arm of the baseline's family that stands beside this one in a study of scaling, where one does.

    Curves over FLOPs compare at equal FLOPs, however they are spent. Curves over parameters compare at equal
    parameters, and there an arm with more tokens would be unfair; likewise those over tokens.
    """
    root = ablation.root(arm)
    if scaling.x not in ("parameters", "tokens") or _group(scaling.by, arm) == _group(scaling.by, root):
        return None
    size, cost = FIGURES[scaling.x], costs[arm.name]
    beside = [
        other
        for other in ablation.arms
        if _group(scaling.by, other) == _group(scaling.by, root)
        and not is_outside(size(cost) / size(costs[other.name]))
    ]

    def distance(other: Arm) -> float:
        other_cost = costs[other.name]
        return max(
            abs(log(b.of(cost) / b.of(other_cost))) for b in BUDGETS if b.blocks and b.of(cost) and b.of(other_cost)
        )

    return min(beside, key=distance, default=None)


def _group(by: Literal["arm", "family"], arm: Arm) -> str:
    return arm.group if by == "arm" else arm.experiment.model.family


def _floors(ablation: Ablation, arm: Arm, baseline: Arm, across_sizes: bool) -> Iterator[Finding]:
    """Trainings too short to be one, whatever budget they were made equal in."""
    steps, wanted = (each.experiment.pretrain.training.max_steps for each in (arm, baseline))
    way = "match by something else, change the batch size, or `allow: [{key: %s, because: ...}]`"
    share = steps / wanted
    before, after = arm.matched_keys.get(STEPS, (steps, steps))
    if not SHARE_OF_STEPS <= share <= 1 / SHARE_OF_STEPS and not across_sizes:
        reason = f"takes {steps} steps, {times(share)} the {wanted} of {baseline.name}"
        yield ruled(ablation, "refused", arm, f"{BUDGET}.steps", reason, "; " + way % f"{BUDGET}.steps")
    elif after < FEWEST_STEPS <= before:
        reason = f"is left {after} steps of {before} by matching: fewer than {FEWEST_STEPS} are no training"
        yield ruled(ablation, "refused", arm, f"{BUDGET}.steps", reason, "; " + way % f"{BUDGET}.steps")
    warm, left = arm.matched_keys.get(WARMUP, (0, 0))
    if warm and not left:
        reason = f"is left no warm-up by matching, of {warm} steps before"
        yield ruled(ablation, "refused", arm, f"{BUDGET}.warmup", reason, "; " + way % f"{BUDGET}.warmup")


def unused_rules(ablation: Ablation, findings: Sequence[Finding]) -> Iterator[Finding]:
    """A note for each `allow` that no finding needs."""
    needed = {finding.key for finding in findings if finding.kind == "allowed" or under(finding.key, BUDGET)}
    for rule in ablation.study.allow:
        if not any(under(key, rule.key) for key in needed):
            yield Finding("note", "allow", rule.key, "allows a difference that no arm has; leave it out")

"""Audit of budgets: tokens, compute, parameters and memory of each arm against its baseline.

An arm with eight times the tokens, or twenty times the parameters, is better whatever is switched. A figure that
differs by more than 10% is therefore a finding with the ratio. Tokens, loss tokens, training FLOPs, parameters and
finetuning tokens block the study, unless `match` makes them equal or `allow` gives a reason. Training memory and the
cost of decoding are only notes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Literal

from lit_llm.config.metrics import THROUGHPUT
from lit_llm.config.tree import under
from lit_llm.experiment.cost import COST_FIGURES, GENERATE, PROMPT, Cost
from lit_llm.statistics.scaling.group_fit import different, numbers_of
from lit_llm.statistics.scaling.runs import X
from lit_llm.studies.audit.findings import Finding, differs, ruled
from lit_llm.studies.load import Ablation, Arm
from lit_llm.studies.schema import ScalingGate, ScalingLaw

BUDGET = "budget"
"""Section of the budgets' keys in `allow`; alone it allows all budgets of a study."""
TOLERANCE = 0.1
"""Largest relative difference between an arm's budget and its baseline's that is no finding."""
LARGEST = 4.0
"""Largest ratio of the other two compute budgets that is only a note when one of the three is matched."""
SHARE_OF_STEPS, FEWEST_STEPS = 0.1, 10
"""Smallest share of the baseline's steps that an arm may take, and fewest steps that matching may leave."""
COMPUTE = ("tokens", "loss_tokens", "train_flops")
"""Budgets that the length of training moves together."""
MOVES = {
    "train_flops": (*COMPUTE, "parameters"),
    "parameters": ("parameters", "train_flops"),
    "tokens": COMPUTE,
}
"""{x of a power law: budgets that may differ between its sizes}. FLOPs may be spent in any way."""

STEPS, WARMUP = "pretrain.training.max_steps", "pretrain.training.schedule.warmup_steps"


@dataclass(frozen=True)
class Budget:
    """A cost of a run that is compared with the baseline's."""

    name: str
    """Name, in `allow` as `budget.NAME`."""
    words: str
    """Name in a sentence."""
    of: Callable[[Cost], float]
    blocks: bool = True
    """Whether a difference stops the study."""

    @property
    def key(self) -> str:
        return f"{BUDGET}.{self.name}"


BUDGETS = (
    Budget("tokens", "tokens", COST_FIGURES["tokens"]),
    Budget("loss_tokens", "loss tokens", COST_FIGURES["loss_tokens"]),
    Budget("train_flops", "training FLOPs", COST_FIGURES["train_flops"]),
    Budget("parameters", "parameters", COST_FIGURES["parameters"]),
    Budget("finetune_tokens", "finetuning tokens", lambda cost: cost.finetune_tokens),
    Budget("memory", "training memory", COST_FIGURES["memory_bytes"], blocks=False),
    Budget(
        "decode",
        "inference FLOPs",
        lambda cost: (PROMPT * cost.prefill_flops_per_token + GENERATE * cost.decode_flops_per_token) * cost.generates,
        blocks=False,
    ),
    Budget(
        "kv_cache", "key-value cache", lambda cost: COST_FIGURES["kv_cache_bytes"](cost) * cost.generates, blocks=False
    ),
)
"""All of them. The cost of inference is that of a prompt and an answer of 1000 tokens each."""


@dataclass(frozen=True)
class Excess:
    """Budgets of an arm that differ from its baseline's by about one ratio."""

    budgets: tuple[Budget, ...]
    """The budget to report first, then those that follow from it."""
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
    """True where a ratio of two budgets is more than 10% from one, either way."""
    return not 1 / (1 + TOLERANCE) <= ratio <= 1 + TOLERANCE


def excesses(cost: Cost, baseline: Cost) -> Iterator[Excess]:
    """Budgets that differ by more than 10%. Those that move with the number of tokens are reported with it."""
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
    """Findings of an arm whose budgets differ from its baseline's, or whose training is too short.

    costs: {arm of the study: its cost}.
    """
    baseline = ablation.arm(arm.baseline)
    cost = costs[arm.name]
    scaling, across = ablation.study.compare.scaling, _across(ablation, arm, costs)
    excused = MOVES[across] if across is not None else ()
    if (
        scaling is not None
        and across == scaling.x
        and (partner := _partner_of_same_size(ablation, scaling, arm, costs))
    ):
        excused = MOVES["train_flops"]  # the partner stands in for the baseline
        for excess in excesses(cost, costs[partner.name]):
            if excess.budgets[0].blocks and not _follows_from_the_objective(excess, arm, partner):
                yield _refusal(ablation, arm, excess, f"{partner.name}, of as many {_budget_words(scaling.x)}")
    named = "its baseline" if ablation.study.compare.stratify_by else baseline.name
    notes: dict[str, list[Excess]] = {}
    for excess in excesses(cost, costs[baseline.name]):
        if _follows_from_the_objective(excess, arm, baseline):
            continue  # the audit of the objective reports it
        if (why := _noted_only(ablation, excess, across, excused)) is not None:
            notes.setdefault(why, []).append(excess)
        else:
            yield _refusal(ablation, arm, excess, named, "" if across else _sizes_lacking(ablation, excess))
    for why, group in notes.items():
        *parts, last = (excess.sentence("") for excess in group)
        message = f"{', '.join(parts)} and {last}" if parts else last
        yield Finding("note", arm.name, group[0].budgets[0].key, f"{message} of {named}{why}")
    yield from _floors(ablation, arm, baseline, across is not None)


def _sizes_lacking(ablation: Ablation, excess: Excess) -> str:
    """Advice on the sizes that a power law needs, for an excess that `compare.scaling` or `compare.gate` excuses."""
    compare = ablation.study.compare
    laws = [(name, law) for name in ("scaling", "gate") if (law := getattr(compare, name)) is not None]
    needs = [
        f"`compare.{name}` excuses it where a group has {numbers_of(law.irreducible) + 1} sizes or more, within the "
        f"{_budget_words(x)} of the baseline's"
        for name, law in laws
        if excess.budgets[0].name in MOVES[x := "train_flops" if isinstance(law, ScalingGate) else law.x]
    ]
    return "".join(f"; {need}" for need in needs)


def _refusal(ablation: Ablation, arm: Arm, excess: Excess, baseline: str, besides: str = "") -> Finding:
    budget = excess.budgets[0]
    by, way = ablation.study.match.by, "; make it equal"
    if budget.name in (*COMPUTE, "parameters") and by != budget.name and not ablation.searches:
        instead = f" instead of by {by}" if by != "none" else ""
        way = f"; `match: {{by: {budget.name}}}`{instead}"
    advice = f"{way}, or `allow: [{{key: {budget.key}, because: ...}}]`{besides}"
    return ruled(ablation, "refused", arm, budget.key, excess.sentence(baseline), advice)


def _noted_only(ablation: Ablation, excess: Excess, across: str | None, excused: Collection[str]) -> str | None:
    """End of the note on a budget that does not block the study; None where it does.

    across: from `_across`. excused: names of the budgets that may differ across it.
    """
    study, budget = ablation.study, excess.budgets[0]
    if not budget.blocks:
        return ""
    if any(searched.traded for searched in ablation.searches.values()):
        return ": a cost is a goal of the sweep"
    if study.compare.metric.startswith(THROUGHPUT):
        return ": speed is compared, not what is learned"
    if across is not None and budget.name in excused:
        return f": the study compares across {_budget_words(across)}"
    if study.match.by in COMPUTE and budget.name in COMPUTE and 1 / LARGEST <= excess.ratio <= LARGEST:
        return f": {_budget_words(study.match.by)} are matched"
    return None


def _follows_from_the_objective(excess: Excess, arm: Arm, baseline: Arm) -> bool:
    """True where only the number of loss tokens differs, between arms whose objectives differ."""
    if excess.budgets[0].name != "loss_tokens":
        return False
    return any(under(key, "pretrain.objective") for key in differs(arm, baseline))


def _budget_words(name: str) -> str:
    return next(budget.words for budget in BUDGETS if budget.name == name)


def _across(ablation: Ablation, arm: Arm, costs: Mapping[str, Cost]) -> str | None:
    """The x of the power laws that compare an arm at any size; None where no law can be fitted.

    `compare.scaling` fits a law to each group, `compare.gate` one to the baseline's group alone. Two groups are
    comparable where their sizes overlap.
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
    """Logarithms of x of all arms in the group of `member`."""
    group = _group(by, member)
    return [log(COST_FIGURES[x](costs[arm.name])) for arm in ablation.arms if _group(by, arm) == group]


def _has_enough_sizes(sizes: Sequence[float], irreducible: bool) -> bool:
    """True where a group has more sizes than its power law has parameters."""
    return different(sizes) > numbers_of(irreducible)


def _overlap(sizes: Sequence[float], others: Sequence[float]) -> bool:
    """True where the ranges of two groups' sizes overlap, within the tolerance."""
    return max(min(sizes), min(others)) <= min(max(sizes), max(others)) + log(1 + TOLERANCE)


def _partner_of_same_size(ablation: Ablation, scaling: ScalingLaw, arm: Arm, costs: Mapping[str, Cost]) -> Arm | None:
    """The arm of the baseline's group with the same size as this one, in a study of scaling; None without one.

    Curves over FLOPs compare at equal FLOPs, however they are spent. Curves over parameters compare at equal
    parameters, where an arm with more tokens would be unfair; likewise curves over tokens.
    """
    root = ablation.root(arm)
    if scaling.x not in ("parameters", "tokens") or _group(scaling.by, arm) == _group(scaling.by, root):
        return None
    size, cost = COST_FIGURES[scaling.x], costs[arm.name]
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
    """Findings on trainings that are too short, whatever budget was matched."""
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

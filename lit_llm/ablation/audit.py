"""Is the comparison fair? Between an arm and its baseline only declared keys may differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from lit_llm.ablation.arms import Ablation, Arm
from lit_llm.ablation.confounds import confounds, shown
from lit_llm.ablation.findings import INTERVENTION, Finding, differs, ruled
from lit_llm.ablation.match import TOLERANCE
from lit_llm.ablation.probe import probe, together
from lit_llm.config.problems import some
from lit_llm.config.tree import under
from lit_llm.evaluation.config import YARDSTICKS, yardstick_of
from lit_llm.experiment.chain import EVALUATED, FINETUNED
from lit_llm.experiment.config import Checkpoint
from lit_llm.experiment.cost import cost_of
from lit_llm.models.adapt import Adaptation, altered
from lit_llm.models.resolve import resolve_model
from lit_llm.objectives.config import continues

YARDSTICK = (
    "pretrain.data.corpus",
    "pretrain.data.tokenizer",
    "pretrain.data.sequence_length",
    "pretrain.data.validation_fraction",
    "pretrain.data.test_fraction",
    "pretrain.data.near_duplicates",
    "pretrain.validation",
)
"""Keys that decide which target tokens the metrics of a stage are measured on."""
TARGET_NLL, MASKED_NLL = YARDSTICKS
CONTINUATION = (TARGET_NLL, "val/perplexity", "val/bits_per_byte")
"""What a model says of the tokens that go on from a prefix, in several units."""
_YARDSTICKS = {
    "val/": YARDSTICK,
    f"{FINETUNED}val/": (*YARDSTICK[:2], "finetune.data", "finetune.validation"),
    EVALUATED: (*YARDSTICK[:6], "finetune.data", "evaluate"),
    f"{FINETUNED}{EVALUATED}": (*YARDSTICK[:6], "finetune.data", "evaluate"),
}
"""The same by the beginning of a metric's name."""

_SOURCE = re.compile(r"^(adapt\.from\.((en|de)coder\.)?)+")
"""The address of a source, of its own sources, or of one side's."""


def audit(ablation: Ablation, tell: Callable[[str], None] = lambda _: None, built: bool = True) -> list[Finding]:
    """Every finding of every arm.

    built: compare what fair arms compute, too; see `probe`, which tells what it does where that takes a while.
    """
    found = [finding for arm in ablation.arms for finding in _audit_arm(ablation, arm)]
    if not built or any(finding.kind == "refused" for finding in found):
        return found
    found += probe(ablation, tell)
    used = {finding.key for finding in found if finding.kind == "allowed"}
    for rule in ablation.study.allow:
        if not any(under(key, rule.key) for key in used):
            found.append(Finding("note", "allow", rule.key, "allows a difference that no arm has; leave it out"))
    return found


def _audit_arm(ablation: Ablation, arm: Arm) -> Iterator[Finding]:
    if arm.experiment.pretrain.masks.documents == "separate":
        message = "FLOPs are an upper bound: they are counted as if each window were of one document"
        yield Finding("note", arm.name, "pretrain.masks.documents", message)
    metric = ablation.study.compare.metric
    if metric == MASKED_NLL and continues(arm.experiment.model.family):
        message = f"{metric} is of encoder_only models, which see what comes after a token; use {TARGET_NLL}"
        yield Finding("refused", arm.name, "compare.metric", message)
    if not continues(arm.experiment.model.family) and metric.removeprefix(FINETUNED).startswith(CONTINUATION):
        message = f"an encoder_only model has no {metric}: it predicts no token from those before it alone"
        yield Finding("refused", arm.name, "compare.metric", f"{message}; use {MASKED_NLL}, among such models")
    if arm.experiment.adapt is not None:
        yield from _audit_adaptation(arm)
    if arm.name == arm.baseline:
        return
    baseline = ablation.arm(arm.baseline)
    keys = differs(arm, baseline)
    # Between an arm outside the grid, which has no level of a factor, and one inside, the factor excuses nothing.
    declared = arm.declared | baseline.declared if arm.levels and baseline.levels else frozenset()
    yield from _audit_match(ablation, arm)
    for key, (old, new) in keys.items():
        yardstick = next((keys for prefix, keys in _YARDSTICKS.items() if metric.startswith(prefix)), ())
        # A level that a source has, too, is in its keys.
        if under(_SOURCE.sub("", key), *declared) and not under(key, *yardstick):
            continue
        # What matching has moved is judged as it was before.
        old, new = baseline.derived.get(key, [old])[0], arm.derived.get(key, [new])[0]
        if old == new or (arm.group != baseline.group and under(key, *INTERVENTION)):
            continue
        reason = "differs and is no factor of the study"
        if under(key, *declared):
            reason = f"differs, so {metric} is not measured on the same target tokens"
        way = "`allow` it with its reason" if under(key, *declared) else "make it equal, a factor, or `allow` it"
        values = f": {old!r} in {baseline.name}, {new!r} here; {way}"
        yield ruled(ablation, "refused", arm, key, reason, values)
    yield from confounds(ablation, arm, baseline)
    other_objective = any(under(key, "pretrain.objective") for key in keys)
    if metric == "val/objective_loss" and other_objective:
        yield Finding(
            "refused",
            arm.name,
            "compare.metric",
            f"val/objective_loss of another objective than {baseline.name}'s is another quantity; use "
            + yardstick_of(arm.experiment.model.family),
        )
    if other_objective and ablation.study.match.by != "loss_tokens":
        message = "the loss is computed on another number of tokens: see loss tokens"
        yield Finding("note", arm.name, "pretrain.objective", message)
    first = {name: labels[0] for name, labels in ablation.factors.items()}
    moved = [name for name, label in arm.levels.items() if baseline.levels.get(name, first[name]) != label]
    grid = ablation.study.grid
    if grid and grid.design == "fractional_factorial" and arm.levels:
        if arm.group != baseline.group and not moved:
            message = f"its other combinations differ from {baseline.name} in factors too; compare its effects instead"
            yield Finding("note", arm.name, "compare", message)
    elif arm.group != baseline.group and moved:
        message = f"differs from {baseline.name} in its arm and in {', '.join(moved)} at once; see `compare.within`"
        yield Finding("note", arm.name, "compare", message)


def _audit_adaptation(arm: Arm) -> Iterator[Finding]:
    """What is taken over, what is not, and what that has cost before."""
    adapt, found = arm.experiment.adapt, arm.experiment.adaptation
    assert adapt is not None
    message = f"{len(found.taken)} of {len(found.taken) + len(found.fresh)} tensors are taken over"
    lists = (("fresh", together(found.fresh)), ("left behind", _left(found)))
    message += "".join(f"; {what}: {some(names)}" for what, names in lists if names)
    yield Finding("note", arm.name, "adapt.from", message)
    cost = cost_of(arm.experiment)
    if cost.before.train_flops:
        flops, tokens = cost.before.train_flops, cost.before.tokens
        share = flops / cost.train_flops
        message = f"its source's {tokens:,} tokens and {flops:.3g} FLOPs ({share:.0%} of all) are counted"
        yield Finding("note", arm.name, "adapt.from", message)
    if any(isinstance(given, Checkpoint) for given in adapt.sides.values()):
        message = "what a checkpoint's training has cost is not known, and not counted: no compute is equal to its"
        yield Finding("note", arm.name, "adapt.from", message)
    if changes := altered(resolve_model(arm.experiment.model), adapt.models):
        told = ", ".join(f"{key} {shown(old)} → {shown(new)}" for key, old, new in changes)
        yield Finding("note", arm.name, "adapt.from", f"what is taken over is not used as before: {told}")


def _left(found: Adaptation) -> list[str]:
    """What nothing is made of: whole layers by their numbers, the rest as parameters."""
    used = {_layer(name) for _, name in found.taken.values()}
    layers = dict.fromkeys(_layer(name) for name in found.left if _layer(name) not in used)
    return [*filter(None, layers), *together(name for name in found.left if _layer(name) not in layers)]


def _layer(name: str) -> str:
    """`decoder.layers.3` of a parameter inside it, else ''."""
    return ".".join(name.split(".")[:3]) if ".layers." in name else ""


def _audit_match(ablation: Ablation, arm: Arm) -> Iterator[Finding]:
    by, baseline = ablation.study.match.by, ablation.root(arm)
    if by == "none":
        return
    if abs(arm.residual) > TOLERANCE:
        message = f"{by} differ from {baseline.name}'s by {arm.residual:+.1%} after matching, more than {TOLERANCE:.0%}"
        yield Finding("refused", arm.name, "match.by", f"{message}; change the arm, or match by something else")
        return
    moved = ", ".join(f"{key} {old} → {new}" for key, (old, new) in arm.derived.items()) or "nothing had to move"
    yield Finding("note", arm.name, "match.by", f"{by} within {arm.residual:+.2%} of {baseline.name}'s: {moved}")

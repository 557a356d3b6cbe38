"""Is the comparison fair? Between an arm and its baseline only declared keys may differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_llm.ablation.arms import Ablation, Arm, under
from lit_llm.ablation.match import TOLERANCE
from lit_llm.config.tree import difference

INTERVENTION = ("model", "pretrain.objective", "pretrain.masks")
"""What an ablation is about, and what an arm may therefore set for itself. All else is a control."""

YARDSTICK = (
    "pretrain.data.corpus",
    "pretrain.data.tokenizer",
    "pretrain.data.sequence_length",
    "pretrain.data.validation_fraction",
    "pretrain.validation",
)
"""Keys that decide which target tokens val/ metrics are measured on."""


@dataclass(frozen=True)
class Finding:
    """Something that the plan says about an arm."""

    kind: Literal["refused", "allowed", "no_op", "note"]
    """refused blocks the study; the others inform."""
    arm: str
    key: str
    message: str

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def differs(arm: Arm, baseline: Arm) -> dict[str, list[Any]]:
    """{key: [baseline's value, arm's value]} of the two experiments, without their seeds."""
    return difference(baseline.flat, arm.flat)


def audit(ablation: Ablation) -> list[Finding]:
    """Every finding of every arm."""
    found = [finding for arm in ablation.arms for finding in _audit_arm(ablation, arm)]
    used = {finding.key for finding in found if finding.kind == "allowed"}
    for rule in ablation.study.allow:
        if not any(under(key, rule.key) for key in used):
            found.append(Finding("note", "allow", rule.key, "allows a difference that no arm has; leave it out"))
    return found


def _audit_arm(ablation: Ablation, arm: Arm) -> Iterator[Finding]:
    if twin := _twin(ablation, arm):
        if twin.name == arm.baseline or twin.baseline == arm.baseline:
            message = f"is the same computation as {twin.name}: it costs nothing and shows nothing"
            yield Finding("no_op", arm.name, "", message)
        else:
            yield Finding("note", arm.name, "", f"is the same computation as {twin.name}, done once for both")
    if arm.experiment.pretrain.masks.documents == "separate":
        message = "FLOPs are an upper bound: they are counted as if each window were of one document"
        yield Finding("note", arm.name, "pretrain.masks.documents", message)
    if arm.name == arm.baseline:
        return
    baseline, metric = ablation.arm(arm.baseline), ablation.study.compare.metric
    keys = differs(arm, baseline)
    # An arm outside the grid has no level of a factor, so the factor does not excuse its value.
    declared = arm.declared | baseline.declared if arm.levels else frozenset()
    yield from _audit_match(ablation, arm)
    for key, (old, new) in keys.items():
        allowed = next((rule for rule in ablation.study.allow if under(key, rule.key)), None)
        if under(key, *declared) and not (metric.startswith("val/") and under(key, *YARDSTICK)):
            continue
        if key in arm.derived or (arm.group != baseline.group and under(key, *INTERVENTION)):
            continue
        reason = "differs and is no factor of the study"
        if under(key, *declared):
            reason = f"differs, so {metric} is not measured on the same target tokens"
        if allowed:
            yield Finding("allowed", arm.name, key, f"{reason}; allowed because {allowed.because}")
        else:
            yield Finding(
                "refused",
                arm.name,
                key,
                f"{reason}: {old!r} in {baseline.name}, {new!r} here; make it equal, a factor, or `allow` it",
            )
    other_objective = any(under(key, "pretrain.objective") for key in keys)
    if metric == "val/objective_loss" and other_objective:
        yield Finding(
            "refused",
            arm.name,
            "compare.metric",
            f"val/objective_loss of another objective than {baseline.name}'s is another quantity; use val/target_nll",
        )
    if other_objective and ablation.study.match.by != "loss_tokens":
        message = "the loss is computed on another number of tokens: see loss tokens"
        yield Finding("note", arm.name, "pretrain.objective", message)
    moved = [name for name, label in arm.levels.items() if baseline.levels.get(name, label) != label]
    grid = ablation.study.grid
    if grid and grid.design == "fractional_factorial" and arm.levels:
        if arm.group != baseline.group and not moved:
            message = f"its other combinations differ from {baseline.name} in factors too; compare its effects instead"
            yield Finding("note", arm.name, "compare", message)
    elif arm.group != baseline.group and moved:
        message = f"differs from {baseline.name} in its arm and in {', '.join(moved)} at once; see `compare.within`"
        yield Finding("note", arm.name, "compare", message)


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


def _twin(ablation: Ablation, arm: Arm) -> Arm | None:
    """An earlier arm (the baseline first) that is the same computation."""
    others = [other for other in ablation.arms[: ablation.arms.index(arm)] if other.name != arm.baseline]
    if arm.name != arm.baseline:
        others.insert(0, ablation.arm(arm.baseline))
    return next((other for other in others if other.computation == arm.computation), None)

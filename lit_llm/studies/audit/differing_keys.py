"""Audit of fairness: between an arm and its baseline only the intervention may differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lit_llm.config.metrics import (
    ANSWER_ACCURACY,
    BITS_PER_BYTE,
    EVALUATED,
    FINETUNED,
    MASKED_NLL,
    OF_SPLITS,
    SPLITS,
    TARGET_NLL,
    direction,
    metric_of,
    on_validation,
)
from lit_llm.config.problems import some
from lit_llm.config.tree import under
from lit_llm.evaluation.config import primary_metric
from lit_llm.experiment.cost import Cost, cost_of
from lit_llm.experiment.schema import Checkpoint
from lit_llm.models.adapt import Adaptation, altered
from lit_llm.models.resolve import resolve_model
from lit_llm.objectives.config import continues
from lit_llm.runs.fingerprints import identity_of_data
from lit_llm.runs.kernels import kernels_of
from lit_llm.runs.leaks import same_tokenizer
from lit_llm.runs.stage_graph import final_metric, validation_metric
from lit_llm.studies.audit.budgets import audit_budgets, is_outside, times, unused_rules
from lit_llm.studies.audit.confounds import confounds, format_value, unequal_rows, unread_blocks, unused_rows
from lit_llm.studies.audit.findings import INTERVENTION, Finding, differs, ruled
from lit_llm.studies.audit.ineffective_settings import no_effect
from lit_llm.studies.audit.no_ops import probe, together
from lit_llm.studies.audit.tuning import one_learning_rate, unequal_searches
from lit_llm.studies.load import Ablation, Arm
from lit_llm.studies.matching import TOLERANCE

if TYPE_CHECKING:
    from lit_llm.store.store import Store

TARGETS_OF_PRIMARY = (
    "pretrain.data.corpus",
    "pretrain.data.tokenizer",
    "pretrain.data.sequence_length",
    "pretrain.data.validation_fraction",
    "pretrain.data.test_fraction",
    "pretrain.data.near_duplicates",
    "pretrain.validation",
)
"""Keys that decide which target tokens the metrics of a stage are measured on."""
PRECISION = ("pretrain.training.precision", "finetune.training.precision")
"""Keys that decide the arithmetic of a metric."""
CONTINUATION = tuple(
    f"{begin}{metric.name}" for begin in SPLITS.values() for metric in OF_SPLITS if metric.families == "causal"
)
"""Metrics of the tokens after a prefix, in several units."""
EXAMPLES = tuple(
    f"finetune.data.{key}"
    for key in (
        "validation_files",
        "test_files",
        "inputs",
        "targets",
        "task",
        "input_length",
        "target_length",
        "over_long",
    )
)
"""Keys that decide which target tokens of the instruction data are scored; see `_measured_on` for the others."""
SPLIT_FROM_EXAMPLES = tuple(f"finetune.data.{key}" for key in ("examples", "validation_fraction", "test_fraction"))
"""Keys that also decide it where the split is a share of the examples, without files of its own."""
_TARGETS_OF = {
    **dict.fromkeys(SPLITS.values(), TARGETS_OF_PRIMARY),
    **dict.fromkeys(
        (f"{FINETUNED}{begin}" for begin in SPLITS.values()),
        (*TARGETS_OF_PRIMARY[:2], *EXAMPLES, "finetune.validation"),
    ),
    EVALUATED: (*TARGETS_OF_PRIMARY[:6], *EXAMPLES, "evaluate"),
    f"{FINETUNED}{EVALUATED}": (*TARGETS_OF_PRIMARY[:6], *EXAMPLES, "evaluate"),
}
"""{beginning of a metric's name: keys that decide its target tokens}."""

_SOURCE = re.compile(r"^(adapt\.from\.((en|de)coder\.)?)+")
"""Address of a source, of a source's source, or of one side's source."""


def audit(
    ablation: Ablation,
    log: Callable[[str], None] = lambda _: None,
    built: bool = True,
    costs: Mapping[str, Cost] | None = None,
    store: Store | None = None,
) -> list[Finding]:
    """Audit a study: findings of all arms on differences that make a comparison unfair.

    Args:
        log: called with one line about a step that takes a while.
        built: also build the arms small and compare what they compute; see `probe`.
        costs: {arm: its cost}; computed when None.
        store: store that may hold trained tokenizers.
    """
    if costs is None:
        costs = {arm.name: cost_of(arm.experiment) for arm in ablation.arms}
    findings = [*one_learning_rate(ablation), *unequal_searches(ablation, costs)]
    findings += [finding for arm in ablation.arms for finding in _audit_arm(ablation, arm, costs, store)]
    findings += no_effect(ablation)
    if not built or any(finding.kind == "refused" for finding in findings):
        return findings
    named = {finding.arm for finding in findings if finding.kind == "no_op"}
    findings += [each for each in probe(ablation, log) if each.kind != "no_op" or each.arm not in named]
    findings += unused_rules(ablation, findings)
    return findings


def _audit_arm(ablation: Ablation, arm: Arm, costs: Mapping[str, Cost], store: Store | None) -> Iterator[Finding]:
    if arm.experiment.pretrain.masks.intra_document:
        message = "FLOPs are an upper bound: they are counted as if each window were of one document"
        yield Finding("note", arm.name, "pretrain.masks.intra_document", message)
    yield from _audit_metric(ablation.study.compare.metric, arm)
    yield from unused_rows(arm)
    yield from unread_blocks(ablation, arm)
    if arm.experiment.adapt is not None:
        yield from _audit_adaptation(arm, costs[arm.name])
    if arm.name == arm.baseline:
        return
    baseline = ablation.arm(arm.baseline)
    changed = differs(arm, baseline)
    yield from _audit_match(ablation, arm)
    yield from _audit_keys(ablation, arm, baseline, changed)
    yield from _audit_tokenizers(ablation.study.compare.metric, arm, baseline, store)
    yield from audit_budgets(ablation, arm, costs)
    yield from unequal_rows(ablation, arm, baseline)
    yield from confounds(ablation, arm, baseline)
    if any(under(key, "pretrain.objective") for key in changed):
        yield from _audit_objectives(ablation, arm, baseline, costs)
    yield from _audit_crossing(ablation, arm, baseline)
    yield from _audit_kernels(arm, baseline)


def _audit_kernels(arm: Arm, baseline: Arm) -> Iterator[Finding]:
    """Refusals of compiled blocks where only one of two arms can have them: their results would not be compared."""
    for stage in arm.experiment.trained:
        if stage not in baseline.experiment.trained:
            continue
        here, there = (kernels_of(each.experiment, stage) for each in (arm, baseline))
        if here.name != there.name and (obstacle := here.obstacle or there.obstacle):
            name = arm.name if here.obstacle else baseline.name
            message = f"{name} cannot be compiled, since {obstacle}; use `kernels: auto` in all arms"
            yield Finding("refused", arm.name, f"{stage}.training.execution.kernels", message)


def _audit_metric(metric: str, arm: Arm) -> Iterator[Finding]:
    """Refusals of a metric that models of this family do not have."""
    family = arm.experiment.model.family
    if validation_metric(metric) == on_validation(MASKED_NLL) and continues(family):
        instead = _on_split_of(metric, on_validation(TARGET_NLL))
        message = f"{metric} is of encoder_only models, which see what comes after a token; use {instead}"
        yield Finding("refused", arm.name, "compare.metric", message)
    if metric_of(metric) == ANSWER_ACCURACY and not arm.experiment.pretrain.data.tasks:
        message = f"{metric} is of synthetic tasks, and this model reads text"
        yield Finding(
            "refused", arm.name, "compare.metric", f"{message}; use {_on_split_of(metric, primary_metric(family))}"
        )
    elif not continues(family) and metric.removeprefix(FINETUNED).startswith(CONTINUATION):
        message = f"an encoder_only model has no {metric}: it predicts no token from those before it alone"
        yield Finding(
            "refused",
            arm.name,
            "compare.metric",
            f"{message}; use {_on_split_of(metric, on_validation(MASKED_NLL))}, among such models",
        )


def _on_split_of(metric: str, name: str) -> str:
    """`name`, a metric of the validation split or the beginning of one, in the split of `metric`."""
    return final_metric(name) if validation_metric(metric) != metric else name


def _audit_keys(ablation: Ablation, arm: Arm, baseline: Arm, changed: Mapping[str, list[Any]]) -> Iterator[Finding]:
    """Refusals of keys that differ and are no factor, or that decide how the metric is measured."""
    metric = ablation.study.compare.metric
    measured_on = _measured_on(metric, arm, baseline)
    # An arm outside the grid has no level of a factor, so no factor excuses a difference.
    intervened = arm.intervened_keys | baseline.intervened_keys if arm.levels and baseline.levels else frozenset()
    for key, (old, new) in changed.items():
        measured = under(key, *measured_on)
        # A level also changes the keys of a source.
        if under(_SOURCE.sub("", key), *intervened) and not measured:
            continue
        # Keys moved by matching are judged by their earlier values.
        old, new = baseline.matched_keys.get(key, [old])[0], arm.matched_keys.get(key, [new])[0]
        if old == new or (arm.group != baseline.group and under(key, *INTERVENTION)):
            continue
        reason = "differs and is no factor of the study"
        if under(key, *intervened):
            reason = f"differs, so {metric} is not measured on the same target tokens"
        way = "`allow` it with its reason" if under(key, *intervened) else "make it equal, a factor, or `allow` it"
        values = f": {old!r} in {baseline.name}, {new!r} here; {way}"
        yield ruled(ablation, "refused", arm, key, reason, values, by_name=measured or key in PRECISION)


def _measured_on(metric: str, *arms: Arm) -> tuple[str, ...]:
    """Sections and keys that decide which target tokens a metric of these arms is measured on."""
    keys = next((keys for prefix, keys in _TARGETS_OF.items() if metric.startswith(prefix)), ())
    held_out = "test" if metric.startswith(f"{FINETUNED}{SPLITS['test']}") else "validation"
    tuned = [arm.experiment.finetune.data for arm in arms if arm.experiment.finetune is not None]
    if set(EXAMPLES) <= set(keys) and any(getattr(data, f"{held_out}_files") is None for data in tuned):
        return (*keys, *SPLIT_FROM_EXAMPLES)
    return keys


def _audit_tokenizers(metric: str, arm: Arm, baseline: Arm, store: Store | None) -> Iterator[Finding]:
    """Refusal of losses per token between arms with different tokens."""
    if direction(metric) != "lower" or _compares_tokenizers(metric) or _same_tokens(arm, baseline, store):
        return
    tokenizer, baseline_tokenizer = (each.experiment.pretrain.data.tokenizer for each in (arm, baseline))
    trained = ", of the same settings but trained on other text" if tokenizer == baseline_tokenizer else ""
    message = f"{metric} is counted per token, and {baseline.name} has another tokenizer{trained}; "
    before, _, evaluation = metric.partition(EVALUATED)
    if evaluation.startswith("extrapolation/") or metric_of(metric) == MASKED_NLL:
        message += "it has no form in bits per byte, so make the tokenizers equal"
    else:
        part = (
            f"{EVALUATED}{evaluation.partition('/')[0]}/" if evaluation else _on_split_of(metric, SPLITS["validation"])
        )
        stage = before if evaluation else FINETUNED * metric.startswith(FINETUNED)
        message += f"compare `metric: {stage}{part}{BITS_PER_BYTE.name}`"
    yield Finding("refused", arm.name, "compare.metric", message)


def _compares_tokenizers(metric: str) -> bool:
    definition = metric_of(metric)
    return definition is not None and definition.across_tokenizers


def _same_tokens(arm: Arm, baseline: Arm, store: Store | None) -> bool:
    """True where two arms surely have the same tokens: same training of the tokenizer, else equal tokenizer files."""
    one, other = arm.experiment, baseline.experiment
    if one.pretrain.data == other.pretrain.data or identity_of_data(one).tokenizer == identity_of_data(other).tokenizer:
        return True
    return store is not None and same_tokenizer(one, other, store) is True


def _audit_objectives(ablation: Ablation, arm: Arm, baseline: Arm, costs: Mapping[str, Cost]) -> Iterator[Finding]:
    """Findings on arms with another objective: metrics that do not compare, and the number of loss tokens."""
    metric = ablation.study.compare.metric
    measured = metric_of(metric)
    if measured is not None and not measured.across_objectives:
        message = f"{metric} of another objective than {baseline.name}'s is another quantity; use "
        instead = _on_split_of(metric, primary_metric(arm.experiment.model.family))
        yield Finding("refused", arm.name, "compare.metric", message + instead)
    if ablation.study.match.by != "loss_tokens":
        ratio = costs[arm.name].loss_tokens / costs[baseline.name].loss_tokens
        message = "the loss is computed on another number of tokens: see loss tokens"
        if is_outside(ratio):
            named = "its baseline" if ablation.study.compare.stratify_by else baseline.name
            message = f"the loss is computed on {times(ratio)} the tokens of {named}: see loss tokens"
        yield Finding("note", arm.name, "pretrain.objective", message)


def _audit_crossing(ablation: Ablation, arm: Arm, baseline: Arm) -> Iterator[Finding]:
    """Notes on arms that differ from their baseline both in the named arm and in factors."""
    first = {name: labels[0] for name, labels in ablation.factors.items()}
    moved = [name for name, label in arm.levels.items() if baseline.levels.get(name, first[name]) != label]
    grid = ablation.study.grid
    if grid and grid.design == "fractional_factorial" and arm.levels:
        if arm.group != baseline.group and not moved:
            message = f"its other combinations differ from {baseline.name} in factors too; compare its effects instead"
            yield Finding("note", arm.name, "compare", message)
    elif arm.group != baseline.group and moved:
        message = (
            f"differs from {baseline.name} in its arm and in {', '.join(moved)} at once; see `compare.stratify_by`"
        )
        yield Finding("note", arm.name, "compare", message)


def _audit_adaptation(arm: Arm, cost: Cost) -> Iterator[Finding]:
    """Notes on a warm start: parameters taken over, newly initialised and unused, and the source's cost."""
    adapt, adaptation = arm.experiment.adapt, arm.experiment.adaptation
    assert adapt is not None
    message = (
        f"{len(adaptation.taken)} of {len(adaptation.taken) + len(adaptation.newly_initialised)} tensors are taken over"
    )
    lists = (
        ("newly initialised", together(adaptation.newly_initialised)),
        ("unused", _unused_parameters(adaptation)),
    )
    message += "".join(f"; {what}: {some(names)}" for what, names in lists if names)
    yield Finding("note", arm.name, "adapt.from", message)
    if cost.before.train_flops:
        flops, tokens = cost.before.train_flops, cost.before.tokens
        share = flops / cost.train_flops
        message = f"its source's {tokens:,} tokens and {flops:.3g} FLOPs ({share:.0%} of all) are counted"
        yield Finding("note", arm.name, "adapt.from", message)
    if any(isinstance(given, Checkpoint) for given in adapt.sides.values()):
        message = "what a checkpoint's training has cost is not known, and not counted: no compute is equal to its"
        yield Finding("note", arm.name, "adapt.from", message)
    if changes := altered(resolve_model(arm.experiment.model), adapt.models):
        listed = ", ".join(f"{key} {format_value(old)} → {format_value(new)}" for key, old, new in changes)
        yield Finding("note", arm.name, "adapt.from", f"what is taken over is not used as before: {listed}")


def _unused_parameters(adaptation: Adaptation) -> list[str]:
    """Unused parameters of the sources: whole layers by their numbers, the rest by name."""
    used = {_layer(name) for _, name in adaptation.taken.values()}
    layers = dict.fromkeys(_layer(name) for name in adaptation.left if _layer(name) not in used)
    return [*filter(None, layers), *together(name for name in adaptation.left if _layer(name) not in layers)]


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
    moved = ", ".join(f"{key} {old} → {new}" for key, (old, new) in arm.matched_keys.items()) or "nothing had to move"
    yield Finding("note", arm.name, "match.by", f"{by} within {arm.residual:+.2%} of {baseline.name}'s: {moved}")

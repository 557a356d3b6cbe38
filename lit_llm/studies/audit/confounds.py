"""Confounds: keys of the resolved model that changed along with a factor, though no factor set them.

A head's width follows from d_model and heads unless it is set, and a range of layers covers another share of a deeper
stack. Neither is a mistake, but readers of the result should know that more than the factor changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from lit_llm.components.registry import COMPONENTS
from lit_llm.config.section import Section
from lit_llm.config.tree import leaves, under
from lit_llm.data.config import Tokenizer
from lit_llm.models.layer import Layer
from lit_llm.models.resolve import SELF_ATTENTION_KEY, STACKS, layer_range, resolve_model
from lit_llm.models.resolved import ResolvedModel
from lit_llm.studies.audit.findings import Finding, differs, ruled
from lit_llm.studies.load import Ablation, Arm

VOCABULARY = "model.vocabulary"
SPARE, UNEQUAL = 0.25, 0.1
"""Largest unused share of a vocabulary without a note, and largest difference of unused rows between two arms."""

Place = tuple[str, int, str]
"""(stack, index of the layer, component), as in an address."""


def confounds(ablation: Ablation, arm: Arm, baseline: Arm) -> Iterator[Finding]:
    """Findings of an arm and a baseline of the same family; none for two families."""
    if arm.experiment.model.family != baseline.experiment.model.family:
        return
    intervened = {*arm.intervened_keys, *baseline.intervened_keys, *arm.matched_keys, *baseline.matched_keys}
    if arm.group != baseline.group:
        intervened |= differs(arm, baseline).keys()  # a named arm sets them explicitly
    for key, old, new in _changes(arm, baseline, intervened):
        reason = f"{format_value(old)} → {format_value(new)}, though no factor sets it"
        yield ruled(ablation, "confound", arm, key, reason, "; set it to hold it, or `allow` it")
    for key, share, other in _changed_shares(arm, baseline, intervened):
        reason = f"covers {share} layers, {other} in {baseline.name}"
        yield ruled(ablation, "confound", arm, key, reason, "; make it part of the level, or `allow` it")


def unused_rows(arm: Arm) -> Iterator[Finding]:
    """A note on a vocabulary far larger than the ids of the tokenizer and the objective."""
    rows, unused = _vocabulary(arm)
    if unused > SPARE * rows:
        message = f"{unused} of {rows} rows are never used: the tokenizer and the objective have {rows - unused} ids, "
        yield Finding("note", arm.name, VOCABULARY, f"{message}and all rows count in parameters, FLOPs and the softmax")


def unread_blocks(ablation: Ablation, arm: Arm) -> Iterator[Finding]:
    """Refusal of a double decoder's block that holds a whole row: no later block would read the encoder."""
    block = resolve_model(arm.experiment.model).block
    if block is None:
        return
    pretrain, finetune = arm.experiment.pretrain, arm.experiment.finetune
    rows = {"sequence": pretrain.data.sequence_length}
    if warmup := pretrain.training.sequence_warmup:
        rows["first row of sequence_warmup"] = min(warmup.begin, pretrain.data.sequence_length)
    if finetune:
        rows["example of the finetuning"] = finetune.data.input_length + finetune.data.target_length
    what, length = min(rows.items(), key=lambda row: row[1])
    if block >= length:
        reason = f"{block} tokens hold the whole {what} of {length}, and no block would read the encoder, which then "
        advice = f"; set at most {length - 1}, or `allow` it"
        yield ruled(ablation, "refused", arm, "model.block", f"{reason}learns nothing", advice)


def unequal_rows(ablation: Ablation, arm: Arm, baseline: Arm) -> Iterator[Finding]:
    """Refusal of unused rows that only one of two arms has: they cost probability, parameters and FLOPs."""
    pair = [_vocabulary(each) for each in (arm, baseline)]
    more, less = (unused for _, unused in pair)
    if abs(more - less) > UNEQUAL * min(rows for rows, _ in pair):
        reason = f"{more} rows beyond the ids of the tokenizer and the objective, {less} in {baseline.name}: "
        reason += "each costs softmax and parameters"
        advice = "; give both what their tokenizers and objectives need, or `allow` it"
        yield ruled(ablation, "refused", arm, VOCABULARY, reason, advice)


def _vocabulary(arm: Arm) -> tuple[int, int]:
    """(rows of the embedding, rows that no text and no objective uses)."""
    pretrain, rows = arm.experiment.pretrain, arm.experiment.model.vocabulary
    used = _ids(pretrain.data.tokenizer) + sum(pretrain.objective.extra_ids(pretrain.data.sequence_length).values())
    return rows, rows - used


@lru_cache(maxsize=256)
def _ids(tokenizer: Tokenizer) -> int:
    """Number of ids of a tokenizer; slow for one in a file."""
    return tokenizer.vocabulary


def _changes(arm: Arm, baseline: Arm, intervened: set[str]) -> Iterator[tuple[str, Any, Any]]:
    """(address, old, new) of keys that changed without intervention; one address where all attentions changed alike."""
    left, right = resolve_model(baseline.experiment.model), resolve_model(arm.experiment.model)
    if left == right:
        return  # the usual case in a large study
    old, new = dict(_keys(left)), dict(_keys(right))
    changed: dict[tuple[str, Any, Any], list[Place]] = {}
    for where in [where for where in old if where in new]:
        place, key = where
        if old[where] == new[where] or _is_neutral(old[where]) or _is_neutral(new[where]):
            continue
        if key == "kv_heads" and all(keys[place, "heads"] == keys[where] for keys in (old, new)):
            continue  # equal to heads on both sides, so it only follows them
        if not any(under(address, *intervened) for address in _addresses(place, key, arm, baseline)):
            changed.setdefault((key, old[where], new[where]), []).append(place)
    for (key, before, after), places in changed.items():
        everywhere = {place for place, other in old if other == key and (place, other) in new}
        general = {_default(component) for _, _, component in places if component not in COMPONENTS}
        if places == [("", 0, "")]:
            yield f"model.{key}", before, after
        elif set(places) == everywhere and len(general) == 1:
            yield f"model.{general.pop()}.{key}", before, after
        else:
            for side, component in dict.fromkeys((side, component) for side, _, component in places):
                yield f"model.{side}.{component}.{key}", before, after


def _keys(model: ResolvedModel) -> Iterator[tuple[tuple[Place, str], Any]]:
    """((place, key), value) of every key of a resolved model; keys of the model itself have an empty place."""
    for key, value in leaves(_all_fields(model, without=("encoder", "decoder"))):
        yield (("", 0, ""), key), value
    for side, layers in _stacks(model):
        for index, layer in enumerate(layers):
            for name, part in layer.parts:
                component = SELF_ATTENTION_KEY[side] if name == "self_attention" else name
                for key, value in leaves(part.settings()):
                    yield ((side, index, component), key), value


def _stacks(model: ResolvedModel) -> Iterator[tuple[str, Sequence[Layer]]]:
    """(stack, layers) by the names of stacks in a study file."""
    yield "encoder", model.encoder
    if model.family == "decoder_decoder":
        yield "self_decoder", model.decoder[: model.self_layers]
        yield "cross_decoder", model.decoder[model.self_layers :]
    else:
        yield "decoder", model.decoder


def _all_fields(section: Section, without: Sequence[str] = ()) -> dict[str, Any]:
    """All fields, also those that a dump leaves out because they have no effect."""
    fields = {key: getattr(section, key) for key in type(section).model_fields if key not in without}
    return {key: _all_fields(value) if isinstance(value, Section) else value for key, value in fields.items()}


def _addresses(place: Place, key: str, *arms: Arm) -> Iterator[str]:
    """Addresses that a study may set to change this key at this place."""
    side, index, component = place
    if not side:
        yield f"model.{key}"
        return
    yield f"model.{_default(component)}.{key}"
    yield f"model.{side}.{component}.{key}"
    for arm in arms:
        for name in getattr(arm.experiment.model, side).layer_ranges:
            if index in layer_range(name):
                yield f"model.{side}.layer_ranges.{name}.{component}.{key}"


def _default(component: str) -> str:
    """The model's section with the defaults of a component."""
    if component in COMPONENTS:
        return "feed_forward" if COMPONENTS[component].role == "feed_forward" else "attention"
    return "attention" if component.endswith("attention") else component


def _is_neutral(value: Any) -> bool:
    """True where a value stands for one without effect in the canonical form, as an eps without a norm."""
    return value is None or (isinstance(value, bool | float) and not value)


def _changed_shares(arm: Arm, baseline: Arm, intervened: set[str]) -> Iterator[tuple[str, str, str]]:
    """(address, share, baseline's share) of layer ranges that stayed while the stack changed its depth."""
    for side in STACKS:
        stack, baseline_stack = (getattr(each.experiment.model, side, None) for each in (arm, baseline))
        if stack is None or baseline_stack is None or stack.layers == baseline_stack.layers:
            continue
        for name in stack.layer_ranges:
            key, covered = f"model.{side}.layer_ranges.{name}", len(layer_range(name))
            if name in baseline_stack.layer_ranges and not any(
                under(other, key) or under(key, other) for other in intervened
            ):
                yield key, f"{covered} of {stack.layers}", f"{covered} of {baseline_stack.layers}"


def format_value(value: Any) -> str:
    """A key's value for a message."""
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)

"""Findings of the audit, and the `allow` rules that permit them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_llm.config.tree import difference, under
from lit_llm.experiment.schema import AdaptConfig, Checkpoint, Pretrained
from lit_llm.models.cost import count_parameters
from lit_llm.models.resolve import resolve_model
from lit_llm.studies.load import Ablation, Arm

INTERVENTION = ("model", "adapt", "pretrain.objective", "pretrain.masks", "finetune.masks")
"""Sections that a named arm may set, as the subject of an ablation. All else is a control."""

Kind = Literal["refused", "allowed", "no_op", "confound", "note"]
"""refused blocks the study; the others inform. no_op: computes what another arm computes; confound: something changed
along with the intervention."""


@dataclass(frozen=True)
class Finding:
    """A statement of the plan about an arm."""

    kind: Kind
    arm: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.arm}: {self.key}{': ' if self.key else ''}{self.message}"

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def differs(arm: Arm, baseline: Arm) -> dict[str, list[Any]]:
    """{key: [baseline's value, arm's value]} of the two experiments, without their seeds.

    A source that only one of them has counts as one difference.
    """
    differences, pair = difference(baseline.flat, arm.flat), (baseline, arm)
    if sum(each.experiment.adapt is not None for each in pair) == 1:
        differences = {key: values for key, values in differences.items() if not under(key, "adapt.from")}
        differences["adapt.from"] = [
            _describe_sources(each.experiment.adapt) if each.experiment.adapt else None for each in pair
        ]
    return differences


def _describe_sources(adapt: AdaptConfig) -> str:
    def one(given: Pretrained | Checkpoint) -> str:
        if isinstance(given, Checkpoint):
            return given.checkpoint
        parameters = count_parameters(resolve_model(given.model)).total
        return f"{given.model.family} of {parameters:,} parameters, {given.pretrain.training.max_steps} steps"

    return " and ".join(dict.fromkeys(one(given) for given in adapt.sides.values()))


BY_NAME = (
    "pretrain.data.corpus",
    "pretrain.data.tokenizer",
    "finetune.data.examples",
    "finetune.data.validation_files",
    "finetune.data.test_files",
)
"""Sections that a rule may name whole, although the primary metric is measured on them."""


def allows(rule: str, key: str, by_name: bool = False) -> bool:
    """True where a rule of `allow` covers a key.

    by_name: the primary metric is measured on this key, so a rule for several keys does not cover it.
    """
    if by_name:
        return rule == key or (under(rule, *BY_NAME) and under(key, rule))
    return under(key, rule)


def rule_key_of(key: str) -> str:
    """The key that a rule must name to cover this key of the primary metric."""
    return next((section for section in BY_NAME if under(key, section)), key)


def ruled(
    ablation: Ablation, kind: Kind, arm: Arm, key: str, reason: str, advice: str, *, by_name: bool = False
) -> Finding:
    """A finding of this kind, or an allowed one where a rule of the study covers the key."""
    for rule in ablation.study.allow:
        if allows(rule.key, key, by_name):
            return Finding("allowed", arm.name, key, f"{reason}; allowed because {rule.because}")
    if by_name and (blanket := next((rule.key for rule in ablation.study.allow if under(key, rule.key)), None)):
        advice += f"; `{blanket}` does not allow it: what results are measured on and in goes by name, as in "
        advice += f"`allow: [{{key: {rule_key_of(key)}, because: ...}}]`"
    return Finding(kind, arm.name, key, f"{reason}{advice}")

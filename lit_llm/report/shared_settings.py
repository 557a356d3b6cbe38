"""Settings that all arms of a study share, in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lit_llm.studies.load import Ablation

FAMILIES = {"decoder": "decoder-only"}
"""Printed names of families, where they differ from the key."""
NUMBERS = {
    "model.d_model": "d_model {}",
    "pretrain.training.max_steps": "{:,} steps",
    "pretrain.data.batch_size": "batch {}",
    "pretrain.data.sequence_length": "length {:,}",
    "pretrain.training.optimizer.lr": "lr {:g}",
}
"""Keys of numbers, with their format."""
WORDS = {
    "pretrain.objective.kind": "objective",
    "model.attention.rope": "rope",
    "model.norm.function": "norm",
    "pretrain.training.optimizer.kind": "optimizer",
    "pretrain.data.corpus.kind": "corpus",
}
"""Keys of words, printed as `rope=continuous`."""


def shared_by_all(ablation: Ablation) -> str:
    """`all: encoder-decoder, d_model 64, 300 steps, ..., rope=continuous`; empty for a single arm."""
    if len(ablation.arms) < 2:
        return ""
    settings = ", ".join(_format_settings(_common_settings(ablation)))
    return f"all: {settings}" if settings else ""


def _common_settings(ablation: Ablation) -> Iterator[tuple[str, Any]]:
    """(key, value) of each key that has one value in all arms and that the study does not vary."""
    arms = [arm.experiment for arm in ablation.arms]
    varied = {*ablation.factors, *(key for arm in ablation.arms for key in (*arm.intervened_keys, *arm.matched_keys))}
    for key in ("model.family", *NUMBERS, *WORDS):
        values = {str(value): value for value in (_value_at(one, key) for one in arms)}
        value = next(iter(values.values()))
        if len(values) == 1 and value is not None and key not in varied:
            yield key, value


def _value_at(experiment: Any, key: str) -> Any:
    for table in key.split("."):
        experiment = experiment.get(table) if isinstance(experiment, Mapping) else getattr(experiment, table, None)
    return experiment


def _format_settings(settings: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for key, value in settings:
        if key == "model.family":
            yield FAMILIES.get(value, str(value).replace("_", "-"))
        elif key in NUMBERS:
            yield NUMBERS[key].format(value)
        else:
            yield f"{WORDS[key]}={value}"

"""What all arms of a study share, in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lit_llm.studies.load import Ablation

FAMILIES = {"decoder": "decoder-only"}
"""What a family is called where its name is not read as it is."""
NUMBERS = {
    "model.d_model": "d_model {}",
    "pretrain.training.max_steps": "{:,} steps",
    "pretrain.data.batch_size": "batch {}",
    "pretrain.data.sequence_length": "length {:,}",
    "pretrain.training.optimizer.lr": "lr {:g}",
}
"""Keys that a reader asks for first, as they are said."""
WORDS = {
    "pretrain.objective.kind": "objective",
    "model.attention.rope": "rope",
    "model.norm.function": "norm",
    "pretrain.training.optimizer.kind": "optimizer",
    "pretrain.data.corpus.kind": "corpus",
}
"""Keys that are said as `rope=continuous`."""


def shared_by_all(ablation: Ablation) -> str:
    """`all: encoder-decoder, d_model 64, 300 steps, ..., rope=continuous`; empty for a single arm."""
    if len(ablation.arms) < 2:
        return ""
    said = ", ".join(_said([*_alike(ablation)]))
    return f"all: {said}" if said else ""


def _alike(ablation: Ablation) -> Iterator[tuple[str, Any]]:
    """The keys that have one value in all arms; what the study varies is a column of the table."""
    arms = [arm.experiment for arm in ablation.arms]
    varied = {*ablation.factors, *(key for arm in ablation.arms for key in (*arm.intervened_keys, *arm.matched_keys))}
    for key in ("model.family", *NUMBERS, *WORDS):
        values = {str(value): value for value in (_at(one, key) for one in arms)}
        value = next(iter(values.values()))
        if len(values) == 1 and value is not None and key not in varied:
            yield key, value


def _at(experiment: Any, key: str) -> Any:
    for table in key.split("."):
        experiment = experiment.get(table) if isinstance(experiment, Mapping) else getattr(experiment, table, None)
    return experiment


def _said(alike: list[tuple[str, Any]]) -> Iterator[str]:
    for key, value in alike:
        if key == "model.family":
            yield FAMILIES.get(value, str(value).replace("_", "-"))
        elif key in NUMBERS:
            yield NUMBERS[key].format(value)
        else:
            yield f"{WORDS[key]}={value}"

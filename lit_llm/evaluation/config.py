"""What is measured while a stage trains, and when it is finished."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lit_llm.config.section import Items, Section, impossible


class ValidationConfig(Section):
    """Evaluation on held-out documents during training."""

    times: int = Field(4, gt=0)
    """Evaluations, evenly spaced; the last one after the last step."""
    sequences: int = Field(64, gt=0)
    """Windows of held-out text, the same for every arm."""
    prefix_length: int | None = Field(None, gt=0)
    """Tokens given before the targets of val/target_nll; half of the window when absent."""

    def prefix(self, sequence_length: int) -> int:
        """Tokens given before the targets, in a window of this length."""
        return self.prefix_length or sequence_length // 2


class ExampleValidationConfig(Section):
    """Losses on held-out examples of the instruction data, by task."""

    times: int = Field(4, gt=0)
    """Evaluations, evenly spaced; the last one after the last step."""
    examples: int = Field(256, gt=0)
    """Held-out examples, the same for every arm."""


class ExampleLossesConfig(Section):
    """Losses on held-out examples of `finetune.data`, before finetuning as well as after it."""

    examples: int = Field(1000, gt=0)
    """Held-out examples, the same for every arm and stage; all where there are fewer."""


EVALUATIONS = ("examples",)
"""Sections of `EvaluateConfig` that are evaluations, in the order in which they are made."""


class EvaluateConfig(Section):
    """What is measured when a stage is finished. Each evaluation is a section; what is absent is not made."""

    after: Items[Literal["pretrain", "finetune"]] = ("pretrain", "finetune")
    """The stages that it follows; of these, those that the experiment has."""
    examples: ExampleLossesConfig | None = None
    """Losses on held-out examples of the instruction data."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16."""
    batch_tokens: int = Field(8192, gt=0)
    """Tokens of a batch, padding included. No part of the identity: results do not depend on it."""

    @model_validator(mode="after")
    def _measures_something(self) -> EvaluateConfig:
        if not any(getattr(self, name) is not None for name in EVALUATIONS):
            raise impossible(("", f"names no evaluation; write one or more of {', '.join(EVALUATIONS)}"))
        if not self.after:
            raise impossible(("after", "names no stage; write [pretrain], [finetune] or both"))
        return self

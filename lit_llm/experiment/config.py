"""The experiment: one full configuration, composed of the sections that the other packages own."""

from __future__ import annotations

from pydantic import Field, model_validator

from lit_llm.config.section import Section, impossible
from lit_llm.data.config import DataConfig
from lit_llm.evaluation.config import ValidationConfig
from lit_llm.models.config import EncoderDecoderModel, ModelConfig
from lit_llm.objectives.config import CausalLM, MasksConfig, Objective, PrefixLM
from lit_llm.training.config import TrainingConfig


class PretrainConfig(Section):
    """Training from scratch on plain text."""

    data: DataConfig
    """The text."""
    objective: Objective = CausalLM()
    """How a window becomes inputs, targets and a loss."""
    masks: MasksConfig = MasksConfig()
    """Which masks are opened."""
    training: TrainingConfig
    """Optimisation."""
    validation: ValidationConfig = ValidationConfig()
    """Evaluation during training."""

    @model_validator(mode="after")
    def _fits(self) -> PretrainConfig:
        length, objective = self.data.sequence_length, self.objective
        findings = []
        if problem := objective.problem(length):
            findings.append(("objective.split" if isinstance(objective, PrefixLM) else "objective", problem))
        prefix = self.validation.prefix(length)
        if not 0 < prefix < length:
            findings.append(
                ("validation.prefix_length", f"a prefix of {prefix} tokens leaves no target in a sequence of {length}")
            )
        if self.masks.prefix == "bidirectional" and isinstance(objective, CausalLM):
            findings.append(
                (
                    "masks.prefix",
                    "bidirectional with causal_lm: every token is a target, so an open prefix would show its own "
                    "labels; use `objective: prefix_lm`",
                )
            )
        micro = self.training.execution.micro_batch_size
        if micro and micro > self.data.batch_size:
            message = f"{micro} is more than batch_size {self.data.batch_size}"
            findings.append(("training.execution.micro_batch_size", message))
        if findings:
            raise impossible(*findings)
        return self


class Experiment(Section):
    """One full configuration: what a run is, but for its place on disk."""

    model: ModelConfig
    """The network."""
    pretrain: PretrainConfig
    """Its training."""
    seed: int = Field(0, ge=0)
    """Seed of the parameters, the order of the data and every random cut."""

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        findings = []
        tokens = self.pretrain.data.tokenizer.vocabulary
        if tokens > self.model.vocabulary:
            findings.append(("model.vocabulary", f"{self.model.vocabulary} rows for a tokenizer of {tokens} tokens"))
        if self.pretrain.masks.prefix == "bidirectional" and isinstance(self.model, EncoderDecoderModel):
            findings.append(
                (
                    "pretrain.masks.prefix",
                    "bidirectional changes nothing here: an encoder sees all of its source anyway",
                )
            )
        if findings:
            raise impossible(*findings)
        return self

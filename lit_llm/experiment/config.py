"""The experiment: one full configuration, composed of the sections that the other packages own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from lit_llm.config.section import Section, impossible
from lit_llm.data.config import DataConfig, InstructionConfig
from lit_llm.evaluation.config import EVALUATIONS, EvaluateConfig, ExampleValidationConfig, ValidationConfig
from lit_llm.models.config import ModelConfig, not_looked_at, resolve_model
from lit_llm.objectives.base import described
from lit_llm.objectives.config import (
    UL2,
    CausalLM,
    MasksConfig,
    Objective,
    PrefixLM,
    SpanCorruption,
    continues,
    misfit,
)
from lit_llm.training.config import TrainingConfig


def _at_once(training: TrainingConfig, batch_size: int) -> Iterator[tuple[str, str]]:
    """What is wrong with the sequences that a stage takes at once."""
    micro = training.execution.micro_batch_size
    if micro and micro > batch_size:
        yield "training.execution.micro_batch_size", f"{micro} is more than batch_size {batch_size}"


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
        if self.masks.documents == "separate" and isinstance(objective, SpanCorruption | UL2):
            message = (
                f"separate with {objective.kind}: a target holds spans of several documents, of which each would see "
                "its own alone; use joined, or `objective: prefix_lm`"
            )
            findings.append(("masks.documents", message))
        if self.masks.prefix == "bidirectional" and isinstance(objective, CausalLM):
            findings.append(
                (
                    "masks.prefix",
                    "bidirectional with causal_lm: every token is a target, so an open prefix would show its own "
                    "labels; use `objective: prefix_lm`",
                )
            )
        findings += _at_once(self.training, self.data.batch_size)
        if findings:
            raise impossible(*findings)
        return self


class FinetuneConfig(Section):
    """Training of all parameters on instructions, after the pretraining. The loss is on the targets alone."""

    data: InstructionConfig
    """The examples, in the tokens of the pretraining's tokenizer."""
    masks: MasksConfig = MasksConfig()
    """Which masks are opened in this stage. `{prefix: bidirectional}` makes DecLLM the paper's DecLLM + BiAttn, whose
    pretraining is DecLLM's own."""
    training: TrainingConfig
    """Optimisation. The paper: a constant rate, dropout 0.05."""
    validation: ExampleValidationConfig = ExampleValidationConfig()
    """Evaluation on held-out examples during training."""

    @model_validator(mode="after")
    def _fits(self) -> FinetuneConfig:
        findings = []
        if self.masks.documents == "separate":
            findings.append(("masks.documents", "an example sees itself alone anyway, so there is nothing to separate"))
        findings += _at_once(self.training, self.data.batch_size)
        if findings:
            raise impossible(*findings)
        return self


Trained = Literal["pretrain", "finetune"]
"""A stage that trains."""


class Experiment(Section):
    """One full configuration: what a run is, but for its place on disk."""

    model: ModelConfig
    """The network."""
    pretrain: PretrainConfig
    """Its training."""
    finetune: FinetuneConfig | None = None
    """Instruction tuning of what the pretraining has made; none when absent."""
    evaluate: EvaluateConfig | None = None
    """What is measured when a stage is finished; nothing when absent."""
    seed: int = Field(0, ge=0)
    """Seed of the parameters, the order of the data and every random cut."""

    @model_validator(mode="after")
    def _fits(self) -> Experiment:
        findings = []
        tokens = self.pretrain.data.tokenizer.vocabulary
        objective, family = self.pretrain.objective, self.model.family
        extra = objective.extra_ids(self.pretrain.data.sequence_length)
        if (needed := tokens + sum(extra.values())) > self.model.vocabulary:
            message = f"{self.model.vocabulary} rows for a tokenizer of {tokens} tokens"
            if extra:
                message += f" and {described(extra)} of {objective.kind}: {needed} are needed"
            findings.append(("model.vocabulary", message))
        if problem := misfit(objective, family):
            findings.append(("pretrain.objective", problem))
        if not continues(family):
            findings += self._never_asked()
        if isinstance(self.pretrain.objective, CausalLM) and resolve_model(self.model).has_partial_attention:
            message = (
                "causal_lm has no source for partial attention to read, and a window that were its own source would "
                "show every token its label; use `objective: prefix_lm`"
            )
            findings.append(("pretrain.objective", message))
        for name in self.trained:
            section = getattr(self, name)
            if section.masks.prefix == "bidirectional" and family in ("encoder_decoder", "encoder_only"):
                message = "bidirectional changes nothing here: an encoder sees all of its source anyway"
                findings.append((f"{name}.masks.prefix", message))
        if self.evaluate is not None:
            problems = self.evaluate.problems(self.pretrain.data.sequence_length)
            findings += [(f"evaluate.{key}", message) for key, message in problems]
        if self.evaluate is not None and not self.evaluated:
            message = "finetune is to be evaluated, and there is no such section; add it, or evaluate after pretrain"
            findings.append(("evaluate.after", message))
        looked_at = self.evaluate is not None and self.evaluate.attention is not None
        if looked_at and (problem := not_looked_at(resolve_model(self.model))):
            findings.append(("evaluate.attention", problem))
        packed = self.finetune is not None and self.finetune.data.packing == "greedy"
        if packed and resolve_model(self.model).has_partial_attention:
            message = "partial attention reads the beginning of a row as the source, and a row would hold several"
            findings.append(("finetune.data.packing", f"{message}; use `packing: none`"))
        if self.evaluate is not None and self.evaluate.examples is not None and self.finetune is None:
            findings.append(("evaluate.examples", "are those that `finetune.data` holds out, and there is no finetune"))
        if findings:
            raise impossible(*findings)
        return self

    def _never_asked(self) -> Iterator[tuple[str, str]]:
        """Sections that ask for a continuation, of a model that writes none."""
        if self.finetune is not None:
            yield "finetune", "an encoder_only model writes no answers to instructions; leave it out"
        if self.evaluate is not None:
            yield "evaluate", "all evaluations ask how a text goes on, which an encoder_only model does not say"

    @property
    def trained(self) -> tuple[Trained, ...]:
        """The stages that train, in order."""
        return ("pretrain",) if self.finetune is None else ("pretrain", "finetune")

    @property
    def evaluated(self) -> tuple[Trained, ...]:
        """The stages that evaluations follow."""
        return tuple(name for name in self.trained if self.evaluate is not None and name in self.evaluate.after)

    def evaluations(self, stage: Trained) -> tuple[str, ...]:
        """The evaluations that follow a stage, by their sections."""
        if self.evaluate is None or stage not in self.evaluated:
            return ()
        return tuple(name for name in EVALUATIONS if getattr(self.evaluate, name) is not None)

    def section(self, stage: Trained) -> PretrainConfig | FinetuneConfig:
        """How a stage trains."""
        section = self.finetune if stage == "finetune" else self.pretrain
        assert section is not None
        return section

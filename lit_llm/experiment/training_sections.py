"""Sections of the stages that train, `pretrain` and `finetune`, and how they fit the model. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import model_validator

from lit_llm.config.section import Section, config_error
from lit_llm.data.config import DataConfig, InstructionConfig
from lit_llm.evaluation.config import ExampleValidationConfig, ValidationConfig
from lit_llm.models.config import ModelConfig
from lit_llm.models.resolve import resolve_model
from lit_llm.objectives.config import (
    UL2,
    Answers,
    CausalLM,
    MasksConfig,
    Objective,
    PrefixLM,
    SpanCorruption,
)
from lit_llm.training.config import TrainingConfig
from lit_llm.training.optimizers.multipliers import group_problems, optimizer_problem

Trained = Literal["pretrain", "finetune"]
"""A stage that trains."""


def _micro_batch_problems(training: TrainingConfig, batch_size: int) -> Iterator[tuple[str, str]]:
    """Problems of a stage's micro-batch size."""
    micro = training.execution.micro_batch_size
    if micro and micro > batch_size:
        yield "training.execution.micro_batch_size", f"{micro} is more than batch_size {batch_size}"


class PretrainConfig(Section):
    """Training from scratch on plain text."""

    data: DataConfig
    """The text."""
    objective: Objective = CausalLM()
    """Objective, which makes inputs, targets and a loss of a window."""
    masks: MasksConfig = MasksConfig()
    """Attention masks."""
    training: TrainingConfig
    """Optimisation."""
    validation: ValidationConfig = ValidationConfig()
    """Evaluation during training."""

    @model_validator(mode="after")
    def _fits(self) -> PretrainConfig:
        length, objective = self.data.sequence_length, self.objective
        findings = [*self._task_problems()]
        if not findings and (problem := objective.problem(length)):
            findings.append(("objective.split" if isinstance(objective, PrefixLM) else "objective", problem))
        prefix = self.validation.prefix(length)
        if not 0 < prefix < length:
            findings.append(
                ("validation.prefix_length", f"a prefix of {prefix} tokens leaves no target in a sequence of {length}")
            )
        if self.masks.intra_document and isinstance(objective, SpanCorruption | UL2):
            message = (
                f"with {objective.kind} a target holds spans of several documents, of which each would see its own "
                "alone; use `intra_document: false`, or `objective: prefix_lm`"
            )
            findings.append(("masks.intra_document", message))
        if self.masks.prefix == "bidirectional" and isinstance(objective, CausalLM):
            findings.append(
                (
                    "masks.prefix",
                    "bidirectional with causal_lm: every token is a target, so an open prefix would show its own "
                    "labels; use `objective: prefix_lm`",
                )
            )
        findings += _micro_batch_problems(self.training, self.data.batch_size)
        findings += self._warmup_problems()
        if findings:
            raise config_error(*findings)
        return self

    def _warmup_problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) of batches and rows that cannot grow to their full size."""
        batches, rows = self.training.batch_warmup, self.training.sequence_warmup
        if batches and (found := batches.problem(self.data.batch_size, self.training.execution)):
            yield f"training.batch_warmup.{found[0]}", found[1]
        if rows is None:
            return
        key = "training.sequence_warmup"
        if found := rows.problem(self.data.sequence_length):
            yield f"{key}.{found[0]}", found[1]
        elif self.data.tasks:
            yield key, "a window of a synthetic task is one example, which would be cut; leave it out"
        else:
            for length in rows.lengths(self.data.sequence_length):
                if problem := self.objective.problem(length):
                    yield key, f"the objective cannot make an example of a row of {length} tokens: {problem}"
                    return

    def sequences(self, steps: int) -> int:
        """Number of sequences in the batches of the first steps."""
        warmup, size = self.training.batch_warmup, self.data.batch_size
        return steps * size if warmup is None else warmup.sequences(steps, size)

    def rows(self, step: int) -> int:
        """Number of rows into which a window is cut in a step."""
        warmup = self.training.sequence_warmup
        return 1 if warmup is None else warmup.rows(step, self.data.sequence_length)

    def whole_batches(self, steps: int) -> float:
        """Number of sequences in the batches of the first steps, in whole batches."""
        return steps if self.training.batch_warmup is None else self.sequences(steps) / self.data.batch_size

    def windows(self, steps: int) -> dict[int, int]:
        """{number of rows of a window: number of such windows in the first steps}."""
        warmup = self.training.sequence_warmup
        if warmup is None:
            return {1: self.sequences(steps)}
        ends = [min(end, steps) for end in warmup.ends(self.data.sequence_length)]
        parts = zip([0, *ends], [*ends, steps], strict=True)
        counts = [self.sequences(end) - self.sequences(begin) for begin, end in parts]
        return {1 << shift: count for shift, count in enumerate(reversed(counts))}

    def _task_problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) of an objective that does not fit the synthetic tasks, or the text."""
        tasks, answers = self.data.tasks, isinstance(self.objective, Answers)
        if answers and not tasks:
            message = "answers are those of a synthetic task, and this corpus is text; use causal_lm or prefix_lm"
            yield "objective", message
        for name, corpus in tasks.items():
            if self.objective != (wanted := corpus.task.objective):
                keys = ", ".join(f"{key}: {value}" for key, value in wanted.model_dump(mode="json").items())
                yield "objective", f"the {name or corpus.task.kind} task asks for `objective: {{{keys}}}`"
                return
        if tasks and self.validation.prefix_length is not None:
            yield "validation.prefix_length", "a synthetic task has a source of its own; leave it out"


class FinetuneConfig(Section):
    """Training of all parameters on instructions, after the pretraining. The loss is on the targets alone."""

    data: InstructionConfig
    """The examples, in the tokens of the pretraining's tokenizer."""
    masks: MasksConfig = MasksConfig()
    """Attention masks of this stage. `{prefix: bidirectional}` makes DecLLM the paper's DecLLM + BiAttn, with the same
    pretraining."""
    training: TrainingConfig
    """Optimisation. The paper: a constant rate, dropout 0.05."""
    validation: ExampleValidationConfig = ExampleValidationConfig()
    """Evaluation on held-out examples during training."""

    @model_validator(mode="after")
    def _fits(self) -> FinetuneConfig:
        findings = []
        if self.masks.intra_document:
            findings.append(
                ("masks.intra_document", "an example sees itself alone anyway, so there is nothing to separate")
            )
        if self.training.trunks:
            message = "only a pretraining has a trunk from which others branch off; leave it out"
            findings.append(("training.schedule.branch_at", message))
        for key in ("batch_warmup", "sequence_warmup"):
            if getattr(self.training, key):
                findings.append((f"training.{key}", "only batches and rows of a pretraining grow; leave it out"))
        findings += _micro_batch_problems(self.training, self.data.batch_size)
        if findings:
            raise config_error(*findings)
        return self


def prefix_problems(stage: str, masks: MasksConfig, model: ModelConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of a bidirectional prefix of a stage that the model cannot have, or has anyway."""
    if masks.prefix != "bidirectional":
        return
    if model.family in ("encoder_decoder", "encoder_only"):
        yield f"{stage}.masks.prefix", "bidirectional changes nothing here: an encoder sees all of its source anyway"
    elif reason := resolve_model(model).causal_only:
        message = f"bidirectional: {reason}, a token cannot see later ones; leave the prefix causal"
        yield f"{stage}.masks.prefix", message


def training_problems(stage: str, training: TrainingConfig, model: ModelConfig) -> Iterator[tuple[str, str]]:
    """(key, message) of settings of a stage's training that do not fit the model."""
    resolved, execution = resolve_model(model), training.execution
    if problem := optimizer_problem(model.parametrization, training.optimizer):
        yield f"{stage}.training.optimizer", problem
    for key, message in group_problems(resolved, training.optimizer):
        yield f"{stage}.training.optimizer.{key}", message
    for key in ("attention_dropout", "feed_forward_dropout"):
        if getattr(training, key) and not any(key in part.drops for part in resolved.parts):
            yield f"{stage}.training.{key}", "no part of this model's layers has it; leave it out"
    if execution.ranks > 1 and execution.strategy == "fsdp" and resolved.tie_layers:
        message = "fsdp gathers the parameters of one layer at a time, and tied layers are two; use `strategy: ddp`"
        yield f"{stage}.training.execution.strategy", message

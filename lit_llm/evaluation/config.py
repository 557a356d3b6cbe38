"""Settings of the evaluations during training and of trained models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lit_llm.config.metrics import MASKED_NLL, TARGET_NLL, on_validation
from lit_llm.config.section import Items, Section, config_error
from lit_llm.data.config import FilePath, SingleCorpus, SourceName
from lit_llm.objectives.config import Answers, MaskedLM, Objective, PrefixLM, continues

BUCKETS = 16
"""Number of equal parts of a training window; the losses of a part's positions are summed."""


class ValidationConfig(Section):
    """Evaluation on held-out documents: during training, and of the trained model."""

    times: int = Field(4, gt=0)
    """Evaluations, evenly spaced; the last one after the last step."""
    sequences: int = Field(64, gt=0)
    """Windows of held-out text that an evaluation during training reads, of each source; the same for every arm."""
    final_sequences: int | None = Field(None, gt=0)
    """Windows that the evaluation after the last step reads, of each source and of each split (validation and test);
    all where there are fewer. At least `sequences`; eight times `sequences` when absent. The loss of each document is
    kept. A trained model costs two forward passes over them; `val/objective_loss` stays that of `sequences` windows."""
    prefix_length: int | None = Field(None, gt=0)
    """Tokens given before the targets of val/target_nll; half of the window when absent."""

    @property
    def most_sequences(self) -> int:
        """Windows of each source and split that the evaluation after the last step reads."""
        return max(self.sequences, self.final_sequences or 8 * self.sequences)

    def prefix(self, sequence_length: int) -> int:
        """Number of tokens given before the targets in a window of this length."""
        return self.prefix_length or sequence_length // 2

    def primary(self, sequence_length: int, family: str, objective: Objective) -> tuple[str, Objective]:
        """Primary metric of a model family, and the objective whose loss it is.

        objective: that of the training; a synthetic task is measured on its answers.
        """
        if isinstance(objective, Answers):
            return primary_metric(family), objective
        prefix, masked = PrefixLM(split=self.prefix(sequence_length)), MaskedLM(rate=MASKED, replacement="mask")
        return primary_metric(family), prefix if continues(family) else masked


PRIMARY_METRICS = (on_validation(TARGET_NLL), on_validation(MASKED_NLL))
"""Primary metrics: of models that continue a text, and of encoder-only models."""
MASKED = 0.15
"""Share of the tokens that val/masked_nll hides for every model, as in BERT (arXiv 1810.04805)."""


def primary_metric(family: str) -> str:
    """Primary metric of a model family."""
    return PRIMARY_METRICS[0] if continues(family) else PRIMARY_METRICS[1]


class ExampleValidationConfig(Section):
    """Losses on held-out examples of the instruction data, by task."""

    times: int = Field(4, gt=0)
    """Evaluations, evenly spaced; the last one after the last step."""
    examples: int = Field(256, gt=0)
    """Held-out examples that an evaluation during training reads, the same for every arm."""
    final_examples: int | None = Field(None, gt=0)
    """Examples that the evaluation after the last step reads, of each split (validation and test); all where there are
    fewer. At least `examples`; four times `examples` when absent. The loss of each example is kept."""

    @property
    def most_examples(self) -> int:
        """Examples of each split that the evaluation after the last step reads."""
        return max(self.examples, self.final_examples or 4 * self.examples)


class ExampleLossesConfig(Section):
    """Losses on held-out examples of `finetune.data`, before finetuning as well as after it."""

    examples: int = Field(1000, gt=0)
    """Held-out examples, the same for every arm and stage; all where there are fewer."""


class LikelihoodConfig(Section):
    """Losses of single held-out documents, of the training data and of further texts."""

    documents: int = Field(1000, gt=0)
    """Documents of each source, a random sample drawn by a hash of their text: the same for every model and tokenizer.
    All where there are fewer."""
    length: int | None = Field(None, gt=1)
    """Tokens after which a document is cut; the length of a training window when absent."""
    prefix_length: int | None = Field(None, ge=0)
    """Tokens of a document given before its targets; half of `length` when absent. A document with no token beyond them
    is left out, and counted in `likelihood/skipped`."""
    corpora: dict[SourceName, SingleCorpus] = {}
    """Further texts, by the names that their metrics bear: RedPajama's subsets by `where:`, the sources of Paloma. All
    of their documents are held out; of a text that shares files with the training data, those that it holds out."""

    def span(self, sequence_length: int) -> tuple[int, int]:
        """(tokens after which a document is cut, tokens before its targets), for training windows of this length."""
        length = self.length or sequence_length
        return length, length // 2 if self.prefix_length is None else self.prefix_length

    def resolved(self, sequence_length: int) -> LikelihoodConfig:
        """This section with all defaults filled in."""
        length, prefix = self.span(sequence_length)
        return self.model_copy(update={"length": length, "prefix_length": prefix})

    def problems(self, sequence_length: int) -> list[tuple[str, str]]:
        """Errors of the section as pairs (key, message)."""
        length, prefix = self.span(sequence_length)
        if prefix < length:
            return []
        return [("prefix_length", f"a prefix of {prefix} tokens leaves no target in documents cut to {length}")]


class ExtrapolationConfig(Section):
    """Loss beyond the training window: by total length, as in arXiv 2510.26622, figure 5, and by position."""

    lengths: Items[Annotated[int, Field(gt=0)]] = Field((1, 2, 4), min_length=1)
    """Total lengths, source and target together, in training windows. The paper goes from 1 to 8 (2048 to 16384)."""
    prefixes: Items[Annotated[Literal["quarter", "half"] | int, Field(union_mode="left_to_right")]] = Field(
        (1, "quarter", "half"), min_length=1
    )
    """Tokens given before the targets, the same for both families and all lengths: a number, or a quarter or a half of
    the training window. The paper's 1, 512 and 1024 of 2048."""
    sequences: int = Field(32, gt=0)
    """Sequences of each source, as long as the longest of `lengths`, evenly spread over the held-out text. All where
    there are fewer."""

    def prefix_lengths(self, sequence_length: int) -> tuple[int, ...]:
        """Number of tokens of each prefix, for training windows of this length."""
        return tuple(dict.fromkeys(self.prefix_length(prefix, sequence_length) for prefix in self.prefixes))

    @staticmethod
    def prefix_length(prefix: Literal["quarter", "half"] | int, sequence_length: int) -> int:
        """Number of tokens of one prefix, for training windows of this length."""
        return prefix if isinstance(prefix, int) else sequence_length // {"quarter": 4, "half": 2}[prefix]

    def too_short(self, sequence_length: int, held_out: Mapping[str, int]) -> list[tuple[str, str]]:
        """Errors (key, message) for sources that hold out too few tokens; the name of a single source is ''."""
        longest = max(self.lengths) * sequence_length
        return [
            (
                "lengths",
                f"{max(self.lengths)} windows are {longest} tokens, and the held-out text"
                f"{f' of {name}' if name else ''} has {tokens}; use shorter ones, more text or a larger part of it "
                "(validation_fraction, test_fraction)",
            )
            for name, tokens in held_out.items()
            if tokens < longest
        ]

    def problems(self, sequence_length: int) -> list[tuple[str, str]]:
        """Errors (key, message) for training windows of this length."""
        if sequence_length < BUCKETS:
            return [("lengths", f"of windows of {sequence_length} tokens; {BUCKETS} or more are needed")]
        shortest = min(self.lengths) * sequence_length
        # The loss at a length is that of the last quarter of a window before it: all of that has to be targets.
        most = shortest - sequence_length // 4
        return [
            ("prefixes", f"{prefix} tokens are not possible with a length of {shortest}; from 1 to {most} are")
            for prefix in self.prefix_lengths(sequence_length)
            if not 0 < prefix <= most
        ]


class AttentionAnalysisConfig(Section):
    """Attention of a trained model, and dependence of its targets on the source, by position."""

    sequences: int = Field(16, gt=0)
    """Windows of held-out text; of a mixture, in proportion to the shares of its sources."""
    sequence_length: int | None = Field(None, gt=1)
    """Tokens of a window; the training window when absent. A longer one shows attention beyond the training window."""
    source_share: float = Field(0.5, gt=0, lt=1)
    """Part of a window that is given as the source; the rest is the target."""
    window: int = Field(5, gt=0)
    """Keys that count as local to a query; the last of them is at the query's position."""
    buckets: int = Field(32, gt=0)
    """Number of equal parts in which the records average positions and steps."""
    sensitivity_sequences: int = Field(4, ge=0)
    """Windows for which derivatives with respect to the source are computed, which is slow; 0: none."""
    steps: Items[Annotated[int, Field(gt=0)]] = ()
    """Target tokens, counted from 1, whose derivatives are computed; all powers of two when empty."""
    draws: int = Field(8, gt=0)
    """Random directions that estimate how much each layer's attention output depends on the source."""

    def split(self, sequence_length: int) -> int:
        """Number of source tokens in a window of this length."""
        return min(max(1, round(self.source_share * sequence_length)), sequence_length - 1)

    def steps_of(self, targets: int) -> tuple[int, ...]:
        """Target tokens whose derivatives are computed, for a target of `targets` tokens."""
        return self.steps or tuple(2**power for power in range(targets.bit_length()))

    def too_short(self, sequence_length: int, held_out: Mapping[str, int]) -> list[tuple[str, str]]:
        """Errors (key, message) for sources that hold out too few tokens; the name of a single source is ''."""
        length = self.sequence_length or sequence_length
        return [
            (
                "sequence_length",
                f"the held-out text{f' of {name}' if name else ''} has {tokens} tokens, less than one window of "
                f"{length}; use a shorter one",
            )
            for name, tokens in held_out.items()
            if tokens < length
        ]

    def problems(self, sequence_length: int) -> list[tuple[str, str]]:
        """Errors (key, message) for training windows of this length."""
        length = self.sequence_length or sequence_length
        if length < 2:
            return [("sequence_length", "a window of one token cannot be cut into a source and a target")]
        targets = length - self.split(length)
        beyond = [step for step in self.steps if step > targets]
        return [("steps", f"{beyond[0]} is beyond a target of {targets} tokens")] if beyond else []


class TasksConfig(Section):
    """Zero- and few-shot tasks of lm-evaluation-harness; needs `lit-llm[eval]`.

    RedLLM reads a question in its encoder and writes or scores the answer in its decoder; the scored tokens are the
    same for all families. The data that the harness downloads has to be in its cache or reachable.
    """

    names: Items[str] = Field(min_length=1)
    """Tasks, groups and tags of the harness and of the task files in `folder`, and the suite `redllm`: the paper's
    tasks that the harness has, with their shots."""
    shots: int | dict[str, int] | None = Field(None, union_mode="left_to_right")
    """Worked examples before each question, for all or by name; a suite's or the task's own when absent."""
    limit: int | None = Field(None, gt=0)
    """Questions of each task, its first ones; all when absent."""
    folder: FilePath | None = None
    """Task files of your own, relative to the YAML file that names them: `../glosses/tasks` for what
    `examples/glosses.py` writes, in a study in `ablations/`. Python in them (`!function`) is refused."""
    max_length: int | None = Field(None, gt=1)
    """Tokens of a question and its answer together; the training window when absent. A longer question loses its
    beginning, and is counted in `tasks/<task>/truncated`."""


EVALUATIONS = ("likelihood", "examples", "extrapolation", "attention", "tasks")
"""Sections of `EvaluateConfig` that are evaluations, in the order in which they run."""


class EvaluateConfig(Section):
    """Evaluations of a finished stage. Each is a section; an absent one is not run."""

    after: Items[Literal["pretrain", "finetune"]] = ("pretrain", "finetune")
    """Stages that are evaluated; stages that the experiment lacks are ignored."""
    likelihood: LikelihoodConfig | None = None
    """Losses of single held-out documents."""
    examples: ExampleLossesConfig | None = None
    """Losses on held-out examples of the instruction data."""
    extrapolation: ExtrapolationConfig | None = None
    """Losses beyond the training window."""
    attention: AttentionAnalysisConfig | None = None
    """Attention by position, and dependence of targets on the source."""
    tasks: TasksConfig | None = None
    """Zero- and few-shot tasks."""
    split: Literal["validation", "test"] = "test"
    """Held-out documents and examples that evaluations read; those of `validation` where `test` has none."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix products in bfloat16."""
    batch_tokens: int = Field(8192, gt=0)
    """Tokens of a batch, padding included. Not part of the fingerprint: results do not depend on it."""

    @model_validator(mode="after")
    def _measures_something(self) -> EvaluateConfig:
        if not any(getattr(self, name) is not None for name in EVALUATIONS):
            raise config_error(("", f"names no evaluation; write one or more of {', '.join(EVALUATIONS)}"))
        if not self.after:
            raise config_error(("after", "names no stage; write [pretrain], [finetune] or both"))
        return self

    def problems(self, sequence_length: int) -> list[tuple[str, str]]:
        """Errors (key, message) for training windows of this length."""
        sections = {
            "likelihood": self.likelihood,
            "extrapolation": self.extrapolation,
            "attention": self.attention,
        }
        return [
            (f"{name}.{key}", message)
            for name, section in sections.items()
            for key, message in (section.problems(sequence_length) if section else ())
        ]

    def too_short(self, sequence_length: int, held_out: Mapping[str, int]) -> list[tuple[str, str]]:
        """Errors (key, message) for sources that hold out too few tokens; the name of a single source is ''."""
        sections = {"extrapolation": self.extrapolation, "attention": self.attention}
        return [
            (f"{name}.{key}", message)
            for name, section in sections.items()
            for key, message in (section.too_short(sequence_length, held_out) if section else ())
        ]

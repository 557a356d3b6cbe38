"""Data of a stage that trains: its batches, and its evaluations on held-out text or examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from lit_llm.data.batches import Batches, ExampleBatches, TrainBatches
from lit_llm.data.examples import ExampleSet
from lit_llm.data.prepare import Prepared
from lit_llm.evaluation.examples import HeldOutExamples
from lit_llm.evaluation.final import Measure
from lit_llm.evaluation.likelihood import Validation
from lit_llm.experiment.schema import Experiment
from lit_llm.objectives.collate import Batch
from lit_llm.runs.warm_start import windows_before
from lit_llm.training.fit import Evaluate


@dataclass(frozen=True)
class StageData:
    """Batches and evaluations of a stage."""

    batches: Batches
    evaluate: Evaluate
    """Evaluation during training, on the validation split."""
    held_out_splits: Sequence[str]
    measure: Measure
    """Evaluation after the last step, on one split."""
    target_batches: Callable[[str], Sequence[Batch]]
    """Batches whose targets are measured: of the validation split during training, of others after the last step."""


def pretraining_data(experiment: Experiment, data: Prepared) -> StageData:
    """Batches and evaluations of the pretraining."""
    section, family = experiment.pretrain, experiment.model.family
    begin = windows_before(experiment)
    batches = TrainBatches(data, section.objective, family, section.masks, experiment.seed, begin, section)
    held_out = partial(Validation, section.validation, data, section.objective, family, section.masks)
    during = held_out()
    return StageData(
        batches,
        during,
        data.held_out_splits,
        lambda split, model, progress: held_out(split, final=True).measured(model, progress),
        lambda split: (during if split == during.split else held_out(split, final=True)).target_batches,
    )


def finetuning_data(experiment: Experiment, data: Prepared, examples: ExampleSet) -> StageData:
    """Batches and evaluations of the finetuning. data: the text of the pretraining, for its tokenizer."""
    section, family = experiment.finetune, experiment.model.family
    assert section is not None
    packed = section.data.packing == "greedy"
    batches = ExampleBatches(examples, section.data.batch_size, family, section.masks, experiment.seed, packed)
    byte_lengths = data.tokenizer().byte_lengths()
    at_once = section.training.execution.rows_at_once(section.data.batch_size)
    batch_tokens = at_once * (section.data.input_length + section.data.target_length)

    def held_out(count: int, split: str) -> HeldOutExamples:
        return HeldOutExamples(examples, count, section.masks, byte_lengths, split)

    during = held_out(section.validation.examples, "validation")

    def after(split: str) -> HeldOutExamples:
        return held_out(section.validation.most_examples, split)

    return StageData(
        batches,
        lambda model: during.measured(model, batch_tokens).metrics,
        examples.held_out_splits,
        lambda split, model, progress: after(split).measured(model, batch_tokens, progress),
        lambda split: (during if split == during.split else after(split)).target_batches(family, batch_tokens),
    )

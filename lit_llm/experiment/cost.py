"""What an experiment costs before it runs. Arithmetic only; loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

from lit_llm.components.part import BFLOAT16, FLOAT32, CacheBytes
from lit_llm.experiment.schema import Experiment, Pretrained, Trained
from lit_llm.models import cost
from lit_llm.models.resolve import ResolvedModel, resolve_model
from lit_llm.objectives.base import Lengths
from lit_llm.objectives.config import MasksConfig, continues
from lit_llm.training.memory import loss_bytes, training_bytes

PROMPT, GENERATE = 1000, 1000
"""Tokens at which decoding is costed unless told otherwise."""


@dataclass(frozen=True)
class SourceCost:
    """What the pretrainings took that an experiment is adapted from."""

    tokens: int = 0
    loss_tokens: int = 0
    train_flops: float = 0.0


@dataclass(frozen=True)
class Cost:
    """The figures of one run."""

    parameters: int
    non_embedding_parameters: int
    train_flops_per_token: float
    prefill_flops_per_token: float
    decode_flops_per_token: float
    paper_flops_per_sequence: float
    cache: CacheBytes
    tokens: int
    """Read in the whole pretraining, and in those of its sources."""
    loss_tokens: int
    """Learned from, likewise."""
    memory_bytes: int
    flops_per_step: float
    """Of one step of the pretraining: forward and backward, with a teacher's forward pass. Steps that train fresh
    parameters alone count like all others, which is more than they take."""
    train_flops: float
    """Of the whole pretraining and those of its sources. What a checkpoint took is not known, and not in it."""
    finetune_tokens: int = 0
    """Of the finetuning, were all its examples as long as they may be; 0 where there is none."""
    finetune_flops: float = 0.0
    """The same in FLOPs, forward and backward."""
    before: SourceCost = SourceCost()
    """What of it is the sources'."""
    generates: bool = True
    """Whether the model goes on with a text; without that, there is no decoding and no cache to cost."""

    def as_json(self, prompt: int, generate: int) -> dict[str, Any]:
        """The keys of `plan --json`; null for what such a model does not do."""

        def decoding(figure: float) -> float | None:
            return figure if self.generates else None

        return {
            "parameters": self.parameters,
            "non_embedding_parameters": self.non_embedding_parameters,
            "flops_per_token": {
                "train": self.train_flops_per_token,
                "prefill": self.prefill_flops_per_token,
                "decode": decoding(self.decode_flops_per_token),
            },
            "paper_flops_per_sequence": self.paper_flops_per_sequence,
            "kv_cache_bytes": {
                "per_source_token": decoding(self.cache.per_source_token),
                "per_generated_token": decoding(self.cache.per_generated_token),
                "total_at": {
                    "prompt": prompt,
                    "generate": generate,
                    "bytes": decoding(self.cache.total(prompt, generate)),
                },
            },
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "memory_bytes": self.memory_bytes,
            "train_flops": self.train_flops,
            "source": {"tokens": self.before.tokens, "flops": self.before.train_flops},
            "finetune_at_most": {"tokens": self.finetune_tokens, "flops": self.finetune_flops},
        }


FIGURES: dict[str, Callable[[Cost], float]] = {
    "parameters": lambda cost: cost.parameters,
    "non_embedding_parameters": lambda cost: cost.non_embedding_parameters,
    "train_flops": lambda cost: cost.train_flops,
    "train_flops_per_token": lambda cost: cost.train_flops_per_token,
    "prefill_flops_per_token": lambda cost: cost.prefill_flops_per_token,
    "decode_flops_per_token": lambda cost: cost.decode_flops_per_token,
    "kv_cache_bytes": lambda cost: cost.cache.total(PROMPT, GENERATE),
    "memory_bytes": lambda cost: cost.memory_bytes,
    "tokens": lambda cost: cost.tokens,
    "loss_tokens": lambda cost: cost.loss_tokens,
}
"""What an experiment can be constrained and searched by; decoding and its cache with a prompt and an answer of 1000
tokens each, the rest of one whole run."""
OF_DECODING = ("decode_flops_per_token", "kv_cache_bytes")
"""Those of models that go on with a text alone."""


def shape_of(experiment: Experiment, lengths: Lengths) -> cost.Shape:
    """What one example of the pretraining puts through the model."""
    return shape_under(experiment, lengths.source, lengths.target, experiment.pretrain.masks)


def shape_under(experiment: Experiment, source: float, targets: float, masks: MasksConfig) -> cost.Shape:
    """What a source and its targets put through the model under these masks."""
    family: str = experiment.model.family
    if family == "encoder_decoder":
        return cost.Shape(source=max(source, 1), target=targets, outputs=targets)
    if family == "encoder_only":
        return cost.Shape(source=source, target=0, outputs=targets)  # in the source's own places
    # An open prefix holds <s> too, and so does what partial attention reads.
    prefix = source + 1 if masks.prefix == "bidirectional" else 0
    return cost.Shape(source=0, target=source + targets, outputs=targets, prefix=prefix, partial=source + 1)


def example_shape(experiment: Experiment, source: float, targets: float) -> cost.Shape:
    """What one example of the finetuning puts through the model."""
    assert experiment.finetune is not None
    return shape_under(experiment, source, targets, experiment.finetune.masks)


def example_flops(experiment: Experiment, source: float, targets: float) -> float:
    """FLOPs of one example of the finetuning, forward and backward."""
    return cost.train_flops(resolve_model(experiment.model), example_shape(experiment, source, targets))


def largest_shape(experiment: Experiment) -> cost.Shape:
    """What a window may take at most: rows of a batch are padded to the longest source and the longest target."""
    extremes = experiment.pretrain.objective.extremes(experiment.pretrain.data.sequence_length)
    shapes = [astuple(shape_of(experiment, lengths)) for lengths in extremes]
    return cost.Shape(*map(max, zip(*shapes, strict=True)))


def memory_of(experiment: Experiment, stage: Trained) -> float:
    """Bytes that the training of a stage takes."""
    section = experiment.section(stage)
    at_once = section.training.execution.micro_batch_size or section.data.batch_size
    shape = largest_shape(experiment)
    if stage == "finetune" and (tuned := experiment.finetune):
        shape = example_shape(experiment, tuned.data.input_length, tuned.data.target_length)
    needed = training_bytes(resolve_model(experiment.model), section.training, shape, at_once)
    if stage == "pretrain" and (teacher := teacher_of(experiment)) is not None:
        # Its parameters, and its logits beside the model's own.
        needed += FLOAT32 * cost.count_parameters(teacher).total + loss_bytes(teacher, at_once * shape.outputs)
    return needed


def stage_of_most_memory(experiment: Experiment) -> Trained:
    """The stage whose training takes most."""
    return max(experiment.trained, key=lambda stage: memory_of(experiment, stage))


def cost_of(experiment: Experiment, prompt: int = PROMPT, generate: int = GENERATE) -> Cost:
    """Parameters, FLOPs, cache, tokens and memory of one run of this experiment."""
    model, pretrain = resolve_model(experiment.model), experiment.pretrain
    data, training, objective = pretrain.data, pretrain.training, pretrain.objective
    length, windows = data.sequence_length, data.batch_size * training.max_steps

    per_window = objective.average(length, lambda of: cost.train_flops(model, shape_of(experiment, of)))
    if (teacher := teacher_of(experiment)) is not None:
        per_window += objective.average(length, lambda of: cost.forward_flops(teacher, teacher_shape(of)))
    sources = [cost_of(source.seeded(experiment.seed)) for source in sources_of(experiment)]
    before = SourceCost(
        *(sum(getattr(each, name) for each in sources) for name in ("tokens", "loss_tokens", "train_flops"))
    )
    parameters = cost.count_parameters(model)
    used = experiment.section(experiment.trained[-1]).masks  # by what reads a prompt in the end
    tokens, flops = 0, 0.0
    if tuned := experiment.finetune:
        longest = (tuned.data.input_length, tuned.data.target_length)
        examples = tuned.data.batch_size * tuned.training.max_steps
        tokens, flops = examples * sum(longest), examples * example_flops(experiment, *longest)
    return Cost(
        parameters=parameters.total,
        non_embedding_parameters=parameters.non_embedding,
        train_flops_per_token=per_window / length,
        prefill_flops_per_token=cost.prefill_flops(model, prompt, used.prefix == "bidirectional"),
        decode_flops_per_token=cost.decode_flops(model, prompt, generate),
        paper_flops_per_sequence=cost.paper_flops(model, length),
        cache=cost.cache_bytes(model, FLOAT32 if training.precision == "fp32" else BFLOAT16),
        tokens=windows * length + before.tokens,
        loss_tokens=round(windows * objective.average(length, lambda of: of.target)) + before.loss_tokens,
        memory_bytes=max(
            [
                *(round(memory_of(experiment, stage)) for stage in experiment.trained),
                *(each.memory_bytes for each in sources),
            ]
        ),
        flops_per_step=per_window * data.batch_size,
        train_flops=per_window * windows + before.train_flops,
        finetune_tokens=tokens,
        finetune_flops=flops,
        before=before,
        generates=continues(experiment.model.family),
    )


def sources_of(experiment: Experiment) -> tuple[Pretrained, ...]:
    """The pretrainings that its own begins with."""
    return () if experiment.adapt is None else tuple(experiment.adapt.experiments.values())


def teacher_of(experiment: Experiment) -> ResolvedModel | None:
    """The network of the teacher that its pretraining learns from."""
    adapt = experiment.adapt
    return None if adapt is None or adapt.distill is None else adapt.models["decoder"]


def teacher_shape(lengths: Lengths) -> cost.Shape:
    """What an example puts through the teacher, which reads source and target as one text."""
    return cost.Shape(source=0, target=lengths.source + lengths.target, outputs=lengths.target)

"""Cost of an experiment before it runs: parameters, FLOPs, memory. Arithmetic only; loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from lit_llm.components.part import BFLOAT16, FLOAT32, CacheBytes
from lit_llm.experiment.schema import Experiment, Pretrained
from lit_llm.experiment.training_sections import Trained
from lit_llm.models import cost
from lit_llm.models.resolve import resolve_model
from lit_llm.models.resolved import ResolvedModel
from lit_llm.objectives.base import Lengths
from lit_llm.objectives.config import MasksConfig, continues
from lit_llm.training.memory import Shared, device_bytes, loss_bytes

PROMPT, GENERATE = 1000, 1000
"""Default lengths of prompt and answer for the cost of decoding, in tokens."""


@dataclass(frozen=True)
class SourceCost:
    """Cost of the pretrainings that an experiment is adapted from."""

    tokens: int = 0
    loss_tokens: int = 0
    train_flops: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Cost of one run."""

    parameters: int
    non_embedding_parameters: int
    train_flops_per_token: float
    prefill_flops_per_token: float
    decode_flops_per_token: float
    paper_flops_per_sequence: float
    cache: CacheBytes
    tokens: int
    """Tokens read in the pretraining and in those of its sources."""
    loss_tokens: int
    """Tokens with a loss, in the pretraining and in those of its sources."""
    memory_bytes: int
    """Bytes of memory, of each device where a stage trains on several."""
    flops_per_step: float
    """FLOPs of one pretraining step with a whole batch: forward and backward, with a teacher's forward pass. Steps that
    train only new parameters count like all others, which overestimates them."""
    train_flops: float
    """FLOPs of the pretraining and those of its sources. The cost of a checkpoint is unknown and not included."""
    finetune_tokens: int = 0
    """Tokens of the finetuning if all examples had the largest length; 0 without one."""
    finetune_flops: float = 0.0
    """FLOPs of these tokens, forward and backward."""
    active_parameters: int = 0
    """Parameters that one token uses; all of them without experts."""
    all_experts_train_flops_per_token: float = 0.0
    """`train_flops_per_token` if each token visited all experts; equal to it without experts."""
    before: SourceCost = SourceCost()
    """Share of the sources in tokens, loss tokens and FLOPs."""
    device_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    """{strategy: bytes of one device}, where a stage trains on several; otherwise empty."""
    generates: bool = True
    """Whether the model continues a text; otherwise it has no decoding and no cache."""

    def as_json(self, prompt: int, generate: int) -> dict[str, Any]:
        """The keys of `plan --json`; null where the model does not decode."""

        def decoding(figure: float) -> float | None:
            return figure if self.generates else None

        return {
            "parameters": self.parameters,
            "non_embedding_parameters": self.non_embedding_parameters,
            "active_parameters": self.active_parameters,
            "flops_per_token": {
                "train": self.train_flops_per_token,
                "train_all_experts": self.all_experts_train_flops_per_token,
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
            "device_memory_bytes": dict(self.device_memory_bytes),
            "train_flops": self.train_flops,
            "source": {"tokens": self.before.tokens, "flops": self.before.train_flops},
            "finetune_at_most": {"tokens": self.finetune_tokens, "flops": self.finetune_flops},
        }


COST_FIGURES: dict[str, Callable[[Cost], float]] = {
    "parameters": lambda cost: cost.parameters,
    "non_embedding_parameters": lambda cost: cost.non_embedding_parameters,
    "active_parameters": lambda cost: cost.active_parameters,
    "train_flops": lambda cost: cost.train_flops,
    "train_flops_per_token": lambda cost: cost.train_flops_per_token,
    "prefill_flops_per_token": lambda cost: cost.prefill_flops_per_token,
    "decode_flops_per_token": lambda cost: cost.decode_flops_per_token,
    "kv_cache_bytes": lambda cost: cost.cache.total(PROMPT, GENERATE),
    "memory_bytes": lambda cost: cost.memory_bytes,
    "tokens": lambda cost: cost.tokens,
    "loss_tokens": lambda cost: cost.loss_tokens,
}
"""Costs that constraints and searches can use. Decoding and cache: with a prompt and an answer of 1000 tokens each; the
rest: of one whole run."""
OF_DECODING = ("decode_flops_per_token", "kv_cache_bytes")
"""Costs that only models with decoding have."""


def shape_of(experiment: Experiment, lengths: Lengths) -> cost.Shape:
    """Tokens that one pretraining example puts through the model."""
    return shape_under(experiment, lengths, experiment.pretrain.masks)


def shape_under(experiment: Experiment, lengths: Lengths, masks: MasksConfig) -> cost.Shape:
    """Tokens that a source and its targets put through the model under these masks."""
    family: str = experiment.model.family
    source, targets, given = lengths
    if family == "encoder_decoder":
        return cost.Shape(source=max(source, 1), target=targets + given, outputs=targets)
    if family == "encoder_only":
        return cost.Shape(source=source, target=0, outputs=targets)  # targets are positions of the source
    # A bidirectional prefix, and the source of partial attention, include <s>.
    prefix = source + 1 if masks.prefix == "bidirectional" else 0
    return cost.Shape(source=0, target=lengths.read, outputs=targets, prefix=prefix, partial=source + 1)


def example_shape(experiment: Experiment, source: float, targets: float) -> cost.Shape:
    """Tokens that one finetuning example puts through the model."""
    assert experiment.finetune is not None
    return shape_under(experiment, Lengths(source, targets), experiment.finetune.masks)


def example_flops(experiment: Experiment, source: float, targets: float) -> float:
    """FLOPs of one example of the finetuning, forward and backward."""
    return cost.train_flops(resolve_model(experiment.model), example_shape(experiment, source, targets))


def largest_shape(experiment: Experiment) -> cost.Shape:
    """Largest shape of a window: rows of a batch are padded to the longest source and the longest target."""
    extremes = experiment.pretrain.objective.extremes(experiment.pretrain.data.sequence_length)
    shapes = [astuple(shape_of(experiment, lengths)) for lengths in extremes]
    return cost.Shape(*map(max, zip(*shapes, strict=True)))


def memory_of(experiment: Experiment, stage: Trained, strategy: Shared | None = None) -> float:
    """Bytes of memory that the training of a stage needs on each of its devices.

    strategy: what several devices share; when absent that of the configuration, with `auto` as ddp.
    """
    section = experiment.section(stage)
    execution = section.training.execution
    strategy = strategy or ("fsdp" if execution.strategy == "fsdp" else "ddp")
    at_once = execution.rows_at_once(section.data.batch_size)
    shape = largest_shape(experiment)
    if stage == "finetune" and (tuned := experiment.finetune):
        shape = example_shape(experiment, tuned.data.input_length, tuned.data.target_length)
    needed = device_bytes(resolve_model(experiment.model), section.training, shape, section.data.batch_size, strategy)
    if stage == "pretrain" and (teacher := teacher_of(experiment)) is not None:
        # The teacher's parameters and logits, and what the divergence makes of both models' logits.
        needed += FLOAT32 * cost.count_parameters(teacher).total + loss_bytes(
            teacher, at_once * shape.outputs, copies=5
        )
    return needed


def stage_of_most_memory(experiment: Experiment) -> Trained:
    """The stage whose training needs most memory."""
    return max(experiment.trained, key=lambda stage: memory_of(experiment, stage))


def cost_of(experiment: Experiment, prompt: int = PROMPT, generate: int = GENERATE) -> Cost:
    """Parameters, FLOPs, cache, tokens and memory of one run of this experiment."""
    model, pretrain = resolve_model(experiment.model), experiment.pretrain
    data, training, objective = pretrain.data, pretrain.training, pretrain.objective
    length, windows = data.sequence_length, pretrain.windows(training.max_steps)

    flops_of_window = {rows: _flops_of_window(experiment, rows) for rows in {1, *windows}}
    per_window = flops_of_window[1]
    unused = objective.average(length, lambda of: cost.unused_train_flops(model, shape_of(experiment, of)))
    loss_tokens_of = {rows: rows * objective.average(length // rows, lambda of: of.target) for rows in windows}
    sources = [cost_of(source.seeded(experiment.seed)) for source in sources_of(experiment)]
    before = SourceCost(
        *(sum(getattr(each, name) for each in sources) for name in ("tokens", "loss_tokens", "train_flops"))
    )
    parameters = cost.count_parameters(model)
    used = experiment.section(experiment.trained[-1]).masks  # the masks of the last stage, which reads prompts
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
        tokens=sum(windows.values()) * length + before.tokens,
        loss_tokens=round(sum(count * loss_tokens_of[rows] for rows, count in windows.items())) + before.loss_tokens,
        memory_bytes=max(
            [
                *(round(memory_of(experiment, stage)) for stage in experiment.trained),
                *(each.memory_bytes for each in sources),
            ]
        ),
        device_memory_bytes=_device_memory(experiment),
        flops_per_step=per_window * data.batch_size,
        train_flops=sum(flops_of_window[rows] * count for rows, count in windows.items()) + before.train_flops,
        finetune_tokens=tokens,
        finetune_flops=flops,
        active_parameters=parameters.active,
        all_experts_train_flops_per_token=(per_window + unused) / length,
        before=before,
        generates=continues(experiment.model.family),
    )


def _flops_of_window(experiment: Experiment, rows: int) -> float:
    """FLOPs of a pretraining window that is cut into so many rows, forward and backward, with a teacher's forward."""
    model, objective = resolve_model(experiment.model), experiment.pretrain.objective
    length = experiment.pretrain.data.sequence_length // rows
    flops = objective.average(length, lambda of: cost.train_flops(model, shape_of(experiment, of)))
    if (teacher := teacher_of(experiment)) is not None:
        flops += objective.average(length, lambda of: cost.forward_flops(teacher, teacher_shape(of)))
    return rows * flops


def whole_steps(experiment: Experiment) -> Callable[[int], float]:
    """A function of a number of steps: the number of steps with whole batches of whole rows that take their FLOPs."""
    pretrain = experiment.pretrain
    if pretrain.training.sequence_warmup is None:
        return pretrain.whole_batches
    whole = _flops_of_window(experiment, 1)
    shares = {rows: _flops_of_window(experiment, rows) / whole for rows in pretrain.windows(0)}
    size = pretrain.data.batch_size
    return lambda steps: sum(count * shares[rows] for rows, count in pretrain.windows(steps).items()) / size


def _device_memory(experiment: Experiment) -> dict[str, int]:
    several = [stage for stage in experiment.trained if experiment.section(stage).training.execution.ranks > 1]
    strategies: tuple[Shared, ...] = ("ddp", "fsdp") if several else ()
    return {
        strategy: round(max(memory_of(experiment, stage, strategy) for stage in several)) for strategy in strategies
    }


def sources_of(experiment: Experiment) -> tuple[Pretrained, ...]:
    """Pretrainings of the models that an experiment is adapted from."""
    return () if experiment.adapt is None else tuple(experiment.adapt.experiments.values())


def teacher_of(experiment: Experiment) -> ResolvedModel | None:
    """Network of the teacher in the pretraining; None without one."""
    adapt = experiment.adapt
    return None if adapt is None or adapt.distill is None else adapt.models["decoder"]


def teacher_shape(lengths: Lengths) -> cost.Shape:
    """Tokens that an example puts through the teacher, which reads source and target as one text."""
    return cost.Shape(source=0, target=lengths.read, outputs=lengths.target)

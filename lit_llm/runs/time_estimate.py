"""Estimated duration of an experiment on this machine, from timed steps. Loads no torch.

    run        = start + whole steps x step + validations (forward only: a third of a step for as many windows)
    evaluation = start + a third of a step for as many tokens; attention analysis costs some more passes

Left out: communication between devices, tokenising a corpus for the first time, checkpoints, waiting for data, the
tasks of the harness.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lit_llm.data.config import Mixture
from lit_llm.experiment.cost import shape_of, teacher_of, teacher_shape, whole_steps
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import Trained
from lit_llm.models.cost import forward_flops, train_flops
from lit_llm.models.resolve import resolve_model
from lit_llm.runs.kernels import gpu_memory
from lit_llm.training.schedules import evaluation_steps

START_SECONDS = 0.2
"""Seconds of a run outside its steps and validations, forked from a server with all imports: 0.16 s in
`benchmarks/run_overhead.py`, rounded up."""
FORWARD = 1 / 3
"""Share of the forward pass in a step; the backward pass costs twice as much."""

ATTENTION_PASSES = {"decoder": 4.0, "encoder_decoder": 2.0}
"""{family: cost of reading all attention weights}, in forward passes over the same window."""
BY_DIRECTION = {"decoder": 1.2, "encoder_decoder": 0.35}
"""{family: cost of a directional derivative through the attention that reads the source}, in forward passes. It goes
through queries, keys and values in a decoder-only model, else through keys and values. Both are measured on presets of
0.7M parameters with windows of 256 tokens; rough elsewhere."""


@dataclass(frozen=True)
class PaddedBatch:
    """Mean sizes of a finetuning batch, padding included."""

    rows: float
    """Rows: one for each example, or fewer with packing."""
    source: float
    """Tokens of an input, with padding."""
    target: float


@dataclass(frozen=True)
class Seconds:
    """Seconds of one run and its parts."""

    step: float
    validation: float
    """One validation during training."""
    run: float
    finetune: float = 0.0
    """The finetuning; 0 without one."""
    evaluations: Mapping[str, float] = field(default_factory=dict)
    """{`StageNode.name`: seconds} of the evaluations. Tasks are left out: only the harness knows their questions."""
    before: float = 0.0
    """The source pretrainings."""
    final: float = 0.0
    """The evaluation after the last step, of all splits."""

    @property
    def total(self) -> float:
        """Sum of all parts, without tasks."""
        return self.before + self.run + self.finetune + sum(self.evaluations.values())


def seconds_of(
    experiment: Experiment,
    steps: Mapping[Trained, float],
    padded: PaddedBatch | None = None,
    held_out: Mapping[str, int] | None = None,
    begin: int = 0,
) -> Seconds:
    """Seconds of one run of this experiment.

    Args:
        experiment: The experiment.
        steps: {stage that trains: seconds of one optimiser step}, on rows of the largest length.
        padded: Mean sizes of a finetuning batch; the largest sizes when None.
        held_out: {source: its validation tokens}; enough for every evaluation when None.
        begin: Step of a trunk from which the pretraining goes on.
    """
    pretrain = experiment.pretrain
    data, training, validation = pretrain.data, pretrain.training, pretrain.validation
    step = steps["pretrain"] * _teacher_factor(experiment)
    # A step was timed on one device's share. An evaluation is counted as whole on each device, an upper bound.
    window = FORWARD * steps["pretrain"] / training.execution.share(data.batch_size)
    passes = _passes(experiment)
    once = passes * validation.sequences * window
    final = sum(
        windows * window + (passes - 1) * validation.sequences * window
        for windows in _final_windows(experiment, held_out)
    )
    # One before the first step, of a trunk where it has one; the last one is another.
    times = (not begin) + sum(
        begin < at < training.max_steps for at in evaluation_steps(validation.times, training.max_steps)
    )
    run = START_SECONDS + _whole_steps(experiment, begin) * step + times * once + final
    token = window / data.sequence_length
    evaluations = {
        f"{name} after {stage}": START_SECONDS
        + token * sum(n * (source + target) for n, source, target in _readings(experiment, name, padded, held_out))
        for stage in experiment.trained
        for name in experiment.evaluations(stage)
        if name != "tasks"
    }
    finetune = _finetune_seconds(experiment, steps.get("finetune", 0.0), padded)
    return Seconds(step, once, run, finetune, evaluations, final=final)


def trunk_seconds(experiment: Experiment, step: float, begin: int) -> float:
    """Seconds of a trunk from a step on, with the validation before the first. step: those of one without a teacher."""
    pretrain = experiment.pretrain
    windows = 0 if begin else _passes(experiment) * pretrain.validation.sequences
    window = FORWARD * step / pretrain.training.execution.share(pretrain.data.batch_size)
    return START_SECONDS + _whole_steps(experiment, begin) * step * _teacher_factor(experiment) + windows * window


def _passes(experiment: Experiment) -> int:
    """Forward passes of a validation during training: one more where the objective is not the primary metric's."""
    pretrain, length = experiment.pretrain, experiment.pretrain.data.sequence_length
    _, primary = pretrain.validation.primary(length, experiment.model.family, pretrain.objective)
    return 1 + (pretrain.objective.resolved(length) != primary)


def _whole_steps(experiment: Experiment, begin: int) -> float:
    """Steps of the pretraining from a step on, those of a warm-up by their FLOPs. Branches begin after it."""
    steps = experiment.pretrain.training.max_steps
    return steps - begin if begin else whole_steps(experiment)(steps)


def _teacher_factor(experiment: Experiment) -> float:
    """Factor on a step's time for the teacher's forward pass, by its FLOPs; 1 without a teacher."""
    if (teacher := teacher_of(experiment)) is None:
        return 1.0
    model, pretrain = resolve_model(experiment.model), experiment.pretrain
    length = pretrain.data.sequence_length
    student_flops = pretrain.objective.average(length, lambda of: train_flops(model, shape_of(experiment, of)))
    return (
        1.0 + pretrain.objective.average(length, lambda of: forward_flops(teacher, teacher_shape(of))) / student_flops
    )


def _final_windows(experiment: Experiment, held_out: Mapping[str, int] | None) -> Iterator[float]:
    """Windows that the evaluation after the last step reads of each split, over all sources.

    held_out: validation tokens of each source; the test split is assumed to have its configured share.
    """
    data, most = experiment.pretrain.data, experiment.pretrain.validation.most_sequences
    sources = len(data.corpus.sources) if isinstance(data.corpus, Mixture) else 1
    tokens = list(held_out.values()) if held_out else [math.inf] * sources
    for share in filter(None, (1.0, data.test_fraction / data.validation_fraction)):
        yield sum(min(most, share * each / data.sequence_length) for each in tokens)


def _finetune_seconds(experiment: Experiment, step: float, padded: PaddedBatch | None) -> float:
    """Seconds of the finetuning, whose rows are examples."""
    if experiment.finetune is None:
        return 0.0
    data, training = experiment.finetune.data, experiment.finetune.training
    validation, longest = experiment.finetune.validation, data.input_length + data.target_length
    batch = padded or PaddedBatch(data.batch_size, data.input_length, data.target_length)
    # Rows are shorter than the timed ones, and fewer with packing.
    step *= batch.rows * (batch.source + batch.target) / (data.batch_size * longest)
    example = FORWARD * step / training.execution.share(data.batch_size)
    splits = 2 if data.has_test else 1
    times = min(validation.times, training.max_steps)  # one before the first step
    evaluations = times * validation.examples + splits * validation.most_examples
    return START_SECONDS + training.max_steps * step + evaluations * example


def _readings(
    experiment: Experiment, name: str, padded: PaddedBatch | None, held_out: Mapping[str, int] | None
) -> Iterator[tuple[float, float, float]]:
    """(number of sequences, source tokens, target tokens) that an evaluation puts through the model."""
    config, data = experiment.evaluate, experiment.pretrain.data
    assert config is not None
    corpus, window = data.corpus, data.sequence_length
    names = corpus.sources if isinstance(corpus, Mixture) else [""]
    available = [math.inf if held_out is None else held_out[source] for source in names]
    if name == "likelihood" and (likelihood := config.likelihood):
        length, prefix = likelihood.span(window)
        # Lengths of documents are unknown: assume the largest, but no more than the whole text.
        for tokens in [*available, *[math.inf] * len(likelihood.corpora)]:
            yield min(likelihood.documents, tokens / length), prefix, length - prefix
    elif name == "extrapolation" and (beyond := config.extrapolation):
        longest = max(beyond.lengths) * window
        for tokens in available:
            for prefix in beyond.prefix_lengths(window):
                yield min(beyond.sequences, tokens // longest), prefix, longest - prefix
    elif name == "examples" and config.examples and experiment.finetune:
        tuned = experiment.finetune.data
        batch = padded or PaddedBatch(tuned.batch_size, tuned.input_length, tuned.target_length)
        yield config.examples.examples, batch.source, batch.target
    elif name == "attention" and (attention := config.attention):
        length = attention.sequence_length or window
        source = attention.split(length)
        # Each window is read with its source and with another. A derivative by the embedded source goes through all
        # layers, like a forward pass.
        family = experiment.model.family
        few = min(attention.sensitivity_sequences, attention.sequences)
        steps = len(attention.steps_of(length - source))
        yield (2 + ATTENTION_PASSES[family]) * attention.sequences, source, length - source
        yield few * (2 + steps * (1 + attention.draws * BY_DIRECTION[family])), source, length - source


def makespan(seconds: Iterable[float], max_parallel: int) -> float:
    """Seconds until the last of these runs ends, if each starts in order as soon as another has ended."""
    free = [0.0] * max_parallel
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def memory_of_device(experiment: Experiment, stage: Trained) -> int:
    """Bytes that each device of a stage has here: a GPU's memory, or a share of the free main memory."""
    execution = experiment.section(stage).training.execution
    on_gpu = gpu_memory() if execution.accelerator != "cpu" else None
    return available_memory() // execution.devices if on_gpu is None else on_gpu


def available_memory() -> int:
    """Bytes of main memory free for new processes; ignores lower limits of control groups."""
    import psutil

    return int(psutil.virtual_memory().available)

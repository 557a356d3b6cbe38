"""How long an experiment would take here: steps that were timed, times how many there are. Loads no torch.

    run        = start + steps x step + validations (forward only: a third of a step for as many windows)
    evaluation = start + a third of a step for as many tokens; looking at attention costs some passes more

Left out: tokenising a corpus for the first time, checkpoints, data that is read late, the tasks of the harness.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lit_llm.data.config import Mixture
from lit_llm.experiment.cost import shape_of, teacher_of, teacher_shape
from lit_llm.experiment.schema import Experiment, Trained
from lit_llm.models.cost import forward_flops, train_flops
from lit_llm.models.resolve import resolve_model
from lit_llm.objectives.base import AnyObjective

START_SECONDS = 0.2
"""Of a run outside its steps and validations, forked from a server that has imported everything: 0.16 s as measured by
`benchmarks/run_overhead.py`, rounded up."""
FORWARD = 1 / 3
"""Share of a step that its forward pass takes: a backward pass costs two of them."""

ATTENTION_PASSES = {"decoder": 4.0, "encoder_decoder": 2.0}
"""Looking at every attention's weights, in forward passes over the same window, by family."""
BY_DIRECTION = {"decoder": 1.2, "encoder_decoder": 0.35}
"""A derivative in one direction through the attention of each layer that reads the source, in the same measure: in a
decoder-only model it goes through queries, keys and values, else through keys and values. Both as the presets of 0.7M
parameters take it with windows of 256 tokens; rough figures elsewhere."""


@dataclass(frozen=True)
class PaddedBatch:
    """What a batch of the finetuning is on average, padding included."""

    rows: float
    """As many as there are examples, or fewer where they share them."""
    source: float
    """Tokens of an input."""
    target: float


@dataclass(frozen=True)
class Seconds:
    """Of one run."""

    step: float
    validation: float
    """Each of those during training."""
    run: float
    finetune: float = 0.0
    """Of the finetuning; 0 where there is none."""
    evaluations: Mapping[str, float] = field(default_factory=dict)
    """Of what follows the stages, by `StageNode.name`. Tasks are left out: only the harness knows their questions."""
    before: float = 0.0
    """Of the pretrainings that it begins with."""
    final: float = 0.0
    """Of the evaluation after the last step, of all splits."""

    @property
    def total(self) -> float:
        """Of all but the tasks."""
        return self.before + self.run + self.finetune + sum(self.evaluations.values())


def seconds_of(
    experiment: Experiment,
    steps: Mapping[Trained, float],
    padded: PaddedBatch | None = None,
    held_out: Mapping[str, int] | None = None,
) -> Seconds:
    """What one run of this experiment takes.

    Args:
        experiment: The experiment.
        steps: Seconds of one optimiser step of each stage that trains, on rows as long as they may be.
        padded: What a batch of the finetuning is; as many rows as examples, as long as they may be, when absent.
        held_out: Tokens that each source holds out; enough for every evaluation when absent.
    """
    pretrain = experiment.pretrain
    data, training, validation = pretrain.data, pretrain.training, pretrain.validation
    step = steps["pretrain"] * _teacher_factor(experiment)
    window = FORWARD * steps["pretrain"] / data.batch_size
    _, primary = validation.primary(data.sequence_length, experiment.model.family)
    ways: list[AnyObjective] = [primary]
    if pretrain.objective.resolved(data.sequence_length) != primary:
        ways.append(pretrain.objective)  # val/objective_loss is another pass
    once = len(ways) * validation.sequences * window
    final = sum(
        windows * window + (len(ways) - 1) * validation.sequences * window
        for windows in _final_windows(experiment, held_out)
    )
    times = min(validation.times, training.max_steps)  # one before the first step; the last one is another
    run = START_SECONDS + training.max_steps * step + times * once + final
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


def _teacher_factor(experiment: Experiment) -> float:
    """What a step is multiplied by for its teacher's forward pass, in proportion to its FLOPs."""
    if (teacher := teacher_of(experiment)) is None:
        return 1.0
    model, pretrain = resolve_model(experiment.model), experiment.pretrain
    length = pretrain.data.sequence_length
    student_flops = pretrain.objective.average(length, lambda of: train_flops(model, shape_of(experiment, of)))
    return (
        1.0 + pretrain.objective.average(length, lambda of: forward_flops(teacher, teacher_shape(of))) / student_flops
    )


def _final_windows(experiment: Experiment, held_out: Mapping[str, int] | None) -> Iterator[float]:
    """Windows of each split that the evaluation after the last step reads, of all sources together.

    held_out: tokens of each source's validation split; a test split is taken to have as many as its share says.
    """
    data, most = experiment.pretrain.data, experiment.pretrain.validation.most_sequences
    sources = len(data.corpus.sources) if isinstance(data.corpus, Mixture) else 1
    tokens = list(held_out.values()) if held_out else [math.inf] * sources
    for share in filter(None, (1.0, data.test_fraction / data.validation_fraction)):
        yield sum(min(most, share * each / data.sequence_length) for each in tokens)


def _finetune_seconds(experiment: Experiment, step: float, padded: PaddedBatch | None) -> float:
    """The same arithmetic for the finetuning, whose rows are examples."""
    if experiment.finetune is None:
        return 0.0
    data, training = experiment.finetune.data, experiment.finetune.training
    validation, longest = experiment.finetune.validation, data.input_length + data.target_length
    batch = padded or PaddedBatch(data.batch_size, data.input_length, data.target_length)
    # Shorter rows than those that were timed, and fewer of them where examples share one.
    step *= batch.rows * (batch.source + batch.target) / (data.batch_size * longest)
    example = FORWARD * step / data.batch_size
    splits = 2 if data.has_test else 1
    times = min(validation.times, training.max_steps)  # one before the first step
    evaluations = times * validation.examples + splits * validation.most_examples
    return START_SECONDS + training.max_steps * step + evaluations * example


def _readings(
    experiment: Experiment, name: str, padded: PaddedBatch | None, held_out: Mapping[str, int] | None
) -> Iterator[tuple[float, float, float]]:
    """(how many, tokens of a source, tokens of a target) of what an evaluation has the model read."""
    config, data = experiment.evaluate, experiment.pretrain.data
    assert config is not None
    corpus, window = data.corpus, data.sequence_length
    names = corpus.sources if isinstance(corpus, Mixture) else [""]
    available = [math.inf if held_out is None else held_out[source] for source in names]
    if name == "likelihood" and (likelihood := config.likelihood):
        length, prefix = likelihood.span(window)
        # How long documents are is not known: as long as they may be, but no more than all of the text.
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
        # Each window is read with its own source and with another. A derivative by the embedded source goes through all
        # layers, as a forward pass does.
        family = experiment.model.family
        few = min(attention.sensitivity_sequences, attention.sequences)
        steps = len(attention.steps_of(length - source))
        yield (2 + ATTENTION_PASSES[family]) * attention.sequences, source, length - source
        yield few * (2 + steps * (1 + attention.draws * BY_DIRECTION[family])), source, length - source


def makespan(seconds: Iterable[float], max_parallel: int) -> float:
    """When the last of these runs ends: each starts, in order, as soon as one of the running ones has ended."""
    free = [0.0] * max_parallel
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def available_memory() -> int:
    """Bytes of main memory that are free for new processes; a control group may allow less, which is not looked at."""
    import psutil

    return int(psutil.virtual_memory().available)

"""How long an experiment would take here and whether it fits: analytic cost over a machine benchmark. Loads no torch.

    step   = products / rate(d_model) + attention / rate(keys, head_dim) + logits x (1 / rate(logits) + b d_model)
             + passes x layers x overhead + update(optimiser, parameters) + the trainer's own part
    run    = start + steps x step + validations (forward only: a third of a pass)
    evaluation = start + a third of a pass over all that is scored; looking at attention costs some passes more

Every rate is this machine's, measured on the code that trains (`machine_benchmark.py`). Left out: tokenising a corpus
for the first time, checkpoints, data that is read late. Beyond the largest width that was measured the rate is taken to
stay, and memory is taken to be there: for large models on a small machine, read it as "at best".
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.loss.config import chunk_rows
from lit_llm.data.config import Mixture
from lit_llm.experiment.cost import example_shape, largest_shape, shape_of, shape_under, teacher_of, teacher_shape
from lit_llm.experiment.schema import Experiment, Trained
from lit_llm.models.cost import Shape, examples, forward_flops
from lit_llm.models.parameters import embedding_shapes, matrix_of, parameter_shapes
from lit_llm.models.resolve import Layer, ResolvedModel, resolve_model
from lit_llm.objectives.base import AnyObjective, Lengths
from lit_llm.runs.machine_benchmark import MUON_WIDTH, MachineBenchmark, interpolated
from lit_llm.training.optimizers.config import Muon, Optimizer

START_SECONDS = 0.2
"""Of a run outside its steps and validations, forked from a server that has imported everything: 0.16 s as measured by
`benchmarks/run_overhead.py`, rounded up."""
TRAINER_LAYERS = 2.0
"""The trainer's own part of a step (Lightning's loop, callbacks, cutting the batch), as so many layers' operator
calls, with which it shares its cause, Python. A rough figure, not measured by itself: the smallest experiment of
`benchmarks/estimate.py`, where it weighs most, comes out within a fifth with it."""

LOOKING = {"decoder": 4.0, "encoder_decoder": 2.0}
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
    benchmark: MachineBenchmark,
    padded: PaddedBatch | None = None,
    held_out: Mapping[str, int] | None = None,
) -> Seconds:
    """What one run of this experiment takes on the machine of this benchmark.

    padded: what a batch of the finetuning is; as many rows as examples, as long as they may be, when absent. held_out:
    tokens that each source holds out; enough for every evaluation when absent.
    """
    model, pretrain = resolve_model(experiment.model), experiment.pretrain
    data, training, validation = pretrain.data, pretrain.training, pretrain.validation
    length, rows = data.sequence_length, data.batch_size
    at_once = training.execution.micro_batch_size or rows

    def one(lengths: Lengths) -> float:
        return _window_seconds(model, shape_of(experiment, lengths), at_once, benchmark)

    overhead = layers_seconds(model, benchmark)
    # Shorter rows are padded to the longest, of which a batch is taken to have one; padding has no logits.
    outputs = pretrain.objective.average(length, lambda lengths: lengths.target)
    windows = rows * _window_seconds(model, replace(largest_shape(experiment), outputs=outputs), at_once, benchmark)
    update = update_seconds(model, training.optimizer, benchmark)
    looks = _look_seconds(experiment, model, benchmark)
    passes_of_three = _together(windows, math.ceil(rows / at_once) * overhead, benchmark)
    # Blocks that are computed again for the backward pass: four passes instead of three.
    again = 4 / 3 if training.execution.activation_checkpointing else 1
    step = again * passes_of_three + update + looks
    if (teacher := teacher_of(experiment)) is not None:  # its forward pass is a third of what is timed
        taught = pretrain.objective.average(
            length, lambda of: _window_seconds(teacher, teacher_shape(of), at_once, benchmark)
        )
        step += _together(rows * taught, math.ceil(rows / at_once) * layers_seconds(teacher, benchmark), benchmark) / 3
    step += TRAINER_LAYERS * benchmark.layer_seconds
    _, primary = validation.primary(length, experiment.model.family)
    ways: list[AnyObjective] = [primary]
    if pretrain.objective.resolved(length) != primary:
        ways.append(pretrain.objective)  # val/objective_loss is another pass
    passes = [way.average(length, one) for way in ways]

    def reading(windows: float, each: float) -> float:
        return _together(windows * each, math.ceil(windows / rows) * overhead, benchmark) / 3

    few = validation.sequences
    once = sum(reading(few, each) for each in passes)
    final = sum(
        reading(windows, passes[0]) + sum(reading(few, each) for each in passes[1:])
        for windows in _final_windows(experiment, held_out)
    )
    times = min(validation.times, training.max_steps)  # one before the first step; the last one is another
    run = START_SECONDS + training.max_steps * step + times * once + final
    evaluations = {
        f"{name} after {stage}": _evaluation_seconds(experiment, stage, name, benchmark, padded, held_out)
        for stage in experiment.trained
        for name in experiment.evaluations(stage)
        if name != "tasks"
    }
    finetune = _finetune_seconds(experiment, model, benchmark, padded)
    return Seconds(step, once, run, finetune, evaluations, final=final)


def _final_windows(experiment: Experiment, held_out: Mapping[str, int] | None) -> Iterator[float]:
    """Windows of each split that the evaluation after the last step reads, of all sources together.

    held_out: tokens of each source's validation split; a test split is taken to have as many as its share says.
    """
    data, most = experiment.pretrain.data, experiment.pretrain.validation.most_sequences
    sources = len(data.corpus.sources) if isinstance(data.corpus, Mixture) else 1
    tokens = list(held_out.values()) if held_out else [math.inf] * sources
    for share in filter(None, (1.0, data.test_fraction / data.validation_fraction)):
        yield sum(min(most, share * each / data.sequence_length) for each in tokens)


def _finetune_seconds(
    experiment: Experiment, model: ResolvedModel, benchmark: MachineBenchmark, padded: PaddedBatch | None
) -> float:
    """The same arithmetic for the finetuning, whose rows are examples."""
    if experiment.finetune is None:
        return 0.0
    data, training = experiment.finetune.data, experiment.finetune.training
    validation = experiment.finetune.validation
    batch = padded or PaddedBatch(data.batch_size, data.input_length, data.target_length)
    at_once = training.execution.micro_batch_size or math.ceil(batch.rows)
    shape = example_shape(experiment, batch.source, batch.target)
    window, overhead = _window_seconds(model, shape, at_once, benchmark), layers_seconds(model, benchmark)
    again = 4 / 3 if training.execution.activation_checkpointing else 1
    step = again * _together(batch.rows * window, math.ceil(batch.rows / at_once) * overhead, benchmark)
    step += update_seconds(model, training.optimizer, benchmark) + TRAINER_LAYERS * benchmark.layer_seconds

    def reading(examples: int) -> float:
        return _together(examples * window, math.ceil(examples / data.batch_size) * overhead, benchmark) / 3

    splits = 2 if data.has_test else 1
    evaluations = min(validation.times, training.max_steps) * reading(validation.examples)  # one before the first step
    return START_SECONDS + training.max_steps * step + evaluations + splits * reading(validation.most_examples)


def _evaluation_seconds(
    experiment: Experiment,
    stage: Trained,
    name: str,
    benchmark: MachineBenchmark,
    padded: PaddedBatch | None,
    held_out: Mapping[str, int] | None,
) -> float:
    """Of one evaluation after a stage, by its section."""
    config, model, masks = experiment.evaluate, resolve_model(experiment.model), experiment.section(stage).masks
    assert config is not None
    overhead, passes = layers_seconds(model, benchmark), 0.0
    for count, source, targets in _readings(experiment, name, padded, held_out):
        at_once = max(1, min(math.ceil(count), int(config.batch_tokens // (source + targets))))
        window = _window_seconds(model, shape_under(experiment, source, targets, masks), at_once, benchmark)
        passes += _together(count * window, math.ceil(count / at_once) * overhead, benchmark)
    return START_SECONDS + passes / 3


def _readings(
    experiment: Experiment, name: str, padded: PaddedBatch | None, held_out: Mapping[str, int] | None
) -> Iterator[tuple[float, float, float]]:
    """(how many, tokens of a source, tokens of a target) of what an evaluation has the model read."""
    config, data = experiment.evaluate, experiment.pretrain.data
    assert config is not None
    corpus, window = data.corpus, data.sequence_length
    names = corpus.sources if isinstance(corpus, Mixture) else [""]
    there = [math.inf if held_out is None else held_out[source] for source in names]
    if name == "likelihood" and (likelihood := config.likelihood):
        length, prefix = likelihood.span(window)
        # How long documents are is not known: as long as they may be, but no more than all of the text.
        for tokens in [*there, *[math.inf] * len(likelihood.corpora)]:
            yield min(likelihood.documents, tokens / length), prefix, length - prefix
    elif name == "extrapolation" and (beyond := config.extrapolation):
        longest = max(beyond.lengths) * window
        for tokens in there:
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
        yield (2 + LOOKING[family]) * attention.sequences, source, length - source
        yield few * (2 + steps * (1 + attention.draws * BY_DIRECTION[family])), source, length - source


def _window_seconds(model: ResolvedModel, shape: Shape, at_once: int, benchmark: MachineBenchmark) -> float:
    """Forward and backward pass over one window, the cost of the calls themselves left out."""
    scores = [
        (keys, part.head_dim, part.score_flops(pairs))
        for _, layer, example in examples(model, shape)
        for _, part in layer.parts
        if isinstance(part, ResolvedAttention)
        for keys, pairs in part.pairs(example)
    ]
    logits = shape.outputs * model.vocabulary
    products = forward_flops(model, shape) - sum(flops for *_, flops in scores) - 2 * logits * model.d_model
    seconds = 3 * products / interpolated(benchmark.layer, model.d_model)
    for keys, head_dim, flops in scores:
        rates = {measured: interpolated(by_head_dim, head_dim) for measured, by_head_dim in benchmark.scores.items()}
        seconds += 3 * flops / interpolated(rates, keys)
    positions, rows = at_once * shape.outputs, chunk_rows(model.vocabulary)
    held = max(min(positions, rows) * model.vocabulary, min(benchmark.logits))
    # In chunks, the logits are computed again for the backward pass: four passes instead of three.
    again = 4 / 3 if positions > rows else 1
    for_each = 1 / interpolated(benchmark.logits, held) + benchmark.logit_width * model.d_model
    return seconds + again * logits * for_each


def _together(work: float, calls: float, benchmark: MachineBenchmark) -> float:
    """Seconds of work and of the operator calls that ask for it: a CPU does one after the other, while a GPU is at work
    the next calls are made."""
    return work + calls if benchmark.device == "cpu" else max(work, calls)


def layers_seconds(model: ResolvedModel, benchmark: MachineBenchmark) -> float:
    """What the operator calls of one forward and backward pass cost, however few its tokens."""

    def cost(layer: Layer) -> float:
        # Any third part is taken to cost what cross-attention does.
        return benchmark.layer_seconds + benchmark.cross_seconds * (len(layer.parts) - 2)

    return sum(map(cost, model.layers))


def update_seconds(model: ResolvedModel, optimizer: Optimizer, benchmark: MachineBenchmark) -> float:
    """Clipping and one step of the optimiser. AdamW in 8 bits is taken to cost what AdamW costs."""
    vocabulary = embedding_shapes(model)
    outside = [matrix_of(shape) for shape in vocabulary.values()]
    inside = [matrix_of(shape) for name, shape in parameter_shapes(model).items() if name not in vocabulary]
    if not isinstance(optimizer, Muon):
        return _update(optimizer.kind.removesuffix("_8bit"), inside + outside, benchmark)
    matrices = [tensor for tensor in inside if tensor[0] > 1]
    rest = [tensor for tensor in inside if tensor[0] == 1]
    for_each, for_entry = benchmark.update["muon"]
    seconds = sum(for_each + for_entry * max(matrix) * min(matrix) ** 2 / MUON_WIDTH for matrix in matrices)
    return seconds + _update("adamw", rest + outside, benchmark)


def _update(kind: str, tensors: Sequence[tuple[int, int]], benchmark: MachineBenchmark) -> float:
    for_each, for_entry = benchmark.update[kind]
    return sum(for_each + for_entry * rows * columns for rows, columns in tensors)


def _look_seconds(experiment: Experiment, model: ResolvedModel, benchmark: MachineBenchmark) -> float:
    """Looking at attention logits now and then, per step: a forward pass over few sequences."""
    stability, data = experiment.pretrain.training.stability, experiment.pretrain.data
    if not stability.logit_every:
        return 0.0
    few = min(stability.logit_sequences, data.batch_size)
    window = experiment.pretrain.objective.average(
        data.sequence_length, lambda lengths: _window_seconds(model, shape_of(experiment, lengths), few, benchmark)
    )
    return _together(few * window, layers_seconds(model, benchmark), benchmark) / 3 / stability.logit_every


def makespan(seconds: Iterable[float], slots: int) -> float:
    """When the last of these runs ends: each starts, in order, as soon as one of the slots is free."""
    free = [0.0] * slots
    for each in seconds:
        heapq.heapreplace(free, free[0] + each)
    return max(free)


def memory_there() -> int:
    """Bytes of main memory that are free for new processes; a control group may allow less, which is not looked at."""
    import psutil

    return int(psutil.virtual_memory().available)

"""Texts that are longer than a table of learned positions, or than its trained part. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lit_llm.evaluation.config import EvaluateConfig, ValidationConfig
from lit_llm.models.positions import positions_read, too_few_positions
from lit_llm.models.resolved import ResolvedModel
from lit_llm.objectives.base import AnyObjective, Lengths
from lit_llm.objectives.config import Objective

ROWS = "model.embedding.max_positions"


def pretraining_problems(
    model: ResolvedModel, objective: Objective, validation: ValidationConfig, length: int
) -> Iterator[tuple[str, str]]:
    """(key, message) of a training window, or a held-out one, that the table is too short for."""
    _, primary = validation.primary(length, model.family, objective)
    opening = _opening(model, objective, length)
    examples = [*objective.extremes(length), *_opened(primary.extremes(length), opening)]
    if problem := _first_problem(model, examples):
        yield ROWS, f"a window of pretrain.data.sequence_length {length}: {problem}"


def teacher_problem(teacher: ResolvedModel, source: str, objective: Objective, length: int) -> str:
    """Message for a teacher that has too few positions, or ''. source: the place of its table's length.

    Its rows are padded to the longest of both parts.
    """
    longest = Lengths(*(max(part) for part in zip(*objective.extremes(length), strict=True)))
    rows = teacher.embedding.max_positions
    if rows is None or (needed := _positions(teacher, longest)) <= rows:
        return ""
    return (
        f"the teacher has learned {rows} positions ({source}), and reads source and target as one text of up to "
        f"{needed}, padding included; use a teacher with more positions, or a shorter pretrain.data.sequence_length"
    )


def finetuning_problems(model: ResolvedModel, input_length: int, target_length: int) -> Iterator[tuple[str, str]]:
    """(key, message) of an example that the table is too short for."""
    if problem := _first_problem(model, [Lengths(input_length, target_length)]):
        example = f"finetune.data.input_length {input_length} and target_length {target_length}"
        yield ROWS, f"an example of {example}: {problem}"


def positions_trained(model: ResolvedModel, examples: Iterable[Lengths]) -> int:
    """Positions that the longest of these training examples reads."""
    return max(_positions(model, example) for example in examples)


class TrainedTexts(NamedTuple):
    """Texts that the stages of an experiment train on."""

    window: int
    """Tokens of a window of the pretraining."""
    objective: Objective
    """Objective of the pretraining."""
    positions: int
    """Learned positions that the pretraining trains."""
    example: Lengths | None
    """Longest example of the finetuning; None without one."""


def evaluation_problems(
    model: ResolvedModel, evaluate: EvaluateConfig, texts: TrainedTexts
) -> Iterator[tuple[str, str]]:
    """(key in `evaluate`, message) of texts that need positions without a row, or with an untrained row."""
    trained = texts.positions
    if texts.example and "pretrain" not in evaluate.after:
        trained = max(trained, _positions(model, texts.example))
    for key, what, examples in _longest_texts(model, evaluate, texts):
        if problem := _first_problem(model, examples, trained):
            yield key, f"{what}: {problem}"


def _longest_texts(
    model: ResolvedModel, evaluate: EvaluateConfig, texts: TrainedTexts
) -> Iterator[tuple[str, str, list[Lengths]]]:
    """(key in `evaluate`, what is read, its longest texts) of each evaluation."""
    length, example = texts.window, texts.example
    opening = _opening(model, texts.objective, length) if "pretrain" in evaluate.after else 0
    if evaluate.examples and example:
        yield "examples", f"an example of finetune.data of {int(example.read)} tokens", [example]
    if likelihood := evaluate.likelihood:
        cut, prefix = likelihood.span(length)
        yield "likelihood.length", f"a document of {cut} tokens", _opened([Lengths(prefix, cut - prefix)], opening)
    if extrapolation := evaluate.extrapolation:
        times = max(extrapolation.lengths)
        prefixes = extrapolation.prefix_lengths(length)
        windows = _opened([Lengths(prefix, times * length - prefix) for prefix in prefixes], opening)
        yield "extrapolation.lengths", f"{times} windows of {length} tokens", windows
    if attention := evaluate.attention:
        window = attention.sequence_length or length
        source = attention.split(window)
        yield "attention.sequence_length", f"a window of {window} tokens", [Lengths(source, window - source)]
    if tasks := evaluate.tasks:
        most = tasks.max_length or length
        questions = [Lengths(most - 1, 1), Lengths(0, most)]
        yield "tasks.max_length", f"a question and its answer of {most} tokens", questions


def _opening(model: ResolvedModel, objective: AnyObjective, length: int) -> int:
    """Tokens before a prefix that is to be continued."""
    return len(objective.opening(length, model.vocabulary))


def _opened(examples: Iterable[Lengths], opening: int) -> list[Lengths]:
    return [example._replace(source=example.source + opening) for example in examples]


def _first_problem(model: ResolvedModel, examples: Iterable[Lengths], trained: int | None = None) -> str:
    """Message for the first example without a row, or a trained one, for each of its tokens, or ''."""
    rows = model.embedding.max_positions
    for needed in (_positions(model, example) for example in examples if rows):
        if problem := too_few_positions(model, needed):
            return problem
        if trained is not None and needed > trained:
            return (
                f"{needed} positions are needed, and the longest text of the training has {trained}: the other rows of "
                "model.embedding.max_positions stay as they were drawn; evaluate shorter texts, or train on longer ones"
            )
    return ""


def _positions(model: ResolvedModel, example: Lengths) -> int:
    return positions_read(model, int(example.source), int(example.target + example.given))

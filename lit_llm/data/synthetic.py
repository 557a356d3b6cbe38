"""Synthetic tasks: examples of symbols with a known answer, made by a rule and in need of no corpus.

An example is one document: a source (the context), then questions, each followed by its answer. The rules are in
`synthetic_tasks.py`. Loads neither torch nor numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

from pydantic import Field

from lit_llm.config.section import OneOf, Section
from lit_llm.data.synthetic_tasks import AnyTask, Recall

VERSION = 1
"""Version of the rules; raise it when a task gives other examples for the same settings."""
_PART = 25_000  # examples that one process makes


class Synthetic(Section):
    """Examples of a synthetic task, each one document. Needs `tokenizer: symbols` and `objective: answers`."""

    kind: Literal["synthetic"] = "synthetic"
    """A synthetic task."""
    task: Annotated[AnyTask, OneOf(default=Recall)] = Recall()
    """The task."""
    examples: int = Field(20_000, gt=0)
    """Examples, the held-out ones included. Equal examples are in one split."""
    seed: int = Field(0, ge=0)
    """Seed of the examples, the same for all runs."""


@dataclass(frozen=True)
class SyntheticPart:
    """Some examples of a task, as documents: numbers of symbols, with a space between."""

    corpus: Synthetic
    first: int
    count: int
    skipped: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def size(self) -> int:
        return self.count * self.corpus.task.length

    def __iter__(self) -> Iterator[str]:
        for number in range(self.first, self.first + self.count):
            source, target = self.corpus.task.example(Random(f"{self.corpus.seed}/{number}"), self.corpus.seed)
            yield " ".join(map(str, [*source, *target]))

    def file_of(self, number: int) -> Path:
        raise AssertionError("examples are short and in no file")


def parts_of(corpus: Synthetic) -> list[SyntheticPart]:
    """All examples, in order."""
    starts = range(0, corpus.examples, _PART)
    return [SyntheticPart(corpus, first, min(_PART, corpus.examples - first)) for first in starts]


def identity_of_examples(corpus: Synthetic) -> dict[str, Any]:
    """Plain data on which the examples depend."""
    return {"synthetic": VERSION, **corpus.model_dump(mode="json")}

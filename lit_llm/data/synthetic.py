"""Synthetic tasks: examples of symbols with a known answer, made by a rule and in need of no corpus.

An example is one document: a source (the context), then questions, each followed by its answer.

recall             source   k2 v7 · k1 v4 ·        target   k1 v4 k2 v7        (· noise; only the values count)
selective_copying  source   · a · · c b ·          target   a c b
memorisation       source   ·                      target   k1 v4 k2 v7        (the same values in all examples)
k_hop              source   b>c a>b c>a            target   a c b a            (k = 2: two steps from a lead to c)

All examples of a task have the same lengths, and their questions stand at the same places, so that every family is
asked the same at a fixed cost. Loads neither torch nor numpy.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lit_llm.config.section import OneOf, Section, config_error
from lit_llm.objectives.answers import Answers

VERSION = 1
"""Version of the rules; raise it when a task gives other examples for the same settings."""
_PART = 25_000  # examples that one process makes


class Task(Section):
    """A rule that makes examples. Symbols are numbered from 0."""

    @property
    @abstractmethod
    def symbols(self) -> int:
        """Number of symbols in use."""

    @property
    @abstractmethod
    def layout(self) -> tuple[int, int, int, int]:
        """Tokens of the source, of a question and of its answer, and number of questions."""

    @abstractmethod
    def example(self, random: Random, seed: int) -> tuple[list[int], list[int]]:
        """Symbols of (source, target). seed: that of all examples, for what they share."""

    @property
    def length(self) -> int:
        """Tokens of an example, its end of the document included."""
        source, question, answer, questions = self.layout
        return source + questions * (question + answer) + 1

    @property
    def objective(self) -> Answers:
        """The objective whose targets are this task's answers."""
        source, question, answer, _ = self.layout
        return Answers(split=source, question=question, answer=answer)


class Recall(Task):
    """Recall the value of a key from pairs in the source.

    After multi-query associative recall of Zoology (arXiv 2312.04927); after in-context recall of MAD (arXiv
    2403.17844) with `noise: 0`, where pairs are repeated, its noisy recall with `noise: 0.2`, and its fuzzy recall with
    keys and values of several symbols. `docs/synthetic-tasks.md` lists the differences.
    """

    kind: Literal["recall"] = "recall"
    """Associative recall."""
    pairs: int = Field(8, gt=0)
    """Different pairs in a source, each of which is there at least once. Keys and values are drawn anew for each
    example."""
    questions: int = Field(4, gt=0)
    """Keys that are asked for, each at most once. With as many as pairs, the last answer is left by elimination."""
    source_length: int = Field(32, gt=0)
    """Tokens of the source."""
    noise: Literal["rest"] | Annotated[float, Field(ge=0, lt=1)] = "rest"
    """Share of the source that is noise, between the pairs; the remaining room is for repeated pairs. rest: no pair is
    repeated, and all other tokens are noise."""
    keys: int = Field(16, gt=0)
    """Symbols of keys."""
    values: int = Field(16, gt=1)
    """Symbols of values."""
    noise_symbols: int = Field(1, gt=0)
    """Symbols of noise; one is a blank."""
    key_length: int = Field(1, gt=0)
    """Symbols of a key, all different. MAD's fuzzy recall has up to 3."""
    value_length: int = Field(1, gt=0)
    """Symbols of a value. MAD's fuzzy recall has up to 3."""

    @property
    def symbols(self) -> int:
        return self.noise_symbols + self.keys + self.values

    @property
    def layout(self) -> tuple[int, int, int, int]:
        return self.source_length, self.key_length, self.value_length, self.questions

    @model_validator(mode="after")
    def _has_room(self) -> Recall:
        findings = []
        size, keys = self.key_length + self.value_length, 1
        for used in range(self.key_length):
            keys *= max(0, self.keys - used)
        if self.pairs > keys:
            findings.append(("pairs", f"{self.pairs} pairs need as many keys, and {self.keys} symbols make {keys}"))
        if self.questions > self.pairs:
            findings.append(("questions", f"{self.questions} are more than the {self.pairs} pairs; ask for each once"))
        if self._copies < self.pairs:
            message = f"{self.pairs} pairs of {size} tokens need {self.pairs * size}, and there is room for "
            message += f"{self._copies * size} in a source of {self.source_length}"
            findings.append(("source_length", message + ("" if self.noise == "rest" else f" with noise {self.noise}")))
        if findings:
            raise config_error(*findings)
        return self

    @property
    def _copies(self) -> int:
        """Pairs in a source, repeated ones included."""
        noise = 0 if self.noise == "rest" else round(self.noise * self.source_length)
        room = (self.source_length - noise) // (self.key_length + self.value_length)
        return min(room, self.pairs) if self.noise == "rest" else room

    def example(self, random: Random, seed: int) -> tuple[list[int], list[int]]:
        first_key, first_value = self.noise_symbols, self.noise_symbols + self.keys
        values: dict[tuple[int, ...], list[int]] = {}
        while len(values) < self.pairs:
            key = tuple(first_key + n for n in random.sample(range(self.keys), self.key_length))
            values[key] = [first_value + random.randrange(self.values) for _ in range(self.value_length)]
        drawn = list(values)
        blocks = [[*key, *values[key]] for key in [*drawn, *random.choices(drawn, k=self._copies - self.pairs)]]
        free = self.source_length - sum(map(len, blocks))
        blocks += [[random.randrange(self.noise_symbols)] for _ in range(free)]
        random.shuffle(blocks)
        target = [symbol for key in random.sample(drawn, self.questions) for symbol in [*key, *values[key]]]
        return list(itertools.chain.from_iterable(blocks)), target


class SelectiveCopying(Task):
    """Copy the symbols of the source in their order, without the noise between them (MAD, arXiv 2403.17844)."""

    kind: Literal["selective_copying"] = "selective_copying"
    """Selective copying."""
    tokens: int = Field(8, gt=0)
    """Tokens to copy."""
    source_length: int = Field(32, gt=0)
    """Tokens of the source; those that are not copied are noise. With `tokens` of them the task is copying."""
    copied_symbols: int = Field(16, gt=1)
    """Symbols of what is copied."""
    noise_symbols: int = Field(1, gt=0)
    """Symbols of noise; one is a blank."""

    @property
    def symbols(self) -> int:
        return self.noise_symbols + self.copied_symbols

    @property
    def layout(self) -> tuple[int, int, int, int]:
        return self.source_length, 0, self.tokens, 1

    @model_validator(mode="after")
    def _has_room(self) -> SelectiveCopying:
        if self.tokens > self.source_length:
            raise config_error(("tokens", f"{self.tokens} do not fit into a source of {self.source_length}"))
        return self

    def example(self, random: Random, seed: int) -> tuple[list[int], list[int]]:
        copied = [self.noise_symbols + random.randrange(self.copied_symbols) for _ in range(self.tokens)]
        source = [random.randrange(self.noise_symbols) for _ in range(self.source_length)]
        for place, symbol in zip(sorted(random.sample(range(self.source_length), self.tokens)), copied, strict=True):
            source[place] = symbol
        return source, copied


class Memorisation(Task):
    """Name the value of a key, which is the same in all examples and stands in no source (MAD, arXiv 2403.17844)."""

    kind: Literal["memorisation"] = "memorisation"
    """Memorisation of facts."""
    facts: int = Field(64, gt=1)
    """Keys with a value. Their values are drawn by the corpus's `seed`, from as many symbols as there are facts."""
    questions: int = Field(16, gt=0)
    """Keys that an example asks for, each at most once."""

    @property
    def symbols(self) -> int:
        return 1 + 2 * self.facts

    @property
    def layout(self) -> tuple[int, int, int, int]:
        return 1, 1, 1, self.questions

    @model_validator(mode="after")
    def _has_facts(self) -> Memorisation:
        if self.questions > self.facts:
            raise config_error(
                ("questions", f"{self.questions} are more than the {self.facts} facts; ask for each once")
            )
        return self

    def example(self, random: Random, seed: int) -> tuple[list[int], list[int]]:
        values = Random(f"facts/{seed}").sample(range(self.facts), self.facts)  # as in MAD, no value twice
        asked = random.sample(range(self.facts), self.questions)
        return [0], [symbol for key in asked for symbol in (1 + key, 1 + self.facts + values[key])]


class KHop(Task):
    """Follow edges of a cycle: name the node that `hops` steps lead to.

    The source holds each edge once, as its two nodes, in random order.
    """

    kind: Literal["k_hop"] = "k_hop"
    """k-hop lookup."""
    hops: int = Field(2, gt=0)
    """Edges between a question and its answer."""
    nodes: int = Field(16, gt=1)
    """Nodes of the cycle, which is drawn anew for each example."""
    questions: int = Field(8, gt=0)
    """Nodes that are asked for, each at most once."""

    @property
    def symbols(self) -> int:
        return self.nodes

    @property
    def layout(self) -> tuple[int, int, int, int]:
        return 2 * self.nodes, 1, 1, self.questions

    @model_validator(mode="after")
    def _fits(self) -> KHop:
        findings = []
        if self.hops >= self.nodes:
            findings.append(("hops", f"{self.hops} lead around a cycle of {self.nodes} nodes; use fewer"))
        if self.questions > self.nodes:
            findings.append(("questions", f"{self.questions} are more than the {self.nodes} nodes; ask for each once"))
        if findings:
            raise config_error(*findings)
        return self

    def example(self, random: Random, seed: int) -> tuple[list[int], list[int]]:
        cycle = random.sample(range(self.nodes), self.nodes)
        edges = [[node, cycle[(place + 1) % self.nodes]] for place, node in enumerate(cycle)]
        random.shuffle(edges)
        asked = random.sample(range(self.nodes), self.questions)
        target = [node for place in asked for node in (cycle[place], cycle[(place + self.hops) % self.nodes])]
        return list(itertools.chain.from_iterable(edges)), target


class Synthetic(Section):
    """Examples of a synthetic task, each one document. Needs `tokenizer: symbols` and `objective: answers`."""

    kind: Literal["synthetic"] = "synthetic"
    """A synthetic task."""
    task: Annotated[Recall | SelectiveCopying | Memorisation | KHop, OneOf(default=Recall)] = Recall()
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

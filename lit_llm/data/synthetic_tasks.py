"""Rules of synthetic tasks: each makes examples of symbols whose answers are known.

recall             source   k2 v7 · k1 v4 ·        target   k1 v4 k2 v7        (· noise; only the values count)
selective_copying  source   · a · · c b ·          target   a c b
memorisation       source   ·                      target   k1 v4 k2 v7        (the same values in all examples)
compression        source   a c a ▪                target   p2 c p1 a p3 a     (p2: the second position)
k_hop              source   b>c a>b c>a            target   a c b a            (k = 2: two steps from a lead to c)
arithmetic         source   × + 2 4 3              target   4                  ((2 + 4) × 3 modulo 7)
brackets           source   ( [ ] [ (              target   ) ] )

All examples of a task have the same lengths, and their questions stand at the same places, so that every family is
asked the same at a fixed cost. Loads neither torch nor numpy.
"""

from __future__ import annotations

import itertools
import operator
from abc import abstractmethod
from random import Random
from typing import Annotated, Literal

from pydantic import Field, model_validator

from lit_llm.config.section import Section, config_error
from lit_llm.objectives.answers import Answers


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


class Compression(Task):
    """Task to name the symbol at each position of the source, after its last token, the same in all examples.

    After compression of MAD (arXiv 2403.17844), where a decoder reads the model's state at that token alone. Here
    answers are read from all that a model keeps of the source: `docs/synthetic-tasks.md` says of whom that asks what.
    """

    kind: Literal["compression"] = "compression"
    """Compression."""
    source_length: int = Field(32, gt=1)
    """Tokens of the source. All but the last are drawn independently, and asked for by their positions, in random
    order."""
    compressed_symbols: int = Field(15, gt=1)
    """Symbols of these tokens."""

    @property
    def symbols(self) -> int:
        return 1 + self.compressed_symbols + self.source_length - 1

    @property
    def layout(self) -> tuple[int, int, int, int]:
        return self.source_length, 1, 1, self.source_length - 1

    def example(self, random: Random, seed: int) -> tuple[list[int], list[int]]:
        drawn = [1 + random.randrange(self.compressed_symbols) for _ in range(self.source_length - 1)]
        asked = random.sample(range(len(drawn)), len(drawn))
        first_position = 1 + self.compressed_symbols
        return [*drawn, 0], [symbol for place in asked for symbol in (first_position + place, drawn[place])]


class KHop(Task):
    """Task to follow edges of a cycle: name the node that `hops` steps lead to.

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


class Arithmetic(Task):
    """Compute an expression of numbers modulo a number: a tree of random shape, each operator before its operands."""

    kind: Literal["arithmetic"] = "arithmetic"
    """Modular arithmetic over a tree."""
    numbers: int = Field(4, gt=1)
    """Numbers in an expression, the leaves of its tree. Its operators are +, - and ×."""
    modulus: int = Field(7, gt=1)
    """Numbers and results are below it."""

    @property
    def symbols(self) -> int:
        return self.modulus + len(_OPERATORS)

    @property
    def layout(self) -> tuple[int, int, int, int]:
        return 2 * self.numbers - 1, 0, 1, 1

    def example(self, random: Random, seed: int) -> tuple[list[int], list[int]]:
        source: list[int] = []

        def value(numbers: int) -> int:
            """Append a tree with so many numbers to the source; returns its value."""
            if numbers == 1:
                source.append(random.randrange(self.modulus))
                return source[-1]
            left, operator = random.randrange(1, numbers), random.randrange(len(_OPERATORS))
            source.append(self.modulus + operator)
            return int(_OPERATORS[operator](value(left), value(numbers - left))) % self.modulus

        result = value(self.numbers)
        return source, [result]


_OPERATORS = (operator.add, operator.sub, operator.mul)


class Brackets(Task):
    """Close the brackets that the source leaves open, the last one first (Dyck words)."""

    kind: Literal["brackets"] = "brackets"
    """Closing of nested brackets."""
    open: int = Field(6, gt=0)
    """Brackets that are open at the end of the source, and closed by the answer."""
    source_length: int = Field(30, gt=0)
    """Tokens of the source."""
    types: int = Field(4, gt=0)
    """Types of brackets, each with a symbol that opens and one that closes."""

    @property
    def symbols(self) -> int:
        return 2 * self.types

    @property
    def layout(self) -> tuple[int, int, int, int]:
        return self.source_length, 0, self.open, 1

    @model_validator(mode="after")
    def _fits(self) -> Brackets:
        closed = self.source_length - self.open
        if closed < 0 or closed % 2:
            message = f"{self.open} open brackets and pairs of closed ones do not fill a source of {self.source_length}"
            raise config_error(("open", f"{message}; their difference has to be even and not negative"))
        return self

    def example(self, random: Random, seed: int) -> tuple[list[int], list[int]]:
        source, open = list[int](), list[int]()
        for opens in self._random_walk(random):
            if opens:
                open.append(random.randrange(self.types))
                source.append(open[-1])
            else:
                source.append(self.types + open.pop())
        return source, [self.types + each for each in reversed(open)]

    def _random_walk(self, random: Random) -> list[bool]:
        """True where the source opens a bracket; each way that never closes more than are open is as likely.

        By the cycle lemma: of the rotations of any order of n + 1 steps up and m down, n + 1 - m stay above zero after
        their first step, which is left out.
        """
        closed = (self.source_length - self.open) // 2
        steps = [True] * (self.open + closed + 1) + [False] * closed
        random.shuffle(steps)
        heights = list(itertools.accumulate(1 if up else -1 for up in steps))
        # A rotation that begins after a step stays above that step's height: the last one at each of the lowest.
        lowest = min(0, *heights)
        last = {height: place for place, height in enumerate([0, *heights[:-1]])}
        begin = last[random.randrange(lowest, lowest + self.open + 1)]
        return [*steps[begin:], *steps[:begin]][1:]


AnyTask = Recall | SelectiveCopying | Memorisation | Compression | KHop | Arithmetic | Brackets

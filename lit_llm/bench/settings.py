"""Settings of a benchmark: shapes by name, precision, turns. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from lit_llm.config.problems import InputError, Problem, did_you_mean

Precision = Literal["fp32", "bf16"]
What = Literal["training", "decode", "memory", "families"]
WHAT: tuple[What, ...] = ("training", "decode", "memory", "families")
"""What can be measured."""


class Size(NamedTuple):
    """Shape of a model and of its training batch. An encoder-decoder has half of the layers on each side."""

    d_model: int
    layers: int
    heads: int
    d_ff: int
    vocabulary: int
    batch: int
    length: int
    """Tokens of a sequence; an encoder-decoder reads half of them and predicts the other half."""


SIZES = {
    "tiny": Size(64, 2, 4, 176, 1024, 16, 128),
    "small": Size(256, 8, 4, 704, 8192, 4, 512),
    "base": Size(768, 12, 12, 2048, 8192, 4, 512),
    "150m": Size(1024, 8, 8, 4096, 32768, 8, 2048),
    "1b": Size(2048, 16, 16, 8192, 32768, 2, 2048),
}
"""{name: size}. 150m and 1b are those of the presets decllm-150m and decllm-1b, for a GPU."""


class Lengths(NamedTuple):
    """Tokens of a prompt, and of the answer to it."""

    prompt: int
    answer: int

    def __str__(self) -> str:
        return f"{self.prompt} + {self.answer}"


LENGTHS: dict[What, tuple[Lengths, ...]] = {
    "decode": (Lengths(128, 64),),
    "families": (Lengths(128, 128), Lengths(1000, 1000)),
}
"""Default lengths of the measurements that generate."""


@dataclass(frozen=True)
class BenchSettings:
    """Settings of all measurements of one benchmark."""

    size: str = "small"
    """Name of a size in `SIZES`."""
    precision: Precision = "fp32"
    """bf16: autocast in training, weights in bfloat16 in generation."""
    threads: int = 1
    turns: int = 15
    """Timed turns; each turn times every contestant once."""
    lengths: tuple[Lengths, ...] = ()
    """Lengths of prompts and answers; `LENGTHS` where empty."""
    prompts: int = 1
    """Prompts that are answered at once."""
    compiled: bool = False
    """Whether every contestant of the training also runs under torch.compile."""
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def shape(self) -> Size:
        return SIZES[self.size]

    def lengths_of(self, what: What) -> tuple[Lengths, ...]:
        return self.lengths or LENGTHS[what]


def what_of(names: list[str]) -> tuple[What, ...]:
    """The measurements of these names; all without any. Raises InputError."""
    for name in names:
        if name not in WHAT:
            message = f"{name!r} cannot be measured{did_you_mean(name, WHAT)}"
            raise InputError(Problem(message, "WHAT"))
    return tuple(what for what in WHAT if what in names or not names)


def lengths_from(text: str) -> Lengths:
    """Lengths of `PROMPT+ANSWER`, such as 1000+64. Raises InputError."""
    prompt, _, answer = text.partition("+")
    if not (prompt.isdecimal() and answer.isdecimal() and int(prompt) >= 1 and int(answer) >= 2):
        message = f"{text!r} is no pair of lengths; write PROMPT+ANSWER with an answer of at least 2, e.g. 128+64"
        raise InputError(Problem(message, "--lengths"))
    return Lengths(int(prompt), int(answer))

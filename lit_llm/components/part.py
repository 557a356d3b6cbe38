"""What is known of one part of a layer before it is built: parameters, FLOPs, cache, memory, and where its module is.

A layer is a row of parts (self-attention or another sequence mixer, cross-attention, a feed-forward network, ...), each
added to the residual stream. The stack, cost, memory and audit ask every part the same questions and name none.
Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from lit_llm.config.section import Section

FLOAT32, BFLOAT16 = 4, 2
"""Bytes of a number."""

TensorShape = tuple[int, ...]


class Widths(NamedTuple):
    """Widths of what a layer reads."""

    row: int
    """Of the residual stream, which the layer also writes."""
    source: int
    """Of the encoder's output."""


@dataclass(frozen=True)
class Example:
    """What one example puts through one layer, in tokens; fractions are means over an objective's cuts."""

    row: float
    """Tokens of the layer's own row, each a query."""
    source: float = 0
    """Tokens of the encoder's output; 0 without an encoder."""
    before: float = 0
    """Tokens of the same row that were read in earlier passes."""
    prefix: float = 0
    """Tokens at the row's start that see each other."""
    marked: float = 0
    """Tokens at the row's start that a part may read as the source."""
    causal: bool = True
    masked: bool = True
    """Whether only visible pairs count; otherwise every query counts with every key."""
    decoding: bool = False
    """Whether the row's tokens come one at a time, after a prefill that has read the source."""
    keep_state: bool = False
    """Whether tokens follow in later passes, for which a state is kept."""

    def own_pairs(self, window: tuple[int, int] | None = None) -> float:
        """Visible (query, key) pairs among the tokens of the row.

        Args:
            window: Keys that are seen are fewer than so many tokens (before, after) the query; None: all.
        """
        if not self.masked:
            return self.row * (self.row + self.before)
        if not self.causal:
            return full_pairs(self.row, window)
        pairs = causal_pairs(self.before + self.row, self.prefix, window)
        return pairs - causal_pairs(self.before, 0, window) if self.before else pairs


def causal_pairs(tokens: float, prefix: float = 0, window: tuple[int, int] | None = None) -> float:
    """Visible (query, key) pairs among `tokens`, of which the first `prefix` also see each other, within a window.

    Without one a polynomial in both, so that it can be averaged over cuts; hence no integer division.
    """
    behind, ahead = window or (math.inf, math.inf)
    return _sum_up_to(tokens, behind) + _sum_up_to(prefix - 1, ahead - 1)


def full_pairs(tokens: float, window: tuple[int, int] | None = None) -> float:
    """Visible (query, key) pairs among `tokens` that all see each other, within a window."""
    behind, ahead = window or (math.inf, math.inf)
    return tokens + _sum_up_to(tokens - 1, behind - 1) + _sum_up_to(tokens - 1, ahead - 1)


def _sum_up_to(last: float, most: float) -> float:
    """min(1, most) + min(2, most) + ... + min(last, most)."""
    return last * (last + 1) / 2 if last <= most else most * (most + 1) / 2 + (last - most) * most


@dataclass(frozen=True)
class CacheBytes:
    """Bytes that are kept between passes for one sequence."""

    per_source_token: int = 0
    """For each token of the prompt; in layers with a window, which keep no more than that, it is in `windows`."""
    per_generated_token: int = 0
    start: int = 0
    """For <s>, where it is kept as part of the source."""
    windows: tuple[tuple[int, int], ...] = ()
    """(tokens that are kept at most, bytes of each) of every layer with a window."""
    prompt_in_windows: bool = True
    """Whether the prompt's tokens are among theirs: not in an encoder-decoder's decoder."""
    states: int = 0
    """Of states whose size depends on no number of tokens."""

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(
            self.per_source_token + other.per_source_token,
            self.per_generated_token + other.per_generated_token,
            self.start + other.start,
            self.windows + other.windows,
            self.prompt_in_windows and other.prompt_in_windows,
            self.states + other.states,
        )

    def total(self, prompt: int, generate: int) -> int:
        """Bytes after a prompt and an answer of so many tokens."""
        kept = generate + (prompt if self.prompt_in_windows else 0)
        windows = sum(each * min(kept, most) for most, each in self.windows)
        return self.start + self.states + prompt * self.per_source_token + generate * self.per_generated_token + windows


@dataclass(frozen=True)
class Precision:
    """How many bytes the numbers take that autograd keeps for the backward pass, in one precision."""

    compute: int
    """Of an entry that the kernels read."""
    residual: int
    """Of an entry of the residual stream."""
    dropout_mask: int
    """Of an entry that dropout decides about: CUDA's kernel keeps one byte (on a CPU it is a number); 0 without."""

    @property
    def autocast(self) -> bool:
        """Whether every matrix that reads the residual stream makes a copy of it in the kernels' precision."""
        return self.compute != self.residual


class Part(Section):
    """One part of a layer with nothing left open, in canonical form: two that are the same function are equal."""

    module: ClassVar[str]
    """Where its module is: `package.module:Class`, a `lit_llm.components.layer_part.LayerPart`."""
    causal_only: ClassVar[str] = ""
    """Why it cannot see later tokens, so that no prefix can be opened to it; '' where it can."""
    reads_marked: ClassVar[str] = ""
    """Name of the part for messages, where it reads the row's first tokens as a source; '' otherwise. The objective has
    to mark them."""

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        """{name in its module: shape} of every parameter; those of matrices are (rows, columns)."""
        raise NotImplementedError

    def stack_shapes(self, widths: Widths) -> dict[str, TensorShape]:
        """The same of parameters that the stack has once for all its layers."""
        return {}

    def settings(self) -> dict[str, Any]:
        """{key: value} of what a study can set, those too that a dump leaves out where they have no effect."""
        return {key: getattr(self, key) for key in type(self).model_fields}

    # --- FLOPs ---

    @property
    def for_last_token(self) -> bool:
        """Whether only the last token of a prompt has to go through the layer."""
        return False

    def products(self, widths: Widths) -> int:
        """Multiply-adds with matrices for each token of the row."""
        return sum(math.prod(shape) for shape in self.shapes(widths).values() if len(shape) > 1)

    def pairs(self, example: Example) -> list[tuple[float, float]]:
        """(keys, visible (query, key) pairs) of each attention inside; none where there is no attention."""
        return []

    def flops(self, example: Example, widths: Widths) -> float:
        """FLOPs of a forward pass over one example, a multiply-add as 2."""
        return 2.0 * example.row * self.products(widths)

    # --- memory ---

    def cache_bytes(self, entry: int, encoder: bool) -> CacheBytes:
        """What is kept between passes. entry: bytes of one; encoder: whether the prompt is an encoder's."""
        return CacheBytes()

    @property
    def readers(self) -> int:
        """Matrices that read the normalised residual stream."""
        return 1

    @property
    def reads_encoder(self) -> bool:
        """Whether the encoder's output is kept for it."""
        return False

    def activation_bytes(self, example: Example, widths: Widths, precision: Precision) -> float:
        """What autograd keeps inside of the part, beside what the matrices read of the residual stream.

        Unless a part knows better: what each of its matrices makes.
        """
        made = sum(shape[0] for shape in self.shapes(widths).values() if len(shape) > 1)
        return example.row * made * precision.compute

    def mask_bytes(self, example: Example, precision: Precision) -> float:
        """Masks that a kernel keeps as numbers, once for all sequences."""
        return 0.0

    def logit_bytes(self, example: Example, widths: Widths, rows: int) -> float:
        """What a look at the largest attention logit of so many sequences takes; 0 without attention."""
        return 0.0


STACKS = ("encoder", "decoder", "target_decoder", "self_decoder")
"""Stacks that may have a component: any encoder, the decoder of a decoder-only model, that of an encoder-decoder, and
the first stack of a decoder-decoder."""
ROLES = ("mixer", "added", "feed_forward")


class Defaults(NamedTuple):
    """What a component may take from its model where a study leaves it open."""

    attention: dict[str, Any]
    """The keys of `model.attention`."""
    feed_forward: dict[str, Any]
    """The keys of `model.feed_forward`."""
    width: int
    """Of the residual stream."""


@dataclass(frozen=True)
class LayerComponent:
    """A component that a study can write into the layers of a stack: `model.decoder.<key>`."""

    key: str
    """Its key in a stack and in a range of layers, and the name of its module in the layer."""
    override: type[Section]
    """What is written there. It has a `kind` with a default, which is also its short form."""
    resolve: Callable[[dict[str, Any], Defaults], Part]
    """From the keys that are set, `kind` among them, and the model's defaults to the part. Raises ValueError with a
    reason."""
    stacks: tuple[str, ...]
    """Stacks that may have it, of `STACKS`."""
    role: Literal["mixer", "added", "feed_forward"]
    """mixer: it stands in place of self-attention; feed_forward: of the feed-forward network; added: it is one more
    part between the two."""
    help: str
    """What a reader of the schema is told."""
    elsewhere: str = ""
    """Why another stack has no such key, where there is more to say than that."""

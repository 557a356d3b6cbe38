"""Parameters, FLOPs, state and memory that recurrent mixers share. Loads no torch."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, TypeVar

from lit_llm.components.convolution.resolved import Form, convolution_state
from lit_llm.components.part import (
    FLOAT32,
    CacheBytes,
    Defaults,
    Example,
    MatrixKind,
    Part,
    Precision,
    TensorShape,
    Widths,
)
from lit_llm.components.recurrence.config import RecurrentConfig
from lit_llm.config.tree import KIND

S = TypeVar("S", bound=RecurrentConfig)
P = TypeVar("P", bound="ResolvedRecurrence")

NARROWEST, WIDEST_OF_DELTA_RULE = 16, 256
"""Entries of a head's queries, keys and values that the kernels of flash-linear-attention compute: at least, and of
queries and keys with the delta rule at most."""


class ResolvedRecurrence(Part):
    """A mixer with a state of K x V for each head, with all settings resolved."""

    delta_rule: ClassVar[bool] = False
    """Whether a token's value is first compared with what the state holds for its key."""

    heads: int
    head_dim: int
    value_dim: int
    norm_eps: float
    chunk: int

    @property
    def key_heads(self) -> int:
        """Number of different queries and keys of a token."""
        return self.heads

    @property
    def key_width(self) -> int:
        """Entries of the queries (or keys) of all heads together."""
        return self.key_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Entries of the values of all heads together."""
        return self.heads * self.value_dim

    @property
    def state_entries(self) -> int:
        """Entries of one sequence's state: K x V for each head, for any length."""
        return self.heads * self.head_dim * self.value_dim

    @property
    def directions(self) -> int:
        """Number of passes over a row."""
        return 1

    @property
    def without_fla(self) -> str:
        sizes = self.head_dim, self.value_dim
        # The kernels refuse odd sizes in bfloat16, and Triton multiplies blocks of 16 entries or more.
        if min(sizes) < NARROWEST or any(size % 2 for size in sizes):
            return f"head_dim {sizes[0]} and value_dim {sizes[1]} must be even and at least {NARROWEST}"
        if self.delta_rule and self.head_dim > WIDEST_OF_DELTA_RULE:
            return f"head_dim {self.head_dim} of the delta rule exceeds {WIDEST_OF_DELTA_RULE}"
        return ""

    def matrix_kind(self, name: str) -> MatrixKind:
        kinds: dict[str, MatrixKind] = {"q": "query", "k": "key", "v": "value", "out": "out"}
        return kinds.get(name.removesuffix(".weight"), "hidden")

    def flops(self, example: Example, widths: Widths) -> float:
        """FLOPs of the projections, and of mixing tokens chunk by chunk, or in decoding one at a time."""
        # Chunks are counted in whole tokens; a mean over cuts may be off by rounding.
        tokens, products = round(example.row, 6), self.products(widths)
        if example.decoding:
            return 2.0 * tokens * (products + (3 if self.delta_rule else 2) * self.state_entries)
        return 2.0 * (tokens * products + self.directions * self._mixing(tokens, example.keep_state))

    def _mixing(self, tokens: float, keep_state: bool) -> float:
        """Multiply-adds of one pass over a row.

        Visible pairs inside a chunk count. Every chunk but the first also reads the state, and every chunk but the last
        adds to it; with `keep_state` the last one does too. The delta rule also compares the keys of each pair, solves
        a triangular system for the values, and reads the state by the keys.
        """
        chunks, rest = divmod(tokens, self.chunk)
        pairs = (chunks * self.chunk * (self.chunk + 1) + rest * (rest + 1)) / 2
        read = max(tokens - self.chunk, 0)
        added = tokens if keep_state else tokens - (rest or min(self.chunk, tokens))
        widths = self.key_width + self.value_width
        mixing = pairs * widths + (read + added) * self.state_entries
        return mixing + ((pairs - tokens) * widths + read * self.state_entries if self.delta_rule else 0)

    def cache_bytes(self, entry: int, encoder: bool, widths: Widths) -> CacheBytes:
        """Bytes of the state, in float32 in any precision: it is a sum over thousands of tokens."""
        return CacheBytes(states=FLOAT32 * self.state_entries)

    # --- what training keeps ---

    def _pairs_kept(self, tokens: float) -> float:
        """Pairs of tokens inside of chunks, in all heads, those behind the mask included."""
        whole, rest = divmod(tokens, self.chunk)
        return (whole * self.chunk**2 + rest**2) * self.heads

    def _states_kept(self, tokens: float, compute: int) -> float:
        """Bytes of the states between chunks, in the precision in which they are read; they decay in float32."""
        whole, rest = divmod(tokens, self.chunk)
        states = max(whole + (rest > 0) - 1, 0)
        decayed = FLOAT32 * max(states - 1, 0) if compute != FLOAT32 else 0
        return (states * compute + decayed) * self.state_entries


class ResolvedTwoWay(ResolvedRecurrence):
    """A recurrent mixer that reads a row forwards, and in an encoder backwards too."""

    bidirectional: bool

    @property
    def differs_by_stack(self) -> str:
        return "it reads both ways in an encoder and one way in a decoder"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @abstractmethod
    def direction_shapes(self, widths: Widths) -> dict[str, TensorShape]:
        """{name: shape} of the parameters that each direction has for itself."""

    @abstractmethod
    def shared_rows(self) -> dict[str, int]:
        """{name: outputs} of the matrices that read the residual stream beside queries, keys, values and gate."""

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        own = self.direction_shapes(widths)
        each = {f"directions.{n}.{name}": shape for n in range(self.directions) for name, shape in own.items()}
        rows = {"q": self.key_width, "k": self.key_width, "v": self.value_width, "output_gate": self.value_width}
        inputs = {f"{name}.weight": (outputs, widths.row) for name, outputs in (rows | self.shared_rows()).items()}
        return {**each, **inputs, "out.weight": (widths.row, self.value_width), "head_scale": (self.scale_entries,)}

    @property
    def scale_entries(self) -> int:
        """Entries of the scale of the norm over the heads' outputs."""
        return self.value_dim

    def activation_bytes(self, example: Example, widths: Widths, precision: Precision) -> float:
        # What the output matrix reads is kept once more where it is the sum of two directions.
        joined = example.row * self.value_width * precision.compute
        return joined + self.directions * self._kept_one_way(example.row, precision)

    @abstractmethod
    def _kept_one_way(self, tokens: float, precision: Precision) -> float:
        """Bytes that one direction keeps for the backward pass, without the input of the output matrix."""


class ResolvedConvolved(ResolvedTwoWay):
    """A mixer whose queries, keys and values go through a short causal convolution with swish."""

    convolution_bias: ClassVar[bool] = False

    conv: int

    @property
    def form(self) -> Form:
        """Form of the convolution."""
        return Form(self.conv, residual=False, bias=self.convolution_bias, swish=True)

    @property
    def channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_width + self.value_width

    def matrix_kind(self, name: str) -> MatrixKind:
        return "table" if name.endswith("convolution.weight") else super().matrix_kind(name)

    def direction_shapes(self, widths: Widths) -> dict[str, TensorShape]:
        bias: dict[str, TensorShape] = {"convolution.bias": (self.channels,)} if self.convolution_bias else {}
        return {"convolution.weight": (self.channels, self.conv), **bias}

    def cache_bytes(self, entry: int, encoder: bool, widths: Widths) -> CacheBytes:
        """Bytes of the state in float32, and of the convolution's last inputs."""
        inputs = entry * convolution_state({"qkv": self.channels}, self.conv)
        return super().cache_bytes(entry, encoder, widths) + CacheBytes(states=inputs)


TWO_WAY: dict[str, Any] = {
    "stacks": ("encoder", "decoder", "target_decoder", "self_decoder"),
    "elsewhere": "a cross-decoder's layers read the keys and values that they share; write it into the self-decoder",
}
"""Where a component may be written that reads both ways in an encoder."""


TWO_WAY_HELP = (
    "in place of self-attention, in the layers for which this is written; with as many heads as `model.attention` "
    "unless it says so. In a decoder it is causal: no prefix can be opened to it. An encoder reads both ways."
)


def settings_of(section: type[S], values: dict[str, Any], defaults: Defaults) -> S:
    """The written settings and their defaults; `heads` defaults to the attention's."""
    settings = {key: value for key, value in values.items() if key != KIND}
    return section.model_validate({"heads": defaults.attention["heads"], **settings})


def with_sizes(part: type[P], config: RecurrentConfig, head_dim: int, value_dim: int, **more: bool) -> P:
    """The part with all settings of its section, with these sizes of a head and with `more` of its own fields."""
    return part(**{**dict(config), "head_dim": head_dim, "value_dim": value_dim, **more})


def divided(width: int, heads: int, name: str, key: str) -> int:
    """Entries of each head. Raises ValueError where the heads do not divide the width.

    name: what the width is; key: setting that can be written instead.
    """
    if width % heads:
        raise ValueError(f"{heads} heads do not divide {name} {width}; choose a divisor or set {key}")
    return width // heads

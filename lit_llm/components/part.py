"""Protocol of a layer's part before it is built: parameters, FLOPs, cache, memory, and the path of its module.

A layer is a sequence of parts (self-attention or another sequence mixer, cross-attention, a feed-forward network, ...),
each added to the residual stream. The stack, cost, memory and audit call this protocol. They name a part in two cases:
keys and values that several layers share, and the audit's notes on attention. Loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

from lit_llm.config.section import Section

FLOAT32, BFLOAT16 = 4, 2
"""Bytes per number."""

TRAINED_BUFFERS = ("bias_steps",)
"""Names of buffers that training changes without a gradient. They are no parameters, and are saved with them."""

TensorShape = tuple[int, ...]

MatrixKind = Literal["query", "key", "value", "up", "out", "hidden", "readout", "input", "table"]
"""Role of a part's parameter of two dimensions, for initial values and learning rates. query, key, value: they make an
attention's heads; up: it reads the stream for a feed-forward network; out: its output is added to the residual stream;
readout: it makes a number of entries that does not grow with the width, as a router's; input: it reads such a number;
table: rows by index or by channel, no product; hidden: any other matrix."""


class Widths(NamedTuple):
    """Widths of a layer's inputs."""

    row: int
    """Width of the residual stream, which the layer reads and writes."""
    source: int
    """Width of the encoder's output."""


@dataclass(frozen=True)
class Example:
    """Numbers of tokens that one layer processes for one example; fractions are means over an objective's cuts."""

    row: float
    """Tokens of the layer's input, each a query."""
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
    block: int = 0
    """Tokens of a block, which see their own block in the row and the source of all earlier ones; 0 without blocks."""

    def row_pairs(self, window: tuple[int, int] | None = None) -> float:
        """Visible (query, key) pairs among the tokens of the row.

        Args:
            window: Visible keys are fewer than (n, m) tokens (before, after) the query; None: all.
        """
        if not self.masked:
            return self.row * (self.row + self.before)
        if self.block:
            return _block_pairs(self.before + self.row, self.block)[0] - _block_pairs(self.before, self.block)[0]
        if not self.causal:
            return full_pairs(self.row, window)
        pairs = causal_pairs(self.before + self.row, self.prefix, window)
        return pairs - causal_pairs(self.before, 0, window) if self.before else pairs

    def source_pairs(self) -> float:
        """Visible pairs of a query of the row and a key of the source."""
        if self.block and self.masked:
            return _block_pairs(self.before + self.row, self.block)[1] - _block_pairs(self.before, self.block)[1]
        return self.row * self.source


def causal_pairs(tokens: float, prefix: float = 0, window: tuple[int, int] | None = None) -> float:
    """Visible (query, key) pairs among `tokens`, of which the first `prefix` also see each other, within a window.

    Without a window it is a polynomial in both, whose mean over cuts is exact; hence no integer division.
    """
    behind, ahead = window or (math.inf, math.inf)
    return _sum_up_to(tokens, behind) + _sum_up_to(prefix - 1, ahead - 1)


def _block_pairs(tokens: float, block: int) -> tuple[float, float]:
    """(pairs within causal blocks, pairs of a query and a token of an earlier block) among `tokens`."""
    whole, rest = divmod(tokens, block)
    within = whole * causal_pairs(block) + causal_pairs(rest)
    return within, block * (block * causal_pairs(whole - 1) + rest * whole)


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
    """Bytes per token of the prompt; those of layers with a window are in `windows`."""
    per_generated_token: int = 0
    start: int = 0
    """Bytes for <s>, where it is cached as part of the source."""
    windows: tuple[tuple[int, int], ...] = ()
    """(most tokens that are kept, bytes per token) of every layer with a window."""
    prompt_in_windows: bool = True
    """Whether windows hold tokens of the prompt: not in an encoder-decoder's decoder."""
    open_blocks: tuple[tuple[int, int], ...] = ()
    """(tokens of a block, bytes by which a token of the last, open block differs from others) of a double decoder."""
    states: int = 0
    """Bytes of recurrent states, whose size does not depend on the number of tokens."""

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(
            self.per_source_token + other.per_source_token,
            self.per_generated_token + other.per_generated_token,
            self.start + other.start,
            self.windows + other.windows,
            self.prompt_in_windows and other.prompt_in_windows,
            self.open_blocks + other.open_blocks,
            self.states + other.states,
        )

    def total(self, prompt: int, generate: int) -> int:
        """Bytes after a prompt of `prompt` and an answer of `generate` tokens."""
        kept = generate + (prompt if self.prompt_in_windows else 0)
        windows = sum(each * min(kept, most) for most, each in self.windows)
        length = prompt + generate
        opened = sum(each * min(length, (length - 1) % block + 1) for block, each in self.open_blocks)
        tokens = prompt * self.per_source_token + generate * self.per_generated_token
        return self.start + self.states + tokens + windows + opened


@dataclass(frozen=True)
class Precision:
    """Memory of the backward pass in one precision: bytes per entry of tensors, and the kernels."""

    compute: int
    """Bytes of an entry that the kernels read."""
    residual: int
    """Bytes of an entry of the residual stream."""
    dropout_mask: int
    """Bytes of dropout's mask per entry: CUDA's kernel keeps one (a CPU's a number); 0 without dropout."""
    feed_forward_mask: int = 0
    """Bytes of the mask per hidden entry of a feed-forward network, likewise."""
    dropped_weights: int = 0
    """Bytes kept for each weight of an attention that drops some, where its scores are a tensor anyway."""
    dropped_in_kernel: int = 0
    """The same where a fused kernel computes it: 0 on a GPU, where kernels draw again."""
    flex: bool = False
    """True where FlexAttention computes masked attention in training; it keeps blocks of a mask, and no scores."""

    @property
    def autocast(self) -> bool:
        """True where every matrix that reads the residual stream copies it in the kernels' precision."""
        return self.compute != self.residual


class Part(Section):
    """One part of a layer with all settings resolved, in canonical form: equal functions compare equal."""

    module: ClassVar[str]
    """Path of its module, `package.module:Class`, a `lit_llm.components.layer_part.LayerPart`."""
    causal_only: ClassVar[str] = ""
    """Reason why it cannot see later tokens, which excludes bidirectional prefixes; '' where it can."""
    reads_marked: ClassVar[str] = ""
    """Name of the part for messages, where it reads the row's first tokens as a source; '' otherwise. The objective has
    to mark these tokens."""
    drops: ClassVar[tuple[str, ...]] = ()
    """Keys of `training` that drop entries inside of it; `dropout` acts on its output."""
    not_compiled: ClassVar[str] = ""
    """Reason why its module does not compile to one graph; '' where it does."""
    training_only: ClassVar[tuple[str, ...]] = ()
    """Fields that change how the part is trained, and not what it computes."""
    one_length: ClassVar[str] = ""
    """Reason why a compiled graph of it holds for rows of one length alone; '' where it holds for every length."""

    @property
    def differs_by_stack(self) -> str:
        """Reason why one module cannot serve in an encoder and in a decoder; '' where it can."""
        return ""

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        """{name in its module: shape} of every parameter; matrices are (rows, columns)."""
        raise NotImplementedError

    def stack_shapes(self, widths: Widths) -> dict[str, TensorShape]:
        """{name: shape} of the parameters that the stack has once for all its layers."""
        return {}

    def settings(self) -> dict[str, Any]:
        """{key: value} of all settings, including those that a dump leaves out since they have no effect."""
        return {key: getattr(self, key) for key in type(self).model_fields}

    def matrix_kind(self, name: str) -> MatrixKind:
        """Role of one of its matrices, a name in `shapes` or `stack_shapes`."""
        return "hidden"

    @property
    def source_matrices(self) -> tuple[str, ...]:
        """Names of the matrices that read the encoder's output, whose width may differ from the row's."""
        return ()

    @property
    def depends_on_cut(self) -> bool:
        """True where its training depends on how a batch is cut into micro-batches and shares of devices."""
        return False

    @property
    def unscaled(self) -> str:
        """Name of what no parametrization by width has a rule for, for messages; '' where there is nothing."""
        return ""

    def at_base_head_dim(self, base: int) -> Self:
        """The part with scores that fall as 1 / head_dim, and are the same where head_dim is `base`."""
        return self

    @property
    def without_flex(self) -> str | None:
        """Reason why FlexAttention cannot compute its attention; '' where it can, None where there is no attention."""
        return None

    @property
    def without_fla(self) -> str | None:
        """Reason why flash-linear-attention cannot compute its recurrence; '' where it can, None where it has none."""
        return None

    @property
    def smallest(self) -> dict[str, int]:
        """{size: least value to which the audit may shrink it, where a smaller one would hide what settings do}."""
        return {}

    def unused_parameters(self, widths: Widths) -> int:
        """Number of parameters that one token does not use, of a part that chooses among them."""
        return 0

    # --- FLOPs ---

    @property
    def for_last_token(self) -> bool:
        """True where the layer processes only the last token of a prompt."""
        return False

    def products(self, widths: Widths) -> int:
        """Multiply-adds with matrices for each token of the row."""
        return sum(math.prod(shape) for shape in self.shapes(widths).values() if len(shape) > 1)

    def unused_products(self, widths: Widths) -> int:
        """Multiply-adds with the matrices of `unused_parameters`, if each token of the row used them too."""
        return 0

    def pairs(self, example: Example) -> list[tuple[float, float]]:
        """(keys, visible (query, key) pairs) of each attention inside; none where there is no attention."""
        return []

    def flops(self, example: Example, widths: Widths) -> float:
        """FLOPs of a forward pass over one example, a multiply-add as 2."""
        return 2.0 * example.row * self.products(widths)

    # --- memory ---

    def cache_bytes(self, entry: int, encoder: bool, widths: Widths) -> CacheBytes:
        """Bytes kept between passes. entry: bytes per entry; encoder: whether an encoder reads the prompt."""
        return CacheBytes()

    @property
    def reads_encoder(self) -> bool:
        """True where the part reads the encoder's output, which is then kept for it."""
        return False

    def activation_bytes(self, example: Example, widths: Widths, precision: Precision) -> float:
        """Bytes that autograd keeps inside of the part, without the matrices' reads of the residual stream.

        By default the outputs of all its matrices.
        """
        made = sum(shape[0] for shape in self.shapes(widths).values() if len(shape) > 1)
        return example.row * made * precision.compute

    def shares_mask(self, precision: Precision) -> bool:
        """True where equal parts of a stack keep the same mask, and not one each."""
        return False

    def bytes_for_later_layers(self, example: Example, precision: Precision) -> float:
        """Bytes of activations that later layers read, which are kept even where the layer is computed again."""
        return 0.0

    def mask_bytes(self, example: Example, precision: Precision) -> float:
        """Bytes of masks that a kernel keeps as numbers, once for all sequences."""
        return 0.0

    def logit_bytes(self, example: Example, widths: Widths, rows: int) -> float:
        """Bytes to compute the largest attention logit of `rows` sequences; 0 without attention."""
        return 0.0


STACKS = ("encoder", "decoder", "target_decoder", "self_decoder")
"""Stacks that may have a component: any encoder, a decoder-only model's decoder, an encoder-decoder's decoder, and a
decoder-decoder's first stack."""
ROLES = ("mixer", "added", "feed_forward")


class Defaults(NamedTuple):
    """Settings of the model that serve as a component's defaults."""

    attention: dict[str, Any]
    """Settings of `model.attention`."""
    feed_forward: dict[str, Any]
    """Settings of `model.feed_forward`."""
    width: int
    """Width of the residual stream."""
    causal: bool = True
    """Whether the layer is a decoder's, whose tokens see no later ones."""


@dataclass(frozen=True)
class LayerComponent:
    """A component that a study can write into the layers of a stack: `model.decoder.<key>`."""

    key: str
    """Key in a stack and in a range of layers, and name of the module in the layer."""
    override: type[Section]
    """Section under this key. It has a `kind` with a default, which is also its short form."""
    resolve: Callable[[dict[str, Any], Defaults], Part]
    """Makes the part from the keys that are set, `kind` among them, and the model's defaults. Raises ValueError with a
    reason."""
    stacks: tuple[str, ...]
    """Stacks that may have it, of `STACKS`."""
    role: Literal["mixer", "added", "feed_forward"]
    """mixer: it replaces self-attention; feed_forward: it replaces the feed-forward network; added: an additional part
    between the two."""
    help: str
    """Description in the schema."""
    elsewhere: str = ""
    """Reason in the error message where the key is written in another stack."""

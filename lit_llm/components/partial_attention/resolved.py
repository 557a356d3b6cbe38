"""One partial attention with all settings resolved; see `lit_llm.components.attention.resolved`."""

from __future__ import annotations

from typing import Any, ClassVar

from lit_llm.components.attention.resolve import resolve_attention
from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.part import CacheBytes, Defaults, Example, LayerComponent, Precision, TensorShape, Widths
from lit_llm.components.partial_attention.config import PartialAttentionOverride


class ResolvedPartialAttention(ResolvedAttention):
    """An attention to the source, and the two matrices that make its memory."""

    modules: ClassVar[dict[str, str]] = {"partial": "lit_llm.components.partial_attention.module:PartialAttention"}
    reads_marked: ClassVar[str] = "partial attention"

    def shapes(self, widths: Widths) -> dict[str, TensorShape]:
        square = (widths.row, widths.row)
        return super().shapes(widths) | {"a1.weight": square, "a2.weight": square}

    def products(self, widths: Widths) -> int:
        return self._query_products(widths)

    def _memory_products(self, widths: Widths) -> int:
        """Entries of A1, A2, W_k and W_v, which are multiplied once per source token."""
        return 2 * widths.row * widths.row + super()._memory_products(widths)

    def pairs(self, example: Example) -> list[tuple[float, float]]:
        return [(example.marked, example.row * example.marked)]

    def flops(self, example: Example, widths: Widths) -> float:
        memory = 0.0 if example.decoding else example.marked * self._memory_products(widths)
        scores = sum(self.score_flops(pairs) for _, pairs in self.pairs(example))
        return 2.0 * (example.row * self.products(widths) + memory) + scores

    def cache_bytes(self, entry: int, encoder: bool, widths: Widths) -> CacheBytes:
        """Bytes of the keys and values of the prompt and <s>."""
        each = 2 * self.kv_width * entry
        return CacheBytes(per_source_token=each, start=each)

    def activation_bytes(self, example: Example, widths: Widths, precision: Precision) -> float:
        kept = example.row * self._query_bytes(widths, precision) + example.marked * self._key_bytes(precision)
        # Inputs of A1, of A2, and of W_k and W_v. The first is a copy, since the source's slice is not contiguous.
        kept += example.marked * widths.row * 3 * precision.compute
        return kept + self._score_bytes(example, precision)

    def _keys(self, example: Example) -> float:
        return example.marked


def resolve_partial_attention(values: dict[str, Any], defaults: Defaults) -> ResolvedPartialAttention:
    """Resolved partial attention; see `resolve_attention`. values: the keys that differ from `model.attention`'s."""
    resolved = resolve_attention({**defaults.attention, **values}, defaults.width, "partial")
    return ResolvedPartialAttention.model_validate({key: getattr(resolved, key) for key in type(resolved).model_fields})


PARTIAL_ATTENTION = LayerComponent(
    key="partial_attention",
    override=PartialAttentionOverride,
    resolve=resolve_partial_attention,
    stacks=("decoder",),
    role="added",
    help="Attention to the source after self-attention (PALM, arXiv 2304.04052), in the layers for which this is "
    "written. Needs an objective with a source, such as `prefix_lm`.",
    elsewhere="it is for decoder-only models: an encoder-decoder's cross-attention reads the source already",
)

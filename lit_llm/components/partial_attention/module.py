"""Module of `ResolvedPartialAttention`."""

from __future__ import annotations

from torch import Tensor

from lit_llm.components.attention.module import AttentionInputs, CrossAttention, rotation_of
from lit_llm.components.few_rows import Linear
from lit_llm.components.forward_context import ForwardContext
from lit_llm.components.kv_cache import KeyValues
from lit_llm.components.part import Widths
from lit_llm.components.partial_attention.resolved import ResolvedPartialAttention


class PartialAttention(CrossAttention):
    """An attention to the source in the row, which a small network adapts:

    x ───────────────────────────────────────────┐
    source ─ a1 ─ relu ─┬─ a2 ─(+)─ memory ─ attention ─▶
                        └───────┘
    The source is the beginning of x.
    """

    def __init__(self, config: ResolvedPartialAttention, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.a1 = Linear(widths.row, widths.row)
        self.a2 = Linear(widths.row, widths.row)

    def prepare(self, context: ForwardContext, cache: KeyValues | None) -> AttentionInputs:  # type: ignore[override]
        source = context.source
        assert source is not None
        return AttentionInputs(
            self._kernel_mask(context, "source", lambda: source.mask, source.tokens),
            rotation_of(context, "self", self.config),
            source_tokens=source.tokens if source.in_row else 0,
            source_rotation=rotation_of(context, "source", self.config) if source.in_row else None,
            source_cache=cache,
        )

    def forward(self, x_BTD: Tensor, inputs: AttentionInputs) -> Tensor:
        """B x T x D -> B x T x D."""
        if inputs.source_tokens:
            first_BSD = self.a1(x_BTD[:, : inputs.source_tokens]).relu()
            inputs = inputs._replace(source_BSD=self.a2(first_BSD) + first_BSD)
        return super().forward(x_BTD, inputs)

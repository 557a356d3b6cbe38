"""The partial attention that `ResolvedPartialAttention` describes."""

from __future__ import annotations

from torch import Tensor, nn

from lit_llm.components.attention.kv_cache import KeyValues
from lit_llm.components.attention.masks import AttentionMask
from lit_llm.components.attention.module import Attention
from lit_llm.components.attention.rope import Rotation
from lit_llm.components.partial_attention.config import ResolvedPartialAttention


class PartialAttention(Attention):
    """
    x ───────────────────────────────────────────┐
    source ─ a1 ─ relu ─┬─ a2 ─(+)─ memory ─ attention ─▶
                        └───────┘
    """

    def __init__(self, config: ResolvedPartialAttention, d_model: int) -> None:
        super().__init__(config, d_model)
        self.a1 = nn.Linear(d_model, d_model, bias=False)
        self.a2 = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        kv_BSD: Tensor | None,
        visible: AttentionMask,
        query_rotation: Rotation | None = None,
        key_rotation: Rotation | None = None,
        cache: KeyValues | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """kv_BSD: the source's states; with a cache none at all once its keys and values are held."""
        if kv_BSD is not None:
            first_BSD = self.a1(kv_BSD).relu()
            kv_BSD = self.a2(first_BSD) + first_BSD
        return super().forward(x_BTD, kv_BSD, visible, query_rotation, key_rotation, cache, bias)

"""The attention that `ResolvedAttention` describes: one module for self, cross, causal, full and prefix."""

from __future__ import annotations

from torch import Tensor, nn, ones

from lit_llm.components.attention.cache import KeyValues
from lit_llm.components.attention.config import ResolvedAttention
from lit_llm.components.attention.rope import Rotation, rotate
from lit_llm.components.attention.visibility import DotProduct, Visibility
from lit_llm.components.norm.module import rms_norm


class Attention(nn.Module):
    """
    x ────── q ─[norm q]─[RoPE]─┐
    memory ┬ k ─[norm k]─[RoPE]─┼─ softmax(QKᵀ/√K)V ─[head norm | concat norm]─ out ─[after_out norm]─▶
           └ v ─[norm v]────────┘

    In self-attention memory is x; in cross-attention it is the encoder's output.
    """

    def __init__(self, config: ResolvedAttention, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.q = nn.Linear(d_model, config.width, bias=False)
        self.k = nn.Linear(d_model, config.kv_width, bias=False)
        self.v = nn.Linear(d_model, config.kv_width, bias=False)
        self.out = nn.Linear(config.width, d_model, bias=False)
        self.dot_product = DotProduct()
        scaled = config.qkv_norm if config.qkv_norm_scale else ()
        self.qkv_scale = nn.ParameterDict({part: nn.Parameter(ones(config.head_dim)) for part in scaled})
        widths = {"none": 0, "head": config.head_dim, "concat": config.width, "after_out": d_model}
        self.output_scale = nn.Parameter(ones(widths[config.output_norm])) if config.output_norm_scale else None

    def heads(self, part: str, x_BTD: Tensor, rotation: Rotation | None) -> Tensor:
        """Queries, keys or values of every head, B x H x T x K, normalised and rotated where they should be."""
        projection = getattr(self, part)
        # Norm and rotation before the transposition: on contiguous memory they are cheaper.
        x_BTHK = projection(x_BTD).unflatten(-1, (-1, self.config.head_dim))
        if part in self.config.qkv_norm:
            scale = self.qkv_scale[part] if self.config.qkv_norm_scale else None
            x_BTHK = rms_norm(x_BTHK, scale, self.config.norm_eps)
        if rotation is not None:
            x_BTHK = rotate(x_BTHK, rotation)
        return x_BTHK.transpose(1, 2)

    def forward(
        self,
        x_BTD: Tensor,
        memory_BSD: Tensor | None,
        visible: Visibility,
        query_rotation: Rotation | None = None,
        key_rotation: Rotation | None = None,
        cache: KeyValues | None = None,
    ) -> Tensor:
        """With a cache the memory is what is new; none at all when everything is in the cache."""
        q = self.heads("q", x_BTD, query_rotation)
        if memory_BSD is None:
            assert cache is not None
            k, v = cache.held()
        else:
            k = self.heads("k", memory_BSD, key_rotation)
            v = self.heads("v", memory_BSD, None)
            if cache is not None:
                k, v = cache.add(k, v)
        out_BTHK = self.dot_product(q, k, v, visible).transpose(1, 2)
        if self.config.output_norm == "head":
            out_BTHK = self.output_norm(out_BTHK)
        joined_BTD = out_BTHK.flatten(2)
        if self.config.output_norm == "concat":
            joined_BTD = self.output_norm(joined_BTD)
        out_BTD = self.out(joined_BTD)
        return self.output_norm(out_BTD) if self.config.output_norm == "after_out" else out_BTD

    def output_norm(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.output_scale, self.config.norm_eps)

"""Norms of the residual stream.

RMSNorm: Zhang and Sennrich, arXiv 1910.07467. LayerNorm: Ba et al., arXiv 1607.06450; without bias as in ModernBERT
(arXiv 2412.13663). Placement: before each block (arXiv 2002.04745), after it as in the first Transformer
(arXiv 1706.03762), both (Gemma 2, arXiv 2408.00118), or on a block's output (OLMo 2, arXiv 2501.00656). Parallel parts:
GPT-J; GPT-NeoX, arXiv 2204.06745; PaLM, arXiv 2204.02311.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lit_llm.config.section import Section, config_error


class NormConfig(Section):
    """Norm over the D entries of each token, around each block (see `placement`) and after the last layer."""

    function: Literal["rms_norm", "layer_norm"] = "rms_norm"
    """rms_norm divides by the root mean square; layer_norm centres, divides by the deviation, and has no bias."""
    scale: bool = True
    """Learn a scale of D entries."""
    eps: float = Field(1e-6, gt=0)
    """Added to the mean square (or the variance) under the root."""
    # Left out of the dump where they are the default, so that a fingerprint says what is computed.
    placement: Literal["pre", "post", "sandwich", "output", "parallel"] = Field(
        "pre", exclude_if=lambda value: value == "pre"
    )
    """pre: x + f(norm(x)). post: norm(x + f(x)), and none after the last layer. sandwich: x + norm(f(norm(x))).
    output: x + norm(f(x)). parallel: x + f(norm(x)) + g(norm(x)), as pre, but all parts of a layer read its input, each
    by a norm of its own as in GPT-NeoX."""
    skip_first: bool = Field(False, exclude_if=lambda value: not value)
    """No norm before a stack's first attention, whose input is the embedding (ModernBERT, which normalises that)."""

    @property
    def before(self) -> bool:
        """True where a block reads a normed input."""
        return self.placement in ("pre", "sandwich", "parallel")

    @property
    def after(self) -> bool:
        """True where a block's output is normed."""
        return self.placement in ("sandwich", "output")

    @model_validator(mode="after")
    def _fits(self) -> NormConfig:
        if self.skip_first and not self.before:
            raise config_error(("skip_first", f"has no effect: with placement {self.placement} no norm is before it"))
        return self

"""What every module has that stands in a layer, and how one is built from its configuration."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from lit_llm.components.forward_context import CacheRows, ForwardContext
from lit_llm.components.kv_cache import Cache
from lit_llm.components.part import Part, Widths
from lit_llm.config.problems import InputError, Problem


class LayerPart(nn.Module):
    """One part of a layer: what it computes of the normalised residual stream is added to it."""

    def __init__(self, config: Part, widths: Widths, causal: bool) -> None:
        """causal: whether the layer is a decoder's."""
        super().__init__()

    def prepare(self, context: ForwardContext, cache: Cache | None) -> Any:
        """Compute what `forward` needs beside activations.

        It must read no parameter of its layer: with a sharded model those exist inside `forward` alone.

        cache: what this part keeps between passes; None in training.
        """
        return None

    def forward(self, x_BTD: Tensor, inputs: Any) -> Tensor:
        """B x T x D -> B x T x D. With a cache x_BTD holds the new tokens alone."""
        raise NotImplementedError

    def new_cache(self, rows: CacheRows) -> Cache | None:
        """An empty cache, where the part keeps anything between passes."""
        return None

    def stack_modules(self) -> dict[str, nn.Module]:
        """{name: module} of what the stack is to have once for all its layers."""
        return {}


def build_part(part: Part, widths: Widths, causal: bool) -> LayerPart:
    """The module that a part's configuration describes. Raises InputError where it cannot be loaded."""
    module, _, name = part.module.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(Problem(f"cannot be loaded: {error}", f"the module {part.module}")) from error
    built: LayerPart = made(part, widths, causal)
    return built

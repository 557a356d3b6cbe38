"""Base class of the modules in a layer, and their construction from a configuration."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor, nn

from lit_llm.components.forward_context import CacheRows, ForwardContext
from lit_llm.components.kv_cache import Cache
from lit_llm.components.part import Part, Widths
from lit_llm.config.problems import InputError, Problem


class LayerPart(nn.Module):
    """One part of a layer: it reads the normalised residual stream, and its output is added to the stream."""

    def __init__(self, config: Part, widths: Widths, causal: bool) -> None:
        """causal: whether the layer is a decoder's."""
        super().__init__()

    def prepare(self, context: ForwardContext, cache: Cache | None) -> Any:
        """Compute the inputs of `forward` other than activations.

        It must not read parameters of the layer: with a sharded model these exist inside `forward` alone.

        cache: this part's cache; None in training.
        """
        return None

    def forward(self, x_BTD: Tensor, inputs: Any) -> Tensor:
        """B x T x D -> B x T x D. With a cache, x_BTD holds the new tokens only."""
        raise NotImplementedError

    def new_cache(self, rows: CacheRows) -> Cache | None:
        """An empty cache; None for a part that keeps nothing between passes."""
        return None

    def stack_modules(self) -> dict[str, nn.Module]:
        """{name: module} of the modules that the stack has once for all its layers."""
        return {}


def build_part(part: Part, widths: Widths, causal: bool) -> LayerPart:
    """Build the module of a part's configuration. Raises InputError where it cannot be loaded."""
    module, _, name = part.module.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(Problem(f"cannot be loaded: {error}", f"the module {part.module}")) from error
    built: LayerPart = made(part, widths, causal)
    return built

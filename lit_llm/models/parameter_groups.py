"""Groups of a model's parameters by what they belong to, for learning rates of their own. Loads no torch.

Names are those of the model's sections: the parts of a layer have the keys under which they are configured.
"""

from __future__ import annotations

from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.part import Part
from lit_llm.components.registry import COMPONENTS
from lit_llm.models.parameters import INPUT_TABLES, OF_LAYER, parameter_shapes
from lit_llm.models.resolved import ResolvedModel


def parameter_groups(model: ResolvedModel) -> dict[str, tuple[str, ...]]:
    """{name: the groups that it is in, the more general first} of every parameter.

    embeddings: the tables of tokens and of positions that are read; a tied table is one of them. output: the output's
    matrix and head. norms: scales of the norms of the residual stream and of the embeddings. residual: learned factors
    of branches. attention: every attention, with its biases and inner norms. Any other part of a layer is a group by
    its name; what stands in place of the feed-forward network is also in feed_forward.
    """
    return {name: _groups(name, model) for name in parameter_shapes(model)}


def _groups(name: str, model: ResolvedModel) -> tuple[str, ...]:
    if match := OF_LAYER.fullmatch(name):
        return _groups_in_layer(match[2], model, name.partition(".")[0])
    if name.endswith("norm.scale"):
        return ("norms",)
    if name in INPUT_TABLES:
        return ("embeddings",)
    side, _, inner = name.partition(".")
    if inner.startswith("shared_kv."):
        return ("attention",)
    for layer in dict(model.stacks).get(side, ()):
        for key, part in layer.parts:
            if inner in part.stack_shapes(model.widths(side)):
                return _groups_of_part(key, part)
    return ("output",)


def _groups_in_layer(module: str, model: ResolvedModel, side: str) -> tuple[str, ...]:
    """Groups of the parameters of a layer's module: a part, a norm beside it, or the factor of its branch."""
    for layer in getattr(model, side):
        if (part := layer.part(module)) is not None:
            return _groups_of_part(module, part)
    return ("residual",) if module.endswith("_branch") else ("norms",)


def _groups_of_part(key: str, part: Part) -> tuple[str, ...]:
    component = COMPONENTS.get(key)
    if isinstance(part, ResolvedAttention):
        general = "attention"
    elif component is not None and component.role == "feed_forward":
        general = "feed_forward"
    else:
        return (key,)
    return general, key

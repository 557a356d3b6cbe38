"""The names and shapes of a model's parameters, by arithmetic alone: what its module will have. Loads no torch.

The one source of them: numbers of parameters, the optimiser's bytes, and what a model takes over from another are made
of this.
"""

from __future__ import annotations

import math

from lit_llm.components.norm.config import NormConfig
from lit_llm.components.part import TensorShape
from lit_llm.models.resolve import Layer, ResolvedModel


def parameter_shapes(model: ResolvedModel) -> dict[str, TensorShape]:
    """{name: shape} of every parameter."""
    d_model, normed = model.d_model, model.embedding.norm
    found = embedding_shapes(model) | _norm("embedding_norm", model.norm, d_model, normed)
    if model.family == "encoder_decoder":
        found |= _norm("encoder_embedding_norm", model.norm, model.width("encoder"), normed)
    if model.output.bias:
        found["output_bias"] = (model.vocabulary,)
    if model.output.head == "dense":
        found |= {"head.dense.weight": (d_model, d_model), **_norm("head.norm", model.norm, d_model)}
    for side, layers in model.stacks:
        alike: dict[tuple[int, bool], dict[str, TensorShape]] = {}
        for index, layer in enumerate(layers):
            key = id(layer), index == 0
            if key not in alike:
                alike[key] = _layer(layer, model, side, first=index == 0)
            found |= {f"{side}.layers.{index}.{name}": shape for name, shape in alike[key].items()}
        last = bool(layers) and model.norm.placement != "post"
        found |= _norm(f"{side}.norm", model.norm, model.width(side), last)
        for layer in layers:
            for _, part in layer.parts:
                shared = part.stack_shapes(model.widths(side))
                found |= {f"{side}.{name}": shape for name, shape in shared.items()}
    if model.shared_kv:
        found |= _norm("decoder.shared_kv_norm", model.norm, d_model, model.norm.placement != "post")
        shared = model.shared_kv.shared_shapes(model.widths("decoder"))
        found |= {f"decoder.shared_kv.{name}": shape for name, shape in shared.items()}
    return found


def embedding_shapes(model: ResolvedModel) -> dict[str, TensorShape]:
    """{name: shape} of the matrices of the vocabulary, the output's included."""
    table, tied = (model.vocabulary, model.d_model), model.tie_embeddings
    found: dict[str, TensorShape] = {"embedding.weight": table}
    if model.family == "encoder_decoder" and tied not in ("all", "inputs"):
        found["encoder_embedding.weight"] = (model.vocabulary, model.width("encoder"))
    if tied not in ("all", "decoder"):
        found["output.weight"] = table
    return found


def matrix_of(shape: TensorShape) -> tuple[int, int]:
    """(rows, columns) of a parameter; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])


def _norm(name: str, norm: NormConfig, width: int, there: bool = True) -> dict[str, TensorShape]:
    return {f"{name}.scale": (width,)} if there and norm.scale else {}


def _layer(layer: Layer, model: ResolvedModel, side: str, first: bool) -> dict[str, TensorShape]:
    """{name in the layer: shape}; first: whether it is the first of its stack."""
    widths, norm = model.widths(side), model.norm
    found: dict[str, TensorShape] = {}
    for number, (name, part) in enumerate(layer.parts):
        before = norm.before and not (first and norm.skip_first and number == 0)
        found |= _norm(f"{name}_norm", norm, widths.row, before)
        found |= _norm(f"{name}_post_norm", norm, widths.row, norm.after or norm.placement == "post")
        found |= {f"{name}.{inner}": shape for inner, shape in part.shapes(widths).items()}
    return found

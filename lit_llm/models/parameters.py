"""Names and shapes of a model's parameters, by arithmetic alone. Loads no torch.

The single source of numbers of parameters, of the optimiser's bytes, and of adaptation between models.
"""

from __future__ import annotations

import math
import re

from lit_llm.components.norm.config import NormConfig
from lit_llm.components.part import TensorShape
from lit_llm.models.layer import Layer
from lit_llm.models.resolved import ResolvedModel

INPUT_TABLES = tuple(
    f"{side}{kind}.weight" for side in ("", "encoder_") for kind in ("embedding", "position_embedding")
)
"""Names of the tables that make a stack's input."""
OF_LAYER = re.compile(r"(?:encoder|decoder)\.(?:layers\.(\d+)|future\.\d+)\.(\w+)\.(.+)")
"""A parameter of a layer: the layer's number, a module in it, and the name in the module."""


def parameter_shapes(model: ResolvedModel) -> dict[str, TensorShape]:
    """{name: shape} of every parameter."""
    d_model, normed = model.d_model, model.embedding.norm
    shapes = embedding_shapes(model) | _norm("embedding_norm", model.norm, d_model, normed)
    if model.encoder and model.decoder:
        shapes |= _norm("encoder_embedding_norm", model.norm, model.width("encoder"), normed)
    if model.output.bias:
        shapes["output_bias"] = (model.vocabulary,)
    if model.output.head == "dense":
        shapes |= {"head.dense.weight": (d_model, d_model), **_norm("head.norm", model.norm, d_model)}
    for side, layers in model.stacks:
        has_own = not (model.tie_layers and side == "encoder")
        alike: dict[tuple[int, bool], dict[str, TensorShape]] = {}
        for index, layer in enumerate(layers if has_own else ()):
            key = id(layer), index == 0
            if key not in alike:
                alike[key] = _layer(layer, model, side, first=index == 0)
            shapes |= {f"{side}.layers.{index}.{name}": shape for name, shape in alike[key].items()}
        if side == "decoder":
            for number in range(model.output.future_tokens):
                head = _layer(layers[-1], model, side, first=False)
                shapes |= {f"{side}.future.{number}.{name}": shape for name, shape in head.items()}
        last = bool(layers) and model.norm.placement != "post"
        shapes |= _norm(f"{side}.norm", model.norm, model.width(side), last)
        for layer in layers:
            for _, part in layer.parts:
                shared = part.stack_shapes(model.widths(side))
                shapes |= {f"{side}.{name}": shape for name, shape in shared.items()}
    if model.shared_kv:
        shapes |= _norm("decoder.shared_kv_norm", model.norm, d_model, model.norm.placement != "post")
        shared = model.shared_kv.shared_shapes(model.widths("decoder"))
        shapes |= {f"decoder.shared_kv.{name}": shape for name, shape in shared.items()}
    return shapes


def embedding_shapes(model: ResolvedModel) -> dict[str, TensorShape]:
    """{name: shape} of the tables of tokens and of positions, and of the output's matrix."""
    table, tied = (model.vocabulary, model.d_model), model.tie_embeddings
    shapes: dict[str, TensorShape] = {"embedding.weight": table}
    if model.encoder and model.decoder and tied not in ("all", "inputs"):
        shapes["encoder_embedding.weight"] = (model.vocabulary, model.width("encoder"))
    if tied not in ("all", "decoder"):
        shapes["output.weight"] = table
    if (rows := model.embedding.max_positions) is not None:
        shapes["position_embedding.weight"] = (rows, model.d_model)
        if model.encoder and model.decoder:
            shapes["encoder_position_embedding.weight"] = (rows, model.width("encoder"))
    return shapes


def matrix_of(shape: TensorShape) -> tuple[int, int]:
    """(rows, columns) of a parameter; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])


def _norm(name: str, norm: NormConfig, width: int, exists: bool = True) -> dict[str, TensorShape]:
    return {f"{name}.scale": (width,)} if exists and norm.scale else {}


def _layer(layer: Layer, model: ResolvedModel, side: str, first: bool) -> dict[str, TensorShape]:
    """{name in the layer: shape}; first: whether it is the first of its stack."""
    widths, norm = model.widths(side), model.norm
    shapes: dict[str, TensorShape] = {}
    for number, (name, part) in enumerate(layer.parts):
        before = norm.before and not (first and norm.skip_first and number == 0)
        shapes |= _norm(f"{name}_norm", norm, widths.row, before)
        shapes |= _norm(f"{name}_post_norm", norm, widths.row, norm.after or norm.placement == "post")
        if (branch := model.residual.branch_shape(widths.row)) is not None:
            shapes[f"{name}_branch.scale"] = branch
        shapes |= {f"{name}.{inner}": shape for inner, shape in part.shapes(widths).items()}
    return shapes

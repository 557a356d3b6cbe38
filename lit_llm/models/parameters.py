"""The names and shapes of a model's parameters, by arithmetic alone: what its module will have. Loads no torch."""

from __future__ import annotations

from lit_llm.components.attention.config import ResolvedAttention
from lit_llm.components.norm.config import NormConfig
from lit_llm.components.partial_attention.config import ResolvedPartialAttention
from lit_llm.components.retention.config import ResolvedRetention
from lit_llm.models.resolve import Layer, ResolvedModel

Shape = tuple[int, ...]


def parameter_shapes(model: ResolvedModel) -> dict[str, Shape]:
    """{name: shape} of every parameter. Raises ValueError for a decoder-decoder, whose halves are named otherwise."""
    if model.family == "decoder_decoder":
        raise ValueError("the names of a decoder_decoder's parameters are known only once it is built")
    d_model, vocabulary, tied = model.d_model, model.vocabulary, model.tie_embeddings
    table, normed = (vocabulary, d_model), model.embedding.norm
    found: dict[str, Shape] = {"embedding.weight": table} | _norm("embedding_norm", model.norm, d_model, normed)
    if model.family == "encoder_decoder":
        width = model.width("encoder")
        if tied not in ("all", "inputs"):
            found["encoder_embedding.weight"] = (vocabulary, width)
        found |= _norm("encoder_embedding_norm", model.norm, width, normed)
    if tied not in ("all", "decoder"):
        found["output.weight"] = table
    if model.output.bias:
        found["output_bias"] = (vocabulary,)
    if model.output.head == "dense":
        found |= {"head.dense.weight": (d_model, d_model), **_norm("head.norm", model.norm, d_model)}
    for side, layers in (("encoder", model.encoder), ("decoder", model.decoder)):
        for index, layer in enumerate(layers):
            found |= _layer(f"{side}.layers.{index}", layer, model, side, first=index == 0)
        own = [layer.self_attention for layer in layers if layer.self_attention is not None]
        if shared := [each for each in own if each.relative_bias == "shared"]:
            found[f"{side}.relative_bias.weight"] = shared[0].bias_tensors()[0]
        found |= _norm(f"{side}.norm", model.norm, model.width(side), bool(layers) and model.norm.placement != "post")
    return found


def _norm(name: str, norm: NormConfig, width: int, there: bool = True) -> dict[str, Shape]:
    return {f"{name}.scale": (width,)} if there and norm.scale else {}


def _layer(name: str, layer: Layer, model: ResolvedModel, side: str, first: bool) -> dict[str, Shape]:
    width, norm, d_ff = model.width(side), model.norm, layer.feed_forward.d_ff
    inside: dict[str, dict[str, Shape]] = {}
    if layer.self_attention is not None:
        inside["self_attention"] = _attention(layer.self_attention, width)
    if layer.retention is not None:
        inside["retention"] = _retention(layer.retention, width)
    if layer.cross_attention is not None:
        inside["cross_attention"] = _attention(layer.cross_attention, width, model.width("encoder"))
    if layer.partial_attention is not None:
        square = {"a1.weight": (width, width), "a2.weight": (width, width)}
        inside["partial_attention"] = _attention(layer.partial_attention, width) | square
    inside["feed_forward"] = {"gate.weight": (d_ff, width)} if layer.feed_forward.gated else {}
    inside["feed_forward"] |= {"up.weight": (d_ff, width), "down.weight": (width, d_ff)}
    found: dict[str, Shape] = {}
    for part, shapes in inside.items():
        before = norm.before and not (first and norm.skip_first and part in ("self_attention", "retention"))
        found |= _norm(f"{name}.{part}_norm", norm, width, before)
        found |= _norm(f"{name}.{part}_post_norm", norm, width, norm.after or norm.placement == "post")
        found |= {f"{name}.{part}.{own}": shape for own, shape in shapes.items()}
    return found


def _retention(retention: ResolvedRetention, width: int) -> dict[str, Shape]:
    names = ("q", "k", "v", "decay", "output_gate", "out")
    return {f"{name}.weight": tensor for name, tensor in zip(names, retention.tensors(width), strict=True)}


def _attention(
    attention: ResolvedAttention | ResolvedPartialAttention, width: int, memory: int | None = None
) -> dict[str, Shape]:
    keys = (attention.kv_width, memory or width)
    found: dict[str, Shape] = {"q.weight": (attention.width, width), "k.weight": keys, "v.weight": keys}
    found["out.weight"] = (width, attention.width)
    if attention.qkv_norm_scale:
        found |= {f"qkv_scale.{part}": (attention.head_dim,) for part in attention.qkv_norm}
    if attention.output_norm_scale:
        widths = {"head": attention.head_dim, "concat": attention.width, "after_out": width}
        found["output_scale"] = (widths[attention.output_norm],)
    if attention.relative_bias == "per_layer":
        found["relative_bias.weight"] = attention.bias_tensors()[0]
    return found

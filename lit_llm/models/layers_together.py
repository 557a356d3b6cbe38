"""Common parts of the layers of a stack, or of two: values of the first layer, and parameters of tied stacks."""

from __future__ import annotations

from collections.abc import Sequence

from lit_llm.models.layer import Layer


def with_first_values(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers of a stack, of which the first gives its values to those with a value residual."""
    first = layers[0].self_attention if layers else None
    if first is None or not any(_has_value_residual(layer) for layer in layers):
        return layers
    place = "first" if any(_has_value_residual(layer) for layer in layers[1:]) else "none"
    given = first.model_copy(update={"value_residual": place, "value_residual_weight": 0.5})
    parts = tuple((name, given if name == "self_attention" else part) for name, part in layers[0].parts)
    return (Layer(parts=parts), *layers[1:])


def _has_value_residual(layer: Layer) -> bool:
    return layer.self_attention is not None and layer.self_attention.value_residual in ("fixed", "learned")


def value_residual_problem(layers: Sequence[Layer]) -> str:
    """Reason why the layers of a stack cannot read the values of its first layer, or ''."""
    mixing = [(index, layer.self_attention) for index, layer in enumerate(layers) if _has_value_residual(layer)]
    if not mixing:
        return ""
    first = layers[0].self_attention
    if first is None:
        return "value_residual reads the values of the stack's first layer, which has no self-attention"
    if first.place == "merged":
        return (
            "value_residual reads the values of the stack's first layer, whose self-attention is merged with "
            "cross-attention; write cross_attention_mode: separate there, or value_residual: none"
        )
    for index, attention in mixing:
        assert attention is not None
        if (attention.kv_heads, attention.head_dim) != (first.kv_heads, first.head_dim):
            return f"value_residual needs the kv_heads and head_dim of layer 0; those of layer {index} differ"
    return ""


def tying_problem(encoder: Sequence[Layer], decoder: Sequence[Layer]) -> str:
    """Reason why an encoder cannot be made of the decoder's layers, or ''."""
    if len(encoder) != len(decoder):
        return f"the encoder has {len(encoder)} layers and the decoder {len(decoder)}; tied stacks have as many"
    for index, (source, target) in enumerate(zip(encoder, decoder, strict=True)):
        for name, part in source.parts:
            other = target.part(name)
            if other is None:
                return f"layer {index} of the decoder has no {name}, which that of the encoder has"
            if reason := part.differs_by_stack or other.differs_by_stack:
                return f"the {name} of layer {index} cannot be that of both stacks: {reason}"
            if part != other:
                keys = [key for key, value in part.settings().items() if getattr(other, key, None) != value]
                place = f"in {', '.join(keys)}" if keys else "as it is merged with cross-attention there"
                return f"the {name} of layer {index} differs between the encoder and the decoder, {place}"
    return ""


def convolution_problem(cross_decoder: Sequence[Layer]) -> str:
    """Reason why a cross-decoder cannot have its convolutions, or ''."""
    networks = (layer.feed_forward for layer in cross_decoder)
    if any(network is not None and network.convolution for network in networks):
        return "a cross-decoder runs for a prompt's last token alone, which has no neighbours; write convolution: []"
    return ""


def block_problem(layers: Sequence[Layer]) -> str:
    """Reason why the layers of a double decoder's stack cannot be read block by block, or ''."""
    for index, layer in enumerate(layers):
        for name, part in layer.parts:
            for key, without in (("window", None), ("relative_bias", "none"), ("convolution", ())):
                if getattr(part, key, without) != without:
                    written = {"window": "null", "relative_bias": "none", "convolution": "[]"}[key]
                    return (
                        f"{key}: a double decoder's stacks go on by whole blocks, which {name} of layer {index} cannot "
                        f"with a {key.replace('_', ' ')}; write {key}: {written}"
                    )
    return ""

"""config.json of a resolved model for transformers: one function per architecture, the inverses of `from_config.py`.

Each writes the nearest config of its architecture, whatever the model. Reading it back shows what is different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.huggingface.source_config import ACTIVATIONS, GLOBAL, LOCAL
from lit_llm.models.resolve import Layer, ResolvedModel


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of tokens that a config.json names."""

    end: int
    begin: int

    @property
    def keys(self) -> dict[str, int]:
        """Keys of a config.json. Padding is the end token, the only one that every tokenizer has: transformers needs a
        padding token, and masks it where no mask is given."""
        return {"bos_token_id": self.begin, "eos_token_id": self.end, "pad_token_id": self.end}


def llama(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    return {
        **_stack(model, model.decoder, tokens),
        **_tied(model),
        "hidden_act": _activation(model.decoder),
        "rope_parameters": _rope(_attentions(model.decoder)[0]),
    }


def qwen3(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    return {**llama(model, tokens), **_kinds(model.decoder), "use_sliding_window": True, "max_window_layers": 0}


def gemma2(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    return {**_of_gemma(model, model.decoder, tokens), **_tied(model)}


def t5gemma(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    encoder, decoder = (_of_gemma(model, side, tokens) for side in (model.encoder, model.decoder))
    encoder["sliding_window"] = max(1, encoder["sliding_window"] - 1)
    encoder["hidden_size"] = model.width("encoder")
    decoder["cross_attention_hidden_size"] = model.width("encoder")
    return {**_two(model, tokens, tied="decoder"), "encoder": encoder, "decoder": decoder}


def t5gemma2(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    """The part for images is as small as can be: transformers builds one for a model of text, too."""
    encoder, decoder = (
        _of_gemma(model, side, tokens) | {"rope_parameters": _two_ropes(side)}
        for side in (model.encoder, model.decoder)
    )
    sides = [attention.window_sides for attention in _attentions(model.encoder)]
    before, after = next(filter(None, sides), (1, 1))
    encoder["sliding_window"] = before + after - 1
    vision: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    multimodal = {"text_config": encoder, "vision_config": vision, "mm_tokens_per_image": 4}
    return {**_two(model, tokens, tied="all"), "encoder": multimodal, "decoder": decoder}


def modernbert(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    stack = _stack(model, model.encoder, tokens)
    stack["norm_eps"] = stack.pop("rms_norm_eps")
    kinds = _kinds(model.encoder)
    return {
        **{key: value for key, value in stack.items() if key not in ("head_dim", "num_key_value_heads")},
        "layer_types": kinds["layer_types"],
        "local_attention": max(1, 2 * (kinds["sliding_window"] - 1)),
        "hidden_activation": _activation(model.encoder),
        "rope_parameters": _two_ropes(model.encoder),
        "decoder_bias": model.output.bias,
        "cls_token_id": tokens.begin,
        "sep_token_id": tokens.end,
        **_tied(model),
    }


# --- what they share -----------------------------------------------------------------------------------------------


def _stack(model: ResolvedModel, layers: Sequence[Layer], tokens: SpecialTokens) -> dict[str, Any]:
    attention = _attentions(layers)[0]
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": model.d_model,
        "intermediate_size": _feed_forward(layers).d_ff,
        "num_hidden_layers": len(layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": model.norm.eps,
        **tokens.keys,
    }


def _of_gemma(model: ResolvedModel, layers: Sequence[Layer], tokens: SpecialTokens) -> dict[str, Any]:
    attention = _attentions(layers)[0]
    return {
        **_stack(model, layers, tokens),
        **_kinds(layers),
        "hidden_activation": _activation(layers),
        "rope_parameters": _rope(attention),
        "query_pre_attn_scalar": attention.head_dim if attention.scale is None else round(attention.scale**-2),
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": model.output.softcap,
    }


def _kinds(layers: Sequence[Layer]) -> dict[str, Any]:
    windows = [attention.window for attention in _attentions(layers)]
    kinds = [GLOBAL if window is None else LOCAL for window in windows]
    return {"layer_types": kinds, "sliding_window": next(filter(None, windows), 4096)}


def _two(model: ResolvedModel, tokens: SpecialTokens, tied: str) -> dict[str, Any]:
    ends = {**tokens.keys, "decoder_start_token_id": tokens.begin, "is_encoder_decoder": True}
    return {"vocab_size": model.vocabulary, "tie_word_embeddings": model.tie_embeddings == tied, **ends}


def _tied(model: ResolvedModel) -> dict[str, bool]:
    return {"tie_word_embeddings": model.tie_embeddings == "all"}


def _attentions(layers: Sequence[Layer]) -> list[ResolvedAttention]:
    return [layer.self_attention for layer in layers if layer.self_attention is not None]


def _activation(layers: Sequence[Layer]) -> str:
    ours = {name: theirs for theirs, name in reversed(ACTIVATIONS.items())}
    return ours.get(_feed_forward(layers).activation, "silu")


def _feed_forward(layers: Sequence[Layer]) -> FeedForwardConfig:
    network = layers[0].feed_forward
    assert network is not None
    return network


def _rope(attention: ResolvedAttention) -> dict[str, Any]:
    linear = {"rope_type": "linear", "factor": attention.rope_factor}
    scaling = linear if attention.rope_factor != 1 else {"rope_type": "default"}
    return {"rope_theta": attention.rope_theta or 10_000.0, **scaling}


def _two_ropes(layers: Sequence[Layer]) -> dict[str, Any]:
    """Ropes of the first global and the first local layer, or of the first layer where there is only one kind."""
    ropes = {kind: _rope(_attentions(layers)[0]) for kind in (GLOBAL, LOCAL)}
    for attention in reversed(_attentions(layers)):
        ropes[GLOBAL if attention.window is None else LOCAL] = _rope(attention)
    return ropes

"""A resolved model as a config.json of transformers: one function per architecture, the inverses of `sections`.

Each writes the nearest config of its architecture, whatever the model; whether it is that model, reading it back tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.huggingface.from_config import ACTIVATIONS, GLOBAL, LOCAL
from lit_llm.models.resolve import Layer, ResolvedModel


@dataclass(frozen=True)
class Ids:
    """Tokens that a config.json names."""

    end: int
    begin: int

    @property
    def named(self) -> dict[str, int]:
        """transformers needs a token to pad with and masks it where no mask is given; no other is certain to be
        there."""
        return {"bos_token_id": self.begin, "eos_token_id": self.end, "pad_token_id": self.end}


def llama(model: ResolvedModel, ids: Ids) -> dict[str, Any]:
    own = {"hidden_act": _activation(model.decoder), "rope_parameters": _rope(_attentions(model.decoder)[0])}
    return {**_stack(model, model.decoder, ids), **own, **_tied(model)}


def qwen3(model: ResolvedModel, ids: Ids) -> dict[str, Any]:
    return {**llama(model, ids), **_kinds(model.decoder), "use_sliding_window": True, "max_window_layers": 0}


def gemma2(model: ResolvedModel, ids: Ids) -> dict[str, Any]:
    return {**_of_gemma(model, model.decoder, ids), **_tied(model)}


def t5gemma(model: ResolvedModel, ids: Ids) -> dict[str, Any]:
    encoder, decoder = (_of_gemma(model, side, ids) for side in (model.encoder, model.decoder))
    encoder["sliding_window"] = max(1, encoder["sliding_window"] - 1)
    encoder["hidden_size"] = model.width("encoder")
    decoder["cross_attention_hidden_size"] = model.width("encoder")
    return {**_two(model, ids, tied="decoder"), "encoder": encoder, "decoder": decoder}


def t5gemma2(model: ResolvedModel, ids: Ids) -> dict[str, Any]:
    """The images' part is as small as can be: transformers makes one, whether there are images or not."""
    encoder, decoder = (
        _of_gemma(model, side, ids) | {"rope_parameters": _two_ropes(side)} for side in (model.encoder, model.decoder)
    )
    before, after = next((own.window_sides for own in _attentions(model.encoder) if own.window_sides), (1, 1))
    encoder["sliding_window"] = before + after - 1
    eyes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    eyes |= {"num_attention_heads": 1, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    whole = {"text_config": encoder, "vision_config": eyes, "mm_tokens_per_image": 4}
    return {**_two(model, ids, tied="all"), "encoder": whole, "decoder": decoder}


def modernbert(model: ResolvedModel, ids: Ids) -> dict[str, Any]:
    stack = _stack(model, model.encoder, ids)
    stack["norm_eps"] = stack.pop("rms_norm_eps")
    kinds = _kinds(model.encoder)
    return {
        **{key: value for key, value in stack.items() if key not in ("head_dim", "num_key_value_heads")},
        "layer_types": kinds["layer_types"],
        "local_attention": max(1, 2 * (kinds["sliding_window"] - 1)),
        "hidden_activation": _activation(model.encoder),
        "rope_parameters": _two_ropes(model.encoder),
        "decoder_bias": model.output.bias,
        "cls_token_id": ids.begin,
        "sep_token_id": ids.end,
        **_tied(model),
    }


# --- what they share -----------------------------------------------------------------------------------------------


def _stack(model: ResolvedModel, layers: Sequence[Layer], ids: Ids) -> dict[str, Any]:
    own = _attentions(layers)[0]
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": model.d_model,
        "intermediate_size": _feed_forward(layers).d_ff,
        "num_hidden_layers": len(layers),
        "num_attention_heads": own.heads,
        "num_key_value_heads": own.kv_heads,
        "head_dim": own.head_dim,
        "rms_norm_eps": model.norm.eps,
        **ids.named,
    }


def _of_gemma(model: ResolvedModel, layers: Sequence[Layer], ids: Ids) -> dict[str, Any]:
    own = _attentions(layers)[0]
    return {
        **_stack(model, layers, ids),
        **_kinds(layers),
        "hidden_activation": _activation(layers),
        "rope_parameters": _rope(own),
        "query_pre_attn_scalar": own.head_dim if own.scale is None else round(own.scale**-2),
        "attn_logit_softcapping": own.softcap,
        "final_logit_softcapping": model.output.softcap,
    }


def _kinds(layers: Sequence[Layer]) -> dict[str, Any]:
    windows = [own.window for own in _attentions(layers)]
    kinds = [GLOBAL if window is None else LOCAL for window in windows]
    return {"layer_types": kinds, "sliding_window": next(filter(None, windows), 4096)}


def _two(model: ResolvedModel, ids: Ids, tied: str) -> dict[str, Any]:
    ends = {**ids.named, "decoder_start_token_id": ids.begin, "is_encoder_decoder": True}
    return {"vocab_size": model.vocabulary, "tie_word_embeddings": model.tie_embeddings == tied, **ends}


def _tied(model: ResolvedModel) -> dict[str, bool]:
    return {"tie_word_embeddings": model.tie_embeddings == "all"}


def _attentions(layers: Sequence[Layer]) -> list[ResolvedAttention]:
    return [own for layer in layers if (own := layer.self_attention) is not None]


def _activation(layers: Sequence[Layer]) -> str:
    ours = {name: theirs for theirs, name in reversed(ACTIVATIONS.items())}
    return ours.get(_feed_forward(layers).activation, "silu")


def _feed_forward(layers: Sequence[Layer]) -> FeedForwardConfig:
    network = layers[0].feed_forward
    assert network is not None
    return network


def _rope(own: ResolvedAttention) -> dict[str, Any]:
    linear = {"rope_type": "linear", "factor": own.rope_factor}
    turned = linear if own.rope_factor != 1 else {"rope_type": "default"}
    return {"rope_theta": own.rope_theta or 10_000.0, **turned}


def _two_ropes(layers: Sequence[Layer]) -> dict[str, Any]:
    """Those of the first global and the first local layer, or of the first where there is only one kind."""
    found = {kind: _rope(_attentions(layers)[0]) for kind in (GLOBAL, LOCAL)}
    for own in reversed(_attentions(layers)):
        found[GLOBAL if own.window is None else LOCAL] = _rope(own)
    return found

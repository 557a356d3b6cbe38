"""config.json of a resolved model for transformers: one function per architecture, the inverses of `from_config.py`.

Each writes the nearest config of its architecture, whatever the model. Reading it back shows what is different.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.huggingface.source_config import ACTIVATIONS, GLOBAL, LOCAL, ROPE, UNGATED
from lit_llm.models.layer import Layer
from lit_llm.models.resolved import ResolvedModel


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


def qwen2(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    return qwen3(model, tokens)


def mistral(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    return {**llama(model, tokens), "sliding_window": _attentions(model.decoder)[0].window}


def olmo2(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    return llama(model, tokens)


def gemma2(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    return {**_of_gemma(model, model.decoder, tokens), **_tied(model)}


def gemma3(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    own = {"rope_parameters": _two_ropes(model.decoder), "attn_logit_softcapping": None}
    return {**gemma2(model, tokens), **own}


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


def t5(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    """Keys of the config.json of a T5.

    `tie_word_embeddings: false` means that outputs are not scaled; the file shows by itself if it has an output matrix.
    """
    attention, network = _attentions(model.decoder)[0], _feed_forward(model.decoder)
    projections = {UNGATED[name]: name for name in UNGATED} | {ACTIVATIONS[name]: f"gated-{name}" for name in UNGATED}
    projections["geglu_tanh"] = "gated-gelu"  # T5's class takes this for the approximation
    return {
        "vocab_size": model.vocabulary,
        "d_model": model.d_model,
        "d_kv": attention.head_dim,
        "d_ff": network.d_ff,
        "num_layers": len(model.encoder),
        "num_decoder_layers": len(model.decoder),
        "num_heads": attention.heads,
        "relative_attention_num_buckets": attention.relative_buckets or 32,
        "relative_attention_max_distance": attention.relative_distance or 128,
        "layer_norm_epsilon": model.norm.eps,
        "feed_forward_proj": projections.get(network.activation, "relu"),
        "tie_word_embeddings": False,
        **tokens.keys,
        "decoder_start_token_id": tokens.begin,
        "is_encoder_decoder": True,
    }


def decllm(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    return {**_of_paper(model, tokens), **_auto_map("DecLLMConfig", "AutoModelForCausalLM", "DecLLMForCausalLM")}


def redllm(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    return {
        **_of_paper(model, tokens),
        "num_encoder_layers": len(model.encoder),
        "is_encoder_decoder": True,
        "decoder_start_token_id": tokens.begin,
        **_auto_map("RedLLMConfig", "AutoModelForSeq2SeqLM", "RedLLMForConditionalGeneration"),
    }


# --- what they share -----------------------------------------------------------------------------------------------


CODE = "modeling_lit_llm.py"
"""File of this package that an export of DecLLM or RedLLM takes along: transformers has no such architecture."""


def _auto_map(config: str, auto_class: str, model: str) -> dict[str, Any]:
    """Where `trust_remote_code=True` finds the classes."""
    module = CODE.removesuffix(".py")
    return {"auto_map": {"AutoConfig": f"{module}.{config}", auto_class: f"{module}.{model}"}}


def _of_paper(model: ResolvedModel, tokens: SpecialTokens) -> dict[str, Any]:
    attention = _attentions(model.decoder)[0]
    return {
        **_stack(model, model.decoder, tokens),
        **_tied(model),
        "rope_theta": attention.rope_theta or 10_000.0,
        "attention_output_norm": attention.output_norm == "head",
    }


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
    scaling: dict[str, Any] = {"rope_type": "default"}
    if attention.rope_factor != 1:
        scaling = {"rope_type": attention.rope_scaling, "factor": attention.rope_factor}
    if attention.rope_scaling == "llama3":
        scaling |= {key: ROPE[key] for key in ("low_freq_factor", "high_freq_factor")}
    if attention.rope_original_length is not None:
        scaling["original_max_position_embeddings"] = attention.rope_original_length
    return {"rope_theta": attention.rope_theta or 10_000.0, **scaling}


def _two_ropes(layers: Sequence[Layer]) -> dict[str, Any]:
    """Ropes of the first global and the first local layer, or of the first layer where there is only one kind."""
    ropes = {kind: _rope(_attentions(layers)[0]) for kind in (GLOBAL, LOCAL)}
    for attention in reversed(_attentions(layers)):
        ropes[GLOBAL if attention.window is None else LOCAL] = _rope(attention)
    return ropes

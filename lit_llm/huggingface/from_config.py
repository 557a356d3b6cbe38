"""Sections of our `model` from transformers' config objects: one function per architecture.

A causal window of w sees the query and w - 1 tokens before it, here as there. The functions of T5Gemma, T5Gemma 2 and
ModernBERT say what their encoders' windows see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lit_llm.huggingface.source_config import ACTIVATIONS, GLOBAL, LOCAL, UNGATED, stacks_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# --- one function per architecture ---------------------------------------------------------------------------------


def llama(config: PreTrainedConfig) -> dict[str, Any]:
    return _decoder_only(config)


def qwen3(config: PreTrainedConfig) -> dict[str, Any]:
    """Llama with norms on queries and keys, and windows."""
    section = _decoder_only(config)
    section["attention"] |= _qk_norms(config)
    return section


def qwen2(config: PreTrainedConfig) -> dict[str, Any]:
    """Llama with biases on queries, keys and values, and windows."""
    section = _decoder_only(config)
    section["attention"]["qkv_bias"] = ["q", "k", "v"]
    return section


def mistral(config: PreTrainedConfig) -> dict[str, Any]:
    """Llama with a window in every layer, or in none."""
    section = _decoder_only(config)
    if config.sliding_window is not None:
        section["attention"]["window"] = config.sliding_window
    return section


def olmo2(config: PreTrainedConfig) -> dict[str, Any]:
    """Llama with norms of what each part adds, and of the queries, and of the keys, of all heads together."""
    section = _decoder_only(config)
    section["norm"] = _rms_norm(config, "output")
    section["attention"] |= {**_qk_norms(config), "qkv_norm_over": "concat"}
    return section


def gemma2(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_decoder_only(config), "norm": _rms_norm(config, "sandwich"), "embedding": {"scaled": True}}


def gemma3(config: PreTrainedConfig) -> dict[str, Any]:
    """Gemma 2 with norms on queries and keys, without capped scores, and with another theta in local layers."""
    section = gemma2(config)
    section["attention"] |= _qk_norms(config)
    return section


def t5gemma(config: PreTrainedConfig) -> dict[str, Any]:
    """Gemma 2 twice. The encoder sees the tokens up to w away; cross-attention has neither RoPE nor a window."""
    encoder, decoder = stacks_of(config).values()
    section = _encoder_decoder(encoder, decoder, {"window": (encoder.sliding_window or 0) + 1})
    section["tie_embeddings"] = "decoder" if config.tie_word_embeddings else "none"
    section["decoder"]["cross_attention"] = {"rope": "none", **section["decoder"].get("cross_attention", {})}
    return section


def t5gemma2(config: PreTrainedConfig) -> dict[str, Any]:
    """Gemma 3 twice, its text part. The encoder's window of w: itself and (w - 1) // 2 before, w // 2 after."""
    encoder, decoder = stacks_of(config).values()
    width = encoder.sliding_window or 1
    window = {"window": (width + 1) // 2, **({"window_right": width // 2 + 1} if width % 2 == 0 else {})}
    section = _encoder_decoder(encoder, decoder, window)
    section["tie_embeddings"] = _tied(config)
    section["attention"] |= _qk_norms(decoder)
    section["decoder"].pop("cross_attention", None)
    section["decoder"]["cross_attention_mode"] = "merged"
    section["decoder"]["self_attention"] = {"rope": "restart", **section["decoder"].get("self_attention", {})}
    return section


def modernbert(config: PreTrainedConfig) -> dict[str, Any]:
    """A local layer sees the tokens up to local_attention // 2 away."""
    norm = {"function": "layer_norm", "scale": True, "eps": config.norm_eps, "placement": "pre", "skip_first": True}
    return {
        "family": "encoder_only",
        "d_model": config.hidden_size,
        "vocabulary": config.vocab_size,
        "tie_embeddings": _tied(config),
        "norm": norm,
        "embedding": {"norm": True},
        "output": {"head": "dense", "bias": config.decoder_bias},
        "attention": _attention(config),
        "feed_forward": _feed_forward(config),
        "encoder": _layers(config, "attention", {"window": config.local_attention // 2 + 1}),
    }


def t5(config: PreTrainedConfig) -> dict[str, Any]:
    """T5 v1.1, Flan-T5, mT5 and UL2's checkpoint: scores are not scaled, and a stack's layers share a relative bias.

    Output and embedding are one matrix here; `Architecture.tied_by_file` says what an output matrix of a file changes.
    """
    activations = ACTIVATIONS if config.is_gated_act else UNGATED
    return {
        "family": "encoder_decoder",
        "d_model": config.d_model,
        "vocabulary": config.vocab_size,
        "tie_embeddings": "all",
        "norm": {"function": "rms_norm", "scale": True, "eps": config.layer_norm_epsilon, "placement": "pre"},
        "attention": {
            "heads": config.num_heads,
            "head_dim": config.d_kv,
            "qkv_norm": [],
            "output_norm": "none",
            "scale": 1.0,
            "rope": "none",
            "relative_bias": "shared",
            "relative_buckets": config.relative_attention_num_buckets,
            "relative_distance": config.relative_attention_max_distance,
        },
        "feed_forward": {"activation": activations[config.dense_act_fn], "d_ff": config.d_ff},
        "encoder": {"layers": config.num_layers},
        "decoder": {"layers": config.num_decoder_layers},
    }


def decllm(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_of_paper(config), "family": "decoder"}


def redllm(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_of_paper(config), "family": "encoder_decoder", "encoder": {"layers": config.num_encoder_layers}}


# --- what they share -----------------------------------------------------------------------------------------------


def _of_paper(config: PreTrainedConfig) -> dict[str, Any]:
    """What `modeling_lit_llm.py` computes in both families: norms without a scale, also on queries, keys and values."""
    return {
        "d_model": config.hidden_size,
        "vocabulary": config.vocab_size,
        "tie_embeddings": _tied(config),
        "norm": {"function": "rms_norm", "scale": False, "eps": config.rms_norm_eps},
        "attention": {
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "qkv_norm": ["q", "k", "v"],
            "output_norm": "head" if config.attention_output_norm else "none",
            "norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
        },
        "feed_forward": {"activation": "swiglu", "d_ff": config.intermediate_size},
        "decoder": {"layers": config.num_hidden_layers},
    }


def _decoder_only(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "family": "decoder",
        "d_model": config.hidden_size,
        "vocabulary": config.vocab_size,
        "tie_embeddings": _tied(config),
        "norm": _rms_norm(config, "pre"),
        **_output(config),
        "attention": _attention(config),
        "feed_forward": _feed_forward(config),
        "decoder": _layers(config, "self_attention", {"window": getattr(config, "sliding_window", None)}),
    }


def _encoder_decoder(
    encoder: PreTrainedConfig, decoder: PreTrainedConfig, encoder_window: Mapping[str, int]
) -> dict[str, Any]:
    """An encoder and a decoder of Gemma's kind: what they have in common is the model's, the rest stands in each."""
    attention, encoder_attention, decoder_attention = _split(_attention(encoder), _attention(decoder))
    feed_forward, encoder_feed_forward, _ = _split(_feed_forward(encoder), _feed_forward(decoder))
    encoder_section = _layers(encoder, "attention", encoder_window)
    if encoder.hidden_size != decoder.hidden_size:
        encoder_section["d_model"] = encoder.hidden_size
    if encoder_attention:
        encoder_section["attention"] = encoder_attention
    if encoder_feed_forward:
        encoder_section["feed_forward"] = encoder_feed_forward
    decoder_section = _layers(decoder, "self_attention", {"window": decoder.sliding_window})
    if decoder_attention:
        decoder_section |= {"self_attention": decoder_attention, "cross_attention": dict(decoder_attention)}
    return {
        "family": "encoder_decoder",
        "d_model": decoder.hidden_size,
        "vocabulary": decoder.vocab_size,
        "norm": _rms_norm(decoder, "sandwich"),
        "embedding": {"scaled": True},
        **_output(decoder),
        "attention": attention,
        "feed_forward": feed_forward,
        "encoder": encoder_section,
        "decoder": decoder_section,
    }


def _split(
    encoder: Mapping[str, Any], decoder: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(the default of both, what the encoder has instead, what the decoder has besides). An override can set a key
    and not unset it, so one that only one side has is no default."""
    default = {key: value for key, value in decoder.items() if key in encoder}
    instead = {key: value for key, value in encoder.items() if default.get(key) != value}
    return default, instead, {key: value for key, value in decoder.items() if key not in encoder}


def _attention(config: PreTrainedConfig, kind: str | None = None) -> dict[str, Any]:
    """Attention in layers of a kind; of the global layers when absent, or of the local ones where all are local."""
    kind = kind or (GLOBAL if GLOBAL in _layer_types(config) else LOCAL)
    rope = config.rope_parameters.get(kind, config.rope_parameters)
    scaling = rope.get("rope_type", "default")
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = {
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "head_dim": head_dim,
        "qkv_norm": [],
        "output_norm": "none",
        "rope_theta": rope["rope_theta"],
        "rope_factor": 1.0 if scaling == "default" else rope.get("factor", 1.0),
        "rope_scaling": "linear",
    }
    if scaling in ("llama3", "yarn"):
        attention |= {"rope_scaling": scaling, "rope_original_length": rope["original_max_position_embeddings"]}
    if getattr(config, "query_pre_attn_scalar", head_dim) != head_dim:
        attention["scale"] = config.query_pre_attn_scalar**-0.5
    if getattr(config, "attn_logit_softcapping", None) is not None:
        attention["softcap"] = config.attn_logit_softcapping
    return attention


def _qk_norms(config: PreTrainedConfig) -> dict[str, Any]:
    return {"qkv_norm": ["q", "k"], "qkv_norm_scale": True, "norm_eps": config.rms_norm_eps}


def _feed_forward(config: PreTrainedConfig) -> dict[str, Any]:
    activation = config.hidden_act if hasattr(config, "hidden_act") else config.hidden_activation
    return {"activation": ACTIVATIONS[activation], "d_ff": config.intermediate_size}


def _rms_norm(config: PreTrainedConfig, placement: str) -> dict[str, Any]:
    return {"function": "rms_norm", "scale": True, "eps": config.rms_norm_eps, "placement": placement}


def _output(config: PreTrainedConfig) -> dict[str, Any]:
    softcap = getattr(config, "final_logit_softcapping", None)
    return {} if softcap is None else {"output": {"softcap": softcap}}


def _tied(config: PreTrainedConfig) -> str:
    return "all" if config.tie_word_embeddings else "none"


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """The kind of each layer. Llama has no such key: its layers are all global."""
    kinds: list[str] = getattr(config, "layer_types", [GLOBAL] * config.num_hidden_layers)
    return kinds


def _layers(config: PreTrainedConfig, name: str, window: Mapping[str, int | None]) -> dict[str, Any]:
    """Keys of a stack: the number of layers, and the attention of local ones under `name` in ranges of layers."""
    kinds, attention = _layer_types(config), _attention(config)
    rope = {key: value for key, value in _attention(config, LOCAL).items() if value != attention[key]}
    local = layer_ranges([index for index, kind in enumerate(kinds) if kind == LOCAL])
    ranges = {"layer_ranges": {place: {name: {**window, **rope}} for place in local}} if local else {}
    return {"layers": len(kinds), **ranges}


def layer_ranges(layers: Sequence[int]) -> list[str]:
    """The fewest ranges that name these layers: `"1-5"`, or with a step, `"0-25/2"`. They do not overlap."""
    best: list[list[int]] = [[layer] for layer in layers]
    for step in range(1, max(layers, default=0) + 1):
        runs: list[list[int]] = []
        for layer in layers:
            previous = next((run for run in runs if run[-1] == layer - step), None)
            if previous is None:
                runs.append([layer])
            else:
                previous.append(layer)
        best = min(best, runs, key=len)
    return [_range(run) for run in best]


def _range(run: Sequence[int]) -> str:
    if len(run) == 1:
        return str(run[0])
    step = run[1] - run[0]
    return f"{run[0]}-{run[-1]}" + (f"/{step}" if step > 1 else "")

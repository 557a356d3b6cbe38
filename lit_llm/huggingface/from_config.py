"""A config.json of transformers as our `model` section: one function per architecture.

Where a key is left out, transformers takes its class's default (5.24), and so do these. Windows: a causal one of w sees
the query and w - 1 before it, as ours; what the encoders of T5Gemma, T5Gemma 2 and ModernBERT see is said below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_llm.huggingface.source_config import Asked

ACTIVATIONS = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "relu": "reglu",
    "sigmoid": "glu",
}
"""transformers' names of what stands on the gate, and ours of the whole."""
LLAMA: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3: dict[str, Any] = {
    **LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "head_dim": 128, "num_key_value_heads": 32,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
GEMMA2: dict[str, Any] = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip
T5GEMMA2: dict[str, Any] = {
    **GEMMA2, "vocab_size": 262208, "final_logit_softcapping": None, "attn_logit_softcapping": None,
    "sliding_window_pattern": 6,
}  # fmt: skip
MODERNBERT: dict[str, Any] = {
    "vocab_size": 50368, "hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22,
    "num_attention_heads": 12, "hidden_activation": "gelu", "norm_eps": 1e-5, "tie_word_embeddings": True,
    "local_attention": 128, "decoder_bias": True, "global_attn_every_n_layers": 3,
}  # fmt: skip
TWO_STACKS: dict[str, Any] = {"tie_word_embeddings": True}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


# --- one function per architecture ---------------------------------------------------------------------------------


def llama(asked: Asked) -> dict[str, Any]:
    stack = _stack(asked, [GLOBAL] * asked.size("num_hidden_layers"), "hidden_act")
    _whole_heads(asked)
    return _decoder_only(asked, stack)


def qwen3(asked: Asked) -> dict[str, Any]:
    """Llama with norms on queries and keys; with `use_sliding_window` the upper layers have a window."""
    layers, first = asked.size("num_hidden_layers"), asked.get("max_window_layers", int) or 0
    used = asked.get("use_sliding_window", bool)
    stack = _stack(asked, [LOCAL if used and i >= first else GLOBAL for i in range(layers)], "hidden_act")
    return _decoder_only(asked, _normed(stack))


def gemma2(asked: Asked) -> dict[str, Any]:
    stack = _stack(asked, _every(asked, 2), "hidden_activation")
    _whole_heads(asked)
    return _decoder_only(asked, stack, **_of_gemma())


def t5gemma(asked: Asked) -> dict[str, Any]:
    """Gemma 2 twice. The encoder sees the tokens up to w away; cross-attention has neither RoPE nor a window."""
    sides = [Asked(asked.get(side, dict) or {}, GEMMA2, asked.problems, side, _OF_STACKS) for side in _SIDES]
    encoder = _stack(sides[0], _every(sides[0], 2), "hidden_activation", lambda w: {"window": w + 1})
    decoder = _stack(sides[1], _every(sides[1], 2), "hidden_activation")
    tied = asked.get("tie_word_embeddings", bool)
    section = _both(sides, encoder, decoder, tie_embeddings="decoder" if tied else "none")
    section["decoder"]["cross_attention"] = {"rope": "none", **section["decoder"].get("cross_attention", {})}
    return section


def t5gemma2(asked: Asked) -> dict[str, Any]:
    """Gemma 3 twice, its text part. The encoder's window of w: itself and (w - 1) // 2 before, w // 2 after."""
    whole = Asked(asked.get("encoder", dict) or {}, {}, asked.problems, "encoder", f"{_OF_STACKS} {_OF_IMAGES}")
    text = whole.get("text_config", dict) or {}
    sides = [
        Asked(text, T5GEMMA2, asked.problems, "encoder.text_config", _OF_STACKS),
        Asked(asked.get("decoder", dict) or {}, T5GEMMA2, asked.problems, "decoder", _OF_STACKS),
    ]
    whole.finish()
    kinds = [_every(side, side.get("sliding_window_pattern", int)) for side in sides]
    encoder = _stack(
        sides[0],
        kinds[0],
        "hidden_activation",
        lambda w: {"window": (w + 1) // 2, **({"window_right": w // 2 + 1} if w % 2 == 0 else {})},
        nested=True,
    )
    decoder = _stack(sides[1], kinds[1], "hidden_activation", nested=True)
    for side in sides:
        side.must("attn_logit_softcapping")  # transformers reads it and applies none
    if encoder.d_model != decoder.d_model:
        sides[0].refuse("hidden_size", f"{encoder.d_model} is not the decoder's {decoder.d_model}")
    tied = asked.get("tie_word_embeddings", bool)
    section = _both(sides, _normed(encoder), _normed(decoder), tie_embeddings="all" if tied else "none")
    section["decoder"].pop("cross_attention", None)
    section["decoder"] |= {"cross_attention_mode": "merged"}
    section["decoder"]["self_attention"] = {"rope": "restart", **section["decoder"].get("self_attention", {})}
    return section


def modernbert(asked: Asked) -> dict[str, Any]:
    """A local layer sees the tokens up to local_attention // 2 away."""
    for key in ("norm_bias", "classifier_bias"):
        asked.must(key, False)
    asked.must("classifier_activation", "gelu")
    asked.must("position_embedding_type", "absolute", "rope")  # written and not read
    layers, every = asked.size("num_hidden_layers"), asked.get("global_attn_every_n_layers", int) or 1
    window_sides = asked.size("local_attention") // 2 + 1
    stack = _stack(
        asked,
        [LOCAL if i % every else GLOBAL for i in range(layers)],
        "hidden_activation",
        lambda _: {"window": window_sides},
        nested=True,
        eps="norm_eps",
    )
    _whole_heads(asked)
    return {
        "family": "encoder_only",
        "d_model": stack.d_model,
        "vocabulary": asked.size("vocab_size"),
        "tie_embeddings": "all" if asked.get("tie_word_embeddings", bool) else "none",
        "norm": {"function": "layer_norm", "scale": True, "eps": stack.eps, "placement": "pre", "skip_first": True},
        "embedding": {"norm": True},
        "output": {"head": "dense", "bias": bool(asked.get("decoder_bias", bool))},
        "attention": stack.attention,
        "feed_forward": stack.feed_forward,
        "encoder": {"layers": stack.layers, **_ranges_of(stack, "attention")},
    }


# --- what they share -----------------------------------------------------------------------------------------------

_SIDES = ("encoder", "decoder")
_OF_STACKS = "cross_attention_hidden_size tie_word_embeddings"
_OF_IMAGES = "vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index"


@dataclass(frozen=True)
class _Stack:
    """What a config.json says about a stack of layers, in our words."""

    layers: int
    d_model: int
    eps: float
    attention: dict[str, Any]
    feed_forward: dict[str, Any]
    local: Sequence[int]
    """Layers with a window."""
    in_local: dict[str, Any]
    """What is different in their attention."""
    output_softcap: float | None


def _every(asked: Asked, pattern: int) -> list[str]:
    """Every `pattern`th layer is global, the others have a window: unless `layer_types` says otherwise."""
    layers = asked.size("num_hidden_layers")
    return [LOCAL if pattern and (i + 1) % pattern else GLOBAL for i in range(layers)]


def _stack(
    asked: Asked,
    kinds: list[str],
    activation: str,
    window: Callable[[int], dict[str, int]] = lambda w: {"window": w},
    nested: bool = False,
    eps: str = "rms_norm_eps",
) -> _Stack:
    """kinds: of the layers, where the file does not say; window: what a `sliding_window` is in our words; nested:
    whether local and global layers have rotations of their own."""
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        asked.must(key, False)
    d_model, heads = asked.size("hidden_size"), asked.size("num_attention_heads")
    head_dim = asked.get("head_dim", int) or d_model // heads
    kinds = asked.get("layer_types", list) or kinds
    if len(kinds) != asked.size("num_hidden_layers") or any(kind not in (LOCAL, GLOBAL) for kind in kinds):
        asked.refuse("layer_types", f"should name each of the layers {LOCAL} or {GLOBAL}")
    local = [index for index, kind in enumerate(kinds) if kind == LOCAL]
    width = asked.get("sliding_window", int)
    if local and not width and "local_attention" not in asked.defaults:
        asked.refuse("sliding_window", "is missing, and there are layers with a window")
    act = asked.get(activation, str)
    asked.must("hidden_act", act)  # old files of Gemma have both
    if act not in ACTIVATIONS:
        asked.refuse(activation, f"{act!r} is not supported; only {', '.join(ACTIVATIONS)}")
    attention: dict[str, Any] = {
        "heads": heads,
        "kv_heads": asked.get("num_key_value_heads", int) or heads,
        "head_dim": head_dim,
        "qkv_norm": [],
        "output_norm": "none",
    }
    turned = _rope(asked, GLOBAL, nested), _rope(asked, LOCAL, nested)
    attention |= turned[0] if len(local) < len(kinds) else turned[1]
    scalar, softcap = asked.number("query_pre_attn_scalar"), asked.number("attn_logit_softcapping")
    if scalar and scalar != head_dim:
        attention["scale"] = scalar**-0.5
    if softcap:
        attention["softcap"] = softcap
    other = {key: value for key, value in turned[1].items() if attention[key] != value}
    return _Stack(
        layers=len(kinds),
        d_model=d_model,
        eps=asked.number(eps) or 1e-6,
        attention=attention,
        feed_forward={"activation": ACTIVATIONS.get(act, "swiglu"), "d_ff": asked.size("intermediate_size")},
        local=local,
        in_local={**window(width or 1), **other} if local else {},
        output_softcap=asked.number("final_logit_softcapping"),
    )


def _rope(asked: Asked, kind: str, nested: bool) -> dict[str, float]:
    """The rotation of a kind of layers. `rope_parameters` is transformers 5's; before there were a theta of each kind
    under names of their own, and `rope_scaling`, which in Gemma 3 is for the global layers."""
    whole = asked.get("rope_parameters", dict) or {}
    at = f"{asked.at}.rope_parameters".lstrip(".")
    if nested:
        kinds = Asked(whole, {}, asked.problems, at, f"{LOCAL} {GLOBAL}")
        kinds.finish()
        whole, at = kinds.get(kind, dict) or {}, f"{at}.{kind}"
    bert = "local_attention" in asked.defaults
    old = {GLOBAL: "global_rope_theta", LOCAL: "local_rope_theta"} if bert else {LOCAL: "rope_local_base_freq"}
    usual = (160_000.0 if bert else 1_000_000.0) if nested and kind == GLOBAL else 10_000.0
    theta = asked.number(old.get(kind, "rope_theta") if nested else "rope_theta")
    scaling = asked.get("rope_scaling", dict) or {}
    applies = kind == GLOBAL or bert or not nested
    given = Asked({**whole, **(scaling if applies else {})}, {}, asked.problems, at)
    given.must("partial_rotary_factor", 1)
    how = given.get("rope_type", str) or given.get("type", str) or "default"
    given.get("type")
    if how not in ("default", "linear"):
        given.refuse("rope_type", f"{how!r} is not supported; only 'default' and 'linear'")
        return {"rope_theta": usual, "rope_factor": 1.0}
    factor = given.number("factor")
    given_theta = given.number("rope_theta")
    given.finish()
    return {"rope_theta": given_theta or theta or usual, "rope_factor": (factor or 1.0) if how == "linear" else 1.0}


def _whole_heads(asked: Asked) -> None:
    """transformers refuses what follows, even with a head_dim."""
    d_model, heads = asked.size("hidden_size"), asked.size("num_attention_heads")
    if d_model % heads:
        asked.refuse("num_attention_heads", f"{heads} heads do not divide hidden_size {d_model}")


def _normed(stack: _Stack) -> _Stack:
    """With norms on queries and keys."""
    return _Stack(
        **{
            **vars(stack),
            "attention": {**stack.attention, "qkv_norm": ["q", "k"], "qkv_norm_scale": True, "norm_eps": stack.eps},
        }
    )


def _of_gemma() -> dict[str, Any]:
    return {"placement": "sandwich", "embedding": {"scaled": True}}


def _decoder_only(asked: Asked, stack: _Stack, placement: str = "pre", **rest: Any) -> dict[str, Any]:
    return {
        "family": "decoder",
        "d_model": stack.d_model,
        "vocabulary": asked.size("vocab_size"),
        "tie_embeddings": "all" if asked.get("tie_word_embeddings", bool) else "none",
        "norm": {"function": "rms_norm", "scale": True, "eps": stack.eps, "placement": placement},
        **rest,
        **({"output": {"softcap": stack.output_softcap}} if stack.output_softcap else {}),
        "attention": stack.attention,
        "feed_forward": stack.feed_forward,
        "decoder": {"layers": stack.layers, **_ranges_of(stack, "self_attention")},
    }


def _both(sides: Sequence[Asked], encoder: _Stack, decoder: _Stack, **rest: Any) -> dict[str, Any]:
    """An encoder and a decoder of Gemma's kind: what they have in common is the model's, the rest of each its own."""
    for side in sides:
        _whole_heads(side)
        side.get("final_logit_softcapping")  # the decoder's alone is applied
    if sides[0].size("vocab_size") != sides[1].size("vocab_size"):
        sides[0].refuse("vocab_size", f"is not the decoder's {sides[1].size('vocab_size')}")
    if encoder.eps != decoder.eps:
        sides[0].refuse("rms_norm_eps", f"{encoder.eps} is not the decoder's {decoder.eps}; only one for both")
    for side in sides:
        side.finish()
    attention, of_encoder, of_decoder = _apart(encoder.attention, decoder.attention)
    feed_forward, own, none = _apart(encoder.feed_forward, decoder.feed_forward)
    assert not none  # all of its keys are there in both
    first: dict[str, Any] = {"layers": encoder.layers}
    if encoder.d_model != decoder.d_model:
        first["d_model"] = encoder.d_model
    first |= {key: value for key, value in (("attention", of_encoder), ("feed_forward", own)) if value}
    second: dict[str, Any] = {"layers": decoder.layers}
    if of_decoder:
        second |= {"self_attention": of_decoder, "cross_attention": dict(of_decoder)}
    return {
        "family": "encoder_decoder",
        "d_model": decoder.d_model,
        "vocabulary": sides[1].size("vocab_size"),
        **rest,
        "norm": {"function": "rms_norm", "scale": True, "eps": decoder.eps, "placement": "sandwich"},
        "embedding": {"scaled": True},
        **({"output": {"softcap": decoder.output_softcap}} if decoder.output_softcap else {}),
        "attention": attention,
        "feed_forward": feed_forward,
        "encoder": {**first, **_ranges_of(encoder, "attention")},
        "decoder": {**second, **_ranges_of(decoder, "self_attention")},
    }


def _apart(
    encoder: Mapping[str, Any], decoder: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(the default of both, what the encoder has instead, what the decoder has besides). An override can set a key
    and not unset it, so one that only one side has is no default."""
    default = {key: value for key, value in decoder.items() if key in encoder}
    first = {key: value for key, value in encoder.items() if default.get(key) != value}
    return default, first, {key: value for key, value in decoder.items() if key not in encoder}


def _ranges_of(stack: _Stack, name: str) -> dict[str, Any]:
    ranges = {place: {name: dict(stack.in_local)} for place in layer_ranges(stack.local)}
    return {"layer_ranges": ranges} if ranges else {}


def layer_ranges(layers: Sequence[int]) -> list[str]:
    """As few ranges as name these layers: `"1-5"`, or with a step, `"0-25/2"`. They do not overlap."""
    best: list[list[int]] = [[layer] for layer in layers]
    for step in range(1, max(layers, default=0) + 1):
        runs: list[list[int]] = []
        for layer in layers:
            going = next((run for run in runs if run[-1] == layer - step), None)
            if going is None:
                runs.append([layer])
            else:
                going.append(layer)
        best = min(best, runs, key=len)
    return [_range(run) for run in best]


def _range(run: Sequence[int]) -> str:
    if len(run) == 1:
        return str(run[0])
    step = run[1] - run[0]
    return f"{run[0]}-{run[-1]}" + (f"/{step}" if step > 1 else "")

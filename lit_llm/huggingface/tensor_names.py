"""Which tensors of transformers are which of ours: one table per architecture.

A table is {their name: ours}, several of ours where theirs holds them one under the other. Parts in curly brackets are
there for every layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from lit_llm.models.resolved import ResolvedModel

Names = dict[str, tuple[str, ...]]


def llama(model: ResolvedModel) -> Names:
    norms = {"self_attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
    return {
        "model.embed_tokens.weight": ("embedding.weight",),
        **_layers("model.", "decoder.", len(model.decoder), {**_norms(norms), **_self_attention(), **_mlp()}),
        "model.norm.weight": ("decoder.norm.scale",),
        **_output(model, "lm_head.weight"),
    }


def qwen3(model: ResolvedModel) -> Names:
    return {**llama(model), **_layers("model.", "decoder.", len(model.decoder), _qk_norms())}


def qwen2(model: ResolvedModel) -> Names:
    biases: Names = {f"self_attn.{part}_proj.bias": (f"self_attention.{part}.bias",) for part in "qkv"}
    return {**llama(model), **_layers("model.", "decoder.", len(model.decoder), biases)}


def olmo2(model: ResolvedModel) -> Names:
    norms = {
        "self_attention_post_norm": "post_attention_layernorm", "feed_forward_post_norm": "post_feedforward_layernorm"
    }  # fmt: skip
    parts = {**_norms(norms), **_self_attention(), **_qk_norms(), **_mlp()}
    return {
        "model.embed_tokens.weight": ("embedding.weight",),
        **_layers("model.", "decoder.", len(model.decoder), parts),
        "model.norm.weight": ("decoder.norm.scale",),
        **_output(model, "lm_head.weight"),
    }


def gemma2(model: ResolvedModel) -> Names:
    norms = {
        "self_attention_norm": "input_layernorm",
        "self_attention_post_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_post_norm": "post_feedforward_layernorm",
    }
    return {
        "model.embed_tokens.weight": ("embedding.weight",),
        **_layers("model.", "decoder.", len(model.decoder), {**_norms(norms), **_self_attention(), **_mlp()}),
        "model.norm.weight": ("decoder.norm.scale",),
        **_output(model, "lm_head.weight"),
    }


def gemma3(model: ResolvedModel) -> Names:
    return {**gemma2(model), **_layers("model.", "decoder.", len(model.decoder), _qk_norms())}


def t5gemma(model: ResolvedModel) -> Names:
    cross = {
        **_norms({"cross_attention_norm": "pre_cross_attn_layernorm"}),
        **_norms({"cross_attention_post_norm": "post_cross_attn_layernorm"}),
        **_projections("cross_attn", "cross_attention"),
    }
    return {
        "model.encoder.embed_tokens.weight": ("encoder_embedding.weight",),
        "model.decoder.embed_tokens.weight": ("embedding.weight",),
        **_gemma_stacks(model, cross),
        **_output(model, "lm_head.out_proj.weight"),
    }


def t5gemma2(model: ResolvedModel) -> Names:
    """Names as saved: in memory transformers calls the encoder's text part `encoder.text_model`."""
    apart = model.tie_embeddings == "none"
    inputs: Names = {
        "model.encoder.embed_tokens.weight": ("encoder_embedding.weight" if apart else "embedding.weight",)
    }
    if apart:
        inputs["model.decoder.embed_tokens.weight"] = ("embedding.weight",)
    both = _layers("model.encoder.", "encoder.", len(model.encoder), _qk_norms())
    both |= _layers("model.decoder.", "decoder.", len(model.decoder), _qk_norms())
    return {**inputs, **_gemma_stacks(model, {}), **both, **_output(model, "lm_head.out_proj.weight")}


def modernbert(model: ResolvedModel) -> Names:
    parts: Names = {
        "attn_norm.weight": ("self_attention_norm.scale",),
        "attn.Wqkv.weight": tuple(f"self_attention.{part}.weight" for part in "qkv"),
        "attn.Wo.weight": ("self_attention.out.weight",),
        "mlp_norm.weight": ("feed_forward_norm.scale",),
        # The activation stands on the first half.
        "mlp.Wi.weight": ("feed_forward.gate.weight", "feed_forward.up.weight"),
        "mlp.Wo.weight": ("feed_forward.down.weight",),
    }
    names = {
        "model.embeddings.tok_embeddings.weight": ("embedding.weight",),
        "model.embeddings.norm.weight": ("embedding_norm.scale",),
        **_layers("model.", "encoder.", len(model.encoder), parts),
        "model.final_norm.weight": ("encoder.norm.scale",),
        "head.dense.weight": ("head.dense.weight",),
        "head.norm.weight": ("head.norm.scale",),
        **({"decoder.bias": ("output_bias",)} if model.output.bias else {}),
        **_output(model, "decoder.weight"),
    }
    del names["model.layers.0.attn_norm.weight"]  # what it would normalise is normed
    return names


def t5(model: ResolvedModel) -> Names:
    """A block's layers are its parts: self-attention, in the decoder cross-attention, the feed-forward network."""
    stacks: Names = {}
    for side, layers in model.stacks:
        parts = {"self_attention": "SelfAttention", "feed_forward": "DenseReluDense"}
        if side == "decoder":
            parts = {"self_attention": "SelfAttention", "cross_attention": "EncDecAttention", **parts}
        network = layers[0].feed_forward
        for index in range(len(layers)):
            for place, (part, name) in enumerate(parts.items()):
                ours, theirs = f"{side}.layers.{index}.{part}", f"{side}.block.{index}.layer.{place}"
                stacks[f"{theirs}.layer_norm.weight"] = (f"{ours}_norm.scale",)
                inner = {"q": "q", "k": "k", "v": "v", "out": "o"}
                if part == "feed_forward":
                    gated = network is not None and network.gated
                    inner = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
                for matrix, their_matrix in inner.items():
                    stacks[f"{theirs}.{name}.{their_matrix}.weight"] = (f"{ours}.{matrix}.weight",)
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        stacks |= {bias: (f"{side}.relative_bias.weight",), f"{side}.final_layer_norm.weight": (f"{side}.norm.scale",)}
    return {"shared.weight": ("embedding.weight",), **stacks, **_output(model, "lm_head.weight")}


def decllm(model: ResolvedModel) -> Names:
    """Norms have no parameters."""
    return {
        "model.embed_tokens.weight": ("embedding.weight",),
        **_layers("model.", "decoder.", len(model.decoder), {**_self_attention(), **_mlp()}),
        **_output(model, "lm_head.weight"),
    }


def redllm(model: ResolvedModel) -> Names:
    parts = {**_self_attention(), **_mlp()}
    inputs: Names = {"decoder.embed_tokens.weight": ("embedding.weight",)}
    if model.tie_embeddings == "none":
        inputs["encoder.embed_tokens.weight"] = ("encoder_embedding.weight",)
    return {
        **inputs,
        **_layers("encoder.", "encoder.", len(model.encoder), parts),
        **_layers(
            "decoder.", "decoder.", len(model.decoder), {**parts, **_projections("cross_attn", "cross_attention")}
        ),
        **_output(model, "lm_head.weight"),
    }


# --- what they share -----------------------------------------------------------------------------------------------


def _layers(theirs: str, ours: str, layers: int, parts: Mapping[str, tuple[str, ...]]) -> Names:
    return {
        f"{theirs}layers.{layer}.{name}": tuple(f"{ours}layers.{layer}.{part}" for part in of)
        for layer in range(layers)
        for name, of in parts.items()
    }


def _norms(names: Mapping[str, str]) -> Names:
    return {f"{theirs}.weight": (f"{ours}.scale",) for ours, theirs in names.items()}


def _projections(theirs: str, ours: str) -> Names:
    return {
        **{f"{theirs}.{part}_proj.weight": (f"{ours}.{part}.weight",) for part in "qkv"},
        f"{theirs}.o_proj.weight": (f"{ours}.out.weight",),
    }


def _self_attention() -> Names:
    return _projections("self_attn", "self_attention")


def _qk_norms() -> Names:
    return {f"self_attn.{part}_norm.weight": (f"self_attention.qkv_scale.{part}",) for part in "qk"}


def _mlp() -> Names:
    return {f"mlp.{part}_proj.weight": (f"feed_forward.{part}.weight",) for part in ("gate", "up", "down")}


def _gemma_stacks(model: ResolvedModel, more: Names) -> Names:
    """The layers and last norms of T5Gemma's stacks; more: what else a layer of the decoder has."""
    norms = {
        "self_attention_norm": "pre_self_attn_layernorm",
        "self_attention_post_norm": "post_self_attn_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_post_norm": "post_feedforward_layernorm",
    }
    parts = {**_norms(norms), **_self_attention(), **_mlp()}
    return {
        **_layers("model.encoder.", "encoder.", len(model.encoder), parts),
        "model.encoder.norm.weight": ("encoder.norm.scale",),
        **_layers("model.decoder.", "decoder.", len(model.decoder), {**parts, **more}),
        "model.decoder.norm.weight": ("decoder.norm.scale",),
    }


def _output(model: ResolvedModel, name: str) -> Names:
    """The matrix before the logits, where it is one of its own."""
    return {name: ("output.weight",)} if model.tie_embeddings in ("none", "inputs") else {}

"""Our weights in the models of transformers: Llama, and Qwen3 with norms on queries and keys."""

from torch import nn

from tests.tiny_models import VOCABULARY

D, D_FF, HEADS, LAYERS, THETA = 32, 48, 4, 2, 5000.0


def with_random_scales(model):
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def as_llama(model):
    """Our state under transformers' names."""
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "decoder.norm.scale": "model.norm.weight",
    }
    parts = {
        "self_attention_norm.scale": "input_layernorm.weight",
        "feed_forward_norm.scale": "post_attention_layernorm.weight",
        "self_attention.out.weight": "self_attn.o_proj.weight",
        **{f"self_attention.{x}.weight": f"self_attn.{x}_proj.weight" for x in "qkv"},
        **{f"self_attention.{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
        **{f"self_attention.qkv_scale.{x}": f"self_attn.{x}_norm.weight" for x in "qk"},
        **{f"feed_forward.{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")},
    }
    for layer in range(LAYERS):
        names |= {f"decoder.layers.{layer}.{ours}": f"model.layers.{layer}.{theirs}" for ours, theirs in parts.items()}
    return {names[name]: tensor for name, tensor in model.state_dict().items()}


def loaded(peer, model):
    """The peer with our weights; every weight of either has found its place."""
    result = peer.load_state_dict(as_llama(model), strict=False)
    assert not result.unexpected_keys
    tied = {"lm_head.weight"} if peer.config.tie_word_embeddings else set()
    assert set(result.missing_keys) <= tied
    return peer.eval()


def peer_shape(kv_heads, eps, tied, head_dim):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": D,
        "intermediate_size": D_FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": eps,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    }

"""The same weights in a peer's model give the same logits: transformers' Llama and Qwen3, torch's nn.Transformer."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_llm.components.masks import AttentionMask
from tests.attending import inputs_of
from tests.peers import D_FF, HEADS, LAYERS, THETA, D, loaded, peer_shape, with_random_scales
from tests.tiny_models import VOCABULARY, build, ids


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_without_its_norms_decllm_is_a_llama(kv_heads, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    eps = 1e-3  # large enough that a forgotten one shows
    model = with_random_scales(
        build(
            "decllm",
            f"attention.kv_heads={kv_heads}",
            f"attention.rope_theta={THETA}",
            f"norm.eps={eps}",
            f"tie_embeddings={'all' if tied else 'none'}",
            double=False,
        )
    )
    peer = loaded(LlamaForCausalLM(LlamaConfig(**peer_shape(kv_heads, eps, tied, D // HEADS))), model)
    tokens = ids(2, 24)
    with torch.no_grad():
        assert_close(model(tokens), peer(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_with_scaled_norms_on_queries_and_keys_decllm_is_a_qwen3(tied):
    """head_dim 12 where d_model / heads is 8, as Qwen3 sets it apart too."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    eps = 1e-3
    model = with_random_scales(
        build(
            "decllm",
            "attention.kv_heads=2",
            "attention.head_dim=12",
            "attention.qkv_norm=[q, k]",
            "attention.qkv_norm_scale=true",
            f"attention.norm_eps={eps}",
            f"norm.eps={eps}",
            f"attention.rope_theta={THETA}",
            f"tie_embeddings={'all' if tied else 'none'}",
            double=False,
        )
    )
    peer = loaded(Qwen3ForCausalLM(Qwen3Config(**peer_shape(2, eps, tied, 12))), model)
    tokens = ids(2, 24)
    with torch.no_grad():
        assert_close(model(tokens), peer(tokens).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_with_parallel_parts_partial_rotation_and_biases_decllm_is_a_gpt_neox():
    """Its norms and its output matrix of attention have biases too, which are zero here."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    keys = ["norm.placement=parallel", "norm.function=layer_norm", "norm.eps=1e-3", "attention.rope_fraction=0.25"]
    keys += ["attention.qkv_bias=[q, k, v]", "feed_forward.bias=true", "feed_forward.activation=gelu"]
    ours = with_random_scales(build("decllm", *keys, f"attention.rope_theta={THETA}", double=False))
    rope = {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.25}
    shape = {"hidden_size": D, "intermediate_size": D_FF, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = GPTNeoXConfig(**shape, vocab_size=VOCABULARY, rope_parameters=rope, layer_norm_eps=1e-3, hidden_act="gelu")
    peer = GPTNeoXForCausalLM(config).eval()
    for parameter in peer.parameters():
        parameter.zero_()
    peer.gpt_neox.embed_in.weight.copy_(ours.embedding.weight)
    peer.get_output_embeddings().weight.copy_(ours.embedding.weight)
    peer.gpt_neox.final_layer_norm.weight.copy_(ours.decoder.norm.scale)
    for theirs, block in zip(peer.gpt_neox.layers, ours.decoder.layers, strict=True):
        attention, network = block.self_attention, block.feed_forward
        parts = [attention.q, attention.k, attention.v]
        matrices = torch.cat([part.weight.unflatten(0, (HEADS, -1)) for part in parts], dim=1)
        biases = torch.cat([part.bias.unflatten(0, (HEADS, -1)) for part in parts], dim=1)
        theirs.attention.query_key_value.weight.copy_(matrices.flatten(0, 1))
        theirs.attention.query_key_value.bias.copy_(biases.flatten())
        theirs.attention.dense.weight.copy_(attention.out.weight)
        for linear, mine in ((theirs.mlp.dense_h_to_4h, network.up), (theirs.mlp.dense_4h_to_h, network.down)):
            linear.weight.copy_(mine.weight)
            linear.bias.copy_(mine.bias)
        theirs.input_layernorm.weight.copy_(block.self_attention_norm.scale)
        theirs.post_attention_layernorm.weight.copy_(block.feed_forward_norm.scale)
    tokens = ids(2, 24)
    assert_close(ours(tokens), peer(tokens).logits, rtol=0, atol=1e-4)


def test_with_biases_on_queries_keys_and_values_decllm_is_a_qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    keys = ["attention.kv_heads=2", "attention.qkv_bias=[q, k, v]", f"attention.rope_theta={THETA}", "norm.eps=1e-3"]
    model = with_random_scales(build("decllm", *keys, double=False))
    peer = loaded(Qwen2ForCausalLM(Qwen2Config(**peer_shape(2, 1e-3, True, D // HEADS))), model)
    tokens = ids(2, 24)
    with torch.no_grad():
        assert_close(model(tokens), peer(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@torch.no_grad()
def test_gated_by_its_entries_and_rotated_in_part_an_attention_is_qwen3_nexts(fraction):
    """Its q_proj holds, head by head, the queries and the gate; its norms' scales count from one."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

    keys = ["attention.kv_heads=2", "attention.head_dim=16", "attention.qkv_norm=[q, k]", "attention.norm_eps=1e-3"]
    keys += [f"attention.rope_fraction={fraction}", f"attention.rope_theta={THETA}"]
    model = build("decllm", *keys, "attention.qkv_norm_scale=true", "attention.gate=per_element", double=False)
    ours = with_random_scales(model).decoder.layers[0].self_attention
    shape = peer_shape(2, 1e-3, True, 16)
    rope = {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": fraction}
    config = Qwen3NextConfig(**{**shape, "rope_parameters": rope})
    config._attn_implementation = "eager"
    peer = Qwen3NextAttention(config, 0).eval()
    by_head = [part.weight.unflatten(0, (HEADS, 16)) for part in (ours.q, ours.gate)]
    peer.q_proj.weight.copy_(torch.cat(by_head, dim=1).flatten(0, 1))
    for theirs, mine in ((peer.k_proj, ours.k), (peer.v_proj, ours.v), (peer.o_proj, ours.out)):
        theirs.weight.copy_(mine.weight)
    for theirs, part in ((peer.q_norm, "q"), (peer.k_norm, "k")):
        theirs.weight.copy_(ours.qkv_scale[part] - 1)
    x = torch.randn(2, 9, D)
    rotations = Qwen3NextRotaryEmbedding(config)(x, torch.arange(9)[None])
    wanted, _ = peer(x, rotations, torch.full((9, 9), -torch.inf).triu(1)[None, None])
    assert_close(ours(x, inputs_of(ours, x, AttentionMask(causal=True))), wanted, rtol=0, atol=1e-5)


def as_torch_layer(block, layer):
    """Copy one of our blocks into nn.TransformerEncoderLayer or nn.TransformerDecoderLayer."""
    attentions = [(layer.self_attn, block.self_attention)]
    norms = [block.self_attention_norm]
    if "cross_attention" in block.parts:
        attentions.append((layer.multihead_attn, block.cross_attention))
        norms.append(block.cross_attention_norm)
    for theirs, ours in attentions:
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
        theirs.out_proj.weight.copy_(ours.out.weight)
    for number, ours in enumerate([*norms, block.feed_forward_norm], start=1):
        getattr(layer, f"norm{number}").weight.copy_(ours.scale)
    layer.linear1.weight.copy_(block.feed_forward.up.weight)
    layer.linear2.weight.copy_(block.feed_forward.down.weight)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@torch.no_grad()
def test_without_positions_and_with_layer_norm_redllm_is_the_pre_norm_transformer_of_torch():
    """Encoder, cross-attention, final norms and source padding, all in one peer that shares no code with ours."""
    model = with_random_scales(
        build(
            "redllm", "attention.rope=none", "norm.function=layer_norm", "norm.eps=1e-3", "feed_forward.activation=gelu"
        )
    )
    options = {"dropout": 0.0, "activation": "gelu", "layer_norm_eps": 1e-3, "batch_first": True, "norm_first": True}
    peer = nn.Transformer(D, HEADS, LAYERS, LAYERS, D_FF, bias=False, **options).double().eval()
    for ours, theirs in ((model.encoder, peer.encoder), (model.decoder, peer.decoder)):
        theirs.norm.weight.copy_(ours.norm.scale)
        for block, layer in zip(ours.layers, theirs.layers, strict=True):
            as_torch_layer(block, layer)

    source, target, lengths = ids(3, 6), ids(3, 5), torch.tensor([6, 2, 4])
    embed, padding = model.embedding.weight, torch.arange(6) >= lengths[:, None]
    hidden = peer(
        embed[source],
        embed[target],
        tgt_mask=torch.ones(5, 5, dtype=torch.bool).triu(1),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    assert_close(model(source, target, source_lengths=lengths), hidden @ embed.T)


@pytest.mark.parametrize(("tie", "matrices"), [("all", 1), ("inputs", 2), ("none", 3)])
def test_tying_shares_the_matrices_that_it_names(tie, matrices):
    model = build("redllm", f"tie_embeddings={tie}")
    tables = [p for p in model.parameters() if p.shape == (VOCABULARY, D)]
    assert len(tables) == matrices
    source, target = ids(2, 6), ids(2, 5)
    before = model(source, target)
    output = model.unembedding.weight_VD
    encoder_input = model.embedding if model.encoder_embedding is None else model.encoder_embedding
    assert (output is model.embedding.weight) == (tie == "all")
    assert (encoder_input is model.embedding) == (tie != "none")
    with torch.no_grad():
        output *= 2  # in the last product alone it doubles the logits, in the inputs it does more
    assert (torch.allclose(model(source, target), 2 * before)) == (tie != "all")

"""The same weights in transformers' Llama generate the same tokens, cache beside cache."""

import pytest
import torch

from lit_llm.generation import generate
from tests.generation.recomputation import PROMPTS, VOCABULARY, build

NAMES = {
    "embedding.": "model.embed_tokens.",
    "output.": "lm_head.",
    "decoder.": "model.",
    "self_attention_norm.scale": "input_layernorm.weight",
    "feed_forward_norm.scale": "post_attention_layernorm.weight",
    "norm.scale": "norm.weight",
    "self_attention.out.": "self_attn.o_proj.",
    **{f"self_attention.{part}.": f"self_attn.{part}_proj." for part in "qkv"},
    **{f"feed_forward.{part}.": f"mlp.{part}_proj." for part in ("gate", "up", "down")},
}


def as_llama(model, kv_heads, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            rms_norm_eps=model.config.norm.eps,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if tied else set())
    return peer.double().eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_llama_generates_the_same_tokens_with_the_same_log_probabilities(kv_heads, tied):
    """Each prompt alone there, all in one batch here. The peer's angles are float32 too, rounded in another order."""
    model = build("decllm", f"attention.kv_heads={kv_heads}", f"tie_embeddings={'all' if tied else 'none'}")
    peer = as_llama(model, kv_heads, tied)
    found = generate(model, PROMPTS, max_new_tokens=40, stop=())
    for prompt, result in zip(PROMPTS, found, strict=True):
        theirs = peer.generate(
            torch.tensor([[1, *prompt]]),
            max_new_tokens=40,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert result.tokens == theirs.sequences[0, 1 + len(prompt) :].tolist()
        nats = torch.cat(theirs.logits).double().log_softmax(-1)[torch.arange(40), torch.tensor(result.tokens)]
        assert result.log_probabilities == pytest.approx(nats.tolist(), abs=1e-4)


def test_a_llama_stops_at_the_same_place():
    model = build("decllm")
    peer = as_llama(model, 4, True)
    free = generate(model, PROMPTS, max_new_tokens=20, stop=())
    stop = free[0].tokens[7]
    for prompt, result in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=20, stop=[stop]), strict=True):
        theirs = peer.generate(torch.tensor([[1, *prompt]]), max_new_tokens=20, do_sample=False, eos_token_id=stop)
        assert result.tokens + [stop] * result.stopped == theirs[0, 1 + len(prompt) :].tolist()

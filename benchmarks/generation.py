"""Greedy generation of a tiny decoder-only model with its cache: beside recomputation, and beside transformers' Llama.

    python benchmarks/generation.py [--turns 7] [--batch 8] [--prompt 64] [--new 64]

Same function (no norms on Q, K, V; scaled RMSNorm; tied embeddings), same weights, float32, one thread; the tokens are
checked to be the same. The contestants take turns, so that a busy machine slows all of them. `redllm` is the tiny
encoder-decoder on the same prompts; it has no peer here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_llm.experiment.load import load_experiment
from lit_llm.generation import generate
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel

BEGIN = 1
NAMES = {
    "embedding.": "model.embed_tokens.",
    "decoder.": "model.",
    "self_attention_norm.scale": "input_layernorm.weight",
    "feed_forward_norm.scale": "post_attention_layernorm.weight",
    "norm.scale": "norm.weight",
    "self_attention.out.": "self_attn.o_proj.",
    **{f"self_attention.{part}.": f"self_attn.{part}_proj." for part in "qkv"},
    **{f"feed_forward.{part}.": f"mlp.{part}_proj." for part in ("gate", "up", "down")},
}


def as_llama(model: LanguageModel) -> LlamaForCausalLM:
    """transformers' Llama with the weights of a model that is one."""
    shape, state = model.config, {}
    attention, network = shape.decoder[0].self_attention, shape.decoder[0].feed_forward
    assert attention is not None
    assert network is not None
    for name, tensor in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.d_model,
            intermediate_size=network.d_ff,
            num_hidden_layers=len(shape.decoder),
            num_attention_heads=attention.heads,
            rms_norm_eps=shape.norm.eps,
            tie_word_embeddings=True,
            bos_token_id=BEGIN,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return llama.eval()


@torch.inference_mode()
def without_cache(model: LanguageModel, tokens_BT: torch.Tensor, new: int) -> torch.Tensor:
    """Every token by a pass over all before it; of its logits only the last are computed."""
    for _ in range(new):
        last_BV = model.logits(model.hidden(tokens_BT)[:, -1])
        tokens_BT = torch.cat([tokens_BT, last_BV.argmax(-1, keepdim=True)], dim=1)
    return tokens_BT[:, -new:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("turns", 7), ("batch", 8), ("prompt", 64), ("new", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    batch, new = options.batch, options.new
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = load_experiment("decllm-tiny", ["model.attention.qkv_norm=[]", "model.norm.scale=true"])
    model, red = build_model(plain.model).eval(), build_model(load_experiment("redllm-tiny").model).eval()
    llama = as_llama(model)
    prompts_BT = torch.randint(2, plain.model.vocabulary, (batch, options.prompt))
    begun_BT = torch.cat([torch.full((batch, 1), BEGIN), prompts_BT], dim=1)

    def ours(model: LanguageModel) -> torch.Tensor:
        found = generate(model, prompts_BT.tolist(), max_new_tokens=new, stop=(), batch_size=batch)
        return torch.tensor([result.tokens for result in found])

    def theirs() -> torch.Tensor:
        everything: torch.Tensor = llama.generate(
            begun_BT, attention_mask=torch.ones_like(begun_BT), max_new_tokens=new, do_sample=False
        )
        return everything[:, -new:]

    contestants: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: ours(model),
        "ours_without_cache": lambda: without_cache(model, begun_BT, new),
        "llama": theirs,
        "redllm": lambda: ours(red),
    }
    wanted = theirs()
    assert torch.equal(ours(model), wanted)
    assert torch.equal(without_cache(model, begun_BT, new), wanted)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.turns + 1):
        for name, run in contestants.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {f"{name}_tokens_per_second": batch * new / value for name, value in medians.items()}
    ratios = {f"{name}_over_llama": value / medians["llama"] for name, value in medians.items() if name != "llama"}
    ratios["recomputation_over_cache"] = medians["ours_without_cache"] / medians["ours"]
    print(json.dumps({key: round(value, 3) for key, value in (found | ratios).items()}, indent=1))


if __name__ == "__main__":
    main()

"""A training step of a decoder-only model beside transformers' Llama of the same shape, eager.

    python benchmarks/step_time.py [--size small] [--precision bf16] [--threads 2] [--steps 40] [--heap]

Same function (no norms on Q, K, V; scaled RMSNorm; tied embeddings), same batch, same optimiser, same clipping; the two
take turns, so that a busy machine slows both. --heap: freed memory stays in the process, as in a run of lit-llm, for
both; without it a step of either takes the heap as it comes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_llm.components.loss.module import target_loss
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.training.heap import keep_freed_memory


class Size(NamedTuple):
    d_model: int
    layers: int
    heads: int
    d_ff: int
    vocabulary: int
    batch: int
    length: int


SIZES = {
    "tiny": Size(64, 2, 4, 176, 1024, 16, 128),
    "small": Size(256, 8, 4, 704, 8192, 4, 512),
    "base": Size(768, 12, 12, 2048, 8192, 4, 512),
}


def step_of(
    parameters: list[torch.nn.Parameter], precision: str, loss: Callable[[], torch.Tensor]
) -> Callable[[], float]:
    """A function that makes one optimiser step and returns its seconds."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--heap", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.heap:
        keep_freed_memory()
    size = SIZES[options.size]
    keys = {
        "d_model": size.d_model,
        "decoder.layers": size.layers,
        "attention.heads": size.heads,
        "feed_forward.d_ff": size.d_ff,
        "vocabulary": size.vocabulary,
    }
    shape = [f"model.{key}={value}" for key, value in keys.items()]
    experiment = load_experiment("decllm-tiny", [*shape, "model.attention.qkv_norm=[]", "model.norm.scale=true"])
    plain, normed = build_model(experiment.model), build_model(load_experiment("decllm-tiny", shape).model)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.d_model,
            intermediate_size=size.d_ff,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    assert sum(p.numel() for p in llama.parameters()) == sum(p.numel() for p in plain.parameters())
    tokens = torch.randint(size.vocabulary, (size.batch, size.length + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    places = torch.arange(targets.numel())

    def ours(model: LanguageModel) -> Callable[[], torch.Tensor]:
        return lambda: (
            target_loss(model.hidden(inputs), model.unembedding, (targets, places)).objective / targets.numel()
        )

    precision = options.precision
    contestants = {
        "ours": step_of(list(plain.parameters()), precision, ours(plain)),
        "llama": step_of(list(llama.parameters()), precision, lambda: llama(input_ids=inputs, labels=inputs).loss),
        "ours_with_qkv_norm": step_of(list(normed.parameters()), precision, ours(normed)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.steps + 5):
        for name, step in contestants.items():
            taken = step()
            if turn >= 5:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {f"{name}_ms": 1000 * value for name, value in medians.items()}
    ratios = {f"llama_over_{name}": medians["llama"] / value for name, value in medians.items() if name != "llama"}
    print(json.dumps({key: round(value, 3) for key, value in (found | ratios).items()}, indent=1))


if __name__ == "__main__":
    main()

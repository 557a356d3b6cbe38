"""A training step of a tiny decoder-only model beside transformers' Llama of the same shape, eager, one thread.

    python benchmarks/step_time.py [--steps 40]

Same function (no norms on Q, K, V; scaled RMSNorm; tied embeddings), same batch, same optimiser, same clipping; the two
take turns, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_llm.components.loss.module import target_loss
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel

BATCH, LENGTH = 16, 128


def step_of(parameters: list[torch.nn.Parameter], loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """A function that makes one optimiser step and returns its seconds."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step() -> float:
        began = time.perf_counter()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    experiment = load_experiment("decllm-tiny", ["model.attention.qkv_norm=[]", "model.norm.scale=true"])
    plain, normed = build_model(experiment.model), build_model(load_experiment("decllm-tiny").model)
    shape, layers = experiment.model, len(plain.config.decoder)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.d_model,
            intermediate_size=shape.feed_forward.d_ff,
            num_hidden_layers=layers,
            num_attention_heads=shape.attention.heads,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    assert sum(p.numel() for p in llama.parameters()) == sum(p.numel() for p in plain.parameters())
    tokens = torch.randint(shape.vocabulary, (BATCH, LENGTH + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    places = torch.arange(BATCH * LENGTH)

    def ours(model: LanguageModel) -> Callable[[], torch.Tensor]:
        return lambda: (
            target_loss(model.hidden(inputs), model.unembedding, (targets, places)).objective / targets.numel()
        )

    contestants = {
        "ours": step_of(list(plain.parameters()), ours(plain)),
        "llama": step_of(list(llama.parameters()), lambda: llama(input_ids=inputs, labels=inputs).loss),
        "ours_with_qkv_norm": step_of(list(normed.parameters()), ours(normed)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(steps + 5):
        for name, step in contestants.items():
            taken = step()
            if turn >= 5:
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    found = {f"{name}_ms": 1000 * value for name, value in medians.items()}
    ratios = {f"{name}_over_llama": value / medians["llama"] for name, value in medians.items() if name != "llama"}
    print(json.dumps({key: round(value, 3) for key, value in (found | ratios).items()}, indent=1))


if __name__ == "__main__":
    main()

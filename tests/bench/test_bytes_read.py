"""Bytes that a decoding step reads, against the tensors of a model and of its cache."""

from __future__ import annotations

import statistics

import pytest
import torch

from lit_llm.bench.entries import T5GEMMA, decoder, encoder_decoder, families
from lit_llm.bench.generation import bytes_per_step, compare_generation, decode_weights
from lit_llm.bench.settings import BenchSettings, Lengths
from lit_llm.generation import prefill
from lit_llm.models.build import build_model
from tests.bench.small_bench import CEILINGS, SIZE, small_settings

MODELS = [decoder(SIZE), encoder_decoder(SIZE), encoder_decoder(SIZE, T5GEMMA)]


def weights_read(model):
    """Matrices of a decoder, without those that only see the source, and the one before the logits."""
    of_source = ("cross_attention.k.weight", "cross_attention.v.weight")
    named = {name: tensor for name, tensor in model.named_parameters() if tensor.dim() > 1}
    return [
        tensor
        for name, tensor in named.items()
        if name == "embedding.weight" or (name.startswith("decoder.") and not name.endswith(of_source))
    ]


@pytest.mark.parametrize("model", MODELS, ids=["dec", "red", "t5gemma"])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_step_reads_its_matrices_and_the_cache_of_every_prompt(model, precision, dtype):
    prompts, lengths = 3, Lengths(7, 5)
    built = build_model(model).to(dtype).eval()
    tensors = weights_read(built)
    assert decode_weights(model) == sum(tensor.numel() for tensor in tensors)
    decoding, caches = prefill(built, [[5] * lengths.prompt] * prompts), []
    for _ in range(lengths.answer - 1):
        decoding.step(torch.full((prompts,), 7))
        caches.append(sum(decoding.cache_bytes()))
    settings = BenchSettings(prompts=prompts, precision=precision)
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert bytes_per_step(model, settings, lengths) == pytest.approx(held + statistics.fmean(caches))


def test_the_share_of_the_memory_is_bytes_over_seconds_over_its_speed(monkeypatch):
    settings, lengths = small_settings(monkeypatch, turns=3), Lengths(5, 4)
    entries = families(SIZE)
    compared = compare_generation("families", entries, ("red and dec", lengths), settings, "default")
    rows = {(row.contestant, row.quantity): row for row in compared.measured}
    for entry in entries:
        row = rows[entry.name, "token"]
        share = bytes_per_step(entry.model, settings, lengths) / row.value.median / CEILINGS.read_bytes
        assert row.of_machine == pytest.approx(share)
        assert rows[entry.name, "answer"].of_machine is None

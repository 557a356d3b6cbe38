"""Contestants that are compared compute the same: logits, loss, gradients and tokens of the same weights."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from lit_llm.bench.contestants import Contestant, begun
from lit_llm.bench.entries import (
    KINDS,
    LLAMA,
    SAME,
    Entry,
    available,
    build_ours,
    built,
    decoder,
    decoders,
    encoder_decoders,
    families,
    logits_apart,
)
from lit_llm.bench.generation import compare_generation
from lit_llm.bench.settings import SIZES, Lengths
from lit_llm.bench.training_step import compare_steps, random_text, step_flops
from lit_llm.models.cost import count_parameters
from tests.bench.small_bench import SIZE, small_settings

litgpt = pytest.param(
    "decoder",
    "litgpt",
    marks=pytest.mark.skipif(importlib.util.find_spec("litgpt") is None, reason="pip install --no-deps litgpt"),
)
PEERS = [("decoder", "Llama"), ("encoder-decoder", "T5Gemma"), litgpt]


def pair(kind: str, name: str) -> tuple[Contestant, Contestant]:
    """(ours, the peer with our weights), with scales of norms that are not one."""
    ours, peer = (entry for entry in KINDS[kind](SIZE) if entry.name in ("ours", name))
    baseline = ours.build(ours.model, None)
    generator = torch.Generator().manual_seed(3)
    for parameter in baseline.module.parameters():
        if parameter.dim() < 2:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return baseline, peer.build(peer.model, baseline.module.state_dict())


@pytest.mark.parametrize(("kind", "name"), PEERS)
def test_a_peer_has_our_logits_loss_and_gradient(kind: str, name: str) -> None:
    ours, peer = pair(kind, name)
    text = random_text(SIZE, kind != "decoder")
    expected, found = ours.logits(text), peer.logits(text)
    assert (expected - found).abs().max() < 1e-4
    assert logits_apart(ours, peer, text) < SAME
    losses = [contestant.loss(text) for contestant in (ours, peer)]
    torch.testing.assert_close(losses[1], losses[0])
    norms = []
    for contestant, loss in zip((ours, peer), losses, strict=True):
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in contestant.module.parameters()]))
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "name"), PEERS)
def test_a_peer_generates_our_tokens(kind: str, name: str) -> None:
    ours, peer = pair(kind, name)
    prompts_BP = torch.randint(2, SIZE.vocabulary, (3, 5), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = [each.generate(prompts_BP, 12).tolist() for each in (ours, peer)]
        assert found[0] == found[1]
        assert len(found[0]) == 3
        assert {len(tokens) for tokens in found[0]} == {12}
        peer.prefill(prompts_BP)  # leaves no cache that the next answer would go on from
        assert peer.generate(prompts_BP, 12).tolist() == found[0]


def test_prompts_begin_as_our_decoders_do() -> None:
    assert begun(torch.tensor([[7, 8], [5, 6]])).tolist() == [[1, 7, 8], [1, 5, 6]]


def test_a_peer_that_computes_something_else_is_left_out() -> None:
    ours = decoders(SIZE)[0]
    other = Entry("other", ours.model, lambda model, weights: build_ours(model))

    def scaled(model, weights):
        contestant = build_ours(model, weights)
        contestant.module.embedding.weight.data *= 1.01
        return contestant

    def broken(model, weights):
        contestant = build_ours(model, weights)
        contestant.module.embedding.weight.data[0] = float("nan")
        return contestant

    wrong, broken_one = Entry("wrong", ours.model, scaled), Entry("broken", ours.model, broken)
    contestants, lines = built([ours, other, wrong, broken_one], random_text(SIZE, False))
    assert [*contestants] == ["ours", "other"], "initial values depend on the seed alone, so these are the same"
    assert len(lines) == 2
    assert lines[0].startswith("without wrong: its logits of the same weights differ by ")
    assert lines[1] == "without broken: its logits of the same weights differ by nan"


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_red_and_dec_have_as_many_parameters_as_a_step_of_d_ff_allows(size: str) -> None:
    shape = SIZES[size]
    dec, red = (count_parameters(entry.model).total for entry in families(shape))
    step = shape.layers * 3 * shape.d_model * 8
    assert abs(dec - red) <= step / 2


@pytest.mark.parametrize("package", ["transformers", "litgpt"])
def test_a_missing_peer_is_one_line_with_what_installs_it(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    peers = [entry for entry in [*decoders(SIZE), *encoder_decoders(SIZE)] if entry.package in ("", package)]
    there, lines = available(peers)
    assert {entry.package for entry in there} == {""}
    command = {"transformers": "pip install -e '.[bench]'", "litgpt": "pip install --no-deps litgpt"}[package]
    assert len(lines) == sum(entry.package == package for entry in peers)
    assert all(f"of {package}: `{command}` installs it" in line for line in lines)


def test_without_peers_ours_are_still_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small_settings(monkeypatch)
    for package in ("transformers", "litgpt"):
        monkeypatch.setitem(sys.modules, package, None)
    trained = compare_steps(decoders(SIZE), "steps", settings, "default")
    answered = compare_generation("decode", encoder_decoders(SIZE), ("answers", Lengths(5, 4)), settings, "default")
    assert {row.contestant for row in trained.measured} == {"ours", "DecLLM"}
    assert {row.contestant for row in answered.measured} == {"ours", "RedLLM"}
    assert [len(trained.notes), len(answered.notes)] == [2, 1]
    assert trained.same == ()


def test_a_model_that_predicts_further_tokens_trains_them_and_has_no_peer() -> None:
    further, plain = (decoder(SIZE, [*LLAMA, *more]) for more in (["model.output.future_tokens=2"], []))
    there, lines = available([Entry(each.name, further, each.build, each.package) for each in decoders(SIZE)])
    assert {entry.package for entry in there} == {""}
    assert "it trains no layers for further tokens" in lines[0]
    ours, text = build_ours(further), random_text(SIZE, False)
    ours.module.train()
    loss = ours.loss(text)
    states = [ours.module.hidden(text.inputs_BT), *ours.module.decoder.take_future_states()]
    rows, columns = text.targets_BT.shape
    sums = [
        torch.nn.functional.cross_entropy(
            ours.module.logits(each[:, : columns - ahead]).flatten(0, 1),
            text.targets_BT[:, ahead:].flatten(),
            reduction="sum",
        )
        for ahead, each in enumerate(states)
    ]
    torch.testing.assert_close(loss, sum(sums) / (rows * columns))
    loss.backward()
    assert all(parameter.grad.any() for parameter in ours.module.parameters())
    assert step_flops(further, SIZE) > step_flops(plain, SIZE)

"""Short convolutions against torch's own: those of Canon layers (arXiv 2512.17351), and those of recurrent mixers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from lit_llm.components.attention.resolve import resolve_attention
from lit_llm.components.convolution.cache import ConvolutionStates
from lit_llm.components.convolution.module import ConvolutionInputs, ShortConvolution, neighbours_that_count
from lit_llm.components.convolution.resolved import Form
from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.components.forward_context import ForwardContext
from lit_llm.components.kv_cache import CacheLengths
from lit_llm.components.layer_part import build_part
from lit_llm.components.masks import AttentionMask
from lit_llm.components.part import Widths
from lit_llm.config.problems import InputError
from lit_llm.models.adapt import adaptation_of
from lit_llm.models.cost import Shape, count_parameters, forward_flops
from tests.tiny_models import build, config, ids, moved, other, resolved

D, T = 20, 9
ALL = ["attention.convolution=[input, qkv]", "feed_forward.convolution=[input, hidden]"]


def convolved(x_BTD: Tensor, weight_DK: Tensor, causal: bool) -> Tensor:
    """x plus torch's convolution of each entry: over 3 tokens before, or over 2 before and 1 after."""
    sides = (3, 0) if causal else (2, 1)
    padded_BDT = F.pad(x_BTD.transpose(1, 2), sides)
    return x_BTD + F.conv1d(padded_BDT, weight_DK[:, None], groups=len(weight_DK)).transpose(1, 2)


def input_of(causal: bool) -> tuple[Tensor, ForwardContext]:
    x_BTD = torch.randn(2, T, D, dtype=torch.float64)
    return x_BTD, ForwardContext(x_BTD, AttentionMask(causal=causal), {"self": torch.arange(T)})


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("places", [("input",), ("qkv",), ("input", "qkv")])
def test_an_attention_convolves_its_input_or_its_queries_keys_and_values(places: tuple[str, ...], causal: bool) -> None:
    settings = {"heads": 4, "kv_heads": 2, "head_dim": 6, "rope": "none", "convolution": places}
    module = randomised(build_part(resolve_attention(settings, D, "self"), Widths(D, D), causal))
    seen: list[Tensor] = []
    module.dot_product.register_forward_pre_hook(lambda _, given: seen.extend(given[:3]))
    x_BTD, context = input_of(causal)
    module(x_BTD, module.prepare(context, None))
    if "input" in places:
        x_BTD = convolved(x_BTD, module.convolution["input"].weight, causal)
    for part, heads_BHTK in zip("qkv", seen, strict=True):
        wanted_BTD = x_BTD @ getattr(module, part).weight.T
        if "qkv" in places:
            wanted_BTD = convolved(wanted_BTD, module.convolution[part].weight, causal)
        assert_close(heads_BHTK.transpose(1, 2).flatten(2), wanted_BTD)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("places", [("input",), ("hidden",), ("hidden", "input")])
def test_a_feed_forward_network_convolves_its_input_or_what_the_activation_reads(
    places: tuple[str, ...], activation: str, causal: bool
) -> None:
    settings = FeedForwardConfig.model_validate({"activation": activation, "d_ff": 12, "convolution": places})
    module = randomised(build_part(settings, Widths(D, D), causal))
    x_BTD, context = input_of(causal)
    found = module(x_BTD, module.prepare(context, None))
    if "input" in places:
        x_BTD = convolved(x_BTD, module.convolution["input"].weight, causal)

    def inner(name: str) -> Tensor:
        y_BTD = x_BTD @ getattr(module, name).weight.T
        return convolved(y_BTD, module.convolution[name].weight, causal) if "hidden" in places else y_BTD

    hidden = F.silu(inner("gate")) * inner("up") if activation == "swiglu" else inner("up").relu()
    assert_close(found, hidden @ module.down.weight.T)


def test_a_decoder_sees_no_later_token() -> None:
    model, tokens = build("decllm", *ALL), ids(2, T)
    assert moved(model(tokens), model(other(tokens, 5))).tolist() == [place >= 5 for place in range(T)]


@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_a_document_has_the_states_that_it_has_alone(side: str) -> None:
    tokens, documents = ids(2, T), torch.tensor([[0] * 4 + [1] * 5] * 2)
    model = build("redllm" if side == "encoder" else "decllm", *ALL)
    if side == "encoder":
        whole = model.encode(tokens, documents_BS=documents)
        parts = [model.encode(tokens[:, :4]), model.encode(tokens[:, 4:])]
    else:
        whole = model.hidden(tokens, documents_BT=documents)
        parts = [model.hidden(tokens[:, :4]), model.hidden(tokens[:, 4:])]
    # Rotations are of other positions, by numbers in float32.
    assert_close(whole, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-6)


def test_padding_of_a_source_is_not_read() -> None:
    model, tokens, lengths = build("redllm", *ALL), ids(3, T), torch.tensor([9, 4, 7])
    found = model.encode(tokens, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert_close(found[row, :length], model.encode(tokens[row : row + 1, :length])[0])


def test_parameters_are_those_of_the_built_module_and_flops_four_multiply_adds_for_each_entry() -> None:
    plain, with_all = resolved("redllm", "attention.kv_heads=2"), resolved("redllm", "attention.kv_heads=2", *ALL)
    built = sum(parameter.numel() for parameter in build("redllm", "attention.kv_heads=2", *ALL).parameters())
    assert count_parameters(with_all).total == built
    # Two layers of each stack: inputs of 32 twice; queries of 32, keys and values of 16; gate and up of 48.
    entries = 2 * (2 * 32 + 32 + 2 * 16 + 2 * 48)
    assert built - count_parameters(plain).total == 2 * 4 * entries
    shape = Shape(12, 7, 7)
    assert forward_flops(with_all, shape) - forward_flops(plain, shape) == 2 * 4 * entries * (12 + 7)


def test_an_adapted_encoder_has_new_convolutions_beside_taken_matrices() -> None:
    """Those of a decoder weigh tokens before, and those of an encoder tokens on both sides."""
    adaptation = adaptation_of(
        resolved("redllm", *ALL), dict.fromkeys(("encoder", "decoder"), resolved("decllm", *ALL))
    )
    new = {name for name in adaptation.newly_initialised if ".convolution." in name}
    assert new == {name for name in new if name.startswith("encoder.")}
    assert len(new) == 2 * (2 + 3 + 2)
    assert "encoder.layers.0.feed_forward.gate.weight" in adaptation.taken
    assert "decoder.layers.1.feed_forward.convolution.up.weight" in adaptation.taken


def test_the_order_of_places_does_not_matter() -> None:
    turned = ["attention.convolution=[qkv, input]", "feed_forward.convolution=[hidden, input]"]
    assert resolved("redllm", *turned) == resolved("redllm", *ALL)
    assert resolved("redllm", *ALL) != resolved("redllm")
    assert "convolution" not in str(resolved("redllm").model_dump())


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("redllm", ["decoder.cross_attention_mode=merged", ALL[0]], "a source has no neighbours in the row"),
        ("yoco", [ALL[1]], "runs for a prompt's last token alone"),
        ("decllm", ["decoder.experts=token_choice", ALL[1]], "the tokens of an expert are no neighbours"),
    ],
)
def test_it_is_refused_where_tokens_have_no_neighbours(family: str, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(family, *overrides)


# --- of recurrent mixers ----------------------------------------------------------------------------------------------

E, ROWS, TOKENS = 5, 2, 13


def before_a_recurrence(width: int) -> ShortConvolution:
    """swish(sum + bias), with parameters that are all special."""
    module = ShortConvolution(E, Form(width, residual=False, bias=True, swish=True))
    randomised(module)
    return module


def convolve(module: ShortConvolution, x_BTD: Tensor, runs_BT: Tensor | None = None) -> Tensor:
    out: Tensor = module(x_BTD, ConvolutionInputs(neighbours_that_count(module.form, runs_BT)), "x")
    return out


@pytest.mark.parametrize("width", [1, 4])
def test_before_a_recurrence_it_is_torchs_over_the_past(width: int) -> None:
    module, x_BTD = before_a_recurrence(width), torch.randn(ROWS, TOKENS, E, dtype=torch.float64)
    padded_BDT = F.pad(x_BTD.transpose(1, 2), (width - 1, 0))
    wanted_BDT = F.silu(F.conv1d(padded_BDT, module.weight[:, None], module.bias, groups=E))
    assert_close(convolve(module, x_BTD), wanted_BDT.transpose(1, 2))


def test_before_a_recurrence_it_sees_no_other_document() -> None:
    """Documents shorter than the filter among them, and a row that is shorter, too."""
    module, x_BTD = before_a_recurrence(4), torch.randn(1, TOKENS, E, dtype=torch.float64)
    borders = [0, 1, 3, 9, TOKENS]
    runs = torch.cat([torch.full((1, end - start), start) for start, end in pairwise(borders)], 1)
    alone = [convolve(module, x_BTD[:, start:end]) for start, end in pairwise(borders)]
    assert_close(convolve(module, x_BTD, runs), torch.cat(alone, dim=1))
    two = [convolve(module, x_BTD[:, :1]), convolve(module, x_BTD[:, 1:2])]
    assert_close(convolve(module, x_BTD[:, :2], runs[:, :2]), torch.cat(two, dim=1))


@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (9, 2)])
@pytest.mark.parametrize("width", [1, 4])
def test_it_goes_on_from_its_last_inputs(width: int, lengths: tuple[int, int]) -> None:
    module, x_BTD = before_a_recurrence(width), torch.randn(ROWS, TOKENS, E, dtype=torch.float64)
    inputs = ConvolutionInputs((None,) * width, ConvolutionStates(CacheLengths(lengths, x_BTD.device)))
    module(x_BTD[:, : max(lengths)], inputs, "x")
    for step in range(TOKENS - max(lengths)):
        new = torch.stack([x_BTD[row, length + step] for row, length in enumerate(lengths)])[:, None]
        wanted = torch.stack([convolve(module, x_BTD[row : row + 1])[0, n + step] for row, n in enumerate(lengths)])
        assert_close(module(new, inputs, "x"), wanted[:, None])


def test_a_document_number_that_comes_back_is_another_document() -> None:
    tokens, numbers = ids(2, T), torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0, 0]] * 2)
    model = build("decllm", *ALL, "attention.rope=none", "attention.window=1")
    apart = model.hidden(tokens, documents_BT=torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 2]] * 2))
    assert_close(model.hidden(tokens, documents_BT=numbers), apart)

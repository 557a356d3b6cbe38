"""A mixer and a feed-forward network that lit-llm does not know: it asks them what it asks all others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.generation import prefill
from lit_llm.models.build import build_model
from lit_llm.models.cost import Shape, cache_bytes, count_parameters, decode_flops, forward_flops
from lit_llm.models.layer import Layer
from lit_llm.models.parameters import parameter_shapes
from lit_llm.models.resolved import ResolvedModel
from lit_llm.training.config import TrainingConfig
from lit_llm.training.memory import activation_bytes
from lit_llm.training.optimizers.build import build_optimizer
from lit_llm.training.optimizers.config import Muon
from tests.outside.new_parts import LowRankFeedForward, MovingAverage
from tests.tiny_models import ids, resolved

AVERAGE, LOW_RANK = ("average", MovingAverage(channels=24)), ("low_rank", LowRankFeedForward(d_ff=40, rank=6))


def with_new_parts(family: str) -> ResolvedModel:
    """In the decoder: the first layer's mixer and the last one's feed-forward network are the new ones."""
    model = resolved(family)
    first, last = model.decoder
    first = Layer(parts=(AVERAGE, *first.parts[1:]))
    last = Layer(parts=(*last.parts[:-1], LOW_RANK))
    return model.model_copy(update={"decoder": (first, last)})


def inputs(family: str, rows: int = 2, tokens: int = 9) -> list[torch.Tensor]:
    return [ids(rows, tokens), ids(rows, 7)] if family == "redllm" else [ids(rows, tokens)]


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_names_shapes_and_number_of_parameters_are_those_of_the_built_model(family):
    model = with_new_parts(family)
    built = dict(build_model(model).named_parameters())
    assert parameter_shapes(model) == {name: tuple(parameter.shape) for name, parameter in built.items()}
    assert count_parameters(model).total == sum(parameter.numel() for parameter in built.values())


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_what_both_models_have_starts_from_the_same_values(family):
    plain, changed = (dict(build_model(m).named_parameters()) for m in (resolved(family), with_new_parts(family)))
    assert len(plain.keys() & changed.keys()) > 8
    for name in plain.keys() & changed.keys():
        assert torch.equal(plain[name], changed[name])


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_it_trains_and_its_matrices_are_muons(family):
    model = build_model(with_new_parts(family))
    muon = {id(p) for p in build_optimizer(Muon(), model).param_groups[0]["params"]}
    model(*inputs(family)).logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if "average" in name or "low_rank" in name:
            assert (id(parameter) in muon) == (parameter.dim() == 2), name


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_flops_are_those_of_torchs_counter(family):
    """One query over one key hides nothing behind a mask."""
    model, shape = with_new_parts(family), Shape(1, 1, 1) if family == "redllm" else Shape(0, 1, 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the fused kernel is not counted
        build_model(model)(*([ids(1, 1)] * (2 if family == "redllm" else 1)))
    assert forward_flops(model, shape) == counter.get_total_flops()
    assert decode_flops(model, 10, 5) > 0


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_decoding_is_the_forward_pass_and_keeps_the_bytes_that_are_counted(family):
    model = build_model(with_new_parts(family)).double().eval()
    prompts, chosen = [[5, 6, 7, 8], [9, 10]], [[11, 12, 13], [14, 15, 16]]
    decoding = prefill(model, prompts)
    for step in range(3):
        for row, prompt in enumerate(prompts):
            written = torch.tensor([[1, *prompt, *chosen[row][:step]]])
            if family == "redllm":
                whole = model(torch.tensor([prompt]), torch.tensor([[1, *chosen[row][:step]]]))
            else:
                whole = model(written)
            assert_close(decoding.logits_BV[row], whole[0, -1])
        counted = cache_bytes(model.config, 8)
        assert decoding.cache_bytes() == [counted.total(len(prompt), step + 1) for prompt in prompts]
        decoding.step(torch.tensor([row[step] for row in chosen]))
    decoding.keep([1])
    assert len(decoding.cache_bytes()) == 1


def test_documents_stand_alone_and_an_open_prefix_is_refused():
    config = with_new_parts("decllm")
    model = build_model(config).double().eval()
    tokens, documents = ids(1, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    alone = model(tokens[:, 3:])
    assert_close(model(tokens, documents_BT=documents)[:, 3:], alone)
    for opened in (3, torch.tensor([2])):
        with pytest.raises(ValueError, match="a moving average is causal: a token cannot see later ones"):
            model(tokens, prefix_length=opened)
    with pytest.raises(ValueError, match="a moving average is causal"):
        prefill(model, [[5, 6, 7]], prefix="bidirectional")


def test_memory_is_counted_by_what_its_matrices_make():
    """More channels, more bytes: 4 for each entry of what W_in and W_out make."""
    training = TrainingConfig(max_steps=1)

    def kept(channels: int) -> Any:
        model = with_new_parts("decllm")
        wider = Layer(parts=(("average", MovingAverage(channels=channels)), *model.decoder[0].parts[1:]))
        model = model.model_copy(update={"decoder": (wider, model.decoder[1])})
        return activation_bytes(model, training, Shape(0, 10, 10))

    assert kept(30) - kept(24) == 10 * 6 * 4

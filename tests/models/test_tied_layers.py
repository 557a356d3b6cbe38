"""An encoder made of the decoder's layers: judged by a model whose encoder has copies of their parameters."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.models.adapt import adaptation_of
from lit_llm.models.build import build_model
from lit_llm.models.cost import count_parameters
from lit_llm.models.parameters import parameter_shapes
from lit_llm.training.optimizers.build import build_optimizer
from lit_llm.training.optimizers.config import AdamW, Muon
from tests.tiny_models import build, config, ids, resolved

TIED = "tie_layers=true"
KEYS = ["attention.qkv_norm=[q, k]", "attention.qkv_norm_scale=true", "attention.kv_heads=2"]


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_it_computes_what_an_encoder_with_copies_of_the_decoders_parameters_does(placement: str) -> None:
    """And its gradients are the sums of those of both stacks."""
    keys = [*KEYS, f"norm.placement={placement}"]
    tied, untied = build("redllm", TIED, *keys), build("redllm", *keys)
    with torch.no_grad():
        for parameter in tied.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    state = untied.state_dict()
    for name in state:
        ours = name.replace("encoder.layers", "decoder.layers") if name.startswith("encoder.layers") else name
        state[name] = tied.state_dict()[ours]
    untied.load_state_dict(state)
    source, target = ids(2, 7), ids(2, 5)
    logits = tied(source, target), untied(source, target)
    assert_close(*logits)
    weights = torch.randn_like(logits[0])
    for each in logits:
        (each * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in untied.named_parameters()}
    for name, parameter in tied.named_parameters():
        encoders = gradients.get(name.replace("decoder.layers", "encoder.layers"))
        both = name.startswith("decoder.layers") and encoders is not None
        assert_close(parameter.grad, gradients[name] + encoders if both else gradients[name], msg=name)


def test_parameters_are_counted_saved_and_updated_once() -> None:
    model, shapes = build("redllm", TIED, *KEYS), parameter_shapes(resolved("redllm", TIED, *KEYS))
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert built == shapes
    assert model.state_dict().keys() == shapes.keys()
    assert not any(name.startswith("encoder.layers") for name in shapes)
    layers = [name for name in parameter_shapes(resolved("redllm", *KEYS)) if name.startswith("encoder.layers")]
    saved = count_parameters(resolved("redllm", *KEYS)).total - count_parameters(model.config).total
    assert saved == sum(torch.Size(shapes[name.replace("encoder", "decoder", 1)]).numel() for name in layers)
    for optimizer in (AdamW(), Muon()):
        made = build_optimizer(optimizer, model)
        updated = [id(parameter) for group in made.param_groups for parameter in group["params"]]
        assert sorted(updated) == sorted(id(parameter) for parameter in model.parameters())


def test_it_starts_with_the_parameters_of_a_decoder_alone() -> None:
    tied, decoder = build_model(config("redllm", TIED)).state_dict(), build_model(config("decllm")).state_dict()
    assert all(torch.equal(tied[name], value) for name, value in decoder.items())


def test_what_is_adapted_comes_from_the_decoders_source() -> None:
    adaptation = adaptation_of(resolved("redllm", TIED), dict.fromkeys(("encoder", "decoder"), resolved("decllm")))
    assert not adaptation.newly_initialised
    assert {name for name in adaptation.taken if name.startswith("encoder")} == {"encoder.norm.scale"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder.layers=3"], "has 3 layers and the decoder 2"),
        (["encoder.d_model=48", "tie_embeddings=decoder"], "is 48 wide"),
        (["encoder.attention.kv_heads=2"], "self_attention of layer 0 differs .*kv_heads"),
        (["decoder.layer_ranges.1.feed_forward.d_ff=64"], "feed_forward of layer 1 differs .*d_ff"),
        (["decoder.cross_attention_mode=merged"], "merged with cross-attention"),
        (["attention.relative_bias=shared"], "distances to later tokens"),
        (["decoder.self_attention.relative_bias=shared"], "distances to later tokens"),
        (["feed_forward.convolution=[hidden]"], "on both sides in an encoder"),
        (["encoder.experts=token_choice", "decoder.experts=token_choice"], "balanced within one stack"),
        (["encoder.gla={}", "decoder.gla={}"], "the gla of layer 0 .* both ways in an encoder"),
        (["encoder.experts=token_choice"], "layer 0 of the decoder has no experts"),
    ],
)
def test_stacks_that_cannot_be_one_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config("redllm", TIED, *overrides)


def test_devices_do_not_divide_it() -> None:
    """FSDP2 gathers a block's parameters for that block alone."""
    devices = ["pretrain.training.execution.devices=2", "pretrain.training.execution.strategy=fsdp"]
    with pytest.raises(InputError, match="strategy: ddp"):
        load_experiment("redllm-tiny", [f"model.{TIED}", *devices])


def test_a_model_without_it_does_not_name_it() -> None:
    assert "tie_layers" not in resolved("redllm").model_dump()

"""Mixture of experts: against transformers' blocks with the same weights, and against formulas written out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.components.experts.config import ExpertsConfig
from lit_llm.components.experts.module import Experts
from lit_llm.components.experts.resolved import ResolvedExperts, resolve_experts
from lit_llm.components.layer_part import build_part
from lit_llm.components.part import Defaults, Widths
from lit_llm.config.problems import InputError
from lit_llm.models.adapt import adaptation_of, adapted
from lit_llm.models.build import build_model
from lit_llm.models.cost import Shape, count_parameters, forward_flops, unused_train_flops
from lit_llm.objectives.collate import Batch, collate
from lit_llm.objectives.config import MasksConfig
from lit_llm.report.text import short
from lit_llm.studies.load import load_study
from lit_llm.training.balance import ExpertBalance, ExpertLoad
from tests.commands import lit_llm
from tests.tiny_models import VOCABULARY, build, config, resolved
from tests.training.rank_processes import Case, train

D, N = 16, 40
ENCODER, DECODER = "encoder.experts={count: 5, d_ff: 24}", "decoder.experts={count: 4, top_k: 3, shared_d_ff: 8}"


def resolved_experts(**keys: Any) -> ResolvedExperts:
    network = {"activation": "swiglu", "d_ff": 24, "bias": False, "convolution": ()}
    return resolve_experts(ExpertsConfig.model_validate(keys).model_dump(), Defaults({}, network, D))


def experts_of(**keys: Any) -> Experts:
    """A mixture in float64 with random weights."""
    torch.manual_seed(0)
    module = build_part(resolved_experts(**keys), Widths(D, D), causal=True).double()
    assert isinstance(module, Experts)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def peer_of(ours: Experts, kind: str) -> torch.nn.Module:
    """transformers' block with the same weights."""
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    keys = {"hidden_size": D, "num_experts_per_tok": ours.config.top_k, "hidden_act": "silu"}
    if kind == "mixtral":
        block: Any = MixtralSparseMoeBlock(
            MixtralConfig(**keys, intermediate_size=ours.config.d_ff, num_local_experts=ours.config.count)
        )
    else:
        block = Qwen3MoeSparseMoeBlock(
            Qwen3MoeConfig(
                **keys,
                moe_intermediate_size=ours.config.d_ff,
                num_experts=ours.config.count,
                norm_topk_prob=ours.config.normalised,
            )
        )
    block = block.double()
    inward = [torch.cat([expert.gate.weight, expert.up.weight]) for expert in ours.expert]
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.weight)
        block.experts.gate_up_proj.copy_(torch.stack(inward))
        block.experts.down_proj.copy_(torch.stack([expert.down.weight for expert in ours.expert]))
    return block


@pytest.mark.parametrize(("kind", "normalised"), [("mixtral", True), ("qwen3", True), ("qwen3", False)])
def test_transformers_computes_the_same_with_the_same_weights(kind: str, normalised: bool) -> None:
    """In its blocks the probabilities are float32, hence the bounds."""
    ours = experts_of(count=6, top_k=2, normalised=normalised, balance="none")
    theirs, x = peer_of(ours, kind), torch.randn(2, N // 2, D, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = ours(inputs[0]), theirs(inputs[1])
    assert_close(*outputs, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    assert_close(ours.router.weight.grad, theirs.gate.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("top_k", "normalised"), [(1, False), (3, True)])
def test_each_token_has_the_weighted_sum_of_its_most_probable_experts_and_of_the_shared_one(
    top_k: int, normalised: bool
) -> None:
    module = experts_of(count=5, top_k=top_k, normalised=normalised, shared_d_ff=12)
    x = torch.randn(1, N, D, dtype=torch.float64)
    rows = []
    for token in x[0]:
        probabilities = (module.router.weight.detach() @ token).softmax(0)
        best = sorted(range(5), key=lambda number: -float(probabilities[number]))[:top_k]
        total = sum(probabilities[number] for number in best) if normalised else 1.0
        weighted = [probabilities[number] / total * module.expert[number](token) for number in best]
        rows.append(sum(weighted) + module.shared(token))
    assert_close(module(x)[0], torch.stack(rows))


def test_an_expert_without_tokens_has_a_gradient_and_it_is_zero() -> None:
    """Devices that share a model wait for the gradients of all parameters."""
    module = experts_of(count=4, top_k=1, normalised=False, balance="bias", bias_rate=1.0)
    module.router.bias_steps.copy_(torch.tensor([0, 0, 9, 0]))
    module.train()(torch.randn(1, N, D, dtype=torch.float64)).sum().backward()
    for number, expert in enumerate(module.expert):
        for parameter in expert.parameters():
            assert bool(parameter.grad.any()) == (number == 2)


# --- balance -------------------------------------------------------------------------------------------------------


def uneven(rows: int = 3) -> Batch:
    """An encoder-decoder's batch with padding on both sides."""
    random = np.random.default_rng(0)
    sources, targets = ([random.integers(2, VOCABULARY, 2 + 3 * n + k) for n in range(rows)] for k in (0, 1))
    return collate(sources, targets, "encoder_decoder")


def balanced(batch: Batch, *overrides: str) -> tuple[Any, ExpertBalance, dict[int, Tensor]]:
    """(model, its balance after a forward pass, probabilities of each mixture)."""
    model = build("redllm", ENCODER, DECODER, *overrides).train()
    balance, seen = ExpertBalance(model), dict[int, Tensor]()
    for number, (_, experts) in enumerate(balance.layers):
        experts.router.register_forward_hook(
            lambda _, __, routing, number=number: seen.update({number: routing.probabilities_Nn.detach()})
        )
    balance.begin()
    model.hidden(**batch.inputs)
    return model, balance, seen


def test_the_loss_is_that_of_transformers_without_padding() -> None:
    """Summed over layers, where transformers joins them, and with shares that sum to one, where its sum to top_k."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    batch = uneven()
    _, balance, seen = balanced(batch)
    lengths = {"encoder": [2, 5, 8], "decoder": [3, 6, 9]}
    wanted = 0.0
    for number, (side, experts) in enumerate(balance.layers):
        width, top_k = max(lengths[side]), experts.config.top_k
        real = torch.tensor([[t < length for t in range(width)] for length in lengths[side]])
        logits = (seen[number].log(),)
        wanted += 0.01 * load_balancing_loss_func(logits, experts.config.count, top_k, real) / top_k
    assert sorted(side for side, _ in balance.layers) == ["decoder", "decoder", "encoder", "encoder"]
    assert_close(float(balance.loss(batch)), float(wanted) * 18, rtol=1e-5, atol=0)
    assert balance.take_choices(torch.device("cpu")).sum() == 2 * (15 * 2 + 18 * 3), "two layers of each stack"


def test_equal_shares_have_a_loss_of_the_weight_whatever_the_router_says() -> None:
    batch = uneven()
    _, balance, _ = balanced(batch, "decoder.experts.balance=none", "encoder.layers=1")
    experts = next(experts for side, experts in balance.layers if side == "encoder")
    routing = experts.routing
    assert routing is not None
    even = torch.arange(routing.chosen_Nk.numel()) % 5
    whole = Batch(
        {key: value for key, value in batch.inputs.items() if key != "source_lengths"},
        *(torch.ones_like(each) for each in (batch.targets, batch.weights)),
    )
    # 24 places with two choices each: five experts are chosen 9 or 10 times.
    experts.routing = routing._replace(chosen_Nk=even.view_as(routing.chosen_Nk))
    assert float(balance.loss(whole)) / whole.total == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ("encoder", [[1, 1, 0, 0], [1, 1, 1, 1]]),
        ("decoder", [[1, 1, 1, 0], [1, 1, 1, 1]]),
    ],
)
def test_padding_and_rows_that_do_not_count_are_not_read(case: str, wanted: list[list[int]]) -> None:
    rows = [np.arange(2, 2 + length) for length in (2, 4)], [np.arange(2, 2 + length) for length in (3, 4)]
    batch = collate(*rows, "encoder_decoder")
    assert batch.read_tokens(case).int().tolist() == wanted
    assert batch.share(0, 2).read_tokens(case).int().tolist() == wanted[:1]
    sources, targets = ([*side, side[1]] for side in rows)
    third = collate(sources, targets, "encoder_decoder").share(0, 2)
    assert third.read_tokens(case)[1].sum() == 0, "a copy that fills up a device's share"


def test_packed_rows_end_where_their_examples_do() -> None:
    from lit_llm.objectives.collate import collate_packed

    lengths = [(3, 2), (2, 2), (1, 6)]
    sources, targets = ([np.arange(2, 2 + pair[k]) for pair in lengths] for k in (0, 1))
    batch = collate_packed(sources, targets, "decoder", MasksConfig())
    assert batch.read_tokens("decoder").sum() == sum(map(sum, lengths))
    assert batch.read_tokens("decoder").numel() > sum(map(sum, lengths))


def test_biases_rise_for_experts_below_the_mean_and_move_the_choice_alone() -> None:
    """b_i + u sign(mean - c_i): arXiv 2408.15664, algorithm 1. The weights stay those of the probabilities."""
    model = build("decllm", "decoder.experts={count: 4, top_k: 1, normalised: false, balance: bias, bias_rate: 0.5}")
    balance = ExpertBalance(model)
    (_, first), (_, second) = balance.layers
    balance.step_biases([7.0, 3.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0])
    balance.step_biases([4.0, 2.0, 4.0, 2.0, 5.0, 5.0, 5.0, 5.0])
    assert first.router.bias_steps.tolist() == [-2, 1 - 1 + 1, 1 - 1, 2]
    assert second.router.bias_steps.tolist() == [0, 0, 0, 0]
    x = torch.randn(N, 32, dtype=torch.float64)
    probabilities = (x @ first.router.weight.T).softmax(-1)
    routing = first.router(x)
    wanted = (probabilities + 0.5 * torch.tensor([-2, 1, 0, 2])).argmax(-1, keepdim=True)
    assert torch.equal(routing.chosen_Nk, wanted)
    assert (wanted != probabilities.argmax(-1, keepdim=True)).any()
    assert_close(routing.weights_Nk, probabilities.gather(-1, wanted))


def test_the_load_is_that_of_the_least_equal_layer() -> None:
    balance = ExpertBalance(build("decllm", "decoder.experts={count: 4}"))
    assert balance.load([2.0, 2.0, 2.0, 2.0, 3.0, 1.0, 0.0, 0.0]) == ExpertLoad(
        0.75, pytest.approx((0.75 * np.log(4 / 3) + 0.25 * np.log(4)) / np.log(4))
    )
    assert ExpertBalance(build("decllm")).load([]) is None


# --- training --------------------------------------------------------------------------------------------------------

BIASED = Case(
    "biased",
    "redllm-tiny",
    (
        "model.encoder.experts={count: 4, balance: bias}",
        "model.decoder.experts={count: 3, top_k: 1, normalised: false}",
    ),
)


def test_a_resumed_training_has_the_biases_of_one_without_a_stop(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    wanted = train(BIASED, whole)
    assert train(BIASED, parts, stop_after=3) == ("interrupted", 3)
    resumed = train(BIASED, parts)
    for name, weight in wanted["weights"].items():
        assert (resumed["weights"][name] == weight).all(), name
    steps = [weight for name, weight in wanted["weights"].items() if name.endswith("router.bias_steps")]
    assert len(steps) == 2
    assert all(step.any() for step in steps)
    assert all(0.25 <= share <= 1 for share in wanted["busiest"])


def test_biases_are_kept_beside_master_weights(tmp_path: Path) -> None:
    weights = train(Case("masters", BIASED.preset, BIASED.model, {"precision": "bf16_master"}), tmp_path)["weights"]
    assert weights["encoder.layers.0.experts.router.bias_steps"].any()


# --- cost, adaptation, refusals --------------------------------------------------------------------------------------


def test_parameters_are_counted_in_all_and_for_one_token() -> None:
    model = resolved("redllm", ENCODER, DECODER)
    counted = count_parameters(model)
    assert counted.total == sum(parameter.numel() for parameter in build("redllm", ENCODER, DECODER).parameters())
    # Swiglu's three matrices of 32 x 24 and 32 x 48, in two layers of each stack.
    assert counted.total - counted.active == 2 * (3 * 3 * 32 * 24) + 2 * (1 * 3 * 32 * 48)


def test_flops_are_those_of_torchs_counter_for_the_experts_that_are_used() -> None:
    """Against a dense model: attention and output are the same, and the rest is the experts'."""
    counts = []
    for overrides in ([ENCODER, DECODER], []):
        model = build("redllm", *overrides)
        with FlopCounterMode(display=False) as counter:
            model(torch.ones(1, 12, dtype=torch.long), torch.ones(1, 9, dtype=torch.long))
        shape = Shape(12, 9, 9)
        counts.append((counter.get_total_flops(), forward_flops(resolved("redllm", *overrides), shape)))
    (measured, ours), (dense, dense_ours) = counts
    assert measured - dense == ours - dense_ours


def test_flops_of_all_experts_are_six_for_each_idle_matrix_entry_and_token() -> None:
    """Forward 2, backward 4: three experts of 3 x 32 x 24 in an encoder layer, one of 3 x 32 x 48 in a decoder's."""
    idle = 12 * 2 * (3 * 3 * 32 * 24) + 9 * 2 * (1 * 3 * 32 * 48)
    assert unused_train_flops(resolved("redllm", ENCODER, DECODER), Shape(12, 9, 9)) == 6 * idle
    assert unused_train_flops(resolved("redllm"), Shape(12, 9, 9)) == 0


def test_a_plan_prints_active_and_total_parameters_and_flops(write_study: Callable[..., Path]) -> None:
    """Parameters are counted from the modules; without biases an idle parameter would take 6 FLOPs a token."""
    arms = "arms: {dense: {}, mixed: {model: {decoder: {experts: {count: 5, top_k: 3, d_ff: 24, shared_d_ff: 8}}}}}"
    path = write_study("plan", arms, extends="decllm-tiny")
    model = build_model(load_study(path).arm("mixed").experiment.model)
    mixtures = [module for module in model.modules() if isinstance(module, Experts)]
    idle = sum(
        parameter.numel() for each in mixtures for expert in each.expert[3:] for parameter in expert.parameters()
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = {arm["name"]: arm for arm in json.loads(lit_llm("plan", path, "--json").stdout)["arms"]}
    assert (found["mixed"]["parameters"], found["mixed"]["active_parameters"]) == (parameters, parameters - idle)
    flops = found["mixed"]["flops_per_token"]
    assert idle > 0
    assert flops["train_all_experts"] - flops["train"] == pytest.approx(6 * idle)
    assert len({found["dense"]["flops_per_token"][key] for key in ("train", "train_all_experts")}) == 1
    printed = {line.split()[0]: line for line in lit_llm("plan", path).stdout.splitlines() if "k" in line}
    assert f"{short(parameters)} ({short(parameters - idle)} active)" in printed["mixed"]
    assert f"{short(flops['train'])} ({short(flops['train_all_experts'])} total)" in printed["mixed"]
    assert "(" not in printed["dense"]


def test_an_adapted_model_takes_whole_mixtures_and_their_biases() -> None:
    source, other = (resolved("decllm", f"decoder.experts={{count: {n}, balance: bias}}") for n in (4, 5))
    assert not any(".experts." in name for name in adaptation_of(other, {"decoder": source}).taken)
    target = resolved("redllm", *(f"{side}.experts={{count: 4, balance: bias}}" for side in ("encoder", "decoder")))
    adaptation = adaptation_of(target, {"encoder": source, "decoder": source})
    state = build("decllm", "decoder.experts={count: 4, balance: bias}").state_dict()
    state["decoder.layers.1.experts.router.bias_steps"] += torch.tensor([3, -1, 0, -2])
    values = adapted(adaptation, {"encoder": state, "decoder": state})
    model = build("redllm", *(f"{side}.experts={{count: 4, balance: bias}}" for side in ("encoder", "decoder")))
    model.load_state_dict(values, strict=False)
    for stack in (model.encoder, model.decoder):
        assert stack.layers[1].experts.router.bias_steps.tolist() == [3, -1, 0, -2]


@pytest.mark.parametrize(
    ("family", "override", "message"),
    [
        ("decllm", "decoder.experts={count: 2}", "each token would use all of them"),
        ("decllm", "decoder.experts={top_k: 1}", "write normalised: false"),
        ("yoco", "cross_decoder.experts=token_choice", "write experts in the self-decoder"),
        ("decllm", "decoder.experts={top_n: 2}", "top_k"),
    ],
)
def test_what_cannot_be_is_refused_with_the_next_step(family: str, override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(family, override)


def test_settings_without_effect_do_not_make_another_model() -> None:
    assert resolved_experts(balance="bias", balance_weight=1.0) == resolved_experts(balance="bias")
    assert resolved_experts(balance="loss", bias_rate=1.0) == resolved_experts()

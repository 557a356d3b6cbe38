"""Optimisers against their formulas and peers, schedules against theirs, state against its arithmetic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.parameters import embedding_shapes, parameter_shapes
from lit_llm.models.resolve import resolve_model
from lit_llm.training.config import TrainingConfig
from lit_llm.training.memory import state_bytes
from lit_llm.training.optimizers import adafactor, batches, muon
from lit_llm.training.optimizers.build import build_optimizer, set_learning_rate
from lit_llm.training.optimizers.config import Adafactor, AdamW, FactoredAdafactor, Muon, Optimizer
from lit_llm.training.schedules import Constant, Cosine, InverseSquareRoot, Linear, Schedule, WarmupStableDecay

ALL: list[Optimizer] = [AdamW(), AdamW(kind="adamw_8bit"), Adafactor(), FactoredAdafactor(), Muon()]
names = [config.kind for config in ALL]


def stepped(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, gradients: list[torch.Tensor]) -> torch.Tensor:
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def drawn(*shape: int, steps: int = 6) -> tuple[nn.Parameter, list[torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(shape) * 0.1), [torch.randn(shape) * 0.01 * (n + 1) for n in range(steps)]


@pytest.mark.parametrize("scale", [True, False])
def test_unfactored_adafactor_follows_its_formula(scale: bool) -> None:
    """Judge: the update of arXiv 1804.04235 (algorithm 4, with one second moment per entry), in numpy and float64."""
    parameter, gradients = drawn(5, 7)
    p, v = parameter.detach().double().numpy().copy(), np.zeros((5, 7))
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double().numpy()
        beta = 1 - t**-0.8
        v = beta * v + (1 - beta) * (g**2 + 1e-30)
        u = g / np.sqrt(v)
        u /= max(1.0, np.sqrt((u**2).mean()) / 1.0)
        step = 0.02 * (max(1e-3, np.sqrt((p**2).mean())) if scale else 1.0) * u
        p = p * (1 - 0.02 * 0.1) - step
    optimizer = adafactor.Adafactor([parameter], lr=0.02, parameter_scale=scale, weight_decay=0.1)
    assert_close(stepped(optimizer, parameter, gradients).double(), torch.from_numpy(p), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-8])
def test_factored_adafactor_follows_its_formula_however_small_the_gradients_are(size: float) -> None:
    """Judge: algorithm 4 of arXiv 1804.04235 with rows and columns of squares, in numpy and float64.

    A whole gradient of norm 1 has entries of 1e-4 in a model of 1e8 parameters: its squares are below float32's eps.
    """
    parameter, gradients = drawn(5, 7)
    gradients = [gradient * size for gradient in gradients]
    p, rows, columns = parameter.detach().double().numpy().copy(), np.zeros((5, 1)), np.zeros((1, 7))
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double().numpy()
        beta = 1 - t**-0.8
        rows = beta * rows + (1 - beta) * (g**2 + 1e-30).mean(axis=1, keepdims=True)
        columns = beta * columns + (1 - beta) * (g**2 + 1e-30).mean(axis=0, keepdims=True)
        u = g / np.sqrt(rows @ columns / rows.mean())
        u /= max(1.0, np.sqrt((u**2).mean()) / 2.0)
        step = max(1e-3, np.sqrt((p**2).mean())) * min(0.02, t**-0.5) * u
        p = p * (1 - 0.02 * 0.1) - step
    config = FactoredAdafactor(lr=0.02, weight_decay=0.1, clip_threshold=2.0)
    found = stepped(build_optimizer(config, nn.ParameterDict({"matrix": parameter})), parameter, gradients)
    assert_close(found.double(), torch.from_numpy(p), rtol=1e-5, atol=1e-7)


SHAPES = [(5, 7), (7, 5), (5, 7), (16, 1), (1, 9), (2, 3, 4), (6,), (1,)]


def pair(steps: int = 12) -> tuple[list[nn.Parameter], list[nn.Parameter], list[list[torch.Tensor | None]]]:
    """Equal parameters of several shapes for two optimisers, and their gradients in each step, some of them absent."""
    torch.manual_seed(1)
    ours = [nn.Parameter(torch.randn(shape) * 0.1) for shape in SHAPES]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    gradients: list[list[torch.Tensor | None]] = [
        [None if (step + number) % 5 == 4 else torch.randn(shape) * 0.03 for number, shape in enumerate(SHAPES)]
        for step in range(steps)
    ]
    return ours, theirs, gradients


def give(parameters: list[nn.Parameter], gradients: list[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()


@pytest.mark.parametrize("together", [1, 40, 10**9])
@pytest.mark.parametrize(("lr", "threshold"), [(0.5, 1.0), (0.01, 3.0)])
def test_factored_adafactor_is_torchs(
    monkeypatch: pytest.MonkeyPatch, together: int, lr: float, threshold: float
) -> None:
    """Judge: torch's Adafactor after each step. A rate of 0.5 is above 1 / sqrt(step) from the fifth step."""
    monkeypatch.setattr(batches, "MOST_ENTRIES", together)
    ours, theirs, gradients = pair()
    optimizer = adafactor.Adafactor(ours, lr=lr, clip_threshold=threshold, weight_decay=0.1, factored=True)
    peer = torch.optim.Adafactor(theirs, lr=lr, eps=(1e-15, 1e-3), d=threshold, weight_decay=0.1, foreach=False)
    for step in gradients:
        for parameters, each in ((ours, optimizer), (theirs, peer)):
            give(parameters, step)
            each.step()
        for found, wanted in zip(ours, theirs, strict=True):
            assert_close(found, wanted, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("factored", [True, False])
def test_adafactor_goes_on_from_a_saved_state(tmp_path: Path, factored: bool) -> None:
    whole, parts, gradients = pair()
    optimizer = adafactor.Adafactor(whole, lr=0.1, factored=factored)
    first, second = (adafactor.Adafactor(parts, lr=0.1, factored=factored) for _ in range(2))
    for number, step in enumerate(gradients):
        give(whole, step)
        optimizer.step()
        if number == 5:
            torch.save(first.state_dict(), tmp_path / "state")
            second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        give(parts, step)
        (first if number < 5 else second).step()
    for found, wanted in zip(parts, whole, strict=True):
        assert torch.equal(found, wanted)


def test_the_first_step_of_adafactor_is_the_sign_of_the_gradient() -> None:
    """b = 1 - 1^-0.8 = 0, so v = g² and u = sign(g)."""
    parameter, gradients = drawn(4, 4, steps=1)
    before = parameter.detach().clone()
    after = stepped(adafactor.Adafactor([parameter], lr=0.01, parameter_scale=False), parameter, gradients)
    assert_close(after, before - 0.01 * gradients[0].sign())


def test_muon_takes_the_matrices_of_a_shared_pair_as_those_of_the_layers() -> None:
    """As the arithmetic of memory does: all matrices but the vocabulary's."""
    model = build_model(load_experiment("yoco-tiny").model)
    inside = build_optimizer(Muon(), model).param_groups[0]["params"]
    shapes = parameter_shapes(model.config)
    matrices = [
        shape for name, shape in shapes.items() if len(shape) > 1 and name not in embedding_shapes(model.config)
    ]
    assert sorted(tuple(p.shape) for p in inside) == sorted(matrices)


def test_muon_orthogonalises_the_momentum_of_a_layers_matrices_only() -> None:
    """Judge: Newton-Schulz with the published coefficients (3.4445, -4.7750, 2.0315), five times, on g + 0.95 B."""
    model = build_model(load_experiment("decllm-tiny").model)
    optimizer = build_optimizer(Muon(lr=0.02), model)
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    name = "decoder.layers.0.feed_forward.up.weight"
    parameter = dict(model.named_parameters())[name]
    assert parameter.grad is not None
    x = (parameter.grad * (1 + 0.95)).T  # 256 x 64: the iteration is run on the wide side
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    wanted = before[name] - 0.02 * 0.2 * math.sqrt(256) * x.T
    assert_close(parameter.detach(), wanted, rtol=0, atol=0.02 * 0.2 * 16 * 0.01)  # torch iterates in bfloat16
    # The embedding is AdamW's: its first step is lr x sign(g), but for eps.
    embedding = model.embedding.weight
    assert embedding.grad is not None
    assert_close(embedding.detach(), before["embedding.weight"] - 1e-3 * embedding.grad.sign(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scaling", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torchs(scaling: Literal["match_rms_adamw", "original"], nesterov: bool) -> None:
    """Judge: torch's Muon after 5 steps, within a hundredth of a step: a product of several matrices may be summed in
    another order in bfloat16. Where it is not, both are equal to the bit."""
    torch.manual_seed(0)
    shapes = [(16, 16)] * 3 + [(8, 24), (24, 8), (24, 8), (600, 500)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    start = [parameter.detach().clone() for parameter in ours]
    optimizer = muon.Muon(ours, lr=0.02, momentum=0.9, nesterov=nesterov, scaling=scaling, weight_decay=0.1)
    peer = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, nesterov=nesterov, adjust_lr_fn=scaling, weight_decay=0.1)
    for _ in range(5):
        gradients = [torch.randn(shape) for shape in shapes]
        for parameters, each in ((ours, optimizer), (theirs, peer)):
            give(parameters, gradients)
            each.step()
    for found, wanted, before in zip(ours, theirs, start, strict=True):
        assert (found - wanted).norm() < 0.01 * (wanted - before).norm()


def test_eight_bits_follow_adamw_within_their_quantisation() -> None:
    """Judge: torch's AdamW on the same gradients; a step is off by a few percent of the rate at most."""
    ours, gradients = drawn(64, 128)
    theirs, _ = drawn(64, 128)
    start = ours.detach().clone()
    module = nn.ParameterDict({"matrix": ours})
    quantised = stepped(build_optimizer(AdamW(kind="adamw_8bit", lr=1e-3), module), ours, gradients)
    exact = stepped(torch.optim.AdamW([theirs], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0), theirs, gradients)
    moved, error = (exact - start).norm(), (quantised - exact).norm()
    assert 0 < error < 0.05 * moved


def test_adamw_is_torchs() -> None:
    ours, gradients = drawn(8, 8)
    theirs, _ = drawn(8, 8)
    config = AdamW(lr=1e-2, weight_decay=0.3, eps=1e-6, betas=(0.8, 0.99))
    found = stepped(build_optimizer(config, nn.ParameterDict({"matrix": ours})), ours, gradients)
    peer = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.3, eps=1e-6, betas=(0.8, 0.99), fused=False)
    assert_close(found, stepped(peer, theirs, gradients))


@pytest.mark.parametrize("config", ALL, ids=names)
def test_the_state_takes_the_bytes_of_the_plan(config: Optimizer) -> None:
    """What the plan counts beside parameters and gradients is what the optimiser holds after a step."""
    overrides = ["model.norm.scale=true", "model.tie_embeddings=none"]
    experiment = load_experiment("decllm-tiny", overrides)
    model, resolved = build_model(experiment.model), resolve_model(experiment.model)
    optimizer = build_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    parts = getattr(optimizer, "parts", (optimizer,))
    held = {id(v): v for part in parts for state in part.state.values() for v in state.values() if torch.is_tensor(v)}
    found = sum(v.numel() * v.element_size() for v in held.values() if v.numel() > 1)
    weights = 8 * sum(p.numel() for p in model.parameters())
    wanted = state_bytes(resolved, TrainingConfig(max_steps=1, optimizer=config)) - weights
    assert found == pytest.approx(wanted, rel=0.01, abs=2 * 4 * 256)  # the 8-bit code tables, once


@pytest.mark.parametrize("config", ALL, ids=names)
def test_every_group_follows_the_schedule_from_its_own_peak(config: Optimizer) -> None:
    optimizer = build_optimizer(config, build_model(load_experiment("decllm-tiny", ["model.norm.scale=true"]).model))
    peaks = [group["lr"] for group in optimizer.param_groups]
    assert set_learning_rate(optimizer.param_groups, 0.25) == config.lr * 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.25 * peak for peak in peaks]


def test_schedules_follow_their_formulas() -> None:
    """Warm-up (step + 1) / w; then each formula, whose progress is 0 after the warm-up and 1 in the last step."""
    cosine, linear = Cosine(warmup_steps=4, final_fraction=0.1), Linear(warmup_steps=4, final_fraction=0.2)
    for schedule in (cosine, linear):
        assert [schedule.factor(step, 15) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert [cosine.factor(step, 15) for step in (4, 9, 14)] == pytest.approx([1.0, 0.1 + 0.9 / 2, 0.1])
    assert [linear.factor(step, 15) for step in (4, 9, 14)] == pytest.approx([1.0, 0.6, 0.2])
    assert [Constant(warmup_steps=2).factor(step, 10) for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    wsd = WarmupStableDecay(warmup_steps=2, decay_steps=4)
    assert [wsd.factor(step, 13) for step in (0, 5, 8, 9, 12)] == pytest.approx(
        [0.5, 1, 1, 1 - math.sqrt(0.2), 1 - math.sqrt(0.8)]
    )
    straight = WarmupStableDecay(decay_steps=4, shape="linear", final_fraction=0.1)
    assert [straight.factor(step, 13) for step in (8, 10, 12)] == pytest.approx([1.0, 0.55, 0.1])
    root = InverseSquareRoot(warmup_steps=100)
    assert [root.factor(step, 10**6) for step in (99, 399, 9999)] == pytest.approx([1.0, 0.5, 0.1])


@pytest.mark.parametrize("warmup", [0, 1, 4, 10])
@pytest.mark.parametrize("max_steps", [10, 23])
@pytest.mark.parametrize(
    "schedule",
    [
        Constant(),
        Cosine(),
        Cosine(final_fraction=0),
        Linear(),
        Linear(final_fraction=0.2),
        WarmupStableDecay(decay_steps=3),
        WarmupStableDecay(decay_steps=10),
        WarmupStableDecay(decay_steps=5, shape="linear", final_fraction=0.1),
        InverseSquareRoot(warmup_steps=1),
    ],
    ids=lambda schedule: f"{schedule.kind}-{getattr(schedule, 'final_fraction', '')}",
)
def test_every_step_has_a_rate_above_zero_and_one_has_the_peak(schedule: Schedule, max_steps: int, warmup: int) -> None:
    """A step at rate zero is one that is paid for and does nothing; the last rate is what the schedule says is left."""
    if not isinstance(schedule, InverseSquareRoot):
        schedule = schedule.model_copy(update={"warmup_steps": warmup})
    if schedule.problem(max_steps):
        pytest.skip("does not fit")
    factors = [schedule.factor(step, max_steps) for step in range(max_steps)]
    assert min(factors) > 0
    assert max(factors) == 1.0
    top = factors.index(1.0)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    if getattr(schedule, "final_fraction", 0) > 0 and warmup < max_steps:
        assert factors[-1] == pytest.approx(schedule.final_fraction)


def test_a_scaled_schedule_fits_into_a_training_that_is_scaled_alike() -> None:
    for ratio in (0.01, 0.15, 0.5, 1.7):
        schedule = WarmupStableDecay(warmup_steps=15, decay_steps=85).scaled(ratio)
        assert schedule.problem(max(1, round(100 * ratio))) is None or schedule.decay_steps == 1
        assert InverseSquareRoot(warmup_steps=10).scaled(ratio).factor(0, 100) > 0


@pytest.mark.parametrize("kind", ["shared", "per_layer"])
def test_tables_of_relative_biases_are_stepped_by_adamw_and_begin_as_those_of_t5(kind: str) -> None:
    """T5 draws them from N(0, 1 / d_model); with 128 buckets of 4 heads the deviation is known to 10%."""
    overrides = [f"model.attention.relative_bias={kind}", "model.attention.relative_buckets=128"]
    overrides += ["model.attention.relative_distance=512", "model.attention.rope=none"]
    model = build_model(load_experiment("decllm-tiny", overrides).model)
    tables = {name: p for name, p in model.named_parameters() if "relative_bias" in name}
    assert tables
    optimizer = build_optimizer(Muon(weight_decay=0.1, adamw=AdamW(weight_decay=0.2)), model)
    for table in tables.values():
        group = next(g for g in optimizer.param_groups if any(p is table for p in g["params"]))
        assert group["weight_decay"] == 0.2
        assert float(table.detach().std()) == pytest.approx(model.config.d_model**-0.5, rel=0.2)

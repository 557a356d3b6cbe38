"""bfloat16 parameters with float32 masters: the masters are what a float32 optimiser would make of the gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from lit_llm.components.loss.module import target_loss
from lit_llm.components.norm.module import rms_norm
from lit_llm.config.problems import InputError
from lit_llm.data.prepare import open_prepared
from lit_llm.evaluation.likelihood import Validation
from lit_llm.experiment.cost import cost_of
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.models.resolve import resolve_model
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_config import load_stage_config
from lit_llm.store.store import Store
from lit_llm.training.config import TrainingConfig
from lit_llm.training.memory import state_bytes
from lit_llm.training.module import LitModel
from lit_llm.training.optimizers.build import build_optimizer, set_learning_rate
from lit_llm.training.optimizers.config import AdamW, Muon, Optimizer
from lit_llm.training.optimizers.master_weights import MasterWeights, masters_of
from tests.stages_in_parts import prepared_stage
from tests.training.test_optimizers import ALL, names
from tests.training.test_step import SMALL, fitted, uneven_batch

SCALED = [*SMALL, "model.norm.scale=true", "model.feed_forward.d_ff=512"]


def model_of(family: str = "decllm") -> LanguageModel:
    return build_model(load_experiment(f"{family}-tiny", SCALED).model)


def loss_of(model: LanguageModel, family: str = "decllm") -> torch.Tensor:
    batch = uneven_batch("decoder" if family == "decllm" else "encoder_decoder")
    losses = target_loss(model.hidden(**batch.inputs), model.unembedding, (batch.targets, batch.places))
    assert losses.nats.dtype == torch.float32
    return losses.objective / sum(batch.counts)


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_the_masters_follow_a_hand_written_loop(family: str) -> None:
    """Judge: torch's AdamW on float32 tensors, fed with the bfloat16 gradients at their roundings."""
    lit = LitModel(model_of(family), TrainingConfig.model_validate(
        {"max_steps": 8, "precision": "bf16_master", "clip_norm": None, "schedule": "constant"}
    ))  # fmt: skip
    optimizer = lit.configure_optimizers()
    set_learning_rate(optimizer.param_groups, 1.0)

    peer = model_of(family)
    masters = [p.detach().clone() for p in peer.parameters()]
    peer.bfloat16()
    adamw = torch.optim.AdamW(masters, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    for _ in range(5):
        loss_of(lit.model, family).backward()
        optimizer.step()
        optimizer.zero_grad()

        peer.zero_grad()
        loss_of(peer, family).backward()
        for parameter, master in zip(peer.parameters(), masters, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.bfloat16
            master.grad = parameter.grad.float()
        adamw.step()
        with torch.no_grad():
            for parameter, master in zip(peer.parameters(), masters, strict=True):
                parameter.copy_(master)
    for parameter, expected, master in zip(lit.model.parameters(), peer.parameters(), masters, strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, expected)
        assert not torch.equal(parameter.float(), master)
    lit.trained_model()
    for parameter, master in zip(lit.model.parameters(), masters, strict=True):
        assert torch.equal(parameter, master)


@pytest.mark.parametrize("config", ALL, ids=names)
def test_any_optimiser_steps_the_masters_as_it_steps_a_float32_model(config: Optimizer) -> None:
    """The same gradients, exactly representable in both; matrices of layers, embeddings and scales in their groups."""
    exact, rounded = model_of(), model_of()
    masters = masters_of(rounded)
    plain, wrapped = build_optimizer(config, exact), MasterWeights(rounded, masters, build_optimizer(config, masters))
    torch.manual_seed(0)
    for step in range(3):
        for optimizer in (plain, wrapped):
            set_learning_rate(optimizer.param_groups, 0.5 + step)
        for left, right in zip(exact.parameters(), rounded.parameters(), strict=True):
            right.grad = torch.randn_like(right)
            left.grad = right.grad.float()
        plain.step()
        wrapped.step()
    for left, right, master in zip(exact.parameters(), rounded.parameters(), masters.parameters(), strict=True):
        assert torch.equal(master, left)
        assert torch.equal(right, left.bfloat16())


@pytest.mark.parametrize("config", ALL, ids=names)
def test_a_loaded_state_goes_on_bit_for_bit_with_rates_that_still_follow_the_schedule(config: Optimizer) -> None:
    def start() -> tuple[LanguageModel, MasterWeights]:
        model = model_of()
        masters = masters_of(model)
        return model, MasterWeights(model, masters, build_optimizer(config, masters))

    def train(model: LanguageModel, optimizer: MasterWeights, steps: range) -> None:
        for step in steps:
            set_learning_rate(optimizer.param_groups, 1.0 / (1 + step))
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.set_num_threads(1)
    whole, whole_optimizer = start()
    train(whole, whole_optimizer, range(6))
    first, first_optimizer = start()
    train(first, first_optimizer, range(3))
    again, again_optimizer = start()
    again_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    train(again, again_optimizer, range(3, 6))
    for left, right in zip(whole_optimizer.masters, again_optimizer.masters, strict=True):
        assert torch.equal(left, right)
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_steps_below_the_last_bit_add_up() -> None:
    """1 - 2^-9 is a tie that rounds to 1 in bfloat16 (8 bits); a hundred steps of 1e-3 of it are 0.1 in float32."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    masters = masters_of(model)
    optimizer = MasterWeights(model, masters, torch.optim.SGD(masters.parameters(), lr=1e-3))
    for _ in range(100):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    assert masters.weight.item() == pytest.approx(0.9, abs=1e-5)
    assert model.weight.item() == pytest.approx(0.9, rel=2**-8)
    alone = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(100):
        alone -= 1e-3
    assert alone.item() == 1.0


def test_the_norm_is_taken_and_clipped_in_float32() -> None:
    """Judge: the norm of the bfloat16 gradients in float64; in bfloat16 it would be off by up to 2^-9."""

    def one_step(clip: float | None) -> tuple[LitModel, list[torch.Tensor]]:
        options = {"max_steps": 1, "precision": "bf16_master", "clip_norm": clip, "schedule": "constant"}
        lit, seen = LitModel(model_of(), TrainingConfig.model_validate(options)), []
        step = MasterWeights.step

        def look(self: MasterWeights, closure: Callable[[], object]) -> object:
            loss = closure()  # the forward and backward pass, and the clipping
            seen.extend(master.grad.clone() for master in self.masters if master.grad is not None)
            step(self, None)
            return loss

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MasterWeights, "step", look)
            fitted(lit, uneven_batch("decoder"))
        return lit, seen

    model = model_of().bfloat16()
    loss_of(model).backward()
    norm = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None).sqrt().item()
    free, gradients = one_step(None)
    assert free.report is not None
    assert free.report.grad_norm == pytest.approx(norm, rel=1e-5)
    assert {g.dtype for g in gradients} == {torch.float32}
    _, clipped = one_step(0.01)
    assert sum(g.double().square().sum() for g in clipped).sqrt().item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("config", ALL, ids=names)
def test_the_state_takes_the_bytes_of_the_plan(config: Optimizer) -> None:
    """Parameters and their gradients in bfloat16, masters and the optimiser's state, as they lie in memory."""
    experiment = load_experiment("decllm-tiny", ["model.norm.scale=true", "model.tie_embeddings=none"])
    model = build_model(experiment.model)
    masters = masters_of(model)
    optimizer = MasterWeights(model, masters, build_optimizer(config, masters))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    held = [t for p in model.parameters() for t in (p, p.grad)] + [*masters.parameters()]
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.parameters())
    parts = getattr(optimizer.stepper, "parts", (optimizer.stepper,))
    held += [v for part in parts for state in part.state.values() for v in state.values() if torch.is_tensor(v)]
    found = sum(t.numel() * t.element_size() for t in {id(t): t for t in held}.values() if t is not None)
    training = TrainingConfig(max_steps=1, optimizer=config, precision="bf16_master")
    assert found == pytest.approx(state_bytes(resolve_model(experiment.model), training), rel=0.01, abs=4096)


@pytest.mark.parametrize("preset", ["decllm-tiny", "redllm-tiny"])
def test_a_run_validates_probes_and_keeps_its_masters(tmp_path: Path, corpus: Path, preset: str) -> None:
    overrides = ["pretrain.training.precision=bf16_master", "pretrain.training.stability.logit_every=3"]
    stage = prepared_stage(Store(tmp_path), corpus, preset, *overrides)
    assert run_one(tmp_path, stage.fingerprint) == "done"
    result = stage.result()
    assert result is not None
    metrics = result["metrics"]
    assert metrics["val/target_nll"] < 5.0  # below log 258: it has learned
    assert 0 < metrics["stability/max_attention_logit"] <= 8**0.5 * 1.01  # unit-RMS queries and keys of 8 entries
    weights = load_file(stage.checkpoints / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())


def test_what_is_evaluated_last_is_what_is_saved(tmp_path: Path, corpus: Path) -> None:
    store = Store(tmp_path)
    as_many = "pretrain.validation.final_sequences=1"  # as during training
    stage = prepared_stage(store, corpus, "decllm-tiny", "pretrain.training.precision=bf16_master", as_many)
    assert run_one(tmp_path, stage.fingerprint) == "done"
    frozen = load_stage_config(stage)
    experiment, digest = frozen.experiment, frozen.data
    section, family = experiment.pretrain, experiment.model.family
    data = open_prepared(section.data, store.data, digest)
    model = build_model(experiment.model, experiment.seed).eval()
    model.load_state_dict(load_file(stage.checkpoints / "model.safetensors"))
    with torch.no_grad():
        found = Validation(section.validation, data, section.objective, family, section.masks)(model)
    result = stage.result()
    assert result is not None
    assert result["metrics"]["val/target_nll"] == pytest.approx(found["val/target_nll"], rel=1e-6)


def test_it_learns_what_float32_learns(tmp_path: Path, corpus: Path) -> None:
    """The same start and the same batches: after a few steps the validation losses differ by roundings only."""
    found = []
    for precision in ("fp32", "bf16_master"):
        stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny", f"pretrain.training.precision={precision}")
        assert run_one(tmp_path, stage.fingerprint) == "done"
        result = stage.result()
        assert result is not None
        found.append(result["metrics"]["val/target_nll"])
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_a_norm_of_bfloat16_is_summed_in_float32() -> None:
    """One rounding away from float32's; sums in bfloat16 of 4096 squares would be off by far more."""
    torch.manual_seed(0)
    x = (torch.randn(8, 4096) * 10).bfloat16()
    assert_close(rms_norm(x, None, 1e-6).float(), rms_norm(x.float(), None, 1e-6), rtol=2**-8, atol=0)


def test_the_cache_of_a_bfloat16_model_has_two_bytes_an_entry() -> None:
    caches = {
        precision: cost_of(load_experiment("redllm-tiny", [f"pretrain.training.precision={precision}"])).cache
        for precision in ("fp32", "bf16_master")
    }
    assert caches["fp32"].total(10, 10) == 2 * caches["bf16_master"].total(10, 10)


def test_an_unknown_precision_is_answered_with_those_there_are() -> None:
    with pytest.raises(InputError, match=r"pretrain\.training\.precision: .*allowed here: bf16, bf16_master, fp32"):
        load_experiment("decllm-tiny", ["pretrain.training.precision=double"])


def test_the_groups_have_peaks_of_their_own() -> None:
    model = model_of()
    masters = masters_of(model)
    optimizer = MasterWeights(model, masters, build_optimizer(Muon(lr=0.02, adamw=AdamW(lr=0.001)), masters))
    set_learning_rate(optimizer.param_groups, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.0005}

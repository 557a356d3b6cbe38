"""Training on a GPU: it learns, is cut anywhere, goes on where it stopped, and says when the memory is full."""

from __future__ import annotations

import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from lit_llm.runs.run_one_stage import run_one
from lit_llm.store.store import Stage, Store
from lit_llm.training.config import TrainingConfig
from lit_llm.training.module import LitModel
from lit_llm.training.throughput import PEAK_FLOPS, peak_flops
from tests.gpu.gpu_cases import batch_of, gradients, model_of, off, small
from tests.stages_in_parts import numbers, prepared_stage, stops_after

pytestmark = pytest.mark.gpu

ON_GPU = "pretrain.training.execution.accelerator=gpu"
PRECISIONS = ["fp32", "bf16", "bf16_master"]


def gradient_of_a_step(case: str, micro_batch: int | None) -> dict[str, torch.Tensor]:
    """What Lightning's Trainer steps with, on the GPU."""
    experiment, found = small(case), {}
    config = {"max_steps": 1, "clip_norm": None, "execution": {"micro_batch_size": micro_batch}}
    lit = LitModel(model_of(experiment), TrainingConfig.model_validate(config))

    class Catch(L.Callback):
        def on_before_optimizer_step(self, *_: object) -> None:
            found.update(gradients(lit.model))

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_steps=1, accelerator="gpu", devices=1, callbacks=[Catch()], **quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(lit, torch.utils.data.DataLoader([batch_of(experiment)], batch_size=None))
    return found


@pytest.mark.parametrize("case", ["decllm", "decllm, open prefix", "redllm, any split", "modernbert", "yoco"])
def test_the_gradient_ignores_how_the_step_is_cut(case: str) -> None:
    whole, cut = gradient_of_a_step(case, None), gradient_of_a_step(case, 4)
    assert whole.keys() == cut.keys()
    assert max(off(cut[name], whole[name]) for name in whole) < 1e-4


@pytest.mark.parametrize("case", ["decllm", "decllm, documents", "redllm, any split", "yoco, retention"])
def test_until_its_report_a_step_does_not_wait_for_the_device(case: str) -> None:
    """`torch.cuda` raises at each wait, but for those of the first step, which chooses kernels."""
    experiment = small(case)
    lit = LitModel(model_of(experiment), TrainingConfig.model_validate({"max_steps": 1, "z_loss": 1e-4})).to("cuda")
    batch = batch_of(experiment).to(torch.device("cuda"))

    def step() -> None:
        for piece in batch.micro_batches(4):
            lit._losses(lit.model.hidden(**piece.inputs), piece).objective.backward()
        torch.nn.utils.clip_grad_norm_([p for p in lit.parameters() if p.grad is not None], 1.0)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def result_of(stage: Stage) -> dict:
    assert run_one(stage.folder.parents[1], stage.fingerprint) == "done", stage.status()
    return stage.result() or {}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("preset", ["decllm-tiny", "redllm-tiny", "yoco-tiny"])
def test_training_lowers_the_loss_and_ends_where_the_cpu_ends(
    tmp_path: Path, corpus: Path, preset: str, precision: str
) -> None:
    found = {}
    for accelerator in ("gpu", "cpu"):
        how = [f"pretrain.training.execution.accelerator={accelerator}", f"pretrain.training.precision={precision}"]
        found[accelerator] = result_of(prepared_stage(Store(tmp_path / accelerator), corpus, preset, *how))
    here, there = found["gpu"], found["cpu"]
    assert here["provenance"]["device"] == torch.cuda.get_device_name()
    nll = here["metrics"]["val/target_nll"]
    assert nll < here["initial"]["val/target_nll"] - 0.2
    assert nll == pytest.approx(there["metrics"]["val/target_nll"], rel=1e-3 if precision == "fp32" else 2e-2)
    assert here["flops"] == there["flops"]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adafactor_factored", "muon"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_optimiser_makes_the_steps_that_it_makes_on_the_cpu(
    tmp_path: Path, corpus: Path, optimizer: str, precision: str
) -> None:
    """Judge: the same code in the same precision on the CPU, itself judged by formulas; after 14 steps."""
    nll = []
    for accelerator in ("gpu", "cpu"):
        how = [f"pretrain.training.execution.accelerator={accelerator}", f"pretrain.training.precision={precision}"]
        how += [f"pretrain.training.optimizer={optimizer}", "model.norm.scale=true"]
        result = result_of(prepared_stage(Store(tmp_path / accelerator), corpus, "redllm-tiny", *how))
        nll.append(result["metrics"]["val/target_nll"])
    assert nll[0] == pytest.approx(nll[1], rel=1e-3 if precision == "fp32" else 2e-2)


RESUMED = {
    "plain": [],
    "micro_batches": ["pretrain.training.execution.micro_batch_size=3"],
    "workers_bf16": ["pretrain.training.execution.workers=2", "pretrain.training.precision=bf16"],
    "dropout inside": ["pretrain.training.attention_dropout=0.2", "pretrain.training.feed_forward_dropout=0.2"],
    "average": ["pretrain.training.weight_averaging=ema", "pretrain.training.precision=bf16_master"],
    "dropout": ["pretrain.training.dropout=0.2", "pretrain.training.execution.activation_checkpointing=true"],
    "masters_muon": ["pretrain.training.precision=bf16_master", "pretrain.training.optimizer=muon"],
    "adafactor": ["pretrain.training.optimizer=adafactor"],
    "documents": ["pretrain.masks.intra_document=true"],
}


@pytest.mark.parametrize("preset", ["decllm-tiny", "redllm-tiny"])
@pytest.mark.parametrize("how", RESUMED)
def test_an_interruption_changes_no_bit_in_a_small_model(tmp_path: Path, corpus: Path, preset: str, how: str) -> None:
    """Of what kernels add in an order of their own (an embedding's gradient) little is in so small a batch."""
    whole = prepared_stage(Store(tmp_path / "whole"), corpus, preset, ON_GPU, *RESUMED[how])
    result_of(whole)
    parts = prepared_stage(Store(tmp_path / "parts"), corpus, preset, ON_GPU, *RESUMED[how])
    assert run_one(parts.folder.parents[1], parts.fingerprint, stops_after(5)) == "interrupted"
    result_of(parts)
    weights, expected = (load_file(stage.checkpoints / "model.safetensors") for stage in (parts, whole))
    distances = {name: off(weights[name], expected[name]) for name in expected}
    assert max(distances.values()) == 0
    assert numbers(parts) == numbers(whole)


def test_a_full_gpu_is_the_state_out_of_memory(tmp_path: Path, corpus: Path) -> None:
    """Where this process may take a thousandth of the memory, a batch of logits of 256 MB has no room."""
    large = ["model.vocabulary=65536", "pretrain.data.batch_size=64", "pretrain.data.sequence_length=256"]
    stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny", ON_GPU, *large)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        assert run_one(stage.folder.parents[1], stage.fingerprint) == "out_of_memory"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "memory" in stage.status()["error"]
    result_of(prepared_stage(Store(tmp_path), corpus, "decllm-tiny", ON_GPU))  # in the same process


def test_dropout_draws_the_same_again_by_the_seed_of_the_step(tmp_path: Path, corpus: Path) -> None:
    once, again, without = (
        numbers(stage)
        for name, share in (("once", 0.3), ("again", 0.3), ("without", 0.0))
        for stage in [
            prepared_stage(Store(tmp_path / name), corpus, "redllm-tiny", ON_GPU, f"pretrain.training.dropout={share}")
        ]
        if result_of(stage)
    )
    assert once == again
    assert once != without


def test_the_name_of_this_gpu_is_the_one_whose_peak_is_listed() -> None:
    """For the cards that the table is meant to have."""
    name = torch.cuda.get_device_name()
    listed = [known for known in PEAK_FLOPS if known in name]
    if not listed:
        pytest.skip(f"no peak is listed for {name}")
    assert peak_flops(name) == PEAK_FLOPS[listed[0]]

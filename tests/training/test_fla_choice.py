"""`kernels: fla` computes recurrences in training steps alone."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor

from lit_llm.components.recurrence.chunks import Streams, chunkwise
from lit_llm.experiment.cost import memory_of
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.collate import Batch
from lit_llm.runs.kernels import kernels_note
from lit_llm.training import compiled_blocks
from lit_llm.training.compiled_blocks import use_kernels
from lit_llm.training.config import TrainingConfig
from lit_llm.training.module import LitModel
from tests.training.test_step import SMALL, fitted, uneven_batch

FLA = "pretrain.training.execution.kernels=fla"
SIZES = "head_dim: 32, value_dim: 18, chunk: 8"
MIXERS = f"model.decoder.layer_ranges={{'0': {{gla: {{{SIZES}}}}}, '1': {{gated_deltanet: {{{SIZES}}}}}}}"
NARROW = "model.decoder.layer_ranges={'0': {gla: {head_dim: 32}}, '1': {gated_deltanet: {head_dim: 8}}}"


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of each call's tokens. The chunks compute in the place of the kernels, which need a GPU."""
    calls: list[int] = []

    def spy(streams: Streams, borders: Tensor | None) -> Tensor:
        assert borders is None
        calls.append(streams.v_BHTV.shape[-2])
        return chunkwise(streams, 8)[0]

    monkeypatch.setattr("lit_llm.components.recurrence.module.fused_chunkwise", spy)
    monkeypatch.setattr(compiled_blocks, "kernel_obstacle", lambda kernels, on_gpu: "")
    return calls


def stepped(batch: Batch, **execution: object) -> tuple[LanguageModel, dict[str, Tensor]]:
    """A model after one step by these settings, and the gradients of the step."""
    config = TrainingConfig.model_validate({"max_steps": 1, "clip_norm": None, "execution": execution})
    model = build_model(load_experiment("decllm-tiny", [*SMALL, MIXERS]).model)
    lit, gradients = LitModel(model, config), {}
    use_kernels(model, config.execution.kernels, on_gpu=False, lengths_vary=True)

    class Catch(L.Callback):
        def on_before_optimizer_step(self, *_: object) -> None:
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    fitted(lit, batch, Catch())
    return model, gradients


def test_fla_computes_the_steps_that_ask_for_it_and_nothing_else(called: list[int]) -> None:
    """Judge: the gradient by ours, to the bit. Checkpointed layers are computed twice."""
    batch = uneven_batch("decoder")
    _, wanted = stepped(batch)
    assert not called
    model, found = stepped(batch, kernels="fla")
    assert len(called) == 2
    called.clear()
    _, again = stepped(batch, kernels="fla", activation_checkpointing=True)
    assert len(called) == 4
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name
        assert torch.equal(again[name], gradient), name
    called.clear()
    with torch.no_grad():
        model(**batch.inputs)
        model.eval()(**batch.inputs)
    assert not called, "evaluations"


def test_what_is_left_to_the_chunks_is_said_in_a_line() -> None:
    assert kernels_note(load_experiment("decllm-tiny", [FLA, MIXERS]), "pretrain") == ""
    assert kernels_note(load_experiment("decllm-tiny", [FLA]), "pretrain") == ""
    note = kernels_note(load_experiment("decllm-tiny", [FLA, NARROW]), "pretrain")
    assert note.startswith("1 of 2 kinds of recurrent mixers are not computed by flash-linear-attention: head_dim 8")


def test_the_plans_memory_is_that_of_the_chunks() -> None:
    by_fla, by_torch = (memory_of(load_experiment("decllm-tiny", [MIXERS, *more]), "pretrain") for more in ([FLA], []))
    assert by_fla == by_torch

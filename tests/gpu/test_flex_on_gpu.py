"""FlexAttention on a GPU, in every precision, computes what the CPU computes in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_llm.models.stacks import Stack
from lit_llm.runs.run_one_stage import run_one
from lit_llm.store.store import Store
from lit_llm.training.compiled_blocks import compile_attention
from lit_llm.training.config import TrainingConfig
from lit_llm.training.module import LitModel
from tests.gpu.gpu_cases import CUDA, batch_of, gradients, loss_of, model_of, off, small
from tests.gpu.test_same_as_cpu import EPS, all_off, backward
from tests.stages_in_parts import prepared_stage

pytestmark = pytest.mark.gpu

CASES = [
    "decllm, open prefix", "decllm, documents", "decllm, window", "decllm, softcap", "decllm, ALiBi",
    "partial attention", "redllm, any split", "redllm, documents", "t5gemma 2", "modernbert", "yoco",
]  # fmt: skip


def called(model: torch.nn.Module) -> list[torch.Size]:
    """Shapes of the queries that FlexAttention gets from now on."""
    shapes: list[torch.Size] = []
    flex = next(stack.flex_in_training for stack in model.modules() if isinstance(stack, Stack))
    assert flex is not None
    attend = flex.attend

    def spy(q: torch.Tensor, *others: torch.Tensor, **named: object) -> torch.Tensor:
        shapes.append(q.shape)
        return attend(q, *others, **named)

    flex.attend = spy
    return shapes


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_float64_on_the_cpu(case: str, precision: str) -> None:
    """No further off than torch's other kernels on the GPU, where roundings of bfloat16 decide."""
    wanted_loss, judge = backward(case, "fp32", torch.device("cpu"), torch.float64)
    dtype = torch.bfloat16 if precision == "bf16_master" else torch.float32
    experiment = small(case)
    model = model_of(experiment, dtype).to(CUDA)
    compile_attention(model, lengths_vary=True)
    shapes = called(model)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        loss = loss_of(model, batch_of(experiment).to(CUDA), experiment.pretrain.training.z_loss)
    loss.backward()
    assert shapes
    assert off(loss, wanted_loss) < EPS[precision]
    found, wanted = gradients(model), gradients(judge)
    assert found.keys() == wanted.keys()
    peer = gradients(backward(case, precision, CUDA, dtype)[1])
    assert all_off(found, wanted) < max(10 * EPS[precision], 2 * all_off(peer, wanted))


@pytest.mark.parametrize("case", ["decllm, open prefix", "decllm, documents", "decllm, window", "redllm, documents"])
def test_a_step_does_not_wait_for_the_device(case: str) -> None:
    """`torch.cuda` raises at each wait, but for those of the first step, which compiles."""
    experiment = small(case)
    lit = LitModel(model_of(experiment), TrainingConfig.model_validate({"max_steps": 1})).to("cuda")
    compile_attention(lit.model, lengths_vary=False)
    batch = batch_of(experiment).to(CUDA)

    def step() -> None:
        for piece in batch.micro_batches(3):
            lit._losses(lit.model.hidden(**piece.inputs), piece).objective.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_ends_where_torchs_other_kernels_end(tmp_path: Path, corpus: Path) -> None:
    losses = {}
    for kernels in ("auto", "flex"):
        how = [f"pretrain.training.execution.{key}" for key in ("accelerator=gpu", f"kernels={kernels}")]
        stage = prepared_stage(
            Store(tmp_path / kernels), corpus, "decllm-tiny", "pretrain.masks.intra_document=true", *how
        )
        assert run_one(stage.folder.parents[1], stage.fingerprint) == "done", stage.status()
        result = stage.result() or {}
        assert result["provenance"]["kernels"] == kernels
        losses[kernels] = result["metrics"]["val/target_nll"]
    assert losses["flex"] == pytest.approx(losses["auto"], rel=1e-3)

"""Liger's kernels on a GPU, in every precision, compute what the CPU computes in float64."""

from __future__ import annotations

import pytest
import torch

from lit_llm.components.liger import liger_kernels
from tests.gpu.gpu_cases import CUDA, gradients, off
from tests.gpu.test_same_as_cpu import EPS, all_off, backward

pytestmark = pytest.mark.gpu

CASES = [
    "decllm", "decllm, grouped", "decllm, softcap", "decllm, LayerNorm", "decllm, z-loss", "partial attention",
    "redllm", "redllm, documents", "t5gemma", "t5gemma 2", "modernbert", "yoco, retention",
]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_float64_on_the_cpu(case: str, precision: str) -> None:
    """No further off than ours on the GPU, where roundings of bfloat16 decide."""
    pytest.importorskip("liger_kernel")
    wanted_loss, judge = backward(case, "fp32", torch.device("cpu"), torch.float64)
    dtype = torch.bfloat16 if precision == "bf16_master" else torch.float32
    with liger_kernels(True):
        loss, model = backward(case, precision, CUDA, dtype)
    assert loss.dtype == torch.float32
    assert off(loss, wanted_loss) < EPS[precision]
    found, wanted = gradients(model), gradients(judge)
    assert found.keys() == wanted.keys()
    _, peer = backward(case, precision, CUDA, dtype)
    ours = gradients(peer)
    assert all_off(found, wanted) < max(10 * EPS[precision], 2 * all_off(ours, wanted))
    assert any(not torch.equal(found[name], ours[name]) for name in found), "equal bits: nothing was replaced"

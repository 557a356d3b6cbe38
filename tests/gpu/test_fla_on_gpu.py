"""flash-linear-attention's kernels on a GPU, in every precision, compute what the CPU computes in float64."""

from __future__ import annotations

import pytest
import torch

from lit_llm.models.stacks import Stack
from tests.gpu.gpu_cases import CUDA, batch_of, gradients, loss_of, model_of, off, small
from tests.gpu.test_same_as_cpu import EPS, all_off, backward

pytestmark = pytest.mark.gpu

CASES = {
    "decllm, mixers": ["model.decoder.layer_ranges.0.gla.head_dim=16"],
    "redllm, mixers": [],
    "yoco, retention": [],
}
"""{case: overrides}, with heads of sizes for which there are kernels."""


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_float64_on_the_cpu(case: str, precision: str, documents: bool) -> None:
    """No further off than our chunks on the GPU, where roundings of bfloat16 decide."""
    pytest.importorskip("fla")
    overrides = [*CASES[case], *["pretrain.masks.intra_document=true"] * documents]
    wanted_loss, judge = backward(case, "fp32", torch.device("cpu"), torch.float64, *overrides)
    dtype = torch.bfloat16 if precision == "bf16_master" else torch.float32
    experiment = small(case, *overrides)
    model = model_of(experiment, dtype).to(CUDA)
    for module in model.modules():
        if isinstance(module, Stack):
            module.fla_in_training = True
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        loss = loss_of(model, batch_of(experiment).to(CUDA))
    loss.backward()
    assert loss.dtype == torch.float32
    assert off(loss, wanted_loss) < EPS[precision]
    found, wanted = gradients(model), gradients(judge)
    assert found.keys() == wanted.keys()
    _, peer = backward(case, precision, CUDA, dtype, *overrides)
    ours = gradients(peer)
    assert all_off(found, wanted) < max(10 * EPS[precision], 2 * all_off(ours, wanted))
    assert any(not torch.equal(found[name], ours[name]) for name in found), "equal bits: nothing was replaced"

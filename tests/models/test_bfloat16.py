"""Mixed precision as training uses it: it runs, it really is bfloat16, and it is the same function to its precision."""

import pytest
import torch

from tests.tiny_models import PAPER_NORMS, build, ids

SWITCHES = {
    "paper": None,
    "bare": [],
    "queries and keys only": ["attention.qkv_norm=[q, k]"],
    "grouped": ["attention.kv_heads=2", "attention.output_norm=after_out"],
}


@pytest.mark.parametrize("family", ["decllm", "redllm"])
@pytest.mark.parametrize("switches", SWITCHES)
def test_a_forward_pass_under_bfloat16_is_close_to_float32(family, switches):
    overrides = PAPER_NORMS[family] if SWITCHES[switches] is None else SWITCHES[switches]
    model = build(family, *overrides, double=False)
    inputs = (ids(2, 20), ids(2, 12)) if family == "redllm" else (ids(2, 20), torch.tensor([3, 8]))
    with torch.no_grad():
        exact = model(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(*inputs)
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).norm() / exact.norm()
    # One rounding is up to 2^-9 = 0.2%; some ten in a row, of random signs, stay well below 3%.
    assert 0 < error < 0.03


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_the_kernels_read_bfloat16(family):
    """Rotations in float32 would make float32 of the queries and keys, twice the memory for nothing."""
    model, dtypes = build(family, double=False), set()
    for name, module in model.named_modules():
        if name.endswith("dot_product"):
            module.register_forward_pre_hook(lambda _, args: dtypes.update(part.dtype for part in args[:3]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(*(ids(2, 20),) * (2 if family == "redllm" else 1))
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_the_input_of_several_matrices_is_cast_once(family):
    """Each matrix would cast it again; the judge is where the tensors lie that the matrices read."""
    model, read = build(family, double=False), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, inputs, name=name: read.update({name: inputs[0]}))
    inputs = (ids(2, 20), ids(2, 12)) if family == "redllm" else (ids(2, 20),)
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(*inputs)
    groups = ("self_attention", "qkv"), ("feed_forward", ("gate", "up")), ("cross_attention", "kv")
    for part, matrices in groups[: 3 if family == "redllm" else 2]:
        tensors = [read[f"decoder.layers.0.{part}.{name}"] for name in matrices]
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
        assert len({tensor.data_ptr() for tensor in tensors}) == 1

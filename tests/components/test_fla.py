"""The recurrences beside flash-linear-attention's own reference in torch, which needs no triton."""

import importlib.util
import os
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from lit_llm.components.masks import AttentionMask
from lit_llm.components.recurrence.chunks import chunkwise
from lit_llm.components.recurrence.fla import borders_of
from tests.components.test_recurrence import KINDS
from tests.recurrent_mixers import MIXERS, D, mixer_of, resolved, whole, whole_by_fla

B, T = 2, 13
OPERATIONS = {
    "scalar": ("simple_gla", "naive_recurrent_simple_gla"),
    "in groups": ("simple_gla", "naive_recurrent_simple_gla"),
    "by entry": ("gla", "naive_recurrent_gla"),
    "delta": ("gated_delta_rule", "naive_recurrent_gated_delta_rule"),
}
"""{kind of streams: (operation, its reference)}."""


def reference(operation, name):
    """A function of the package's `naive.py`, loaded from its file, since the packages around it load triton."""
    pytest.importorskip("einops")
    if (package := importlib.util.find_spec("fla")) is None:
        pytest.skip("fla-core is not installed; `pip install -e '.[dev]'` in the checkout")
    path = Path(package.submodule_search_locations[0]) / "ops" / operation / "naive.py"
    spec = importlib.util.spec_from_file_location(f"naive_{operation}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def by_reference(kind, q, k, v, g, *betas):
    """(output, last state) of tensors of B x T x H ..., without a factor of the scores."""
    function = reference(*OPERATIONS[kind])
    if kind == "by entry":
        return function(q * q.shape[-1] ** 0.5, k, v, g, output_final_state=True)
    return function(q, k, v, *betas, g, scale=1.0, output_final_state=True)


def by_token(streams):
    """The streams as B x T x H ..., those of groups for each of their heads, gates of heads without an entry."""
    heads = streams.v_BHTV.shape[1:-2]
    given = [x.expand(B, *heads, T, -1).flatten(1, -3).transpose(1, 2) for x in streams if x is not None]
    return [x.squeeze(-1) if x.shape[-1] == 1 else x for x in given]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_reference_with_its_state_and_gradients(kind):
    streams = KINDS[kind]()
    inputs = [x.requires_grad_() for x in streams if x is not None]
    (out, state), (wanted, last) = chunkwise(streams, 5, keep_state=True), by_reference(kind, *by_token(streams))
    wanted, last = wanted.transpose(1, 2).reshape(out.shape), last.reshape(state.shape)
    assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    assert_close(state, last, rtol=1e-5, atol=1e-5)
    weight, of_state = torch.randn(out.shape), torch.randn(state.shape)
    found = torch.autograd.grad((out * weight).sum() + (state * of_state).sum(), inputs)
    expected = torch.autograd.grad((wanted * weight).sum() + (last * of_state).sum(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


# --- the kernels' arguments -------------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch):
    """Names of the kernels that were called, in whose place their references compute, document by document."""
    names = []
    monkeypatch.setenv("TRITON_F32_DEFAULT", "")
    monkeypatch.delenv("TRITON_F32_DEFAULT")

    def kernel_of(kind, name):
        def kernel(q, *others, scale, cu_seqlens):
            names.append(name)
            assert scale == 1.0
            assert q.dtype == others[0].dtype == others[1].dtype
            assert others[2].dtype == torch.float32, "gates are summed in it"
            ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
            assert len(q) == 1 or cu_seqlens is None
            outs = [by_reference(kind, *(x[:, a:b] for x in (q, *others)))[0] for a, b in pairwise(ends)]
            return torch.cat(outs, dim=1).to(q.dtype), None

        return kernel

    for kind, (operation, _) in OPERATIONS.items():
        if kind != "in groups":
            module = ModuleType(operation)
            setattr(module, f"chunk_{operation}", kernel_of(kind, f"chunk_{operation}"))
            monkeypatch.setitem(sys.modules, f"fla.ops.{operation}", module)
    return names


KERNELS = {"retention": "simple_gla", "gla": "gla", "gated_deltanet": "gated_delta_rule", "mamba2": "simple_gla"}
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 6 + [2] * 4, [5] * 8 + [0] + [5] * 4])
MASKS = {
    "whole rows": {},
    "documents": {"documents": (DOCUMENTS, DOCUMENTS)},
    "padded documents": {"documents": (DOCUMENTS, DOCUMENTS), "key_lengths": torch.tensor([T, 10])},
}


@pytest.mark.parametrize(("mask", "causal"), [("whole rows", True), ("documents", True), ("padded documents", False)])
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_gives_its_kernel_what_chunks_compute_from(name, mask, causal, called):
    if name == "retention" and not causal:
        return
    module = mixer_of(name, torch.float32, causal=causal, head_dim=16, value_dim=18)
    x, given = torch.randn(B, T, D, requires_grad=True), AttentionMask(causal=causal, **MASKS[mask])
    counted = torch.ones(B, T, 1)
    if mask == "padded documents":
        counted[1, 10:] = 0
    wanted, found = whole(module, x, given) * counted, whole_by_fla(module, x, given) * counted
    assert called == [f"chunk_{KERNELS[MIXERS[name][0]]}"] * (1 if causal else 2)
    assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    inputs, weight = [x, *module.parameters()], torch.randn(B, T, D)
    gradients = torch.autograd.grad((found * weight).sum(), inputs)
    for mine, right in zip(gradients, torch.autograd.grad((wanted * weight).sum(), inputs), strict=True):
        assert_close(mine, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MIXERS)
def test_the_kernels_compute_in_the_precision_of_the_products(name, called):
    """In bfloat16 under autocast; in float32 without, where Triton is told not to round factors to TF32."""
    module, x = mixer_of(name, torch.float32, head_dim=16, value_dim=18), torch.randn(B, T, D)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = whole_by_fla(module, x), whole(module, x)
    assert found.dtype == torch.bfloat16
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    assert "TRITON_F32_DEFAULT" not in os.environ
    assert whole_by_fla(module, x).dtype == torch.float32
    assert os.environ["TRITON_F32_DEFAULT"] == "ieee"


@pytest.mark.parametrize(
    ("name", "sizes", "reason"),
    [
        ("retention", (16, 8), "head_dim 16 and value_dim 8 must be even and at least 16"),
        ("gla", (17, 32), "head_dim 17 and value_dim 32 must be even"),
        ("gated_deltanet", (258, 32), "head_dim 258 of the delta rule exceeds 256"),
        ("gla", (258, 32), ""),
        ("mamba2", (16, 18), ""),
    ],
)
def test_sizes_without_a_kernel_are_left_to_the_chunks(name, sizes, reason):
    """A call of a kernel would fail, as none is installed here or none takes tensors of a CPU."""
    values = {"heads": 3, "head_dim": sizes[0], "value_dim": sizes[1]}
    assert resolved(name, values).without_fla.startswith(reason)
    assert bool(resolved(name, values).without_fla) == bool(reason)
    if reason:
        module, x = mixer_of(name, torch.float32, **values), torch.randn(B, T, D)
        assert torch.equal(whole_by_fla(module, x), whole(module, x))


def test_borders_are_where_documents_begin_in_rows_end_to_end():
    runs = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2]])
    borders = borders_of(runs, both_ways=True)
    assert borders.forwards.tolist() == [0, 2, 5, 6, 7, 10]
    assert borders.backwards.tolist() == [0, 3, 5, 8, 9, 10]
    assert borders_of(runs, both_ways=False).backwards is None
    assert borders_of(None, both_ways=True) == (None, None)

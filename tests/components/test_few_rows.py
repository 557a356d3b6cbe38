"""The compiled functions for few rows against torch's in float64, and when torch computes instead."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.components import few_rows as module
from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.few_rows import MOST_ROWS, Linear, compiled, few_rows, functions_for, linear
from lit_llm.components.masks import AttentionMask, KernelMask
from lit_llm.components.norm.module import rms_norm
from lit_llm.components.rope import Frequencies, rotate, rotation_at
from lit_llm.config.machine import compiler

pytestmark = pytest.mark.skipif(compiled() is None, reason="no C++ compiler on this machine")
DTYPES = pytest.mark.parametrize("dtype", list(MOST_ROWS))
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
"""Largest relative error of one rounding."""


@pytest.fixture
def calls(monkeypatch):
    """Names of the compiled functions that were called."""
    names, functions = [], compiled()

    def counted(name, function):
        return lambda *arguments: (names.append(name), function(*arguments))[1]

    made = {
        dtype: of_dtype._replace(
            **{name: counted(name, getattr(of_dtype, name)) for name in of_dtype._fields if name != "most_rows"}
        )
        for dtype, of_dtype in functions.items()
    }
    monkeypatch.setattr(module, "compiled", lambda: made)
    return names


def close(found, exact, dtype, terms=1):
    """Whether the error is that of one rounding of the result and of sums of `terms` numbers in float32."""
    bound = UNIT[dtype] * exact.abs() * 1.01 + terms**0.5 * 4 * UNIT[torch.float32] * exact.abs().max()
    assert (found.double() - exact).abs().le(bound + 1e-30).all()


@DTYPES
@pytest.mark.parametrize("inputs", [1, 7, 64, 257])
@pytest.mark.parametrize("outputs", [1, 3, 4, 130])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16])
def test_the_product_is_torchs(dtype, inputs, outputs, rows, calls):
    if rows > MOST_ROWS[dtype]:
        return
    torch.manual_seed(inputs)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    with torch.inference_mode(), few_rows():
        found = linear(x, weight)
    assert calls == ["product"]
    assert found.dtype == dtype
    exact = x.double() @ weight.double().T
    scale = x.double().abs() @ weight.double().abs().T  # a sum's error is relative to its terms
    assert (found.double() - exact).abs().le(UNIT[dtype] * 1.01 * exact.abs() + 8 * UNIT[torch.float32] * scale).all()


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 1, 4, 64), (2, 257)])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_norm_is_torchs(dtype, shape, scaled, calls):
    torch.manual_seed(0)
    x = 3 * torch.randn(shape).to(dtype)
    scale = torch.randn(shape[-1]).to(dtype) if scaled else None
    with torch.inference_mode(), few_rows():
        found = rms_norm(x, scale, 1e-3)
    assert calls == ["rms_norm"]
    close(found, F.rms_norm(x.double(), shape[-1:], None if scale is None else scale.double(), 1e-3), dtype)


@DTYPES
@pytest.mark.parametrize("positions", [torch.tensor([5]), torch.tensor([[5], [900]])], ids=["shared", "by row"])
def test_the_rotation_is_that_of_torchs_operations(dtype, positions, calls):
    torch.manual_seed(0)
    x = torch.randn(2, 1, 3, 10).to(dtype)
    rotation = rotation_at(positions, Frequencies(10_000.0, 10), dtype)
    with torch.inference_mode(), few_rows():
        found = rotate(x, rotation)
    assert calls == ["rotate"]
    exact = rotate(x.double(), tuple(part.double() for part in rotation))
    close(found, exact, dtype)


def test_positions_of_a_whole_text_are_rotated_by_torch(calls):
    """Two rows of three positions each: neither one position for all nor one for each token of the batch."""
    x, rotation = torch.randn(2, 3, 2, 4), rotation_at(torch.arange(3), Frequencies(100.0, 4), torch.float32)
    wanted = rotate(x, rotation)
    with torch.inference_mode(), few_rows():
        assert torch.equal(rotate(x, rotation), wanted)
    assert calls == []


@DTYPES
@pytest.mark.parametrize("size", [12, 64, 128])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("lengths", [None, [1, 40, 17]])
def test_attention_of_one_query_is_torchs(dtype, size, kv_heads, lengths, calls):
    """Keys in a cache with spare slots, which hold no numbers."""
    torch.manual_seed(0)
    q = torch.randn(3, 4, 1, size).to(dtype)
    cache = torch.full((2, 3, kv_heads, 50, size), torch.nan, dtype=dtype)
    cache[:, :, :, :40] = torch.randn(2, 3, kv_heads, 40, size).to(dtype)
    k, v = cache[:, :, :, :40]
    mask = AttentionMask(key_lengths=None if lengths is None else torch.tensor(lengths))
    kernel_mask = KernelMask(mask, (1, 40), (dtype, q.device), scores=False, bias=False)
    with torch.inference_mode(), few_rows():
        found = DotProduct(0.3)(q, k, v, kernel_mask)
    assert calls == ["attention"]
    repeated = [part.double().repeat_interleave(4 // kv_heads, dim=1) for part in (k, v)]
    exact = F.scaled_dot_product_attention(q.double(), *repeated, attn_mask=kernel_mask.visible, scale=0.3)
    close(found, exact, dtype, terms=40)


def test_what_the_compiled_attention_lacks_is_torchs(calls):
    q, k = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
    like = (q.dtype, q.device)
    window = KernelMask(AttentionMask(window=(2, 1)), (1, 5), like, scores=False, bias=False)
    every = KernelMask(AttentionMask(), (1, 5), like, scores=False, bias=False)
    capped = KernelMask(AttentionMask(), (1, 5), like, scores=True, bias=False)
    biased = KernelMask(AttentionMask(), (1, 5), like, scores=False, bias=True)
    with torch.inference_mode(), few_rows():
        DotProduct()(q, k, k, window)
        DotProduct(softcap=2.0)(q, k, k, capped)
        DotProduct()(q, k, k, biased, torch.zeros(2, 1, 5))
        DotProduct()(q.expand(1, 2, 3, 8), k, k, KernelMask(AttentionMask(), (3, 5), like, scores=False, bias=False))
        transposed = k.transpose(1, 2).contiguous().transpose(1, 2)  # a token's heads lie together
        DotProduct()(q, transposed, transposed, every)
        assert calls == []
        DotProduct()(q, k, k, every)
    assert calls == ["attention"]


def test_torch_computes_where_somebody_has_to_see_it(calls):
    """Gradients, autocast, a counter of FLOPs; many rows; other dtypes and layouts; outside of `few_rows`."""
    layer, x = Linear(8, 4), torch.randn(2, 8)
    with few_rows():
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    with torch.inference_mode():
        layer(x)
        with torch.autocast("cpu", torch.bfloat16), few_rows():
            assert layer(x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter, few_rows():
            layer(x)
        assert counter.get_total_flops() == 2 * 2 * 8 * 4
        with few_rows():
            layer(torch.randn(MOST_ROWS[torch.float32] + 1, 8))
            layer(torch.randn(0, 8))
            linear(x.double(), layer.weight.double())
            linear(x, torch.randn(8, 4).T)
            assert functions_for(x, layer.weight.double()) is None
            assert calls == []
            layer(x)
    assert calls == ["product"]


def test_other_shapes_are_torchs(calls):
    """Which broadcasts or raises; the compiled functions would read beyond their inputs."""
    x, keys = torch.randn(2, 1, 3, 8), torch.randn(2, 3, 5, 8)
    scales = torch.full((1,), 2.0), torch.randn(3, 8)
    wanted = [rms_norm(x, scale, 1e-6) for scale in scales]
    with torch.inference_mode(), few_rows():
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(torch.randn(4, 8), torch.randn(4, 16))
        for scale, expected in zip(scales, wanted, strict=True):
            assert torch.equal(rms_norm(x, scale, 1e-6), expected)
        every = KernelMask(AttentionMask(), (1, 5), (x.dtype, x.device), scores=False, bias=False)
        DotProduct()(x.transpose(1, 2), keys, keys[..., :4], every)
    assert calls == []


def test_lengths_of_another_dtype_and_beyond_the_keys_are_read_as_they_are_meant(calls):
    q, keys = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 5, 8)
    mask = AttentionMask(key_lengths=torch.tensor([2, 9], dtype=torch.int32))
    short = KernelMask(mask, (1, 5), (q.dtype, q.device), scores=False, bias=False)
    with torch.inference_mode(), few_rows():
        found = DotProduct()(q, keys, keys, short)
    assert calls == ["attention"]
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, keys, keys, attn_mask=short.visible))


def test_the_functions_are_for_this_thread_and_end_with_the_block():
    x = torch.randn(1, 4)
    with torch.inference_mode():
        with few_rows():
            assert functions_for(x, None) is not None
        assert functions_for(x, None) is None


@pytest.mark.parametrize("program", ["", "/no/such/compiler", shutil.which("false")])
def test_without_a_working_compiler_torch_computes(program, tmp_path):
    """In a process of its own, with an empty cache: whether there is a compiler is asked once."""
    code = (
        "import torch\n"
        "from lit_llm.components.few_rows import Linear, compiled, few_rows\n"
        "layer, x = Linear(4, 3), torch.ones(1, 4)\n"
        "with torch.inference_mode(), few_rows():\n"
        "    print(compiled(), torch.equal(layer(x), x @ layer.weight.T))\n"
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path), "CXX": program, "PATH": "/no/such/folder", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "True"]
    assert ("torch computes instead" in done.stderr) == (program == shutil.which("false"))
    assert [path.suffix for path in (tmp_path / "lit-llm").glob("*.so")] == []


def test_the_library_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = module._library(compiler())
    made = first.stat().st_mtime_ns
    assert module._library(compiler()) == first
    assert first.stat().st_mtime_ns == made
    assert [path.name for path in first.parent.iterdir()] == [first.name]

"""Gated retention against the paper's recurrence, token by token: three forms, rows, documents, and what it costs."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.components.forward_context import ForwardContext
from lit_llm.components.kv_cache import CacheLengths
from lit_llm.components.masks import AttentionMask
from lit_llm.components.part import Defaults, Example, Widths
from lit_llm.components.retention.cache import RetentionState
from lit_llm.components.retention.config import RetentionConfig
from lit_llm.components.retention.module import Retention, RetentionInputs, Streams, chunkwise, parallel, recurrent
from lit_llm.components.retention.resolved import resolve_retention
from lit_llm.components.rope import Frequencies, rotate, rotation_at

D, HEADS, K, V, B, T = 20, 3, 4, 6, 2, 13  # so that D, HEADS x K and HEADS x V are three
SHAPE = {"heads": HEADS, "head_dim": K, "value_dim": V}
CAUSAL = AttentionMask(causal=True)
CHUNKS = [1, 2, 5, T - 1, T, 256]
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def resolved(values, width=D):
    return resolve_retention(values, Defaults({"heads": HEADS}, {}, width))


def built(config):
    return Retention(config, Widths(D, D), causal=True)


def retention(dtype=torch.float64, **values):
    return built(resolved({**SHAPE, **values})).to(dtype)


def x_of(tokens=T, rows=B, dtype=torch.float64):
    return torch.randn(rows, tokens, D, dtype=dtype)


def rotation(positions, dtype=torch.float64, theta=10000.0):
    return rotation_at(positions, Frequencies(theta, K), dtype)


def given(x, mask=CAUSAL, positions=None, cache=None, module=None):
    """What a forward pass gives to a retention over x."""
    positions = torch.arange(x.shape[1]) if positions is None else positions
    return (module or retention(x.dtype)).prepare(ForwardContext(x, mask, {"self": positions}), cache)


def whole(module, x, mask=CAUSAL):
    return module(x, given(x, mask, module=module))


def parts(dtype=torch.float64, tokens=T):
    """q, k, v and log-gates of some size, each with a gradient."""
    shapes = [(B, HEADS, tokens, K), (B, HEADS, tokens, K), (B, HEADS, tokens, V), (B, HEADS, tokens)]
    found = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [x.requires_grad_() for x in (*found[:3], F.logsigmoid(found[3]))]


def by_recurrence(q, k, v, log_gates, borders=()):
    """S_t = γ_t S_{t-1} + k_tᵀ v_t, o_t = q_t S_t; forgotten at the borders. In float64."""
    q, k, v, gates = (x.double() for x in (q, k, v, log_gates.exp()))
    state, outs = torch.zeros(*q.shape[:2], K, V, dtype=torch.float64), []
    for t in range(q.shape[2]):
        before = torch.zeros_like(state) if t in borders else state
        state = gates[:, :, t, None, None] * before + torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t])
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return torch.stack(outs, dim=2), state


def one_by_one(q, k, v, log_gates):
    """`recurrent` over all tokens, from an empty state."""
    state, outs = torch.zeros(B, HEADS, K, V, dtype=q.dtype), []
    for t in range(q.shape[2]):
        out, state = recurrent(Streams(q, k, v, log_gates).chunk(t, t + 1), state)
        outs.append(out)
    return torch.cat(outs, dim=2), state


FORMS = {"parallel": lambda *x: (parallel(Streams(*x)), None), "recurrent": one_by_one}
FORMS |= {f"chunks of {n}": lambda *x, n=n: chunkwise(Streams(*x), n, keep_state=True) for n in CHUNKS}


# --- one function ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_papers_recurrence(form):
    inputs = parts(torch.float32)
    (out, state), (wanted, last) = FORMS[form](*inputs), by_recurrence(*inputs)
    assert_close(out.double(), wanted, **TIGHT)
    if state is not None:
        assert_close(state.double(), last, **TIGHT)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_recurrences_gradients(form):
    inputs = parts(torch.float32)
    weight = torch.randn(B, HEADS, T, V)
    found = torch.autograd.grad((FORMS[form](*inputs)[0] * weight).sum(), inputs)
    wanted = torch.autograd.grad((by_recurrence(*inputs)[0] * weight).sum(), inputs)
    for mine, theirs in zip(found, wanted, strict=True):
        assert_close(mine, theirs, **TIGHT)


def test_gates_that_forget_almost_everything_make_no_overflow():
    """exp(-1000 · 200) is zero; its inverse, which the masked half would hold, is infinite."""
    q, k, v, log_gates = parts(torch.float32, tokens=200)
    closed = torch.full_like(log_gates, -1000.0).requires_grad_()
    out, _ = chunkwise(Streams(q, k, v, closed), 64)
    assert_close(out, (q * k).sum(-1, keepdim=True) * v)  # each token alone
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), (q, k, v, closed)))


def plain(module, x, tau=16.0, eps=1e-5):
    """The formulas of config.py's docstring, from the weights."""
    q, k, v, decay, gate, out = (
        getattr(module, name).weight.T for name in ("q", "k", "v", "decay", "output_gate", "out")
    )
    turn = rotation(torch.arange(x.shape[1]))
    q, k, v = ((x @ w).unflatten(-1, (HEADS, -1)) for w in (q, k, v))
    gamma = torch.sigmoid(x @ decay) ** (1 / tau)
    kept = (rotate(q, turn).transpose(1, 2), rotate(k, turn).transpose(1, 2) / K**0.5, v.transpose(1, 2))
    heads = by_recurrence(*kept, gamma.log().transpose(1, 2))[0].transpose(1, 2)
    normed = heads / (heads.square().mean(-1, keepdim=True) + eps).sqrt()
    swish = x @ gate * torch.sigmoid(x @ gate)
    return swish * normed.flatten(2) @ out


@pytest.mark.parametrize(("tau", "eps"), [(16.0, 1e-5), (1.0, 1e-5), (16.0, 0.5)])
@pytest.mark.parametrize("chunk", [4, 256])
def test_the_module_is_its_formula(chunk, tau, eps):
    module, x = retention(chunk=chunk, gate_temperature=tau, norm_eps=eps), x_of()
    assert_close(whole(module, x), plain(module, x, tau, eps))


def test_the_defaults_are_those_of_the_authors_code():
    config = RetentionConfig(heads=8)
    assert (config.gate_temperature, config.norm_eps, config.chunk, config.rope_theta) == (16.0, 1e-5, 256, 10000.0)
    config = resolved({"heads": 8}, 512)
    assert config.head_dim == config.value_dim == 64


def test_head_dims_that_do_not_fit_are_refused_with_a_reason():
    with pytest.raises(ValueError, match="3 heads do not divide d_model 20"):
        resolved({"heads": 3})
    with pytest.raises(ValueError, match="head_dim 5 must be even"):
        resolved({"heads": 4})


def test_retention_knows_distances_and_no_absolute_place():
    module, x = retention(), x_of()
    here, there, reversed_ = (
        module(x, RetentionInputs(rotation(positions), None, None))
        for positions in (torch.arange(T), torch.arange(T) + 50, torch.arange(T).flip(0))
    )
    assert_close(there, here, rtol=1e-4, atol=1e-5)  # angles are float32
    assert (reversed_ - here).abs().max() > 1e-2


def test_no_token_sees_a_later_one():
    module, x = retention(chunk=4), x_of()
    changed = x.clone()
    changed[:, 7:] = torch.randn(B, T - 7, D, dtype=x.dtype)
    here, there = whole(module, x), whole(module, changed)
    assert_close(there[:, :7], here[:, :7], rtol=0, atol=0)
    assert ((there - here)[:, 7:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("prefix", [2, T, torch.tensor([0, 5])])
def test_an_open_prefix_is_refused(prefix):
    with pytest.raises(ValueError, match="retention is causal"):
        whole(retention(), x_of(), AttentionMask(causal=True, prefix=prefix))


@pytest.mark.parametrize("prefix", [0, 1])
def test_a_prefix_of_one_token_is_not_open(prefix):
    module, x = retention(), x_of()
    assert_close(whole(module, x, AttentionMask(causal=True, prefix=prefix)), whole(module, x), rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [8, 1024])
def test_under_autocast_the_gates_are_summed_in_float32(chunk):
    """1024 gates of e^-0.04 sum to -40 in logarithms, where neighbours in bfloat16 are 0.25 apart."""
    module, x = retention(torch.float32, chunk=chunk), x_of(1024, dtype=torch.float32)
    exact = whole(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(x, RetentionInputs(rotation(torch.arange(1024), torch.bfloat16), None, None))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


# --- documents -------------------------------------------------------------------------------------------------------

DOCUMENTS = torch.tensor([[0] * 3 + [1] * 6 + [2] * 4, [5] * 8 + [0] + [5] * 4])
BORDERS = [(0, 3, 9), (0, 8, 9)]


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_document_is_read_as_if_it_stood_alone(chunk):
    """At its place in the row, which distances do not show. A number that comes back is another document."""
    module, x = retention(chunk=chunk), x_of()
    out = whole(module, x, AttentionMask(causal=True, documents=(DOCUMENTS, DOCUMENTS)))
    for row, starts in enumerate(BORDERS):
        for start, end in zip(starts, (*starts[1:], T), strict=True):
            alone = module(x[row : row + 1, start:end], RetentionInputs(rotation(torch.arange(start, end)), None, None))
            assert_close(out[row : row + 1, start:end], alone)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_state_is_forgotten_at_a_border(chunk):
    inputs = parts()
    runs = torch.tensor([[0] * 3 + [1] * 6 + [2] * 4] * B)
    out, state = chunkwise(Streams(*inputs), chunk, runs, keep_state=True)
    wanted, last = by_recurrence(*inputs, borders=BORDERS[0])
    assert_close(out, wanted)
    assert_close(state, last)


# --- decoding --------------------------------------------------------------------------------------------------------


def decoded(module, x, prompt_lengths, padding=0.0):
    """Outputs from each prompt's last token on: the prompts as one padded batch, then token by token."""
    rows = CacheLengths(prompt_lengths, x.device)
    cache, longest = RetentionState(rows), max(prompt_lengths)
    prompts = torch.full((len(x), longest, D), padding, dtype=x.dtype)
    for row, length in enumerate(prompt_lengths):
        prompts[row, :length] = x[row, :length]
    first = module(prompts, given(prompts, cache=cache, module=module))
    outs = [first[torch.arange(len(x)), rows.lengths_B - 1]]
    for _ in range(x.shape[1] - longest):
        new = x[torch.arange(len(x)), rows.lengths_B][:, None]
        outs.append(module(new, given(new, rows.mask(more=1), rows.next_positions(), cache, module))[:, 0])
        rows.advance()
    return torch.stack(outs, dim=1), cache


@pytest.mark.parametrize("chunk", [2, 256])
@pytest.mark.parametrize("lengths", [(1, 1, 1), (6, 6, 6), (8, 1, 5)])
def test_decoding_is_reading_it_all_at_once(lengths, chunk):
    module, x = retention(torch.float32, chunk=chunk), x_of(rows=3, dtype=torch.float32)
    out, _ = decoded(module, x, lengths)
    at_once = whole(module, x)
    for row, length in enumerate(lengths):
        assert_close(out[row], at_once[row, length - 1 : length - 1 + out.shape[1]], **TIGHT)


@pytest.mark.parametrize("chunk", [3, 256])
def test_padding_of_a_shorter_prompt_does_not_enter_its_state(chunk):
    module, x = retention(chunk=chunk), x_of()
    (clean, cache), (loud, other) = decoded(module, x, (9, 4)), decoded(module, x, (9, 4), padding=1e3)
    assert_close(loud, clean, rtol=0, atol=0)
    assert_close(other.cached(), cache.cached(), rtol=0, atol=0)


def test_kept_rows_go_on_as_if_the_others_had_never_been():
    module, x = retention(), x_of(rows=3)
    _, cache = decoded(module, x[:, :8], (8, 3, 5))
    cache.rows.keep([2, 0])
    cache.keep([2, 0])
    new = x_of(tokens=1)
    out = module(new, given(new, cache.rows.mask(more=1), cache.rows.next_positions(), cache, module))
    for row, (old, length) in enumerate([(2, 5), (0, 8)]):
        alone = torch.cat([x[old : old + 1, :length], new[row : row + 1]], dim=1)
        assert_close(out[row], whole(module, alone)[0, -1:])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_state_takes_its_bytes_at_every_length_and_precision(autocast):
    module, x = retention(torch.float32), x_of(dtype=torch.float32)
    for tokens, lengths in ((1, (1, 1)), (12, (5, 12)), (T, (5, 12))):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            _, cache = decoded(module, x[:, :tokens], lengths)
        assert cache.bytes() == [4 * module.config.state_entries] * B
        assert cache.cached().untyped_storage().nbytes() == B * 4 * module.config.state_entries


# --- cost ------------------------------------------------------------------------------------------------------------

WIDTHS = [SHAPE, {"heads": 5}, {"heads": 2, "head_dim": 8}, {"heads": 1, "head_dim": 2, "value_dim": 9}]


@pytest.mark.parametrize("values", WIDTHS)
def test_parameters_are_those_of_the_built_module(values):
    config = resolved(values)
    shapes = {name: tuple(parameter.shape) for name, parameter in built(config).named_parameters()}
    assert config.shapes(Widths(D, D)) == shapes


def counted(config, tokens, cache=None):
    module, x = built(config), torch.randn(1, tokens, D)
    with FlopCounterMode(display=False) as counter:
        module(x, given(x, cache=cache, module=module))
    return counter.get_total_flops()


def behind_the_masks(config, tokens):
    """FLOPs of the pairs inside chunks that come later than their query: two products, over K and over V."""
    sizes = [min(config.chunk, tokens - first) for first in range(0, tokens, config.chunk)]
    hidden = sum(size * (size - 1) // 2 for size in sizes)
    return 2 * hidden * config.heads * (config.head_dim + config.value_dim)


@pytest.mark.parametrize("values", WIDTHS)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 8, 14])
@pytest.mark.parametrize("keep_state", [False, True])
def test_flops_are_those_of_torchs_counter_without_the_masked_pairs(values, tokens, keep_state):
    config = resolved({**values, "chunk": 4})
    cache = RetentionState(CacheLengths([tokens], torch.device("cpu"))) if keep_state else None
    assert config.flops(Example(tokens, keep_state=keep_state), Widths(D, D)) == (
        counted(config, tokens, cache) - behind_the_masks(config, tokens)
    )


@pytest.mark.parametrize("values", WIDTHS)
def test_a_step_costs_what_torchs_counter_says_however_long_the_row(values):
    config = resolved(values)
    for before in (1, 30):
        cache = RetentionState(CacheLengths([before], torch.device("cpu")))
        counted(config, before, cache)
        assert config.flops(Example(1, before=before, decoding=True), Widths(D, D)) == counted(config, 1, cache)

"""Chunks of a linear recurrence against the recurrence itself, token by token in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_llm.components.recurrence.chunks import Streams, chunkwise, recurrent
from tests.recurrent_mixers import by_recurrence

HEADS, K, V, B, T = 3, 4, 6, 2, 13
CHUNKS = [1, 5, T, 256]
TIGHT = {"rtol": 1e-5, "atol": 1e-5}


def log_gates(*shape):
    return F.logsigmoid(torch.randn(shape))


def scalar(tokens=T):
    q, k = torch.randn(2, B, HEADS, tokens, K)
    return Streams(q, k, torch.randn(B, HEADS, tokens, V), log_gates(B, HEADS, tokens, 1))


def by_entry(tokens=T):
    return scalar(tokens)._replace(log_gates_BHTG=log_gates(B, HEADS, tokens, K))


def delta(tokens=T):
    given = scalar(tokens)
    betas = torch.rand(B, HEADS, tokens, 1) * 2
    return given._replace(k_BHTK=F.normalize(given.k_BHTK, dim=-1), betas_BHT1=betas)


def in_groups(tokens=T):
    """Two groups of three heads that share queries and keys."""
    q, k = torch.randn(2, B, 2, 1, tokens, K)
    return Streams(q, k, torch.randn(B, 2, 3, tokens, V), log_gates(B, 2, 3, tokens, 1))


KINDS = {"scalar": scalar, "by entry": by_entry, "delta": delta, "in groups": in_groups}


def one_by_one(streams):
    """`recurrent` over all tokens, from an empty state."""
    state, outs = torch.zeros(*streams.v_BHTV.shape[:-2], K, V), []
    for t in range(streams.q_BHTK.shape[-2]):
        out, state = recurrent(streams.chunk(t, t + 1), state)
        outs.append(out)
    return torch.cat(outs, dim=-2), state


FORMS = {"recurrent": one_by_one}
FORMS |= {f"chunks of {n}": lambda streams, n=n: chunkwise(streams, n, keep_state=True) for n in CHUNKS}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_the_recurrence_with_its_gradients(kind, form):
    streams = KINDS[kind]()
    inputs = [x.requires_grad_() for x in streams if x is not None]
    (out, state), (wanted, last) = FORMS[form](streams), by_recurrence(streams)
    assert_close(out.double(), wanted, **TIGHT)
    assert_close(state.double(), last, **TIGHT)
    weight, of_state = torch.randn(wanted.shape), torch.randn(last.shape)
    found = torch.autograd.grad((out * weight).sum() + (state * of_state).sum(), inputs)
    expected = torch.autograd.grad((wanted * weight).sum() + (last * of_state).sum(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_forgotten_at_a_border(kind, chunk):
    streams = KINDS[kind]()
    runs = torch.tensor([[0] * 3 + [1] * 6 + [2] * 4] * B)
    out, state = chunkwise(streams, chunk, runs, keep_state=True)
    wanted, last = by_recurrence(streams, borders=(0, 3, 9))
    assert_close(out.double(), wanted, **TIGHT)
    assert_close(state.double(), last, **TIGHT)


@pytest.mark.parametrize("kind", ["scalar", "by entry", "in groups"])
def test_gates_that_forget_almost_everything_make_no_overflow(kind):
    """exp(-1000 · 200) is zero; its inverse, which the masked half would hold, is infinite."""
    streams = KINDS[kind](200)
    streams = streams._replace(log_gates_BHTG=torch.full_like(streams.log_gates_BHTG, -1000.0))
    inputs = [x.requires_grad_() for x in streams if x is not None]
    q, k, v, *_ = streams
    out, _ = chunkwise(streams, 64)
    assert_close(out, (q * k).sum(-1, keepdim=True) * v, **TIGHT)  # each token alone
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), inputs))


def test_the_delta_rule_replaces_what_was_kept_for_a_key():
    """With β = 1, no decay and one key, the state holds the last value for it, not a sum."""
    key = F.normalize(torch.randn(1, 1, 1, K), dim=-1).expand(1, 1, T, K)
    values, ones = torch.randn(1, 1, T, V), torch.ones(1, 1, T, 1)
    out, _ = chunkwise(Streams(key, key, values, torch.zeros(1, 1, T, 1), ones), 5)
    assert_close(out, values, **TIGHT)

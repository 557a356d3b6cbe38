"""Linear recurrences over the tokens of a row, a chunk at a time: the computation that all recurrent mixers share.

    S_t = diag(γ_t) S_{t-1} + k_tᵀ u_t        o_t = q_t S_t

γ_t is one number for each head (retention, Mamba-2, gated DeltaNet) or one for each entry of its keys (gated linear
attention). u_t is the value v_t, or with the gated delta rule (arXiv 2412.06464) what the value adds to the one that
the state already holds for this key:

    u_t = β_t (v_t - k_t diag(γ_t) S_{t-1})

chunkwise    a chunk at a time, the state between      training, and reading a prompt
recurrent    a token at a time, the state between      decoding

Within a chunk all pairs of tokens are computed at once. The delta rule's u_t depend on each other there: they solve a
triangular system (the UT transform of arXiv 2406.06484, with decays).

Log-gates, their sums and the state are float32 at least, under autocast too: a sum of a few hundred small numbers keeps
no difference between neighbours in bfloat16. A decay is always the exponential of a difference, which is at most zero:
its two factors alone could overflow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Streams(NamedTuple):
    """Queries, keys, values, log-gates and write strengths of each token and head.

    Leading dimensions broadcast: heads that share queries and keys have them once (B x G x 1 x T x K, with values B x G
    x R x T x V).
    """

    q_BHTK: Tensor
    k_BHTK: Tensor
    v_BHTV: Tensor
    log_gates_BHTG: Tensor
    """log γ; G is 1, or K for a gate for each entry of the keys."""
    betas_BHT1: Tensor | None = None
    """β of the delta rule; None: values are added as they are."""

    def chunk(self, first: int, last: int) -> Streams:
        """The tokens `first` to `last` (exclusive)."""
        return Streams(*(None if x is None else x[..., first:last, :] for x in self))  # type: ignore[arg-type]


def chunkwise(
    streams: Streams, chunk: int, runs_BT: Tensor | None = None, keep_state: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(output of each token, in time and memory that grow with T x `chunk`; state after the last token, if kept).

    runs_BT: document numbers, equal ones adjacent; a document starts from an empty state.
    """
    tokens, dimensions = streams.q_BHTK.shape[-2], streams.q_BHTK.dim()
    outs: list[Tensor] = []
    state_BHKV: Tensor | None = None
    for first in range(0, tokens, chunk):
        part = streams.chunk(first, first + chunk)
        q, k, log_gates = part.q_BHTK, part.k_BHTK, part.log_gates_BHTG
        runs = None if runs_BT is None else runs_BT[:, first : first + chunk]
        decays_BHCCG = _pair_decays(log_gates, runs)
        faded_BHCG = log_gates.cumsum(-2)
        left_BHCG = faded_BHCG.exp()  # of the state, at each token
        if runs is not None and runs_BT is not None and first:
            left_BHCG = left_BHCG * _spread(runs == runs_BT[:, first - 1 : first], dimensions)
        read_BHKV = None if state_BHKV is None else state_BHKV.to(q.dtype)
        v = part.v_BHTV
        if part.betas_BHT1 is not None:
            v = _written(part, decays_BHCCG, left_BHCG, read_BHKV)
        out = _scores(q, k, decays_BHCCG) @ v
        if read_BHKV is not None:
            out = out + (q * left_BHCG.to(q.dtype)) @ read_BHKV
        outs.append(out)
        if first + chunk < tokens or keep_state:
            kept_BHCG = (faded_BHCG[..., -1:, :] - faded_BHCG).exp()  # of each token, at the chunk's end
            if runs is not None:
                kept_BHCG = kept_BHCG * _spread(runs == runs[:, -1:], dimensions)
            added_BHKV = ((k * kept_BHCG.to(k.dtype)).transpose(-1, -2) @ v).to(log_gates.dtype)
            remaining_BHG1 = left_BHCG[..., -1:, :].transpose(-1, -2)
            state_BHKV = added_BHKV if state_BHKV is None else state_BHKV * remaining_BHG1 + added_BHKV
    return torch.cat(outs, dim=-2), state_BHKV


def recurrent(token: Streams, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """(output of one more token, ... x 1 x V; state after it)."""
    q, k, v, log_gates, betas = token
    assert q.shape[-2] == 1
    state_BHKV = state_BHKV * log_gates.transpose(-1, -2).exp()
    if betas is not None:
        v = (betas * (v - k @ state_BHKV.to(k.dtype))).to(v.dtype)
    state_BHKV = state_BHKV + k.transpose(-1, -2) @ v
    return q @ state_BHKV.to(q.dtype), state_BHKV


def without_padding(streams: Streams, lengths_B: Tensor) -> Streams:
    """The streams with padding at the rows' ends that neither decays the state nor adds to it."""
    padding_BT = torch.arange(streams.q_BHTK.shape[-2], device=lengths_B.device) >= lengths_B[:, None]
    padding_BHT1 = _spread(padding_BT, streams.q_BHTK.dim())
    return streams._replace(
        k_BHTK=streams.k_BHTK.masked_fill(padding_BHT1, 0.0),
        log_gates_BHTG=streams.log_gates_BHTG.masked_fill(padding_BHT1, 0.0),
    )


def _pair_decays(log_gates_BHCG: Tensor, runs_BC: Tensor | None) -> Tensor:
    """Share of what token s wrote that is left at token t: ... x C x C x G, zero for later s and other documents."""
    tokens = log_gates_BHCG.shape[-2]
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=log_gates_BHCG.device).tril()[..., None]
    if runs_BC is not None:
        same_BCC = runs_BC[:, :, None] == runs_BC[:, None, :]
        visible = visible & same_BCC.view(len(runs_BC), *[1] * (log_gates_BHCG.dim() - 3), tokens, tokens, 1)
    faded_BHCG = log_gates_BHCG.cumsum(-2)
    # Masked before exp: above the diagonal the differences are positive, and could overflow.
    differences_BHCCG = faded_BHCG[..., :, None, :] - faded_BHCG[..., None, :, :]
    return differences_BHCCG.masked_fill(~visible, -torch.inf).exp()


def _scores(q_BHCK: Tensor, k_BHCK: Tensor, decays_BHCCG: Tensor) -> Tensor:
    """Decayed products of queries and keys: ... x C x C."""
    decays_BHCCG = decays_BHCCG.to(q_BHCK.dtype)
    if decays_BHCCG.shape[-1] == 1:
        return q_BHCK @ k_BHCK.transpose(-1, -2) * decays_BHCCG.squeeze(-1)
    faded_BHCCK = k_BHCK[..., None, :, :] * decays_BHCCG
    return (faded_BHCCK @ q_BHCK[..., None]).squeeze(-1)


def _written(part: Streams, decays_BHCC1: Tensor, left_BHC1: Tensor, read_BHKV: Tensor | None) -> Tensor:
    """u of the delta rule: β times the value less what the state before the token holds for its key.

    That state holds what earlier tokens of the chunk wrote, too, so that u solves a triangular system.
    """
    k, v, betas, exact = part.k_BHTK, part.v_BHTV, part.betas_BHT1, part.log_gates_BHTG.dtype
    assert betas is not None
    overlaps_BHCC = (k @ k.transpose(-1, -2)).to(exact) * decays_BHCC1.squeeze(-1)
    missing = v if read_BHKV is None else v - (k * left_BHC1.to(k.dtype)) @ read_BHKV
    # Only the entries below the diagonal are read.
    solved = torch.linalg.solve_triangular(
        betas * overlaps_BHCC, betas * missing.to(exact), upper=False, unitriangular=True
    )
    return solved.to(v.dtype)


def _spread(x_BT: Tensor, dimensions: int) -> Tensor:
    """B x T as B x 1 ... x T x 1, with as many dimensions as the streams."""
    return x_BT.view(len(x_BT), *[1] * (dimensions - 3), x_BT.shape[1], 1)

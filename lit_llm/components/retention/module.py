"""Module of `ResolvedRetention`, gated retention: one function in three forms.

parallel     all pairs of tokens at once, T x T      what a chunk does inside
chunkwise    a chunk at a time, the state between    training, and reading a prompt
recurrent    a token at a time, the state between    decoding

Log-gates, their sums and the state are float32 at least, under autocast too: a sum of a few hundred small numbers keeps
no difference between neighbours in bfloat16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.few_rows import Linear
from lit_llm.components.forward_context import CacheRows, ForwardContext
from lit_llm.components.layer_part import LayerPart
from lit_llm.components.norm.module import rms_norm
from lit_llm.components.part import Widths
from lit_llm.components.retention.cache import RetentionState
from lit_llm.components.retention.resolved import ResolvedRetention
from lit_llm.components.rope import Frequencies, Rotation, rotate


class RetentionInputs(NamedTuple):
    """Inputs of a retention other than activations; see `LayerPart.prepare`."""

    rotation: Rotation
    runs_BT: Tensor | None
    """Number of changes of document up to each token; None for one document."""
    cache: RetentionState | None


class Retention(LayerPart):
    """
    x ─┬─ q ─ RoPE ────────┐
       ├─ k ─ RoPE ─ / √K ─┤
       ├─ v ───────────────┼─ retention ─ head norm ─(×)─ out ─▶
       ├─ decay ─ γ ───────┘                          │
       └─ output_gate ─ swish ────────────────────────┘
    """

    def __init__(self, config: ResolvedRetention, widths: Widths, causal: bool) -> None:
        super().__init__(config, widths, causal)
        self.config = config
        self.q = Linear(widths.row, config.width)
        self.k = Linear(widths.row, config.width)
        self.v = Linear(widths.row, config.value_width)
        self.decay = Linear(widths.row, config.heads)
        self.output_gate = Linear(widths.row, config.value_width)
        self.out = Linear(config.value_width, widths.row)

    def prepare(self, context: ForwardContext, cache: RetentionState | None) -> RetentionInputs:  # type: ignore[override]
        """Make the inputs of `forward`. Raises ValueError for a bidirectional prefix."""
        prefix, documents = context.mask.prefix, context.mask.documents
        if isinstance(prefix, Tensor) or (prefix or 0) > 1:
            raise ValueError("retention is causal: a token cannot see later ones; leave its prefix causal")
        assert cache is None or documents is None
        runs_BT = None if documents is None else context.once("runs", lambda: _document_runs(documents[0]))
        frequencies = Frequencies(self.config.rope_theta, self.config.head_dim)
        return RetentionInputs(context.rotation("self", frequencies), runs_BT, cache)

    def forward(self, x_BTD: Tensor, inputs: RetentionInputs) -> Tensor:
        """B x T x D -> B x T x D. Each document starts from an empty state.

        With a cache x_BTD holds the prompts the first time, shorter ones padded at the end, and then one more token of
        each row.
        """
        rotation, runs_BT, cache = inputs
        q, k = (rotate(self._heads(part, x_BTD), rotation).transpose(1, 2) for part in (self.q, self.k))
        k = k * self.config.head_dim**-0.5
        v = self._heads(self.v, x_BTD).transpose(1, 2)
        log_gates = self._log_gates(x_BTD)
        if cache is not None and cache.state_BHKV is not None:
            out_BHTV, cache.state_BHKV = recurrent(Streams(q, k, v, log_gates), cache.state_BHKV)
        elif cache is not None:
            if not cache.rows.even:
                # Padding neither decays a row's state nor adds to it.
                ends_B11 = cache.rows.lengths_B[:, None, None]
                padding_B1T = torch.arange(x_BTD.shape[1], device=x_BTD.device) >= ends_B11
                log_gates = log_gates.masked_fill(padding_B1T, 0.0)
                k = k.masked_fill(padding_B1T[..., None], 0.0)
            streams = Streams(q, k, v, log_gates)
            out_BHTV, cache.state_BHKV = chunkwise(streams, self.config.chunk, keep_state=True)
        else:
            out_BHTV, _ = chunkwise(Streams(q, k, v, log_gates), self.config.chunk, runs_BT)
        joined_BTD = rms_norm(out_BHTV.transpose(1, 2), None, self.config.norm_eps).flatten(2)
        return self.out(F.silu(self.output_gate(x_BTD)) * joined_BTD)

    def new_cache(self, rows: CacheRows) -> RetentionState:
        return RetentionState(rows.self_lengths)

    def _heads(self, projection: nn.Module, x_BTD: Tensor) -> Tensor:
        """Queries, keys or values: B x T x H x K."""
        projected: Tensor = projection(x_BTD)
        return projected.unflatten(-1, (self.config.heads, -1))

    def _log_gates(self, x_BTD: Tensor) -> Tensor:
        """log γ: B x H x T."""
        logits_BTH: Tensor = self.decay(x_BTD)
        logits_BTH = logits_BTH.to(torch.promote_types(logits_BTH.dtype, torch.float32))
        return F.logsigmoid(logits_BTH).transpose(1, 2) / self.config.gate_temperature


class Streams(NamedTuple):
    """Queries, keys, values and log-gates of each token and head."""

    q_BHTK: Tensor
    k_BHTK: Tensor
    v_BHTV: Tensor
    log_gates_BHT: Tensor

    def chunk(self, first: int, last: int) -> Streams:
        """The tokens `first` to `last` (exclusive)."""
        return Streams(*(x[:, :, first:last] for x in self))


def parallel(streams: Streams, runs_BT: Tensor | None = None) -> Tensor:
    """Each token's sum over itself and the tokens before it, decayed by the gates in between: B x H x T x V.

    runs_BT: document numbers; a token sees only tokens with the same number.
    """
    q_BHTK, k_BHTK, v_BHTV, log_gates_BHT = streams
    tokens = q_BHTK.shape[2]
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BHTK.device).tril()
    if runs_BT is not None:
        visible = visible & (runs_BT[:, None, :, None] == runs_BT[:, None, None, :])
    faded_BHT = log_gates_BHT.cumsum(-1)
    # Masked before exp: above the diagonal the differences are positive, and could overflow.
    decay_BHTT = (faded_BHT[..., :, None] - faded_BHT[..., None, :]).masked_fill(~visible, -torch.inf).exp()
    return (q_BHTK @ k_BHTK.transpose(-1, -2) * decay_BHTT.to(q_BHTK.dtype)) @ v_BHTV


def chunkwise(
    streams: Streams, chunk: int, runs_BT: Tensor | None = None, keep_state: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(output as of `parallel`, in time and memory that grow with T x `chunk`; state after the last token, if kept).

    runs_BT: as in `parallel`, with equal numbers adjacent.
    """
    tokens, outs, state_BHKV = streams.q_BHTK.shape[2], [], None
    for first in range(0, tokens, chunk):
        part = streams.chunk(first, first + chunk)
        q, k, v, log_gates = part
        runs = None if runs_BT is None else runs_BT[:, first : first + chunk]
        out = parallel(part, runs)
        faded_BHC = log_gates.cumsum(-1)
        left_BHC = faded_BHC.exp()  # of the state, at each token
        if runs is not None and runs_BT is not None and first:
            left_BHC = left_BHC * (runs == runs_BT[:, first - 1 : first])[:, None]
        if state_BHKV is not None:
            out = out + (q * left_BHC[..., None].to(q.dtype)) @ state_BHKV.to(q.dtype)
        outs.append(out)
        if first + chunk < tokens or keep_state:
            kept_BHC = (faded_BHC[..., -1:] - faded_BHC).exp()  # of each token, at the chunk's end
            if runs is not None:
                kept_BHC = kept_BHC * (runs == runs[:, -1:])[:, None]
            added_BHKV = ((k * kept_BHC[..., None].to(k.dtype)).transpose(-1, -2) @ v).to(log_gates.dtype)
            state_BHKV = added_BHKV if state_BHKV is None else state_BHKV * left_BHC[..., -1:, None] + added_BHKV
    return torch.cat(outs, dim=2), state_BHKV


def recurrent(token: Streams, state_BHKV: Tensor) -> tuple[Tensor, Tensor]:
    """(output of one more token, B x H x 1 x V; state after it)."""
    q_BH1K, k_BH1K, v_BH1V, log_gates_BH1 = token
    assert q_BH1K.shape[2] == 1
    state_BHKV = state_BHKV * log_gates_BH1[..., None].exp() + k_BH1K.transpose(-1, -2) @ v_BH1V
    return q_BH1K @ state_BHKV.to(q_BH1K.dtype), state_BHKV


def _document_runs(documents_BT: Tensor) -> Tensor:
    """Number of changes of document up to each token: B x T."""
    changes = documents_BT[:, 1:] != documents_BT[:, :-1]
    return F.pad(changes.cumsum(1), (1, 0))

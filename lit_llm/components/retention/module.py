"""The gated retention that `ResolvedRetention` describes: one function in three forms.

parallel     all pairs of tokens at once, T x T      what a chunk does inside
chunkwise    a chunk at a time, the state between    training, and reading a prompt
recurrent    a token at a time, the state between    decoding

Log-gates, their sums and the state are float32 at least, under autocast too: a sum of a few hundred small numbers keeps
no difference between neighbours in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.attention.masks import AttentionMask
from lit_llm.components.attention.rope import Rotation, rotate
from lit_llm.components.norm.module import rms_norm
from lit_llm.components.retention.cache import RetentionState
from lit_llm.components.retention.config import ResolvedRetention


class Retention(nn.Module):
    """
    x ─┬─ q ─ RoPE ────────┐
       ├─ k ─ RoPE ─ / √K ─┤
       ├─ v ───────────────┼─ retention ─ head norm ─(×)─ out ─▶
       ├─ decay ─ γ ───────┘                          │
       └─ output_gate ─ swish ────────────────────────┘
    """

    def __init__(self, config: ResolvedRetention, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.q = nn.Linear(d_model, config.width, bias=False)
        self.k = nn.Linear(d_model, config.width, bias=False)
        self.v = nn.Linear(d_model, config.value_width, bias=False)
        self.decay = nn.Linear(d_model, config.heads, bias=False)
        self.output_gate = nn.Linear(d_model, config.value_width, bias=False)
        self.out = nn.Linear(config.value_width, d_model, bias=False)

    def forward(
        self, x_BTD: Tensor, visible: AttentionMask, rotation: Rotation, cache: RetentionState | None = None
    ) -> Tensor:
        """B x T x D -> B x T x D. rotation: of the positions of x_BTD's tokens.

        visible: its documents, each of which starts from an empty state; their numbers change where one ends. Raises
        ValueError for an open prefix.
        With a cache x_BTD holds the prompts the first time, shorter ones padded at the end, and then one more token of
        each row.
        """
        if isinstance(visible.prefix, Tensor) or (visible.prefix or 0) > 1:
            raise ValueError("retention is causal: a token cannot see later ones; leave its prefix causal")
        q, k = (rotate(self._heads(part, x_BTD), rotation).transpose(1, 2) for part in (self.q, self.k))
        k = k * self.config.head_dim**-0.5
        v = self._heads(self.v, x_BTD).transpose(1, 2)
        log_gates = self._log_gates(x_BTD)
        if cache is not None and cache.state_BHKV is not None:
            out_BHTV, cache.state_BHKV = recurrent(q, k, v, log_gates, cache.state_BHKV)
        elif cache is not None:
            assert visible.documents is None
            if not cache.rows.even:
                # Padding neither fades a row's state nor adds to it.
                ends_B11 = cache.rows.lengths_B[:, None, None]
                padding_B1T = torch.arange(x_BTD.shape[1], device=x_BTD.device) >= ends_B11
                log_gates = log_gates.masked_fill(padding_B1T, 0.0)
                k = k.masked_fill(padding_B1T[..., None], 0.0)
            out_BHTV, cache.state_BHKV = chunkwise(q, k, v, log_gates, self.config.chunk, keep_state=True)
        else:
            runs_BT = None if visible.documents is None else _runs(visible.documents[0])
            out_BHTV, _ = chunkwise(q, k, v, log_gates, self.config.chunk, runs_BT)
        joined_BTD = rms_norm(out_BHTV.transpose(1, 2), None, self.config.norm_eps).flatten(2)
        return self.out(F.silu(self.output_gate(x_BTD)) * joined_BTD)

    def _heads(self, projection: nn.Module, x_BTD: Tensor) -> Tensor:
        """Queries, keys or values: B x T x H x K."""
        projected: Tensor = projection(x_BTD)
        return projected.unflatten(-1, (self.config.heads, -1))

    def _log_gates(self, x_BTD: Tensor) -> Tensor:
        """log γ: B x H x T."""
        logits_BTH: Tensor = self.decay(x_BTD)
        logits_BTH = logits_BTH.to(torch.promote_types(logits_BTH.dtype, torch.float32))
        return F.logsigmoid(logits_BTH).transpose(1, 2) / self.config.gate_temperature


def parallel(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_gates_BHT: Tensor, runs_BT: Tensor | None = None
) -> Tensor:
    """Each token's sum over those before it and itself, faded by the gates in between: B x H x T x V.

    runs_BT: numbers; a token sees those with its own alone.
    """
    tokens = q_BHTK.shape[2]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q_BHTK.device).tril()
    if runs_BT is not None:
        seen = seen & (runs_BT[:, None, :, None] == runs_BT[:, None, None, :])
    faded_BHT = log_gates_BHT.cumsum(-1)
    # Masked before exp: above the diagonal the differences are positive, and could overflow.
    decay_BHTT = (faded_BHT[..., :, None] - faded_BHT[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    return (q_BHTK @ k_BHTK.transpose(-1, -2) * decay_BHTT.to(q_BHTK.dtype)) @ v_BHTV


def chunkwise(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_gates_BHT: Tensor,
    chunk: int,
    runs_BT: Tensor | None = None,
    keep_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `parallel`, in time and memory that grow with T x `chunk`; and the state after the last token, if it is kept.

    runs_BT: as `parallel`'s, and equal numbers stand together.
    """
    tokens, outs, state_BHKV = q_BHTK.shape[2], [], None
    for first in range(0, tokens, chunk):
        part = slice(first, first + chunk)
        q, k, v, log_gates = (x[:, :, part] for x in (q_BHTK, k_BHTK, v_BHTV, log_gates_BHT))
        runs = None if runs_BT is None else runs_BT[:, part]
        out = parallel(q, k, v, log_gates, runs)
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


def recurrent(
    q_BH1K: Tensor, k_BH1K: Tensor, v_BH1V: Tensor, log_gates_BH1: Tensor, state_BHKV: Tensor
) -> tuple[Tensor, Tensor]:
    """One more token: its output, B x H x 1 x V, and the state after it."""
    assert q_BH1K.shape[2] == 1
    state_BHKV = state_BHKV * log_gates_BH1[..., None].exp() + k_BH1K.transpose(-1, -2) @ v_BH1V
    return q_BH1K @ state_BHKV.to(q_BH1K.dtype), state_BHKV


def _runs(documents_BT: Tensor) -> Tensor:
    """How often the document has changed up to each token: B x T."""
    changes = documents_BT[:, 1:] != documents_BT[:, :-1]
    return F.pad(changes.cumsum(1), (1, 0))

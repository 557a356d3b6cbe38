"""Short causal convolution before a recurrence (Mamba, arXiv 2312.00752)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.recurrence.cache import RecurrentState


class ShortConvolution(nn.Module):
    """swish(Σ_i w_i x_{t-i}) for each channel, over the token and the few before it in its document."""

    is_table = True  # each row is one channel's filter, which Muon should not mix with others

    def __init__(self, channels: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.initial_std = (3 * width) ** -0.5  # as torch's, and the authors', uniform values within 1/sqrt(width)
        self.weight = nn.Parameter(torch.empty(channels, width))
        """The last column multiplies the token itself."""
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x_BTC: Tensor, runs_BT: Tensor | None = None, cache: RecurrentState | None = None) -> Tensor:
        """B x T x C -> B x T x C. runs_BT: document numbers, equal ones adjacent. A cache keeps the last inputs."""
        tokens, before = x_BTC.shape[1], self.weight.shape[1] - 1
        if cache is None or cache.inputs_BWC is None:
            padded_BWC = F.pad(x_BTC, (0, 0, before, 0))
        else:
            padded_BWC = torch.cat([cache.inputs_BWC.to(x_BTC.dtype), x_BTC], dim=1)
        if cache is not None:
            cache.inputs_BWC = _last_inputs(padded_BWC, before, cache)
        exact = torch.promote_types(x_BTC.dtype, torch.float32)
        mixed_BTC = torch.zeros((), dtype=exact, device=x_BTC.device) if self.bias is None else self.bias.to(exact)
        for tap, weight_C in enumerate(self.weight.to(exact).unbind(1)):
            term_BTC = padded_BWC[:, tap : tap + tokens] * weight_C
            if runs_BT is not None and (ago := before - tap):
                same_BT = F.pad(runs_BT, (ago, 0), value=-1)[:, :tokens] == runs_BT
                term_BTC = term_BTC * same_BT[..., None]
            mixed_BTC = mixed_BTC + term_BTC
        return F.silu(mixed_BTC).to(x_BTC.dtype)


def _last_inputs(padded_BWC: Tensor, number: int, cache: RecurrentState) -> Tensor:
    """The last inputs of each row; zeros stand for those before its first token."""
    if cache.inputs_BWC is not None or cache.rows.even:
        return padded_BWC[:, padded_BWC.shape[1] - number :].clone()
    # A row's token t is at place t + number.
    places_BW = cache.rows.lengths_B[:, None] + torch.arange(number, device=padded_BWC.device)
    return padded_BWC.gather(1, places_BW[..., None].expand(-1, -1, padded_BWC.shape[2]))

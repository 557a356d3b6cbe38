"""Small recurrent mixers, and what a forward pass gives to them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.convolution.module import ShortConvolution
from lit_llm.components.forward_context import ForwardContext
from lit_llm.components.kv_cache import CacheLengths
from lit_llm.components.layer_part import build_part
from lit_llm.components.masks import AttentionMask
from lit_llm.components.part import Defaults, Widths
from lit_llm.components.recurrence.cache import RecurrentState
from lit_llm.components.recurrence.chunks import Streams
from lit_llm.components.recurrence.module import RecurrentInputs, RecurrentMixer
from lit_llm.components.recurrence.resolved import ResolvedRecurrence
from lit_llm.components.registry import COMPONENTS

D, HEADS, K, V = 20, 3, 4, 6
"""So that D, HEADS x K and HEADS x V are three."""
SHAPE = {"heads": HEADS, "head_dim": K, "value_dim": V}
CAUSAL = AttentionMask(causal=True)
MIXERS = {
    "retention": ("retention", {}),
    "gla": ("gla", {"gate_rank": 5}),
    "gated_deltanet": ("gated_deltanet", {"conv": 3}),
    "mamba2": ("mamba2", {}),
    "mamba2 in groups": ("mamba2", {"groups": 3, "heads": 6, "value_dim": 3}),
}
"""{name: (component, settings)}."""


def resolved(mixer: str, values: dict[str, Any], width: int = D, causal: bool = True) -> ResolvedRecurrence:
    """A component's settings, resolved. mixer: a key of `MIXERS`."""
    component, own = MIXERS[mixer]
    part = COMPONENTS[component].resolve({**own, **values}, Defaults({"heads": HEADS}, {}, width, causal))
    assert isinstance(part, ResolvedRecurrence)
    return part


def built(config: ResolvedRecurrence, causal: bool = True, dtype: torch.dtype = torch.float64) -> RecurrentMixer:
    """A module of which no parameter is special: all are small random numbers."""
    module = build_part(config, Widths(D, D), causal)
    assert isinstance(module, RecurrentMixer)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.5)
    return module.to(dtype)


def mixer_of(name: str, dtype: torch.dtype = torch.float64, causal: bool = True, **values: Any) -> RecurrentMixer:
    """A module of the shape `SHAPE`."""
    return built(resolved(name, {**SHAPE, **MIXERS[name][1], **values}, causal=causal), causal, dtype)


def by_recurrence(streams: Streams, borders: Collection[int] = ()) -> tuple[Tensor, Tensor]:
    """(outputs, last state) token by token in float64; the state is forgotten at borders.

    S_t = γ_t S_{t-1} + k_tᵀ u_t, o_t = q_t S_t, u_t = v_t or β_t (v_t - k_t γ_t S_{t-1}).
    """
    q, k, v, gates = (x.double() for x in streams[:4])
    betas = None if streams.betas_BHT1 is None else streams.betas_BHT1.double()
    state, outs = torch.zeros(*v.shape[:-2], k.shape[-1], v.shape[-1], dtype=torch.float64), []
    for t in range(q.shape[-2]):
        state = torch.zeros_like(state) if t in borders else state
        state = gates[..., t, :].exp()[..., None] * state
        written = v[..., t, :]
        if betas is not None:
            written = betas[..., t, :] * (written - torch.einsum("...k,...kv->...v", k[..., t, :], state))
        state = state + torch.einsum("...k,...v->...kv", k[..., t, :], written)
        outs.append(torch.einsum("...k,...kv->...v", q[..., t, :], state))
    return torch.stack(outs, dim=-2), state


def inputs_of(
    module: RecurrentMixer,
    x_BTD: Tensor,
    mask: AttentionMask = CAUSAL,
    positions: Tensor | None = None,
    cache: RecurrentState | None = None,
) -> RecurrentInputs:
    """What a forward pass gives to a mixer over x."""
    positions = torch.arange(x_BTD.shape[1]) if positions is None else positions
    return module.prepare(ForwardContext(x_BTD, mask, {"self": positions}), cache)


def whole(module: RecurrentMixer, x_BTD: Tensor, mask: AttentionMask = CAUSAL) -> Tensor:
    """The output over a whole row."""
    out: Tensor = module(x_BTD, inputs_of(module, x_BTD, mask))
    return out


def whole_by_fla(module: RecurrentMixer, x_BTD: Tensor, mask: AttentionMask = CAUSAL) -> Tensor:
    """The same by flash-linear-attention, as in training with `kernels: fla`."""
    context = ForwardContext(x_BTD, mask, {"self": torch.arange(x_BTD.shape[1])})
    context.fla = True
    out: Tensor = module(x_BTD, module.prepare(context, None))
    return out


def decoded(module: RecurrentMixer, x_BTD: Tensor, prompts: list[int], padding: float = 0.0) -> tuple[Tensor, Any]:
    """(outputs from each prompt's last token on, cache): the prompts as one padded batch, then token by token."""
    rows = CacheLengths(prompts, x_BTD.device)
    cache, longest = RecurrentState(rows), max(prompts)
    padded = torch.full((len(x_BTD), longest, D), padding, dtype=x_BTD.dtype)
    for row, length in enumerate(prompts):
        padded[row, :length] = x_BTD[row, :length]
    first = module(padded, inputs_of(module, padded, cache=cache))
    outs = [first[torch.arange(len(x_BTD)), rows.lengths_B - 1]]
    for _ in range(x_BTD.shape[1] - longest):
        new = x_BTD[torch.arange(len(x_BTD)), rows.lengths_B][:, None]
        outs.append(module(new, inputs_of(module, new, rows.mask(more=1), rows.next_positions(), cache))[:, 0])
        rows.advance()
    return torch.stack(outs, dim=1), cache


def weights(module: nn.Module, *names: str) -> list[Tensor]:
    """Parameters by name."""
    named = dict(module.named_parameters())
    return [named[name].detach() for name in names]


def behind_the_masks(config: ResolvedRecurrence, tokens: int) -> int:
    """FLOPs of the pairs inside chunks that come later than their query: two products, over K and over V.

    Of the keys that the delta rule compares, those of each token with itself are among them.
    """
    sizes = [min(config.chunk, tokens - first) for first in range(0, tokens, config.chunk)]
    hidden = sum(size * (size - 1) // 2 for size in sizes) * (config.key_width + config.value_width)
    if config.delta_rule:
        hidden += sum(size * (size + 1) // 2 for size in sizes) * config.key_width
    return 2 * config.directions * hidden


def _system_flops(system_shape: torch.Size, values_shape: torch.Size, *_: Any, **__: Any) -> int:
    """A product with the part of the matrix below the diagonal."""
    *heads, size, _ = system_shape
    return size * (size - 1) * values_shape[-1] * torch.Size(heads).numel()


SYSTEMS = {torch.ops.aten.linalg_solve_triangular: _system_flops}
"""FLOPs of triangular systems, which torch's counter does not know."""


@contextmanager
def convolutions_counted(model: nn.Module) -> Iterator[None]:
    """Context in which each short convolution also runs as torch's own, which torch's counter knows."""

    def run(module: ShortConvolution, inputs: tuple[Tensor, Any, str], _: Tensor) -> None:
        padded_BDT = F.pad(inputs[0].detach().transpose(1, 2), (module.form.width - 1, 0))
        F.conv1d(padded_BDT, module.weight.detach()[:, None], groups=len(module.weight))

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, ShortConvolution):
                stack.callback(module.register_forward_hook(run).remove)
        yield

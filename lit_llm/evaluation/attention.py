"""Attention of a trained model and dependence of its targets on the source, by position, for both families.

Windows of held-out text are cut at one place into a source and a target, which is read with teacher forcing.

position   of a token in its stack's input, from 0      step   of a target token, from 1

local_probability      weight on the 5 keys that end at the query; its fall with the position is locality decay
                       (arXiv 2510.26622). encoder_local_probability: the encoder's, which also sees later keys
first_key_probability  weight on the row's first key, of queries after it: an attention sink (arXiv 2309.17453).
                       encoder_first_key_probability: the encoder's
target_log_probability   log p(y_i), nats; by position and by step
source_*               attention to the source: cross-attention, or the part of decoder-only self-attention on the
                       source's tokens (without <s>), divided by its mass. `SourceAttention` defines each
source_mass            decoder-only: weight on the source's tokens; source_mass_null: if all visible keys weighed alike
source_norm_share      encoder-decoder: ‖cross‖ / (‖cross‖ + ‖self‖), the norms of the outputs of a layer's attentions
source_gain            log p(y_i) minus the same with another window's source
source_sensitivity     ‖∂ log p(y_i) / ∂E_S‖, by the source's embeddings; attention_sensitivity: of each layer's
                       attention output, as it is added, by the source's states. After Fu et al. 2023 (arXiv 2304.04052)

A decay is a least-squares slope of log against log: 0 for a constant, −1 for a fall as 1 / position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lit_llm.components.attention.dot_product import DotProduct, ScoreInputs
from lit_llm.components.attention.module import Attention
from lit_llm.components.loss.module import target_nats
from lit_llm.components.masks import KernelMask
from lit_llm.config.problems import InputError, Problem
from lit_llm.data.batches import WindowCollator, spread, spread_windows
from lit_llm.data.prepare import Prepared
from lit_llm.evaluation.attention_weights import self_attention_shares, source_attention
from lit_llm.evaluation.config import AttentionAnalysisConfig
from lit_llm.evaluation.curves import Axis, Curves, log_slope
from lit_llm.evaluation.result import EvaluationResult, Progress
from lit_llm.evaluation.source_sensitivity import (
    attention_sensitivity,
    end_to_end_sensitivity,
    hooked,
    source_places,
    target_queries,
)
from lit_llm.models.build import generator
from lit_llm.models.families import EncoderDecoder, LanguageModel
from lit_llm.models.resolved import not_analysed
from lit_llm.models.stacks import Block, Stack
from lit_llm.objectives.collate import Batch
from lit_llm.objectives.config import MasksConfig, PrefixLM


def attention_analysis(
    model: LanguageModel,
    config: AttentionAnalysisConfig,
    data: Prepared,
    masks: MasksConfig,
    *,
    batch_tokens: int,
    progress: Progress = lambda *_: None,
    split: str = "test",
) -> EvaluationResult:
    """Metrics `attention/<measure>`, unweighted means over positions or steps, and `..._decay`, their slopes.

    A row: measure, axis (position, step or None), first and last place of its bucket, layer (None: all), value.
    progress: counts windows, those with derivatives twice. split: the split that is read; validation where it has none.
    Raises InputError, before anything is computed, if a source holds out no window of that length or a step is beyond
    the target.
    """
    if problem := not_analysed(model.config):
        raise InputError(Problem(problem, "attention"))
    if problems := config.problems(data.config.sequence_length):
        raise InputError(*(Problem(message, f"attention.{key}") for key, message in problems))
    windows_NT = held_out_windows(data, config, split)
    few_NT = windows_NT[spread(config.sensitivity_sequences, len(windows_NT))]
    total = len(windows_NT) + len(few_NT)
    curves, device = Curves(), next(model.parameters()).device
    batches = partial(_batches, model, config, masks, batch_tokens)
    training = model.training
    model.eval()
    try:
        for (first, batch), (_, other) in zip(
            batches(windows_NT), batches(_exchange_sources(windows_NT, config)), strict=True
        ):
            log_probability_BN = record_weights(model, batch.to(device), config.window, curves)
            if len(windows_NT) > 1:
                gain_BN = log_probability_BN - target_log_probability(model, other.to(device))
                curves.add("source_gain", Axis("step", range(1, gain_BN.shape[1] + 1)), None, gain_BN)
            progress(first + len(batch), total)
        for first, batch in batches(few_NT):
            record_derivatives(model, batch.to(device), first, config, curves)
            progress(len(windows_NT) + first + len(batch), total)
    finally:
        model.train(training)
    rows = [row for (measure, _), curve in curves.items() for row in curve.rows(measure, config.buckets)]
    return EvaluationResult(_metrics(curves, config.window), rows)


def held_out_windows(data: Prepared, config: AttentionAnalysisConfig, split: str = "test") -> np.ndarray:
    """N x T ids: windows of every source, evenly spread over it, in proportion to its share of the mixture."""
    held_out = {source.name: source.count(source.evaluated_split(split)) for source in data.sources}
    if problems := config.too_short(data.config.sequence_length, held_out):
        raise InputError(*(Problem(message, f"attention.{key}") for key, message in problems))
    if config.sequence_length is not None:
        data = replace(data, config=data.config.model_copy(update={"sequence_length": config.sequence_length}))
    shares = sum(source.share for source in data.sources)
    windows = [
        spread_windows(
            data, source, source.evaluated_split(split), max(1, round(config.sequences * source.share / shares))
        )
        for source in data.sources
    ]
    return np.concatenate(windows)


def _exchange_sources(windows_NT: np.ndarray, config: AttentionAnalysisConfig) -> np.ndarray:
    """The windows with their sources exchanged: each gets the source of the window before it."""
    split = config.split(windows_NT.shape[1])
    return np.concatenate([np.roll(windows_NT, 1, axis=0)[:, :split], windows_NT[:, split:]], axis=1)


def _batches(
    model: LanguageModel, config: AttentionAnalysisConfig, masks: MasksConfig, tokens: int, windows_NT: np.ndarray
) -> Iterator[tuple[int, Batch]]:
    """Pairs (number of the first window, batch of at most `tokens` tokens)."""
    length = windows_NT.shape[1]
    rows, objective = max(1, tokens // length), PrefixLM(split=config.split(length))
    collator = WindowCollator(objective, model.config.family, masks, model.config.vocabulary)
    for first in range(0, len(windows_NT), rows):
        yield first, collator.batch(windows_NT[first : first + rows], first)


# --- what is measured ----------------------------------------------------------------------------------------------


@torch.no_grad()
def record_weights(model: LanguageModel, batch: Batch, window: int, curves: Curves) -> Tensor:
    """Record statistics of every attention in one forward pass. Returns the targets' log-probabilities, B x N."""
    source, queries = source_places(batch), target_queries(batch)
    steps, hooks = Axis("step", range(1, len(queries) + 1)), []
    encoder = model.encoder if isinstance(model, EncoderDecoder) else None

    if encoder:
        for layer, attention in enumerate(_attentions_of(encoder, "self_attention")):
            hook = partial(_record_shares, curves, "encoder_", layer, window)
            hooks.append(attention.dot_product.register_forward_pre_hook(hook))
    self_norms: dict[int, Tensor] = {}
    for layer, attention in enumerate(_attentions_of(model.decoder, "self_attention")):
        hook = partial(_record_shares, curves, "", layer, window)
        hooks.append(attention.dot_product.register_forward_pre_hook(hook))
    for layer, module in enumerate(_adding_modules(model.decoder, "self_attention")):
        hooks.append(module.register_forward_hook(partial(_keep_norm, self_norms, layer)))
    for layer, attention in enumerate(
        _attentions_of(model.decoder, "cross_attention" if encoder else "self_attention")
    ):
        at_source = partial(_record_source, curves, steps, layer, source, queries.start)
        hooks.append(attention.dot_product.register_forward_pre_hook(at_source))
    for layer, module in enumerate(_adding_modules(model.decoder, "cross_attention") if encoder else ()):
        hooks.append(module.register_forward_hook(partial(_record_norm_share, curves, steps, self_norms, layer)))
    with hooked(hooks):
        log_probability_BN = target_log_probability(model, batch)
    for axis in (steps, Axis("position", queries)):
        curves.add("target_log_probability", axis, None, log_probability_BN)
    return log_probability_BN


@torch.no_grad()
def target_log_probability(model: LanguageModel, batch: Batch) -> Tensor:
    """Log-probabilities of the targets, B x N, in nats; all examples must be cut at one place."""
    nats_N = target_nats(model.hidden(**batch.inputs), model.unembedding, (batch.targets, batch.places))
    return -nats_N.view(len(batch), -1)


def _attentions_of(stack: Stack, name: str) -> list[Attention]:
    return [getattr(block, name) for block in stack.layers]


def _adding_modules(stack: Stack, name: str) -> list[nn.Module]:
    """For each layer the module whose output is added to the residual stream: the attention, or the norm after it."""
    return [block.norm_of_added(name) or getattr(block, name) for block in cast("list[Block]", [*stack.layers])]


DotProductInputs = tuple[Tensor, Tensor, Tensor, KernelMask, None]
"""Inputs of a DotProduct without bias: queries, keys, values, mask."""


def _record_shares(
    curves: Curves, stack: str, layer: int, window: int, attention: nn.Module, inputs: DotProductInputs
) -> None:
    assert isinstance(attention, DotProduct)
    q_BHTK, k_BHTK, _, mask = inputs[:4]
    near_BT, first_BT = self_attention_shares(attention, ScoreInputs(q_BHTK, k_BHTK, mask), window)
    tokens = q_BHTK.shape[2]
    curves.add(f"{stack}local_probability", Axis("position", range(tokens)), layer, near_BT)
    if tokens > 1:
        curves.add(f"{stack}first_key_probability", Axis("position", range(1, tokens)), layer, first_BT[:, 1:])


def _record_source(
    curves: Curves, steps: Axis, layer: int, source: slice, start: int, attention: nn.Module, inputs: DotProductInputs
) -> None:
    assert isinstance(attention, DotProduct)
    q_BHTK, k_BHSK, _, mask = inputs[:4]
    statistics = source_attention(attention, ScoreInputs(q_BHTK, k_BHSK, mask), source, start)
    for name in ("entropy", "top_mass", "top_percent_mass"):
        curves.add(f"source_{name}", steps, layer, getattr(statistics, name), statistics.sees)
    for name in ("overlap", "cosine"):
        curves.add(f"source_{name}", steps, layer, getattr(statistics, name), statistics.follows)
    stripes_B1 = statistics.stripes[:, None]
    curves.add("source_stripes", Axis(None, (0,)), layer, stripes_B1, stripes_B1.isfinite())
    if start:
        curves.add("source_mass", steps, layer, statistics.mass)
        curves.add("source_mass_null", steps, layer, statistics.null)


def _keep_norm(norms: dict[int, Tensor], layer: int, _: nn.Module, __: Any, out_BTD: Tensor) -> None:
    norms[layer] = out_BTD.norm(dim=-1)


def _record_norm_share(
    curves: Curves, steps: Axis, self_norms: dict[int, Tensor], layer: int, _: nn.Module, __: Any, out_BTD: Tensor
) -> None:
    cross_BT = out_BTD.norm(dim=-1)
    curves.add("source_norm_share", steps, layer, cross_BT / (cross_BT + self_norms[layer]))


def record_derivatives(
    model: LanguageModel, batch: Batch, first: int, config: AttentionAnalysisConfig, curves: Curves
) -> None:
    """Record derivatives with respect to the source. first: number of the first window; seeds directions."""
    chosen = config.steps_of(len(target_queries(batch)))
    axis = Axis("step", chosen, bucketed=False)
    curves.add("source_sensitivity", axis, None, end_to_end_sensitivity(model, batch, chosen))
    shape = config.draws, model.config.d_model
    draws = [torch.randn(shape, generator=generator(0, f"sensitivity/{first + row}")) for row in range(len(batch))]
    directions_BRD = torch.stack(draws).to(model.embedding.weight)
    for layer, norms_BN in enumerate(attention_sensitivity(model, batch, chosen, directions_BRD)):
        curves.add("attention_sensitivity", axis, layer, norms_BN)


def _metrics(curves: Curves, window: int) -> dict[str, float]:
    """Finite metrics of the curves."""
    metrics: dict[str, float] = {}
    for (measure, _), curve in curves.items():
        means = curve.means()
        metrics[measure] = float(np.nanmean(means)) if np.isfinite(means).any() else math.nan
    # Before position `window` all keys that a causal query sees are local, and the probability is 1.
    local = curves["local_probability", "position"].means()
    metrics["locality_decay"] = log_slope(np.arange(window + 1, len(local) + 1), local[window:])
    if mass := curves.get(("source_mass", "step")):
        null = curves["source_mass_null", "step"].means()
        ratio = np.divide(mass.means(), null, out=np.full(len(null), math.nan), where=null > 0)
        metrics["source_mass_over_null"] = float(np.nanmean(ratio)) if np.isfinite(ratio).any() else math.nan
        metrics["source_mass_over_null_decay"] = log_slope(mass.axis.places, ratio)
    for measure in ("source_mass", "source_norm_share", "source_gain", "source_sensitivity", "attention_sensitivity"):
        if by_step := curves.get((measure, "step")):
            metrics[f"{measure}_decay"] = log_slope(by_step.axis.places, by_step.means())
    return {f"attention/{name}": value for name, value in metrics.items() if math.isfinite(value)}

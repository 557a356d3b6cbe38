"""Scores of continuations by a model of any family, in batches of rows of about one length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.components.embedding.module import Unembedding
from lit_llm.components.loss.config import chunk_rows
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.collate import collate
from lit_llm.objectives.config import EOD, MasksConfig

Pair = tuple[Sequence[int], Sequence[int]]
"""The ids of a context, and of a continuation of at least one token."""


@torch.inference_mode()
def score_pairs(
    model: LanguageModel, pairs: Sequence[Pair], masks: MasksConfig, batch_tokens: int
) -> list[tuple[float, bool]]:
    """Scores of each pair's continuation: (log-probability in nats, whether all its tokens are the most probable ones).

    Pairs that differ in the last token alone, such as one-letter answers, share one forward pass.
    """
    readings: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
    for number, (context, continuation) in enumerate(pairs):
        readings[tuple(context), tuple(continuation[:-1])].append(number)
    rows, device, family = list(readings), next(model.parameters()).device, model.config.family
    scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for chosen in _batches([(len(context), len(read) + 1) for context, read in rows], family, batch_tokens):
        sources = [np.array(rows[row][0], dtype=np.int64) for row in chosen]
        targets = [np.array([*rows[row][1], EOD], dtype=np.int64) for row in chosen]  # the last token is not read
        batch = collate(sources, targets, family, masks).to(device)
        hidden_ND = model.hidden(**batch.inputs).flatten(0, 1)
        numbers: list[int] = []
        positions: list[int] = []
        tokens: list[Sequence[int]] = []
        for index, row in enumerate(chosen):
            start = index * batch.targets.shape[1] + (0 if family == "encoder_decoder" else len(sources[index]))
            for number in readings[rows[row]]:
                numbers.append(number)
                tokens.append(pairs[number][1])
                positions.extend(range(start, start + len(tokens[-1])))
        nats, greedy = _score_tokens(
            hidden_ND, model.unembedding, positions, [token for continuation in tokens for token in continuation]
        )
        cuts = np.cumsum([len(continuation) for continuation in tokens])[:-1]
        for number, pair_nats, pair_greedy in zip(numbers, np.split(nats, cuts), np.split(greedy, cuts), strict=True):
            scores[number] = (-float(pair_nats.sum()), bool(pair_greedy.all()))
    return scores


def _score_tokens(
    hidden_ND: Tensor, unembedding: Unembedding, positions: Sequence[int], tokens: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """(nats in float64, whether it is the most probable token) of one token at each of the positions."""
    hidden_ND = hidden_ND[torch.tensor(positions, device=hidden_ND.device)]
    tokens_N = torch.tensor(tokens, device=hidden_ND.device)
    nats, greedy = [], []
    size = chunk_rows(unembedding.vocabulary, hidden_ND.device.type)  # limits the memory of the logits
    for hidden, token in zip(hidden_ND.split(size), tokens_N.split(size), strict=True):
        logits = unembedding(hidden).float()
        nats.append(F.cross_entropy(logits, token, reduction="none"))
        greedy.append(logits.argmax(-1) == token)
    return torch.cat(nats).double().cpu().numpy(), torch.cat(greedy).cpu().numpy()


def _batches(lengths: Sequence[tuple[int, int]], family: str, batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers of each batch, of about one length, the longest first. lengths: (source, target) tokens of rows."""
    is_encoder_decoder = family == "encoder_decoder"  # its sources and targets are padded separately

    def key(number: int) -> tuple[int, ...]:
        source, target = lengths[number]
        return (-source, -target) if is_encoder_decoder else (-source - target,)

    batch: list[int] = []
    width: tuple[int, ...] = ()
    for number in sorted(range(len(lengths)), key=key):
        size = lengths[number] if is_encoder_decoder else (sum(lengths[number]),)
        wider = tuple(map(max, width, size)) if batch else size
        if batch and sum(wider) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, wider = [], size
        batch.append(number)
        width = wider
    if batch:
        yield batch

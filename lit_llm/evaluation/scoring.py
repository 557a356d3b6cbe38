"""Nats of the targets of any number of examples, in batches that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from lit_llm.data.batches import opened
from lit_llm.evaluation.likelihood import nats_of
from lit_llm.evaluation.result import Progress
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.collate import Batch, Family, collate
from lit_llm.objectives.config import MasksConfig

Example = tuple[np.ndarray, np.ndarray]
"""The ids of a source, which is given, and of a target, of at least one token, which is scored."""


@torch.no_grad()
def score(
    model: LanguageModel,
    examples: Sequence[Example],
    masks: MasksConfig,
    *,
    batch_tokens: int,
    progress: Progress = lambda *_: None,
    opening: Sequence[int] = (),
) -> Iterator[tuple[int, np.ndarray]]:
    """Pairs (number of an example, nats of each of its targets in float64), the longest example first.

    The model must be in evaluation mode: dropout would change the loss. batch_tokens: tokens of a batch, padding
    included; a longer example is a batch by itself. Batching changes the nats by rounding only. opening: ids before
    every source.
    """
    assert not model.training, "a model in training mode would be scored with its dropout"
    device, done = next(model.parameters()).device, 0
    for numbers, batch in collated(examples, model.config.family, masks, batch_tokens, opening):
        nats = nats_of(model, batch.to(device)).double().cpu().numpy()
        ends = np.cumsum([len(examples[number][1]) for number in numbers])
        yield from zip(numbers, np.split(nats, ends[:-1]), strict=True)
        done += len(numbers)
        progress(done, len(examples))


def collated(
    examples: Sequence[Example], family: Family, masks: MasksConfig, batch_tokens: int, opening: Sequence[int] = ()
) -> Iterator[tuple[list[int], Batch]]:
    """(numbers of the examples, their batch) of each batch, the longest examples first; arguments as in `score`."""
    for numbers in _batches([len(source) + len(target) for source, target in examples], batch_tokens):
        sources, targets = zip(*(examples[number] for number in numbers), strict=True)
        yield numbers, collate([opened(opening, source) for source in sources], targets, family, masks)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Example numbers of each batch, of about one length to save padding."""
    # The longest first: a lack of memory shows at once.
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    while order:
        size = max(1, batch_tokens // lengths[order[0]])
        yield order[:size]
        order = order[size:]

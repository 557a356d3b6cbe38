"""The one yardstick: nats per token on the same target tokens given the same prefix, or the same text around them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import SumMetric

from lit_llm.components.loss.module import target_nats
from lit_llm.data.batches import cut, validation_windows
from lit_llm.data.prepare import Prepared
from lit_llm.evaluation.config import ValidationConfig
from lit_llm.models.transformer import LanguageModel
from lit_llm.objectives.config import MasksConfig, Objective, continues
from lit_llm.objectives.layout import Batch, Family


@dataclass(frozen=True)
class _Held:
    """The held-out windows of one source."""

    name: str
    weight: float
    """Of one of its windows; 1 where there is no other source."""
    target_batches: list[Batch]
    objective_batches: list[Batch]
    target_bytes: int


class Validation:
    """Evaluates a model on the same held-out windows each time it is called.

    val/target_nll   nats per token on the window's second part given its first, whatever the arm's own objective;
                     val/perplexity and val/bits_per_byte are the same in other units
    val/objective_loss   nats per target of the arm's own objective; compares within one objective only

    A model that was trained with mode tokens (UL2) is given the one for a prefix that goes on, before the same prefix.
    An encoder-only model predicts no token from those before it. In place of the first it has val/masked_nll: nats per
    token on the same tokens of each window, all of them [MASK], whatever share was hidden in its training.

    Of a mixture they are those of the text that is trained on: its sources' windows weigh as much as their shares say.
    Beside them stand val/target_nll/<source> and val/bits_per_byte/<source>.
    """

    def __init__(
        self, config: ValidationConfig, data: Prepared, objective: Objective, family: Family, masks: MasksConfig
    ) -> None:
        size = data.config.batch_size
        length = data.config.sequence_length
        prefix = config.prefix(length)
        self.metric, yardstick = config.yardstick(length, family)
        self.same = objective.resolved(length) == yardstick
        self.continues = continues(family)
        vocabulary = data.config.tokenizer.vocabulary
        opening = objective.opening(length, vocabulary)
        byte_lengths = data.tokenizer().byte_lengths()
        windows = {source.name: validation_windows(data, source, config.sequences) for source in data.sources}
        most, shares = max(map(len, windows.values())), sum(source.share for source in data.sources)
        self.sources = []
        for source in data.sources:
            own = windows[source.name]
            parts = [own[start : start + size] for start in range(0, len(own), size)]
            ways: list[tuple[Objective, Sequence[int]]] = [(objective, ()), (yardstick, opening)]
            # What they draw is drawn once, by a seed that all arms share.
            objectives, targets = (
                [
                    cut(part, way, family, masks, vocabulary=vocabulary, seed=0, first=k * size, opening=before)
                    for k, part in enumerate(parts)
                ]
                for way, before in ways
            )
            held_bytes = 0 if byte_lengths is None else int(byte_lengths[own[:, prefix:]].sum())
            weight = source.share / shares * (most / len(own))
            self.sources.append(_Held(source.name, weight, targets, objectives, held_bytes))

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """The model should be in evaluation mode."""
        found: dict[str, float] = {}
        sums = np.zeros(5)
        for source in self.sources:
            nats, tokens = sum_of_nats(model, source.target_batches)
            objective = (nats, tokens) if self.same else sum_of_nats(model, source.objective_batches)
            sums += source.weight * np.array([nats, tokens, source.target_bytes, *objective])
            if source.name:
                found[f"{self.metric}/{source.name}"] = nats / tokens
                if source.target_bytes and self.continues:
                    found[f"val/bits_per_byte/{source.name}"] = nats / math.log(2) / source.target_bytes
        nats, tokens, target_bytes, objective_nats, objective_tokens = sums.tolist()
        both = {self.metric: nats / tokens, "val/objective_loss": objective_nats / objective_tokens}
        if not self.continues:
            return both | found
        if target_bytes:
            found["val/bits_per_byte"] = nats / math.log(2) / target_bytes
        return both | {"val/perplexity": math.exp(min(nats / tokens, 700.0))} | found


def nats_of(model: LanguageModel, batch: Batch) -> Tensor:
    """Nats of every counted target, row by row, as one vector; to be called without gradients."""
    return target_nats(model.hidden(**batch.inputs), model.unembedding, batch.targets, batch.weights)


@torch.no_grad()
def sum_of_nats(model: LanguageModel, batches: list[Batch]) -> tuple[float, float]:
    """(nats, tokens) over all counted targets, shared among devices; in float64, so that order hardly matters."""
    device = next(model.parameters()).device
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    nats, tokens = (SumMetric().set_dtype(torch.float64).to(device) for _ in range(2))
    for batch in batches[rank::ranks]:
        batch = batch.to(device)
        found = nats_of(model, batch)
        nats.update(found.double().sum())
        tokens.update(float(len(found)))
    return float(nats.compute()), float(tokens.compute())

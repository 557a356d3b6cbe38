"""The one yardstick: nats per token on the same target tokens given the same prefix, for every family."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torchmetrics import SumMetric

from lit_llm.components.loss.module import target_nats
from lit_llm.data.batches import cut, validation_windows
from lit_llm.data.prepare import Prepared
from lit_llm.evaluation.config import ValidationConfig
from lit_llm.models.transformer import LanguageModel
from lit_llm.objectives.config import Objective, PrefixLM
from lit_llm.objectives.layout import Batch, Family


class Validation:
    """Evaluates a model on the same held-out windows each time it is called.

    val/target_nll   nats per token on the window's second part given its first, whatever the arm's own objective;
                     val/perplexity and val/bits_per_byte are the same in other units
                     (no bits per byte for a tokenizer that cannot say how many bytes a token stands for, WordPiece)
    val/objective_loss   nats per target of the arm's own objective; compares within one objective only
    """

    def __init__(
        self, config: ValidationConfig, data: Prepared, objective: Objective, family: Family, bidirectional: bool
    ) -> None:
        windows = validation_windows(data, config.sequences)
        size = data.config.batch_size
        length = data.config.sequence_length
        prefix = config.prefix(length)
        yardstick = PrefixLM(split=prefix)
        parts = [windows[start : start + size] for start in range(0, len(windows), size)]
        # Random cuts of the arm's objective are drawn once, by a seed that all arms share.
        self.objective_batches = [cut(part, objective, family, bidirectional, 0, k) for k, part in enumerate(parts)]
        self.target_batches = [cut(part, yardstick, family, bidirectional, 0, k) for k, part in enumerate(parts)]
        self.same = objective.resolved(length) == yardstick
        lengths = data.tokenizer().byte_lengths()
        self.target_bytes = 0 if lengths is None else int(lengths[windows[:, prefix:]].sum())

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """The model should be in evaluation mode."""
        nats, tokens = sum_of_nats(model, self.target_batches)
        objective = (nats, tokens) if self.same else sum_of_nats(model, self.objective_batches)
        found = {
            "val/target_nll": nats / tokens,
            "val/perplexity": math.exp(min(nats / tokens, 700.0)),
            "val/objective_loss": objective[0] / objective[1],
        }
        if self.target_bytes:
            found["val/bits_per_byte"] = nats / math.log(2) / self.target_bytes
        return found


@torch.no_grad()
def sum_of_nats(model: LanguageModel, batches: list[Batch]) -> tuple[float, float]:
    """(nats, tokens) over all counted targets, shared among devices; in float64, so that order hardly matters."""
    device = next(model.parameters()).device
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    nats, tokens = (SumMetric().set_dtype(torch.float64).to(device) for _ in range(2))
    for batch in batches[rank::ranks]:
        batch = batch.to(device)
        found = target_nats(model.hidden(**batch.inputs), model.unembedding_VD, batch.targets, batch.weights)
        nats.update(found.double().sum())
        tokens.update(float(len(found)))
    return float(nats.compute()), float(tokens.compute())

"""The primary metric: nats per token on the same target tokens given the same prefix, or the same text around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from lit_llm.components.loss.module import target_hits, target_logits, target_nats
from lit_llm.config.metrics import ANSWER_ACCURACY, BITS_PER_BYTE, OBJECTIVE_LOSS, PERPLEXITY, SPLITS
from lit_llm.data.batches import WindowCollator, Windows, spread
from lit_llm.data.prepare import Prepared
from lit_llm.evaluation.config import ValidationConfig
from lit_llm.evaluation.result import Progress
from lit_llm.evaluation.unit_losses import UnitLosses
from lit_llm.evaluation.window_documents import documents_of
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.collate import Batch, Family
from lit_llm.objectives.config import Answers, MasksConfig, Objective, continues


@dataclass(frozen=True)
class _SourceWindows:
    """Held-out windows of one source."""

    name: str
    weight: float
    """Weight of one window; 1 where there is no other source."""
    target_batches: list[Batch]
    objective_batches: list[Batch]
    """Batches for the objective's loss; they may hold fewer windows than `target_batches`."""
    places: list[Tensor]
    """For each of `target_batches`, the index in `documents` of each counted target's document."""
    documents: np.ndarray
    """Numbers of the documents that have targets."""
    tokens: np.ndarray
    """Number of targets of each document."""
    bytes: np.ndarray | None
    """Bytes of the targets' text by document; None where the tokenizer does not give them."""


@dataclass(frozen=True)
class Measured:
    """Metrics and unit losses of one evaluation of a model."""

    metrics: dict[str, float]
    losses: list[UnitLosses]
    """Losses of the units that the targets' metrics sum over."""


class Validation:
    """Evaluates models on one fixed set of held-out windows.

    val/target_nll   nats per token on the window's second part given its first, for every training objective;
                     val/perplexity and val/bits_per_byte are the same in other units
    val/objective_loss   nats per target of the training objective; compares within one objective only
    val/answer_accuracy  share of a synthetic task's answer tokens that are the most probable ones, given the question
                         and the right answers before; val/target_nll is of the same tokens

    The names begin with `test/` where the windows are of the test split.

    A model that was trained with mode tokens (UL2) gets the prefix-LM mode token before the prefix.
    An encoder-only model has val/masked_nll in place of val/target_nll: nats per token on a fixed choice of tokens of
    each window, all of them replaced by [MASK], whatever share was hidden in training.

    The metrics of a mixture weight the windows of its sources by their shares. Each source also has
    val/target_nll/<source>, and val/bits_per_byte/<source> or val/answer_accuracy/<source>.

    An evaluation during training reads `sequences` windows. The evaluation after the last step (`final`) reads up to
    `final_sequences`, so the last point of a training curve may be offset from the others by the additional text. The
    objective's loss stays that of `sequences` windows, unless it is the loss of the targets.
    """

    def __init__(
        self,
        config: ValidationConfig,
        data: Prepared,
        objective: Objective,
        family: Family,
        masks: MasksConfig,
        split: str = "validation",
        final: bool = False,
    ) -> None:
        length = data.config.sequence_length
        name, primary = config.primary(length, family, objective)
        self.split, self.begin, self.kind = (
            split,
            SPLITS[split],
            name.removeprefix(SPLITS["validation"]),
        )
        self.metric = f"{self.begin}{self.kind}"
        self.same = objective.resolved(length) == primary
        self.continues, self.answers = continues(family), isinstance(primary, Answers)
        vocabulary, size = data.config.tokenizer.vocabulary, data.config.batch_size
        opening = objective.opening(length, vocabulary)
        byte_lengths = data.byte_lengths()

        def batches(windows: np.ndarray, objective: Objective, before: Sequence[int]) -> list[Batch]:
            # The objective's random choices are drawn once, by a seed that all arms share.
            collator = WindowCollator(objective, family, masks, vocabulary, opening=before)
            return [collator.batch(windows[first : first + size], first) for first in range(0, len(windows), size)]

        windows = {source.name: Windows(data, source, split) for source in data.sources}
        wanted = config.most_sequences if final else config.sequences
        chosen = {name: spread(wanted, of_source.count) for name, of_source in windows.items()}
        most, shares = max(map(len, chosen.values())), sum(source.share for source in data.sources)
        self.sources = []
        for source in data.sources:
            of_source, numbers = windows[source.name], chosen[source.name]
            read = of_source.read(numbers)
            few = of_source.read(spread(config.sequences, of_source.count)) if final else read
            targets = batches(read, primary, opening)
            given = np.arange(length) >= config.prefix(length)
            counted = np.broadcast_to(primary.counted(length) if isinstance(primary, Answers) else given, read.shape)
            if not self.continues:  # the hidden tokens count, each in its place
                counted = np.concatenate([batch.weights.bool().numpy() for batch in targets])
            documents, place = np.unique(
                documents_of(of_source.tokens, numbers * length, read)[counted], return_inverse=True
            )
            held_bytes = None
            if byte_lengths is not None:
                held_bytes = np.bincount(place, byte_lengths[read[counted]], len(documents)).astype(np.int64)
            self.sources.append(
                _SourceWindows(
                    source.name,
                    source.share / shares * (most / len(read)),
                    targets,
                    batches(few, objective, ()),
                    list(torch.from_numpy(place).split([int(batch.weights.sum()) for batch in targets])),
                    documents,
                    np.bincount(place, minlength=len(documents)),
                    held_bytes,
                )
            )

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """The metrics alone; the model should be in evaluation mode."""
        return self.measured(model).metrics

    def measured(self, model: LanguageModel, progress: Progress = lambda *_: None) -> Measured:
        """Metrics and loss of each document; the model should be in evaluation mode. progress: counts windows."""
        by_source: dict[str, float] = {}
        hits: list[tuple[float, float]] = []
        losses = []
        sums = np.zeros(5)
        done, total = 0, sum(len(batch) for source in self.sources for batch in self._batches(source))
        for source in self.sources:
            log = _with_offset(progress, done, total)
            by_document = nats_by_place(model, source.target_batches, source.places, len(source.documents), log)
            nats, tokens = math.fsum(by_document), float(source.tokens.sum())
            done += sum(map(len, source.target_batches))
            objective = (nats, tokens)
            if not self.same:
                objective = sum_of_nats(model, source.objective_batches, _with_offset(progress, done, total))
                done += sum(map(len, source.objective_batches))
            target_bytes = 0 if source.bytes is None else int(source.bytes.sum())
            sums += source.weight * np.array([nats, tokens, target_bytes, *objective])
            if source.name:
                by_source[f"{self.metric}/{source.name}"] = nats / tokens
                if target_bytes and self.continues:
                    by_source[f"{self.begin}{BITS_PER_BYTE.name}/{source.name}"] = nats / math.log(2) / target_bytes
            if self.answers:
                count = len(source.documents)
                right = math.fsum(nats_by_place(model, source.target_batches, source.places, count, value=hits_of))
                hits.append((source.weight * right, source.weight * tokens))
                if source.name:
                    by_source[f"{self.begin}{ANSWER_ACCURACY.name}/{source.name}"] = right / tokens
            losses.append(self._losses(source, by_document))
        metrics = self._metrics(*sums.tolist()) | by_source
        if hits:
            right, answers = map(sum, zip(*hits, strict=True))
            metrics[f"{self.begin}{ANSWER_ACCURACY.name}"] = right / answers
        return Measured(metrics, losses)

    @property
    def target_batches(self) -> list[Batch]:
        """Batches whose targets are measured, of all sources."""
        return [batch for source in self.sources for batch in source.target_batches]

    def _batches(self, source: _SourceWindows) -> list[Batch]:
        return source.target_batches if self.same else source.target_batches + source.objective_batches

    def _metrics(
        self, nats: float, tokens: float, target_bytes: float, objective_nats: float, objective_tokens: float
    ) -> dict[str, float]:
        """Metrics over all sources together."""
        both = {self.metric: nats / tokens, f"{self.begin}{OBJECTIVE_LOSS.name}": objective_nats / objective_tokens}
        if not self.continues:
            return both
        if target_bytes:
            both[f"{self.begin}{BITS_PER_BYTE.name}"] = nats / math.log(2) / target_bytes
        return both | {f"{self.begin}{PERPLEXITY.name}": math.exp(min(nats / tokens, 700.0))}

    def _losses(self, source: _SourceWindows, by_document: Sequence[float]) -> UnitLosses:
        return UnitLosses(
            source.name,
            source.documents.tolist(),
            by_document,
            source.tokens.tolist(),
            None if source.bytes is None or not self.continues else source.bytes.tolist(),
            source.weight,
            self.split,
            self.kind,
        )


def _with_offset(progress: Progress, offset: int, total: int) -> Progress:
    """A callback for one part of the work, after `offset` units of `total` are done."""
    return lambda done, _: progress(offset + done, total)


def nats_of(model: LanguageModel, batch: Batch) -> Tensor:
    """Nats of every counted target, row by row, as one vector; call it without gradients."""
    return target_nats(model.hidden(**batch.inputs), model.unembedding, (batch.targets, batch.places))


def hits_of(model: LanguageModel, batch: Batch) -> Tensor:
    """1 for every counted target that the model finds most probable, like `nats_of`."""
    return target_hits(model.hidden(**batch.inputs), model.unembedding, (batch.targets, batch.places))


def logits_of(model: LanguageModel, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 logits and ids of the counted targets, N x V and N, in chunks; call it without gradients."""
    chunks = target_logits(model.hidden(**batch.inputs), model.unembedding, (batch.targets, batch.places))
    return ((logits_NV.float(), ids_N) for logits_NV, ids_N in chunks)


class SumByPlace(Metric):
    """Float64 sums of values by index (`place`), reduced over devices.

    Updates run on the CPU, where the order of a sum is fixed.
    """

    sums: Tensor

    def __init__(self, places: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(places, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, place: Tensor, values: Tensor) -> None:
        self.sums.index_add_(0, place, values.double().cpu())

    def compute(self) -> Tensor:
        return self.sums


def ranks_now() -> tuple[int, int]:
    """This process's rank, and the number of ranks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def batches_of_rank(count: int) -> Iterator[tuple[int, bool]]:
    """Pairs (number of one of `count` batches that this rank computes, True where it counts).

    A rank without a batch of its own computes another's, uncounted: a sharded model needs all ranks at once.
    """
    rank, ranks = ranks_now()
    for first in range(0, count, ranks):
        number = min(first + rank, count - 1)
        yield number, number == first + rank


@torch.no_grad()
def nats_by_place(
    model: LanguageModel,
    batches: Sequence[Batch],
    places: Sequence[Tensor],
    count: int,
    progress: Progress = lambda *_: None,
    value: Callable[[LanguageModel, Batch], Tensor] = nats_of,
) -> list[float]:
    """Sums of nats of the counted targets by index, reduced over devices.

    Ranks divide the batches. places: for each batch the index, below `count`, of each counted target. progress: counts
    rows. value: what is
    summed in place of nats, one number for each counted target.
    """
    device, sums = next(model.parameters()).device, SumByPlace(count)
    done, total = 0, sum(map(len, batches))
    for number, counts in batches_of_rank(len(batches)):
        values = value(model, batches[number].to(device))
        if counts:
            sums.update(places[number], values)
        done += len(batches[number])
        progress(min(total, ranks_now()[1] * done), total)
    totals: list[float] = sums.to(device).compute().reshape(count).tolist()  # a single sum comes as a scalar
    return totals


@torch.no_grad()
def sum_of_nats(
    model: LanguageModel, batches: Sequence[Batch], progress: Progress = lambda *_: None
) -> tuple[float, float]:
    """(nats, tokens) over all counted targets, reduced over devices in float64, where order hardly matters."""
    tokens = [int(batch.weights.sum()) for batch in batches]
    places = [torch.zeros(count, dtype=torch.int64) for count in tokens]
    return nats_by_place(model, batches, places, 1, progress)[0], float(sum(tokens))

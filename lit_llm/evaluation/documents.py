"""Likelihood of single documents, of the training data and of further texts (arXiv 2510.26622, section 4).

The paper takes 79K documents of RedPajama's seven sources and the sixteen sources of Paloma, and averages over sources.
A document is scored as the primary metric of training scores a window: the tokens after its prefix, given the prefix.
An encoder-decoder reads the prefix in its encoder. So both families predict the same tokens, given the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_llm.config.metrics import BITS_PER_BYTE
from lit_llm.config.problems import InputError, Problem
from lit_llm.data.prepare import Prepared, PreparedSource, prepare_held_out
from lit_llm.data.sources import UNNAMED
from lit_llm.evaluation.config import LikelihoodConfig
from lit_llm.evaluation.result import EvaluationResult, Progress
from lit_llm.evaluation.scoring import score
from lit_llm.evaluation.window_documents import document_ends
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.config import MasksConfig


def likelihood(
    model: LanguageModel,
    config: LikelihoodConfig,
    data: Prepared,
    masks: MasksConfig,
    *,
    batch_tokens: int,
    progress: Progress = lambda *_: None,
    corpora: Sequence[PreparedSource] | None = None,
    opening: Sequence[int] = (),
    split: str = "test",
) -> EvaluationResult:
    """Losses of held-out documents: of each source of the model's data, and of each of `config.corpora`.

    corpora: the result of `prepare_held_out`, which is called here when absent. progress: counts documents.
    opening: ids before every prefix, for a model that was trained with mode tokens. split: the split whose documents
    are read; validation where it has none.

    likelihood/nll               nats per target token, over all documents of the data that the model was trained on
    likelihood/perplexity        e to the power of likelihood/nll
    likelihood/bits_per_byte     bits per byte of the targets' text; absent where a tokenizer's bytes are not known
    likelihood/documents, likelihood/skipped     scored; too short to have a target
    likelihood/nll/<name>        and bits_per_byte, documents, skipped: of one source of a mixture, of one of `corpora`
    likelihood/mean_over_sources, likelihood/mean_over_corpora
                                 mean of the nll of a mixture's sources, of `corpora`, each weighing the same

    `corpora` do not change the metrics of the model's data.

    A row for each document: source, document (hash of its normalised text), and of its targets tokens, bytes (None
    where not known) and nats. The end-of-document token is a target like any other, of no bytes.

    Raises InputError, before anything is scored, for a source of which no document has a target.
    """
    window = data.config.sequence_length
    if problems := config.problems(window):
        raise InputError(*(Problem(message, f"likelihood.{key}") for key, message in problems))
    length, prefix = config.span(window)
    if corpora is None:
        corpora = prepare_held_out(config.corpora, data)
    samples = {
        source.name or UNNAMED: _sample(data, source, source.evaluated_split(split), config.documents, length, prefix)
        for source in (*data.sources, *corpora)
    }
    _refuse_empty(samples, prefix)

    documents = [(name, *document) for name, sample in samples.items() for document in sample.documents.items()]
    examples = [(tokens[:prefix], tokens[prefix:]) for _, _, tokens in documents]
    scored = score(model, examples, masks, batch_tokens=batch_tokens, progress=progress, opening=opening)
    nats = {number: float(nats_of_targets.sum()) for number, nats_of_targets in scored}
    byte_lengths = data.byte_lengths(*corpora)
    rows = [
        {
            "source": name,
            "document": document,
            "tokens": len(target),
            "bytes": None if byte_lengths is None else int(byte_lengths[target].sum()),
            "nats": nats[number],
        }
        for number, ((name, document, _), (_, target)) in enumerate(zip(documents, examples, strict=True))
    ]
    skipped = {name: sample.skipped for name, sample in samples.items()}
    names = list(samples)
    return EvaluationResult(_metrics(rows, skipped, names[: len(data.sources)], names[len(data.sources) :]), rows)


# --- which documents -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """Documents of one source."""

    documents: dict[str, np.ndarray]
    """{hash of a document's text: its first tokens}."""
    skipped: int
    """Documents that are no longer than the prefix."""


def _sample(data: Prepared, source: PreparedSource, split: str, count: int, length: int, prefix: int) -> _Sample:
    """The `count` documents with the smallest content hashes, each once, of those with more than `prefix` tokens.

    A random sample that depends neither on the order of the files, which are often sorted by what they are about, nor
    on the tokenizer, but for the documents that are too short under one of them.
    """
    tokens, contents = data.open(source, split), source.document_contents(split)
    ends = document_ends(tokens, len(tokens)) + 1
    starts = np.concatenate([[0], ends[:-1]])
    sizes = ends - starts
    long = np.flatnonzero(sizes > prefix)
    _, first = np.unique(contents[long], return_index=True)
    return _Sample(
        {
            f"{contents[place]:016x}": tokens.read(starts[place : place + 1], min(length, int(sizes[place])))[0]
            for place in long[first[:count]]
        },
        len(sizes) - len(long),
    )


def _refuse_empty(samples: dict[str, _Sample], prefix: int) -> None:
    problems = [
        Problem(
            f"none of the {sample.skipped} held-out documents of {name} has a token after a prefix of {prefix}; use a "
            "smaller one, or more text",
            "likelihood.prefix_length",
        )
        for name, sample in samples.items()
        if not sample.documents
    ]
    if problems:
        raise InputError(*problems)


# --- metrics -------------------------------------------------------------------------------------------------------


def _metrics(
    rows: list[dict[str, Any]], skipped: dict[str, int], sources: Sequence[str], corpora: Sequence[str]
) -> dict[str, float]:
    """The metrics of `likelihood`. sources, corpora: names of the training texts, and of the further ones."""
    model_data = _document_metrics(
        [row for row in rows if row["source"] in sources], sum(skipped[name] for name in sources)
    )
    metrics = {f"likelihood/{kind}": value for kind, value in model_data.items()}
    metrics["likelihood/perplexity"] = math.exp(min(model_data["nll"], 700.0))
    for group, names in (("sources", sources if len(sources) > 1 else []), ("corpora", corpora)):
        by_name = {
            name: _document_metrics([row for row in rows if row["source"] == name], skipped[name]) for name in names
        }
        for name, values in by_name.items():
            metrics |= {f"likelihood/{kind}/{name}": value for kind, value in values.items()}
        if len(names) > 1:
            metrics[f"likelihood/mean_over_{group}"] = sum(values["nll"] for values in by_name.values()) / len(names)
    return metrics


def _document_metrics(rows: list[dict[str, Any]], skipped: int) -> dict[str, float]:
    """The metrics of some documents."""
    nats = math.fsum(row["nats"] for row in rows)
    metrics = {"nll": nats / sum(row["tokens"] for row in rows), "documents": len(rows), "skipped": skipped}
    # None where the tokenizer does not give bytes; 0 where every target is the end of its document.
    if held_bytes := sum(row["bytes"] or 0 for row in rows):
        metrics[BITS_PER_BYTE.name] = nats / math.log(2) / held_bytes
    return metrics

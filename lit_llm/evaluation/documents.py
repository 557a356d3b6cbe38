"""Likelihood of single documents, in the text that was trained on and in others (arXiv 2510.26622, section 4).

The paper takes 79K documents of RedPajama's seven sources and the sixteen sources of Paloma, and averages over sources.
A document is scored as the yardstick of training scores a window: the tokens after its prefix, given the prefix, which
an encoder-decoder reads in its encoder; so both families are asked for the same tokens, given the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_llm.config.fingerprint import LENGTH
from lit_llm.config.problems import InputError, Problem
from lit_llm.data.prepare import Prepared, PreparedSource, prepare_held_out
from lit_llm.data.shards import Shards
from lit_llm.data.sources import UNNAMED
from lit_llm.evaluation.config import LikelihoodConfig
from lit_llm.evaluation.found import Found, Progress
from lit_llm.evaluation.scoring import score
from lit_llm.models.transformer import LanguageModel
from lit_llm.objectives.config import EOD, MasksConfig

_CHUNK = 1 << 20  # tokens read at once


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
) -> Found:
    """Losses of held-out documents: of each source of the model's data, and of each of `config.corpora`.

    corpora: those texts, where `prepare_held_out` was called before; else it is called here. progress: documents.
    opening: ids before every prefix, of a model that was trained with mode tokens.

    likelihood/nll               nats per target token, over all documents of the data that the model was trained on
    likelihood/perplexity        e to the power of it
    likelihood/bits_per_byte     bits per byte of the targets' text; absent where a tokenizer's bytes are not known
    likelihood/documents, likelihood/skipped     scored; too short to have a target
    likelihood/nll/<name>        and bits_per_byte, documents, skipped: of one source of a mixture, of one of `corpora`
    likelihood/mean_over_sources, likelihood/mean_over_corpora
                                 mean of the nll of a mixture's sources, of `corpora`, each weighing the same

    What `corpora` there are changes nothing in the figures of the model's own data.

    A row for each document: source, document (hash of its tokens, uncut), and of its targets tokens, bytes (None where
    not known) and nats. The end-of-document token is a target like any other, of no bytes.

    Raises InputError, before anything is scored, for a source of which no document has a target.
    """
    window = data.config.sequence_length
    if problems := config.problems(window):
        raise InputError(*(Problem(message, f"likelihood.{key}") for key, message in problems))
    length, prefix = config.span(window)
    if corpora is None:
        corpora = prepare_held_out(config.corpora, data)
    samples = {
        source.name or UNNAMED: _sample(data.open(source, "validation"), config.documents, length, prefix)
        for source in (*data.sources, *corpora)
    }
    _refuse_empty(samples, prefix)

    documents = [(name, *document) for name, sample in samples.items() for document in sample.documents.items()]
    examples = [(tokens[:prefix], tokens[prefix:]) for _, _, tokens in documents]
    scored = score(model, examples, masks, batch_tokens=batch_tokens, progress=progress, opening=opening)
    nats = {number: float(found.sum()) for number, found in scored}
    byte_lengths = data.tokenizer().byte_lengths()
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
    return Found(_metrics(rows, skipped, names[: len(data.sources)], names[len(data.sources) :]), rows)


# --- which documents -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """Documents of one source."""

    documents: dict[str, np.ndarray]
    """Hash of a document's tokens, its first tokens."""
    skipped: int
    """Documents that are no longer than the prefix."""


def _sample(tokens: Shards, count: int, length: int, prefix: int) -> _Sample:
    """The `count` documents with the smallest hashes, each once, of those with more than `prefix` tokens.

    A random sample that does not depend on the order of the files, which are often sorted by what they are about. One
    pass over the text, and memory for twice the sample.
    """
    chosen: dict[str, np.ndarray] = {}
    largest, skipped = "g", 0  # beyond every hexadecimal digit
    for document, begin, size in _documents(tokens, length):
        if size <= prefix:
            skipped += 1
        elif document < largest:
            chosen[document] = begin
            if len(chosen) >= 2 * count:
                chosen = dict(sorted(chosen.items())[:count])
                largest = max(chosen)
    return _Sample(dict(sorted(chosen.items())[:count]), skipped)


def _documents(tokens: Shards, length: int) -> Iterator[tuple[str, np.ndarray, int]]:
    """(hash of all its tokens, its first `length` tokens, how many it has) of every document, its end included."""
    content, begin, size = hashlib.sha256(), np.empty(0, np.uint32), 0
    for piece in _pieces(tokens):
        content.update(piece.astype("<u4").tobytes())
        if size < length:
            begin = np.concatenate([begin, piece[: length - size].astype(np.uint32)])
        size += len(piece)
        if piece[-1] == EOD:
            yield content.hexdigest()[:LENGTH], begin, size
            content, begin, size = hashlib.sha256(), np.empty(0, np.uint32), 0


def _pieces(tokens: Shards) -> Iterator[np.ndarray]:
    """The tokens in pieces that lie within one document; each document's last piece ends with its end."""
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens.read(np.array([start]), min(_CHUNK, len(tokens) - start))[0]
        begin = 0
        for end in [*(np.flatnonzero(chunk == EOD) + 1).tolist(), len(chunk)]:
            if begin < end:
                yield chunk[begin:end]
            begin = end


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


# --- what they say -------------------------------------------------------------------------------------------------


def _metrics(
    rows: list[dict[str, Any]], skipped: dict[str, int], sources: Sequence[str], corpora: Sequence[str]
) -> dict[str, float]:
    """sources, corpora: names of the texts that were trained on, and of the others."""
    own = _of([row for row in rows if row["source"] in sources], sum(skipped[name] for name in sources))
    metrics = {f"likelihood/{kind}": value for kind, value in own.items()}
    metrics["likelihood/perplexity"] = math.exp(min(own["nll"], 700.0))
    for group, names in (("sources", sources if len(sources) > 1 else []), ("corpora", corpora)):
        found = {name: _of([row for row in rows if row["source"] == name], skipped[name]) for name in names}
        for name, values in found.items():
            metrics |= {f"likelihood/{kind}/{name}": value for kind, value in values.items()}
        if len(names) > 1:
            metrics[f"likelihood/mean_over_{group}"] = sum(values["nll"] for values in found.values()) / len(names)
    return metrics


def _of(rows: list[dict[str, Any]], skipped: int) -> dict[str, float]:
    """The metrics of some documents."""
    nats = math.fsum(row["nats"] for row in rows)
    found = {"nll": nats / sum(row["tokens"] for row in rows), "documents": len(rows), "skipped": skipped}
    # None where bytes are not known; 0 where every target is the end of its document.
    if held_bytes := sum(row["bytes"] or 0 for row in rows):
        found["bits_per_byte"] = nats / math.log(2) / held_bytes
    return found

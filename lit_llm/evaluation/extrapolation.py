"""Loss beyond the training window (arXiv 2510.26622, figure 5).

A sequence is consecutive held-out text, documents joined as in training. Its first tokens are the prefix, the rest are
targets; an encoder-decoder reads the prefix in its encoder, so both families predict the same tokens, given the same.
Both predict left to right: the longest sequence holds the losses at all lengths, and each is computed once.

```
position   0      p                    window               2 windows
           prefix │ targets                │                     │
                  │                 ▕▆▆▆▆▆▆▏              ▕▆▆▆▆▆▆▏   the loss at 1 and at 2 windows
```
The paper draws loss over "total length" and does not say whether that is the mean of a whole sequence. Here the loss at
a length is that of the last quarter of a window before it. A mean of the whole sequence would average a breakdown at
its end with the tokens before; it can be computed from the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lit_llm.config.problems import InputError, Problem
from lit_llm.data.batches import spread_windows
from lit_llm.data.prepare import Prepared
from lit_llm.data.sources import UNNAMED
from lit_llm.evaluation.config import BUCKETS, ExtrapolationConfig
from lit_llm.evaluation.result import EvaluationResult, Progress
from lit_llm.evaluation.scoring import score
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.config import MasksConfig

LAST = BUCKETS // 4
"""Number of buckets before a length over which the loss at that length is averaged."""


def extrapolation(
    model: LanguageModel,
    config: ExtrapolationConfig,
    data: Prepared,
    masks: MasksConfig,
    *,
    batch_tokens: int,
    progress: Progress = lambda *_: None,
    opening: Sequence[int] = (),
    split: str = "test",
) -> EvaluationResult:
    """Loss by total length and by position, for every prefix. progress: counts sequences, each once for each prefix.
    opening: ids before every prefix, for a model that was trained with mode tokens. split: the split that is read;
    validation where it has none.

    extrapolation/nll/prefix_<P>/length_<L>x   P as it is configured, L in windows: nats per target token over the
                                               targets in the last quarter of a window before a total length of L
                                               windows (positions of the whole sequence, counted from 0)

    Of a mixture it is the mean over its sources, weighted by their shares.

    A row for each source, prefix and bucket of positions (a sixteenth of a window) that has targets: source, prefix,
    position (the bucket's first), length (of the sequence up to the bucket's end), tokens, nats, and log_probability,
    the targets' mean.

    Raises InputError, before anything is scored, if a source holds out less text than the longest length.
    """
    window = data.config.sequence_length
    if problems := config.problems(window):
        raise InputError(*(Problem(message, f"extrapolation.{key}") for key, message in problems))
    sequences = held_out_sequences(config, data, split)
    prefixes = config.prefix_lengths(window)
    source_of = np.repeat(np.arange(len(sequences)), list(map(len, sequences)))
    texts = np.concatenate(sequences)
    bucket_of = np.arange(texts.shape[1]) * BUCKETS // window
    shape = len(prefixes), len(sequences), bucket_of[-1] + 1
    nats, tokens = np.zeros(shape), np.zeros(shape, dtype=np.int64)
    for index, prefix in enumerate(prefixes):
        examples = [(text[:prefix], text[prefix:]) for text in texts]
        log = _with_offset(progress, index * len(texts), len(prefixes) * len(texts))
        for number, nats_of_targets in score(
            model, examples, masks, batch_tokens=batch_tokens, progress=log, opening=opening
        ):
            at = index, source_of[number]
            nats[at] += np.bincount(bucket_of[prefix:], weights=nats_of_targets, minlength=shape[-1])
            tokens[at] += np.bincount(bucket_of[prefix:], minlength=shape[-1])
    shares = np.array([source.share for source in data.sources], dtype=np.float64)
    metrics = {}
    for name in config.prefixes:
        index = prefixes.index(config.prefix_length(name, window))
        for length in sorted(set(config.lengths)):
            last = slice(length * BUCKETS - LAST, length * BUCKETS)
            means = nats[index, :, last].sum(-1) / tokens[index, :, last].sum(-1)
            metrics[f"extrapolation/nll/prefix_{name}/length_{length}x"] = float(means @ shares / shares.sum())
    names = [source.name or UNNAMED for source in data.sources]
    return EvaluationResult(metrics, list(_rows(nats, tokens, prefixes, names, window)))


def held_out_sequences(config: ExtrapolationConfig, data: Prepared, split: str) -> list[np.ndarray]:
    """Held-out sequences of each source: sequences x tokens. Raises InputError if a source has none."""
    longest = max(config.lengths) * data.config.sequence_length
    held_out = {source.name: source.count(source.evaluated_split(split)) for source in data.sources}
    if problems := config.too_short(data.config.sequence_length, held_out):
        raise InputError(*(Problem(message, f"extrapolation.{key}") for key, message in problems))
    return [
        spread_windows(data, source, source.evaluated_split(split), config.sequences, longest)
        for source in data.sources
    ]


def _with_offset(progress: Progress, offset: int, total: int) -> Progress:
    """A callback for one part of the work, after `offset` units of `total` are done."""
    return lambda done, _: progress(offset + done, total)


def _rows(
    nats: np.ndarray, tokens: np.ndarray, prefixes: tuple[int, ...], names: list[str], window: int
) -> Iterator[dict[str, Any]]:
    """Records of buckets with targets. nats, tokens: prefixes x sources x buckets."""
    for index, source, bucket in np.argwhere(tokens).tolist():
        sums, count = float(nats[index, source, bucket]), int(tokens[index, source, bucket])
        yield {
            "source": names[source],
            "prefix": prefixes[index],
            "position": -(-bucket * window // BUCKETS),  # the first whose position x BUCKETS // window is this bucket
            "length": -(-(bucket + 1) * window // BUCKETS),
            "tokens": count,
            "nats": sums,
            "log_probability": -sums / count,
        }

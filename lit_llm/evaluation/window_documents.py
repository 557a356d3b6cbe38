"""Document numbers of the tokens in windows."""

from __future__ import annotations

import numpy as np

from lit_llm.data.shards import Shards
from lit_llm.objectives.config import EOD

_CHUNK = 1 << 20  # tokens read at once


def documents_of(tokens: Shards, starts: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Number of each token's document within the split; an end-of-document token belongs to the document it ends.

    starts: index in the split of each window's first token; windows: len(starts) x T ids. Takes one pass over the
    split, up to the last window.
    """
    ends = windows == EOD
    return ends_before(tokens, starts)[:, None] + np.cumsum(ends, axis=1) - ends


def ends_before(tokens: Shards, starts: np.ndarray) -> np.ndarray:
    """Number of documents that end before each of the indices `starts`."""
    return np.searchsorted(document_ends(tokens, int(starts.max(initial=0))), starts, side="left")


def document_ends(tokens: Shards, count: int) -> np.ndarray:
    """Indices of the end-of-document tokens among the first `count` tokens, in ascending order."""
    ends = [np.empty(0, dtype=np.int64)]
    for begin in range(0, count, _CHUNK):
        chunk = tokens.read(np.array([begin]), min(_CHUNK, count - begin))[0]
        ends.append(begin + np.flatnonzero(chunk == EOD))
    return np.concatenate(ends)

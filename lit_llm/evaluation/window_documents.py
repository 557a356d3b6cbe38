"""Which documents the tokens of windows belong to."""

from __future__ import annotations

import numpy as np

from lit_llm.data.shards import Shards
from lit_llm.objectives.config import EOD

_CHUNK = 1 << 20  # tokens read at once


def documents_of(tokens: Shards, starts: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """The number of each token's document among those of its split; an end-of-document token belongs to what it ends.

    starts: where each window begins in the split; windows: len(starts) x T ids. One pass over the split, up to the last
    window.
    """
    ends = windows == EOD
    return ends_before(tokens, starts)[:, None] + np.cumsum(ends, axis=1) - ends


def ends_before(tokens: Shards, starts: np.ndarray) -> np.ndarray:
    """How many documents have ended before each of these places."""
    return np.searchsorted(document_ends(tokens, int(starts.max(initial=0))), starts, side="left")


def document_ends(tokens: Shards, count: int) -> np.ndarray:
    """Where the end-of-document tokens are among the first `count` tokens, in ascending order."""
    found = [np.empty(0, dtype=np.int64)]
    for begin in range(0, count, _CHUNK):
        chunk = tokens.read(np.array([begin]), min(_CHUNK, count - begin))[0]
        found.append(begin + np.flatnonzero(chunk == EOD))
    return np.concatenate(found)

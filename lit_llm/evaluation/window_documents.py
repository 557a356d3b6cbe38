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
    last, found = int(starts.max(initial=0)), []
    for begin in range(0, last, _CHUNK):
        chunk = tokens.read(np.array([begin]), min(_CHUNK, last - begin))[0]
        found.append(begin + np.flatnonzero(chunk == EOD))
    ends = np.concatenate(found) if found else np.empty(0, dtype=np.int64)
    return np.searchsorted(ends, starts, side="left")

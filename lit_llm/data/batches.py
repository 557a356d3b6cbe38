"""Batches by number: batch k depends on (seed, k) only, whatever the workers, the resumes and the arms."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Dataset, Sampler

from lit_llm.data.prepare import Prepared
from lit_llm.objectives.config import MasksConfig, Objective
from lit_llm.objectives.layout import Batch, Family, lay_out


def shuffled(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Where a seeded permutation of range(count) sends each position. Takes no memory in `count`.

    An eight-round Feistel network (four are biased below a hundred) on the smallest even number of bits that holds
    `count`; values outside are sent through again until they are inside (cycle walking), which keeps it a permutation.
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(_hash(seed, "round", n)) for n in range(8)]
    out = positions.astype(np.uint64)
    wrong = np.ones(len(out), dtype=bool)
    while wrong.any():
        left, right = out[wrong] >> np.uint64(half), out[wrong] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        out[wrong] = (left << np.uint64(half)) | right
        wrong = out >= count
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


class Windows:
    """The windows of a split: window i is the tokens from i x T to (i + 1) x T."""

    def __init__(self, data: Prepared, split: str) -> None:
        self.tokens, self.length, self.count = data.open(split), data.config.sequence_length, data.windows(split)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """len(indices) x T ids."""
        starts = indices[:, None] * self.length
        return np.asarray(self.tokens[starts + np.arange(self.length)], dtype=np.int64)


def cut(windows_BT: np.ndarray, objective: Objective, family: Family, masks: MasksConfig, seed: int, k: int) -> Batch:
    """Cut windows into sources and targets, lay them out for a family. Random cuts depend on (seed, k) only."""
    random = np.random.default_rng(_hash(seed, "cut", k))
    cuts = objective.cuts(windows_BT.shape[1], len(windows_BT), random)
    sources = [window[:place] for window, place in zip(windows_BT, cuts, strict=True)]
    targets = [window[place:] for window, place in zip(windows_BT, cuts, strict=True)]
    return lay_out(sources, targets, family, masks)


class TrainBatches(Dataset[Batch]):
    """Item k is the batch of optimiser step k."""

    def __init__(
        self,
        data: Prepared,
        objective: Objective,
        family: Family,
        masks: MasksConfig,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.windows = Windows(data, "train")
        self.objective, self.family, self.masks, self.seed = objective, family, masks, seed
        self.size, self.rank, self.ranks = data.config.batch_size, rank, ranks

    def indices(self, k: int) -> np.ndarray:
        """The windows of batch k. Each pass over the windows has an order of its own."""
        positions = np.arange(k * self.size, (k + 1) * self.size)
        passes, places = positions // self.windows.count, positions % self.windows.count
        out = np.empty_like(places)
        for number in np.unique(passes):
            here = passes == number
            out[here] = shuffled(places[here], self.windows.count, _hash(self.seed, "pass", number))
        return out

    def __getitem__(self, k: int) -> Batch:
        batch = cut(self.windows.read(self.indices(k)), self.objective, self.family, self.masks, self.seed, k)
        if self.ranks == 1:
            return batch
        share = -(-len(batch) // self.ranks)
        return list(batch.pieces(share))[self.rank]


class StepSampler(Sampler[int]):
    """Batch numbers in order, from the step that training has reached.

    Its length is that of the whole training: Lightning counts a resumed run's batches from its beginning.
    """

    def __init__(self, steps: int, reached: Callable[[], int] = lambda: 0) -> None:
        self.steps, self.reached = steps, reached

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.reached(), self.steps))

    def __len__(self) -> int:
        return self.steps


def validation_windows(data: Prepared, count: int) -> np.ndarray:
    """`count` windows (or all there are), evenly spread over the held-out documents: count x T ids."""
    windows = Windows(data, "validation")
    wanted = min(count, windows.count)
    return windows.read(np.arange(wanted) * windows.count // wanted)

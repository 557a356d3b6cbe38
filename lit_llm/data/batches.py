"""Batches by number: batch k depends on (seed, k) only, for any workers, resumes and arms."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset, Sampler

from lit_llm.data.examples import ExampleSet
from lit_llm.data.prepare import Prepared, PreparedSource
from lit_llm.objectives.collate import Batch, Family, collate, collate_packed
from lit_llm.objectives.config import MasksConfig, Objective


def shuffled(positions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Values of a seeded permutation of range(count) at the positions, in memory that does not grow with `count`.

    An eight-round Feistel network (four rounds are biased below a hundred) on the smallest even number of bits that
    holds `count`; values outside are permuted again until they are inside (cycle walking).
    """
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(hashed(seed, "round", n)) for n in range(8)]
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


def hashed(*parts: object) -> int:
    """64-bit hash of words and numbers."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little")


class Windows:
    """The windows of one source's split: window i is the tokens from i x T to (i + 1) x T."""

    def __init__(self, data: Prepared, source: PreparedSource, split: str, length: int | None = None) -> None:
        """length: T, that of training when absent."""
        self.tokens, self.length = data.open(source, split), length or data.config.sequence_length
        self.count = len(self.tokens) // self.length

    def read(self, indices: np.ndarray) -> np.ndarray:
        """len(indices) x T ids."""
        return self.tokens.read(indices * self.length, self.length)


@lru_cache(maxsize=8)
def cycle(shares: tuple[int, ...], seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """(source of each window of one cycle, number of windows of that source before it in the cycle).

    A cycle is as long as the sum of the shares, which are exact in it; within it, a source of share n out of N deviates
    by at most n (N - n) / N windows. A single source has its windows in order.
    """
    length = sum(shares)
    sources = np.repeat(np.arange(len(shares)), shares)[
        shuffled(np.arange(length), length, hashed(seed, "mix", number))
    ]
    before = np.empty(length, dtype=np.int64)
    for source, share in enumerate(shares):
        before[sources == source] = np.arange(share)
    return sources, before


@dataclass(frozen=True)
class WindowCollator:
    """Makes examples of windows of text by an objective, and collates them for a family."""

    objective: Objective
    family: Family
    masks: MasksConfig
    vocabulary: int
    """Number of ids of the text, after which the objective's extra ids follow."""
    seed: int = 0
    opening: Sequence[int] = ()
    """Ids before every source."""

    def batch(self, windows_BT: np.ndarray, first: int = 0, rows: int = 1) -> Batch:
        """The batch of some windows. Random choices for a window depend on the seed and on its number.

        first: number of the first window. rows: number of such rows in a window of the text, which draw otherwise than
        whole windows with their numbers.
        """
        stream = "window" if rows == 1 else f"window in {rows}"
        examples = [
            self.objective.example(window_T, np.random.default_rng(hashed(self.seed, stream, number)), self.vocabulary)
            for number, window_T in enumerate(windows_BT, first)
        ]
        sources, targets, counted = zip(*examples, strict=True)
        opened_sources = [opened(self.opening, source) for source in sources]
        return collate(opened_sources, targets, self.family, self.masks, counted)


def opened(opening: Sequence[int], source: np.ndarray) -> np.ndarray:
    """A source with ids before it."""
    return np.concatenate([np.array(opening, dtype=np.int64), source]) if opening else source


class Batches(Dataset[Batch], ABC):
    """Dataset whose item k is this device's share of the batch of optimiser step k."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rank, self.ranks = seed, 0, 1

    @abstractmethod
    def whole(self, k: int) -> Batch:
        """All examples of step k; depends on the seed and k only."""

    def __getitem__(self, k: int) -> Batch:
        return self.whole(k).share(self.rank, self.ranks)


class Sizes(Protocol):
    """Sizes of the batches of a training, which a warm-up lets grow."""

    def sequences(self, steps: int) -> int:
        """Number of windows in the batches of the first steps."""

    def rows(self, step: int) -> int:
        """Number of rows into which a window is cut in a step."""


@dataclass(frozen=True)
class EqualSizes:
    """Batches of equally many whole windows."""

    size: int

    def sequences(self, steps: int) -> int:
        return steps * self.size

    def rows(self, step: int) -> int:
        return 1


class TrainBatches(Batches):
    """Windows of text, made into examples by an objective."""

    def __init__(
        self,
        data: Prepared,
        objective: Objective,
        family: Family,
        masks: MasksConfig,
        seed: int,
        begin: int = 0,
        sizes: Sizes | None = None,
    ) -> None:
        """Make the batches.

        begin: number of windows that the training of the source model has read. sizes: those of the batches; all equal
        when absent.
        """
        super().__init__(seed)
        self.sizes = sizes or EqualSizes(data.config.batch_size)
        self.begin = begin
        self.windows = [Windows(data, source, "train") for source in data.sources]
        self.shares = tuple(source.share for source in data.sources)
        self.collator = WindowCollator(objective, family, masks, data.config.tokenizer.vocabulary, seed)

    def places(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Windows of batch k: (numbers of the sources, numbers of the windows within them).

        The sources' shares are exact in each cycle. Each pass over a source's windows has a different order.
        """
        positions = self.begin + np.arange(self.sizes.sequences(k), self.sizes.sequences(k + 1))
        cycles, within = positions // sum(self.shares), positions % sum(self.shares)
        sources, indices = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(cycles).tolist():
            selected = cycles == number
            sources[selected], before = (part[within[selected]] for part in cycle(self.shares, self.seed, number))
            indices[selected] = number * np.asarray(self.shares)[sources[selected]] + before
        for source in np.unique(sources).tolist():
            count, of_it = self.windows[source].count, sources == source
            passes, places = indices // count, indices % count
            for number in np.unique(passes[of_it]).tolist():
                selected = of_it & (passes == number)
                indices[selected] = shuffled(places[selected], count, hashed(self.seed, "pass", number, source))
        return sources, indices

    def whole(self, k: int) -> Batch:
        sources, indices = self.places(k)
        windows = np.empty((len(sources), self.windows[0].length), dtype=np.int64)
        for source in np.unique(sources).tolist():
            windows[sources == source] = self.windows[source].read(indices[sources == source])
        rows = self.sizes.rows(k)
        first = rows * self.sizes.sequences(k)
        batch = self.collator.batch(windows.reshape(rows * len(sources), -1), first, rows)
        batch.rows_of_window = rows
        return batch


class ExampleBatches(Batches):
    """Batches of the next examples of a pass; each pass has a different order.

    packed: let examples share rows, for fewer rows of the same examples.
    """

    def __init__(
        self,
        examples: ExampleSet,
        batch_size: int,
        family: Family,
        masks: MasksConfig,
        seed: int,
        packed: bool = False,
    ) -> None:
        super().__init__(seed)
        self.examples, self.size, self.family, self.masks = examples, batch_size, family, masks
        self.packed = packed

    def places(self, k: int) -> list[int]:
        """The numbers of the examples of batch k."""
        count = self.examples.count("train")
        passes, places = np.divmod(np.arange(k * self.size, (k + 1) * self.size), count)
        for number in np.unique(passes).tolist():
            selected = passes == number
            places[selected] = shuffled(places[selected], count, hashed(self.seed, "example pass", number))
        return [int(place) for place in places]

    def whole(self, k: int) -> Batch:
        pairs = [self.examples.read("train", place) for place in self.places(k)]
        sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
        return (collate_packed if self.packed else collate)(sources, targets, self.family, self.masks)


class StepSampler(Sampler[int]):
    """Batch numbers in order, from the step that training has reached.

    Its length is that of the whole training: Lightning counts a resumed run's batches from the first step.
    """

    def __init__(self, steps: int, reached: Callable[[], int] = lambda: 0) -> None:
        self.steps, self.reached = steps, reached

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.reached(), self.steps))

    def __len__(self) -> int:
        return self.steps


def spread(wanted: int, count: int) -> np.ndarray:
    """`wanted` evenly spread numbers below `count`; all where there are fewer."""
    wanted = min(wanted, count)
    return np.arange(wanted) * count // max(1, wanted)


def spread_windows(
    data: Prepared, source: PreparedSource, split: str, count: int, length: int | None = None
) -> np.ndarray:
    """`count` windows (all where there are fewer), evenly spread over a source's split: count x T ids.

    length: T, that of training when absent.
    """
    windows = Windows(data, source, split, length)
    return windows.read(spread(count, windows.count))

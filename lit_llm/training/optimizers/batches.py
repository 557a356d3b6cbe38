"""Batches of tensors for operations that handle several tensors per call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

MOST_ENTRIES = 1 << 18
"""Most entries of a batch: a megabyte in float32, so that its temporary tensors stay in a CPU's cache."""


def batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of at most `MOST_ENTRIES` entries or of one tensor."""
    batch, entries = list[Tensor](), 0
    for tensor in tensors:
        if batch and entries + tensor.numel() > MOST_ENTRIES:
            yield batch
            batch, entries = [], 0
        batch.append(tensor)
        entries += tensor.numel()
    if batch:
        yield batch

"""From a source and a target to what a family reads.

decoder          inputs   <s> s1 s2 t1 t2      targets of t1.. only:  ·  ·  t1 t2 t3
                          └ prefix ┘                                  (the last source token predicts t1)
encoder-decoder  source   s1 s2                decoder inputs         <s> t1 t2
                                               targets                t1  t2 t3
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_llm.objectives.config import BOS, EOD

Family = Literal["decoder", "encoder_decoder"]


@dataclass
class Batch:
    """What a model reads and is asked: B examples."""

    inputs: dict[str, Any]
    """Keyword arguments of the model's `hidden`."""
    targets: Tensor
    """B x T ids."""
    weights: Tensor
    """B x T, 1 where the target counts and 0 elsewhere."""

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device, **options: Any) -> Batch:
        inputs = {k: v.to(device, **options) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        return Batch(inputs, self.targets.to(device, **options), self.weights.to(device, **options))

    def pin_memory(self) -> Batch:
        inputs = {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        return Batch(inputs, self.targets.pin_memory(), self.weights.pin_memory())

    def pieces(self, size: int) -> Iterator[Batch]:
        """The batch in pieces of at most `size` examples."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            inputs = {k: v[part] if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
            yield Batch(inputs, self.targets[part], self.weights[part])


def lay_out(
    sources: Sequence[np.ndarray], targets: Sequence[np.ndarray], family: Family, bidirectional_prefix: bool = False
) -> Batch:
    """Pad and shift (source, target) pairs for a family. An empty source is one end-of-document token.

    bidirectional_prefix: let a decoder-only model's source tokens, and the <s> before them, see each other.
    """
    if family == "encoder_decoder":
        sources = [source if len(source) else np.array([EOD]) for source in sources]
        lengths = [len(source) for source in sources]
        inputs: dict[str, Any] = {
            "source_BS": _padded(sources),
            "target_BT": _padded([np.concatenate([[BOS], target[:-1]]) for target in targets]),
        }
        if min(lengths) < max(lengths):
            inputs["source_lengths"] = torch.tensor(lengths)
        return Batch(inputs, _padded(targets), _counted([0] * len(targets), [len(target) for target in targets]))

    rows = [np.concatenate([source, target]) for source, target in zip(sources, targets, strict=True)]
    inputs = {"tokens_BT": _padded([np.concatenate([[BOS], row[:-1]]) for row in rows])}
    starts = [len(source) for source in sources]
    if bidirectional_prefix:
        prefix = [start + 1 for start in starts]  # <s> belongs to it
        inputs["prefix_length"] = prefix[0] if len(set(prefix)) == 1 else torch.tensor(prefix)
    return Batch(inputs, _padded(rows), _counted(starts, [len(row) for row in rows]))


def _padded(rows: Sequence[np.ndarray]) -> Tensor:
    out = np.full((len(rows), max(len(row) for row in rows)), EOD, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return torch.from_numpy(out)


def _counted(starts: Sequence[int], ends: Sequence[int]) -> Tensor:
    position = torch.arange(max(ends))
    return ((position >= torch.tensor(starts)[:, None]) & (position < torch.tensor(ends)[:, None])).float()

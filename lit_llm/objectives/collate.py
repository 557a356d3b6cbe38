"""From a source and a target to what a family reads.

decoder          inputs   <s> s1 s2 t1 t2      targets of t1.. only:  ·  ·  t1 t2 t3
                          └ prefix ┘                                  (the last source token predicts t1)
                          (also the source of partial attention)
encoder-decoder  source   s1 s2                decoder inputs         <s> t1 t2
                                               targets                t1  t2 t3
encoder-only     inputs   a [MASK] c d         targets of the hidden places only:  ·  b  ·  ·

Attention inside of documents alone (`masks.intra_document`). The end-of-document token ■ closes its document and
belongs to it; <s> stands where the token before the first target would, and belongs to that token's document. The
window a b ■ c d e, with the cut behind b and behind ■:

decoder          inputs  <s> a b ■ c d          documents  0   0 0 0 1 1       targets  a  b  ■  c  d  e
encoder-decoder  source  a b                    documents  0 0
                 inputs  <s> ■ c d              documents  0   0 1 1           targets  ■  c  d  e
                 source  a b ■                  documents  0 0 0
                 inputs  <s> c d                documents  0   1 1             targets  c  d  e

A document's first token is predicted from the ■ before it, as is usual for packed text, and so from the document that
ends there; the others are predicted from their own document alone. Each target is predicted from the same tokens in
both families, wherever the cut is. Here c and d have no source. The token that stands for an empty source belongs to
the target's first document.

Examples that share a row (`packing: greedy`), each computed as if it were alone:

decoder          inputs     <s> s1 s2 t1 | <s> s1 t1 t2         targets   ·  ·  t1 t2 | ·  t1 t2 t3
                 documents  0   0  0  0  | 1   1  1  1          open      ▣  ▣  ▣  ·  | ▣  ▣  ·  ·    (bidirectional)
                 positions  0   1  2  3  | 0   1  2  3
encoder-decoder  source     s1 s2 | s1 s2 s3                    documents 0 0 | 1 1 1      positions  0 1 | 0 1 2
                 inputs     <s> t1 | <s> t1 t2                  documents 0 0 | 1 1 1      positions  0 1 | 0 1 2
                                                                its source's end           2 2 | 3 3 3
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_llm.objectives.config import BOS, EOD, MasksConfig
from lit_llm.objectives.packing import rows_of, sizes_of

Family = Literal["decoder", "encoder_decoder", "decoder_decoder", "encoder_only"]
"""decoder_decoder is laid out as decoder is."""
PAD_DOCUMENT = -1
"""The document of padding in shared rows, which no example sees."""


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

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """The batch in pieces of at most `size` examples."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            inputs = {k: v[part] if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
            yield Batch(inputs, self.targets[part], self.weights[part])


def collate(
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    family: Family,
    masks: MasksConfig = MasksConfig(),
    counted: Sequence[np.ndarray | None] = (),
) -> Batch:
    """Pad and shift (source, target) pairs for a family. An empty source is one end-of-document token.

    A bidirectional prefix holds a decoder-only model's source tokens and the <s> before them, and so does what partial
    attention reads (`source_length`): an empty source is <s> alone, which tells nothing.

    counted: which targets count, for an encoder-only model, whose targets stand in the places of their sources.
    """
    if family == "encoder_only":
        return _in_place(sources, targets, masks, counted)
    documents = []
    if masks.intra_document:
        documents = [_documents(source, target) for source, target in zip(sources, targets, strict=True)]
    # Where every row is of one document there is nothing to separate, and a mask would only cost.
    separate = any(of_inputs.any() for _, of_inputs in documents)
    if family == "encoder_decoder":
        sources = [source if len(source) else np.array([EOD]) for source in sources]
        lengths = [len(source) for source in sources]
        inputs: dict[str, Any] = {
            "source_BS": _padded(sources),
            "target_BT": _padded([np.concatenate([[BOS], target[:-1]]) for target in targets]),
        }
        if min(lengths) < max(lengths):
            inputs["source_lengths"] = torch.tensor(lengths)
        if separate:
            inputs["documents_BS"] = _padded([of_source for of_source, _ in documents])
            inputs["documents_BT"] = _padded([row[-len(to) :] for (_, row), to in zip(documents, targets, strict=True)])
        return Batch(inputs, _padded(targets), _counted([0] * len(targets), [len(target) for target in targets]))

    rows = [np.concatenate([source, target]) for source, target in zip(sources, targets, strict=True)]
    inputs = {"tokens_BT": _padded([np.concatenate([[BOS], row[:-1]]) for row in rows])}
    starts = [len(source) for source in sources]
    if separate:
        inputs["documents_BT"] = _padded([of_inputs for _, of_inputs in documents])
    lengths = [start + 1 for start in starts]  # <s> belongs to it
    source_length = lengths[0] if len(set(lengths)) == 1 else torch.tensor(lengths)
    inputs["source_length"] = source_length
    if masks.prefix == "bidirectional":
        inputs["prefix_length"] = source_length
    return Batch(inputs, _padded(rows), _counted(starts, [len(row) for row in rows]))


def causal_text(batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """What a causal decoder reads of the same examples, and where: (arguments of its `hidden`, places B x T).

    <s> source target, the last target token left out. From the place of target t in its row it predicts that target. A
    decoder-only batch is that already; its prefix is closed. An empty source stays the one token that stands for it.
    """
    inputs, targets = batch.inputs, batch.targets
    if "tokens_BT" in inputs:
        read = {key: value for key, value in inputs.items() if key in ("tokens_BT", "documents_BT")}
        return read, torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    source, given = inputs["source_BS"], inputs.get("source_lengths")
    longest, device = source.shape[1], source.device
    lengths = torch.full((len(source),), longest, device=device) if given is None else given.to(device)
    # Rows are <s> and source, padded to the longest; the target goes on where its own row's source ends.
    column = torch.arange(longest + targets.shape[1], device=device)
    in_target = column > lengths[:, None]
    picked = torch.where(in_target, column + (longest - lengths)[:, None], column).clamp_max(len(column) - 1)

    def joined(first: Tensor, of_source: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([first, of_source, rest], 1).gather(1, picked)

    target = inputs["target_BT"]  # <s> first, which here stands before the source
    read = {"tokens_BT": joined(target[:, :1], source, target[:, 1:])}
    if "documents_BS" in inputs:
        of_source, of_target = inputs["documents_BS"], inputs["documents_BT"]
        read["documents_BT"] = joined(of_source[:, :1], of_source, of_target[:, 1:])
    return read, lengths[:, None] + torch.arange(targets.shape[1], device=device)


def _in_place(
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    masks: MasksConfig,
    counted: Sequence[np.ndarray | None],
) -> Batch:
    rows = [row for row in counted if row is not None]
    assert len({*map(len, (*sources, *targets, *rows))}) == 1, "places of one window have one length"
    inputs: dict[str, Any] = {"tokens_BT": _padded(sources)}
    if masks.intra_document:
        documents_BT = _padded([_documents(target, target[:0])[0] for target in targets])  # where no end is hidden
        if documents_BT.any():
            inputs["documents_BT"] = documents_BT
    return Batch(inputs, _padded(targets), torch.from_numpy(np.stack(rows)).float())


def collate_packed(
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    family: Family,
    masks: MasksConfig,
) -> Batch:
    """As `collate`, in fewer rows that are no longer. Each example has the loss that it has in a row of its own."""
    lengths = [(len(source), len(target)) for source, target in zip(sources, targets, strict=True)]
    shared, rows = rows_of(sizes_of(lengths, family)), []
    if len(shared) == len(lengths):
        return collate(sources, targets, family, masks)  # nothing to separate, and a mask would only cost
    for numbers in shared:
        examples = [_alone(sources[number], targets[number], place, family) for place, number in enumerate(numbers)]
        rows.append({name: np.concatenate([example[name] for example in examples]) for name in examples[0]})
    # Padding is end-of-document tokens that nobody sees and no loss is on.
    found = {
        name: _padded([row[name] for row in rows], PAD_DOCUMENT if "documents" in name else EOD) for name in rows[0]
    }
    targets_BT, weights_BT, open_BT = (found.pop(name) for name in ("targets", "weights", "open"))
    inputs: dict[str, Any] = dict(found)
    if family != "encoder_decoder" and masks.prefix == "bidirectional":
        inputs["open_BT"] = open_BT.bool()
    return Batch(inputs, targets_BT, weights_BT.float())


def _alone(source: np.ndarray, target: np.ndarray, document: int, family: Family) -> dict[str, np.ndarray]:
    """What one example adds to its row."""
    if family != "encoder_decoder":
        start, whole = len(source), np.concatenate([source, target])
        added = {"tokens_BT": np.concatenate([[BOS], whole[:-1]])}
    else:
        source = source if len(source) else np.array([EOD])
        start, whole = 0, target
        added = {
            "source_BS": source,
            "documents_BS": np.full(len(source), document),
            "positions_BS": np.arange(len(source)),
            "target_BT": np.concatenate([[BOS], whole[:-1]]),
            "source_ends_BT": np.full(len(whole), len(source)),
        }
    place = np.arange(len(whole))
    return added | {
        "documents_BT": np.full(len(whole), document),
        "positions_BT": place,
        "open": place <= start,  # <s> belongs to the prefix
        "targets": whole,
        "weights": place >= start,
    }


def _documents(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents of an example's source (of what stands for an empty one), and of <s>, source, target."""
    ends = np.concatenate([source, target]) == EOD
    numbers = np.cumsum(ends) - ends
    of_source = numbers[: len(source)] if len(source) else np.array([0])
    return of_source, np.concatenate([[0], numbers[:-1]])


def _padded(rows: Sequence[np.ndarray], fill: int = EOD) -> Tensor:
    """Rows of ids or other whole numbers, filled up at their ends to the longest."""
    out = np.full((len(rows), max(len(row) for row in rows)), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return torch.from_numpy(out)


def _counted(starts: Sequence[int], ends: Sequence[int]) -> Tensor:
    position = torch.arange(max(ends))
    return ((position >= torch.tensor(starts)[:, None]) & (position < torch.tensor(ends)[:, None])).float()

"""Collate sources and targets into the inputs of a family.

decoder          inputs   <s> s1 s2 t1 t2      targets of t1.. only:  ·  ·  t1 t2 t3
                          └ prefix ┘                                  (the last source token predicts t1)
                          (also the source of parts that read it in the row)
encoder-decoder  source   s1 s2                decoder inputs         <s> t1 t2
                                               targets                t1  t2 t3
encoder-only     inputs   a [MASK] c d         targets of the hidden places only:  ·  b  ·  ·

Attention within documents (`masks.intra_document`). The end-of-document token ■ belongs to the document that it ends;
<s> replaces the token before the first target, and belongs to that token's document. The window a b ■ c d e, cut after
b and after ■:

decoder          inputs  <s> a b ■ c d          documents  0   0 0 0 1 1       targets  a  b  ■  c  d  e
encoder-decoder  source  a b                    documents  0 0
                 inputs  <s> ■ c d              documents  0   0 1 1           targets  ■  c  d  e
                 source  a b ■                  documents  0 0 0
                 inputs  <s> c d                documents  0   1 1             targets  c  d  e

A document's first token is predicted from the ■ before it, as is usual for packed text, and so from the document that
ends there; all other tokens are predicted from their document alone. Each target is predicted from the same tokens in
both families, for any cut. Here c and d have no source. The token that replaces an empty source belongs to the target's
first document.

Examples that share a row (`packing: greedy`), each with the result that it has in a separate row:

decoder          inputs     <s> s1 s2 t1 | <s> s1 t1 t2         targets   ·  ·  t1 t2 | ·  t1 t2 t3
                 documents  0   0  0  0  | 1   1  1  1          open      ▣  ▣  ▣  ·  | ▣  ▣  ·  ·    (bidirectional)
                 positions  0   1  2  3  | 0   1  2  3
encoder-decoder  source     s1 s2 | s1 s2 s3                    documents 0 0 | 1 1 1      positions  0 1 | 0 1 2
                 inputs     <s> t1 | <s> t1 t2                  documents 0 0 | 1 1 1      positions  0 1 | 0 1 2
                                                                its source's end           2 2 | 3 3 3
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_llm.objectives.config import BOS, EOD, MasksConfig
from lit_llm.objectives.packing import rows_of, sizes_of

Family = Literal["decoder", "encoder_decoder", "decoder_decoder", "double_decoder", "encoder_only"]
"""Model family; decoder_decoder and double_decoder are collated as decoder."""
PAD_DOCUMENT = -1
"""Document number of padding in shared rows, which no example sees."""


@dataclass
class Batch:
    """Inputs, targets and weights of B examples. Made on the CPU, so that a step need not wait for the device."""

    inputs: dict[str, Any]
    """Keyword arguments of the model's `hidden`."""
    targets: Tensor
    """B x T ids."""
    weights: Tensor
    """B x T, 1 where the target counts and 0 elsewhere."""
    rows_of_window: int = field(init=False, default=1)
    """Number of rows of a window of the text, each an example."""
    places: Tensor = field(init=False)
    """N: the targets that count, as indices into B·T."""
    counts: list[int] = field(init=False)
    """B: how many targets count in each row."""
    total: int = field(init=False)
    """How many targets count in the whole batch, of which this may be a part."""

    def __post_init__(self) -> None:
        self._count()
        self.total = sum(self.counts)

    def _count(self) -> None:
        self.places = self.weights.flatten().nonzero().squeeze(-1)
        self.counts = self.weights.sum(1).int().tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device, **options: Any) -> Batch:
        return self._mapped(lambda tensor: tensor.to(device, **options))

    def pin_memory(self) -> Batch:
        return self._mapped(lambda tensor: tensor.pin_memory())

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """Parts of the batch with at most `size` examples."""
        ends = [0, *itertools.accumulate(self.counts)]
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            part = copy.copy(self)
            part.inputs = _of_tensors(self.inputs, lambda tensor, rows=rows: tensor[rows])  # type: ignore[misc]
            part.targets, part.weights, part.counts = self.targets[rows], self.weights[rows], self.counts[rows]
            counted = slice(ends[start], ends[start] + sum(part.counts))
            part.places = self.places[counted] - start * self.targets.shape[1]
            yield part

    def share(self, number: int, shares: int) -> Batch:
        """One of several parts with equally many rows: its rows, and copies of one whose targets do not count.

        Together the parts have all targets that count. A batch with fewer rows than shares is also divided so.
        """
        if shares == 1:
            return self
        ends = [len(self) * end // shares for end in (number, number + 1)]
        rows = torch.arange(*ends)
        copies = torch.zeros(-(-len(self) // shares) - len(rows), dtype=rows.dtype)
        index = torch.cat([rows, copies])
        part = copy.copy(self)
        part.inputs = _of_tensors(self.inputs, lambda tensor: tensor[index])
        part.targets, part.weights = self.targets[index], self.weights[index]
        part.weights[len(rows) :] = 0
        part._count()
        return part

    def ahead(self, distance: int) -> tuple[Tensor, Tensor]:
        """Targets further on, for the positions whose next token counts too, where both follow tokens of one document.

        So the token before the end of a document is also asked for the first one of the next, as the end itself is.

        Returns:
            B x T ids: the target `distance` positions after each one; N places of those that count, as indices into
            B·T. Their number is read from the device.
        """
        count_BT = self.weights > 0
        both_BT = count_BT & count_BT.roll(-distance, 1)
        both_BT[:, -distance:] = False  # came around from the row's beginning
        if (documents := self.inputs.get("documents_BT")) is not None:
            both_BT &= documents == documents.roll(-distance, 1)
        return self.targets.roll(-distance, 1), both_BT.flatten().nonzero().squeeze(-1)

    def read_tokens(self, side: str) -> Tensor:
        """B x S or B x T, boolean: tokens of the encoder's or decoder's rows without padding, up to the last target.

        A row without a target that counts has none. side: encoder or decoder; an encoder-only model has the first.
        """
        reaches_target_BT = self.weights.flip(1).cumsum(1).flip(1) > 0
        if side == "decoder":
            read, documents = reaches_target_BT, self.inputs.get("documents_BT")
        else:
            tokens = self.inputs["source_BS" if "source_BS" in self.inputs else "tokens_BT"]
            read = reaches_target_BT[:, :1].expand(tokens.shape)
            if (lengths := self.inputs.get("source_lengths")) is not None:
                read = read & (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])
            documents = self.inputs.get("documents_BS")
        return read if documents is None else read & (documents != PAD_DOCUMENT)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        made = copy.copy(self)
        made.inputs = _of_tensors(self.inputs, function)
        made.targets, made.weights, made.places = (function(each) for each in (self.targets, self.weights, self.places))
        return made


def _of_tensors(inputs: dict[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Inputs with the function's results in place of their tensors."""
    return {key: function(value) if isinstance(value, Tensor) else value for key, value in inputs.items()}


def collate(
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    family: Family,
    masks: MasksConfig = MasksConfig(),
    counted: Sequence[np.ndarray | None] = (),
) -> Batch:
    """Pad and shift (source, target) pairs for a family. An empty source is one end-of-document token.

    A decoder-only model's bidirectional prefix is <s> and the source tokens, and so is its `source_length`: an empty
    source is <s> alone.

    counted: for each example whether a target counts, or None where all do. The targets of an encoder-only model are in
    the places of their sources.
    """
    if family == "encoder_only":
        return _collate_in_place(sources, targets, masks, counted)
    documents = []
    if masks.intra_document:
        documents = [_documents(source, target) for source, target in zip(sources, targets, strict=True)]
    # Rows of one document need no mask, which would cost time.
    separate = any(of_inputs.any() for _, of_inputs in documents)
    if family == "encoder_decoder":
        sources = [source if len(source) else np.array([EOD]) for source in sources]
        lengths = [len(source) for source in sources]
        inputs: dict[str, Any] = {
            "source_BS": _pad(sources),
            "target_BT": _pad([np.concatenate([[BOS], target[:-1]]) for target in targets]),
        }
        if min(lengths) < max(lengths):
            inputs["source_lengths"] = torch.tensor(lengths)
        if separate:
            inputs["documents_BS"] = _pad([of_source for of_source, _ in documents])
            inputs["documents_BT"] = _pad([row[-len(to) :] for (_, row), to in zip(documents, targets, strict=True)])
        ends = [len(target) for target in targets]
        return Batch(inputs, _pad(targets), _target_weights([0] * len(targets), ends, counted))

    rows = [np.concatenate([source, target]) for source, target in zip(sources, targets, strict=True)]
    inputs = {"tokens_BT": _pad([np.concatenate([[BOS], row[:-1]]) for row in rows])}
    starts = [len(source) for source in sources]
    if separate:
        inputs["documents_BT"] = _pad([of_inputs for _, of_inputs in documents])
    lengths = [start + 1 for start in starts]  # <s> belongs to the source
    source_length = lengths[0] if len(set(lengths)) == 1 else torch.tensor(lengths)
    inputs["source_length"] = source_length
    if masks.prefix == "bidirectional":
        inputs["prefix_length"] = source_length
    return Batch(inputs, _pad(rows), _target_weights(starts, [len(row) for row in rows], counted))


def causal_text(batch: Batch) -> tuple[dict[str, Any], Tensor]:
    """Inputs of a causal decoder for the same examples: (arguments of its `hidden`, positions B x T).

    A row is <s>, source and target without its last token; at position t of a row target t is predicted. A decoder-only
    batch stays as it is, with a causal prefix. An empty source stays the one token that replaces it.
    """
    inputs, targets = batch.inputs, batch.targets
    if "tokens_BT" in inputs:
        read = {key: value for key, value in inputs.items() if key in ("tokens_BT", "documents_BT")}
        return read, torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
    source, source_lengths = inputs["source_BS"], inputs.get("source_lengths")
    longest, device = source.shape[1], source.device
    lengths = (
        torch.full((len(source),), longest, device=device) if source_lengths is None else source_lengths.to(device)
    )
    # Rows are <s> and source, padded to the longest; the target follows the end of its row's source.
    column = torch.arange(longest + targets.shape[1], device=device)
    in_target = column > lengths[:, None]
    picked = torch.where(in_target, column + (longest - lengths)[:, None], column).clamp_max(len(column) - 1)

    def joined(first: Tensor, of_source: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([first, of_source, rest], 1).gather(1, picked)

    target = inputs["target_BT"]  # begins with <s>, which here comes before the source
    read = {"tokens_BT": joined(target[:, :1], source, target[:, 1:])}
    if "documents_BS" in inputs:
        of_source, of_target = inputs["documents_BS"], inputs["documents_BT"]
        read["documents_BT"] = joined(of_source[:, :1], of_source, of_target[:, 1:])
    return read, lengths[:, None] + torch.arange(targets.shape[1], device=device)


def _collate_in_place(
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    masks: MasksConfig,
    counted: Sequence[np.ndarray | None],
) -> Batch:
    rows = [row for row in counted if row is not None]
    assert len({*map(len, (*sources, *targets, *rows))}) == 1, "places of one window have one length"
    inputs: dict[str, Any] = {"tokens_BT": _pad(sources)}
    if masks.intra_document:
        documents_BT = _pad([_documents(target, target[:0])[0] for target in targets])  # targets show all ends
        if documents_BT.any():
            inputs["documents_BT"] = documents_BT
    return Batch(inputs, _pad(targets), torch.from_numpy(np.stack(rows)).float())


def collate_packed(
    sources: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    family: Family,
    masks: MasksConfig,
) -> Batch:
    """The batch of `collate` in fewer rows, none of them longer. Each example has the loss of a separate row."""
    lengths = [(len(source), len(target)) for source, target in zip(sources, targets, strict=True)]
    shared, rows = rows_of(sizes_of(lengths, family)), []
    if len(shared) == len(lengths):
        return collate(sources, targets, family, masks)  # no rows are shared, so no mask is needed
    for numbers in shared:
        examples = [
            _packed_example(sources[number], targets[number], document, family)
            for document, number in enumerate(numbers)
        ]
        rows.append({name: np.concatenate([example[name] for example in examples]) for name in examples[0]})
    # Padding is end-of-document tokens that no example sees and that do not count in the loss.
    columns = {
        name: _pad([row[name] for row in rows], PAD_DOCUMENT if "documents" in name else EOD) for name in rows[0]
    }
    targets_BT, weights_BT, open_BT = (columns.pop(name) for name in ("targets", "weights", "open"))
    inputs: dict[str, Any] = dict(columns)
    if family != "encoder_decoder" and masks.prefix == "bidirectional":
        inputs["open_BT"] = open_BT.bool()
    return Batch(inputs, targets_BT, weights_BT.float())


def _packed_example(source: np.ndarray, target: np.ndarray, document: int, family: Family) -> dict[str, np.ndarray]:
    """{input: values} that one example adds to a shared row."""
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
    index = np.arange(len(whole))
    return added | {
        "documents_BT": np.full(len(whole), document),
        "positions_BT": index,
        "open": index <= start,  # <s> belongs to the prefix
        "targets": whole,
        "weights": index >= start,
    }


def _documents(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Document numbers (of an example's source, or the token that replaces an empty one; of <s>, source and target)."""
    ends = np.concatenate([source, target]) == EOD
    numbers = np.cumsum(ends) - ends
    of_source = numbers[: len(source)] if len(source) else np.array([0])
    return of_source, np.concatenate([[0], numbers[:-1]])


def _pad(rows: Sequence[np.ndarray], fill: int = EOD) -> Tensor:
    """Rows of ids or other integers, padded at their ends to the longest."""
    out = np.full((len(rows), max(len(row) for row in rows)), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return torch.from_numpy(out)


def _target_weights(starts: Sequence[int], ends: Sequence[int], counted: Sequence[np.ndarray | None] = ()) -> Tensor:
    """1 where a target counts. starts, ends: places of each row's target; counted: its targets that count."""
    position = torch.arange(max(ends))
    weights = ((position >= torch.tensor(starts)[:, None]) & (position < torch.tensor(ends)[:, None])).float()
    for row, (start, of_target) in enumerate(zip(starts, counted, strict=False)):
        if of_target is not None:
            weights[row, start : start + len(of_target)] = torch.from_numpy(of_target).float()
    return weights

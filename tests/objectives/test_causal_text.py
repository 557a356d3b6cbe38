"""What a teacher reads: the same tokens as one causal text, as a decoder-only batch of them would be laid out."""

import numpy as np
import pytest
import torch

from lit_llm.objectives.collate import causal_text, lay_out
from lit_llm.objectives.config import MasksConfig

SEPARATE = MasksConfig(intra_document=True)
EVEN = ([[11, 12], [13, 14]], [[21, 22, 23], [24, 25, 26]])
UNEVEN = ([[11], [12, 13, 14], [15, 16]], [[21, 22, 23], [24], [25, 26]])
DOCUMENTS = ([[11, 0, 12], [13, 14]], [[21, 0, 22, 23], [24, 0]])


def rows(lists):
    return [np.array(row, dtype=np.uint16) for row in lists]


@pytest.mark.parametrize("pairs", [EVEN, UNEVEN, DOCUMENTS], ids=["even", "uneven", "documents"])
@pytest.mark.parametrize("masks", [MasksConfig(), SEPARATE], ids=["joined", "separate"])
def test_an_encoder_decoders_batch_reads_as_a_decoders(pairs, masks):
    """Every counted target is predicted from where the decoder-only layout predicts it, after the same tokens."""
    sources, targets = map(rows, pairs)
    apart, whole = lay_out(sources, targets, "encoder_decoder", masks), lay_out(sources, targets, "decoder", masks)
    read, places = causal_text(apart)
    expected = whole.inputs["tokens_BT"]
    for row, (source, target) in enumerate(zip(*pairs, strict=True)):
        length = len(source) + len(target)  # with <s>, without the last
        assert read["tokens_BT"][row, :length].tolist() == expected[row, :length].tolist()
        here = places[row, : len(target)]
        assert whole.targets[row, here].tolist() == apart.targets[row, : len(target)].tolist() == target
        assert whole.weights[row, here].all()
        if "documents_BT" in whole.inputs:
            assert read["documents_BT"][row, :length].tolist() == whole.inputs["documents_BT"][row, :length].tolist()
    assert places.max() < read["tokens_BT"].shape[1]
    assert ("documents_BT" in read) == ("documents_BT" in whole.inputs)


def test_a_decoders_batch_is_read_as_it_stands_with_its_prefix_closed():
    sources, targets = map(rows, UNEVEN)
    batch = lay_out(sources, targets, "decoder", MasksConfig(prefix="bidirectional"))
    read, places = causal_text(batch)
    assert read.keys() == {"tokens_BT"}
    assert torch.equal(read["tokens_BT"], batch.inputs["tokens_BT"])
    assert torch.equal(places, torch.arange(batch.targets.shape[1]).expand_as(batch.targets))

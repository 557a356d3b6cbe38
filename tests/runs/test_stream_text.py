"""Text that is written while it is generated."""

import pytest
import torch

from lit_llm import generation
from lit_llm.data.tokenizers import Bytes
from lit_llm.generation import NewToken, Sampling
from lit_llm.runs.trained_model import complete_texts, stream_text
from tests.generation.recomputation import build


def pieces_of(written: bytes, monkeypatch) -> list[str]:
    """What is written one after the other when a model chooses these bytes."""
    chosen = [*(NewToken(0, byte + 2, 0.0) for byte in written), NewToken(0, None, 0.0)]
    monkeypatch.setattr(generation, "stream", lambda *_, **__: iter(chosen))
    return list(stream_text(build("decllm", "vocabulary=258"), Bytes(), "", 100, Sampling()))


@pytest.mark.parametrize(
    ("written", "pieces"),
    [
        (b"ab", ["a", "b"]),
        ("aé→b".encode(), ["a", "é", "→", "b"]),
        (b"a\xc3", ["a", "\ufffd"]),  # ends within a character
        (b"\xffab", ["\ufffda", "b"]),  # a byte that begins none
        (b"", []),
    ],
)
def test_a_character_is_written_once_all_its_bytes_are_there(written, pieces, monkeypatch):
    assert pieces_of(written, monkeypatch) == pieces
    assert "".join(pieces) == Bytes().decode([byte + 2 for byte in written])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=2)], ids=["greedy", "drawn"])
def test_the_pieces_together_are_what_is_generated_at_once(sampling):
    torch.manual_seed(0)
    model, ids = build("decllm", "vocabulary=258", dtype=torch.float32), Bytes()
    (whole,) = complete_texts(model, ids, ["abc"], 30, sampling)
    pieces = list(stream_text(model, ids, "abc", 30, sampling))
    assert "".join(pieces) == whole
    assert len(pieces) > 5 or len(whole) < 6

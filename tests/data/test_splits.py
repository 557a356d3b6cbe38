"""What counts as the same document, and so lies in one split."""

from __future__ import annotations

import random
import unicodedata

import pytest

from lit_llm.data import splits
from lit_llm.data.splits import content_hash, normalised


def test_white_space_case_and_compatible_forms_make_no_other_document():
    text = "The caf\u00e9 has 2\u00bd ﬁne tables."
    same = [
        f"{text} ",
        f"\n\t{text}",
        text.replace(" ", "\u00a0"),
        text.replace(" ", " \r\n"),
        text.upper().replace("½", "1⁄2"),
        unicodedata.normalize("NFD", text),
        unicodedata.normalize("NFKC", text),
    ]
    assert {content_hash(other) for other in same} == {content_hash(text)}
    others = [text.replace(" ", ""), text.replace("é", "e"), text[:-1], f"{text}."]
    assert len({content_hash(other) for other in [text, *others]}) == 1 + len(others)


def test_an_example_has_the_hash_of_the_document_that_holds_its_input_and_its_target():
    assert content_hash("What is it? ", "A cat.") == content_hash("What is it? A cat.")
    assert content_hash("", "A cat.") == content_hash("A cat.")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_a_long_text_is_normalised_as_a_short_one(monkeypatch, size):
    """A chunk may end in a run of white space, before a combining accent, or where no ASCII character is near."""
    draw = random.Random(size)
    texts = ["".join(draw.choices("aB \n\u00a0e\u0301\u0323ﬁ가\u1100\u1161\u11a8世ß", k=200)) for _ in range(50)]
    whole = ["".join(normalised(text)) for text in texts]
    assert whole == [" ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in texts]
    monkeypatch.setattr(splits, "_CHUNK", size)
    assert ["".join(normalised(text)) for text in texts] == whole

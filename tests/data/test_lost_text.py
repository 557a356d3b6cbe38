"""Where a tokenizer does not keep the text, it is counted, and there are no bits per byte over what is left."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lit_llm.data.config import DataConfig, InstructionConfig
from lit_llm.data.examples import ExampleSet, prepare_examples
from lit_llm.data.instructions import identify_examples
from lit_llm.data.library_tokenizer import FromFile
from lit_llm.data.prepare import prepare

LEARNT = ["the cat sat on the mat with a hat " * 20]
TEXTS = ["the cat sat", " the cat", "The Cat 42", "naïve 世界 🙂", "e\u0301 is é", "<0x41> x", "a <X>  b", ""]


def byte_level(alphabet=True, add=None):
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    initial = sorted(pre_tokenizers.ByteLevel.alphabet()) if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=initial, show_progress=False
    )
    library.train_from_iterator(LEARNT, trainer)
    if add:
        library.add_tokens([add])
    return library


def composing():
    library = byte_level()
    library.normalizer = normalizers.NFC()
    return library


def falling_back():
    """Bytes are marked as special tokens, as `train_new_from_iterator` of a Llama 2 tokenizer leaves them."""
    library = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    library.train_from_iterator(
        LEARNT, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    return library


def unknown():
    """A SentencePiece of few characters, without bytes to fall back on."""
    pieces = [("<unk>", 0.0), *((character, -3.0) for character in "▁abcdefhimnostw")]
    library = Tokenizer(models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    return library


KEEP = {"byte level": byte_level, "NFC": composing, "byte fallback": falling_back}
LOSE = {
    "no alphabet": (lambda: byte_level(alphabet=False), {"the cat sat": 0, "The Cat 42": 4, "naïve 世界 🙂": 13}),
    "unknown pieces": (unknown, {"the cat sat": 0, " the cat": 0, "The Cat 42": 4}),
    "stripped": (lambda: byte_level(add=AddedToken("<X>", rstrip=True)), {"the cat sat": 0, "a <X>  b": 2}),
}


def saved(library, folder):
    library.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", KEEP)
def test_a_tokenizer_that_keeps_the_text_loses_no_byte(name, text, tmp_path):
    tokenizer = FromFile(saved(KEEP[name](), tmp_path), None, None)
    (ids,) = tokenizer.encode([text])
    assert tokenizer.lost_bytes(text, ids) == 0
    if name != "NFC":
        assert tokenizer.decode(ids.tolist()) == text
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode()) + (name == "byte fallback" and text != "")


@pytest.mark.parametrize("name", LOSE)
def test_what_a_tokenizer_drops_or_does_not_know_is_counted(name, tmp_path):
    made, expected = LOSE[name]
    tokenizer = FromFile(saved(made(), tmp_path), None, None)
    assert {text: tokenizer.lost_bytes(text, tokenizer.encode([text])[0]) for text in expected} == expected


def spaced(pre_tokenizer=None, normalizer=None, add=(), known="▁abch1<>"):
    """Spaces are written ▁, as SentencePiece does; letters beyond `known` are unknown."""
    pieces = [("<unk>", 0.0), *((character, -3.0) for character in known), ("▁▁", -1.0)]
    library = Tokenizer(models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer, library.normalizer = pre_tokenizer, normalizer
    library.add_tokens(list(add))
    return library


REPLACED = normalizers.Replace(" ", "▁")
PREPENDED = normalizers.Sequence([normalizers.Prepend("▁"), REPLACED])
TAGGED = ["<h1>a b", "<h1>", "a<h1>b", "a<h1> b", " <h1>a", "<h1><h1>a", "a  b", "a <h1>"]
TAG, NORMALIZED_TAG = AddedToken("<h1>", normalized=False), AddedToken("<h1>", normalized=True)


@pytest.mark.parametrize("text", TAGGED)
@pytest.mark.parametrize("tag", [TAG, NORMALIZED_TAG])
@pytest.mark.parametrize("scheme", ["first", "always", "never", "prepend", "replace"])
def test_spaces_are_put_before_what_the_library_puts_them_before(scheme, tag, text, tmp_path):
    """A text that begins with an added token gets none."""
    normalizer = {"prepend": PREPENDED, "replace": REPLACED}.get(scheme)
    pre_tokenizer = None if normalizer else pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = FromFile(saved(spaced(pre_tokenizer, normalizer, [tag]), tmp_path), None, None)
    assert tokenizer.lost_bytes(text, tokenizer.encode([text])[0]) == 0


@pytest.mark.parametrize("normalized", [False, True])
def test_an_added_token_of_spaces_has_a_byte_for_each(normalized, tmp_path):
    """As in Gemma's file, whose model makes such a token as well."""
    library = spaced(None, REPLACED, [AddedToken("▁▁", normalized=normalized)])
    tokenizer = FromFile(saved(library, tmp_path), None, None)
    (ids,) = tokenizer.encode(["a  b"])
    assert len(ids) == 3
    assert tokenizer.byte_lengths()[ids].tolist() == [1, 2, 1]
    assert tokenizer.lost_bytes("a  b", ids) == 0
    assert tokenizer.lost_bytes("aqq  b", tokenizer.encode(["aqq  b"])[0]) == 2


def test_what_is_not_known_is_no_less_lost_where_other_ids_stand_for_too_much(tmp_path):
    tokenizer = FromFile(saved(spaced(None, REPLACED), tmp_path), None, None)
    unknown, letter = tokenizer.encode(["q", "a"])
    assert tokenizer.lost_bytes("a", [*letter, *letter, *letter]) == 2
    assert tokenizer.lost_bytes("aq", [*letter, *unknown, *letter]) == 1


@pytest.mark.parametrize("lost", [False, True])
def test_there_are_no_bits_per_byte_over_what_is_left_of_a_text(lost, tmp_path):
    path = saved(byte_level(alphabet=False), tmp_path)
    letters = "theXcat" if lost else "thecat"
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(" ".join(letters[: 2 + (number + n) % 6] for n in range(40)))
    config = DataConfig.model_validate(
        {
            "corpus": {"kind": "text", "files": [f"{tmp_path}/*.txt"]},
            "tokenizer": {"kind": "file", "path": str(path)},
            "sequence_length": 8,
            "batch_size": 2,
            "validation_fraction": 0.2,
            "test_fraction": 0.2,
            "near_duplicates": "keep",
        }
    )
    prepared = prepare(config, tmp_path / "root")
    (source,) = prepared.sources
    meta = json.loads((source.folder / "meta.json").read_text())
    texts = [file.read_text() for file in tmp_path.glob("*.txt")]
    assert sum(meta["bytes"].values()) == sum(map(len, texts))
    assert sum(meta["lost_bytes"].values()) == source.lost_bytes == sum(text.count("X") for text in texts)
    assert (prepared.byte_lengths() is None) == lost

    file = tmp_path / "a.jsonl"
    records = [{"inputs": f"the{'X' * (n % 2 * lost)}{' cat' * n}", "targets": letters[: 1 + n % 6]} for n in range(60)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    section = InstructionConfig.model_validate(
        {"examples": {"kind": "jsonl", "files": [str(file)]}, "input_length": 9, "target_length": 9, "batch_size": 4}
    )
    digest = identify_examples(section, prepared.tokenizer_folder.name)
    prepare_examples(section, config.tokenizer, prepared.tokenizer_folder, tmp_path / "root", digest)
    examples = ExampleSet(tmp_path / "root", digest, config.tokenizer)
    assert examples.lost_bytes == file.read_text().count("X")

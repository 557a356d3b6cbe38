"""Any tokenizer.json gives the tokens that its library gives, with the house's two special ids first."""

import json
import subprocess
import sys
import time

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lit_llm import load_experiment
from lit_llm.config.problems import InputError
from lit_llm.data import library_tokenizer, tokenizer_file
from lit_llm.data.config import DataConfig, FileTokenizer
from lit_llm.data.library_tokenizer import FromFile
from lit_llm.data.prepare import prepare
from lit_llm.data.sources import identify
from lit_llm.data.tokenizers import open_tokenizer
from lit_llm.objectives.config import BOS, EOD, MasksConfig

CORPUS = ["the cat sat on the mat with a hat " * 20, "Grüße und 世界 for all the world\n" * 20, "<s> html </s> " * 20]
TEXTS = [
    "the cat sat on the mat",
    "  two  spaces\tand a tab\n\nlines\r\n",
    "Grüße, 世界 🙂 é e\u0301",
    "a tag <s>struck</s> and <|endoftext|> <pad> <unk> [SEP] <0x0A>",
    "<s>",
    "</s></s>",
    "▁ is a sign",
    "the",
    "",
]


def byte_level(**options):
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = options.get("special_tokens", ["<pad>", "<|endoftext|>"])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def metaspace():
    """As Llama 2's: a space is ▁, one is put before each text, what is unknown falls back to bytes."""
    library = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False, limit_alphabet=20)
    library.train_from_iterator(CORPUS[:1], trainer)
    content = json.loads(library.to_str())
    # Llama's bytes are tokens of the model and no special ones.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


def unigram():
    """As T5's: pieces with scores, </s> among them."""
    library = Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator([*CORPUS, *TEXTS], trainer)
    return library


def word_piece():
    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.Lowercase()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    library.train_from_iterator([*CORPUS, *TEXTS], trainer)
    return library


KINDS = {"byte_level": byte_level, "metaspace": metaspace, "unigram": unigram, "word_piece": word_piece}
ENDS = {"byte_level": "<|endoftext|>", "metaspace": "</s>", "unigram": "</s>", "word_piece": "[SEP]"}
BEGINS = {"byte_level": None, "metaspace": "<s>", "unigram": None, "word_piece": "[CLS]"}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """(name of the kind, the library's tokenizer, its file)."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    KINDS[request.param]().save(str(path))
    return request.param, Tokenizer.from_file(str(path)), path


def save(library, tmp_path, change=lambda content: None):
    content = json.loads(library.to_str())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    return tmp_path / "tokenizer.json"


def exchanged(ours, library, kind):
    """The library's ids of ours, by the definition: id 0 and the end trade places, then id 1 and <s>."""
    size = library.get_vocab_size()
    end = library.token_to_id(ENDS[kind])
    begin = size if BEGINS[kind] is None else library.token_to_id(BEGINS[kind])
    order = list(range(size + (BEGINS[kind] is None)))
    for place, special in ((0, end), (1, begin)):
        other = order.index(special)
        order[place], order[other] = order[other], order[place]
    return [order[i] for i in ours]


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_are_those_of_the_library_where_no_special_token_is_spelled(made, text):
    kind, library, path = made
    (ids,) = FromFile(path, None, None).encode([text])
    library.encode_special_tokens = True
    if (kind == "unigram" and "</s>" in text) or "<pad>" in text or "<unk>" in text:
        return  # there the library reads special tokens; the next tests say what we do
    assert exchanged(ids, library, kind) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_spells_a_special_token(made, text):
    kind, library, path = made
    (ids,) = FromFile(path, None, None).encode([text])
    unknown = {library.token_to_id(name) for name in ("<unk>", "[UNK]")}
    special = {library.token_to_id(t["content"]) for t in json.loads(path.read_text())["added_tokens"]} - unknown
    assert not {EOD, BOS} & set(ids.tolist())
    assert not special & set(exchanged(ids, library, kind))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_comes_back(made, text):
    kind, _, path = made
    tokenizer = FromFile(path, None, None)
    (ids,) = tokenizer.encode([text])
    back = tokenizer.decode([EOD, BOS, *ids.tolist(), EOD])
    if kind == "word_piece":
        return  # it does not keep spaces
    if kind == "unigram":
        # It has one sign for all kinds of spaces at word ends, and none for what it was not trained on.
        assert "".join(back.split()) == "".join(text.replace("▁", " ").split())
    else:
        assert back == (text if kind == "byte_level" else text.replace("▁", " "))


@pytest.mark.parametrize("text", TEXTS)
def test_byte_lengths_add_up_to_the_text(made, text):
    """But for the space that SentencePiece puts before each text; its ▁ stands for a space, of one byte."""
    kind, _, path = made
    tokenizer = FromFile(path, None, None)
    lengths = tokenizer.byte_lengths()
    if kind == "word_piece":
        assert lengths is None
        return
    (ids,) = tokenizer.encode([text])
    before = {"byte_level": 0, "metaspace": bool(text), "unigram": bool(text) and text[0] not in " ▁"}[kind]
    assert lengths[ids].sum() == len(text.replace("▁", " " if kind != "byte_level" else "▁").encode()) + before
    assert lengths.shape == (tokenizer.vocabulary,)
    assert lengths[:2].tolist() == [0, 0]


def test_the_vocabulary_is_read_without_the_library_and_counts_what_is_added(made):
    kind, library, path = made
    choice = FileTokenizer(path=str(path))
    assert choice.vocabulary == library.get_vocab_size() + (BEGINS[kind] is None)
    assert FromFile(path, None, None).vocabulary == choice.vocabulary


def test_every_id_is_a_row_and_stands_once(made):
    kind, library, path = made
    tokenizer = FromFile(path, None, None)
    theirs = exchanged(range(tokenizer.vocabulary), library, kind)
    assert sorted(theirs) == list(range(tokenizer.vocabulary))
    assert tokenizer._theirs.tolist() == theirs


def test_the_same_ids_as_transformers_gives(tmp_path):
    from transformers import PreTrainedTokenizerFast

    path = save(byte_level(), tmp_path)
    peer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    plain = [text for text in TEXTS if "<|" not in text and "<pad>" not in text]
    ours = FromFile(path, None, None).encode(plain)
    assert [exchanged(ids, peer.backend_tokenizer, "byte_level") for ids in ours] == [
        peer.encode(text, add_special_tokens=False) for text in plain
    ]


@pytest.mark.parametrize(
    ("special", "end", "begin"),
    [
        (["<eod>", "<s>"], None, None),
        (["<s>", "<eod>"], None, None),
        (["<a>", "<eod>", "<s>"], "<s>", "<eod>"),
        (["<a>", "<b>"], "<b>", "<a>"),
        (["<a>", "<b>"], None, None),
        (["<a>", "<b>"], None, "<a>"),
        ([], None, None),
    ],
)
def test_the_special_ids_come_first_wherever_they_were(tmp_path, special, end, begin):
    path = save(byte_level(special_tokens=special), tmp_path)
    tokenizer = FromFile(path, end, begin)
    chosen = [end or ("<eod>" if "<eod>" in special else None), begin or ("<s>" if "<s>" in special else None)]
    assert sorted(tokenizer._theirs) == list(range(tokenizer.vocabulary))
    library = Tokenizer.from_file(str(path))
    new = iter(range(library.get_vocab_size(), tokenizer.vocabulary))
    assert tokenizer._theirs[:2].tolist() == [library.token_to_id(t) if t else next(new) for t in chosen]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode([text])[0].tolist()) == text


# --- what such files bring along -----------------------------------------------------------------------------------


def test_truncation_padding_and_templates_of_a_file_are_not_applied(tmp_path):
    library = byte_level()
    library.enable_truncation(3)
    library.enable_padding(length=50)
    ids = FromFile(save(library, tmp_path), None, None).encode(["the cat sat on the mat", "the"])
    assert [len(i) > 3 for i in ids] == [True, False]
    assert len(ids[1]) < 50


def token(index, content, special):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": special, **flags}


def test_added_tokens_that_are_not_special_are_read_and_count_their_bytes(tmp_path):
    """Runs of spaces in GPT-NeoX; they are written as they are, not in the alphabet of bytes."""
    library = byte_level()
    size = library.get_vocab_size()
    path = save(library, tmp_path, lambda c: c["added_tokens"].append(token(size, "  é", False)))
    tokenizer = FromFile(path, None, None)
    (ids,) = tokenizer.encode(["a  éb"])
    assert len(ids) == 3
    assert tokenizer.byte_lengths()[ids].tolist() == [1, 4, 1]
    assert tokenizer.decode(ids.tolist()) == "a  éb"


@pytest.mark.parametrize(
    ("vocabulary", "added"),
    [
        ({"a": 0, "b": 1}, [(7, "x", True), (1, "b", True), (2, "y", False)]),
        ({"a": 0, "b": 5}, [(7, "x", True), (2, "y", False)]),
        ({"a": 0, "b": 5}, [(5, "b", True), (2, "y", False), (9, "z", True)]),
        ({"a": 0, "b": 1, "c": 2}, [(0, "a", True), (2, "y", False), (9, "z", True), (9, "y", False)]),
    ],
)
def test_ids_of_added_tokens_are_those_that_the_library_gives_and_not_those_that_are_written(vocabulary, added):
    content = json.loads(Tokenizer(models.WordLevel(vocabulary, unk_token="a")).to_str())
    content["added_tokens"] = [token(*given) for given in added]
    assert tokenizer_file.tokens_of(content) == Tokenizer.from_str(json.dumps(content)).get_vocab()


# --- files of other times and kinds --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_does_not_say_its_kind_is_the_same_tokenizer(tmp_path, kind):
    """As GPT-2's official file. Judge: the file that says it."""
    library = KINDS[kind]()
    said = FromFile(save(library, tmp_path), None, None)
    silent = FromFile(save(library, tmp_path, lambda c: c["model"].pop("type")), None, None)
    assert [ids.tolist() for ids in silent.encode(TEXTS)] == [ids.tolist() for ids in said.encode(TEXTS)]
    both = [tokenizer.byte_lengths() for tokenizer in (said, silent)]
    assert both == [None, None] if kind == "word_piece" else both[0].tolist() == both[1].tolist()


def test_a_form_that_cannot_be_read_is_one_message_before_anything_is_tokenised(tmp_path, corpus, monkeypatch):
    def other(content):
        raise KeyError("new")

    monkeypatch.setattr(library_tokenizer, "_byte_length", other)
    with pytest.raises(InputError, match="tokenizer.path: .*tokenizer.json has a form that cannot be read: KeyError"):
        prepare(config(corpus, save(byte_level(), tmp_path)), tmp_path / "data")
    assert list((tmp_path / "data").rglob("*.bin")) == []


def test_dropout_of_a_file_is_not_applied(tmp_path):
    """The same text has the same tokens, those of the file without dropout."""
    plain = FromFile(save(byte_level(), tmp_path), None, None).encode(CORPUS)
    random = FromFile(save(byte_level(), tmp_path, lambda c: c["model"].update(dropout=0.9)), None, None)
    for _ in range(2):
        assert [ids.tolist() for ids in random.encode(CORPUS)] == [ids.tolist() for ids in plain]


SPLIT = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+"), "isolated")
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "counted"),
    [
        (None, [SPLIT, BYTES], True),
        (normalizers.NFC(), [SPLIT, BYTES], True),
        (None, [pre_tokenizers.Digits(True), pre_tokenizers.Punctuation("contiguous"), BYTES], True),
        (None, [pre_tokenizers.Whitespace(), BYTES], False),
        (None, [pre_tokenizers.WhitespaceSplit(), BYTES], False),
        (None, [pre_tokenizers.Split(" ", "removed"), BYTES], False),
        (None, [pre_tokenizers.Punctuation("removed"), BYTES], False),
        (None, [pre_tokenizers.Metaspace(), BYTES], False),
        (normalizers.Replace(Regex(r"\s+"), ""), [BYTES], False),
        (normalizers.Replace(" ", "▁"), [BYTES], False),
        (normalizers.Strip(), [BYTES], False),
        (normalizers.StripAccents(), [BYTES], False),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), [BYTES], False),
        (normalizers.Lowercase(), [BYTES], False),
    ],
)
def test_bytes_are_counted_where_they_add_up_to_the_text_and_not_else(tmp_path, normalizer, pre_tokenizer, counted):
    """Judge: the text's own bytes. Where steps may drop or add some, there is no count."""
    library = byte_level()
    if normalizer:
        library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizers.Sequence(pre_tokenizer)
    tokenizer = FromFile(save(library, tmp_path), None, None)
    lengths = tokenizer.byte_lengths()
    assert (lengths is not None) is counted
    for text in ("Grüße, 世界 12345  and é\n", " a b "):
        if lengths is not None:
            assert lengths[tokenizer.encode([text])[0]].sum() == len(text.encode())


# --- identity ------------------------------------------------------------------------------------------------------


def config(corpus, path, **keys):
    return DataConfig.model_validate(
        {
            "corpus": {"kind": "text", "files": [f"{corpus}/*.txt"]},
            "tokenizer": {"kind": "file", "path": str(path), **keys},
            "sequence_length": 8,
            "batch_size": 2,
        }
    )


def test_the_digest_is_of_the_content_and_the_chosen_ids(tmp_path, corpus):
    (tmp_path / "copy").mkdir()
    first = identify(config(corpus, save(byte_level(), tmp_path))).digest
    copy = save(byte_level(), tmp_path / "copy")
    assert identify(config(corpus, copy)).digest == first
    assert identify(config(corpus, copy, end_of_document="<|endoftext|>")).digest == first
    others = {
        identify(config(corpus, copy, end_of_document="<pad>")).digest,
        identify(config(corpus, copy, begin="<pad>")).digest,
    }
    save(byte_level(), tmp_path / "copy", lambda c: c["model"]["vocab"].update(new=len(c["model"]["vocab"])))
    assert len({first, *others, identify(config(corpus, copy)).digest}) == 4


def test_the_file_is_kept_beside_the_tokens_and_a_later_change_is_noticed(tmp_path, corpus):
    path = save(byte_level(), tmp_path)
    prepared = prepare(config(corpus, path), tmp_path / "data")
    ids = prepared.tokenizer().encode(["The Cat"])[0].tolist()
    save(byte_level(), tmp_path, lambda c: c.update(normalizer={"type": "Lowercase"}))
    assert prepared.tokenizer().encode(["The Cat"])[0].tolist() == ids
    save(byte_level(), tmp_path, lambda c: c["model"]["vocab"].update(new=len(c["model"]["vocab"])))
    with pytest.raises(InputError, match="has changed since the text was tokenised"):
        prepared.tokenizer()


# --- what is refused -----------------------------------------------------------------------------------------------


def told(tmp_path, path, **keys):
    """What a study's line says about its tokenizer."""
    file = tmp_path / "experiment.yaml"
    choice = json.dumps({"kind": "file", "path": str(path), **keys})
    file.write_text(f"extends: redllm-tiny\npretrain:\n  data:\n    tokenizer:\n      {choice}\n")
    with pytest.raises(InputError) as caught:
        load_experiment(file)
    (problem,) = caught.value.problems
    return str(problem).removeprefix(f"{file}:")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "is no tokenizer.json: it is not JSON"),
        ("{", "is no tokenizer.json: it is not JSON"),
        ("[1]", "is no tokenizer.json: it has no `model.vocab`"),
        ('{"model": {}}', "is no tokenizer.json: it has no `model.vocab`"),
        ('{"model": {"vocab": 3}}', "is no tokenizer.json: it has no `model.vocab`"),
        ('{"model": {"vocab": {}}}', "is no tokenizer.json: its vocabulary is empty"),
        ('{"model": {"vocab": {"a": 0, "b": 0}}}', "one id for two tokens"),
        ('{"model": {"vocab": {"a": 0}}, "added_tokens": [{}]}', "is no tokenizer.json: it has no `model.vocab`"),
    ],
)
def test_a_file_that_is_none_is_told_at_its_key(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    said = told(tmp_path, path)
    assert said.startswith("5: pretrain.data.tokenizer.path: ")
    assert message in said


def test_a_folder_is_no_tokenizer(tmp_path):
    assert told(tmp_path, tmp_path) == f"5: pretrain.data.tokenizer.path: {tmp_path} is a directory; name the file"


def test_tokens_that_the_file_does_not_have_are_told_with_the_nearest(tmp_path):
    path = save(byte_level(), tmp_path)
    said = told(tmp_path, path, end_of_document="<|endoftxt|>")
    assert said.startswith("5: pretrain.data.tokenizer.end_of_document: the tokenizer has no token '<|endoftxt|>'")
    assert "did you mean '<|endoftext|>'?" in said
    assert "tokenizer.begin: " in told(tmp_path, path, begin="<ss>")
    assert "ends a document already" in told(tmp_path, path, begin="<|endoftext|>")


def test_more_tokens_than_the_model_has_rows_are_refused_with_both_numbers(tmp_path):
    path = save(byte_level(special_tokens=[f"<{n}>" for n in range(900)]), tmp_path)
    tokens = FileTokenizer(path=str(path)).vocabulary
    assert tokens > 1024
    assert told(tmp_path, path).endswith(f"model.vocabulary: 1024 rows for a tokenizer of {tokens} tokens")


def test_what_only_the_library_finds_wrong_is_told_before_anything_is_written(tmp_path, corpus):
    path = save(byte_level(), tmp_path, lambda c: c["model"].update(merges=[["zz", "yy"]]))
    with pytest.raises(InputError, match="the tokenizers library refuses"):
        prepare(config(corpus, path), tmp_path / "data")
    assert list((tmp_path / "data").rglob("*.json")) == []


def test_a_model_that_merges_into_its_own_end_is_refused_when_a_text_does(tmp_path):
    library = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer = FromFile(save(library, tmp_path), "ab", None)
    assert tokenizer.encode(["ba"])[0].tolist() == [3, 2]
    with pytest.raises(InputError, match="reads a text as its end of a document"):
        tokenizer.encode(["ab"])


def test_opening_gives_the_tokenizer_of_the_choice(tmp_path):
    path = save(metaspace(), tmp_path)
    tokenizer = open_tokenizer(FileTokenizer(path=str(path)), tmp_path)
    assert tokenizer.vocabulary == metaspace().get_vocab_size()


def test_a_plan_reads_the_vocabulary_without_a_heavy_library(made):
    heavy = ("torch", "numpy", "tokenizers", "transformers", "pyarrow")
    code = (
        "import sys; from lit_llm.data.config import FileTokenizer; FileTokenizer(path=sys.argv[1]).vocabulary; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, made[2]], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["byte_level", "word_piece"])
def test_bits_per_byte_are_given_where_bytes_can_be_counted(tmp_path, corpus, kind):
    from lit_llm.evaluation.config import ValidationConfig
    from lit_llm.evaluation.likelihood import Validation
    from lit_llm.models.build import build_model
    from lit_llm.objectives.config import CausalLM

    data = prepare(config(corpus, save(KINDS[kind](), tmp_path)), tmp_path / "data")
    validation = Validation(ValidationConfig(sequences=4), data, CausalLM(), "decoder", MasksConfig())
    found = validation(build_model(load_experiment("decllm-tiny").model, seed=0).eval())
    assert ("val/bits_per_byte" in found) is (kind == "byte_level")
    assert found["val/target_nll"] > 0


def test_an_expression_that_explodes_is_one_message(tmp_path):
    """(a+)+b tries every way to cut a row of a's, 2^200 of them; the library gives up after ten million, and panics."""
    library = byte_level()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("(a+)+b"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = FromFile(save(library, tmp_path), "<|endoftext|>", None)
    assert tokenizer.encode(["the cat"])[0].size
    started = time.process_time()
    with pytest.raises(InputError, match=r"tokenizer\.path: the tokenizers library gives up on a text .*retry-limit"):
        tokenizer.encode(["a" * 200 + "c"])
    assert time.process_time() - started < 5

"""Tokens: an imported folder, and an exported run, read and write the text that the tokenizer's own library does."""

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from lit_llm.config.problems import InputError
from lit_llm.data.library_tokenizer import FromFile
from lit_llm.experiment.load import load_experiment
from lit_llm.huggingface import export_checkpoint, import_checkpoint, open_checkpoint, open_model
from lit_llm.models.build import build_model
from tests.commands import lit_llm
from tests.huggingface.small_peers import MODELS, imported, peer, saved

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"w{number}" for number in range(57))]
"""Gemma's special tokens at Gemma's places, and so not where ours are."""


def write_tokenizer(path, special=("<pad>", "<eos>", "<bos>", "<unk>")):
    library = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.decoder = decoders.Fuse()
    library.add_special_tokens(list(special))
    library.save(str(path))
    return library


def with_tokenizer(name, folder, **changes):
    """(transformers' model, its folder with a tokenizer, the library)."""
    model = peer(name, **changes)
    place = saved(model, folder / "theirs")
    return model, place, write_tokenizer(place / "tokenizer.json")


def greedy(model, library, prompt, tokens, both):
    """What transformers and the tokenizers library write after a text."""
    ids = torch.tensor([library.encode(prompt, add_special_tokens=False).ids])
    model.generation_config.eos_token_id = 1
    options = {"max_new_tokens": tokens, "do_sample": False}
    if both:
        (out,) = model.generate(ids, attention_mask=torch.ones_like(ids), decoder_start_token_id=2, **options)
        return library.decode(out[1:].tolist(), skip_special_tokens=True)
    ids = torch.cat([torch.tensor([[2]]), ids], dim=1)
    (out,) = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return library.decode(out[ids.shape[1] :].tolist(), skip_special_tokens=True)


@pytest.mark.parametrize("name", ["gemma2", "t5gemma2"])
def test_generate_takes_an_imported_folder_as_it_is(name, tmp_path):
    model, place, library = with_tokenizer(name, tmp_path)
    done = lit_llm("import", place, "--out", "ours", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    prompts = "w5 w9 w30", "w1", "w40 w8 w7 w40", "w2 w3"
    said = lit_llm("generate", "ours", *prompts, "--max-new-tokens", "12", "--json", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    expected = [greedy(model, library, prompt, 12, both=name == "t5gemma2") for prompt in prompts]
    assert [json.loads(line)["generated"] for line in said.stdout.splitlines()] == expected
    assert max(map(len, expected)) > 10


@pytest.mark.parametrize("name", MODELS)
def test_rows_stand_in_the_order_of_our_tokenizer(name, tmp_path):
    """The end of a document is 0 and <s> is 1 in every tokenizer of ours: the rows of theirs have to follow."""
    model, place, _ = with_tokenizer(name, tmp_path)
    import_checkpoint(place, tmp_path / "ours")
    tokenizer = FromFile(tmp_path / "ours" / "tokenizer.json", "<eos>", "<bos>")
    theirs = np.array([1, 2, *(4 + number for number in (5, 9, 30))])
    ours = np.concatenate([[0, 1], *tokenizer.encode(["w5 w9 w30"])])
    _, state = open_checkpoint(tmp_path / "ours")
    table = model.get_input_embeddings().weight
    key = "encoder_embedding.weight" if name == "t5gemma" else "embedding.weight"
    assert torch.equal(state[key][ours], table[theirs])
    bias = getattr(getattr(model, "decoder", None), "bias", None)
    assert name != "modernbert" or torch.equal(state["output_bias"][ours], bias[theirs])


def test_the_tokens_that_end_and_begin_are_written_by_name(tmp_path):
    _, place, _ = with_tokenizer("llama", tmp_path)
    import_checkpoint(place, tmp_path / "ours")
    text = (tmp_path / "ours" / "model.yaml").read_text()
    assert "end_of_document: <eos>" in text
    assert "begin: <bos>" in text


def test_a_decoder_begins_with_the_token_that_its_config_names(tmp_path):
    """T5's targets begin with <pad>, although the file has a <bos>."""
    _, place, _ = with_tokenizer("t5", tmp_path, decoder_start_token_id=0)
    import_checkpoint(place, tmp_path / "ours")
    assert "begin: <pad>" in (tmp_path / "ours" / "model.yaml").read_text()
    assert open_model(tmp_path / "ours")[2] == 1


def test_a_tokenizer_without_a_first_token_begins_with_its_last(tmp_path):
    """Qwen's way: there is no row that was trained to begin a text, but one that stood between two."""
    place = saved(peer("qwen3", vocab_size=64), tmp_path / "theirs")
    write_tokenizer(place / "tokenizer.json", special=["<eos>"])
    import_checkpoint(place, tmp_path / "ours")
    assert open_model(tmp_path / "ours")[2] == 0
    other = saved(peer("qwen3"), tmp_path / "others")
    write_tokenizer(other / "tokenizer.json")
    import_checkpoint(other, tmp_path / "with_begin")
    assert open_model(tmp_path / "with_begin")[2] == 1


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    folder, _ = imported(peer("llama"), tmp_path)
    said = lit_llm("generate", folder, "text", cwd=tmp_path)
    assert said.returncode == 2
    assert "no tokenizer" in said.stderr


@pytest.mark.parametrize("line", [("generate", "theirs", "w1"), ("export", "theirs", "out")])
def test_a_folder_that_is_still_to_be_imported_says_how(line, tmp_path):
    with_tokenizer("llama", tmp_path)
    said = lit_llm(*line, cwd=tmp_path)
    assert said.returncode == 2
    assert "`lit-llm import theirs` first" in said.stderr
    assert "decllm-tiny" not in said.stderr


def test_a_model_that_fills_in_words_says_that_it_writes_none(tmp_path):
    _, place, _ = with_tokenizer("modernbert", tmp_path)
    import_checkpoint(place, tmp_path / "ours")
    said = lit_llm("generate", "ours", "w1", cwd=tmp_path)
    assert said.returncode == 2
    assert "writes no text" in said.stderr


RUN = """
extends: decllm-tiny
model:
  {d_model: 16, vocabulary: 64, norm: {scale: true}, attention: {heads: 2, qkv_norm: []}, feed_forward: {d_ff: 32}}
pretrain:
  data:
    corpus: {kind: text, files: ["*.txt"]}
    tokenizer: {kind: file, path: tokenizer.json}
    sequence_length: 32
    batch_size: 4
    validation_fraction: 0.3
    test_fraction: 0
    near_duplicates: keep
  training: {max_steps: 20, schedule: {warmup_steps: 2}}
  validation: {times: 1, sequences: 4}
"""


@pytest.fixture
def library(tmp_path):
    """A folder with a run's file and its text; the tokenizer."""
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text(" ".join(f"w{(7 * n + number) % 57}" for n in range(300)))
    (tmp_path / "run.yaml").write_text(RUN)
    return write_tokenizer(tmp_path / "tokenizer.json")


def test_an_exported_run_writes_in_transformers_what_generate_writes(library, tmp_path):
    """Trained with exchanged ids; its rows have to go back to their places in the tokenizer's file."""
    done = lit_llm("train", "run.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = lit_llm("export", "run.yaml", "exported", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM" in done.stdout
    said = lit_llm("generate", "run.yaml", "w5 w9 w30", "--max-new-tokens", "9", "--json", cwd=tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager")
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (2, 1)
    assert json.loads(said.stdout)["generated"] == greedy(theirs, library, "w5 w9 w30", 9, both=False)
    again = lit_llm("import", "exported", "--out", "ours", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    repeated = lit_llm("generate", "ours", "w5 w9 w30", "--max-new-tokens", "9", "--json", cwd=tmp_path)
    assert repeated.stdout == said.stdout


def test_a_mask_that_transformers_does_not_have_is_said(library, tmp_path):
    (tmp_path / "run.yaml").write_text(RUN + "  objective: prefix_lm\n  masks: {prefix: bidirectional}\n")
    assert lit_llm("train", "run.yaml", cwd=tmp_path).returncode == 0
    done = lit_llm("export", "run.yaml", "exported", cwd=tmp_path)
    assert "prefix both ways" in done.stdout, done.stderr


def test_an_exported_run_imported_again_has_the_tokenizer_that_it_was_trained_with(library, tmp_path, monkeypatch):
    """The export lets tokenizer.json begin a text with <bos>, which changes no document's ids."""
    monkeypatch.chdir(tmp_path)
    experiment = load_experiment("run.yaml")
    state = build_model(experiment.model).state_dict()
    export_checkpoint(experiment.model, state, tmp_path / "exported", tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "exported" / "tokenizer.json").read_text())["post_processor"]
    import_checkpoint(tmp_path / "exported", tmp_path / "imported")
    adapted = load_experiment("run.yaml", ["adapt={from: imported}"])
    assert adapted.adapt is not None
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "lower.json").write_text(json.dumps({**content, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(InputError, match="another tokenizer"):
        load_experiment("run.yaml", ["adapt={from: imported}", "pretrain.data.tokenizer.path=lower.json"])


@pytest.mark.parametrize(
    ("before", "begin"),
    [
        ("nothing", "a $B :1"),
        ("byte_level", "<|start:text|>"),
        ("both", "<|start:text|>"),
        ("ends", "<|start:text|>"),
    ],
)
def test_any_token_may_begin_the_texts_of_an_export(before, begin, tmp_path):
    """Also one that a template of the tokenizers library would split. Offsets leave spaces out as before."""
    vocabulary = {token: index for index, token in enumerate(["</s>", begin, *pre_tokenizers.ByteLevel.alphabet()])}
    library = Tokenizer(models.BPE(vocabulary, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["</s>", begin])
    offsets = processors.ByteLevel(trim_offsets=True)
    ends = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 0)])
    made = {"byte_level": offsets, "both": processors.Sequence([offsets, ends]), "ends": ends}
    if before in made:
        library.post_processor = made[before]
    library.save(str(tmp_path / "tokenizer.json"))
    config = load_experiment("decllm-tiny", ["pretrain.data.tokenizer.vocabulary=300", "model.vocabulary=300"]).model
    state = build_model(config).state_dict()
    export_checkpoint(config, state, tmp_path / "out", tmp_path / "tokenizer.json", "</s>", begin)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    plain = library.encode("ab cd", add_special_tokens=False)
    assert theirs("ab cd")["input_ids"] == [1, *plain.ids]
    assert theirs("ab", "cd")["input_ids"] == [1, *plain.ids[:2], *plain.ids[3:]]
    found = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("ab cd")
    assert found.offsets[3] == ((3, 3) if before in ("byte_level", "both") else (2, 3))


def test_the_source_of_an_exported_redllm_has_no_token_before_it(tmp_path):
    """Also where the tokenizer's file adds some; what it says on offsets stays."""
    vocabulary = {token: index for index, token in enumerate(["</s>", "<s>", *pre_tokenizers.ByteLevel.alphabet()])}
    library = Tokenizer(models.BPE(vocabulary, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(["</s>", "<s>"])
    both_ends = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("</s>", 0), ("<s>", 1)])
    config = load_experiment("redllm-tiny", ["pretrain.data.tokenizer.vocabulary=300", "model.vocabulary=300"]).model
    state = build_model(config).state_dict()
    for number, steps in enumerate(([both_ends], [processors.ByteLevel(), both_ends])):
        library.post_processor = processors.Sequence(steps)
        library.save(str(tmp_path / "tokenizer.json"))
        export_checkpoint(config, state, tmp_path / str(number), tmp_path / "tokenizer.json")
        written = Tokenizer.from_file(str(tmp_path / str(number) / "tokenizer.json"))
        assert written.encode("ab").ids == library.encode("ab", add_special_tokens=False).ids
        assert written.encode("a b").offsets[1:-1] == ([(2, 2)] if number else [(1, 2)])

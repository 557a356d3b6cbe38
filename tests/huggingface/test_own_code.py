"""DecLLM and RedLLM exported with their code, loaded by transformers' Auto classes from the folder alone."""

import ast
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers

from lit_llm.experiment.load import load_experiment
from lit_llm.generation import generate
from lit_llm.huggingface import export_checkpoint, export_folder, import_checkpoint
from lit_llm.huggingface.architectures import checked, nearest
from lit_llm.huggingface.to_config import CODE, SpecialTokens
from lit_llm.models.build import build_model
from lit_llm.models.resolve import resolve_model
from tests.huggingface.small_peers import VOCABULARY, close, ids, lengths, opened
from tests.remote_code import modules_in

AUTO = {"decllm": transformers.AutoModelForCausalLM, "redllm": transformers.AutoModelForSeq2SeqLM}
CLASSES = {"decllm": "DecLLMForCausalLM", "redllm": "RedLLMForConditionalGeneration"}
ODD = {
    "d_model": 24, "vocabulary": VOCABULARY, "norm": {"scale": False, "eps": 1e-3},
    "attention": {
        "heads": 6, "kv_heads": 2, "head_dim": 10, "qkv_norm": ["q", "k", "v"], "norm_eps": 1e-3, "rope_theta": 90.0,
    },
    "feed_forward": {"d_ff": 40},
}  # fmt: skip
"""The presets' components at other shapes: heads that share keys, of a width that is not d_model / heads."""
SECTIONS = {
    "decllm": {**ODD, "decoder": {"layers": 3}},
    "redllm": {
        **ODD, "family": "encoder_decoder", "attention": {**ODD["attention"], "output_norm": "head"},
        "encoder": {"layers": 2}, "decoder": {"layers": 3},
    },
}  # fmt: skip
UNREAD = {"cross_attention_mode": "none"}
both = pytest.mark.parametrize("name", SECTIONS)


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    with modules_in(tmp_path_factory.mktemp("modules")):
        yield


def built(section):
    config = checked(section)
    model = build_model(config, seed=3).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3.0)  # distributions that are not flat, so that a greedy choice is none between equals
    return config, model


def loaded(name, folder, **options):
    return AUTO[name].from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{family: (our model, folder, transformers' model)}."""
    made = {}
    for name, section in SECTIONS.items():
        config, ours = built(section)
        folder = tmp_path_factory.mktemp(name) / "out"
        said = export_checkpoint(config, ours.state_dict(), folder)
        assert said.startswith(CLASSES[name])
        assert "trust_remote_code=True" in said
        made[name] = ours, folder, loaded(name, folder)
    return made


@torch.no_grad()
def logits(name, theirs, ours):
    """Theirs, ours, and which are of real tokens. Rows of several lengths, padded at their end."""
    tokens, real = ids(4, 14), lengths(4, 14)
    mask = (torch.arange(14) < real[:, None]).long()
    if name == "decllm":
        return theirs(input_ids=tokens, attention_mask=mask).logits, ours(tokens), mask.bool()
    targets = ids(4, 11, seed=1)
    out = theirs(input_ids=tokens, attention_mask=mask, decoder_input_ids=targets).logits
    return out, ours(tokens, targets, real), torch.ones(4, 11, dtype=torch.bool)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@both
def test_an_exported_folder_has_our_logits(name, kernel, exported):
    ours, folder, _ = exported[name]
    theirs, found = AUTO[name].from_pretrained(
        folder, trust_remote_code=True, attn_implementation=kernel, output_loading_info=True
    )
    assert type(theirs).__name__ == CLASSES[name]
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    close(*logits(name, theirs.eval(), ours), most=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@both
def test_padding_on_either_side_changes_nothing(name, side, exported):
    """transformers pads prompts on the left, ours stand at the beginning of their rows."""
    ours, _, theirs = exported[name]
    tokens, targets = ids(1, 9), ids(1, 5, seed=1)
    padding = torch.zeros(1, 4, dtype=torch.long)
    both_sides = (padding, tokens) if side == "left" else (tokens, padding)
    whole = torch.cat(both_sides, dim=1)
    mask = torch.cat([torch.full_like(part, part is tokens) for part in both_sides], dim=1)
    with torch.no_grad():
        if name == "decllm":
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            found = theirs(input_ids=whole, attention_mask=mask, position_ids=positions).logits[mask.bool()]
            assert torch.allclose(found, ours(tokens)[0], atol=1e-4)
            assert torch.equal(theirs(input_ids=whole, attention_mask=mask).logits[mask.bool()], found)
        else:
            found = theirs(input_ids=whole, attention_mask=mask, decoder_input_ids=targets).logits
            assert torch.allclose(found, ours(tokens, targets), atol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
@both
def test_greedy_text_is_ours_token_for_token(name, cached, exported):
    """Of prompts of several lengths, in one batch."""
    ours, _, theirs = exported[name]
    prompts = [row[:length].tolist() for row, length in zip(ids(3, 9), (9, 4, 1), strict=True)]
    options = {"max_new_tokens": 16, "do_sample": False, "use_cache": cached, "eos_token_id": None}
    texts = [[1, *prompt] for prompt in prompts] if name == "decllm" else prompts
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    out = theirs.generate(tokens, attention_mask=mask, **options)
    begins = longest if name == "decllm" else 1
    mine = generate(ours, prompts, max_new_tokens=16, stop=())
    assert [answer.tokens for answer in mine] == out[:, begins:].tolist()
    assert len({token for answer in mine for token in answer.tokens}) > 5


@both
def test_labels_give_the_mean_loss_of_our_logits(name, exported):
    ours, _, theirs = exported[name]
    tokens, labels = ids(2, 8), ids(2, 8, seed=4)
    if name == "decllm":
        labels = tokens
        expected = torch.nn.functional.cross_entropy(ours(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    else:
        labels[0, 5:] = -100
        inputs = torch.cat([torch.ones(2, 1, dtype=torch.long), labels[:, :-1].clamp(min=0)], dim=1)
        expected = torch.nn.functional.cross_entropy(ours(tokens, inputs).flatten(0, 1), labels.flatten())
    assert theirs(input_ids=tokens, labels=labels).loss.item() == pytest.approx(expected.item(), abs=1e-5)


@both
def test_what_transformers_saves_again_loads_with_the_same_bits(name, exported, tmp_path):
    theirs = exported[name][2]
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CODE).is_file()
    again = loaded(name, tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in theirs.state_dict().items())


@both
def test_import_gives_back_the_model_and_its_bits(name, exported, tmp_path):
    """Both what we and what transformers wrote. The folder's code is not run."""
    ours, exported_folder, theirs = exported[name]
    folder = shutil.copytree(exported_folder, tmp_path / "written")
    theirs.save_pretrained(tmp_path / "theirs")
    for written in (folder, tmp_path / "theirs"):
        (written / CODE).write_text((written / CODE).read_text() + "\nraise SystemError('was run')\n")
        import_checkpoint(written, tmp_path / "ours" / written.name)
        back = opened(tmp_path / "ours" / written.name)
        assert back.config == ours.config
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in ours.state_dict().items())
    export_folder(tmp_path / "ours" / folder.name, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_the_code_stands_alone():
    """Of other packages it imports torch and transformers, and nothing of ours."""
    import lit_llm.huggingface.modeling_lit_llm as code

    tree = ast.parse(Path(code.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert outside == {"torch", "transformers"}


@pytest.mark.parametrize(
    "preset", ["decllm-tiny", "decllm-150m", "decllm-8b", "redllm-tiny", "redllm-150m", "redllm-8b"]
)
def test_every_preset_is_within_the_code(preset):
    """By its config.json, read back; and by its parameters, as transformers builds them."""
    model = resolve_model(load_experiment(preset).model)
    architecture, values, differences = nearest(model, SpecialTokens(0, 1))
    assert architecture.model_type == preset[:6]
    assert not differences
    from lit_llm.huggingface import modeling_lit_llm as code
    from lit_llm.models.cost import count_parameters

    config_class = code.DecLLMConfig if preset.startswith("dec") else code.RedLLMConfig
    with torch.device("meta"):
        theirs = getattr(code, architecture.model)(config_class(**values))
    theirs.tie_weights()
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count_parameters(model).total


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("decllm", {"norm": {"scale": True}}, "norm.scale"),
        ("decllm", {"attention": {**ODD["attention"], "window": 4}}, "window"),
        ("decllm", {"attention": {**ODD["attention"], "output_norm": "concat"}}, "output_norm"),
        ("decllm", {"feed_forward": {"d_ff": 40, "activation": "geglu"}}, "activation"),
        ("decllm", {"attention": {**ODD["attention"], "gate": "per_head"}}, "gate"),
        ("decllm", {"attention": {**ODD["attention"], "qkv_norm": ["q", "v"]}}, "qkv_norm"),
        ("redllm", {"tie_embeddings": "inputs"}, "tie_embeddings"),
        ("redllm", {"encoder": {"layers": 2, "attention": {"rope_theta": 5.0}}}, "rope_theta"),
        ("redllm", {"decoder": {"layers": 3, "cross_attention": {"rope": "restart"}}}, "rope"),
        (
            "redllm",
            {"decoder": {"layers": 3, "layer_ranges": {"1": UNREAD}}},
            "cross_attention",
        ),
    ],
)
def test_what_the_code_does_not_compute_is_named(name, change, key):
    _, _, differences = nearest(resolve_model(checked({**SECTIONS[name], **change})), SpecialTokens(0, 1))
    assert any(key in place for place in differences), differences


@both
def test_ids_without_text_are_never_chosen(name, tmp_path):
    """`lit-llm generate` chooses among the tokenizer's ids only; the export tells transformers which are none."""
    from lit_llm.data.tokenizers import SPECIAL, train_bpe
    from lit_llm.generation import Sampling

    train_bpe(["the end of one line, and of another"] * 9, 280, tmp_path / "tokenizer.json")
    config, ours = built({**SECTIONS[name], "vocabulary": 420})
    export_checkpoint(config, ours.state_dict(), tmp_path / "out", tmp_path / "tokenizer.json", *SPECIAL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    theirs, prompt = loaded(name, tmp_path / "out"), "another line"
    whole = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert (whole[0, 0].item() == tokenizer.bos_token_id) == (name == "decllm")
    out = theirs.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=24, do_sample=False)
    begins = whole.shape[1] if name == "decllm" else 1
    from lit_llm.data.library_tokenizer import FromFile

    mine = FromFile(tmp_path / "tokenizer.json", *SPECIAL)
    sampling = Sampling(vocabulary=mine.vocabulary)
    answer = generate(ours, [mine.encode([prompt])[0].tolist()], max_new_tokens=24, stop=(0,), sampling=sampling)[0]
    free = generate(ours, [mine.encode([prompt])[0].tolist()], max_new_tokens=24, stop=())[0]
    assert max(free.tokens) >= mine.vocabulary > max(answer.tokens)
    assert tokenizer.decode(out[0, begins:], skip_special_tokens=True) == mine.decode(answer.tokens)

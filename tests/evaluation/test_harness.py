"""lm-evaluation-harness on our models: judged by the harness's own model for transformers, and by plain logits."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lit-llm[eval]'")

from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import tree
from lit_llm.data.library_tokenizer import FromFile
from lit_llm.data.tokenizers import SPECIAL, Bytes
from lit_llm.evaluation.harness import evaluate_tasks, harness_model, score_pairs
from lit_llm.evaluation.suites import REDLLM
from lit_llm.generation import Sampling
from lit_llm.models.build import build_model
from lit_llm.models.config import DecoderDecoderModel, DecoderModel, DoubleDecoderModel, EncoderDecoderModel
from lit_llm.objectives.config import BOS, EOD, MasksConfig
from lit_llm.runs import trained_model
from tests.gloss_tasks import WORDS, write_tasks

torch.set_num_threads(1)
D, HEADS, LAYERS, THETA = 32, 4, 2, 10_000.0
OPEN = MasksConfig(prefix="bidirectional")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files, with the tokenizer that reads them."""
    place = tmp_path_factory.mktemp("harness")
    write_tasks(place)
    return place


@pytest.fixture(scope="module")
def tokenizer(folder):
    return FromFile(folder / "tokenizer.json", *SPECIAL)


def build(section, vocabulary, **more):
    attention = {"heads": HEADS, "rope_theta": THETA}
    node = {"d_model": D, "vocabulary": vocabulary, "attention": attention, "feed_forward": {"d_ff": 48}, **more}
    return build_model(validate(section, tree(node)), seed=3).eval()


@pytest.fixture(scope="module")
def decllm(tokenizer):
    return build(DecoderModel, tokenizer.vocabulary, decoder={"layers": LAYERS}, norm={"eps": 1e-6})


@pytest.fixture(scope="module")
def redllm(tokenizer):
    return build(EncoderDecoderModel, tokenizer.vocabulary, encoder={"layers": 2}, decoder={"layers": LAYERS})


@pytest.fixture(scope="module")
def yoco(tokenizer):
    first = {"layers": 2, "self_attention": {"window": 6}}
    return build(DecoderDecoderModel, tokenizer.vocabulary, self_decoder=first, cross_decoder={"layers": 2})


@pytest.fixture(scope="module")
def double(tokenizer):
    stacks = {"encoder": {"layers": 2}, "decoder": {"layers": LAYERS}, "block": 5}
    return build(DoubleDecoderModel, tokenizer.vocabulary, **stacks)


def as_llama(model):
    """transformers' Llama with our weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            rms_norm_eps=config.norm.eps,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOD,
            pad_token_id=EOD,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
        )
    )
    renamed = {
        "embedding.": "model.embed_tokens.",
        "decoder.norm.scale": "model.norm.weight",
        "decoder.layers": "model.layers",
        "self_attention_norm.scale": "input_layernorm.weight",
        "feed_forward_norm.scale": "post_attention_layernorm.weight",
        "self_attention.out": "self_attn.o_proj",
        **{f"self_attention.{x}.": f"self_attn.{x}_proj." for x in "qkv"},
        **{f"feed_forward.{x}.": f"mlp.{x}_proj." for x in ("gate", "up", "down")},
    }
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    found = peer.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= {"lm_head.weight"}
    return peer.eval()


def peer_of(model, folder, begin, max_length=512):
    """The harness's own model; begin: whether texts are read with <s> before them."""
    pytest.importorskip("accelerate", reason="the harness's own model needs pip install 'lm-eval[hf]'")
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=library, bos_token="<s>", eos_token="<eod>", pad_token="<eod>", add_bos_token=begin
    )
    return HFLM(as_llama(model), tokenizer=tokens, max_length=max_length, batch_size=8, add_bos_token=begin)


def peers_results(peer, folder, tasks, shots):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    return simple_evaluate(peer, tasks=tasks, num_fewshot=shots, task_manager=manager, bootstrap_iters=0)


def run(model, tokenizer, folder, tasks, **options):
    return evaluate_tasks(model, tokenizer, tasks, **{"max_length": 512, "include_path": folder / "tasks"} | options)


def answers(rows, task):
    return [answer for row in rows if row["task"] == task for answer in row["answers"]]


@pytest.mark.parametrize("shots", [0, 3])
def test_questions_are_scored_as_the_harness_scores_a_llama_of_the_same_weights(decllm, tokenizer, folder, shots):
    """Continuations of one token and of several, with and without worked examples."""
    tasks = ["glosses_choose", "glosses_letter"]
    theirs = peers_results(peer_of(decllm, folder, begin=True), folder, tasks, shots)
    found = run(decllm, tokenizer, folder, tasks, shots=shots)
    for task in tasks:
        for metric in ("acc", "acc_norm"):
            assert found.metrics[f"tasks/{task}/{metric}"] == theirs["results"][task][f"{metric},none"]
        ours = answers(found.rows, task)
        expected = [answer for sample in theirs["samples"][task] for answer in sample["filtered_resps"]]
        assert len(ours) == 120
        np.testing.assert_allclose([nats for nats, _ in ours], [nats for nats, _ in expected], atol=1e-4)
        assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    prompts = {sample["prompt_hash"] for samples in theirs["samples"].values() for sample in samples}
    assert {row["prompt_hash"] for row in found.rows} == prompts
    assert found.metrics["tasks/glosses_letter/truncated"] == 0


def asking(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_without_a_context_a_text_follows_the_beginning(family, tokenizer, folder, request):
    """<s> alone, once; an encoder-decoder's source is then the end of a document."""
    model, asked = request.getfixturevalue(family), asking("loglikelihood", "", "the common bird")
    (found,) = harness_model(model, tokenizer, max_length=64).loglikelihood([asked])
    (ids,) = tokenizer.encode(["the common bird"])
    assert found == (pytest.approx(plain(model, [], ids.tolist())[0], abs=1e-4), False)
    if family == "decllm":
        (theirs,) = peer_of(model, folder, begin=True).loglikelihood([asked])
        assert found == (pytest.approx(theirs[0], abs=1e-4), theirs[1])


def test_the_perplexity_of_texts_is_that_of_the_harness(decllm, tokenizer, folder):
    theirs = peers_results(peer_of(decllm, folder, begin=False), folder, ["some_text"], None)["results"]["some_text"]
    found = run(decllm, tokenizer, folder, ["some_text"])
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert found.metrics[f"tasks/some_text/{metric}"] == pytest.approx(theirs[f"{metric},none"], rel=1e-5)


@torch.no_grad()
def plain_logits(model, context, read, masks):
    """Of what follows the context, then of what follows each token that is read after it."""
    if model.config.family == "encoder_decoder":
        return model(torch.tensor([context or [EOD]]), torch.tensor([[BOS, *read]]))[0]
    prefix = len(context) + 1 if masks.prefix == "bidirectional" else None
    return model(torch.tensor([[BOS, *context, *read]]), prefix_length=prefix)[0, len(context) :]


def plain(model, context, continuation, masks=MasksConfig()):
    """(log-probability, greedy) by the model's logits, one pair alone."""
    logits, targets = plain_logits(model, context, continuation[:-1], masks), torch.tensor(continuation)
    scores = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(scores), bool((logits.argmax(-1) == targets).all())


READERS = [("decllm", MasksConfig()), ("decllm", OPEN), ("redllm", MasksConfig())]
READERS += [("yoco", MasksConfig()), ("yoco", OPEN), ("double", MasksConfig())]


@pytest.fixture(scope="module")
def pairs(tokenizer):
    draw = random.Random(1)
    contexts = [[draw.randrange(2, tokenizer.vocabulary) for _ in range(draw.randrange(0, 30))] for _ in range(12)]
    return [
        (context, [draw.randrange(2, tokenizer.vocabulary) for _ in range(draw.choice([1, 1, 2, 7]))])
        for context in contexts
        for _ in range(4)
    ]


@pytest.mark.parametrize(("family", "masks"), READERS)
def test_every_family_gives_a_continuation_the_probability_of_its_logits(family, masks, pairs, request):
    """Empty contexts among them, and continuations that are the most probable ones."""
    model = request.getfixturevalue(family)
    best = [(context, [int(plain_logits(model, context, [], masks).argmax())]) for context, _ in pairs[::4]]
    asked = [*pairs, *best]
    assert any(not context for context, _ in asked)
    found = score_pairs(model, asked, masks, batch_tokens=200)
    expected = [plain(model, context, continuation, masks) for context, continuation in asked]
    np.testing.assert_allclose([nats for nats, _ in found], [nats for nats, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert all(greedy for _, greedy in found[len(pairs) :])


@pytest.mark.parametrize(("family", "masks"), READERS)
def test_scores_do_not_depend_on_the_batch_size(family, masks, pairs, request):
    model = request.getfixturevalue(family)
    alone, some, together = (score_pairs(model, pairs, masks, batch_tokens=size) for size in (1, 90, 10**6))
    for other in (some, together):
        np.testing.assert_allclose([nats for nats, _ in other], [nats for nats, _ in alone], rtol=1e-5)
        assert [greedy for _, greedy in other] == [greedy for _, greedy in alone]


def test_answers_of_one_letter_cost_one_reading(decllm, pairs):
    read = []
    hook = decllm.embedding.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].shape[0]))
    context = [5, 6, 7]
    score_pairs(decllm, [(context, [letter]) for letter in (10, 11, 12, 13)], MasksConfig(), 10**6)
    hook.remove()
    assert read == [1]


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_a_long_text_is_cut_into_windows_that_count_each_token_once(family, tokenizer, folder, request):
    """A window but the first is told the token before it, and no more."""
    model = request.getfixturevalue(family)
    text = json.loads((folder / "tasks" / "text.jsonl").read_text().splitlines()[1])["text"]
    ids = tokenizer.encode([text])[0].tolist()
    assert len(ids) > 60
    harness = harness_model(model, tokenizer, max_length=25)
    (found,) = harness.loglikelihood_rolling([asking("loglikelihood_rolling", text)])
    expected, start = plain(model, [], ids[:25])[0], 25
    while start < len(ids):
        expected += plain(model, [ids[start - 1]], ids[start : start + 24])[0]
        start += 24
    assert found == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_a_context_that_is_too_long_loses_its_beginning_and_is_counted(family, tokenizer, folder, request):
    model = request.getfixturevalue(family)
    found = run(model, tokenizer, folder, ["glosses_choose"], max_length=16)
    cut = 0
    for line, row in zip((folder / "tasks" / "choose.jsonl").open(), found.rows, strict=True):
        question, lost = json.loads(line), False
        context = tokenizer.encode([question["inputs"]])[0].tolist()
        for choice, (nats, _) in zip(question["choices"], row["answers"], strict=True):
            continuation = tokenizer.encode([f" {choice}"])[0].tolist()
            room = 16 - len(continuation)
            lost |= len(context) > room
            assert nats == pytest.approx(plain(model, context[-room:], continuation)[0], abs=1e-4)
        assert row["truncated"] == lost
        cut += lost
    assert 0 < cut < 30
    assert found.metrics["tasks/glosses_choose/truncated"] == cut
    assert found.metrics["tasks/glosses_choose/questions"] == 30


def written(model, context, most, masks=MasksConfig()):
    """Greedy, a token at a time, by the model's logits of everything so far."""
    ids = []
    while len(ids) < most and (token := int(plain_logits(model, context, ids, masks)[-1].argmax())) != EOD:
        ids.append(token)
    return ids


GREEDY = {"until": ["e", " the"], "do_sample": False, "max_gen_toks": 40}


@pytest.fixture(scope="module")
def asked(folder):
    questions = [json.loads(line)["inputs"] for line in (folder / "tasks" / "choose.jsonl").open()]
    return [asking("generate_until", question, GREEDY) for question in [*questions, "tea"]]


def test_answers_are_written_as_the_harness_has_a_llama_write_them(decllm, tokenizer, folder, asked):
    """Cut at the strings that end them, some after the length at which it is first looked."""
    theirs = peer_of(decllm, folder, begin=True).generate_until(asked)
    ours = harness_model(decllm, tokenizer, max_length=512).generate_until(asked)
    assert ours == theirs
    lengths = [len(ids) for ids in tokenizer.encode(ours)]
    assert min(lengths) < 16 < max(lengths)


@pytest.mark.parametrize(("family", "masks"), [("decllm", OPEN), ("redllm", MasksConfig()), ("yoco", OPEN)])
def test_every_family_writes_its_most_probable_tokens(family, masks, tokenizer, asked, request):
    model = request.getfixturevalue(family)
    found = harness_model(model, tokenizer, max_length=512, masks=masks).generate_until(asked[:8])
    for text, one in zip(found, asked[:8], strict=True):
        whole = tokenizer.decode(written(model, tokenizer.encode([one.args[0]])[0].tolist(), 40, masks))
        assert text == whole.split("e")[0].split(" the")[0]


def test_requests_that_ask_for_other_ends_and_lengths_keep_their_order(decllm, tokenizer, asked):
    context = asked[0].args[0]
    ends = [{"max_gen_toks": 3, "until": []}, GREEDY, {"max_gen_toks": 3, "until": []}, {"max_gen_toks": 20}]
    found = harness_model(decllm, tokenizer, max_length=512).generate_until(
        [asking("generate_until", context, end) for end in ends]
    )
    whole = written(decllm, tokenizer.encode([context])[0].tolist(), 20)
    assert found[0] == found[2] == tokenizer.decode(whole[:3])
    assert found[3] == tokenizer.decode(whole)


def test_a_prompt_leaves_half_of_the_length_to_what_is_written(decllm, tokenizer, asked):
    """A model of 20 tokens that is asked for 40: it writes 10, after the last 10 of the prompt."""
    text = asked[4].args[0]
    ids = tokenizer.encode([text])[0].tolist()
    assert len(ids) > 10
    harness = harness_model(decllm, tokenizer, max_length=20)
    (found,) = harness.generate_until([asking("generate_until", text, {"until": [], "max_gen_toks": 40})])
    assert found == tokenizer.decode(written(decllm, ids[-10:], 10))
    assert harness.truncated == {text}


def test_all_glosses_together_are_a_group(decllm, tokenizer, folder):
    """Each kind of question weighs the same in it."""
    found = run(decllm, tokenizer, folder, ["glosses"], limit=10).metrics
    assert found["tasks/glosses_choose/questions"] == 10
    each = [found[f"tasks/glosses_{task}/acc"] for task in ("choose", "letter")]
    assert found["tasks/glosses/acc"] == pytest.approx(np.mean(each))


def test_shots_are_set_by_name(decllm, tokenizer, folder):
    tasks = ["glosses_choose", "glosses_letter"]
    none, some, both = (run(decllm, tokenizer, folder, tasks, shots=s).rows for s in (0, {"glosses_letter": 2}, 2))
    scores = [np.array([nats for task in tasks for nats, _ in answers(rows, task)]) for rows in (none, some, both)]
    assert np.flatnonzero(abs(scores[1] - scores[0]) > 1e-3).min() == 120  # the second task's alone
    assert np.flatnonzero(abs(scores[1] - scores[2]) > 1e-3).max() == 119  # the first task's alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": ["gloses_choose", "redlm", "zzzzzzzzzz"]},
            "tasks: 'gloses_choose' is no task - did you mean 'glosses_choose'?\n"
            "tasks: 'redlm' is no task - did you mean 'redllm'?\n"
            "tasks: 'zzzzzzzzzz' is no task; `lm-eval ls tasks` lists them",
        ),
        ({"shots": {"glosses_chose": 2}}, "'glosses_chose' is not among the tasks - did you mean 'glosses_choose'?"),
        ({"shots": 31}, "shots: 'glosses_choose' has 30 examples to draw 31 shots from"),
        ({"max_length": 1}, "max_length: 1 has no room for a context and an answer; at least 2"),
        ({"include_path": "nowhere"}, "nowhere has no task files"),
    ],
)
def test_what_cannot_be_asked_is_told(decllm, tokenizer, folder, options, message):
    options = {"tasks": ["glosses_choose"], **options}
    if "include_path" in options:
        options["include_path"] = Path(options["include_path"])
    with pytest.raises(InputError) as raised:
        run(decllm, tokenizer, folder, options.pop("tasks"), **options)
    assert message in str(raised.value)


def test_every_task_whose_data_is_out_of_reach_is_named(decllm, tokenizer, folder, tmp_path, monkeypatch):
    import datasets

    def away(path, name=None, **_):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    for name in ("far", "farther"):
        task = {"task": name, "dataset_path": f"org/{name}", "test_split": "test", "output_type": "multiple_choice"}
        task |= {"doc_to_text": "a", "doc_to_target": "b", "doc_to_choice": "c"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
    monkeypatch.setattr(datasets, "load_dataset", away)
    with pytest.raises(InputError) as raised:
        run(decllm, tokenizer, folder, ["far", "farther"], include_path=tmp_path)
    assert [str(problem) for problem in raised.value.problems] == [
        f"tasks: '{name}': its data cannot be reached (ConnectionError: Couldn't reach 'org/{name}' on the Hub)"
        for name in ("far", "farther")
    ]


def test_the_papers_tasks_are_the_harnesss_and_have_so_many_examples():
    """Tasks that bring their own worked examples must bring as many as are asked for."""
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager()
    assert set(REDLLM) <= set(manager.all_tasks)
    for name, folder in (("mmlu_flan_cot_fewshot", "mmlu/flan_cot_fewshot"), ("bbh_cot_fewshot", "bbh/cot_fewshot")):
        files = sorted((Path(lm_eval.tasks.__file__).parent / folder).glob("[!_]*.yaml"))
        counts = [len(yaml.safe_load(file.read_text())["fewshot_config"]["samples"]) for file in files]
        assert len(counts) > 20
        assert min(counts) == REDLLM[name]


def test_bytes_serve_as_tokens_too(folder):
    model = build(DecoderModel, Bytes.vocabulary, decoder={"layers": 1})
    found = run(model, Bytes(), folder, ["glosses_letter"], limit=3)
    assert found.metrics["tasks/glosses_letter/questions"] == 3


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_a_model_with_more_ids_than_its_tokenizer_writes_text(kind, tokenizer, folder):
    """Sentinels, modes and rows that pad a table: half of the ids here, and the likeliest ones."""
    ids = Bytes() if kind == "bytes" else tokenizer
    model = build(DecoderModel, 2 * ids.vocabulary, decoder={"layers": LAYERS})
    with torch.no_grad():
        model.embedding.weight[ids.vocabulary :] *= 20
    harness = harness_model(model, ids, max_length=64)
    (answer,) = harness.generate_until([asking("generate_until", "Say", {"until": [], "max_gen_toks": 12})])
    assert [answer] == trained_model.complete_texts(model, ids, ["Say"], 12, Sampling())
    assert any(trained_model.complete_texts(model, ids, ["Say"] * 4, 12, Sampling(temperature=1.0)))
    beyond = list(range(ids.vocabulary - 3, 2 * ids.vocabulary))
    assert ids.decode(beyond) == ids.decode(beyond[:3])


@pytest.fixture(scope="module")
def merging(tokenizer):
    """A word in two parts that are one token together."""
    parts = ((word[:place], word[place:]) for word in WORDS for place in range(1, len(word)))
    return next((left, right) for left, right in parts if len(tokenizer.encode([left + right])[0]) == 1)


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_an_answer_without_a_token_of_its_own_is_scored_and_named(family, tokenizer, merging, request):
    """One that merges with its context is tokenised apart, one of no token is an end of document."""
    model, (left, right) = request.getfixturevalue(family), merging
    harness = harness_model(model, tokenizer, max_length=64)
    found = harness.loglikelihood([asking("loglikelihood", *pair) for pair in [merging, ("the", ""), ("", "")]])
    ids = [part.tolist() for part in tokenizer.encode([left, right, "the"])]
    expected = [plain(model, ids[0], ids[1])[0], plain(model, ids[2], [EOD])[0], plain(model, [], [EOD])[0]]
    assert [nats for nats, _ in found] == [pytest.approx(nats, abs=1e-4) for nats in expected]
    assert harness.apart == {merging}
    assert harness.without_tokens == {("the", ""), ("", "")}


def test_answers_without_tokens_end_no_task_and_are_counted(decllm, tokenizer, folder, merging, tmp_path):
    left, right = merging
    records = [
        {"inputs": left, "choices": [right, " tea"], "answer": 0},
        {"inputs": "Which", "choices": ["", "tea"], "answer": 1},
        {"inputs": "Which", "choices": [" oil", " tea"], "answer": 1},
    ]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {
        "task": "odd",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "odd.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "inputs",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(task))
    found = evaluate_tasks(decllm, tokenizer, ["odd"], max_length=64, include_path=tmp_path)
    assert [found.metrics[f"tasks/odd/{name}"] for name in ("questions", "tokenised_apart", "without_tokens")] == [
        3,
        1,
        1,
    ]
    assert [(row["tokenised_apart"], row["without_tokens"]) for row in found.rows] == [(1, 0), (0, 1), (0, 0)]


def choosing(folder, records, **more):
    """A task of four choices over these records."""
    (folder / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {
        "task": "bad",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "bad.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "inputs",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": name} for name in ("acc", "exact_match")],
    }
    (folder / "bad.yaml").write_text(yaml.safe_dump(task | more))
    return folder


GOOD = {"inputs": "Which", "choices": ["oil", "tea"], "answer": 1}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"choices": None}, "TypeError"),
        ({"answer": None}, "TypeError"),
        ({"choices": []}, "ValueError: it has no choices"),
        ({"inputs": None}, "AssertionError"),
    ],
)
def test_a_question_that_cannot_be_read_is_left_out_counted_and_named(decllm, tokenizer, tmp_path, bad, reason):
    place = choosing(tmp_path, [GOOD, GOOD | bad, GOOD | {"inputs": "What"}])
    found = evaluate_tasks(decllm, tokenizer, ["bad"], max_length=64, include_path=place)
    assert found.metrics["tasks/bad/questions"] == 2
    assert found.metrics["tasks/bad/unreadable"] == 1
    assert [row["question"] for row in found.rows if "acc" in row] == [0, 2]
    (row,) = (row for row in found.rows if "unreadable" in row)
    assert (row["task"], row["question"]) == ("bad", 1)
    assert row["unreadable"].startswith(reason)
    rest = choosing(tmp_path, [GOOD, GOOD | {"inputs": "What"}])
    alone = evaluate_tasks(decllm, tokenizer, ["bad"], max_length=64, include_path=rest).metrics
    assert alone == {name: value for name, value in found.metrics.items() if name != "tasks/bad/unreadable"}


def test_a_task_of_which_no_question_can_be_read_fails_by_name(decllm, tokenizer, tmp_path):
    place = choosing(tmp_path, [GOOD | {"answer": None}] * 2)
    with pytest.raises(InputError, match=r"none of the documents of 'bad' can be read, the first \(0\) because"):
        evaluate_tasks(decllm, tokenizer, ["bad"], max_length=64, include_path=place)


ROLLING = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text", "doc_to_choice": None}
ROLLING["metric_list"] = [{"metric": "byte_perplexity"}]


class Refusing(Bytes):
    """A tokenizer whose expressions take too long for one word."""

    def encode(self, texts):
        if any("zzz" in text for text in texts):
            raise InputError("gives up on a text")
        return super().encode(texts)


def test_texts_that_cannot_be_read_are_left_out_and_a_task_of_them_alone_fails_by_name(tmp_path):
    model = build(DecoderModel, Bytes.vocabulary, decoder={"layers": 1})
    texts = ["a tree", None, "", "a zzz", "tea"]
    place = choosing(tmp_path, [{"text": text} for text in texts], **ROLLING)
    found = evaluate_tasks(model, Refusing(), ["bad"], max_length=64, include_path=place)
    assert found.metrics["tasks/bad/questions"] == 2
    assert found.metrics["tasks/bad/unreadable"] == 3
    reasons = {row["question"]: row["unreadable"] for row in found.rows if "unreadable" in row}
    assert reasons == {
        1: "TypeError: its text is null",
        2: "ValueError: its text is empty",
        3: "InputError: gives up on a text",
    }
    for rest in (["", ""], ["a zzz"]):
        place = choosing(tmp_path, [{"text": text} for text in rest], **ROLLING)
        with pytest.raises(InputError, match="none of the documents of 'bad' can be read"):
            evaluate_tasks(model, Refusing(), ["bad"], max_length=64, include_path=place)


def test_an_answer_longer_than_the_length_is_scored_in_windows(decllm, tokenizer):
    answer = " ".join(WORDS)
    ids = tokenizer.encode([answer])[0].tolist()
    harness = harness_model(decllm, tokenizer, max_length=8)
    ((nats, _),) = harness.loglikelihood([asking("loglikelihood", "Say:", answer)])
    windows = [plain(decllm, [], ids[:8])[0]]
    windows += [plain(decllm, [ids[start - 1]], ids[start : start + 7])[0] for start in range(8, len(ids), 7)]
    assert nats == pytest.approx(sum(windows), abs=1e-3)
    assert harness.truncated == {"Say:"}


def test_no_perplexity_is_told_over_what_a_tokenizer_has_left_of_a_text(decllm, folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Tokenizer(models.BPE({letter: number for number, letter in enumerate("abcdefghijklmnop")}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.save(str(folder / "few.json"))
    found = run(decllm, FromFile(folder / "few.json", None, None), folder, ["some_text"])
    texts = [json.loads(line)["text"] for line in (folder / "tasks" / "text.jsonl").open()]
    lost = sum(letter not in "abcdefghijklmnop" for text in texts for letter in text)
    assert found.metrics == {
        "tasks/some_text/questions": 3,
        "tasks/some_text/truncated": 0,
        "tasks/some_text/lost_bytes": lost,
    }

"""An exported DecLLM or RedLLM in lm-evaluation-harness, by its own `hf` model and the folder alone, scores as here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lit-llm[eval]'")
pytest.importorskip("accelerate", reason="the harness's own model needs pip install 'lm-eval[hf]'")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from lit_llm.data.library_tokenizer import FromFile
from lit_llm.data.tokenizers import SPECIAL
from lit_llm.evaluation.harness import evaluate_tasks, harness_model
from lit_llm.experiment.load import load_experiment
from lit_llm.huggingface import export_checkpoint
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from tests.gloss_tasks import write_tasks
from tests.remote_code import modules_in

TASKS = ["glosses_choose", "glosses_letter"]
OPTIONS: dict[str, dict[str, Any]] = {"decllm": {}, "redllm": {"backend": "seq2seq", "prefix_token_id": 0}}
"""What `docs/hugging-face.md` gives to `--model_args` beside `pretrained` and `trust_remote_code`."""
LENGTH = 512
VOCABULARY = ["model.vocabulary=400", "pretrain.data.tokenizer={kind: bpe, vocabulary: 400}"]
both = pytest.mark.parametrize("name", OPTIONS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    write_tasks(place)
    return place


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> FromFile:
    return FromFile(folder / "tokenizer.json", *SPECIAL)


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with modules_in(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def exported(folder: Path) -> dict[str, tuple[LanguageModel, Path]]:
    """{family: (our model, its exported folder)}, of the tiny presets with 32 entries of a token."""
    made = {}
    for name in OPTIONS:
        size = ["model.d_model=32", "model.attention.heads=2", "model.feed_forward.d_ff=48", *VOCABULARY]
        config = load_experiment(f"{name}-tiny", size).model
        ours = build_model(config, seed=3).eval()
        for parameter in ours.parameters():
            parameter.data.mul_(3.0)  # scores that tell answers apart
        out = folder / name
        said = export_checkpoint(config, ours.state_dict(), out, folder / "tokenizer.json", *SPECIAL)
        assert "trust_remote_code=True" in said
        made[name] = ours, out
    return made


def peer(name: str, out: Path, **options: Any) -> Any:
    """The harness's model of a folder, as `lm_eval --model hf` makes it."""
    from lm_eval.models.huggingface import HFLM

    options = {"device": "cpu", "batch_size": 8, "max_length": LENGTH} | OPTIONS[name] | options
    return HFLM(str(out), trust_remote_code=True, **options)


@both
def test_questions_have_the_same_scores(
    name: str, exported: dict[str, tuple[LanguageModel, Path]], tokenizer: FromFile, folder: Path
) -> None:
    """With a worked example before each: accuracies to the digit, log-probabilities beyond rounding."""
    ours, out = exported[name]
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    theirs = simple_evaluate(peer(name, out), tasks=TASKS, num_fewshot=1, task_manager=manager, bootstrap_iters=0)
    found = evaluate_tasks(ours, tokenizer, TASKS, max_length=LENGTH, shots=1, include_path=folder / "tasks", seed=1234)
    for task in TASKS:
        for metric in ("acc", "acc_norm"):
            assert found.metrics[f"tasks/{task}/{metric}"] == theirs["results"][task][f"{metric},none"]
        expected = [answer for sample in theirs["samples"][task] for answer in sample["filtered_resps"]]
        rows = [answer for row in found.rows if row["task"] == task for answer in row["answers"]]
        assert len(rows) == len(expected) == 120
        np.testing.assert_allclose([nats for nats, _ in rows], [nats for nats, _ in expected], atol=1e-3)
        assert [greedy for _, greedy in rows] == [greedy for _, greedy in expected]
    assert len({round(found.metrics[f"tasks/{task}/acc"], 3) for task in TASKS}) > 1


@both
def test_texts_and_answers_without_a_context_have_the_same_probability(
    name: str, exported: dict[str, tuple[LanguageModel, Path]], tokenizer: FromFile
) -> None:
    """Of a decoder's texts without the harness's second <s>: it puts one before those of every tokenizer that adds
    one."""
    ours, out = exported[name]
    model = harness_model(ours, tokenizer, max_length=LENGTH)
    text = "the common european bird of a small tree"
    whole, alone = Instance("loglikelihood_rolling", {}, (text,), 0), Instance("loglikelihood", {}, ("", text), 0)
    theirs = peer(name, out, **({"add_bos_token": False} if name == "decllm" else {}))
    assert theirs.loglikelihood_rolling([whole]) == pytest.approx(model.loglikelihood_rolling([whole]), abs=1e-3)
    ((nats, _),) = theirs.loglikelihood([alone])
    assert nats == pytest.approx(model.loglikelihood([alone])[0][0], abs=1e-3)


@both
def test_answers_are_the_same_text(
    name: str, exported: dict[str, tuple[LanguageModel, Path]], tokenizer: FromFile
) -> None:
    ours, out = exported[name]
    prompts = ["What is the common bird?", "Say tea:", "press"]
    asked = [Instance("generate_until", {}, (text, {"until": ["e"], "max_gen_toks": 24}), 0) for text in prompts]
    texts = harness_model(ours, tokenizer, max_length=LENGTH).generate_until(asked)
    assert peer(name, out).generate_until(asked) == texts
    assert len({*texts}) > 1

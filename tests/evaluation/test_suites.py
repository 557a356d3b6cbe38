"""What can be said of the harness's tasks without the harness."""

import importlib.util

import pytest
from glosses import write_gloss_tasks

from lit_llm.config.problems import InputError
from lit_llm.evaluation.harness import evaluate_tasks


def test_questions_of_another_form_are_told(tmp_path):
    with pytest.raises(InputError, match="python examples/glosses.py"):
        write_gloss_tasks(tmp_path / "choices.jsonl", tmp_path)
    (tmp_path / "choices.jsonl").write_text('{"inputs": "a", "choices": ["b"], "answer": 1, "task": "c"}\n')
    with pytest.raises(InputError, match=r"choices.jsonl:1: is no question"):
        write_gloss_tasks(tmp_path / "choices.jsonl", tmp_path)


def test_without_the_library_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'lit-llm\[eval\]'"):
        evaluate_tasks(None, None, ["boolq"], max_length=64)

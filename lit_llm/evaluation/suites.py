"""Tasks for EleutherAI's lm-evaluation-harness: the paper's by name, and local ones made of WordNet's glosses."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import yaml

from lit_llm.config.problems import InputError, Problem, SourceLocation
from lit_llm.store.store import write_text

REDLLM: Mapping[str, int] = MappingProxyType(
    {
        "boolq": 5,
        "hellaswag": 5,
        "rte": 5,
        "arc_easy": 5,
        "arc_challenge": 5,
        "anli_r1": 5,
        "anli_r2": 5,
        "anli_r3": 5,
        "commonsense_qa": 7,
        "triviaqa": 5,
        "mmlu_flan_cot_fewshot": 4,
        "gsm8k_cot": 8,
        "bbh_cot_fewshot": 3,
        "wmt16-en-de": 5,
        "wmt16-de-en": 5,
    }
)
"""Shots of what the harness (0.4.13) has of the 13 tasks of arXiv 2510.26622, section 5: eleven of them, not all whole.

StrategyQA (6 shots) is missing: the harness has BIG-bench's version alone, whose prompts are others. UnifiedQA is
missing. WMT lacks English and Chinese. MMLU has worked examples for 5 shots in all subjects but three, so 4 are given.
The paper decodes greedily and compares what was written; the harness ranks the answers of BoolQ, HellaSwag, RTE, ARC,
ANLI and CommonsenseQA by their probability. Look at `acc`, for WMT at `chrf`, elsewhere at `exact_match`.
"""

SUITES: Mapping[str, Mapping[str, int]] = MappingProxyType({"redllm": REDLLM})
"""Tasks and their shots, by the name that stands for all of them."""


def write_gloss_tasks(choices: Path, out: Path) -> tuple[str, ...]:
    """Make tasks of the harness of what `write_glosses` held out; returns their names, the group of all of them last.

    choices: its choices.jsonl. In `out`, which is then the `include_path` of `evaluate_tasks`, each task gets its
    questions and a YAML file that names their place: write them anew after a move. Shots are drawn from the other
    questions of the same task. Raises InputError for a file that is not there or has another form.
    """
    questions: dict[str, list[str]] = defaultdict(list)
    try:
        lines = choices.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError as error:
        raise InputError(
            Problem(f"cannot be read: {error.strerror}; `lit-llm data glosses` makes it", str(choices))
        ) from None
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            assert 0 <= record["answer"] < len(record["choices"])
            questions[record["task"]].append(f"{line}\n")
        except (ValueError, TypeError, KeyError, AssertionError):
            message = "is no question: inputs, choices, the number of the answer, task"
            raise InputError(Problem(message, location=SourceLocation(str(choices), number))) from None
    names = []
    for task, own in sorted(questions.items()):
        file = write_text(out / f"{task}.jsonl", "".join(own))
        names.append(f"glosses_{task}")
        write_text(out / f"{task}.yaml", yaml.safe_dump(_task(names[-1], file.resolve()), sort_keys=False))
    group = {
        "group": "glosses",
        "task": list(names),
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}],
    }
    write_text(out / "glosses.yaml", yaml.safe_dump(group, sort_keys=False))
    return (*names, "glosses")


def _task(name: str, file: Path) -> dict[str, object]:
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "fewshot_split": "test",  # the question itself is never among its shots
        "output_type": "multiple_choice",
        # Names of fields, not templates: what a gloss holds is read as text.
        "doc_to_text": "inputs",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": metrics,
    }

"""Tasks for lm-evaluation-harness, small: glosses of several tokens, letters of one, and texts; with a tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml
from glosses import write_gloss_tasks

from lit_llm.data.tokenizers import train_bpe

WORDS = (
    "the common european bird of a small tree whose leaves are used in making tea while some other plants with yellow "
    "flowers grow near water and give seeds that people eat as food or press for oil in winter and late autumn"
).split()


def gloss(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def write_tasks(place: Path) -> None:
    """`tasks/` with glosses_choose, glosses_letter and some_text, 30 questions each, and tokenizer.json."""
    draw = random.Random(0)
    records = []
    for number in range(30):
        asked = gloss(draw, 4 + number % 5)
        choices = [gloss(draw, 1 + (number + place_) % 3) for place_ in range(4)]
        records.append({"inputs": f"What is {asked}?", "choices": choices, "answer": number % 4, "task": "choose"})
        letters = ["a", "b", "c", "d"]
        records.append({"inputs": f"Say {asked}:", "choices": letters, "answer": number % 4, "task": "letter"})
    (place / "choices.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_gloss_tasks(place / "choices.jsonl", place / "tasks")
    texts = [gloss(draw, 40), gloss(draw, 90), "one"]
    (place / "tasks" / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    task = {
        "task": "some_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "tasks" / "text.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }
    (place / "tasks" / "text.yaml").write_text(yaml.safe_dump(task))
    train_bpe([json.dumps(record) for record in records], 400, place / "tokenizer.json")

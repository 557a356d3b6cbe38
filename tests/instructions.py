"""The files that the presets of finetuning read, with next to nothing in them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

RECORDS = [
    {"text": f"word {n} (noun): a meaning", "inputs": f"what is {n}?", "targets": f"{n}", "task": "define"}
    for n in range(100)
]
QUESTION = {"inputs": "what?", "choices": ["this", "that"], "answer": 1, "task": "define"}


def write_instructions(folder: Path) -> None:
    """`glosses/`, as `examples/glosses.py` writes it, and `flan/`."""
    from glosses import write_gloss_tasks

    glosses, flan = folder / "glosses", folder / "flan"
    glosses.mkdir()
    flan.mkdir()
    for name in ("text", "train", "held_out"):
        (glosses / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (glosses / "choices.jsonl").write_text(json.dumps(QUESTION) + "\n")
    write_gloss_tasks(glosses / "choices.jsonl", glosses / "tasks")
    parquet.write_table(pa.Table.from_pylist(RECORDS), flan / "part.parquet")

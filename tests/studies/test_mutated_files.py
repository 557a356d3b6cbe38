"""A thousand damaged files: each is planned, or refused with a place; none is a traceback, none is waited for."""

from __future__ import annotations

import random
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.evaluation.task_files import read_task_files
from lit_llm.experiment.load import PRESETS
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.sweeps.sweep import load_sweep

ROOT = Path(__file__).parents[2]
FILES, SECONDS = 1_000, 5

TASK = """\
task: define
dataset_path: json
dataset_kwargs: {data_files: {test: test.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "Define {{word}}:"
doc_to_target: " {{gloss}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
metadata: {version: 1.0}
"""

VALUES = (
    "null ~ true no on 0 -1 1 1.5 -0.0 1e-3 1e308 -1e308 1e999 .nan .inf -.inf 007 0x10 9223372036854775807 "
    "99999999999999999999 1_000 [] {} [[]] [null] [1,2] {a:1} {kind:x} '' ' ' a.b ../.. / ~/x /dev/null *a &a !x <<: "
    "none head [q,k,v] adamw muon cosine wsd decllm-tiny redllm-tiny modernbert-tiny yoco-tiny é 归一化 \U0001f600 "
    "\ufeff \u202e \ud7ff \x07 tokens {} 0-3 0-99/0 | > ? - : # ' \" % @ `"
).split(" ")


def mutated(text: str, rng: random.Random) -> str:
    """The text with one to three things wrong, as slips and merges leave them."""
    for _ in range(rng.randint(1, 3)):
        text = rng.choice(MUTATIONS)(text, rng)
    return text


def _lines(change: Callable[[list[str], int, random.Random], None]) -> Callable[[str, random.Random], str]:
    def apply(text: str, rng: random.Random) -> str:
        lines = text.split("\n")
        change(lines, rng.randrange(len(lines)), rng)
        return "\n".join(lines)

    return apply


def _delete(lines: list[str], at: int, rng: random.Random) -> None:
    del lines[at : at + rng.randint(1, 3)]
    lines or lines.append("")


def _repeat(lines: list[str], at: int, rng: random.Random) -> None:
    lines.insert(rng.randrange(len(lines) + 1), lines[at])


def _swap(lines: list[str], at: int, rng: random.Random) -> None:
    other = rng.randrange(len(lines))
    lines[at], lines[other] = lines[other], lines[at]


def _indent(lines: list[str], at: int, rng: random.Random) -> None:
    lines[at] = rng.choice([" ", "  ", "\t", ""]) + lines[at][rng.randint(0, 2) :]


def _value(text: str, rng: random.Random) -> str:
    """Another value after a colon, or in a list."""
    places = [match.span(1) for match in re.finditer(r"[:,\[{] *([^\s,:\[\]{}#]+)", text)]
    if not places:
        return text
    begin, end = rng.choice(places)
    return text[:begin] + rng.choice(VALUES) + text[end:]


def _whole_value(text: str, rng: random.Random) -> str:
    """Another value for all that follows a key in its line."""
    places = [match.span(1) for match in re.finditer(r"(?m): +(.+)$", text)]
    if not places:
        return text
    begin, end = rng.choice(places)
    return text[:begin] + rng.choice(VALUES) + text[end:]


def _number(text: str, rng: random.Random) -> str:
    places = [match.span() for match in re.finditer(r"(?<![\w.])\d[\d.e+-]*", text)]
    if not places:
        return text
    begin, end = rng.choice(places)
    factor = rng.choice(["0", "-" + text[begin:end], text[begin:end] + "0" * rng.randint(1, 20), "1e-300", "2", "3"])
    return text[:begin] + factor + text[end:]


def _letter(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(["x", ":", ",", "{", "}", "[", "]", "\n", " ", ".", "é", "\x00", "-"]) + text[at:]


def _key(text: str, rng: random.Random) -> str:
    """Another key of the file in the place of one."""
    keys = [match.span(1) for match in re.finditer(r"([\w./]+):", text)]
    if not keys:
        return text
    (begin, end), other = rng.choice(keys), rng.choice(keys)
    return text[:begin] + text[slice(*other)] + text[end:]


def _truncate(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


MUTATIONS: list[Callable[[str, random.Random], str]] = [
    *map(_lines, (_delete, _repeat, _swap, _indent)),
    _value, _value, _whole_value, _number, _number, _letter, _key, _truncate,
]  # fmt: skip


def _planned(path: Path) -> None:
    plan(load_study(path), built=False)


def _tasks(path: Path) -> None:
    read_task_files(path.parent)


def sources() -> list[tuple[str, Path | None, Callable[[Path], object]]]:
    studies = [path for path in sorted((ROOT / "ablations").glob("*.yaml")) if "-paper" not in path.name]
    presets = sorted(PRESETS.glob("*-tiny.yaml")) + sorted((ROOT / "ablations" / "sizes").glob("*.yaml"))
    sweeps = sorted((ROOT / "sweeps").glob("*.yaml"))
    return [
        *((path.read_text(), path, _planned) for path in [*studies, *studies, *presets]),
        *((path.read_text(), path, load_sweep) for path in [*sweeps, *sweeps]),
        (TASK, None, _tasks),
    ]


@pytest.mark.slow
def test_a_damaged_file_is_planned_or_refused_with_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in ("lit_llm.studies.load", "lit_llm.sweeps.sweep"):  # the corpus stays as it is in the meantime
        monkeypatch.setattr(f"{module}.reset_identities", lambda: None)
    monkeypatch.chdir(ROOT)
    choices, wrong = sources(), []
    for number in range(FILES):
        rng = random.Random(number)
        text, origin, call = rng.choice(choices)
        damaged = mutated(text, rng)
        # Beside the file that it was, for what it extends.
        path = (tmp_path if origin is None else _beside(tmp_path, origin)) / "damaged.yaml"
        path.write_bytes(damaged.encode("utf-8", "surrogatepass"))
        began = time.process_time()
        try:
            call(path)
        except InputError as error:
            if not any(problem.location or problem.key for problem in error.problems):
                wrong.append(f"{number}: no place: {error}\n{damaged}")
        except Exception:
            wrong.append(f"{number}: {traceback.format_exc()}\n{damaged}")
        if (seconds := time.process_time() - began) > SECONDS:
            wrong.append(f"{number}: {seconds:.1f} s\n{damaged}")
    assert not wrong, f"{len(wrong)} of {FILES}:\n" + "\n---\n".join(wrong[:5])


def _beside(folder: Path, origin: Path) -> Path:
    """A folder with links to what stands beside the file."""
    place = folder / origin.parent.name
    if not place.exists():
        place.mkdir()
        for path in origin.parent.iterdir():
            (place / path.name).symlink_to(path)
    return place

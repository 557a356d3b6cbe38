"""`lit-llm diff A B --items`: the records of two arms' finished runs, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.evaluation.unit_losses import UnitLosses, write_losses
from lit_llm.store.store import Store
from lit_llm.studies.items import items_of
from lit_llm.studies.load import load_study
from lit_llm.studies.runs import Run, runs_of
from tests.commands import lit_llm
from tests.studies.chosen_results import NLL, finish

VALUES = {"a": [3.0, 3.1, 3.05], "b": [2.9, 2.98, 2.96], "c": [3.0, 3.0, 3.0]}
"""Of c no losses of documents are kept."""


ARMS = "arms: {a: {}, b: {model: {attention: {output_norm: none}}}, c: {model: {attention: {qkv_norm: []}}}}"


def keep_losses(path: Path, store: Store, tokens: Sequence[int] = (30, *[10] * 9)) -> None:
    """Results of a study's arms with losses of ten documents, of a and b alone. tokens: of each document."""
    ablation = load_study(path)
    for arm in ablation.arms[:2]:
        for seed, value in enumerate(VALUES[arm.name]):
            stage = Run.of(arm, seed, store).last
            if stage.folder.exists():  # shared with another study
                continue
            stage.folder.mkdir(parents=True)
            # The first document makes the difference; the others have the mean.
            shifts = [0.9, *[-0.3] * 9] if arm.name == "b" else [0.0] * 10
            nats = [size * (value + shift) for size, shift in zip(tokens, shifts, strict=True)]
            write_losses(stage.losses_file, [UnitLosses("", [*range(10)], nats, tokens, tokens, split="test")])
    finish(ablation, store, VALUES)


@pytest.fixture
def study(write_study: Callable[..., Path], tmp_path: Path) -> tuple[str, list[str]]:
    path, store = write_study("pair", ARMS, seeds=[0, 1, 2]), Store(tmp_path / "store").open()
    keep_losses(path, store)
    return str(path), ["--store", str(store.root)]


def test_the_document_that_makes_the_difference_comes_first(study: tuple[str, list[str]]) -> None:
    path, store = study
    pair = [f"{path}:a", f"{path}:b", "--items"]
    shown = lit_llm("diff", *pair, "--top", 3, *store)
    assert shown.returncode == 0, shown.stderr
    assert f"{NLL},{path}:bminus{path}:a" in "".join(shown.stdout.split())  # a long path is wrapped anywhere
    assert "7 more" in shown.stdout
    found = json.loads(lit_llm("diff", *pair, "--json", *store).stdout)
    assert (found["metric"], found["seeds"], len(found["items"])) == (NLL, [0, 1, 2], 10)
    first = found["items"][0]
    assert first["item"] == "0"
    assert first["share"] == pytest.approx(30 / 120)
    assert first["difference"]["mean"] == pytest.approx(0.9 - 0.31 / 3)
    assert sum(row["part"] for row in found["items"]) == pytest.approx(found["whole"]["mean"])
    assert found["whole"]["mean"] == pytest.approx(-0.31 / 3)


def test_what_cannot_be_compared_is_refused_with_the_next_step(study: tuple[str, list[str]]) -> None:
    path, store = study
    for arguments, message in (
        ([f"{path}:a", f"{path}:c", "--items"], "is not kept item by item"),
        ([f"{path}:a", f"{path}:b", "--items", "--metric", "test/target_nl"], "did you mean 'test/target_nll'?"),
        ([path, f"{path}:b", "--items"], "has several arms; name one"),
        ([f"{path}:a", f"{path}:b", "--metric", NLL], "--metric: is the metric of --items"),
    ):
        refused = lit_llm("diff", *arguments, *store)
        assert refused.returncode == 2, refused.stdout
        assert message in refused.stderr


def other_study(study: Path, name: str, old: str, new: str) -> Path:
    """The study under another name with another setting."""
    text = study.read_text()
    assert old in text
    path = study.with_name(f"{name}.yaml")
    path.write_text(text.replace("study: pair", f"study: {name}").replace(old, new))
    return path


def test_arms_that_read_different_texts_or_tokens_are_refused(study: tuple[str, list[str]], tmp_path: Path) -> None:
    """Two disjoint corpora have documents of the same numbers, and no item in common."""
    pair, place = Path(study[0]), Store(tmp_path / "store")
    (tmp_path / "apart").mkdir()
    for number in range(48):
        (tmp_path / "apart" / f"{number}.txt").write_text(f"quite another text, number {number} " * 20)
    corpus = pair.read_text().partition('files: ["')[2].partition('/*.txt"')[0]
    apart = other_study(pair, "apart", corpus, str(tmp_path / "apart"))
    merged = other_study(pair, "merged", "tokenizer: bytes", "tokenizer: {kind: bpe, vocabulary: 258}")
    for path in (apart, merged):
        keep_losses(path, place)
        with pytest.raises(InputError, match=r"another text, split or tokenizer in corpus; bits_per_byte compares"):
            items_of(f"{pair}:a", f"{path}:b", (), place, NLL)


def test_bits_per_byte_compare_tokenizers_on_the_same_text_alone(
    write_study: Callable[..., Path], tmp_path: Path
) -> None:
    bits, place = "test/bits_per_byte", Store(tmp_path / "store").open()
    pair = write_study("pair", ARMS, seeds=[0, 1, 2])
    merged = other_study(pair, "merged", "tokenizer: bytes", "tokenizer: {kind: bpe, vocabulary: 258}")
    held = other_study(pair, "held", "tokenizer: bytes", "test_fraction: 0.2, tokenizer: bytes")
    for path in (pair, merged, held):
        keep_losses(path, place)
        for run in runs_of(load_study(path), place):
            result = run.last.result() or {}
            result["metrics"][bits] = result["metrics"][NLL]
            (run.last.folder / "result.json").write_text(json.dumps(result))
    assert len(items_of(f"{pair}:a", f"{merged}:b", (), place, bits).items) == 10
    with pytest.raises(InputError, match=r"another text or split in corpus$"):
        items_of(f"{pair}:a", f"{held}:b", (), place, bits)


def test_results_of_other_code_are_left_out_and_unequal_weights_are_noted(
    study: tuple[str, list[str]], tmp_path: Path
) -> None:
    pair, place = Path(study[0]), Store(tmp_path / "store")
    longer = other_study(pair, "longer", "sequences: 8", "sequences: 9")
    keep_losses(longer, place, tokens=[30, *[10] * 7, 12, 12])
    found = items_of(f"{pair}:a", f"{longer}:b", (), place, NLL)
    assert [note.partition(" items")[0] for note in found.notes] == ["2 of 10"]
    stages = [run.last for run in runs_of(load_study(pair), place) if run.arm.name == "a"]
    for stage in stages:
        earlier = {**(stage.result() or {}), "finished": 0.0, "provenance": {"code": "earlier"}}
        (stage.folder / "result.json").write_text(json.dumps(earlier))
        if stage is stages[0]:
            found = items_of(f"{pair}:a", f"{pair}:b", (), place, NLL)
            assert found.seeds == (1, 2)
            assert found.notes[0].startswith("1 result(s) of other code")
    with pytest.raises(InputError, match=r"no finished seed in common .*; 3 result\(s\) of other code"):
        items_of(f"{pair}:a", f"{pair}:b", (), place, NLL)

"""What an arm is judged on was not trained on before, in any stage, by the content of the documents."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.data.splits import content_hash, split_of
from lit_llm.runs.fingerprints import identity_of_data
from lit_llm.runs.stage_graph import stage_graph
from lit_llm.store.store import Store
from lit_llm.studies.load import Ablation, load_study
from lit_llm.studies.plan import plan
from lit_llm.studies.preflight import check_leaks, text_findings
from lit_llm.studies.prepare_data import prepare_data
from lit_llm.studies.run import Observer, run_study

Study = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """300 documents of 25 words, and `corpus.jsonl` with them."""
    draw = random.Random(3)
    found = [" ".join("".join(draw.choices("abcdefghij", k=5)) for _ in range(25)) for _ in range(300)]
    write_records(tmp_path / "corpus.jsonl", [{"text": text} for text in found])
    return found


def write_records(path: Path, records: list[dict[str, str]]) -> Path:
    raw = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def of_split(texts: list[str], split: str, *fractions: float) -> list[str]:
    return [text for text in texts if split_of(content_hash(text), *fractions) == split]


def study(write_study: Study, tmp_path: Path, rest: str, data: str = "", arms: str = "arms: {red: {}}") -> Ablation:
    """A study on `corpus.jsonl`. rest: more keys of the base; data: more keys of pretrain.data."""
    path = write_study("leaks", arms)
    base = path.read_text()
    begin, end = base.index("corpus: {"), base.index(", sequence_length")
    corpus = f'corpus: {{kind: jsonl, files: ["{tmp_path}/corpus.jsonl"]}}, tokenizer: bytes{data}'
    validation = "validation: {times: 3, sequences: 8}\n"
    path.write_text((base[:begin] + corpus + base[end:]).replace(validation, f"{validation}{rest}"))
    return load_study(path)


def prepared(ablation: Ablation, store: Store) -> Ablation:
    experiments = [arm.experiment for arm in ablation.arms]
    nodes = [node for experiment in experiments for node in stage_graph(experiment)]
    prepare_data([*experiments, *(node.source for node in nodes if node.source)], store, Observer())
    return ablation


def refused(ablation: Ablation, store: Store) -> list[tuple[str, str]]:
    """(key, message) of each leak, which a plan then lists as well."""
    with pytest.raises(InputError) as caught:
        check_leaks(prepared(ablation, store), store)
    found = [(problem.key, problem.message) for problem in caught.value.problems]
    said = [finding for finding in text_findings(ablation, store) if finding.kind == "refused"]
    assert [(finding.key, f"{finding.arm}: {finding.message}") for finding in said] == found
    return found


ADAPTED = "arms: {red: {}, ada: {adapt: {from: {extends: decllm-tiny, pretrain: {data: {%s}}}}}}"


def test_a_source_with_another_validation_fraction_has_trained_on_what_the_arm_is_judged_on(
    write_study: Study, tmp_path: Path, texts: list[str], store: Store
) -> None:
    """With 2% and 3% held out, the source trains on what the run holds out between 5% and 25%."""
    data = ", validation_fraction: 0.15, test_fraction: 0.1"
    own, source = (0.15, 0.1), (0.02, 0.03)
    arms = ADAPTED % "validation_fraction: 0.02, test_fraction: 0.03"
    ablation = study(write_study, tmp_path, "", data, arms)
    trained = {*of_split(texts, "train", *source)}
    found = refused(ablation, store)
    for split, (key, message) in zip(("validation", "test"), found, strict=True):
        held = of_split(texts, split, *own)
        assert key == "pretrain.data.corpus"
        assert f"trained on {len(trained & {*held})} of the {len(held)} {split} documents" in message
        assert any(text[:50] in message for text in held)
    with pytest.raises(InputError, match="ada: the pretraining of its source has trained on"):
        plan(ablation, built=False, store=store).check()
    same = study(write_study, tmp_path, "", data, ADAPTED % "validation_fraction: 0.15")
    check_leaks(prepared(same, store), store)


def test_a_run_with_a_leak_trains_nothing(write_study: Study, tmp_path: Path, texts: list[str], store: Store) -> None:
    ablation = study(write_study, tmp_path, "", arms=ADAPTED % "validation_fraction: 0.01, test_fraction: 0.02")
    with pytest.raises(InputError, match="ada: the pretraining of its source has trained on"):
        run_study(ablation, store, observer=Observer(), max_parallel=1)
    assert not list(store.root.glob("stages/*/metrics.jsonl"))


@pytest.mark.parametrize("change", ["", " "], ids=["the same text", "a space at its end"])
def test_a_compressed_copy_of_the_training_file_is_no_held_out_text(
    write_study: Study, tmp_path: Path, texts: list[str], store: Store, change: str
) -> None:
    path = write_records(tmp_path / "copy.jsonl.gz", [{"text": text + change} for text in texts])
    likelihood = f'  evaluate: {{likelihood: {{corpora: {{copy: {{kind: jsonl, files: ["{path}"]}}}}}}}}\n'
    ((key, message),) = refused(study(write_study, tmp_path, likelihood), store)
    assert key == "evaluate.likelihood.corpora.copy"
    assert f"trained on {len(of_split(texts, 'train', 0.05, 0.05))} of the 300 documents" in message
    # The very file is read where it was held out.
    very = likelihood.replace("copy.jsonl.gz", "corpus.jsonl")
    check_leaks(prepared(study(write_study, tmp_path, very), store), store)


def tuned(path: Path, more: str) -> str:
    files = f'{{kind: jsonl, files: ["{path}"]}}'
    return (
        f"  finetune: {{data: {{examples: {files}, {more}, input_length: 30, target_length: 8, batch_size: 2}}, "
        "training: {max_steps: 2, schedule: constant}}\n"
    )


def examples(begin: int, end: int, change: str = "") -> list[dict[str, str]]:
    return [{"inputs": f"the number after {n} is{change}", "targets": f"{n + 1}"} for n in range(begin, end)]


def spoken(record: dict[str, str]) -> str:
    """An example as one text."""
    return f"{record['inputs']} {record['targets']}"


@pytest.mark.parametrize("change", ["", "  "], ids=["the same file", "a space more"])
@pytest.mark.parametrize(("files", "split"), [("validation_files", "validation"), ("test_files", "test")])
def test_the_training_file_is_no_held_out_file(
    write_study: Study, tmp_path: Path, texts: list[str], store: Store, files: str, split: str, change: str
) -> None:
    train = write_records(tmp_path / "train.jsonl", examples(0, 100))
    copy = write_records(tmp_path / "copy.jsonl", examples(0, 100, change)) if change else train
    other = write_records(tmp_path / "other.jsonl", examples(100, 150))
    for path, leaks in ((copy, True), (other, False)):
        rest = tuned(
            train, f'{files}: {{kind: jsonl, files: ["{path}"]}}, validation_fraction: 0.1, test_fraction: 0.1'
        )
        ablation = study(write_study, tmp_path, rest)
        if leaks:
            (key, message), (_, between) = refused(ablation, store)
            assert "test examples are validation examples" in between  # the fraction of the other split
            assert key == f"finetune.data.{files}"
            fractions = (0, 0.1) if files == "validation_files" else (0.1, 0)
            trained = of_split([spoken(record) for record in examples(0, 100)], "train", *fractions)
            assert f"its finetuning has trained on {len(trained)} of the 100 {split} examples" in message
        else:
            check_leaks(prepared(ablation, store), store)


def test_the_validation_file_is_no_test_file(
    write_study: Study, tmp_path: Path, texts: list[str], store: Store
) -> None:
    train = write_records(tmp_path / "train.jsonl", examples(0, 100))
    both = write_records(tmp_path / "both.jsonl", examples(100, 150))
    files = f'{{kind: jsonl, files: ["{both}"]}}'
    ((key, message),) = refused(
        study(write_study, tmp_path, tuned(train, f"validation_files: {files}, test_files: {files}")), store
    )
    assert key == "finetune.data.test_files"
    assert "50 of the 50 test examples are validation examples, by which choices are made" in message


def test_an_example_that_the_pretraining_has_read_as_a_document_leaks(
    write_study: Study, tmp_path: Path, texts: list[str], store: Store
) -> None:
    records = examples(0, 200)
    said = [spoken(record) for record in records]
    write_records(tmp_path / "corpus.jsonl", [{"text": text} for text in [*texts, *said]])
    path = write_records(tmp_path / "train.jsonl", records)
    rest = tuned(path, "validation_fraction: 0.2, test_fraction: 0")
    data = ", near_duplicates: keep"  # these differ in a number of five words
    ((key, message),) = refused(study(write_study, tmp_path, rest, data), store)
    held, trained = of_split(said, "validation", 0.2, 0), of_split(said, "train", 0.05, 0.05)
    assert key == "finetune.data.examples"
    common = len({*held} & {*trained})
    assert f"its pretraining has trained on {common} of the {len(held)} validation examples" in message


PAIR = "{kind: bpe, vocabulary: 280}"


def test_a_source_whose_tokenizer_learnt_from_other_text_gives_no_embedding(
    write_study: Study, tmp_path: Path, texts: list[str], store: Store
) -> None:
    """The settings are the same, the merges are not. Its trained file, named by its path, is the same tokenizer."""
    write_records(tmp_path / "other.jsonl", [{"text": text[::-1].replace("a", "x")} for text in texts])
    other = f'corpus: {{kind: jsonl, files: ["{tmp_path}/other.jsonl"]}}, tokenizer: {PAIR}'

    def adapting(tokenizer: str) -> Ablation:
        small = f"model: {{vocabulary: 280}}, pretrain: {{data: {{tokenizer: {tokenizer}}}}}"
        given = f"{{extends: decllm-tiny, model: {{vocabulary: 280}}, pretrain: {{data: {{{other}}}}}}}"
        return study(
            write_study, tmp_path, "", arms=f"arms: {{red: {{{small}}}, ada: {{{small}, adapt: {{from: {given}}}}}}}"
        )

    ablation = adapting(PAIR)
    notes = [finding.message for finding in text_findings(ablation, store)]
    assert any("tokenizer is to be trained on other text" in message for message in notes)
    ((key, message),) = refused(ablation, store)
    assert key == "adapt.from"
    assert "was trained with another tokenizer" in message
    source = ablation.arms[1].experiment.adapt.experiments["decoder"].seeded(0)
    path = store.data / "tokenizers" / identity_of_data(source).tokenizer / "tokenizer.json"
    file = f"{{kind: file, path: {path}}}"
    check_leaks(prepared(adapting(file), store), store)


def test_the_plan_says_how_many_near_duplicates_are_left_out(
    write_study: Study, tmp_path: Path, texts: list[str], store: Store
) -> None:
    held = of_split(texts, "test", 0.05, 0.05)[0]
    copies = of_split([f"{held} and {n}" for n in range(20)], "train", 0.05, 0.05)[:3]
    write_records(tmp_path / "corpus.jsonl", [{"text": text} for text in [*texts, *copies]])
    ablation = prepared(study(write_study, tmp_path, ""), store)
    assert [str(finding) for finding in text_findings(ablation, store)] == [
        "red: pretrain.data.near_duplicates: 3 train documents are left out: near-duplicates of documents that another "
        "split holds out"
    ]

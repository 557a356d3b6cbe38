"""Instruction data: what stands in the files is what is trained on, each example once per pass."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import tree
from lit_llm.data.batches import ExampleBatches
from lit_llm.data.config import ByteTokenizer, InstructionConfig
from lit_llm.data.examples import ExampleSet, prepare_examples
from lit_llm.data.instructions import identify_examples
from lit_llm.data.splits import SPLITS, content_hash, split_of
from lit_llm.objectives.config import BOS, EOD, MasksConfig

BYTES = ByteTokenizer()


def config(path: Path, **keys: object) -> InstructionConfig:
    files = {"kind": "parquet" if path.suffix == ".parquet" else "jsonl", "files": [str(path)]}
    content = {"examples": files, "input_length": 20, "target_length": 8, "batch_size": 4, **keys}
    return validate(InstructionConfig, tree(content))


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def numbered(path: Path, count: int = 40) -> Path:
    return write(
        path, [{"inputs": f"ask {n}", "targets": f"{n}", "task": "odd" if n % 2 else "even"} for n in range(count)]
    )


def prepared(section: InstructionConfig, root: Path) -> ExampleSet:
    digest = identify_examples(section, "bytes")
    prepare_examples(section, BYTES, root / "bytes", root, digest)  # a tokenizer's folder is called by its identity
    return ExampleSet(root, digest, BYTES)


def texts(examples: ExampleSet, split: str) -> list[tuple[str, str]]:
    found = []
    for number in range(examples.count(split)):
        source, target = examples.read(split, number)
        assert target[-1] == EOD
        found.append(tuple(bytes((ids - 2).tolist()).decode() for ids in (source, target[:-1])))
    return found


def test_every_example_is_there_once_with_its_task_and_held_out_by_its_content(tmp_path):
    section = config(numbered(tmp_path / "a.jsonl"), task="task", validation_fraction=0.3, test_fraction=0.2)
    examples = prepared(section, tmp_path)
    expected = [(f"ask {n}", f"{n}") for n in range(40)]
    for split in SPLITS:
        mine = [pair for pair in expected if split_of(content_hash(*pair), 0.3, 0.2) == split]
        assert texts(examples, split) == mine
        assert 2 < len(mine) < 30
        named = [examples.tasks[task] for task in examples.task_of(split)]
        assert named == ["odd" if int(target) % 2 else "even" for _, target in texts(examples, split)]


def test_files_of_their_own_are_held_out_whole(tmp_path):
    held, test = ({"kind": "jsonl", "files": [str(numbered(tmp_path / f"{count}.jsonl", count))]} for count in (7, 9))
    path = numbered(tmp_path / "a.jsonl")
    examples = prepared(config(path, validation_files=held, test_files=test), tmp_path)
    assert [examples.count(split) for split in SPLITS] == [40, 7, 9]
    examples = prepared(config(path, test_files=test, validation_fraction=0.3), tmp_path)
    assert [examples.count(split) for split in ("train", "test")] == [40 - examples.count("validation"), 9]
    examples = prepared(config(path, validation_files=held, test_fraction=0.3), tmp_path)
    assert [examples.count(split) for split in ("train", "validation")] == [40 - examples.count("test"), 7]
    examples = prepared(config(path, validation_files=held, test_fraction=0), tmp_path)
    assert [examples.count(split) for split in SPLITS] == [40, 7, 0]


def test_parquet_reads_as_json_lines_do(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    records = [json.loads(line) for line in numbered(tmp_path / "a.jsonl", 3000).read_text().splitlines()]
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=700)
    found = [prepared(config(tmp_path / name, task="task"), tmp_path) for name in ("a.jsonl", "a.parquet")]
    for split in SPLITS:
        assert texts(found[0], split) == texts(found[1], split)
        assert (found[0].task_of(split) == found[1].task_of(split)).all()


def test_templates_put_fields_together_and_leave_other_braces_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": f"{n}?", "meta": {"a": f"{n}!"}, "lang": "en"} for n in range(20)])
    section = config(path, inputs="{ }{q}", targets="{meta.a}{}", examples={
        "kind": "jsonl", "files": [str(path)], "where": {"lang": "en"}
    })  # fmt: skip
    examples = prepared(section, tmp_path)
    assert {pair for split in SPLITS for pair in texts(examples, split)} == {
        (f"{{ }}{n}?", f"{n}!{{}}") for n in range(20)
    }


def test_what_is_too_long_is_cut_at_its_end_and_keeps_its_end_of_document(tmp_path):
    long = {"inputs": "x" * 19 + "yz", "targets": "abcdefgh"}
    fits = {"inputs": "x" * 20, "targets": "abcdefg"}
    path = write(tmp_path / "a.jsonl", [long, fits, *({"inputs": str(n), "targets": "t"} for n in range(20))])
    section = config(path, validation_files={"kind": "jsonl", "files": [str(path)]}, test_fraction=0)
    examples = prepared(section, tmp_path)
    assert texts(examples, "train")[:2] == [("x" * 19 + "y", "abcdefg"), ("x" * 20, "abcdefg")]
    meta = json.loads(next(tmp_path.glob("examples/*/meta.json")).read_text())
    assert meta["cut_off"] == {"inputs": 2, "targets": 2}  # once in each file
    with pytest.raises(InputError) as error:
        prepared(config(path, over_long="refuse"), tmp_path)
    assert str(error.value).startswith(
        f"finetune.data.examples: {path}, record 1: its input has 21 tokens, more than input_length 20"
    )


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"inputs": "a"}], ":1: has no text under 'targets'"),
        ([{"inputs": "a", "target": "b"}], ":1: has no text under 'targets' - did you mean 'target'?"),
        ([{"inputs": "a", "targets": "b"}] * 3 + [{"inputs": "a", "targets": " "}], ", record 4: its target is empty"),
        ([{"inputs": "a", "targets": "b"}, {"inputs": 1, "targets": "b"}], ":2: 'inputs' should be a string, not 1"),
    ],
)
def test_what_is_wrong_with_a_record_names_the_file_and_the_record(tmp_path, records, message):
    path = write(tmp_path / "a.jsonl", records)
    with pytest.raises(InputError) as error:
        prepared(config(path), tmp_path)
    assert f"finetune.data.examples: {path}{message}" in str(error.value)
    assert not list(tmp_path.glob("examples/*/"))


def test_examples_that_change_after_they_were_identified_are_not_kept_under_the_old_identity(tmp_path):
    section = config(numbered(tmp_path / "a.jsonl"))
    digest = identify_examples(section, "bytes")
    numbered(tmp_path / "a.jsonl", 41)
    with pytest.raises(InputError, match="the text changed while it was tokenised"):
        prepare_examples(section, BYTES, tmp_path / "bytes", tmp_path, digest)
    assert not list(tmp_path.glob("examples/*/"))


def test_files_that_are_not_there_are_told_at_their_key(tmp_path):
    with pytest.raises(InputError, match=r"^finetune\.data\.validation_files\.files: nowhere\.jsonl: no file matches"):
        identify_examples(
            config(numbered(tmp_path / "a.jsonl"), validation_files={"kind": "jsonl", "files": ["nowhere.jsonl"]}),
            "bytes",
        )


def test_the_identity_changes_with_what_decides_the_tokens_alone(tmp_path):
    path = numbered(tmp_path / "a.jsonl")

    def identity(**keys: object) -> str:
        return identify_examples(config(path, **keys), "bytes")

    pattern = {"kind": "jsonl", "files": [str(tmp_path / "*.jsonl")]}
    same = [identity(), identity(batch_size=8), identity(examples=pattern)]
    assert len(set(same)) == 1
    others = [
        identity(input_length=21), identity(target_length=9), identity(inputs="{inputs} "), identity(task="task"),
        identity(over_long="refuse"), identity(validation_fraction=0.1), identity(test_fraction=0.1),
        identity(examples={"kind": "jsonl", "files": [str(path)], "where": {"task": "odd"}}),
        identify_examples(config(path), "another tokenizer"),
    ]  # fmt: skip
    assert len({*same, *others}) == 1 + len(others)
    numbered(path, 41)
    assert identity() not in same


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_batch_k_depends_on_seed_and_k_and_a_pass_has_every_example_once(tmp_path, family):
    examples = prepared(config(numbered(tmp_path / "a.jsonl"), validation_fraction=0.2), tmp_path)
    count = examples.count("train")
    batches = ExampleBatches(examples, 4, family, MasksConfig(), seed=3)
    places = np.concatenate([batches.places(k) for k in range(count)])
    passes = [sorted(places[begin : begin + count].tolist()) for begin in range(0, 4 * count, count)]
    assert passes == [list(range(count))] * 4
    assert len({tuple(places[begin : begin + count]) for begin in range(0, 4 * count, count)}) == 4
    again = ExampleBatches(examples, 4, family, MasksConfig(), seed=3)
    assert again.places(5) == batches.places(5) != ExampleBatches(examples, 4, family, MasksConfig(), seed=4).places(5)


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_a_packed_step_has_the_examples_of_an_unpacked_one(tmp_path, family):
    records = [{"inputs": "a" * (1 + n % 20), "targets": str(n % 10) * (1 if n % 3 else 7)} for n in range(60)]
    examples = prepared(config(write(tmp_path / "a.jsonl", records), validation_fraction=0.2), tmp_path)
    alone, packed = (ExampleBatches(examples, 8, family, MasksConfig(), 3, packed) for packed in (False, True))
    assert sum(len(packed[k]) for k in range(6)) < 6 * 8
    for k in range(6):
        (one, two), read = (batches[k] for batches in (alone, packed)), []
        for batch in (one, two):
            read.append(sorted(batch.targets[batch.weights.bool()].tolist()))
        assert read[0] == read[1]
        assert torch.equal(two.targets, packed[k].targets), "whoever asks, and however often"


def test_the_loss_is_on_the_targets_alone_and_the_prefix_is_the_input(tmp_path):
    examples = prepared(config(numbered(tmp_path / "a.jsonl")), tmp_path)
    masks = MasksConfig(prefix="bidirectional")
    dec, red = (ExampleBatches(examples, 3, family, masks, seed=0) for family in ("decoder", "encoder_decoder"))
    for row, place in enumerate(dec.places(0)):
        source, target = (part.tolist() for part in examples.read("train", place))
        batch = dec[0]
        counted = batch.weights[row].bool()
        assert batch.targets[row][counted].tolist() == target
        assert batch.inputs["tokens_BT"][row][: len(source) + len(target)].tolist() == [BOS, *source, *target[:-1]]
        prefix = batch.inputs["prefix_length"]
        assert int(prefix if isinstance(prefix, int) else prefix[row]) == len(source) + 1
        batch = red[0]
        assert batch.targets[row][batch.weights[row].bool()].tolist() == target
        assert batch.inputs["source_BS"][row][: len(source)].tolist() == source
        assert batch.inputs["target_BT"][row][: len(target)].tolist() == [BOS, *target[:-1]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"targets": "yes"}, "has no field"),
        ({"examples": {"kind": "jsonl", "files": ["x"], "text": "body"}}, "has no meaning here"),
        ({"target_length": 1}, "target_length"),
    ],
)
def test_a_section_that_could_not_work_is_refused(tmp_path, keys, message):
    with pytest.raises(InputError, match=message):
        config(numbered(tmp_path / "a.jsonl"), **keys)


def test_equal_examples_are_in_one_split_and_alike_ones_need_not_be(tmp_path):
    """Questions of one template share nearly all runs of words, and none is left out. Equal ones are on one side."""
    asked = "Answer the question about the number that is written at the end of this line, please: {}"
    records = [{"inputs": asked.format(n), "targets": f"It is {n}"} for n in range(60)]
    records += [{"inputs": f"  {record['inputs'].upper()}", "targets": f"{record['targets']} "} for record in records]
    examples = prepared(
        config(write(tmp_path / "a.jsonl", records), input_length=200, target_length=20, validation_fraction=0.3),
        tmp_path,
    )
    assert sum(examples.count(split) for split in SPLITS) == len(records)
    sides = [set(examples.contents(split).tolist()) for split in SPLITS]
    assert sum(map(len, sides)) == 60 == len(set.union(*sides))
    assert all(sides[:2])

"""The chain of stages: what is shared is shared, and nothing else."""

from __future__ import annotations

import json

import pytest

from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.runs.fingerprints import reset_identities
from lit_llm.runs.stage_graph import stage_graph


@pytest.fixture
def nodes(tmp_path, corpus):
    """links(preset, overrides) -> {name: link} of an experiment with both stages and their evaluations."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"inputs": f"ask {n}", "targets": f"{n}"}) + "\n" for n in range(40)))

    def made(preset="decllm-tiny", *overrides):
        reset_identities()
        data = f'{{examples: {{kind: jsonl, files: ["{path}"]}}, input_length: 16, target_length: 8, batch_size: 4}}'
        base = [
            f'pretrain.data.corpus={{kind: text, files: ["{corpus}/*.txt"]}}',
            "pretrain.data.tokenizer=bytes",
            f"finetune.data={data}",
            "finetune.training={max_steps: 5, schedule: constant}",
            "evaluate={examples: {examples: 9}}",
        ]
        experiment = load_experiment(preset, [*base, *overrides])
        return {node.name: node for node in stage_graph(experiment)}

    vars(made)["path"] = path
    return made


def shared(left, right):
    return [name for name in left if name in right and left[name].fingerprint == right[name].fingerprint]


ALL = ["pretrain", "examples after pretrain", "finetune", "examples after finetune"]


def test_each_stage_begins_with_the_weights_of_its_parent(nodes):
    found = nodes()
    assert list(found) == ALL
    assert [found[name].parent for name in ALL] == [
        "", found["pretrain"].fingerprint, found["pretrain"].fingerprint, found["finetune"].fingerprint,
    ]  # fmt: skip
    assert [found[name].prefix for name in ALL] == ["", "eval/", "finetune/", "finetune/eval/"]


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("finetune.masks.prefix=bidirectional", ALL[:2]),  # DecLLM and DecLLM + BiAttn are pretrained once
        ("finetune.training.dropout=0.1", ALL[:2]),
        ("finetune.data.batch_size=8", ALL[:2]),
        ("finetune.validation.examples=8", ALL[:2]),
        ("finetune.data.packing=greedy", ALL),
        ("finetune.data.input_length=17", ["pretrain"]),  # other examples are evaluated then
        ("evaluate.examples.examples=8", ["pretrain", "finetune"]),
        ("evaluate.precision=bf16", ["pretrain", "finetune"]),
        ("evaluate.batch_tokens=77", ALL),
        ("evaluate.likelihood={}", ALL),  # another evaluation is another stage
        ("finetune.training.execution.threads=2", ALL),
        ("pretrain.training.max_steps=299", []),
        ("seed=1", []),
    ],
)
def test_experiments_share_what_comes_before_their_first_difference(nodes, override, same):
    assert shared(nodes(), nodes("decllm-tiny", override)) == same


def test_other_examples_are_another_finetuning_of_the_same_pretraining(nodes):
    before = nodes()
    with nodes.path.open("a") as file:
        file.write(json.dumps({"inputs": "one", "targets": "more"}) + "\n")
    assert shared(before, nodes()) == ["pretrain"]


def test_every_evaluation_is_a_stage_of_its_own(nodes):
    both = list(nodes("decllm-tiny", "evaluate.likelihood={}"))
    assert both == [
        "pretrain", "likelihood after pretrain", "examples after pretrain",
        "finetune", "likelihood after finetune", "examples after finetune",
    ]  # fmt: skip


def test_the_split_that_evaluations_read_is_theirs_alone_and_counts_where_there_are_two(nodes):
    tested = nodes()
    assert shared(tested, nodes("decllm-tiny", "evaluate.split=validation")) == ["pretrain", "finetune"]
    without = "finetune.data.test_fraction=0"
    assert shared(nodes("decllm-tiny", without), nodes("decllm-tiny", without, "evaluate.split=validation")) == ALL


def test_an_evaluation_follows_the_stages_that_are_named(nodes):
    assert list(nodes("decllm-tiny", "evaluate.after=[finetune]")) == ["pretrain", "finetune", ALL[3]]
    assert list(nodes("decllm-tiny", "evaluate=null")) == ["pretrain", "finetune"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("finetune=null", "evaluate.examples: are those that `finetune.data` holds out"),
        ("evaluate.examples=null", "evaluate: names no evaluation"),
        ("evaluate.after=[]", "evaluate.after: names no stage"),
        ("finetune.masks.intra_document=true", "finetune.masks.intra_document: an example sees itself alone"),
        ("finetune.training.execution.micro_batch_size=5", "finetune.training.execution.micro_batch_size: 5 is more"),
    ],
)
def test_a_chain_that_cannot_be_is_refused(nodes, override, message):
    with pytest.raises(InputError) as error:
        nodes("decllm-tiny", override)
    assert message in str(error.value)


def test_an_encoder_decoder_has_no_prefix_to_open(nodes):
    with pytest.raises(InputError, match=r"finetune\.masks\.prefix: bidirectional changes nothing here"):
        nodes("redllm-tiny", "finetune.masks.prefix=bidirectional")

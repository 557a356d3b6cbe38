"""From names, files and overrides to an experiment, in the order of precedence, each mistake at its place."""

from pathlib import Path

import pytest
import yaml

from lit_llm import load_experiment
from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import read_yaml
from lit_llm.experiment.load import PRESETS, is_preset, preset_names
from lit_llm.experiment.schema import Experiment
from lit_llm.models.resolve import resolve_model

DECODER = """
model: {d_model: 16, vocabulary: 258, attention: {heads: 2}, feed_forward: {d_ff: 32}, decoder: {layers: 1}}
pretrain:
  data: {tokenizer: bytes, sequence_length: 8, batch_size: 2}
  training: {max_steps: 10}
"""


@pytest.fixture
def files(tmp_path):
    """files(name=text, ...) writes name.yaml and returns the folder."""

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path

    return write


def refused(source, overrides=()):
    with pytest.raises(InputError) as caught:
        load_experiment(source, overrides)
    return [str(problem) for problem in caught.value.problems]


# --- presets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_an_experiment(name):
    assert resolve_model(load_experiment(name).model).layers


def test_presets_that_others_are_made_of_are_not_offered():
    assert not [name for name in preset_names() if name.startswith("_")]
    assert {"redllm-tiny", "decllm-tiny"} <= set(preset_names())
    assert not is_preset("../presets/redllm-tiny")


# --- precedence ----------------------------------------------------------------------------------------------------


def test_a_file_wins_over_what_it_extends_and_an_override_over_the_file(files):
    folder = files(mine="extends: redllm-tiny\npretrain: {training: {max_steps: 77}}")
    assert load_experiment("redllm-tiny").pretrain.training.max_steps == 300
    assert load_experiment(folder / "mine.yaml").pretrain.training.max_steps == 77
    overrides = ["pretrain.training.max_steps=88", "seed=3"]
    changed = load_experiment(folder / "mine.yaml", overrides)
    assert (changed.pretrain.training.max_steps, changed.seed) == (88, 3)


def test_what_nobody_sets_is_the_default(files):
    experiment = load_experiment(files(mine=DECODER) / "mine.yaml")
    assert (experiment.pretrain.training.clip_norm, experiment.model.family, experiment.seed) == (1.0, "decoder", 0)


def test_a_later_override_wins_over_an_earlier_one():
    assert load_experiment("redllm-tiny", ["seed=1", "seed=2"]).seed == 2


def test_a_list_of_extends_is_merged_in_its_order(files):
    folder = files(
        a="seed: 1\nmodel: {d_model: 32}",
        b="seed: 2",
        ab="extends: [redllm-tiny, a.yaml, b.yaml]",
        ba="extends: [redllm-tiny, b.yaml, a.yaml]",
        own="extends: [redllm-tiny, b.yaml, a.yaml]\nseed: 3",
    )
    seeds = {name: load_experiment(folder / f"{name}.yaml").seed for name in ("ab", "ba", "own")}
    assert seeds == {"ab": 2, "ba": 1, "own": 3}
    assert load_experiment(folder / "ab.yaml").model.d_model == 32


def test_extends_is_relative_to_the_file_that_says_it(files, tmp_path, monkeypatch):
    files(root=DECODER)
    inner = tmp_path / "one" / "two"
    inner.mkdir(parents=True)
    (tmp_path / "one" / "middle.yaml").write_text("extends: ../root.yaml\nseed: 5")
    (inner / "leaf.yaml").write_text("extends: ../middle.yaml")
    monkeypatch.chdir(inner)
    assert load_experiment("leaf.yaml").seed == 5
    monkeypatch.chdir("/")
    assert load_experiment(inner / "leaf.yaml").seed == 5


def test_a_preset_is_meant_whatever_file_lies_beside(files, monkeypatch):
    folder = files(mine="extends: redllm-tiny")
    (folder / "redllm-tiny").write_text("seed: 9")
    monkeypatch.chdir(folder)
    assert load_experiment("mine.yaml").seed == 0


def test_another_kind_in_a_stronger_layer_drops_the_keys_of_the_old_one(files):
    folder = files(
        mine="extends: redllm-tiny\npretrain:\n  objective: causal_lm\n  training: {schedule: {kind: constant}}",
        back="extends: mine.yaml\npretrain: {objective: {kind: prefix_lm, split: 3}}",
        warm="extends: mine.yaml\npretrain: {training: {schedule: {warmup_steps: 4}}}",
    )
    first = load_experiment(folder / "mine.yaml").pretrain
    assert (first.objective.kind, first.training.schedule.warmup_steps) == ("causal_lm", 0)
    assert load_experiment(folder / "back.yaml").pretrain.objective.split == 3
    warm = load_experiment(folder / "warm.yaml").pretrain.training.schedule
    assert (warm.kind, warm.warmup_steps) == ("constant", 4)


# --- what cannot be found ------------------------------------------------------------------------------------------


def test_a_circle_of_extends_is_told_as_a_chain(files):
    folder = files(a="extends: b.yaml", b="\nextends: c.yaml", c="seed: 1\nextends: a.yaml", self="extends: self.yaml")
    message = f"{folder}/c.yaml:2: extends: extends itself: a.yaml -> b.yaml -> c.yaml -> a.yaml"
    assert refused(folder / "a.yaml") == [message]
    assert "self.yaml -> self.yaml" in refused(folder / "self.yaml")[0]


def test_the_same_file_twice_but_not_in_a_circle_is_fine(files):
    folder = files(
        root=DECODER, a="extends: root.yaml", b="extends: root.yaml", both="extends: [a.yaml, b.yaml]\nseed: 4"
    )
    assert load_experiment(folder / "both.yaml").seed == 4


def test_what_is_not_there_comes_with_the_nearest_preset_or_file(files):
    folder = files(
        preset="seed: 1\nextends: redlm-tiny",
        file="extends:\n  - redllm-tiny\n  - comon.yaml\n  - 3\n  - /nowhere/x.yaml",
        common="{}",
    )
    assert refused(folder / "preset.yaml") == [
        f"{folder}/preset.yaml:2: extends: there is no preset and no file 'redlm-tiny' - did you mean 'redllm-tiny'?"
    ]
    first, second, third = refused(folder / "file.yaml")
    expected = (
        f"{folder}/file.yaml:3: extends: there is no preset and no file 'comon.yaml' - did you mean 'common.yaml'?"
    )
    assert first == expected
    assert second == f"{folder}/file.yaml:4: extends: should be the name of a preset or a file"
    assert third.startswith(f"{folder}/file.yaml:5: extends: there is no preset and no file '/nowhere/x.yaml'")


@pytest.mark.parametrize("name", ["redllm-tyni", "nowhere.yaml", "", ".", "x" * 5000, "a\nb"])
def test_a_source_that_is_not_there_is_one_message(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (message,) = refused(name)
    assert message.startswith(f"there is no preset and no file {name!r}")


def test_a_missing_file_and_wrong_overrides_are_told_at_once(tmp_path):
    messages = refused(tmp_path / "no.yaml", ["nonsense", "seed=1", "a=["])
    assert [message.split(": ")[0] for message in messages] == [
        "-o nonsense",
        "-o a=[:1",
        f"there is no preset and no file '{tmp_path}/no.yaml' - allowed here",
    ]


# --- where it was written ------------------------------------------------------------------------------------------


def test_each_problem_is_at_the_file_and_line_that_brought_it_in(files):
    folder = files(
        below="model:\n  attention:\n    output_nrom: head",
        mine="extends: [redllm-tiny, below.yaml]\npretrain:\n  training:\n    max_stepz: 1\n    clip_norm: no",
    )
    assert refused(folder / "mine.yaml", ["pretrain.data.batch_size=0", "model.d_modl=1"]) == [
        f"{folder}/below.yaml:3: model.attention.output_nrom: unknown key - did you mean 'output_norm'?",
        "-o model.d_modl=1: model.d_modl: unknown key - did you mean 'd_model'?",
        "-o pretrain.data.batch_size=0: pretrain.data.batch_size: should be greater than 0, not 0",
        f"{folder}/mine.yaml:5: pretrain.training.clip_norm: should be a number, not 'no'",
        f"{folder}/mine.yaml:4: pretrain.training.max_stepz: unknown key - did you mean 'max_steps'?",
    ]


def test_a_value_from_a_preset_that_no_longer_fits_is_told_at_the_preset():
    """128 tokens and a warm-up of 30 steps are _tiny's; the override only asks for less."""
    (message,) = refused("redllm-tiny", ["pretrain.training.max_steps=20"])
    assert message == (
        f"{PRESETS}/_tiny.yaml:12: pretrain.training.schedule.warmup_steps: 30 are more than max_steps 20"
    )


def test_an_empty_file_and_a_list_are_no_experiment(files):
    folder = files(empty="", listed="- model\n- pretrain")
    assert [line.split(": ", 1)[1] for line in refused(folder / "empty.yaml")] == [
        "model: is needed, and there is no default",
        "pretrain: is needed, and there is no default",
    ]
    assert refused(folder / "listed.yaml") == [f"{folder}/listed.yaml:1: should be a mapping of keys to values"]


# --- what does not fit together ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "overrides", "key", "said"),
    [
        ("decllm-tiny", ["pretrain.masks.prefix=bidirectional"], "pretrain.masks.prefix", "would show its own labels"),
        (
            "redllm-tiny",
            ["pretrain.masks.prefix=bidirectional"],
            "pretrain.masks.prefix",
            "an encoder sees all of its source anyway",
        ),
        ("redllm-tiny", ["pretrain.objective.split=128"], "pretrain.objective.split", "leaves no target"),
        ("redllm-tiny", ["pretrain.objective.split=200"], "pretrain.objective.split", "leaves no target"),
        ("redllm-tiny", ["pretrain.objective.split=0"], "pretrain.objective.split", "leaves no target"),
        ("redllm-tiny", ["pretrain.validation.prefix_length=128"], "pretrain.validation.prefix_length", "no target"),
        ("redllm-tiny", ["model.vocabulary=1023"], "model.vocabulary", "1023 rows for a tokenizer of 1024 tokens"),
        ("decllm-tiny", ["model.vocabulary=257", "pretrain.data.tokenizer=bytes"], "model.vocabulary", "of 258 tokens"),
        ("redllm-tiny", ["pretrain.data.sequence_length=1"], "pretrain.objective.split", "cannot be cut in two"),
        ("decllm-tiny", ["model.attention.kv_heads=3"], "model.attention", "kv_heads 3 does not divide heads 4"),
        ("decllm-tiny", ["model.attention.heads=5"], "model.attention", "5 heads do not divide d_model 64"),
        (
            "redllm-tiny",
            ["pretrain.training.execution.micro_batch_size=17"],
            "pretrain.training.execution",
            "17 is more",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_with_its_reason(preset, overrides, key, said):
    message = next(line for line in refused(preset, overrides) if key in line)
    assert said in message


def test_the_largest_prefix_and_the_smallest_vocabulary_that_fit_are_allowed():
    load_experiment("redllm-tiny", ["pretrain.objective.split=127", "model.vocabulary=1024"])
    overrides = ["pretrain.objective=prefix_lm", "pretrain.masks.prefix=bidirectional"]
    assert load_experiment("decllm-tiny", overrides).pretrain.masks.prefix == "bidirectional"


def test_switching_the_block_norm_switches_that_alone():
    """An ablation of the norm must not bring back a scale that the preset has switched off."""
    norm = resolve_model(load_experiment("decllm-tiny", ["model.norm.function=layer_norm"]).model).norm
    assert norm.function == "layer_norm"
    assert not norm.scale


# --- overrides that change nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "override"),
    [
        ("redllm-tiny", "model.decoder.cross_attention.rope=continuous"),
        ("redllm-tiny", "model.encoder.attention.output_norm=head"),
        ("redllm-tiny", "model.encoder.attention.rope=restart"),  # in self-attention it is the same function
        ("redllm-tiny", "model.encoder.attention.kv_heads=4"),
        ("redllm-tiny", "model.encoder.attention.kv_heads=null"),
        ("redllm-tiny", "model.encoder.attention.head_dim=16"),
        ("redllm-tiny", "model.decoder.feed_forward.d_ff=256"),
        ("redllm-tiny", "model.decoder.layer_ranges={0-1: {feed_forward: {d_ff: 256}}}"),
        ("decllm-tiny", "model.decoder.self_attention.output_norm_scale=true"),  # there is no norm to scale
        ("decllm-tiny", "model.decoder.self_attention.qkv_norm=[v, k, q]"),  # the same three, in another order
    ],
)
def test_an_override_that_changes_nothing_is_an_error(preset, override):
    (message,) = refused(preset, [override])
    assert message.startswith(f"-o {override}: {override.split('=')[0]}")
    assert "changes nothing in the resolved model" in message


@pytest.mark.parametrize(
    "override",
    [
        "model.decoder.cross_attention.rope=none",
        "model.decoder.cross_attention.rope=restart",
        "model.encoder.attention.kv_heads=2",
        "model.decoder.layer_ranges={1: {feed_forward: {d_ff: 64}}}",
        "model.attention.output_norm=head",  # the default of all may repeat what holds: it is no special address
        "model.attention.kv_heads=4",
    ],
)
def test_an_override_that_changes_something_is_not(override):
    load_experiment("redllm-tiny", [override])


def test_an_override_that_is_needed_is_not_idle(files):
    """Without their own head_dim, five heads would not divide the width: the key cannot be left out."""
    folder = files(
        mine="extends: decllm-tiny\nmodel: {attention: {heads: 5}, decoder: {self_attention: {head_dim: 16}}}"
    )
    layers = resolve_model(load_experiment(folder / "mine.yaml").model).decoder
    assert {layer.self_attention.head_dim for layer in layers} == {16}


def test_idle_overrides_in_a_file_are_told_at_their_lines(files):
    folder = files(
        below="extends: redllm-tiny\nmodel:\n  decoder:\n    cross_attention: {rope: continuous}",
        mine="extends: below.yaml\nmodel:\n  encoder:\n    layer_ranges:\n      0-1:\n        attention:\n"
        "          output_norm: head",
    )
    where = [line.split(": ")[:2] for line in refused(folder / "mine.yaml")]
    assert where == [
        [f"{folder}/mine.yaml:7", "model.encoder.layer_ranges.0-1.attention.output_norm"],
        [f"{folder}/below.yaml:4", "model.decoder.cross_attention.rope"],
    ]


@pytest.mark.parametrize("name", preset_names())
def test_a_full_dump_is_a_file_that_loads_to_the_same_experiment(name):
    """What `config.yaml` freezes is what runs."""
    experiment = load_experiment(name)
    text = yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False)
    assert validate(Experiment, read_yaml(text, "frozen")) == experiment


def test_the_presets_folder_travels_with_the_package():
    assert Path(PRESETS, "redllm-tiny.yaml").is_file()


@pytest.mark.parametrize("address", ["decoder.partial_attention", "decoder.layer_ranges.1.partial_attention"])
def test_partial_attention_needs_an_objective_with_a_source(address: str) -> None:
    """With causal_lm every token is a target, and one that all tokens see would show its own label."""
    override = f"model.{address}=palm"
    with pytest.raises(InputError) as error:
        load_experiment("decllm-tiny", [override])
    (problem,) = error.value.problems
    assert problem.key == "pretrain.objective"
    assert "no source for partial attention" in problem.message
    assert "prefix_lm" in problem.message
    load_experiment("decllm-tiny", [override, "pretrain.objective=prefix_lm"])


@pytest.mark.parametrize("key", ["kind=palm", "heads=2"])
def test_an_override_says_what_it_is_or_what_is_different(key: str) -> None:
    """`kind` is never idle, though it is the default; a key that is what `model.attention` says is."""
    on = ["pretrain.objective=prefix_lm", "model.decoder.partial_attention.kv_heads=1"]
    load_experiment("decllm-tiny", [*on, f"model.decoder.partial_attention.{key}"])
    heads = load_experiment("decllm-tiny", on).model.attention.heads
    with pytest.raises(InputError, match="changes nothing in the resolved model"):
        load_experiment("decllm-tiny", [*on, f"model.decoder.partial_attention.heads={heads}"])


def test_partial_attention_has_no_place_for_several_sources_in_a_row() -> None:
    data = "examples: {kind: jsonl, files: [a]}, input_length: 8, target_length: 4, batch_size: 4, packing: greedy"
    stage = f"finetune={{data: {{{data}}}, training: {{max_steps: 2, schedule: constant}}}}"
    load_experiment("decllm-tiny", [stage, "pretrain.objective=prefix_lm"])
    with pytest.raises(InputError, match=r"finetune.data.packing: partial attention reads the beginning of a row"):
        load_experiment("decllm-tiny", [stage, "pretrain.objective=prefix_lm", "model.decoder.partial_attention=palm"])

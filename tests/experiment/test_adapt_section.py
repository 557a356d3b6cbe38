"""The `adapt` section: what its source is read from, what is refused and where, who shares a source, what it costs."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import lit_llm
from lit_llm.config.problems import InputError
from lit_llm.data.tokenizers import train_bpe
from lit_llm.experiment.cost import COST_FIGURES, cost_of, memory_of
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.huggingface.checkpoint import digest_of_checkpoint, open_checkpoint
from lit_llm.models.build import build_model
from lit_llm.models.cost import Shape, count_parameters, forward_flops
from lit_llm.models.resolve import resolve_model
from lit_llm.runs.fingerprints import reset_identities
from lit_llm.runs.provenance import COMPUTES
from lit_llm.runs.run_one_stage import experiment_yaml
from lit_llm.runs.stage_graph import stage_graph
from tests import commands

BYTES = ["pretrain.data.tokenizer=bytes"]
FROM = "adapt.from=decllm-tiny"


@pytest.fixture
def load(corpus):
    """load(*overrides, preset=...): RedLLM, its text that of the tests."""
    reset_identities()
    text = f'pretrain.data.corpus={{kind: text, files: ["{corpus}/*.txt"]}}'
    return lambda *overrides, preset="redllm-tiny": load_experiment(preset, [text, *BYTES, *overrides])


def names(experiment):
    return {node.name: node.fingerprint for node in stage_graph(experiment)}


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_source_is_read_into_the_configuration_and_no_later_edit_changes_it(tmp_path, load):
    path = tmp_path / "dec.yaml"
    path.write_text("extends: decllm-tiny\npretrain: {training: {max_steps: 77}}\nseed: 5\n")
    experiment = load(f"adapt.from={path}")
    path.write_text("extends: decllm-tiny\npretrain: {training: {max_steps: 99}}\n")
    assert experiment.adapt.source.pretrain.training.max_steps == 77
    again = tmp_path / "frozen.yaml"
    again.write_text(experiment_yaml(experiment))
    assert load_experiment(again) == experiment


def test_a_file_is_relative_to_the_one_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "dec.yaml").write_text("extends: decllm-tiny\npretrain: {training: {max_steps: 77}}\n")
    (tmp_path / "below" / "red.yaml").write_text("extends: redllm-tiny\nadapt: {from: dec.yaml}\n")
    monkeypatch.chdir(tmp_path)
    assert load_experiment("below/red.yaml").adapt.source.pretrain.training.max_steps == 77


@pytest.mark.parametrize(
    "written",
    [
        "{extends: decllm-tiny, pretrain: {training: {max_steps: 77}}}",
        "{extends: [decllm-tiny], pretrain: {training: {max_steps: 77}}}",
    ],
)
def test_keys_of_a_source_are_changed_in_place_or_by_options(load, written):
    by_options = load(FROM, "adapt.from.pretrain.training.max_steps=77")
    assert load(f"adapt.from={written}") == by_options
    assert by_options.adapt.source.pretrain.training.max_steps == 77
    assert by_options.pretrain.training.max_steps == 300


def test_text_training_and_widths_are_a_sources_too_but_no_stack_and_no_objective(load):
    changed = [
        "model.d_model=32",
        "pretrain.data.batch_size=4",
        "pretrain.training.max_steps=9",
        "model.encoder.layers=1",
    ]
    experiment = load(FROM, *changed, "pretrain.objective.split=64", "pretrain.training.schedule.warmup_steps=1")
    source = experiment.adapt.source
    assert (source.model.d_model, source.pretrain.data.batch_size, source.pretrain.training.max_steps) == (32, 4, 9)
    assert source.pretrain.objective.kind == "causal_lm"
    own = load(FROM, "pretrain.training.max_steps=31", "adapt.from.pretrain.training.max_steps=32")
    assert own.adapt.source.pretrain.training.max_steps == 32


def test_a_source_may_have_a_source_of_its_own(load):
    deep = "{extends: decllm-tiny, adapt: {from: decllm-tiny}}"
    assert list(names(load(f"adapt.from={deep}"))) == ["source/source", "source", "pretrain"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        (
            "{from: decllm-tny}",
            "4: adapt.from: there is no preset and no file 'decllm-tny' - did you mean 'decllm-tiny'?",
        ),
        ("{from: 7}", "4: adapt.from: should be the name of a preset, a file or a folder, or a mapping"),
        ("{from: red.yaml}", "4: adapt.from: is adapted from itself: red.yaml -> red.yaml"),
        ("{from: other.yaml}", "4: adapt.from: is adapted from itself: other.yaml -> red.yaml -> other.yaml"),
        ("{from: .}", "4: adapt.from: "),
        (
            "{from: {extends: decllm-tiny, pretrain: {data: {tokenizer: bytes}}}}",
            "4: adapt.from: has another tokenizer",
        ),
        (
            "{from: {extends: decllm-tiny, model: {vocabulary: 2048}}}",
            "4: adapt.from: has another vocabulary: its embedding has 2048 rows, this model's 1024",
        ),
        (
            "{from: {extends: decllm-tiny, model: {decoder: {layers: 1}}}}",
            "4: adapt.from: has 1 layers for the 2 of the encoder",
        ),
        (
            "{from: {extends: decllm-tiny, model: {d_model: 32, feed_forward: {d_ff: 8}}}}",
            "4: adapt.from: gives nothing to the encoder's layers",
        ),
        ("{from: decllm-tiny, warmup_steps: 10}", "4: adapt.warmup_steps: every parameter is taken over"),
        ("{from: {extends: decllm-tiny, finetune: null}}", "4: adapt.from.finetune: unknown key"),
        ("{from: {extends: decllm-tiny, seed: 3}}", "4: adapt.from.seed: unknown key"),
        (
            "{from: {extends: decllm-tiny, model: {d_modle: 32}}}",
            "4: adapt.from.model.d_modle: unknown key - did you mean 'd_model'?",
        ),
        (
            "{from: redllm-tiny, distill: {}}",
            "4: adapt.distill: the teacher reads source and target as one",
        ),
        ("{from: decllm-tiny, warmup: 3}", "4: adapt.warmup: unknown key - did you mean 'warmup_steps'?"),
        ("{warmup_steps: 3}", "4: adapt.from: is needed"),
        ("{from: {encoder: decllm-tiny}}", "4: adapt.from.decoder: is needed"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_written(tmp_path, adapt, message):
    (tmp_path / "other.yaml").write_text("adapt: {from: red.yaml}\nextends: decllm-tiny\n")
    path = tmp_path / "red.yaml"
    path.write_text(f"extends: redllm-tiny\npretrain:\n  training: {{max_steps: 300}}\nadapt: {adapt}\n")
    with pytest.raises(InputError) as error:
        load_experiment(path)
    assert message in str(error.value)
    assert len(error.value.problems) == 1


OPEN = "{extends: decllm-tiny, pretrain: {objective: prefix_lm, masks: {prefix: bidirectional}}}"
SPANS = ["model.vocabulary=1100", "pretrain.objective=span_corruption"]


@pytest.mark.parametrize(
    ("source", "own", "message"),
    [
        (OPEN, [], "this one is trained with an open prefix"),
        (
            "{extends: decllm-tiny, model: {vocabulary: 1100}}",
            SPANS,
            "the teacher's causal_lm has trained no ids but the text, not 6 sentinels of span_corruption",
        ),
        (
            "{extends: decllm-tiny, model: {vocabulary: 1100}, pretrain: {objective: span_corruption}}",
            ["model.vocabulary=1100", "pretrain.objective=ul2"],
            "mode tokens of ul2: what it says of them is noise",
        ),
    ],
)
def test_a_teacher_is_asked_for_nothing_that_it_was_not_trained_on(load, source, own, message):
    """An open prefix is another input than causal text, and ids of an objective are rows that only it trains."""
    load(f"adapt.from={source}", *own)  # its weights may be taken all the same
    with pytest.raises(InputError) as error:
        load(f"adapt.from={source}", *own, "adapt.distill={}")
    assert [problem.key for problem in error.value.problems] == ["adapt.distill"]
    assert message in str(error.value)


def test_a_teacher_of_the_same_sentinels_or_of_more_is_none_the_worse(load):
    for mean_span in (3, 2):
        objective = f"{{kind: span_corruption, mean_span: {mean_span}}}"
        source = f"{{extends: decllm-tiny, model: {{vocabulary: 1100}}, pretrain: {{objective: {objective}}}}}"
        assert load(f"adapt.from={source}", *SPANS, "adapt.distill={}").adapt.distill


def test_a_decoder_is_not_made_of_an_encoder_decoder():
    with pytest.raises(InputError, match=r"adapt\.from: is of family encoder_decoder"):
        load_experiment("decllm-tiny", ["adapt.from=redllm-tiny"])


def test_a_warm_up_leaves_steps_for_all_parameters(load):
    with pytest.raises(InputError, match=r"adapt\.warmup_steps: 300 leave none of the 300 steps"):
        load(FROM, "model.attention.output_norm_scale=true", "adapt.warmup_steps=300")


def test_the_command_exits_with_2_and_the_line(tmp_path):
    path = tmp_path / "red.yaml"
    path.write_text("extends: redllm-tiny\nadapt:\n  from: nowhere.yaml\n")
    for command in ("adapt", "train", "plan"):
        done = commands.lit_llm(command, path, cwd=tmp_path)
        assert done.returncode == 2
        assert f"{path}:3: adapt.from: there is no preset and no file 'nowhere.yaml'" in done.stderr
    done = commands.lit_llm("adapt", "redllm-tiny", cwd=tmp_path)
    assert (done.returncode, "has no `adapt` section" in done.stderr) == (2, True)


# --- identity --------------------------------------------------------------------------------------------------------


def test_a_source_is_the_pretraining_that_it_is_by_itself(load):
    """So an arm that is that decoder, and every arm that is adapted from it, has it computed once."""
    by_itself = names(load(preset="decllm-tiny"))["pretrain"]
    found = names(load(FROM))
    assert list(found) == ["source", "pretrain"]
    assert found["source"] == by_itself
    assert names(load(FROM, "model.attention.output_norm=none"))["source"] == by_itself
    node = stage_graph(load(FROM))[1]
    assert node.parents == (node.parent,) == (by_itself,)


def test_a_source_has_the_seed_of_its_run(load):
    assert names(load(FROM, "seed=3"))["source"] == names(load("seed=3", preset="decllm-tiny"))["pretrain"]


@pytest.mark.parametrize(
    "override",
    [
        "adapt=null", "adapt.warmup_steps=7", "adapt.distill={}", "adapt.distill={temperature: 2.0}",
        "adapt.from.pretrain.training.max_steps=77", "adapt.from.model.decoder.layers=3", "seed=1",
    ],
)  # fmt: skip
def test_what_an_adaptation_is_changes_the_name(load, override):
    scaled = "model.attention.output_norm_scale=true"
    assert names(load(FROM, scaled))["pretrain"] != names(load(FROM, scaled, override))["pretrain"]


def test_how_a_source_is_computed_is_not_in_the_name(load):
    assert names(load(FROM)) == names(load(FROM, "adapt.from.pretrain.training.execution.threads=2"))


def test_sources_of_both_sides_are_computed_before_what_they_make(load):
    sides = "adapt.from={encoder: {extends: decllm-tiny, model: {decoder: {layers: 2}}}, decoder: decllm-tiny}"
    nodes = {node.name: node for node in stage_graph(load(sides))}
    assert list(nodes) == ["source", "encoder_source", "pretrain"]
    assert nodes["pretrain"].parents == (nodes["source"].fingerprint, nodes["encoder_source"].fingerprint)
    same = stage_graph(load("adapt.from={encoder: decllm-tiny, decoder: decllm-tiny}"))
    assert [node.fingerprint for node in same] == [node.fingerprint for node in stage_graph(load(FROM))]


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a decoder of RedLLM's widths, and how to change one weight of it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    experiment = load_experiment("decllm-tiny")
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": experiment.model.model_dump(mode="json")}))
    state = build_model(experiment.model, seed=8).state_dict()

    def write(shift=0.0):
        changed = {name: value + shift * (name == "embedding.weight") for name, value in state.items()}
        save_file(changed, folder / "weights.safetensors")
        return folder

    write()
    return write


def test_a_checkpoint_is_known_by_its_content_not_by_its_place(checkpoint, load, tmp_path):
    folder = checkpoint()
    found = names(load(f"adapt.from={folder}"))
    assert list(found) == ["pretrain"]
    moved = folder.rename(tmp_path / "moved")
    assert names(load(f"adapt.from={moved}")) == found
    moved.rename(folder)
    checkpoint(shift=1.0)
    assert names(load(f"adapt.from={folder}")) != found


@pytest.fixture
def with_tokenizer(checkpoint, tmp_path):
    """with_tokenizer(name, file="tokenizer.json", ...): the folder, its tokenizer a copy of `file` in model.yaml."""
    train_bpe(["one text and another"] * 9, 270, tmp_path / "tokenizer.json")
    train_bpe(["quite different words"] * 9, 270, tmp_path / "other.json")

    def write(about="A comment", path="/anywhere/tokenizer.json", file="tokenizer.json", **ends):
        folder = checkpoint()
        model = yaml.safe_load((folder / "model.yaml").read_text())["model"]
        section = {"kind": "file", "path": path, **ends}
        content = yaml.safe_dump({"model": model, "pretrain": {"data": {"tokenizer": section}}})
        (folder / "model.yaml").write_text(f"# {about}\n{content}")
        shutil.copyfile(tmp_path / file, folder / "tokenizer.json")
        return folder

    return write


def test_a_checkpoint_is_its_model_weights_and_tokenizer_not_what_its_file_says_beside(with_tokenizer):
    first = digest_of_checkpoint(with_tokenizer(end_of_document="<eod>", begin="<s>"))
    same = with_tokenizer("Another", "/elsewhere/tokenizer.json", end_of_document="<eod>", begin="<s>")
    assert digest_of_checkpoint(same) == first
    assert digest_of_checkpoint(with_tokenizer(end_of_document="<s>", begin="<eod>")) != first
    assert digest_of_checkpoint(with_tokenizer(file="other.json", end_of_document="<eod>", begin="<s>")) != first
    folder = with_tokenizer(end_of_document="<eod>", begin="<s>")
    content = (folder / "model.yaml").read_text()
    (folder / "model.yaml").write_text(content.replace("rope_theta: 10000.0", "rope_theta: 500.0"))
    assert (folder / "model.yaml").read_text() != content
    assert digest_of_checkpoint(folder) != first


def test_a_checkpoint_with_another_tokenizer_is_refused(with_tokenizer, load, tmp_path):
    folder = with_tokenizer(end_of_document="<eod>", begin="<s>")

    def adapted(file, end="<eod>", begin="<s>"):
        tokenizer = f"{{kind: file, path: {tmp_path / file}, end_of_document: {end}, begin: {begin}}}"
        return load(f"adapt.from={folder}", f"pretrain.data.tokenizer={tokenizer}")

    assert adapted("tokenizer.json").adapt.source.tokenizer is not None
    again = tmp_path / "frozen.yaml"
    again.write_text(experiment_yaml(adapted("tokenizer.json")))
    assert load_experiment(again) == adapted("tokenizer.json")
    for wrong in (
        lambda: adapted("other.json"),
        lambda: adapted("tokenizer.json", "<s>", "<eod>"),
        lambda: load(f"adapt.from={folder}"),  # bytes
        lambda: load(f"adapt.from={folder}", "pretrain.data.tokenizer={kind: bpe, vocabulary: 270}"),
        lambda: load(f"adapt.from={{encoder: decllm-tiny, decoder: {folder}}}"),
    ):
        with pytest.raises(InputError, match="adapt.from.*has another tokenizer.*tokenizer.json"):
            wrong()


def test_a_result_is_stale_when_the_code_that_opens_checkpoints_changes():
    file = Path(inspect.getfile(open_checkpoint)).relative_to(Path(lit_llm.__file__).parent)
    assert any(file.is_relative_to(name) for name in COMPUTES)


def test_a_pretraining_begins_with_a_checkpoints_weights_and_with_no_others(checkpoint, load, store, corpus):
    from lit_llm.data.prepare import prepare
    from lit_llm.runs.stage_config import load_stage_config, save_stage_config
    from lit_llm.runs.warm_start import load_source_weights

    folder = checkpoint()
    experiment = load(f"adapt.from={folder}")
    prepare(experiment.pretrain.data, store.data)
    frozen = load_stage_config(save_stage_config(store.open(), stage_graph(experiment)[0], experiment))
    model = build_model(experiment.model, 0)
    warm_start, weights = load_source_weights(model, frozen, store)
    assert (warm_start.newly_initialised, weights) == (frozenset(), None)
    given = build_model(load_experiment("decllm-tiny").model, seed=8).state_dict()
    assert torch.equal(model.state_dict()["encoder.layers.1.feed_forward.up.weight"],
                       given["decoder.layers.3.feed_forward.up.weight"])  # fmt: skip
    checkpoint(shift=1.0)
    with pytest.raises(InputError, match="is not what it was when this run was planned"):
        load_source_weights(model, frozen, store)


# --- cost ------------------------------------------------------------------------------------------------------------


def test_a_sources_cost_is_the_runs(load):
    """Judge: both experiments by themselves."""
    whole, alone, source = cost_of(load(FROM)), cost_of(load()), cost_of(load(preset="decllm-tiny"))
    for figure in ("train_flops", "tokens", "loss_tokens"):
        assert COST_FIGURES[figure](whole) == COST_FIGURES[figure](alone) + COST_FIGURES[figure](source)
    assert whole.flops_per_step == alone.flops_per_step
    assert whole.before.train_flops == source.train_flops
    assert whole.memory_bytes == max(alone.memory_bytes, source.memory_bytes)


def test_a_source_that_both_sides_have_is_paid_for_once(load):
    twice = cost_of(load("adapt.from={encoder: decllm-tiny, decoder: decllm-tiny}"))
    assert twice.train_flops == cost_of(load(FROM)).train_flops


def test_a_teachers_forward_pass_counts(load):
    """In each step it reads the whole window, of 128 tokens, and its 64 targets have a distribution."""
    with_teacher, without = load(FROM, "adapt.distill={}"), load(FROM)
    teacher = resolve_model(load(preset="decllm-tiny").model)
    expected = 16 * forward_flops(teacher, Shape(0, 128, outputs=64))
    assert cost_of(with_teacher).flops_per_step - cost_of(without).flops_per_step == pytest.approx(expected)
    held = memory_of(with_teacher, "pretrain") - memory_of(without, "pretrain")
    assert held > 4 * count_parameters(teacher).total


def test_an_experiment_without_a_source_says_nothing_of_one(load):
    assert "adapt" not in load().model_dump(mode="json")
    assert isinstance(load(FROM).adapt.source.seeded(0), Experiment)

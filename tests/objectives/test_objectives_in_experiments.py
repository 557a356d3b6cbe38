"""Objectives as experiments use them: their cost is what batches hold, and one primary metric measures them all."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from lit_llm.config.problems import InputError
from lit_llm.data.batches import TrainBatches, WindowCollator
from lit_llm.data.prepare import prepare
from lit_llm.evaluation.config import ValidationConfig
from lit_llm.evaluation.likelihood import Validation, nats_of
from lit_llm.evaluation.scoring import score
from lit_llm.experiment.cost import cost_of, largest_shape, shape_of
from lit_llm.experiment.load import load_experiment
from lit_llm.generation import Sampling
from lit_llm.models.build import build_model
from lit_llm.models.cost import Shape, train_flops
from lit_llm.models.resolve import resolve_model
from lit_llm.objectives.base import BOS
from lit_llm.objectives.config import UL2, CausalLM, MaskedLM, MasksConfig, PrefixLM, SpanCorruption, misfit
from lit_llm.runs.fingerprints import pretrain_fingerprint
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_config import save_stage_config
from lit_llm.runs.stage_graph import stage_graph
from lit_llm.runs.trained_model import open_finished
from lit_llm.store.store import Store
from tests.tiny_models import build

LENGTH, TEXT = 32, 258  # bytes
SPANS, MIXTURE, GEMMA = "span_corruption", "ul2", "{kind: ul2, mix: t5gemma2, mode_tokens: false}"
OPEN = "pretrain.masks.prefix=bidirectional"
PALM = "model.decoder.partial_attention=palm"


def experiment_of(corpus, preset, objective, *overrides):
    return load_experiment(
        preset,
        [
            "model.d_model=16", "model.vocabulary=280", "model.attention.heads=2", "model.feed_forward.d_ff=32",
            f'pretrain.data.corpus={{kind: text, files: ["{corpus}/*.txt"]}}', "pretrain.data.tokenizer=bytes",
            f"pretrain.data.sequence_length={LENGTH}", "pretrain.data.batch_size=8", "pretrain.training.max_steps=60",
            "pretrain.training.schedule.warmup_steps=2", "pretrain.training.optimizer.lr=0.01",
            "pretrain.validation.times=3", "pretrain.validation.sequences=64", f"pretrain.objective={objective}",
            *overrides,
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(corpus, tmp_path_factory):
    """The corpus as bytes, in windows of 32."""
    return prepare(experiment_of(corpus, "decllm-tiny", "causal_lm").pretrain.data, tmp_path_factory.mktemp("data"))


def batches_of(experiment, data, count):
    pretrain = experiment.pretrain
    batches = TrainBatches(data, pretrain.objective, experiment.model.family, pretrain.masks, seed=0)
    return [batches.whole(k) for k in range(count)]


# --- cost ----------------------------------------------------------------------------------------------------------


def shapes_in(batch):
    """What each row puts through a model, read off the batch itself; padding is none of it."""
    lengths = torch.as_tensor(batch.inputs.get("source_lengths", batch.inputs.get("source_length", 0))).tolist()
    counted = batch.weights.sum(1).tolist()
    for row, targets in enumerate(counted):
        source = lengths[row] if isinstance(lengths, list) else lengths
        if "source_BS" in batch.inputs:
            source = source or batch.inputs["source_BS"].shape[1]
            yield Shape(source=source, target=targets, outputs=targets)
        else:
            tokens = batch.weights[row].nonzero().max().item() + 1
            prefix = batch.inputs.get("prefix_length", 0)
            prefix = prefix[row].item() if isinstance(prefix, torch.Tensor) else prefix
            yield Shape(source=0, target=tokens, outputs=targets, prefix=prefix, partial=source)


CASES = [
    *[(preset, objective, []) for preset in ("decllm-tiny", "redllm-tiny") for objective in (SPANS, MIXTURE, GEMMA)],
    ("decllm-tiny", SPANS, [OPEN]),
    ("decllm-tiny", MIXTURE, [OPEN]),
    ("decllm-tiny", SPANS, [PALM]),
    ("decllm-tiny", "{kind: ul2, mix: ul2r}", [PALM, OPEN]),
    ("redllm-tiny", "{kind: prefix_lm, split: random}", []),
    ("decllm-tiny", "causal_lm", []),
]


@pytest.mark.parametrize(("preset", "objective", "overrides"), CASES)
def test_the_plan_costs_what_the_batches_hold(corpus, data, preset, objective, overrides):
    """FLOPs and loss tokens are the mean over real rows, exactly where lengths are fixed and else to three standard
    errors; no row needs more than memory was planned for."""
    experiment = experiment_of(corpus, preset, objective, *overrides)
    model, found, largest = resolve_model(experiment.model), cost_of(experiment), largest_shape(experiment)
    shapes = [shape for batch in batches_of(experiment, data, 200) for shape in shapes_in(batch)]
    flops = np.array([train_flops(model, shape) for shape in shapes])
    targets = np.array([shape.outputs for shape in shapes])
    windows = 8 * 60
    for values, expected in ((flops, found.train_flops / windows), (targets, found.loss_tokens / windows)):
        error = values.std() / math.sqrt(len(values))
        assert abs(values.mean() - expected) <= 3 * error + 1e-9 * expected + 0.5 / windows
    for name in ("source", "target", "outputs", "prefix", "partial"):
        most = max(getattr(shape, name) for shape in shapes)
        assert most <= getattr(largest, name)
        if "ul2r" not in objective and "random" not in objective:  # whose extremes are rare
            assert most == getattr(largest, name)


def test_masked_tokens_cost_an_encoder_its_window_and_the_logits_of_the_hidden(tmp_path, corpus):
    """30% of 32 tokens are asked for: 10 rows of the vocabulary, 32 of everything else."""
    file = tmp_path / "encoder.yaml"
    file.write_text(ENCODER)
    experiment = experiment_of(corpus, str(file), "masked_lm")
    [(_, lengths)] = experiment.pretrain.objective.lengths(LENGTH)
    assert shape_of(experiment, lengths) == Shape(source=32, target=0, outputs=10)


# --- identity of the draws -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [PrefixLM(split="random"), SpanCorruption(), UL2(), MaskedLM()])
def test_what_becomes_of_a_window_depends_on_the_seed_and_its_number_alone(objective):
    """Not on the batch that it comes in: batches of 3, 4 and 6 give the same twelve examples."""
    windows = np.random.default_rng(0).integers(2, TEXT, (12, LENGTH))
    family = "encoder_only" if isinstance(objective, MaskedLM) else "decoder"

    def rows(size, seed=5):
        found = []
        collator = WindowCollator(objective, family, MasksConfig(), TEXT, seed)
        for first in range(0, 12, size):
            batch = collator.batch(windows[first : first + size], first)
            for inputs, counted in zip(batch.inputs["tokens_BT"].tolist(), batch.weights.tolist(), strict=True):
                while inputs[-1] == 0:  # padding
                    inputs.pop()
                found.append((inputs, sum(counted)))
        return found

    assert rows(3) == rows(4) == rows(6)
    assert rows(3) != rows(3, seed=6)


# --- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
@pytest.mark.parametrize("family", ["decoder", "decoder_decoder"])
def test_a_decoder_reads_the_corrupted_text_and_is_asked_for_the_spans_alone(family, prefix):
    windows = np.random.default_rng(0).integers(2, TEXT, (3, LENGTH))
    masks = MasksConfig(prefix=prefix)
    batch = WindowCollator(SpanCorruption(), family, masks, TEXT).batch(windows)
    for row, window in enumerate(windows):
        made = SpanCorruption().example(window, _generator(0, row), TEXT)
        inputs = [BOS, *made.source.tolist(), *made.target.tolist()]
        assert batch.inputs["tokens_BT"][row].tolist() == inputs[:-1]
        assert batch.targets[row].tolist() == inputs[1:]
        assert batch.targets[row][batch.weights[row].bool()].tolist() == made.target.tolist()
    assert batch.inputs["source_length"] == 1 + len(made.source)
    assert ("prefix_length" in batch.inputs) == (prefix == "bidirectional")


def _generator(seed, number):
    from lit_llm.data.batches import hashed

    return np.random.default_rng(hashed(seed, "window", number))


def test_an_encoder_reads_the_mode_and_the_corrupted_text():
    windows = np.random.default_rng(0).integers(2, TEXT, (40, LENGTH))
    objective = UL2()
    batch = WindowCollator(objective, "encoder_decoder", MasksConfig(), TEXT).batch(windows)
    first = TEXT + objective.extra_ids(LENGTH)["sentinels"]
    assert set(batch.inputs["source_BS"][:, 0].tolist()) == {first, first + 1, first + 2}
    assert (batch.inputs["target_BT"][:, 0] == BOS).all()


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_vocabulary_without_room_for_the_extra_ids_is_refused_with_the_number_needed(corpus):
    """32 bytes: 16 tokens go at 50%, 5 spans of 3; three mode tokens."""
    with pytest.raises(InputError, match=r"vocabulary: 265 rows .* 258 tokens and 5 sentinels, 3 mode tokens of ul2"):
        experiment_of(corpus, "decllm-tiny", "ul2", "model.vocabulary=265")
    with pytest.raises(InputError, match=r": 266 are needed"):
        experiment_of(corpus, "decllm-tiny", "ul2", "model.vocabulary=265")
    assert experiment_of(corpus, "decllm-tiny", "ul2", "model.vocabulary=266")
    assert experiment_of(corpus, "decllm-tiny", "{kind: ul2, mode_tokens: false}", "model.vocabulary=263")


@pytest.mark.parametrize("preset", ["decllm-tiny", "redllm-tiny"])
def test_masked_lm_is_for_encoder_only_models(corpus, preset):
    with pytest.raises(InputError, match=r"pretrain\.objective: masked_lm asks for tokens in their own places"):
        experiment_of(corpus, preset, "masked_lm")


@pytest.mark.parametrize("objective", [CausalLM(), PrefixLM(), SpanCorruption(), UL2()])
def test_an_encoder_only_model_takes_masked_lm_alone(objective):
    assert "use `objective: masked_lm`" in misfit(objective, "encoder_only")
    assert misfit(MaskedLM(), "encoder_only") == ""
    for family in ("decoder", "encoder_decoder", "decoder_decoder"):
        assert misfit(objective, family) == ""
        assert misfit(MaskedLM(), family)


@pytest.mark.parametrize("objective", [SPANS, MIXTURE])
def test_spans_of_several_documents_have_no_separate_documents(corpus, objective):
    with pytest.raises(InputError, match=r"masks.intra_document: with (span_corruption|ul2)"):
        experiment_of(corpus, "decllm-tiny", objective, "pretrain.masks.intra_document=true")


# --- identity -------------------------------------------------------------------------------------------------------


def test_one_mixture_has_one_name_however_it_is_written_and_another_has_another(corpus):
    def name(objective):
        return pretrain_fingerprint(experiment_of(corpus, "decllm-tiny", objective))

    listed = "{kind: ul2, mix: [{mode: r, mean_span: 3, corruption: 0.15}, {mode: s, corruption: 0.25, weight: 2}]}"
    halves = listed.replace("weight: 2", "weight: 4").replace("0.15}", "0.15, weight: 2}")
    assert name(listed) == name(halves)
    others = ["ul2", "{kind: ul2, mode_tokens: false}", "{kind: ul2, mix: ul2r}", "{kind: ul2, modes: {s: 1}}", SPANS]
    others += ["{kind: span_corruption, mean_span: 4}", "causal_lm", "prefix_lm", listed]
    assert len({*map(name, others)}) == len(others)


# --- the primary metric -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["decllm-tiny", "redllm-tiny"])
def test_every_objective_is_asked_for_the_same_tokens_given_the_same_prefix(corpus, data, preset):
    """With mode tokens, S's stands before it, and there is no other difference."""
    found = {}
    for objective in ("causal_lm", SPANS, GEMMA, MIXTURE):
        experiment = experiment_of(corpus, preset, objective)
        pretrain = experiment.pretrain
        validation = Validation(pretrain.validation, data, pretrain.objective, experiment.model.family, pretrain.masks)
        found[objective] = validation.sources[0].target_batches
    name = "tokens_BT" if preset == "decllm-tiny" else "source_BS"
    opening = UL2().opening(LENGTH, TEXT)[0]
    for plain, *same, marked in zip(*found.values(), strict=True):
        for other in same:
            assert torch.equal(other.inputs[name], plain.inputs[name])
        place = 1 if name == "tokens_BT" else 0  # behind <s>
        assert (marked.inputs[name][:, place] == opening).all()
        without = torch.cat([marked.inputs[name][:, :place], marked.inputs[name][:, place + 1 :]], 1)
        assert torch.equal(without, plain.inputs[name])
        asked = [batch.targets[batch.weights.bool()] for batch in (plain, *same, marked)]
        assert all(torch.equal(asked[0], other) for other in asked)


# --- learning -------------------------------------------------------------------------------------------------------

RUNS = [
    *[(preset, objective) for preset in ("decllm-tiny", "redllm-tiny") for objective in (SPANS, MIXTURE, GEMMA)],
    ("decllm-tiny", f"{SPANS}\n{OPEN}"),
    ("decllm-tiny", f"{SPANS}\n{PALM}"),
    ("redllm-tiny", "{kind: ul2, modes: {r: 0.25, s: 0.5, x: 0.25}}"),
]


@pytest.mark.parametrize(("preset", "objective"), RUNS)
def test_training_lowers_the_loss(tmp_path, corpus, preset, objective):
    """From near the uniform ln V, for the objective and the primary metric; and the tokens are those of the plan."""
    objective, *overrides = objective.split("\n")
    experiment, store = experiment_of(corpus, preset, objective, *overrides), Store(tmp_path)
    prepare(experiment.pretrain.data, store.data)
    stage = save_stage_config(store.open(), stage_graph(experiment)[0], experiment)
    assert run_one(tmp_path, stage.fingerprint) == "done"
    result = stage.result()
    for name in ("val/objective_loss", "val/target_nll"):
        assert result["initial"][name] == pytest.approx(math.log(280), abs=1.0)
        assert result["metrics"][name] < result["initial"][name] - 0.5
    assert result["loss_tokens"] == pytest.approx(cost_of(experiment).loss_tokens, rel=0.1 if "ul2" in objective else 0)


ENCODER = """
extends: [_paper, _tiny]
model: {family: encoder_only, encoder: {layers: 2}, embedding: {norm: true}, output: {head: dense, bias: true}}
"""


@pytest.mark.parametrize("objective", ["masked_lm", "{kind: masked_lm, rate: 0.5, replacement: mask}"])
def test_an_encoder_only_model_learns_masked_lm_and_is_measured_on_hidden_tokens(tmp_path, corpus, objective):
    file, store = tmp_path / "encoder.yaml", Store(tmp_path)
    file.write_text(ENCODER)
    experiment = experiment_of(corpus, str(file), objective)
    prepare(experiment.pretrain.data, store.data)
    stage = save_stage_config(store.open(), stage_graph(experiment)[0], experiment)
    assert run_one(tmp_path, stage.fingerprint) == "done"
    result = stage.result()
    assert result["initial"].keys() == {"val/objective_loss", "val/masked_nll"}
    for name in result["initial"]:
        assert result["initial"][name] == pytest.approx(math.log(280), abs=1.0)
        assert result["metrics"][name] < result["initial"][name] - 0.5
    assert result["loss_tokens"] == cost_of(experiment).loss_tokens
    with pytest.raises(InputError, match="writes no text"):
        open_finished(store, stage.fingerprint).generate(["a"], 3, Sampling())


def test_hidden_tokens_are_the_same_for_every_model_whatever_was_hidden_in_its_training(data):
    """15% of each window, all of them [MASK]."""
    config = ValidationConfig(sequences=16)
    found = [
        Validation(config, data, MaskedLM(rate=rate), "encoder_only", MasksConfig()).sources[0].target_batches
        for rate in (0.3, 0.6)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.inputs["tokens_BT"], other.inputs["tokens_BT"])
        assert torch.equal(one.weights, other.weights)
        hidden = one.inputs["tokens_BT"][one.weights.bool()]
        assert hidden.unique().tolist() == [TEXT]
        assert one.weights.sum(1).unique().tolist() == [round(0.15 * LENGTH)]


def test_the_objective_loss_is_that_of_the_same_draws_for_all_arms(corpus, data):
    """By a seed of its own, so that arms of two seeds are measured on the same spans."""
    pretrain = experiment_of(corpus, "redllm-tiny", MIXTURE, "seed=7").pretrain
    validation = Validation(pretrain.validation, data, pretrain.objective, "encoder_decoder", pretrain.masks)
    model = build_model(experiment_of(corpus, "redllm-tiny", MIXTURE).model, seed=0).eval()
    source = validation.sources[0]
    windows = np.concatenate([batch.targets.numpy() for batch in source.target_batches])
    assert len(windows) == sum(map(len, source.objective_batches))
    with torch.no_grad():
        nats = torch.cat([nats_of(model, batch) for batch in source.objective_batches])
    assert_close(torch.tensor(validation(model)["val/objective_loss"]), nats.double().mean().float())


def test_documents_are_scored_after_the_mode_token_that_the_training_scored_them_after(data):
    """The same nats as of examples that have the token written before their prefix."""
    (opening,) = UL2().opening(LENGTH, TEXT)
    model = build("redllm", "vocabulary=280").eval()
    pairs = [(np.arange(5, 5 + n), np.arange(50, 60 + n)) for n in (0, 3, 7)]
    marked = [(np.array([opening, *source]), target) for source, target in pairs]
    options = {"masks": MasksConfig(), "batch_tokens": 64}
    found = dict(score(model, pairs, opening=(opening,), **options))
    for number, nats in score(model, marked, **options):
        assert_close(found[number], nats)
    plain = dict(score(model, pairs, **options))
    assert not np.allclose(plain[1], found[1])

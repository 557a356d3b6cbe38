"""An adapted pretraining: its frozen warm-up, its teacher, its place in the text; killed and resumed, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lit_llm.data.batches import TrainBatches
from lit_llm.data.prepare import open_prepared, prepare
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.models.build import build_model
from lit_llm.objectives.config import PrefixLM
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_config import load_stage_config, save_stage_config
from lit_llm.runs.stage_graph import stage_graph
from lit_llm.runs.warm_start import windows_before
from lit_llm.store.store import Stage, Store, read_metrics
from lit_llm.studies.status import last_metrics

SMALL = ["model.d_model=16", "model.vocabulary=258", "model.attention.heads=2", "model.feed_forward.d_ff=32"]
SMALL += ["pretrain.data.tokenizer=bytes", "pretrain.data.sequence_length=32", "pretrain.data.batch_size=4"]
SMALL += ["pretrain.training.schedule.warmup_steps=2", "pretrain.validation={times: 2, sequences: 8}"]
SMALL += ["pretrain.training.execution.log_every=1", "model.decoder.layers=2", "pretrain.training.max_steps=8"]
FRESH = ["model.attention.output_norm_scale=true"]  # the source's attention has no output norm to scale


def adapted(corpus: Path, *overrides: str, source: str = "decllm-tiny", preset: str = "redllm-tiny") -> Experiment:
    text = f'pretrain.data.corpus={{kind: text, files: ["{corpus}/*.txt"]}}'
    its = ["adapt.from.pretrain.training.max_steps=6", "adapt.from.model.decoder.layers=2"]
    return load_experiment(preset, [f"adapt.from={source}", *its, *SMALL, text, *overrides])


def stages(store: Store, experiment: Experiment) -> list[Stage]:
    """Its pretrainings, the sources first."""
    store.open()
    found = []
    for node in stage_graph(experiment):
        prepare((node.source or experiment).pretrain.data, store.data)
        found.append(save_stage_config(store, node, experiment))
    return found


def finish(store: Store, *made: Stage) -> None:
    torch.set_num_threads(1)
    for stage in made:
        assert run_one(store.root, stage.fingerprint) == "done", stage.status()


def stops_after(*steps: int):
    calls = iter(range(10**6))
    return lambda: next(calls) in steps


def weights(stage: Stage) -> dict[str, torch.Tensor]:
    return load_file(stage.checkpoints / "model.safetensors")


def at_stop(stage: Stage) -> dict[str, torch.Tensor]:
    """The model's parameters in the checkpoint of an interrupted run."""
    saved = torch.load(stage.checkpoints / "last.ckpt", weights_only=False)["state_dict"]
    return {name.removeprefix("model."): value for name, value in saved.items()}


@pytest.mark.parametrize(
    "overrides",
    [
        [], ["pretrain.training.optimizer=muon", "model.norm.scale=true"],
        ["pretrain.training.optimizer=adafactor"], ["pretrain.training.precision=bf16"],
        ["pretrain.training.dropout=0.2", "pretrain.training.execution.activation_checkpointing=true"],
    ],
    ids=["adamw", "muon", "adafactor", "bf16", "dropout"],
)  # fmt: skip
def test_a_warm_up_moves_the_fresh_parameters_alone_and_resumes_bit_equal(tmp_path, corpus, overrides):
    """T5Gemma trains what it has drawn with everything else frozen; killed in the middle, and after it."""
    experiment = adapted(corpus, "adapt.warmup_steps=5", *FRESH, *overrides)
    whole, parts = Store(tmp_path / "whole"), Store(tmp_path / "parts")
    finish(whole, *stages(whole, experiment))
    source, own = stages(parts, experiment)
    finish(parts, source)
    first = build_model(experiment.model, experiment.seed).state_dict()
    given = weights(source)
    for name, (_, there) in experiment.adaptation.taken.items():
        first[name] = given[there]

    for steps in (3, 2):  # in the middle, and where it ends
        assert run_one(parts.root, own.fingerprint, stops_after(steps)) == "interrupted"
        moved = {name for name, value in at_stop(own).items() if not torch.equal(value, first[name])}
        assert moved == set(experiment.adaptation.newly_initialised)
    assert run_one(parts.root, own.fingerprint, stops_after(1)) == "interrupted"
    outside = at_stop(own)
    assert all(not torch.equal(outside[name], first[name]) for name in outside if outside[name].dim() > 1)
    finish(parts, own)

    expected = weights(stages(whole, experiment)[-1])
    assert all(torch.equal(value, expected[name]) for name, value in weights(own).items())


def test_without_a_warm_up_all_parameters_move_at_once(tmp_path, corpus):
    experiment = adapted(corpus)
    store = Store(tmp_path)
    source, own = stages(store, experiment)
    finish(store, source)
    assert run_one(store.root, own.fingerprint, stops_after(1)) == "interrupted"
    given = weights(source)
    inside = at_stop(own)
    for name, (_, there) in experiment.adaptation.taken.items():
        assert not torch.equal(inside[name], given[there]), name


def test_the_loss_before_the_first_step_is_that_of_the_source_for_the_same_model(tmp_path, corpus):
    """A causal decoder adapted into itself, under the primary metric that both are measured by."""
    store = Store(tmp_path)
    as_many = "adapt.from.pretrain.validation.final_sequences=1"  # as before the first step
    source, own = stages(store, adapted(corpus, as_many, preset="decllm-tiny"))
    finish(store, source, own)
    before, after = (stage.result() or {} for stage in (source, own))
    assert after["initial"]["val/target_nll"] == pytest.approx(before["metrics"]["val/target_nll"], rel=1e-6)
    assert after["provenance"]["weights"] == before["weights"]
    # Its metrics go on from what its source has read and computed.
    lines = read_metrics(own.metrics_file)
    assert lines[0]["metrics"]["tokens_seen"] == before["tokens"] + after["tokens"] / 8
    assert lines[-1]["metrics"]["flops"] == pytest.approx(before["flops"] + after["flops"])


def test_a_student_that_is_its_teachers_twin_learns_nothing_from_it(tmp_path, corpus):
    """Weight 1: the gradient of KL(p || p) is zero, so no weight moves but by rounding, and nothing decays here."""
    distill = ["adapt.distill={weight: 1.0, temperature: 2.0}", "pretrain.objective=prefix_lm"]
    steady = ["pretrain.training.optimizer={kind: adafactor, parameter_scale: false, lr: 1e-9}"]
    experiment = adapted(corpus, *distill, *steady, preset="decllm-tiny")
    store = Store(tmp_path)
    finish(store, *(made := stages(store, experiment)))
    found = [line["metrics"]["train/teacher_divergence"] for line in read_metrics(made[-1].metrics_file)]
    assert len(found) == 8
    assert max(map(abs, found)) < 1e-6


def test_a_distilled_step_is_that_of_the_plain_formula(tmp_path, corpus):
    """One batch by hand: (1 - w) NLL + w KL(teacher || student), the teacher reading source and target as one text."""
    experiment = adapted(corpus, "adapt.distill={weight: 0.3}", "pretrain.training.execution.micro_batch_size=3")
    store = Store(tmp_path)
    source, own = stages(store, experiment)
    finish(store, source)
    assert run_one(store.root, own.fingerprint, stops_after(1)) == "interrupted"
    _, metrics = last_metrics(own)

    teacher_config = experiment.adapt.sides["decoder"].model
    teacher, student = build_model(teacher_config), build_model(experiment.model, experiment.seed)
    given = weights(source)
    teacher.load_state_dict(given)
    taken = {name: given[there] for name, (_, there) in experiment.adaptation.taken.items()}
    student.load_state_dict(taken, strict=False)
    data = open_prepared(experiment.pretrain.data, store.data, load_stage_config(own).data)
    masks, begin = experiment.pretrain.masks, windows_before(experiment)
    windows = TrainBatches(data, PrefixLM(), "encoder_decoder", masks, 0, begin)
    batch = windows.whole(0)
    logits = student(batch.inputs["source_BS"], batch.inputs["target_BT"])
    bos = torch.ones(4, 1, dtype=torch.long)
    text = torch.cat([bos, batch.inputs["source_BS"], batch.targets[:, :-1]], 1)
    p = teacher(text)[:, 16:].softmax(-1)
    divergence = (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert metrics["train/teacher_divergence"] == pytest.approx(divergence.item(), rel=1e-5)
    assert metrics["train/loss"] == pytest.approx(nll.item(), rel=1e-5)
    (0.7 * nll + 0.3 * divergence.mean()).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in student.parameters()]).norm()
    assert metrics["stability/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_an_adapted_model_goes_on_in_the_text_where_its_source_stopped(tmp_path, corpus):
    """Source and adaptation together read what one training from scratch reads that is as long as both."""
    experiment = adapted(corpus)
    assert windows_before(experiment) == 6 * 4
    prepared = prepare(experiment.pretrain.data, Store(tmp_path).data)
    parts = PrefixLM(), "decoder", experiment.pretrain.masks, 0
    scratch, later = TrainBatches(prepared, *parts), TrainBatches(prepared, *parts, windows_before(experiment))
    for step in range(3):
        for mine, its in zip(later.places(step), scratch.places(6 + step), strict=True):
            assert np.array_equal(mine, its)


def test_in_another_text_nothing_was_read_before(corpus):
    assert windows_before(adapted(corpus, "adapt.from.pretrain.data.corpus=python-stdlib")) == 0
    assert windows_before(adapted(corpus, "adapt.from.pretrain.data.sequence_length=16")) == 0

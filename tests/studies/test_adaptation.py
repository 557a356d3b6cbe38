"""Studies of adapted arms: a source is planned and run once, and what it took is on both sides of the comparison."""

from __future__ import annotations

import pytest

from lit_llm.config.problems import InputError
from lit_llm.experiment.cost import cost_of
from lit_llm.report.tables.plan import render_plan
from lit_llm.runs.step_timing import StepTiming
from lit_llm.store.garbage_collection import find
from lit_llm.store.store import Store, write_json
from lit_llm.studies.duration import estimated, steps_of
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.studies.run import Observer, run_study
from lit_llm.studies.runs import trained_fingerprint
from lit_llm.sweeps.sweep import load_sweep

SOURCE = "{extends: decllm-tiny, model: {decoder: {layers: 2}}, pretrain: {training: {max_steps: 6}}}"
ARMS = f"""
arms:
  scratch: {{}}
  adapted: {{adapt: {{from: {SOURCE}}}}}
  merged: {{adapt: {{from: {SOURCE}}}, model: {{decoder: {{cross_attention_mode: merged}}}}}}
"""


def run(path, store, **options):
    return run_study(load_study(path), store, observer=Observer(), max_parallel=2, **options)


def test_arms_share_the_pretraining_that_they_are_adapted_from(write_study, tmp_path):
    store = Store(tmp_path / "store")
    path = write_study("shared", ARMS, seeds=[0, 1])
    planned = plan(load_study(path))
    assert planned.stages == {"pretrain": 6, "source": 2}
    assert not planned.refused
    finished = run(path, store)
    runs = {run.name: run for run in finished.runs}
    assert {run.status()["state"] for run in finished.runs} == {"done"}
    source, own = runs["adapted/seed 0"].steps
    assert source.stage.fingerprint == runs["merged/seed 0"].steps[0].stage.fingerprint
    assert source.stage.fingerprint != runs["adapted/seed 1"].steps[0].stage.fingerprint
    # Each under its own name, and what both have taken.
    metrics, result = runs["adapted/seed 0"].metrics(), runs["adapted/seed 0"].result().result
    assert metrics["source/val/target_nll"] == source.stage.result()["metrics"]["val/target_nll"]
    assert metrics["val/target_nll"] == own.stage.result()["metrics"]["val/target_nll"]
    assert result["flops"] == source.stage.result()["flops"] + own.stage.result()["flops"]
    assert result["flops"] == pytest.approx(cost_of(runs["adapted/seed 0"].experiment).train_flops)
    assert not any(run.stale() for run in finished.runs)
    assert run(path, store).exit_code == 0
    assert trained_fingerprint(f"{path}:adapted", [], store, 0, "source") == source.stage.fingerprint
    assert trained_fingerprint(f"{path}:adapted", [], store, 0, "") == own.stage.fingerprint
    assert not [item for item in find(store).garbage if item.path == source.stage.folder]  # a study lists it


def test_what_is_adapted_from_a_repeated_source_is_repeated_and_from_a_lost_one_never_run(write_study, tmp_path):
    store = Store(tmp_path / "store")
    path = write_study("repeated", ARMS.replace("scratch: {}", ""), seeds=[0])
    first = run(path, store).runs
    source = first[0].steps[0].stage
    result = source.result()
    write_json(source.folder / "result.json", result | {"provenance": result["provenance"] | {"code": "older"}})
    before = [each.last.folder.joinpath("result.json").stat().st_mtime_ns for each in first]
    again = run(path, store, rerun="stale").runs
    assert all(
        each.last.folder.joinpath("result.json").stat().st_mtime_ns > old
        for each, old in zip(again, before, strict=True)
    )

    lost = write_study("lost", ARMS.replace("max_steps: 6", "max_steps: 6, optimizer: {lr: 1e9}"), seeds=[0])
    states = {each.arm.name: each.status()["state"] for each in run(lost, store).runs}
    assert states == {"scratch": "done", "adapted": "diverged", "merged": "diverged"}


def test_equal_compute_is_that_of_source_and_adaptation_together(write_study):
    """The scratch arm's 400 steps against so many that, with the source's 100, cost the same."""
    path = write_study("equal", ARMS.replace("max_steps: 6", "max_steps: 100") + "match: {by: train_flops}\n")
    path.write_text(path.read_text().replace("max_steps: 12", "max_steps: 400"))
    found = plan(load_study(path))
    scratch, adapted, _ = found.arms
    assert adapted.cost.train_flops == pytest.approx(scratch.cost.train_flops, rel=0.01)
    source = adapted.arm.experiment.adapt.source.seeded(0)
    own = adapted.cost.flops_per_step * adapted.arm.experiment.pretrain.training.max_steps
    assert adapted.cost.train_flops == pytest.approx(own + cost_of(source).train_flops)
    assert source.pretrain.training.max_steps == 100
    assert not found.refused


def test_a_warm_up_of_what_is_fresh_is_scaled_with_the_steps(write_study):
    """A causal LM has twice a prefix LM's targets in a step, so half the steps are left, and half of the warm-up.

    As it was, of 110 steps, it would leave none to train all parameters.
    """
    arms = """
arms:
  red: {}
  adapted:
    extends: decllm-tiny
    model: {attention: {output_norm: head, output_norm_scale: true}}
    adapt:
      from: {extends: decllm-tiny, model: {attention: {output_norm_scale: false}}, pretrain: {training: {max_steps: 2}}}
      warmup_steps: 110
match: {by: loss_tokens}
"""
    path = write_study("warm", arms)
    path.write_text(path.read_text().replace("max_steps: 12", "max_steps: 200"))
    found = plan(load_study(path), built=False)
    derived = found.arms[1].arm.matched_keys
    assert derived["pretrain.training.max_steps"] == [200, 98]  # 100, less the source's two
    assert derived["adapt.warmup_steps"] == [110, round(110 * 98 / 200)]
    (told,) = [finding.message for finding in found.findings if finding.key == "match.by"]
    assert "adapt.warmup_steps 110 → 54" in told


def test_a_level_reaches_the_source_as_the_base_does(write_study):
    """Else the level would switch how much is fresh, too. A `from` that says its own keeps its own."""
    grid = "grid: {factors: {model.attention.output_norm_scale: [false, true]}}"
    norm = "model: {attention: {output_norm: head}"
    path = write_study("levels", f"arms: {{red: {{{norm}}}, adapt: {{from: {SOURCE}}}}}}}\n{grid}")
    source = SOURCE.replace("model: {", "model: {attention: {output_norm: head}, ")
    path.write_text(path.read_text().replace(SOURCE, source))
    found = plan(load_study(path), built=False)
    scaled = [arm.arm.experiment.adapt.source.model.attention.output_norm_scale for arm in found.arms]
    assert scaled == [False, True]
    assert [arm.arm.experiment.adaptation.newly_initialised for arm in found.arms] == [(), ()]
    assert not found.refused
    held = source.replace("output_norm: head", "output_norm: head, output_norm_scale: false")
    path.write_text(path.read_text().replace(source, held))
    kept = [arm.experiment.adapt.source.model.attention.output_norm_scale for arm in load_study(path).arms]
    assert kept == [False, False]


def test_tensors_that_are_used_otherwise_are_noted_and_not_refused(write_study):
    arms = f"arms: {{red: {{}}, other: {{model: {{attention: {{output_norm: concat}}}}, adapt: {{from: {SOURCE}}}}}}}"
    found = plan(load_study(write_study("otherwise", arms)), built=False)
    told = [finding for finding in found.findings if "is not used as before" in finding.message]
    assert [finding.kind for finding in told] == ["note"]
    assert "attention.output_norm" in told[0].message
    assert "→ concat" in told[0].message


def test_a_source_dearer_than_the_baseline_is_refused(write_study):
    found = plan(
        load_study(write_study("dear", ARMS.replace("max_steps: 6", "max_steps: 100") + "match: {by: train_flops}"))
    )
    assert {finding.key for finding in found.refused} == {"match.by"}
    assert "after matching" in found.refused[0].message


def test_a_plan_shows_the_source_and_its_cost(write_study, tmp_path):
    from rich.console import Console

    found = plan(load_study(write_study("shown", ARMS)))
    (source,) = {node.fingerprint for arm in found.arms for node in arm.stage_graphs[0] if node.source}
    as_json = found.as_json()["arms"][1]
    assert as_json["fingerprints"]["source"] == [source]
    assert as_json["source"]["flops"] == found.arms[1].cost.before.train_flops > 0
    assert as_json["differs"]["adapt.from"][0] is None
    assert as_json["differs"]["adapt.from"][1].endswith("parameters, 6 steps")
    told = [finding.message for finding in found.findings if finding.arm == "adapted" and finding.key == "adapt.from"]
    assert "tensors are taken over" in told[0]
    assert "are counted" in told[1]
    timed = estimated(found, 1, dict.fromkeys(steps_of(found, 1), StepTiming(1.0)), Store(tmp_path)).estimate
    assert timed.arms["adapted"].total == pytest.approx(timed.arms["adapted"].before + timed.arms["adapted"].run)
    alone = timed.arms["scratch"].run + timed.arms["adapted"].run + timed.arms["merged"].run
    assert timed.seconds == pytest.approx(alone + timed.arms["adapted"].before)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_plan(found, 120))
    assert "1 x source, 3 x pretrain" in " ".join(console.export_text().split())


def test_what_is_fresh_and_what_is_left_behind_is_named(write_study):
    source = SOURCE.replace("layers: 2", "layers: 4")
    scaled = "model: {attention: {output_norm_scale: true}}"
    found = plan(
        load_study(write_study("named", f"arms: {{red: {{}}, other: {{{scaled}, adapt: {{from: {source}}}}}}}")),
        built=False,
    )
    (first, *_) = [finding.message for finding in found.findings if finding.key == "adapt.from"]
    assert "newly initialised: encoder.layers.*.self_attention.output_scale" in first
    assert "unused: decoder.layers.1, decoder.layers.2" in first


def test_a_source_of_an_experiment_is_a_factor_like_any_other(write_study, tmp_path):
    (tmp_path / "long.yaml").write_text("extends: decllm-tiny\npretrain: {training: {max_steps: 24}}\n")
    rest = "grid: {factors: {adapt.from: [decllm-tiny, long.yaml]}}"
    found = load_study(write_study("factor", rest))
    steps = [arm.experiment.adapt.source.pretrain.training.max_steps for arm in found.arms]
    assert steps == [12, 12]  # the base's, as for every arm
    rest = "grid: {factors: {adapt.from.pretrain.training.max_steps: [12, 24]}}\nbase_of: x"
    found = load_study(write_study("factors", rest.partition("\n")[0] + "\narms: {red: {adapt: {from: decllm-tiny}}}"))
    assert [arm.experiment.adapt.source.pretrain.training.max_steps for arm in found.arms] == [12, 24]


def test_a_wrong_source_is_told_once_with_its_line(write_study):
    path = write_study(
        "wrong",
        "arms: {red: {}, other: {adapt: {from: nowhere}}}\ngrid: {factors: {model.tie_embeddings: [all, none]}}",
    )
    with pytest.raises(InputError) as error:
        load_study(path)
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if "nowhere" in text)
    assert f"{path}:{line}: adapt.from: there is no preset and no file 'nowhere'" in str(error.value)
    assert len(error.value.problems) == 1


def test_a_sweep_searches_the_pretraining_alone(write_sweep):
    space = "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-2]}}"
    goal = "optimize: [{metric: val/target_nll, direction: minimize}]"
    path = write_sweep("swept", f"arms: {{red: {{adapt: {{from: decllm-tiny}}}}}}\n{space}\n{goal}")
    with pytest.raises(InputError, match="a sweep searches the pretraining; leave `adapt` to a study"):
        load_sweep(path)

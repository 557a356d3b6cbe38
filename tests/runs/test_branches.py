"""Branches of one trunk: the bits of trainings that were never cut, each step of the trunk computed once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_llm.config.problems import InputError
from lit_llm.data.prepare import prepare
from lit_llm.experiment.cost import cost_of
from lit_llm.experiment.schema import Experiment
from lit_llm.report.tables.plan import flops_of
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_config import save_stage_config
from lit_llm.runs.stage_graph import StageNode, stage_graph
from lit_llm.runs.time_estimate import START_SECONDS, seconds_of, trunk_seconds
from lit_llm.runs.trained_model import has_lost_weights
from lit_llm.store.garbage_collection import find, list_runs
from lit_llm.store.store import Stage, Store, read_metrics
from lit_llm.studies.load import Arm, load_study
from lit_llm.studies.plan import plan
from lit_llm.studies.runs import Run
from lit_llm.sweeps.sweep import load_sweep
from lit_llm.training.config import TrainingConfig
from lit_llm.training.schedules import WarmupStableDecay
from tests.stages_in_parts import numbers, stops_after, tiny_experiment

WSD = "pretrain.training.schedule={kind: wsd, warmup_steps: 2, decay_steps: 4%s}"
SPACE = """
space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-2]}}
optimize: [{metric: val/target_nll, direction: minimize}]
"""
STEPS = "pretrain.training.max_steps="
TRAINED = ("steps", "tokens", "loss_tokens", "flops", "weights", "initial")


def trained(store: Store, experiment: Experiment, stop: Callable[[], Callable[[], bool]] | None = None) -> Stage:
    """The pretraining of an experiment after all its stages; each is stopped once where `stop` is given."""
    prepare(experiment.pretrain.data, store.open().data)
    for node in stage_graph(experiment):
        stage = save_stage_config(store, node, experiment)
        if stop and stage.result() is None:
            assert run_one(store.root, node.fingerprint, stop()) == "interrupted"
        assert run_one(store.root, node.fingerprint) == "done", stage.status()["error"]
    return stage


def weights_of(stage: Stage) -> dict[str, torch.Tensor]:
    return load_file(stage.checkpoints / "model.safetensors")


def same_weights(left: Stage, right: Stage) -> bool:
    tensors, others = weights_of(left), weights_of(right)
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in others)


BATCHES, ROWS = "{begin: 1, increment: 1, steps: 4}", "{begin: 8, steps: 4}"
"""Warm-ups that end before the first branch."""
SHORT, LONG = ("9", "[5, 10]"), ("14", "[5, 10]")
OTHER = ("14", "[3, 10]")
"""(steps, steps of the branches): a branch of a trunk that has other stages before the same end."""


@pytest.mark.parametrize(
    ("preset", "overrides", "branches"),
    [
        (
            "decllm-tiny",
            ["pretrain.training.dropout=0.2", "pretrain.training.execution.micro_batch_size=3"],
            [SHORT, LONG],
        ),
        (
            "decllm-tiny",
            ["pretrain.training.batch_warmup=" + BATCHES, "pretrain.training.sequence_warmup=" + ROWS],
            [LONG],
        ),
        pytest.param(
            "redllm-tiny",
            ["pretrain.training.precision=bf16_master", "pretrain.training.execution.workers=1"],
            [SHORT, LONG, OTHER],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_each_branch_has_the_bits_of_a_training_that_was_never_cut(
    tmp_path: Path, corpus: Path, preset: str, overrides: list[str], branches: list[tuple[str, str]]
) -> None:
    """Its stages were stopped besides; metrics are those of the steps that both have logged."""
    torch.set_num_threads(1)
    store = Store(tmp_path / "store")
    for steps, listed in branches:
        branched = tiny_experiment(corpus, preset, *overrides, STEPS + steps, WSD % f", branch_at: {listed}")
        uncut = tiny_experiment(corpus, preset, *overrides, STEPS + steps, WSD % "")
        branch, alone = trained(store, branched, lambda: stops_after(2)), trained(store, uncut)
        assert branch.fingerprint != alone.fingerprint
        assert same_weights(branch, alone)
        result, wanted = branch.result() or {}, alone.result() or {}
        assert [result[key] for key in TRAINED] == [wanted[key] for key in TRAINED]
        logged = dict(numbers(branch))
        assert [*logged] == ([3, 6, 9, 12, 14] if steps == "14" else [3, 6, 9])
        assert logged[int(steps)] == dict(numbers(alone))[int(steps)]
        run = Run.of(Arm("a", "a", {}, "a", branched), branched.seed, store)
        trunks = [step.stage.result() or {} for step in run.steps if step.node.kind == "trunk"]
        assert [trunk["initial"] for trunk in trunks] == [wanted["initial"]] * len(trunks)
        assert run.result().result["flops"] == wanted["flops"]
        assert not run.stale()


def test_a_trunk_that_died_after_its_last_checkpoint_has_nothing_to_compute(tmp_path: Path, corpus: Path) -> None:
    store = Store(tmp_path)
    experiment = tiny_experiment(corpus, "decllm-tiny", STEPS + "9", WSD % ", branch_at: [5]")
    branch = trained(store, experiment)
    trunk = store.stage(stage_graph(experiment)[0].fingerprint)
    before = trunk.result() or {}
    (trunk.folder / "result.json").unlink()
    assert run_one(store.root, trunk.fingerprint) == "done"
    assert [(trunk.result() or {})[key] for key in ("weights", "steps", "loss_tokens")] == [
        before[key] for key in ("weights", "steps", "loss_tokens")
    ]
    assert [line["step"] for line in read_metrics(trunk.metrics_file)] == [3]
    assert branch.result() is not None


def test_a_damaged_checkpoint_of_a_trunk_is_named_and_recomputed(tmp_path: Path, corpus: Path) -> None:
    """The garbage collector leaves it, too."""
    store = Store(tmp_path)
    experiment = tiny_experiment(corpus, "decllm-tiny", STEPS + "9", WSD % ", branch_at: [5]")
    other = tiny_experiment(corpus, "decllm-tiny", STEPS + "9", WSD % ", branch_at: [5], shape: linear")
    branch = trained(store, experiment)
    node, rest = stage_graph(other)
    assert node.fingerprint == stage_graph(experiment)[0].fingerprint
    trunk = store.stage(node.fingerprint)
    list_runs(store, "study", "file", [], [{"arm": "a", "seed": 0, "fingerprint": branch.fingerprint}])
    assert find(store).garbage == ()
    assert not has_lost_weights(trunk)
    with (trunk.checkpoints / "last.ckpt").open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    assert has_lost_weights(trunk)
    stage = save_stage_config(store, rest, other)
    assert run_one(store.root, stage.fingerprint) == "failed"
    assert f"{trunk.checkpoints / 'last.ckpt'}: is damaged" in stage.status()["error"]
    assert "--rerun failed" in stage.status()["error"]
    trunk.forget()
    stage.retry()
    uncut = tiny_experiment(corpus, "decllm-tiny", STEPS + "9", WSD % ", shape: linear")
    assert same_weights(trained(store, other), trained(store, uncut))


def by_name(experiment: Experiment) -> dict[str, StageNode]:
    return {node.name: node for node in stage_graph(experiment)}


def test_branches_share_the_trunk_up_to_the_first_of_them(corpus: Path) -> None:
    """Only what decides the weights at a step, or the loss before the first, decides the trunk's fingerprint."""

    def nodes(*overrides: str, branch_at: str = "[5, 10]", steps: int = 14) -> dict[str, StageNode]:
        keys = [STEPS + str(steps), WSD % f", branch_at: {branch_at}", *overrides]
        return by_name(tiny_experiment(corpus, "decllm-tiny", *keys))

    long = nodes()
    assert list(long) == ["trunk_5", "trunk_10", "pretrain"]
    assert [(node.begin, node.parents) for node in long.values()] == [
        (0, ()), (5, (long["trunk_5"].fingerprint,)), (10, (long["trunk_10"].fingerprint,)),
    ]  # fmt: skip
    short = nodes(steps=9)
    assert list(short) == ["trunk_5", "pretrain"]
    assert short["trunk_5"] == long["trunk_5"]
    assert short["pretrain"].fingerprint != long["pretrain"].fingerprint
    for same in (
        nodes(branch_at="[10, 20]"),
        nodes("pretrain.training.schedule.final_fraction=0.1"),
        nodes("pretrain.validation={times: 2, final_sequences: 16}"),
    ):
        assert same["trunk_10"].fingerprint == long["trunk_10"].fingerprint
    assert nodes(branch_at="[10, 20]")["pretrain"].fingerprint == long["pretrain"].fingerprint
    for other in (
        nodes("pretrain.training.optimizer.lr=0.1"),
        nodes("pretrain.training.schedule.warmup_steps=3"),
        nodes("pretrain.validation.sequences=4"),  # of the loss before the first step
    ):
        assert other["trunk_5"].fingerprint != long["trunk_5"].fingerprint


@pytest.mark.slow
def test_an_adapted_trunk_begins_with_the_source(tmp_path: Path, corpus: Path) -> None:
    source = "{extends: decllm-tiny, pretrain: {training: {max_steps: 4, schedule: constant}}}"
    fresh = "model.attention.output_norm_scale=true"  # no parameter of the source
    keys = [f"adapt={{from: {source}, warmup_steps: 2}}", STEPS + "9", fresh]
    experiment = tiny_experiment(corpus, "redllm-tiny", *keys, WSD % ", branch_at: [3, 5]")
    nodes = by_name(experiment)
    assert list(nodes) == ["source", "trunk_3", "trunk_5", "pretrain"]
    assert nodes["trunk_5"].parents == (nodes["trunk_3"].fingerprint, nodes["source"].fingerprint)
    store = Store(tmp_path)
    assert same_weights(
        trained(store, experiment), trained(store, tiny_experiment(corpus, "redllm-tiny", *keys, WSD % ""))
    )
    with pytest.raises(InputError, match="2 leave none of the 2 steps before the first branch"):
        tiny_experiment(corpus, "redllm-tiny", *keys, WSD % ", branch_at: [2, 5]")


def test_an_experiment_without_branches_has_no_further_key() -> None:
    assert "branch_at" not in WarmupStableDecay(decay_steps=4).model_dump(mode="json")


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("branch_at: [5, 9]", "begins after step 10 (max_steps 14 - decay_steps 4), which is not among [5, 9]"),
        ("branch_at: [10, 5]", "[10, 5]: give each step once, in rising order"),
        ("branch_at: [10, 10]", "[10, 10]: give each step once, in rising order"),
        ("branch_at: [1, 10]", "step 1 lies in the warm-up of 2 steps; branch at 2 or later"),
        ("branch_at: [0, 10]", "greater than 0"),
    ],
)
def test_branches_that_cannot_be_are_refused(corpus: Path, schedule: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        tiny_experiment(corpus, "decllm-tiny", WSD % f", {schedule}")
    assert message in str(refused.value)
    assert "pretrain.training.schedule" in str(refused.value)


def test_matched_lengths_finetunings_and_sweeps_have_no_trunk(
    write_study: Callable[..., Path], write_two: Callable[..., Path], write_sweep: Callable[..., Path]
) -> None:
    wsd = "training.schedule={kind: wsd, decay_steps: 2, branch_at: [%d]}"
    with pytest.raises(InputError, match=r"match\.by: tokens moves max_steps, and so the step where the decay begins"):
        load_study(write_study("matched", "arms: {a: {}, b: {}}\nmatch: {by: tokens}\n"), [f"pretrain.{wsd % 10}"])
    with pytest.raises(InputError, match=r"finetune\.training\.schedule\.branch_at: only a pretraining has a trunk"):
        load_study(write_two("tuned"), [f"finetune.{wsd % 6}"])
    with pytest.raises(InputError, match=r"pretrain\.training\.schedule\.branch_at: .* a sweep share no trunk"):
        load_sweep(write_sweep("rates", SPACE), [f"pretrain.{wsd % 10}"])
    searched = SPACE.replace("optimizer.lr: {log_uniform: [1e-4, 1e-2]}", "schedule: {choice: [constant, {%s}]}")
    searched %= "kind: wsd, decay_steps: 2, branch_at: [10]"
    with pytest.raises(InputError, match="the trials of a sweep share no trunk"):
        load_sweep(write_sweep("schedules", searched))


def test_plan_names_trunks_and_arms_that_only_list_other_branches(write_study: Callable[..., Path]) -> None:
    schedule = "pretrain: {training: {max_steps: %d, schedule: {kind: wsd, warmup_steps: 2, decay_steps: 4, %s}}}"
    arms = {name: schedule % (steps, listed) for name, steps, listed in (
        ("short", 9, "branch_at: [5, 10]"), ("long", 14, "branch_at: [5, 10]"), ("uncut", 14, "")
    )}  # fmt: skip
    lines = "".join(f"  {name}: {{{keys}}}\n" for name, keys in arms.items())
    rest = "allow: [{key: pretrain.training, because: lengths}, {key: budget, because: lengths}]"
    found = plan(load_study(write_study("lengths", f"arms:\n{lines}compare: {{baseline: long}}\n{rest}", (0, 1))))
    assert found.stages == {"trunk_5": 2, "trunk_10": 2, "pretrain": 6}
    (no_op,) = [finding for finding in found.findings if finding.kind == "no_op"]
    assert no_op.arm == "uncut"
    assert "the learning rate is the same in every step" in no_op.message
    assert list(found.as_json()["arms"][1]["fingerprints"]) == ["trunk_5", "trunk_10", "pretrain"]


@pytest.mark.parametrize(
    "warmup", [[], ["pretrain.training.batch_warmup=" + BATCHES], ["pretrain.training.sequence_warmup=" + ROWS]]
)
def test_plan_counts_every_step_of_the_trunk_once(corpus: Path, warmup: list[str]) -> None:
    """Of branches at 5, 10 and 20 with decays of 4 steps: the 24 steps of the longest, and 2 x 4."""
    flops, seconds = dict[str, float](), dict[str, float]()
    for steps in (9, 14, 24):
        keys = [*warmup, STEPS + str(steps), "pretrain.validation.times=1"]
        experiment = tiny_experiment(corpus, "decllm-tiny", *keys, WSD % ", branch_at: [5, 10, 20]")
        uncut = tiny_experiment(corpus, "decllm-tiny", *keys, WSD % "")
        cost, timed = cost_of(uncut), {"pretrain": 1.0}
        for node in stage_graph(experiment):
            flops[node.fingerprint] = flops_of(node, cost)
            if node.source:
                seconds[node.fingerprint] = trunk_seconds(node.source, 1.0, node.begin)
            else:
                seconds[node.fingerprint] = seconds_of(experiment, timed, begin=node.begin).run
    assert len(flops) == 6
    assert sum(flops.values()) == pytest.approx(cost.train_flops + 2 * 4 * cost.flops_per_step)
    longest = seconds_of(uncut, timed)
    assert sum(seconds.values()) == pytest.approx(longest.run + 2 * (4 + longest.final) + 5 * START_SECONDS)


def test_a_trunk_trains_at_the_peak_after_the_warm_up() -> None:
    """As each branch does before its decay: MiniCPM's schedule (arXiv 2404.06395)."""
    schedule = WarmupStableDecay(warmup_steps=3, decay_steps=4, branch_at=(5, 8))
    training = TrainingConfig(max_steps=12, schedule=schedule)
    assert training.trunks == (5, 8)
    trunk = training.trunk(8)
    assert [trunk.schedule.factor(step, 8) for step in range(8)] == [schedule.factor(step, 12) for step in range(8)]
    assert schedule.factor(7, 12) == 1.0 > schedule.factor(8, 12)


@pytest.mark.slow
def test_a_branch_on_two_sharded_devices_has_the_bits_of_its_uncut_training(tmp_path: Path, corpus: Path) -> None:
    keys = [STEPS + "9", "pretrain.training.execution={devices: 2, strategy: fsdp}"]
    branched, uncut = (tiny_experiment(corpus, "decllm-tiny", *keys, WSD % rest) for rest in (", branch_at: [5]", ""))
    store = Store(tmp_path)
    assert same_weights(trained(store, branched), trained(store, uncut))

"""A study of two stages: each computed once, in order, resumable, with the table of before and after."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import stats

from lit_llm.config.problems import InputError
from lit_llm.data.batches import ExampleBatches
from lit_llm.data.config import ByteTokenizer
from lit_llm.data.examples import ExampleSet
from lit_llm.models.build import build_model
from lit_llm.objectives.config import BOS
from lit_llm.report.tables.plan import render_plan, render_status
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_config import load_stage_config, save_stage_config
from lit_llm.statistics.before_after import before_after
from lit_llm.store.store import Store, read_metrics, write_json
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import load_study
from lit_llm.studies.plan import plan
from lit_llm.studies.run import Observer, run_study
from lit_llm.studies.runs import Run
from tests.two_stages import ARMS_OF_TWO_STAGES

LOSSES = ("target_nll", "perplexity", "bits_per_byte")


def run(path, store, **options):
    return run_study(load_study(path), store, observer=Observer(), max_parallel=2, **options)


def test_a_pretraining_is_shared_and_each_arm_finetuned_and_evaluated(write_two, store):
    path = write_two("two")
    planned = plan(load_study(path))
    assert planned.stages == {
        "pretrain": 4, "examples after pretrain": 4, "finetune": 6, "examples after finetune": 6,
    }  # fmt: skip
    assert not planned.refused
    finished = run(path, store)
    assert finished.exit_code == 0
    by_name = {run.name: run for run in finished.runs}
    dec, biattn, red = (by_name[f"{arm}/seed 0"] for arm in ("dec", "dec_biattn", "red"))
    assert [step.status()["state"] for run in finished.runs for step in run.steps] == ["done"] * 24
    assert dec.steps[0].stage.fingerprint == biattn.steps[0].stage.fingerprint != red.steps[0].stage.fingerprint
    assert dec.metrics()["eval/examples/nll"] == biattn.metrics()["eval/examples/nll"]
    assert dec.metrics()["finetune/eval/examples/nll"] != biattn.metrics()["finetune/eval/examples/nll"]
    # What it cost is what all of its stages cost.
    assert dec.result().result["flops"] == sum(step.stage.result().get("flops", 0) for step in dec.steps)
    # Finetuning has learned something that pretraining had not.
    for run_ in finished.runs:
        assert run_.metrics()["finetune/eval/examples/nll"] < run_.metrics()["eval/examples/nll"] - 0.5
    assert_units_make_up_metrics(red)
    stages = len(list(store.root.glob("stages/*/result.json")))
    assert run(path, store).exit_code == 0
    assert len(list(store.root.glob("stages/*/result.json"))) == stages


def assert_units_make_up_metrics(run_):
    """Of the last evaluation of each training, on both splits, and of the evaluations that follow."""
    result, checked = run_.result(), set()
    for name in result.result["metrics"]:
        if (units := result.units(name)) is not None:
            sums, weights = map(math.fsum, zip(*units.values(), strict=True))
            value = result.metric(name)
            assert sums / weights == pytest.approx(math.log(value) if "perplexity" in name else value, rel=1e-9), name
            checked.add(name)
    splits = {f"{begin}{split}/{kind}" for begin in ("", "finetune/") for split in ("val", "test") for kind in LOSSES}
    assert splits | {"finetune/test/target_nll/odd", "eval/examples/nll", "finetune/eval/examples/nll/even"} < checked
    assert result.units("train/loss") is result.units("val/objective_loss") is None
    series = [line["metrics"] for line in read_metrics(run_.steps[0].stage.metrics_file)]
    assert sum("val/target_nll" in line for line in series) == 3
    assert ["test/target_nll" in line for line in series] == [False] * (len(series) - 1) + [True]
    assert series[-1]["val/target_nll"] == result.metric("val/target_nll")


def test_finetuning_begins_with_the_pretrained_weights_and_steps_as_torch_does(write_two, store):
    """AdamW of torch, on the loss of plain forward passes over the same examples."""
    rest = "arms: {red: {}}\ncompare: {metric: finetune/val/target_nll}"
    path = write_two("one_step", rest, seeds=[5], tuning="max_steps: 1, clip_norm: null, z_loss: 0.0")
    text = (
        path.read_text().replace("dropout: 0.1", "dropout: 0.0").replace("execution: {log_every: 2}", "execution: {}")
    )
    path.write_text(text)
    (only,) = run(path, store).runs
    pretrained, finetuned = (only.steps[n].stage for n in (0, 2))
    experiment, frozen = only.experiment, load_stage_config(finetuned)
    examples = ExampleSet(store.data, frozen.examples, ByteTokenizer())
    model = build_model(experiment.model, 0)
    model.load_state_dict(load_file(pretrained.checkpoints / "model.safetensors"))
    config = experiment.finetune.training.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0)
    total, tokens = torch.zeros(()), 0
    for place in ExampleBatches(examples, 4, "encoder_decoder", experiment.finetune.masks, 5).places(0):
        source, target = map(torch.tensor, examples.read("train", place))
        logits = model(source[None], torch.cat([torch.tensor([BOS]), target[:-1]])[None])[0]
        total, tokens = total + F.cross_entropy(logits, target, reduction="sum"), tokens + len(target)
    (total / tokens).backward()
    optimizer.step()
    after = load_file(finetuned.checkpoints / "model.safetensors")
    moved = 0
    for name, parameter in model.named_parameters():
        if config.weight_decay == 0 or parameter.dim() < 2:
            assert torch.allclose(after[name], parameter, atol=1e-5), name
            moved += 1
    assert moved
    assert finetuned.result()["loss_tokens"] == tokens


def test_a_packed_finetuning_learns_what_an_unpacked_one_does(write_two, tmp_path):
    """The same examples in every step, so after eight steps the same weights but for rounding: one stage, one name."""
    rest = "arms: {dec: {extends: decllm-tiny, finetune: {masks: {prefix: bidirectional}}}, red: {}}"
    rest += "\ncompare: {metric: finetune/val/target_nll}"
    path, found = write_two("packed", rest, seeds=[0], tuning="max_steps: 8, clip_norm: null"), {}
    path.write_text(path.read_text().replace("dropout: 0.1", "dropout: 0.0"))
    short, long = ({"inputs": "x" * n, "targets": "y" * m, "task": "a"} for n, m in ((1, 1), (8, 3)))
    lines = [{**record, "inputs": f"{n % 10}{record['inputs']}"} for n in range(60) for record in (short, long)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for packing in ("none", "greedy"):
        study = load_study(path, [f"finetune.data.packing={packing}"])
        store = Store(tmp_path / packing)
        found[packing] = run_study(study, store, observer=Observer(), max_parallel=2).runs
    for one, two in zip(found["none"], found["greedy"], strict=True):
        stages = [each.steps[2].stage for each in (one, two)]
        assert stages[0].folder.name == stages[1].folder.name
        results = [stage.result() for stage in stages]
        assert results[0]["loss_tokens"] == results[1]["loss_tokens"]
        assert results[1]["provenance"]["packing"] == "greedy"
        examples = ExampleSet(store.data, load_stage_config(stages[1]).examples, ByteTokenizer())
        masks = two.experiment.finetune.masks
        batches = ExampleBatches(examples, 4, two.experiment.model.family, masks, 0, packed=True)
        assert sum(len(batches[k]) for k in range(8)) < 8 * 4
        losses = [result["metrics"]["val/target_nll"] for result in results]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert losses[0] != results[0]["initial"]["val/target_nll"]


def test_an_interrupted_finetuning_goes_on_to_the_same_weights(write_two, tmp_path):
    rest = "arms: {dec: {extends: decllm-tiny}}\ncompare: {metric: finetune/val/target_nll}"
    path = write_two("resumed", rest, seeds=[0])
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    (one,) = run(path, whole).runs
    (two,) = run(path, broken).runs
    tuned = two.steps[2].stage
    tuned.forget()
    save_stage_config(broken, two.steps[2].node, two.experiment)
    calls = iter(range(100))
    assert run_one(broken.root, tuned.fingerprint, lambda: next(calls) >= 4) == "interrupted"
    assert tuned.status()["state"] == "interrupted"
    assert run(path, broken).exit_code == 0
    files = [each.steps[2].stage.checkpoints / "model.safetensors" for each in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()
    lines = [read_metrics(each.steps[2].stage.metrics_file) for each in (one, two)]
    assert [(x["step"], x["metrics"].get("val/target_nll")) for x in lines[0]] == [
        (x["step"], x["metrics"].get("val/target_nll")) for x in lines[1]
    ]


def test_nothing_follows_a_pretraining_that_did_not_end_well(write_two, tmp_path):
    store = Store(tmp_path / "store")
    rest = ARMS_OF_TWO_STAGES.replace("red: {}", "red: {pretrain: {training: {optimizer: {lr: 1e9}}}}")
    rest += "allow: [{key: pretrain.training.optimizer, because: it is to diverge}]"
    path = write_two("diverges", rest, seeds=[0])
    finished = run(path, store)
    states = {run.name: run.status()["state"] for run in finished.runs}
    assert states == {"dec/seed 0": "done", "dec_biattn/seed 0": "done", "red/seed 0": "diverged"}
    red = finished.runs[-1]
    assert [step.status()["state"] for step in red.steps] == ["diverged", "pending", "pending", "pending"]
    assert finished.exit_code == 0  # divergence is a result
    row = finished.comparison.rows[-1]
    assert (row.arm, row.mean, row.diverged) == ("red", None, 1)
    assert run(path, store).exit_code == 0  # it is as finished as any other


def test_what_follows_a_repeated_stage_is_repeated_too(write_two, tmp_path):
    store = Store(tmp_path / "store")
    path = write_two("stale", "arms: {red: {}}", seeds=[0])
    (first,) = run(path, store).runs
    written = {step.node.name: (step.stage.folder / "result.json").stat().st_mtime_ns for step in first.steps}
    parent = first.steps[0].stage
    old = parent.result()
    write_json(parent.folder / "result.json", old | {"provenance": old["provenance"] | {"code": "older"}})
    assert first.stale()
    run(path, store)
    assert (first.steps[2].stage.folder / "result.json").stat().st_mtime_ns == written["finetune"]
    run(path, store, rerun="stale")
    for step in first.steps:
        assert (step.stage.folder / "result.json").stat().st_mtime_ns > written[step.node.name]


def work_to_do(path, store, rerun=None, only=None):
    """The names of the stages that would be executed."""
    from lit_llm.studies.pending_stages import pending_stages, selected_runs
    from lit_llm.studies.runs import runs_of

    runs = selected_runs(runs_of(load_study(path), store), only)
    return [f"{run.arm.name}: {step.node.name}" for run, step in pending_stages(runs, rerun, Observer())]


def spoil(stage, **provenance):
    """As if other code had made its result."""
    old = stage.result()
    write_json(stage.folder / "result.json", old | {"provenance": old["provenance"] | provenance})


def test_what_shares_a_repeated_pretraining_is_repeated_in_every_arm(write_two, tmp_path):
    store = Store(tmp_path / "store")
    path = write_two("shared", ARMS_OF_TWO_STAGES.replace("red: {}", ""), seeds=[0])
    dec, biattn = run(path, store).runs
    assert work_to_do(path, store) == []
    spoil(dec.steps[0].stage, code="older")
    assert work_to_do(path, store) == []
    assert work_to_do(path, store, rerun="stale") == [
        "dec: pretrain", "dec: examples after pretrain", "dec: finetune", "dec: examples after finetune",
        "dec_biattn: finetune", "dec_biattn: examples after finetune",
    ]  # fmt: skip
    # All of them have been forgotten, so that nothing of the old weights is gone on from.
    assert {step.status()["state"] for each in (dec, biattn) for step in each.steps} == {"pending"}


def test_a_result_of_other_weights_is_stale_wherever_they_were_repeated(write_two, tmp_path):
    """Another study may have repeated the pretraining that this one's finetuning began with."""
    store = Store(tmp_path / "store")
    path = write_two("weights", "arms: {red: {}}", seeds=[0])
    (only,) = run(path, store).runs
    assert not only.stale()
    pretrained = only.steps[0].stage
    write_json(pretrained.folder / "result.json", pretrained.result() | {"weights": "0123456789abcdef"})
    assert [only.stale_at(step) for step in only.steps] == [False, True, True, False]
    assert work_to_do(path, store, rerun="stale") == [
        "red: examples after pretrain", "red: finetune", "red: examples after finetune",
    ]  # fmt: skip


def test_a_failed_or_stale_evaluation_keeps_nothing_from_what_does_not_begin_with_it(write_two, tmp_path):
    store = Store(tmp_path / "store")
    path = write_two("tree", "arms: {red: {}}\ncompare: {metric: val/target_nll}", seeds=[0])
    (only,) = run(path, store).runs
    evaluated, tuned = only.steps[1].stage, only.steps[2].stage
    spoil(evaluated, code="older")
    assert work_to_do(path, store, rerun="stale") == ["red: examples after pretrain"]
    evaluated.set_state("failed", "it could not be reached")
    tuned.forget()
    assert work_to_do(path, store) == ["red: finetune"]  # its evaluation is there, if the weights come out the same
    # What the pretraining has measured is compared all the same.
    found = comparison_of(load_study(path), [only])
    assert found.rows[0].mean == only.steps[0].stage.result()["metrics"]["val/target_nll"]
    assert found.rows[0].states == {"done": 1}


def test_a_stale_divergence_is_announced_as_nothing_to_do(write_two, tmp_path):
    store = Store(tmp_path / "store")
    rest = "arms: {red: {pretrain: {training: {optimizer: {lr: 1e9}}}}}"
    path = write_two("lost", rest, seeds=[0])
    (only,) = run(path, store).runs
    assert only.status()["state"] == "diverged"
    spoil(only.steps[0].stage, code="older")
    assert work_to_do(path, store) == []


def test_an_evaluation_can_be_added_to_one_arm_and_its_run_in_mlflow(write_two, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from lit_llm.cli import app

    store = Store(tmp_path / "store")
    path = write_two("added", ARMS_OF_TWO_STAGES.replace("finetune/eval/examples/nll", "val/target_nll"), seeds=[0])
    command = ["evaluate", f"{path}:dec_biattn", "--store", str(store.root), "-o", "evaluate.likelihood={documents: 4}"]
    early = CliRunner().invoke(app, command)
    assert isinstance(early.exception, InputError)
    assert "of its trainings are not finished" in str(early.exception)
    first = run(path, store)
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 0, answer.output
    assert all(row.mean is not None for row in first.comparison.rows)
    added = Run.of(load_study(path, [command[-1]]).arm("dec_biattn"), 0, store)
    assert [step.status()["state"] for step in added.steps] == ["done"] * 6
    written = json.loads((store.study("added") / "comparison.json").read_text())
    assert [row["seeds"] for row in written["rows"]] == [1, 1, 1]  # the other arms keep their numbers
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{store.root}/mlflow.db")
    experiment = client.get_experiment_by_name("added")
    filtered = client.search_runs([experiment.experiment_id], "tags.`lit_llm.arm` = 'dec_biattn'")
    (child,) = filtered  # the one that was there
    assert child.data.metrics["finetune/eval/likelihood/nll"] == added.metrics()["finetune/eval/likelihood/nll"]


def test_mlflow_has_one_run_with_the_metrics_of_all_stages(write_two, store):
    import mlflow

    path = write_two("tracked", "arms: {red: {}}", seeds=[7])
    (only,) = run(path, store).runs
    client = mlflow.MlflowClient(f"sqlite:///{store.root}/mlflow.db")
    experiment = client.get_experiment_by_name("tracked")
    (child,) = [
        found for found in client.search_runs([experiment.experiment_id]) if found.data.tags.get("lit_llm.arm") == "red"
    ]
    expected = only.metrics()
    for name in (
        "val/target_nll",
        "finetune/val/target_nll/odd",
        "eval/examples/nll",
        "finetune/eval/examples/nll/even",
    ):
        assert child.data.metrics[name] == pytest.approx(expected[name]), name
    assert child.data.params["finetune.training.dropout"] == "0.1"


def test_tables_show_the_chain_and_fit_the_terminal(write_two, store):
    from rich.console import Console

    from lit_llm.studies.runs import runs_of
    from lit_llm.studies.status import status_rows

    ablation = load_study(write_two("shown"))
    for width in (80, 120):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(render_plan(plan(ablation), width))
        console.print(render_status(list(status_rows(runs_of(ablation, store))), ablation.study.compare.metric))
        text = console.export_text()
        assert "4 x pretrain, 6 x finetune, 10 evaluations" in " ".join(text.split())
        assert "examples after finetune" in text
        assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("finetune/eval/nothing/nll", "is not possible"),
        ("finetune/val/target_nl", "did you mean 'finetune/val/target_nll'"),
        ("eval/examples/", "is not possible"),
    ],
)
def test_a_metric_that_no_stage_has_is_refused(write_two, metric, message):
    with pytest.raises(InputError, match=message):
        load_study(write_two("refused", f"compare: {{metric: {metric}}}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evaluate: null", "it is not evaluated so after finetune"),
        ("evaluate: {after: [pretrain]}", "it is not evaluated so after finetune"),
        ("{finetune: null, evaluate: null}", "it has no finetuning"),
    ],
)
def test_an_arm_that_does_not_measure_what_is_compared_is_refused(write_two, change, message):
    arm = change if change.startswith("{") else f"{{{change}}}"
    rest = f"arms: {{red: {{}}, odd: {arm}}}\ncompare: {{metric: finetune/eval/examples/nll}}"
    with pytest.raises(InputError) as error:
        load_study(write_two("lacking", rest))
    assert f"odd: {message}" in str(error.value)


def test_arms_may_differ_in_the_mask_of_the_finetuning_and_in_nothing_else_of_it(write_two):
    def refused(arm):
        rest = f"arms: {{dec: {{extends: decllm-tiny}}, other: {{extends: decllm-tiny, {arm}}}}}"
        rest += "\ncompare: {metric: finetune/val/target_nll}"
        return [finding.key for finding in plan(load_study(write_two("audited", rest)), built=False).refused]

    assert refused("finetune: {masks: {prefix: bidirectional}}") == []
    assert refused("finetune: {training: {dropout: 0.0}}") == ["finetune.training.dropout"]
    assert refused("finetune: {data: {input_length: 7}}") == ["finetune.data.input_length"]


def test_a_factor_that_moves_what_is_scored_is_refused(write_two):
    rest = "grid: {factors: {finetune.data.target_length: [4, 5]}}\ncompare: {metric: finetune/val/target_nll}"
    (finding,) = plan(load_study(write_two("moved", rest)), built=False).refused
    assert "is not measured on the same target tokens" in finding.message


@pytest.mark.parametrize("split", ["val", "test"])
def test_how_the_finetuning_reads_its_examples_is_no_primary_metric_and_their_own_files_are(write_two, tmp_path, split):
    for name, first in (("held", 20), ("more", 40)):
        lines = [{"inputs": f"{a}+1=", "targets": f"{a + 1}", "task": "odd"} for a in range(first, first + 20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    key = "finetune.data.validation_files" if split == "val" else "finetune.data.test_files"
    held = f"{{kind: jsonl, files: [{tmp_path}/held.jsonl]}}"
    apart = [f"finetune.data.{name}={held}" for name in ("validation_files", "test_files")]

    def refused(factor, *overrides, allow=()):
        rest = f"grid: {{factors: {{{factor}}}}}\ncompare: {{metric: finetune/{split}/target_nll}}"
        rest += "".join(f"\nallow: [{{key: {rule}, because: we ask}}]" for rule in allow)
        findings = plan(load_study(write_two("read", rest), overrides), built=False).refused
        return {finding.key for finding in findings if "same target tokens" in finding.message}

    assert not refused("finetune.data.packing: [none, greedy]")
    assert not refused("finetune.data.batch_size: [4, 8]")
    both = f"[{{files: [{tmp_path}/sums.jsonl]}}, {{files: [{tmp_path}/sums.jsonl, {tmp_path}/more.jsonl]}}]"
    assert refused(f"finetune.data.examples: {both}") == {"finetune.data.examples.files"}
    assert not refused(f"finetune.data.examples: {both}", *apart)
    assert refused("finetune.data.validation_fraction: [0.3, 0.4]")
    assert not refused("finetune.data.validation_fraction: [0.3, 0.4]", *apart)
    levels = f"[{{files: [{tmp_path}/held.jsonl]}}, {{files: [{tmp_path}/more.jsonl]}}]"
    assert refused(f"{key}: {levels}") == {f"{key}.files"}
    assert not refused(f"{key}: {levels}", allow=[key])


# --- the statistics ------------------------------------------------------------------------------------------------


def test_the_change_of_a_difference_is_a_paired_difference_of_differences():
    random = np.random.default_rng(0)
    before = {arm: {seed: float(random.normal(3, 0.1)) for seed in range(6)} for arm in ("dec", "red")}
    after = {arm: {seed: float(random.normal(2, 0.1)) for seed in range(6)} for arm in ("dec", "red")}
    found = before_after("eval/x", before, after, {"dec": "dec", "red": "dec"})
    gained = {arm: np.array([after[arm][s] - before[arm][s] for s in range(6)]) for arm in before}
    interval = stats.ttest_rel(gained["red"], gained["dec"]).confidence_interval()
    change = found.rows[1].change
    assert (change.low, change.high) == pytest.approx((interval.low, interval.high))
    assert change.mean == pytest.approx(found.rows[1].difference_after.mean - found.rows[1].difference_before.mean)
    assert found.rows[0].before == pytest.approx(statistics.fmean(before["dec"].values()))
    assert found.rank_correlation is None  # of two arms it says nothing


def test_the_rank_correlation_is_that_of_the_arms_means():
    before = {"a": {0: 1.0}, "b": {0: 2.0}, "c": {0: 3.0}, "d": {0: 4.0}}
    after = {"a": {0: 2.0}, "b": {0: 1.0}, "c": {0: 3.0}, "d": {0: 9.0}}
    found = before_after("eval/x", before, after, dict.fromkeys(before, "a"))
    assert found.rank_correlation == pytest.approx(0.8)  # 1 - 6 (1 + 1) / (4 (16 - 1))


def test_arms_that_share_their_runs_count_once_in_a_variance():
    from lit_llm.statistics.baselines import Noise, block_differences

    random = np.random.default_rng(3)
    block = {arm: {seed: float(random.normal()) for seed in range(4)} for arm in ("a", "b", "c")}
    with_twin = block | {"twin": dict(block["b"])}
    for noise in (Noise("moderated"), Noise("pooled")):
        one, two = block_differences(block, "a", noise), block_differences(with_twin, "a", noise)
        assert two["c"] == one["c"]
        assert two["twin"] == two["b"]
    assert one["c"].pooled


DECODER_DECODERS = """
arms:
  dec: {extends: decllm-tiny}
  yoco: {extends: yoco-tiny}
  yoco_biattn: {extends: yoco-tiny, finetune: {masks: {prefix: bidirectional}}}
  retention: {extends: yoco-tiny, model: {self_decoder: {retention: gated}}, finetune: {data: {packing: greedy}}}
  double: {extends: doubledecoder-tiny, model: {block: 8}, finetune: {data: {packing: greedy}}}
compare: {baseline: dec, metric: finetune/eval/examples/nll}
allow: [{key: finetune.data.packing, because: two arms are to be packed}]
"""


def test_decoder_decoders_go_through_both_stages_and_share_what_they_share(write_two, store: Store) -> None:
    """YOCO and YOCO + BiAttn are pretrained once, as DecLLM and DecLLM + BiAttn are."""
    finished = run_study(
        load_study(write_two("halves", DECODER_DECODERS, (0,))), store, observer=Observer(), max_parallel=2
    )
    assert {run.status()["state"] for run in finished.runs} == {"done"}
    assert all(np.isfinite(row.mean) for row in finished.comparison.rows)
    pretrained = {run.arm.name: run.trained[0].node.fingerprint for run in finished.runs}
    assert pretrained["yoco"] == pretrained["yoco_biattn"]
    assert len(set(pretrained.values())) == 4

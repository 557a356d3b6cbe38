"""`lit-llm noise`, and the note of a plan whose metric cannot decide: what they read, say and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.power import TTestPower

from lit_llm.report.pages.study import page
from lit_llm.store.store import Store
from lit_llm.studies.comparison import comparison_of
from lit_llm.studies.load import load_study
from lit_llm.studies.metric_noise import noise_of_studies
from lit_llm.studies.plan import Plan, plan
from lit_llm.studies.runs import runs_of
from lit_llm.studies.undecidable_metrics import with_undecidable_metrics
from tests import made_up_results
from tests.commands import lit_llm
from tests.studies.chosen_results import NLL, finish

Study = Callable[..., Path]
FOUR = (
    "arms: {a: {}, b: {model: {attention: {output_norm: none}}}, c: {model: {attention: {qkv_norm: []}}}, "
    "d: {model: {attention: {output_norm: none, qkv_norm: []}}}}\n"
)
SMALL = {"a": [3.0, 3.1], "b": [3.2, 3.28], "c": [3.4, 3.52], "d": [3.3, 3.37]}
LARGE = {"a": [2.0, 2.1], "b": [2.4, 2.48], "c": [2.3, 2.42], "d": [2.5, 2.57]}
"""Orders acbd of four arms: of the six pairs, b and c, and c and d, change places."""


@pytest.fixture
def place(tmp_path: Path) -> Store:
    return Store(tmp_path / "store").open()


@pytest.fixture
def two(write_study: Study, place: Store) -> list[str]:
    """Two studies of the same arms; the larger one has seen another seed of data and ten times the FLOPs."""
    paths = [write_study("small", FOUR, seeds=[0, 1]), write_study("large", FOUR, seeds=[2, 3])]
    finish(load_study(paths[0]), place, SMALL)
    finish(load_study(paths[1]), place, LARGE, flops=1e10)
    return [str(path) for path in paths]


def test_a_small_size_decides_for_the_one_with_the_most_flops(two: list[str], place: Store) -> None:
    small, large = noise_of_studies([*reversed(two)], (), place).rows
    assert (small.size, large.size, small.metric) == ("small", "large", NLL)
    assert (small.values.arms, small.values.seeds, small.train_flops) == (4, 2, 1e9)
    means = [sum(each) / 2 for each in SMALL.values()]
    assert small.values.signal is not None
    assert small.values.signal.value == pytest.approx((max(means) - min(means)) / np.mean(means))
    assert small.decisions is not None
    assert (small.decisions.arms, small.decisions.pairs, small.largest) == (4, 6, "large")
    assert small.decisions.share.value == pytest.approx(4 / 6)
    assert (large.decisions, large.largest) == (None, "")


def test_the_command_prints_a_table_json_and_refuses_what_is_not_there(two: list[str], place: Store) -> None:
    store = ["--store", str(place.root)]
    shown = lit_llm("noise", *two, *store)
    assert shown.returncode == 0, shown.stderr
    text = " ".join(shown.stdout.split())
    assert "decides" in text
    assert "67% [" in text
    printed = json.loads(lit_llm("noise", *two, *store, "--json").stdout)
    assert [row["study"] for row in printed["rows"]] == ["small", "large"]
    assert printed["rows"][0]["values"]["ratio"] > 1
    for arguments, message in (
        (["nothing"], "there is no preset and no file 'nothing'"),
        ([*two, "--metric", "eval/tasks/*"], "no metric matches 'eval/tasks/*'"),
    ):
        refused = lit_llm("noise", *arguments, *store)
        assert refused.returncode == 2, refused.stdout
        assert message in refused.stderr


def test_one_seed_and_two_arms_are_said_and_a_study_without_results_is_none(write_study: Study, place: Store) -> None:
    path = write_study("one", "arms: {a: {}, b: {model: {attention: {output_norm: none}}}}", seeds=[0])
    assert noise_of_studies([str(path)], (), place).notes == ("one: no run has ended with a result",)
    finish(load_study(path), place, SMALL)
    found = noise_of_studies([str(path)], (), place)
    (row,) = found.rows
    assert (row.values.signal, row.values.noise, row.decisions) == (None, None, None)
    assert [note.partition(":")[0] for note in found.notes] == [
        "no noise without two seeds that the arms share",
        "no signal of fewer than 3 arms with different runs",
        "one size",
    ]
    shown = lit_llm("noise", path, "--store", place.root)
    assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize(("final_sequences", "last"), [(8, 300), (64, 290)])
def test_strata_are_sizes_and_a_course_gives_the_noise_of_its_last_validations(
    tmp_path: Path, corpus: Path, place: Store, final_sequences: int, last: int
) -> None:
    """Arms of a grid are the same at two learning rates; as both take the same FLOPs, neither decides for the other.

    The validation after step 300 counts where it reads as many sequences as the others. A run that is not done has no
    part, however much its loss scatters.
    """
    training = "training: {{max_steps: 300}}"
    validation = f"validation: {{{{sequences: 8, final_sequences: {final_sequences}}}}}"
    text = made_up_results.FACTORIAL.replace(training, f"{training}\n    {validation}")
    ablation = made_up_results.study_of(tmp_path, corpus, text=text)
    runs = made_up_results.finished_runs(ablation, place)
    for run in runs[::3]:
        lines = [json.loads(line) for line in run.last.metrics_file.read_text().splitlines()]
        lines[-4]["metrics"]["val/target_nll"] += 5.0
        run.last.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = run.last.folder / "result.json"
        result.write_text(json.dumps(json.loads(result.read_text()) | {"state": "diverged"}))
    found = noise_of_studies([str(tmp_path / "blocks.yaml")], (), place)
    assert [(row.study, row.stratum, row.values.arms) for row in found.rows] == [
        ("blocks", "lr=0.001", 4), ("blocks", "lr=0.01", 4)
    ]  # fmt: skip
    steps = np.arange(last - 40, last + 1, 10)
    values = 2.0 / steps
    residual = values - np.polyval(np.polyfit(steps, values, 1), steps)
    for row in found.rows:
        assert row.decisions is None
        assert row.checkpoint_noise is not None
        assert row.checkpoint_noise * row.values.mean == pytest.approx(np.sqrt((residual**2).sum() / 3), rel=0.01)


def test_runs_of_other_code_have_no_part_and_a_note_says_so(write_study: Study, place: Store) -> None:
    path = write_study("mixed", FOUR, seeds=[0, 1, 2])
    ablation = load_study(path)
    finish(ablation, place, {arm: [*values, 9.0] for arm, values in SMALL.items()})
    for run in runs_of(ablation, place):
        if run.seed == 2:
            earlier = {**(run.last.result() or {}), "finished": 0.0, "provenance": {"code": "earlier"}}
            (run.last.folder / "result.json").write_text(json.dumps(earlier))
            course = [{"step": step, "metrics": {"val/target_nll": 9.0 + step % 2}} for step in range(1, 13)]
            run.last.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in course))
    found = noise_of_studies([str(path)], (), place)
    (row,) = found.rows
    assert (row.values.seeds, row.checkpoint_noise) == (2, None)
    assert found.notes[0].startswith("mixed: 4 result(s) of other code")


def test_the_page_of_a_study_has_the_section_where_arms_and_seeds_suffice(write_study: Study, place: Store) -> None:
    for name, seeds, has in (("enough", [0, 1], True), ("single", [2], False)):
        ablation = load_study(write_study(name, FOUR, seeds=seeds))
        finish(ablation, place, SMALL)
        runs = runs_of(ablation, place)
        shown = page(
            plan(ablation, built=False), [(run, run.result()) for run in runs], comparison_of(ablation, runs), [], place
        )
        tables = [table for section in shown.sections if section.name == "noise" for table in section.tables]
        assert [table.rows[0][0] for table in tables] == [NLL] * has


# --- the note of a plan ----------------------------------------------------------------------------------------------


def reported(
    store: Store, study: str, values: Mapping[str, Sequence[float]], parameters: float = 14_000.0, metric: str = NLL
) -> None:
    """The runs.csv of an earlier study's report; its first arm is the baseline."""
    baseline = next(iter(values))
    rows = [
        f"{arm},{baseline},{seed},done,{parameters},1536,{value}"
        for arm, each in values.items()
        for seed, value in enumerate(each)
    ]
    store.study(study).mkdir(parents=True, exist_ok=True)
    text = "\n".join([f"arm,baseline,seed,state,parameters,tokens,{metric}", *rows, ""])
    (store.study(study) / "runs.csv").write_text(text)


def notes(planned: Plan) -> list[str]:
    return [finding.message for finding in planned.findings if finding.key in ("compare.metric", "evaluate.tasks")]


NOISY = {"a": [3.0, 3.0, 3.0, 3.0], "b": [3.1, 2.9, 3.05, 3.0], "c": [3.0, 3.2, 2.9, 3.0]}
CLEAR = {"a": [3.0, 3.0, 3.0, 3.0], "b": [3.5, 3.51, 3.49, 3.5], "c": [3.4, 3.42, 3.39, 3.4]}


@pytest.fixture
def planned(write_study: Study) -> Plan:
    return plan(load_study(write_study("new", "arms: {x: {}, y: {extends: decllm-tiny}}", [0, 1, 2])), built=False)


def test_a_plan_says_that_earlier_runs_of_this_size_scatter_more_than_they_differ(planned: Plan, place: Store) -> None:
    assert with_undecidable_metrics(planned, place) == planned
    reported(place, "noisy", NOISY)
    (message,) = notes(with_undecidable_metrics(planned, place))
    assert message.startswith(
        f"{NLL} may not decide: in noisy, of this size, 2 arms differ from their baselines by no more"
    )
    # The difference that it names is the one that three seeds detect, by statsmodels.
    squares = [np.var(np.subtract(NOISY[arm], NOISY["a"]), ddof=1) for arm in "bc"]
    named = float(message.split("seeds detect ")[1].split()[0])
    assert TTestPower().power(named / np.sqrt(np.mean(squares)), 3, 0.05) == pytest.approx(0.8, abs=0.02)
    assert all(finding.kind == "note" for finding in with_undecidable_metrics(planned, place).findings[-1:])


def test_a_plan_says_nothing_where_the_differences_are_clear_or_the_size_is_another(
    planned: Plan, place: Store
) -> None:
    reported(place, "clear", CLEAR)
    assert notes(with_undecidable_metrics(planned, place)) == []
    (place.study("clear") / "runs.csv").unlink()
    reported(place, "huge", NOISY, parameters=1e9)
    assert notes(with_undecidable_metrics(planned, place)) == []


def test_the_size_of_a_difference_is_without_the_noise_of_its_mean(planned: Plan, place: Store) -> None:
    """d = 0.1 and 0.3 with a standard deviation of 0.2 over four seeds: (0.01 + 0.09) / 2 - 0.04 / 4 = 0.2 squared."""
    deviation = 0.2 * np.array([-1, 1, -1, 1]) * np.sqrt(3 / 4)
    values = {"a": [3.0] * 4, "b": list(3.1 + deviation), "c": list(3.3 + deviation)}
    reported(place, "earlier", values)
    (message,) = notes(with_undecidable_metrics(planned, place))
    assert "by 0.2 (root mean square without noise)" in message
    assert "`plan --power 0.2` the seeds" in message


def test_the_tasks_of_a_study_are_judged_by_their_scores_too(write_study: Study, place: Store) -> None:
    """Of two tasks the noisy one is named; a task that the study does not have is no concern of its plan."""
    arms = "arms: {x: {}, y: {extends: decllm-tiny}}"
    path = write_study("new", arms, [0, 1, 2])
    path.write_text(path.read_text().replace("  pretrain:", "  evaluate: {tasks: {names: [boolq, rte]}}\n  pretrain:"))
    planned = plan(load_study(path), built=False)
    for study, values, task in (("one", NOISY, "boolq"), ("two", CLEAR, "rte"), ("three", NOISY, "piqa")):
        reported(place, study, values, metric=f"eval/tasks/{task}/acc")
    (message,) = notes(with_undecidable_metrics(planned, place))
    assert message.startswith("eval/tasks/boolq/acc: too noisy for 3 seeds")
    assert "`lit-llm noise one`" in message


def test_each_size_of_a_study_is_judged_by_the_earlier_runs_of_its_size(write_study: Study, place: Store) -> None:
    """Only the larger arm has noisy earlier runs of its size; which of the arms is first does not matter."""
    big = "{model: {d_model: 64, feed_forward: {d_ff: 256}}}"
    for name, arms in (
        ("up", f"x: {{}}, y: {{extends: decllm-tiny}}, z: {big}"),
        ("down", f"x: {{}}, z: {big}, y: {{extends: decllm-tiny}}"),
    ):
        planned = plan(load_study(write_study(name, f"arms: {{{arms}}}", [0, 1, 2])), built=False)
        sizes = {arm.arm.name: arm.cost.parameters for arm in planned.arms}
        assert sizes["z"] > 6 * sizes["y"]
        reported(place, "large", NOISY, parameters=sizes["z"])
        reported(place, "small", CLEAR, parameters=sizes["y"])
        found = [each for each in with_undecidable_metrics(planned, place).findings if each.key == "compare.metric"]
        assert [(each.arm, "in large, of this size" in each.message) for each in found] == [("z", True)]


@pytest.mark.slow
def test_the_command_shows_the_note_and_runs_no_less(write_study: Study, place: Store) -> None:
    path = write_study("new", "arms: {x: {}, y: {extends: decllm-tiny}}", [0, 1, 2])
    reported(place, "noisy", NOISY)
    shown = lit_llm("plan", path, "--store", place.root, "--json")
    assert shown.returncode == 0, shown.stderr
    found = [each for each in json.loads(shown.stdout)["findings"] if each["key"] == "compare.metric"]
    assert [(each["kind"], each["arm"]) for each in found] == [("note", "all arms")]

"""`lit-llm noise` and `lit-llm diff --items` on scores of tasks that the harness itself has given to trained models."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lit-llm[eval]'")

from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_config import save_stage_config
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.run import Observer, prepare_data
from lit_llm.studies.runs import runs_of
from tests.commands import lit_llm
from tests.gloss_tasks import write_tasks

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("noise_of_tasks")]

RATES = {"a": 0.02, "b": 0.1, "c": 0.3, "d": 0.6}
"""Learning rates, so far apart that a few steps make models which answer differently."""
ARMS = {name: f"{{pretrain: {{training: {{optimizer: {{lr: {rate}}}}}}}}}" for name, rate in RATES.items()}
SIZES = {"small": 4, "large": 12}
"""Steps of training; more steps are more FLOPs."""
SEEDS = (0, 1)
TASK = "glosses_choose"
ACC, BY_BYTE = f"eval/tasks/{TASK}/acc", f"eval/tasks/{TASK}/acc_norm"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("noise") / "store").open()


@pytest.fixture(scope="module")
def rows(store: Store, corpus: Path) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """{(size, arm, seed): the harness's questions and answers}, of two studies that are trained and judged here."""
    write_tasks(store.root.parent)
    found = {}
    for size, steps in SIZES.items():
        path = store.root.parent / f"{size}.yaml"
        path.write_text(f"""
study: {size}
question: Which learning rate helps?
extends: decllm-tiny
base:
  model: {{d_model: 16, vocabulary: 258, attention: {{heads: 2}}, feed_forward: {{d_ff: 32}}, decoder: {{layers: 1}}}}
  pretrain:
    data: {{corpus: {{kind: text, files: ["{corpus}/*.txt"]}}, tokenizer: bytes, sequence_length: 32, batch_size: 4}}
    training: {{max_steps: {steps}, schedule: {{warmup_steps: 2}}}}
    validation: {{times: 1, sequences: 8}}
  evaluate: {{tasks: {{names: [{TASK}], folder: {store.root.parent}/tasks, max_length: 160}}}}
arms: {{{", ".join(f"{name}: {change}" for name, change in ARMS.items())}}}
seeds: {list(SEEDS)}
""")
        for run in runs_of(load_study(path), store):
            prepare_data([run.experiment], store, Observer())
            for step in run.steps:
                save_stage_config(store, step.node, run.experiment)
            for step in run.steps:
                assert run_one(store.root, step.node.fingerprint) == "done", step.stage.status()
            lines = (run.last.folder / "rows.jsonl").read_text().splitlines()
            found[size, run.arm.name, run.seed] = [json.loads(line) for line in lines]
    return found


def scores(rows: list[dict[str, Any]], by_byte: bool, folder: Path) -> list[float]:
    """Right or wrong for each question, from the log-probabilities of the answers."""
    asked = [json.loads(line) for line in (folder / "tasks" / "choose.jsonl").open()]
    right = []
    for row, question in zip(rows, asked, strict=True):
        nats = [answer[0] for answer in row["answers"]]
        sizes = [len(choice) if by_byte else 1 for choice in question["choices"]]  # characters: all are ASCII
        right.append(float(np.argmax(np.divide(nats, sizes)) == question["answer"]))
    return right


def noise(store: Store) -> dict[tuple[str, str], dict[str, Any]]:
    """{(study, metric): row} of the command."""
    paths = [str(store.root.parent / f"{size}.yaml") for size in SIZES]
    shown = lit_llm("noise", *paths, "--metric", "eval/tasks/*", "--json", "--store", store.root)
    assert shown.returncode == 0, shown.stderr
    return {(row["study"], row["metric"]): row for row in json.loads(shown.stdout)["rows"]}


@pytest.mark.parametrize("metric", [ACC, BY_BYTE])
def test_signal_noise_and_decisions_are_those_of_the_answers(
    metric: str, rows: dict[tuple[str, str, int], list[dict[str, Any]]], store: Store
) -> None:
    """Mean squares by statsmodels' analysis of variance; pairs of arms that both sizes order alike, by enumeration."""
    found = noise(store)
    assert {name for _, name in found} == {ACC, BY_BYTE}, "counts of questions are no scores"
    means = {}
    for size in SIZES:
        table = {
            arm: [np.mean(scores(rows[size, arm, seed], metric == BY_BYTE, store.root.parent)) for seed in SEEDS]
            for arm in ARMS
        }
        means[size] = {arm: float(np.mean(values)) for arm, values in table.items()}
        different = dict.fromkeys(map(tuple, table.values()))  # arms with the same runs count once
        assert len(different) >= 3 or metric == BY_BYTE, "too few arms with scores of their own"
        whole = pd.DataFrame(
            [(str(arm), str(seed), v) for arm, each in enumerate(different) for seed, v in enumerate(each)],
            columns=["arm", "seed", "y"],
        )
        squares = anova_lm(ols("y ~ C(arm) + C(seed)", whole).fit())["mean_sq"]
        by_arm, mean = whole.groupby("arm").y.mean(), whole.y.mean()
        count = len(different)
        values = found[size, metric]["values"]
        assert (values["arms"], values["seeds"], values["mean"]) == (count, 2, pytest.approx(mean))
        if count < 3:  # the spread of two arms is no signal
            assert values["signal"] is None
        else:
            assert values["signal"]["value"] == pytest.approx((by_arm.max() - by_arm.min()) / mean)
        assert values["paired_noise"]["value"] == pytest.approx(np.sqrt(squares["Residual"]) / mean)
        both = (squares["C(seed)"] + (count - 1) * squares["Residual"]) / count
        assert values["noise"]["value"] == pytest.approx(np.sqrt(both) / mean)
    pairs = list(itertools.combinations(ARMS, 2))
    signs = [[int(np.sign(round(means[size][one] - means[size][other], 9))) for one, other in pairs] for size in SIZES]
    decisions = found["small", metric]["decisions"]
    assert decisions["pairs"] == len(pairs)
    assert decisions["share"]["value"] == pytest.approx(np.mean([(1 + a * b) / 2 for a, b in zip(*signs, strict=True)]))
    assert found["large", metric]["decisions"] is None


def test_two_arms_are_compared_question_by_question(
    rows: dict[tuple[str, str, int], list[dict[str, Any]]], store: Store
) -> None:
    """McNemar's test by statsmodels, for each seed."""
    path = store.root.parent / "small.yaml"
    shown = lit_llm("diff", f"{path}:a", f"{path}:c", "--items", "--metric", ACC, "--json", "--store", store.root)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    right = {
        (arm, seed): np.array(scores(rows["small", arm, seed], False, store.root.parent))
        for arm in "ac"
        for seed in SEEDS
    }
    differences = np.mean([right["c", seed] - right["a", seed] for seed in SEEDS], axis=0)
    assert found["whole"]["mean"] == pytest.approx(differences.mean())
    assert {item["item"]: item["difference"]["mean"] for item in found["items"]} == {
        str(number): pytest.approx(each) for number, each in enumerate(differences)
    }
    assert (differences != 0).any()
    tests = {tuple(each["seeds"]): each for each in found["tests"] if each["method"] == "McNemar"}
    for seed in SEEDS:
        table = pd.crosstab(
            pd.Categorical(right["a", seed], [0.0, 1.0]), pd.Categorical(right["c", seed], [0.0, 1.0]), dropna=False
        )
        assert tests[seed,]["p"] == pytest.approx(mcnemar(table.to_numpy(), exact=True).pvalue)
        assert tests[seed,]["higher"] == table.to_numpy()[0, 1]

"""The sweeps in `sweeps/`: each is fair by its plan, and searches and compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lit_llm.store.store import Store
from lit_llm.studies.plan import plan
from lit_llm.studies.schema import Allowed
from lit_llm.sweeps.coordinator import SweepObserver
from lit_llm.sweeps.run import run_sweep
from lit_llm.sweeps.schema import Winners
from lit_llm.sweeps.sweep import load_sweep

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
SMALL = [
    "pretrain.data.sequence_length=16", "pretrain.data.tokenizer=bytes", "pretrain.data.batch_size=2",
    "model.vocabulary=258", "model.d_model=16", "model.feed_forward.d_ff=32", "model.attention.heads=2",
    "pretrain.training.max_steps=100", "pretrain.validation={times: 3, sequences: 2}",
]  # fmt: skip


def test_the_sweeps_that_were_promised_are_there() -> None:
    assert [path.stem for path in SWEEPS] == ["fair_lr", "layer_split", "optimizer", "quickstart"]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_shipped_sweep_is_fair(path: Path) -> None:
    found = plan(load_sweep(path).ablation)
    assert not [finding for finding in found.findings if finding.kind in ("refused", "no_op", "confound")]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem == "quickstart" else [pytest.mark.slow], id=path.stem)
        for path in SWEEPS
    ],
)
def test_a_shipped_sweep_tries_each_arm_equally_and_compares_the_winners(path: Path, store: Store) -> None:
    search = load_sweep(path, SMALL)
    # Costs are those of small arms, so that budgets say nothing of the sweep.
    allow = {"allow": (*search.sweep.allow, Allowed(key="budget", because="small arms"))}
    few = search.sweep.model_copy(update={"trials": 3, "winners": Winners(seeds=(7,)), **allow})
    ablation = replace(search.ablation, study=search.ablation.study.model_copy(update=allow))
    ended = run_sweep(replace(search, sweep=few, ablation=ablation), store, observer=SweepObserver(), max_parallel=2)
    assert [found.counted for found in ended.summaries] == [3] * len(search.spaces)
    assert all(set(found.states) <= {"done", "pruned", "diverged"} for found in ended.summaries)
    assert all(found.best is not None for found in ended.summaries)
    assert all(path.exists() for path in ended.best)
    if len(few.optimize) > 1:
        assert ended.winners is None
        return
    if ended.winners is not None:  # else each arm's own setting was the best of three
        assert ended.winners.exit_code == 0
        assert set(search.spaces) <= {row.arm for row in ended.winners.comparison.rows}

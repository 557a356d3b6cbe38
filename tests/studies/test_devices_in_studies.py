"""Several devices in plans and comparisons."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from lit_llm.config.problems import InputError
from lit_llm.experiment.cost import cost_of, memory_of
from lit_llm.experiment.load import load_experiment
from lit_llm.experiment.schema import Experiment
from lit_llm.launch import devices
from lit_llm.launch.devices import environment_of, take_slots
from lit_llm.report.tables import plan as plan_tables
from lit_llm.report.tables.plan import devices_table
from lit_llm.report.text import size
from lit_llm.runs import kernels
from lit_llm.runs.kernels import kernels_of, strategy_of
from lit_llm.statistics.comparison import compare
from lit_llm.statistics.run_results import RunResult
from lit_llm.store.store import Store
from lit_llm.studies import parallelism, preflight
from lit_llm.studies.load import load_study
from lit_llm.studies.parallelism import max_parallel
from lit_llm.studies.plan import plan
from lit_llm.studies.preflight import check_kernels
from lit_llm.studies.runs import runs_of
from lit_llm.studies.stage_executor import Work, slots_for

EXECUTION = "pretrain.training.execution"
NLL = "val/target_nll"


def on(devices: int, *overrides: str) -> Experiment:
    return load_experiment("redllm-150m", [f"{EXECUTION}.devices={devices}", *overrides])


def test_the_plan_shows_the_memory_of_each_device_by_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of a size between the two: it holds a part of the state, and not all of it."""
    experiment = on(8)
    ddp, fsdp = (memory_of(experiment, "pretrain", strategy) for strategy in ("ddp", "fsdp"))
    assert ddp > fsdp
    monkeypatch.setattr(plan_tables, "memory_of_device", lambda *_: round((ddp + fsdp) / 2))
    planned = plan(load_study("redllm-150m", [f"{EXECUTION}.devices=8"]))
    text = io.StringIO()
    Console(file=text, width=100).print(plan_tables.render_plan(planned))
    row = rf"redllm-150m +pretrain +8 +ddp +{re.escape(size(ddp))} too large +{re.escape(size(fsdp))} *$"
    assert re.search(row, text.getvalue(), re.MULTILINE), text.getvalue()
    cost = planned.arms[0].cost
    assert cost.as_json(1000, 1000)["device_memory_bytes"] == {"ddp": round(ddp), "fsdp": round(fsdp)}
    assert cost.memory_bytes == round(ddp)

    alone = plan(load_study("redllm-150m"))
    assert devices_table(alone) is None
    assert alone.arms[0].cost.as_json(1000, 1000)["device_memory_bytes"] == {}


def test_more_devices_take_less_each() -> None:
    """A smaller share of the batch, and under FSDP2 of the state; DDP never has less than the whole state."""
    whole = f"{EXECUTION}.micro_batch_size=null"
    sizes = {n: [memory_of(on(n, whole), "pretrain", strategy) for strategy in ("ddp", "fsdp")] for n in (2, 4, 8)}
    for more, fewer in ((4, 2), (8, 4)):
        assert all(less < most for less, most in zip(sizes[more], sizes[fewer], strict=True))
    assert sizes[8][0] > 16 * cost_of(on(8)).parameters


def test_auto_shares_the_state_where_a_gpu_cannot_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = memory_of(on(2), "pretrain", "ddp")
    for memory, expected in ((needed * 2, "ddp"), (needed / 2, "fsdp"), (None, "ddp")):
        monkeypatch.setattr(kernels, "gpu_memory", lambda memory=memory: memory)
        assert strategy_of(on(2), "pretrain") == expected
    monkeypatch.setattr(kernels, "gpu_memory", lambda: needed / 2)
    assert strategy_of(on(2, f"{EXECUTION}.accelerator=cpu"), "pretrain") == "ddp"
    assert strategy_of(on(2, "pretrain.training.optimizer=adamw_8bit"), "pretrain") == "ddp"
    assert strategy_of(on(1), "pretrain") is None


def test_blocks_of_a_sharded_model_are_not_compiled() -> None:
    sharded = kernels_of(on(2, f"{EXECUTION}.strategy=fsdp", f"{EXECUTION}.kernels=compiled"), "pretrain")
    assert sharded.name == "auto"
    assert "with fsdp" in sharded.obstacle
    assert "fsdp" not in kernels_of(on(2, f"{EXECUTION}.kernels=compiled"), "pretrain").obstacle


def test_a_comparison_names_the_devices_of_its_runs_where_they_differ() -> None:
    def run(arm: str, seed: int, **origin: object) -> RunResult:
        provenance = {"devices": 1, "strategy": None, **origin}
        result = {"metrics": {NLL: 3.0 + seed}, "parameters": 1, "flops": 1.0, "provenance": provenance}
        return RunResult(arm, "base", seed, "done", result)

    two = {"devices": 2, "strategy": "fsdp"}
    mixed = [*(run("base", seed) for seed in (0, 1)), *(run("arm", seed, **two) for seed in (0, 1))]
    (note,) = [note for note in compare(mixed, NLL).notes if "devices" in note]
    assert note == (
        "runs were trained on different devices, which changes a result by rounding: "
        "base on one device; arm on 2 devices (fsdp)"
    )
    alike = [run(arm, seed, **two) for arm in ("base", "arm") for seed in (0, 1)]
    assert not [note for note in compare(alike, NLL).notes if "devices" in note]


def test_a_run_takes_a_slot_for_each_of_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """On eight GPUs two runs of four go at once, each on GPUs of its own; an evaluation takes one."""
    for module in (devices, parallelism):
        monkeypatch.setattr(module, "visible_gpus", lambda: [*"01234567"])
    ablation = load_study("redllm-150m", [f"{EXECUTION}.devices=4"])
    assert max_parallel(ablation, 1) == 2
    (run,) = runs_of(ablation, Store("nowhere"))
    work = Work.of(run, run.steps[0])
    assert work.devices == 4
    slots = slots_for([work, Work("evaluation", "1")], 2)
    first = take_slots(slots, work.devices)
    assert first is not None
    second = take_slots([slot for slot in slots if slot not in first], work.devices)
    assert second is not None
    seen = [environment_of(taken)[devices.VISIBLE].split(",") for taken in (first, second)]
    assert sorted(seen[0] + seen[1]) == [*"01234567"]


def test_more_devices_than_the_machine_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "visible_gpus", lambda: ["0", "1"])
    check_kernels(load_study("redllm-150m", [f"{EXECUTION}.devices=2"]))
    check_kernels(load_study("redllm-150m", [f"{EXECUTION}.devices=3", f"{EXECUTION}.accelerator=cpu"]))
    with pytest.raises(InputError, match="3, but this machine has 2 GPUs"):
        check_kernels(load_study("redllm-150m", [f"{EXECUTION}.devices=3"]))

"""`tests/gpu/run.py` without a GPU, and with one that is made up."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_llm.bench import run as bench_run
from lit_llm.bench.turns import measured
from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.runs import step_timing
from lit_llm.training.compiled_blocks import compiled_flex
from tests.bench.small_bench import made_up
from tests.flex_on_cpu import gradients_allowed
from tests.gpu import attention_speed, run


def test_without_a_gpu_it_says_so_and_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started"))
    assert run.main() == 0
    assert capsys.readouterr().out == "skipped: torch finds no GPU on this machine\n"


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the script starts, on a made-up GPU where everything succeeds at once."""
    started: list[Any] = []
    rows = measured({name: {"mask": [0.001], "attention": [s]} for name, s in (("torch", 0.004), ("flex", 0.001))})

    def compared(sizes: Any, device: str, turns: int) -> Any:
        started.append(("attention", device))
        yield "window", rows

    def stepped(timed: step_timing.TimedStep, window: float) -> float:
        started.append(("slots", timed.setting))
        return 2.0 * timed.setting.at_once**0.5

    def tested(command: list[str], **_: Any) -> Any:
        started.append(("tests", command[-3:]))
        return SimpleNamespace(returncode=0)

    def benched(what: Any, settings: Any, heaps: Any) -> Any:
        started.append((settings.size, settings.device, what))
        return made_up()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention_speed, "compare_attention", compared)
    monkeypatch.setattr(step_timing, "steps_per_second", stepped)
    monkeypatch.setattr(subprocess, "run", tested)
    monkeypatch.setattr(bench_run, "run_benchmarks", benched)
    return started


def test_it_measures_everything_and_ends_with_tables(begun, capsys):
    assert run.main() == 0
    assert begun == [
        ("attention", "cuda"),
        *(("slots", step_timing.Setting("cuda", 1, slots)) for slots in (1, 2, 4)),
        ("tests", ["-m", "gpu", "tests"]),
        ("150m", "cuda", ("training", "decode", "memory")),
        ("1b", "cuda", ("training",)),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert "| window | 1.00 ms | 4.00 ms | 1.00 ms | 1.00 ms | 0.25 |" in lines
    assert "| 1 | 16,384 | 1.00 |" in lines
    assert "| 4 | 32,768 | 2.00 |" in lines
    assert "| training step, decoder | measure | median | / ours | of ceiling |" in lines
    assert "| Llama | step | 200.0 ms | 2.00 | 25% |" in lines
    assert "| ours | peak | 0.00 GB | 1.00 |  |" in lines


def fails(*_: Any, **__: Any) -> Any:
    return SimpleNamespace(returncode=1)


def hangs(command: list[str], timeout: float, **_: Any) -> Any:
    raise subprocess.TimeoutExpired(command, timeout)


def lacks_memory(*_: Any) -> Any:
    return replace(made_up(), failed=("training: out of memory",))


@pytest.mark.parametrize(
    ("module", "name", "function", "line"),
    [
        (subprocess, "run", fails, "failed: tests: "),
        (subprocess, "run", hangs, "failed: tests: the tests did not end within "),
        (bench_run, "run_benchmarks", lacks_memory, "failed: training: out of memory"),
        (step_timing, "steps_per_second", hangs, "failed: slots: "),
    ],
)
def test_what_fails_is_said_and_the_other_parts_are_measured(
    module: Any, name: str, function: Callable[..., Any], line: str, begun, monkeypatch, capsys
):
    monkeypatch.setattr(module, name, function)
    assert run.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(each.startswith(line) for each in lines)
    assert "| window | 1.00 ms | 4.00 ms | 1.00 ms | 1.00 ms | 0.25 |" in lines


def test_a_part_may_be_chosen_and_one_that_would_be_late_is_not_begun(begun, monkeypatch, capsys):
    assert run.main(["slots"]) == 0
    assert {each[0] for each in begun} == {"slots"}
    assert run.main(["speed"]) == 2
    assert "the parts are attention, slots, tests, 150m, 1b" in capsys.readouterr().err
    begun.clear()
    monkeypatch.setattr(run, "BUDGET_SECONDS", 100.0)
    assert run.main() == 0
    assert [each[0] for each in begun] == ["attention", "tests", "1b"]
    assert "not begun within 100 s: python tests/gpu/run.py slots 150m\n" in capsys.readouterr().out


def test_both_ways_of_attention_compute_the_same_and_are_timed():
    sizes = attention_speed.Sizes(rows=2, heads=2, tokens=130, head_dim=8)
    like = torch.float32, torch.device("cpu")
    q, k, v = (torch.randn(2, 2, 130, 8) for _ in range(3))
    with gradients_allowed() as counter:
        flex = compiled_flex(lengths_vary=False, backend=counter)
        kinds = attention_speed.cases(sizes, "cpu")
        for kind in ("about 9 documents", "ALiBi"):
            case = kinds[kind]
            makers = attention_speed.makers(case, sizes, like, flex)
            ours, theirs = (DotProduct(softcap=case.softcap)(q, k, v, make()) for make in makers.values())
            assert (ours - theirs).abs().max() < 1e-5, kind
        kind, rows = next(attention_speed.compare_attention(sizes, "cpu", 1, flex))
    assert kind == "triangle"
    assert {(row.contestant, row.quantity) for row in rows if row.value.median > 0} == {
        (name, quantity) for name in ("torch", "flex") for quantity in ("mask", "attention")
    }

"""`tests/gpu/run.py` without a GPU, and with one that is made up."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lit_llm.bench import run as bench_run
from tests.bench.small_bench import made_up
from tests.gpu import run


def test_without_a_gpu_it_says_so_and_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started"))
    assert run.main() == 0
    assert capsys.readouterr().out == "skipped: torch finds no GPU on this machine\n"


@pytest.mark.parametrize(("tests", "failed", "code"), [(0, (), 0), (1, (), 1), (0, ("training: out of memory",), 1)])
def test_it_runs_the_tests_and_both_sizes_and_ends_with_tables(tests, failed, code, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    commands, measured = [], []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=tests)
    )
    monkeypatch.setattr(
        bench_run,
        "run_benchmarks",
        lambda what, settings, heaps: (
            measured.append((settings.size, settings.device, what)) or replace(made_up(), failed=failed)
        ),
    )
    assert run.main() == code
    assert len(commands) == 1
    assert commands[0][-3:] == ["-m", "gpu", "tests"]
    assert measured == [("150m", "cuda", ("training", "decode", "memory")), ("1b", "cuda", ("training",))]
    lines = capsys.readouterr().out.splitlines()
    assert "| training step, decoder | measure | median | / ours | of ceiling |" in lines
    assert "| Llama | step | 200.0 ms | 2.00 | 25% |" in lines
    assert "| ours | peak | 0.00 GB | 1.00 |  |" in lines
    assert any(line == "failed: training: out of memory" for line in lines) == bool(failed)

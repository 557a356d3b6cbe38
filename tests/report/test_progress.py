"""The live table: who is how far, and how long the rest takes."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from lit_llm.experiment.cost import cost_of
from lit_llm.report.progress.run_progress import TimeLeft, progress_of_stage, seconds_per_step
from lit_llm.report.progress.terminal import Progressing
from lit_llm.store.store import MetricsFile, Store
from lit_llm.studies.load import load_study
from lit_llm.studies.runs import runs_of

Write = Callable[..., Path]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def test_each_row_says_whose_it_is(write_study: Write, tmp_path: Path) -> None:
    study = load_study(write_study("shown", "arms: {red: {}, dec: {extends: decllm-tiny}}"))
    runs = runs_of(study, Store(tmp_path / "store"))
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    progress = Progressing(console)
    with ExitStack() as claims:
        for run in runs:
            claims.enter_context(run.last.claim())
            run.last.set_state("running")
            file = MetricsFile(run.last.metrics_file)
            for step in (4, 8):
                file.append(step, {"train/loss": 2.5, "val/target_nll": 3.0, "throughput/tokens_per_second": 1500.0})
            file.close()
        progress.launching(runs, runs, 2)
        progress.finished()
    assert isinstance(console.file, io.StringIO)
    shown = ESCAPES.sub("", console.file.getvalue())
    for name in ("red/seed 0", "dec/seed 0"):
        assert re.search(rf"^{name} +8/12 +2\.500 +3\.000 +1\.5k +\d:\d\d\s*$", shown, re.MULTILINE), shown[-2000:]
    assert re.search(r"about \d:\d\d left", shown)


def line(step: int, at: float, **metrics: float) -> dict[str, object]:
    return {"step": step, "time": at, "metrics": metrics}


def test_the_pace_counts_validations_and_not_what_was_before_a_resume() -> None:
    """40 steps of half a second with 5 seconds of validation among them: 25 / 40. Before it, the process was away for
    an hour; after its first line, there is but the speed of the steps: 100 tokens each at 50 a second."""
    rates = {"throughput/tokens_per_second": 50.0, "tokens_seen": 1000.0}
    before, first = line(10, 0.0, **rates), line(10, 3600.0, **rates)
    lines = [before, first, line(30, 3610.0), line(50, 3625.0)]
    assert seconds_per_step(lines, since=3590.0) == 25 / 40
    assert seconds_per_step(lines[:2], since=3590.0) == 100 / 50
    assert seconds_per_step(lines[:1], since=3590.0) is None


def test_what_waits_is_taken_to_last_as_its_flops_do(write_study: Write, tmp_path: Path) -> None:
    """Steps alone tell the two arms apart: one with 12 took 6 seconds, of one with 48 a quarter is done in 6
    seconds. So 18 are left there, and 6 and 24 of the two that wait."""
    arms = "arms: {short: {}, long: {pretrain: {training: {max_steps: 48}}}}"
    allow = "allow: [{key: pretrain.training.max_steps, because: lengths differ}]"
    store = Store(tmp_path / "store")
    runs = runs_of(load_study(write_study("left", f"{arms}\n{allow}", seeds=[0, 1])), store)
    short, _, long, _ = (run.last for run in runs)
    assert TimeLeft(1).seconds(runs) is None
    short.set_state("running")
    took = {"training": 5.0, "evaluation": 1.0}
    short.finish({"state": "done", "flops": cost_of(runs[0].experiment).train_flops, "seconds": took, "metrics": {}})
    with long.claim():
        long.set_state("running")
        began, file = time.time(), MetricsFile(long.metrics_file)
        file.append(6, {})
        file.append(12, {})
        file.close()
        text = long.metrics_file.read_text().splitlines()
        times = [began + 3, began + 6]
        stamped = [re.sub(r'"time": [\d.]+', f'"time": {at}', line) for at, line in zip(times, text, strict=True)]
        long.metrics_file.write_text("\n".join(stamped) + "\n")
        now = progress_of_stage(runs[2], runs[2].steps[-1])
        assert (now.step, now.steps, now.seconds_left) == (12, 48, pytest.approx(18, rel=1e-3))
        assert TimeLeft(1).seconds(runs) == pytest.approx(18 + 6 + 24, rel=1e-3)
        assert TimeLeft(2).seconds(runs) == pytest.approx(30, rel=1e-3)  # 18 beside 6 + 24

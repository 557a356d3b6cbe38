"""`--json`: what `run` and `sweep` tell programs while they go on, one object a line, and nothing else."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_llm.report.progress import json_lines
from lit_llm.store.store import Store, read_metrics
from tests.commands import command, lit_llm

Write = Callable[..., Path]
Event = dict[str, Any]

TWO = "arms: {red: {}, dec: {extends: decllm-tiny}}"
UNEVEN = """
arms:
  red: {}
  broken: {model: {attention: {output_norm: none}}, pretrain: {training: {execution: {accelerator: gpu}}}}
  lost: {pretrain: {training: {optimizer: {lr: 1e20}}}, model: {attention: {qkv_norm: []}}}
allow:
  - {key: pretrain.training.execution.accelerator, because: this machine has no such device}
  - {key: pretrain.training.optimizer.lr, because: it should diverge}
"""


def started(*arguments: object) -> subprocess.Popen[str]:
    """The command as a process, which has to see to it by itself that no line waits in a buffer."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered
    )


def told(answer: subprocess.CompletedProcess[str]) -> list[Event]:
    """Every line of stdout is an object of its own, with an event and a time; none goes back in time."""
    assert "\x1b" not in answer.stdout + answer.stderr
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    assert all(isinstance(line["event"], str) for line in lines)
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    return lines


def by_stage(lines: list[Event]) -> dict[tuple[str, str], list[Event]]:
    found = defaultdict(list)
    for line in lines:
        if line["event"] in ("started", "progress", "finished"):
            found[line["run"], line["stage"]].append(line)
    return dict(found)


def content(line: Event) -> Event:
    return {key: value for key, value in line.items() if key not in ("event", "time")}


def reported(path: Path, store: Store) -> Event:
    found = json.loads(lit_llm("report", path, "--store", store.root, "--json").stdout)
    assert isinstance(found, dict)
    return found


def longer(path: Path, steps: int) -> Path:
    path.write_text(path.read_text().replace("max_steps: 12", f"max_steps: {steps}"))
    return path


EVERY = 0.5  # a launch looks at its runs twice in that time


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of progress twice as often, for runs that take a second."""
    monkeypatch.setattr(json_lines, "EVERY", EVERY)


@pytest.mark.usefixtures("_quick")
def test_a_study_is_told_from_its_plan_to_its_comparison(write_study: Write, store: Store) -> None:
    """The judges: the stages' own files, `status --json` and `report --json`."""
    path = longer(write_study("lines", TWO, seeds=[700, 701]), 200)
    answer = lit_llm("run", path, "--store", store.root, "-j", 2, "--json")
    assert answer.returncode == 0, answer.stderr
    lines = told(answer)
    (planned,) = [line for line in lines if line["event"] == "planned"]
    assert [(run["arm"], run["seed"], run["to_do"]) for run in planned["runs"]] == [
        (arm, seed, True) for arm in ("red", "dec") for seed in (700, 701)
    ]
    stages = by_stage(lines)
    assert stages.keys() == {(run["run"], "pretrain") for run in planned["runs"]}
    for (_, _), events in stages.items():
        assert [line["event"] for line in events] == ["started", *["progress"] * (len(events) - 2), "finished"]
        measured = {
            line["step"]: line["metrics"] for line in read_metrics(store.stage(events[0]["fingerprint"]).metrics_file)
        }
        for line in events[1:]:
            assert line["steps"] == 200
            assert line["loss"] == measured[line["step"]]["train/loss"]
            assert line["tokens_per_second"] == measured[line["step"]]["throughput/tokens_per_second"]
        steps = [line["step"] for line in events[1:]]
        assert steps == sorted(steps)
        times = [line["time"] for line in events if line["event"] == "progress"]
        assert all(after - before > 0.95 * EVERY for before, after in itertools.pairwise(times))
    assert any(line["event"] == "progress" for line in lines)
    status = json.loads(lit_llm("status", path, "--store", store.root, "--json").stdout)["runs"]
    same = ("arm", "seed", "stage", "after", "evaluation", "fingerprint", "state", "metrics", "error", "step", "log")
    assert [{key: events[-1][key] for key in same} for events in stages.values()] == [
        {key: row[key] for key in same} for row in status
    ]
    assert lines[-1]["event"] == "compared"
    assert content(lines[-1]) == reported(path, store)


def test_what_fails_and_what_diverges_end_with_their_states(write_study: Write, store: Store) -> None:
    path = write_study("uneven", UNEVEN, seeds=[702])
    answer = lit_llm("run", path, "--store", store.root, "--json")
    assert answer.returncode == 1
    lines = told(answer)
    ends = {line["arm"]: line for line in lines if line["event"] == "finished"}
    assert {arm: line["state"] for arm, line in ends.items()} == {"red": "done", "broken": "failed", "lost": "diverged"}
    assert "gpu" in ends["broken"]["error"].lower() or "cuda" in ends["broken"]["error"].lower()
    assert Path(ends["broken"]["log"]).exists()
    assert content(lines[-1]) == reported(path, store)
    assert "lit-llm status" in answer.stderr
    again = told(lit_llm("run", path, "--store", store.root, "--json"))
    assert [line["event"] for line in again] == ["planned", "compared"]
    assert [run["state"] for run in again[0]["runs"]] == ["done", "failed", "diverged"]


@pytest.mark.slow
def test_ctrl_c_is_told_and_the_next_run_tells_the_rest(write_study: Write, store: Store) -> None:
    path = longer(write_study("stopped", TWO, seeds=[703]), 800)
    options = ("run", path, "--store", store.root, "-j", 2, "--json")
    process = started(*options)
    assert process.stdout is not None
    heard = []
    for line in process.stdout:  # each comes as it happens
        heard.append(line)
        assert time.time() - json.loads(line)["time"] < 5
        if json.loads(line)["event"] == "progress":
            break
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    lines = told(subprocess.CompletedProcess([], 130, "".join(heard) + rest, errors))
    assert {(line["run"], line["state"]) for line in lines if line["event"] == "finished"} == {
        ("red/seed 703", "interrupted"),
        ("dec/seed 703", "interrupted"),
    }
    assert [line["event"] for line in lines[-2:]] == ["interrupted", "compared"]
    assert "goes on" in errors
    went_on = told(lit_llm(*options))
    assert {line["state"] for line in went_on if line["event"] == "finished"} == {"done"}
    assert min(line["step"] for line in went_on if line["event"] == "progress") > 0
    assert content(went_on[-1]) == reported(path, store)


def test_ctrl_c_before_the_first_run_is_told_too(
    write_study: Write, write_sweep: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    for module in ("studies", "sweeps"):
        monkeypatch.setattr(f"lit_llm.{module}.run.prepare_data", stopped)
    study = write_study("early", TWO)
    sweep = write_sweep("early_too", f"{TWO}\nspace: {{pretrain.training.optimizer.lr: {{log_uniform: [1e-4, 1e-1]}}}}")
    for name, path in (("run", study), ("sweep", sweep)):
        answer = lit_llm(name, path, "--store", tmp_path / "store", "--json")
        assert [json.loads(line)["event"] for line in answer.stdout.splitlines()] == ["interrupted"]
        assert answer.returncode == 130


def test_every_stage_of_a_run_is_told_and_what_was_there_is_not(write_study: Write, store: Store) -> None:
    path = write_study("stages", "arms: {red: {}}", seeds=[704])
    lit_llm("run", path, "--store", store.root)
    lines = told(lit_llm("evaluate", path, "-o", "evaluate.likelihood={}", "--store", store.root, "--json"))
    ends = [line for line in lines if line["event"] == "finished"]
    assert [(line["stage"], line["evaluation"], line["after"], line["state"]) for line in ends] == [
        ("evaluate", "likelihood", "pretrain", "done")
    ]


def test_a_wrong_study_says_nothing_on_stdout(write_study: Write, tmp_path: Path) -> None:
    path = write_study("wrong", "arms: {red: {modle: {}}}")
    answer = lit_llm("run", path, "--store", tmp_path / "store", "--json")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "did you mean 'model'" in answer.stderr


@pytest.mark.slow
def test_the_runs_go_on_when_nobody_reads_any_more(write_study: Write, store: Store) -> None:
    path = write_study("alone", TWO, seeds=[705])
    process = started("run", path, "--store", store.root, "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(timeout=300) == 0
    assert said.count("Nobody reads the lines any more") == 1
    assert [row["states"] for row in reported(path, store)["rows"]] == [{"done": 1}] * 2


@pytest.mark.usefixtures("_quick")
def test_a_sweep_tells_its_trials_and_then_its_winners(write_sweep: Write, store: Store) -> None:
    """The judges: `status --json` and `report --json`, of the sweep and of the study of its winners."""
    space = (
        "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-1]}}\nseeds: [706]\nwinners: {seeds: [707]}"
    )
    path = longer(write_sweep("searched", f"{TWO}\n{space}", trials=2), 100)
    answer = lit_llm("sweep", path, "--store", store.root, "-j", 2, "--json")
    assert answer.returncode == 0, answer.stderr
    lines = told(answer)
    trials = defaultdict(list)
    for line in lines:
        if "trial" in line:
            trials[line["trial"]].append(line)
    status = {f"{row['arm']}/trial {row['number']:03}": row for row in
              json.loads(lit_llm("status", path, "--store", store.root, "--json").stdout)["trials"]}  # fmt: skip
    assert trials.keys() == status.keys()
    for name, events in trials.items():
        assert [line["event"] for line in events] == ["started", *["progress"] * (len(events) - 2), "finished"]
        assert {key: events[-1][key] for key in status[name]} == status[name]
    (comparing,) = [line for line in lines if line["event"] == "comparing"]
    assert [line["event"] for line in lines[-2:]] == ["compared", "searched"]
    assert content(lines[-2]) == reported(Path(comparing["file"]), store)
    assert content(lines[-1]) == reported(path, store)

"""A stage has one holder that counts: the last one to claim it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from lit_llm.config.host import host_name, process_name
from lit_llm.report.tables.plan import render_status
from lit_llm.runs.run_one_stage import run_one
from lit_llm.store.claims import Superseded, last_claim, make_claim
from lit_llm.store.locks import VARIABLE, locked
from lit_llm.store.store import Stage, Store, read_json
from lit_llm.training.checkpoints import LAST, PREVIOUS, newest_checkpoint
from tests.stages_in_parts import numbers, prepared_stage, stops_after
from tests.store.other_hosts import Hosts, hosts

__all__ = ["hosts"]
NAME = "0123456789abcdef"


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Store(tmp_path / "store").open().stage(NAME)


def generation_of(stage: Stage) -> int:
    claim = last_claim(stage.folder)
    assert claim is not None
    return claim.generation


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_generation_rises_with_each_claim_and_names_the_holder(stage: Stage) -> None:
    for generation in (1, 2, 3):
        with stage.claim():
            claim = last_claim(stage.folder)
            assert claim is not None
            assert (claim.generation, claim.host, claim.pid) == (generation, host_name(), os.getpid())
    stage.forget()
    assert generation_of(stage) == 4


def test_the_generation_rises_over_a_damaged_file(stage: Stage) -> None:
    with stage.claim():
        (stage.folder / "claim.json").write_text("{")
        with pytest.raises(Superseded, match="taken over by nobody"):
            stage.check_claim()
    with stage.claim():
        assert generation_of(stage) > 10**9


def test_a_late_holder_writes_no_state_and_no_result(stage: Stage) -> None:
    late = stage.store.stage(NAME)
    with late.claim():
        late.set_state("running")
        make_claim(stage.folder, durable=False)  # as another host does that believes this one dead
        before = files_of(stage.folder)
        for write in (lambda: late.set_state("failed", "late"), lambda: late.finish({"state": "done"})):
            with pytest.raises(Superseded, match=f"taken over by process {os.getpid()} on {host_name()}"):
                write()
        assert files_of(stage.folder) == before
    with stage.claim():
        stage.finish({"state": "done"})
    assert stage.status()["state"] == "done"


def test_a_holder_without_its_lease_ends_before_the_next_step(stage: Stage) -> None:
    with stage.claim():
        stage.check_lease()
        stage._lose("owner-changed")
        for check in (stage.check_lease, stage.check_claim):
            with pytest.raises(Superseded, match=r"lease of the stage was lost \(owner-changed\)"):
                check()
    with stage.claim():
        stage.check_claim()


def test_work_files_carry_host_and_process(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal process ids of two hosts do not meet in one file."""
    names: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: names.append(path.name) or replace(path, to))
    stage.set_state("pending")
    assert names == [f".state.json.{process_name()}"]
    assert process_name() == f"{host_name()}-{os.getpid()}"
    assert (read_json(stage.folder / "state.json") or {})["host"] == host_name()


def test_a_stopped_holder_that_wakes_up_after_its_lease_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hosts: Hosts
) -> None:
    monkeypatch.setenv(VARIABLE, "lease:1")
    stage = Store(tmp_path / "store").open().stage(NAME)
    holder = hosts.holder(stage.store.root, NAME, host="another")
    assert holder.send("state") == "written"
    holder.signal(signal.SIGSTOP)
    with locked(stage.folder / "lock", patience=20):  # its lease is over
        pass
    with stage.claim():
        stage.finish({"state": "done", "by": "successor"})
        before = files_of(stage.folder)
        holder.signal(signal.SIGCONT)
        for word in ("state", "result"):
            answer = holder.send(word)
            assert "was taken over by process" in answer or "lease of the stage was lost" in answer
        assert files_of(stage.folder) == before


# --- training ------------------------------------------------------------------------------------------------------

OFTEN = ("pretrain.training.execution.checkpoint_every=2",)


def test_a_late_holder_writes_no_checkpoint_and_gives_the_stage_up(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its fifth step another process claims the stage. It then waits for that result, and so goes on itself."""
    stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny", *OFTEN)
    seen: list[dict[str, bytes]] = []
    steps = iter(range(10**6))

    def should_stop() -> bool:
        step = next(steps)
        if step == 5:
            assert newest_checkpoint(stage.checkpoints, print) == stage.checkpoints / LAST
            make_claim(stage.folder, durable=False)
            seen.append(files_of(stage.checkpoints))
        if len(seen) == 1 and generation_of(stage) > 2:
            seen.append(files_of(stage.checkpoints))
        return False

    assert run_one(tmp_path, stage.fingerprint, should_stop) == "done"
    assert "this process gives the stage up" in capsys.readouterr().out
    before, after = seen
    assert {LAST, PREVIOUS} <= before.keys()
    assert after == before
    assert generation_of(stage) == 3


RUN = """
import sys
from lit_llm.runs.run_one_stage import run_one
from lit_llm.store.claims import FILE
from pathlib import Path
steps = iter(range(10**6))
def should_stop():
    step = next(steps)
    if step == 6:
        print("step 6", flush=True)
        sys.stdin.readline()
    return False
print(run_one(Path(sys.argv[1]), sys.argv[2], should_stop), flush=True)
"""


@pytest.mark.slow
def test_a_run_of_a_stopped_host_is_finished_by_another_with_the_same_bits(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, hosts: Hosts
) -> None:
    """The stopped process wakes up, is refused, and returns the other's result."""
    monkeypatch.setenv(VARIABLE, "lease:2")
    stage = prepared_stage(Store(tmp_path / "leases"), corpus, "decllm-tiny", *OFTEN)
    monkeypatch.delenv(VARIABLE)
    whole = prepared_stage(Store(tmp_path / "whole"), corpus, "decllm-tiny", *OFTEN)
    assert run_one(whole.store.root, whole.fingerprint, lambda: False) == "done"
    late = hosts.start(RUN, stage.store.root, stage.fingerprint, host="another")
    assert late.line() == "step 6"
    late.signal(signal.SIGSTOP)
    stopped = time.monotonic()
    assert run_one(stage.store.root, stage.fingerprint, lambda: False) == "done"
    assert time.monotonic() - stopped > 1.5
    before = files_of(stage.folder)
    late.signal(signal.SIGCONT)
    lines = [late.send("go"), late.line()]
    assert "gives the stage up" in lines[0]
    assert lines[1] == "done"
    after = files_of(stage.folder)
    assert {name for name in before if name != "claim.json" and before[name] != after.get(name)} == set()
    assert numbers(stage) == numbers(whole)
    weights = [each.checkpoints / "model.safetensors" for each in (stage, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_unfinished_checkpoints_of_other_processes_are_removed_by_the_next_holder(tmp_path: Path, corpus: Path) -> None:
    stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny", *OFTEN)
    run_one(tmp_path, stage.fingerprint, stops_after(3))
    left = stage.checkpoints / f".{LAST}.node7-4711"
    left.write_bytes(b"half")
    run_one(tmp_path, stage.fingerprint, stops_after(2))
    assert not left.exists()
    assert (stage.checkpoints / LAST).exists()


@pytest.mark.parametrize(("host", "note"), [(host_name(), ""), ("node7", "on node7"), (None, "")])
def test_the_status_names_another_host_that_executes_a_run(host: str | None, note: str) -> None:
    row = {
        "arm": "red", "seed": 0, "stage": "pretrain", "after": None, "evaluation": None,
        "state": "running", "host": host, "metrics": {}, "error": None,
        "retries": 0, "step": 1, "max_steps": 2, "stale": False, "log": None,
    }  # fmt: skip
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render_status([row], "val/target_nll"))
    assert captured.get().splitlines()[1].partition("–")[2].strip() == note

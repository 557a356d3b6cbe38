"""Processes of a stage on several devices: they start with it, end with it, and interrupt it when they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.runs import ranks, stage_training, stages
from lit_llm.runs.provenance import provenance, same_provenance
from lit_llm.runs.ranks import execution_of_first, started_ranks
from lit_llm.runs.run_one_stage import run_one
from lit_llm.runs.stage_config import halve_micro_batch, load_stage_config
from lit_llm.store.store import Stage, Store
from lit_llm.training.config import ExecutionConfig, TrainingConfig
from lit_llm.training.devices import DeviceGroup
from tests.stages_in_parts import numbers, prepared_stage

EXECUTION = "pretrain.training.execution"
SECONDS = 300.0
"""Longest wait, which only finds a hang."""
pytestmark = pytest.mark.xdist_group("ranks")


def on_devices(store: Store, corpus: Path, strategy: str = "ddp", *overrides: str) -> Stage:
    several = f"{EXECUTION}.devices=2", f"{EXECUTION}.strategy={strategy}"
    return prepared_stage(store, corpus, "decllm-tiny", f"{EXECUTION}.checkpoint_every=5", *several, *overrides)


def ranks_of(stage: Stage) -> list[psutil.Process]:
    """The processes that help a stage."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if "lit_llm.runs.rank" in words and str(stage.folder.parents[1]) in words:
            found.append(process)
    return found


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [(), ("pretrain.training.sequence_warmup={begin: 8, steps: 9}",)], ids=["", "rows"])
def test_a_stage_whose_rank_is_killed_is_interrupted_and_goes_on_sharded(
    tmp_path: Path, corpus: Path, keys: tuple[str, ...]
) -> None:
    """Killed after step 7, continued by the other strategy: the metrics are those of one device without a stop."""
    whole = prepared_stage(Store(tmp_path / "whole"), corpus, "decllm-tiny", *keys)
    assert run_one(tmp_path / "whole", whole.fingerprint) == "done"
    root, calls = tmp_path / "several", iter(range(1000))
    stage = on_devices(Store(root), corpus, "ddp", *keys)

    def kill_after_seven() -> bool:
        if next(calls) == 7:
            (rank,) = ranks_of(stage)
            rank.kill()
            wait_for(lambda: not ranks_of(stage))
        return False

    assert run_one(root, stage.fingerprint, kill_after_seven) == "interrupted"
    assert stage.status()["error"] == "rank 1 was killed by SIGKILL"

    assert on_devices(Store(root), corpus, "fsdp", *keys).fingerprint == stage.fingerprint == whole.fingerprint
    assert run_one(root, stage.fingerprint) == "done"
    result, judge = stage.result(), whole.result()
    assert result is not None
    assert judge is not None
    assert [step for step, _ in numbers(stage)] == [step for step, _ in numbers(whole)]
    for (_, trained), (_, wanted) in zip(numbers(stage), numbers(whole), strict=True):
        assert trained == pytest.approx(wanted, rel=1e-4)
    assert result["initial"] == judge["initial"]
    assert [result["provenance"][key] for key in ("devices", "nodes", "strategy")] == [2, 1, "fsdp"]
    assert same_provenance(result["provenance"], judge["provenance"])
    assert (stage.checkpoints / "model.safetensors").stat().st_size == (
        whole.checkpoints / "model.safetensors"
    ).stat().st_size
    assert not ranks_of(stage)


@pytest.mark.slow
def test_ranks_end_with_the_process_that_they_help(tmp_path: Path, corpus: Path) -> None:
    """Killed, it leaves none; asked to stop, it saves with their help, although they ignore the signal themselves."""
    stage = on_devices(Store(tmp_path), corpus, "fsdp", "pretrain.training.max_steps=100000")
    code = f"from tests.runs.test_ranks import run_in_worker as run; run({str(tmp_path)!r}, {stage.fingerprint!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}

    @contextmanager
    def begun() -> Iterator[subprocess.Popen[str]]:
        lines = stage.metrics_file.read_bytes().count(b"\n") if stage.metrics_file.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        try:
            wait_for(lambda: stage.metrics_file.exists() and stage.metrics_file.read_bytes().count(b"\n") > lines + 3)
            yield process
        finally:
            process.kill()
            process.wait()

    with begun():
        pass
    wait_for(lambda: not ranks_of(stage))

    with begun() as process:
        for rank in ranks_of(stage):
            rank.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=SECONDS)[0].splitlines()[-1] == "interrupted"
    assert stage.status()["error"] == "it was asked to stop"
    assert not ranks_of(stage)


def run_in_worker(root: str, fingerprint: str) -> None:
    """Run a stage as a worker's process does, which notes SIGTERM and stops at the next step."""
    from lit_llm.launch import child

    signal.signal(signal.SIGTERM, child._request_stop)
    print(run_one(Path(root), fingerprint, child.stop_requested))


@pytest.mark.slow
def test_a_rank_that_fails_fails_the_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Before any communication: rank 0 does not wait for it. Here there is no configuration for the rank to read."""
    stage = Store(tmp_path).stage("0" * 16)
    execution = ExecutionConfig(devices=2)
    with pytest.raises(RuntimeError, match="rank 1 failed; its error is in the run's log"):  # noqa: SIM117
        with started_ranks(stage, execution) as group:
            group.wait_until_ready(group)
    assert "rank 1:" in capfd.readouterr().err


SRUN = """#!{python}
import os, subprocess, sys
options = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
first = next(at for at, word in enumerate(sys.argv) if at and not word.startswith("--"))
places = [dict(SLURM_PROCID=str(n), SLURM_LOCALID="0") for n in range(int(options["ntasks"]))]
tasks = [subprocess.Popen(sys.argv[first:], env=dict(os.environ, **place)) for place in places]
sys.exit(max(task.wait() for task in tasks))
"""
"""What stands in for SLURM's command: it starts the tasks on this machine, with its own standard input."""


@pytest.mark.slow
def test_several_nodes_get_their_ranks_by_srun(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first task has the place of rank 0 and only waits; variables of another launcher do not count."""
    (tmp_path / "srun").write_text(SRUN.format(python=sys.executable))
    (tmp_path / "srun").chmod(0o700)
    variables = {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "localhost", "RANK": "7", "LOCAL_RANK": "7"}
    for name, value in {**variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    stages = {
        nodes: prepared_stage(Store(tmp_path / nodes), corpus, "decllm-tiny", f"{EXECUTION}.nodes={nodes}")
        for nodes in ("1", "2")
    }
    assert [run_one(tmp_path / nodes, stage.fingerprint) for nodes, stage in stages.items()] == ["done", "done"]
    one, two = ((stage.result() or {})["metrics"]["train/loss"] for stage in stages.values())
    assert two == pytest.approx(one, rel=1e-5)


def test_all_ranks_take_the_kernels_and_the_strategy_of_rank_0(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On unlike nodes they would choose otherwise: here this machine, which stands for rank 1's, has no compiler."""
    stage = on_devices(Store(tmp_path), corpus, "auto", f"{EXECUTION}.kernels=compiled")
    monkeypatch.setattr(ranks, "_start", lambda *_: {})
    monkeypatch.setattr("lit_llm.runs.kernels._no_compiler", lambda gpu: "no compiler")
    trained: list[TrainingConfig] = []
    monkeypatch.setattr(stage_training, "fit", lambda model, training, *_, **__: trained.append(training))
    chosen = ExecutionConfig(devices=2, kernels="compiled", strategy="fsdp")
    with started_ranks(stage, chosen) as group:
        assert group.store is not None
        follows = DeviceGroup(1, 2, 1, group.store), execution_of_first(group.store)
        control = stage_training.Control(follows=follows)
        stages.STAGES["pretrain"](load_stage_config(stage), stage, Store(tmp_path), control)
    assert [training.execution for training in trained] == [chosen]


def test_several_nodes_need_a_job_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    stage = Store(tmp_path).stage("0" * 16)
    with pytest.raises(InputError, match="2 nodes, but this is no job of SLURM; start"):  # noqa: SIM117
        with started_ranks(stage, ExecutionConfig(nodes=2)):
            pass


def test_devices_decide_a_result_only_with_dropout_or_bf16_masters() -> None:
    """Recorded always, and compared where they change the draw of dropout, or the sums of bfloat16 gradients."""

    def origin(*overrides: str) -> dict[str, Any]:
        return provenance(load_experiment("decllm-tiny", overrides))

    two = f"{EXECUTION}.devices=2"
    assert same_provenance(origin(), origin(two))
    assert [origin(two)[key] for key in ("devices", "strategy")] == [2, "ddp"]
    assert [origin()[key] for key in ("devices", "strategy")] == [1, None]
    for setting in ("pretrain.training.dropout=0.1", "pretrain.training.precision=bf16_master"):
        assert not same_provenance(origin(setting), origin(setting, two))


def test_out_of_memory_halves_the_rows_of_one_device(tmp_path: Path, corpus: Path) -> None:
    """A batch of four on two devices: two rows each at once, then one."""
    stage = on_devices(Store(tmp_path), corpus)
    assert halve_micro_batch(stage) == 1
    assert halve_micro_batch(stage) is None

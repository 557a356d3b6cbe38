"""Studies and sweeps on a real SLURM: whole, and as on this machine, whatever becomes of their places."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lit_llm.store.store import Store
from tests.launch.slurm_cluster import SlurmCluster, wait_for
from tests.test_kills import content, stages, started

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

ON_SLURM = ["--launcher", "slurm", "--places", "2", "-j", "1"]
WHOLE_NODES = "[launch]\ncpus = 2\n"
HANGS = 300
"""Seconds."""


class Followed:
    """A study or sweep on SLURM, followed by a process, and what becomes of its places."""

    def __init__(self, name: str, store: Store, slurm: SlurmCluster) -> None:
        self.name, self.store, self.slurm = name, store, slurm
        store.root.mkdir()
        (store.root / "settings.toml").write_text(WHOLE_NODES)

    def training(self) -> bool:
        """Two stages are trained by living processes and have a checkpoint."""
        claims = [claim for claim in self.store.root.glob("stages/*/claim.json") if not is_done(claim.parent)]
        holders = [json.loads(claim.read_text())["pid"] for claim in claims if has_checkpoint(claim.parent)]
        return sum(map(psutil.pid_exists, holders)) == 2

    def place(self) -> tuple[str, str]:
        """A running place and its node, once two train."""
        wait_for(self.training, HANGS)
        lines = self.slurm.call("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i %N").splitlines()
        place, node = lines[0].split()
        return place, node

    def preempt_one(self) -> None:
        place, _ = self.place()
        self.slurm.call("scontrol", "requeue", place)
        wait_for(lambda: self.is_queued(place))
        self.slurm.call("scontrol", "update", f"JobId={place}", "StartTime=now")

    def kill_a_node(self) -> None:
        place, node = self.place()
        self.slurm.kill_node(node)
        # What SLURM itself does half a minute later.
        self.slurm.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")
        wait_for(lambda: self.is_queued(place))
        self.slurm.start_node(node)

    def cancel_one(self) -> None:
        self.slurm.call("scancel", self.place()[0])

    def is_queued(self, place: str) -> bool:
        return "PENDING" in self.slurm.call("squeue", "--noheader", "--array", f"--jobs={place}", "--format=%T")

    def requests(self) -> list[str]:
        return sorted(folder.name for folder in (self.store.study(self.name) / "places").iterdir())


def is_done(stage: Path) -> bool:
    return (stage / "result.json").exists()


def has_checkpoint(stage: Path) -> bool:
    return (stage / "checkpoints" / "last.ckpt").exists()


def test_a_study_with_a_preempted_a_lost_and_a_cancelled_place_ends_as_on_this_machine(
    slurm: SlurmCluster, write_study: Callable[..., Path], tmp_path: Path
) -> None:
    # Enough that two are left when the node is back.
    path, log = write_study("places", "", seeds=[*range(7)], extends="decllm-tiny"), tmp_path / "log.txt"
    text = path.read_text().replace("max_steps: 12", "max_steps: 400")
    path.write_text(text.replace("log_every: 4", "log_every: 4, checkpoint_every: 8"))
    here, there = Store(tmp_path / "here"), Store(tmp_path / "there")
    followed = Followed("places", there, slurm)
    with started(["run", str(path), *ON_SLURM], there, log) as process:
        followed.preempt_one()
        followed.kill_a_node()
        followed.cancel_one()
        assert process.wait(HANGS) == 0, log.read_text()
    assert len(followed.requests()) > 1  # another place was asked for instead of the cancelled one
    with started(["run", str(path), "-j", "2"], here, log) as process:
        assert process.wait(HANGS) == 0, log.read_text()
    expected, found = ({name: content(stage) for name, stage in stages(store).items()} for store in (here, there))
    assert found == expected
    assert {each["state"] for each in found.values()} == {"done"}


def test_a_sweep_with_a_preempted_and_a_cancelled_place_draws_its_budget(
    slurm: SlurmCluster, write_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    space = "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-1]}}"
    arms = "arms: {red: {}, dec: {extends: decllm-tiny}}"
    path, log = write_sweep("drawn", f"{arms}\n{space}\nseeds: [0]\nwinners: {{seeds: []}}", trials=3), tmp_path / "log"
    text = path.read_text().replace("max_steps: 12", "max_steps: 200")
    path.write_text(text.replace("log_every: 4", "log_every: 4, checkpoint_every: 8"))
    store = Store(tmp_path / "store")
    followed = Followed("drawn", store, slurm)
    with started(["sweep", str(path), *ON_SLURM], store, log) as process:
        followed.preempt_one()
        followed.cancel_one()
        assert process.wait(HANGS) == 0, log.read_text()
    answer = subprocess.run(
        [sys.executable, "-m", "lit_llm", "status", "drawn", "--store", str(store.root), "--json"],
        capture_output=True,
        check=True,
    )
    trials = json.loads(answer.stdout)["trials"]
    assert Counter((trial["arm"], trial["state"]) for trial in trials) == {("red", "done"): 3, ("dec", "done"): 3}
    assert len(stages(store)) == len(trials)

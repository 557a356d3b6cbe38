"""Studies and sweeps on a real cluster of Ray: whole, and as on this machine, whatever the cluster loses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.store.claims import last_claim
from lit_llm.store.store import Stage, Store
from tests.launch.ray_cluster import RayCluster, ray_cluster
from tests.mlflow_runs import mirrored
from tests.test_kills import content, stages, started

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'lit-llm[ray]'"),
    pytest.mark.xdist_group("ray_study"),
]

ON_RAY = ["--launcher", "ray", "--places", "2", "-j", "1"]
HANGS = 300
"""Seconds."""


def wait_for(happened: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < HANGS, "this does not happen"
        time.sleep(0.05)


def use(cluster: RayCluster, store: Store) -> None:
    """Write the address of a cluster into the settings of a store."""
    store.root.mkdir(exist_ok=True)
    (store.root / "settings.toml").write_text(f'[launch.ray]\naddress = "{cluster.address}"\n')


def in_training(store: Store) -> list[Stage]:
    """Stages that are trained and have a checkpoint."""
    if not (store.root / "stages").exists():
        return []
    running = [stage for stage in stages(store).values() if stage.status()["state"] == "running"]
    return [stage for stage in running if (stage.checkpoints / "last.ckpt").exists()]


def generations(store: Store) -> Counter[int]:
    """{generation of the last claim: stages}. Each process that takes a stage raises its generation by one."""
    claims = [last_claim(stage.folder) for stage in stages(store).values()]
    return Counter(claim.generation for claim in claims if claim is not None)


def longer(path: Path, steps: int) -> Path:
    """Write more steps into a study, and a checkpoint every eight."""
    text = path.read_text().replace("max_steps: 12", f"max_steps: {steps}")
    path.write_text(text.replace("log_every: 4", "log_every: 4, checkpoint_every: 8"))
    return path


@pytest.fixture
def study(write_study: Callable[..., Path]) -> Path:
    return longer(write_study("places", "", seeds=[0, 1, 2, 3], extends="decllm-tiny"), 400)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of a run without a launcher, which the first test fills."""
    return Store(tmp_path_factory.mktemp("here") / "store")


def assert_as_here(study: Path, there: Store, here: Store, log: Path) -> None:
    """The study's stages are done, to the bit those of a run on this machine, and each run is once in MLflow."""
    with started(["run", str(study), "-j", "2"], here, log) as process:
        assert process.wait(HANGS) == 0, log.read_text()
    expected, found = ({name: content(stage) for name, stage in stages(store).items()} for store in (here, there))
    assert found == expected
    assert {each["state"] for each in found.values()} == {"done"}
    assert set(mirrored(there.root).values()) == {1}


def test_a_study_that_loses_a_node_in_mid_run_ends_as_on_this_machine(study: Path, here: Store, tmp_path: Path) -> None:
    there, log = Store(tmp_path / "there"), tmp_path / "log.txt"
    with ray_cluster(tmp_path / "ray.txt") as cluster:
        use(cluster, there)
        with started(["run", str(study), *ON_RAY], there, log) as process:
            wait_for(lambda: len(in_training(there)) == 2)
            cluster.daemons[1].kill()
            assert process.wait(HANGS) == 0, log.read_text()
    assert generations(there) == {1: 3, 2: 1}, "the stage of the lost node goes on once, no other begins twice"
    assert_as_here(study, there, here, log)


def test_a_study_that_loses_its_head_goes_on_by_the_same_command_under_a_new_one(
    study: Path, here: Store, tmp_path: Path
) -> None:
    there, log = Store(tmp_path / "there"), tmp_path / "log.txt"
    with ray_cluster(tmp_path / "ray.txt") as cluster:
        use(cluster, there)
        with started(["run", str(study), *ON_RAY], there, log) as process:
            wait_for(lambda: len(in_training(there)) == 2)
            cluster.head.kill()
            for daemon in cluster.daemons:
                daemon.kill()  # as they do themselves after a minute without a head
            assert process.wait(HANGS) == 130, log.read_text()
    assert "start a new one and repeat the same command" in " ".join(log.read_text().split())
    wait_for(lambda: in_training(there) == [])
    with ray_cluster(tmp_path / "ray.txt") as cluster:
        use(cluster, there)
        with started(["run", str(study), *ON_RAY], there, log) as process:
            assert process.wait(HANGS) == 0, log.read_text()
    assert generations(there) == {1: 2, 2: 2}, "the two stages of the lost cluster go on once"
    assert_as_here(study, there, here, log)


def test_a_sweep_that_loses_a_node_draws_its_budget_exactly(write_sweep: Callable[..., Path], tmp_path: Path) -> None:
    space = "space: {pretrain.training.optimizer.lr: {log_uniform: [1e-4, 1e-1]}}"
    arms = "arms: {red: {}, dec: {extends: decllm-tiny}}"
    path = longer(write_sweep("drawn", f"{arms}\n{space}\nseeds: [0]\nwinners: {{seeds: []}}", trials=2), 200)
    store, log = Store(tmp_path / "store"), tmp_path / "log.txt"
    with ray_cluster(tmp_path / "ray.txt") as cluster:
        use(cluster, store)
        with started(["sweep", str(path), *ON_RAY], store, log) as process:
            wait_for(lambda: len(in_training(store)) == 2)
            cluster.daemons[1].kill()
            assert process.wait(HANGS) == 0, log.read_text()
    status = [sys.executable, "-m", "lit_llm", "status", "drawn", "--store", str(store.root), "--json"]
    trials = json.loads(subprocess.run(status, capture_output=True, check=True).stdout)["trials"]
    assert Counter((trial["arm"], trial["state"]) for trial in trials) == {("red", "done"): 2, ("dec", "done"): 2}
    assert len(stages(store)) == len(trials)

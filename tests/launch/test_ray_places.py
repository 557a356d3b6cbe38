"""Places on a cluster of Ray: whatever is lost, the command ends, and the engine knows which places are left."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from lit_llm.launch.engine import EngineError, Needs, Place
from lit_llm.launch.ray import RayEngine
from lit_llm.launch.ray_settings import RaySettings
from tests.launch.ray_cluster import ONE_CPU, RayCluster, ray_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'lit-llm[ray]'"),
    pytest.mark.xdist_group("ray"),
]
SECONDS = 60
"""Only a hang takes longer."""

WORK = """
import json, os, signal, sys, time
def save(number, frame):
    print(json.dumps({"saved": number}), flush=True)
    if "stubborn" not in sys.argv:
        sys.exit(3)
signal.signal(signal.SIGTERM, save)
print(json.dumps({"pid": os.getpid(), "session": os.getsid(0), "gpus": os.environ["CUDA_VISIBLE_DEVICES"],
                  "folder": os.getcwd(), "variable": os.environ.get("OF_THE_COORDINATOR")}), flush=True)
for _ in range(3000):
    time.sleep(0.1)
"""


def working(*arguments: str) -> list[str]:
    """A command that reports, works for minutes, and saves when it is asked to."""
    return [sys.executable, "-c", WORK, *arguments]


class Started:
    """Places that a test has started on a cluster."""

    def __init__(self, engine: RayEngine, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.ids: list[str] = []

    def start(self, command: Sequence[str], count: int = 1, needs: Needs | None = None) -> list[str]:
        """Start places in a folder of their own."""
        self.folder = self.folder / str(len(self.ids))
        ids = self.engine.start(command, needs or Needs(), count, self.folder)
        self.ids += ids
        return ids

    def lines(self, id: str) -> list[Any]:
        """What a command has reported, and the lines of the supervisor as they are."""
        log = self.engine.log(id, self.folder)
        lines = log.read_text().splitlines() if log.exists() else []
        return [json.loads(line) if line.startswith("{") else line for line in lines]

    def report(self, id: str) -> dict[str, Any]:
        """The first report of a command."""
        wait_until(lambda: bool(self.lines(id)))
        return self.lines(id)[0]

    def states(self, ids: Sequence[str]) -> list[str]:
        return [place.state for place in self.engine.places(ids)]

    def wait_for(self, ids: Sequence[str], *states: str) -> list[Place]:
        wait_until(lambda: self.states(ids) == list(states))
        return self.engine.places(ids)


def wait_until(happened: Callable[[], bool]) -> float:
    """Seconds until it happened."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < SECONDS, "this does not happen"
        time.sleep(0.05)
    return time.monotonic() - began


def listens(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port)):
        return True
    return False


def is_over(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # a container's init may never reap
    return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Two nodes with a CPU each, the second one with two GPUs that nothing uses."""
    with ray_cluster(tmp_path_factory.mktemp("ray") / "log.txt", [ONE_CPU, {**ONE_CPU, "num_gpus": 2}]) as cluster:
        yield cluster


@pytest.fixture
def places(cluster: RayCluster, tmp_path: Path) -> Iterator[Started]:
    """An engine on the cluster, which stops afterwards what a test has left."""
    started = Started(RayEngine(RaySettings(address=cluster.address)), tmp_path / "logs")
    yield started
    with suppress(EngineError):
        started.engine.stop(started.ids, 0)
        wait_until(lambda: set(started.states(started.ids)) <= {"ended"})
    started.engine.close()


def test_a_command_runs_on_both_nodes_with_the_coordinator_s_environment_and_a_third_place_waits(
    places: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OF_THE_COORDINATOR", "kept")
    monkeypatch.chdir(tmp_path)
    ids = places.start(working(), count=3)
    wait_until(lambda: sorted(places.states(ids)) == ["queued", "running", "running"])
    running = [id for id, state in zip(ids, places.states(ids), strict=True) if state == "running"]
    (queued,) = set(ids).difference(running)
    for id in running:
        report = places.report(id)
        assert (report["folder"], report["variable"], report["gpus"]) == (str(tmp_path), "kept", "")
        assert report["session"] == report["pid"]
    assert places.lines(queued) == []

    places.engine.stop(running, grace_seconds=20)
    wait_until(lambda: set(places.states(running)) == {"ended"})
    assert places.lines(running[0])[1:] == [{"saved": 15}, "lit-llm: the command ended with exit code 3"]
    places.wait_for([queued], "running")  # it was waiting for their CPUs

    places.start(["true"], count=1)
    places.engine.stop(places.ids[-1:], grace_seconds=20)  # queued, or it has ended by itself
    places.wait_for(places.ids[-1:], "ended")


def test_a_command_that_outlasts_its_grace_is_killed(places: Started) -> None:
    ids = places.start(working("stubborn"))
    pid = places.report(ids[0])["pid"]
    places.wait_for(ids, "running")
    places.engine.stop(ids, grace_seconds=1)
    places.wait_for(ids, "ended")
    assert is_over(pid)
    assert places.lines(ids[0])[-1] == "lit-llm: the command ended with SIGKILL"


def test_places_outlive_the_coordinator_and_another_one_finds_and_stops_them(
    places: Started, cluster: RayCluster
) -> None:
    ids = places.start(working())
    places.wait_for(ids, "running")
    places.engine.close()
    anew = RayEngine(RaySettings(address=cluster.address))
    try:
        assert [place.state for place in anew.places(ids)] == ["running"]
        assert [place.state for place in anew.places(["10.9.9.9:1/of_another_cluster_0"])] == ["ended"]
        anew.stop(ids, grace_seconds=20)
    finally:
        anew.close()
    wait_until(lambda: is_over(places.report(ids[0])["pid"]))


def test_two_places_share_a_gpu_and_a_third_gets_another(places: Started) -> None:
    ids = places.start(working(), count=3, needs=Needs(cpus=0, gpus=0.5))
    places.wait_for(ids, *["running"] * 3)
    shared, *others = sorted(places.report(id)["gpus"] for id in ids)
    assert sorted([shared, *others]) in (["0", "0", "1"], ["0", "1", "1"])


def test_an_obstacle_names_what_no_node_has(places: Started, cluster: RayCluster) -> None:
    assert places.engine.obstacle(Needs(gpus=2)) is None
    obstacle = places.engine.obstacle(Needs(cpus=2))
    assert obstacle is not None
    assert obstacle.startswith(f"no node of Ray on {cluster.address} has 2 CPUs: ")


def test_a_command_saves_and_ends_when_its_actor_is_killed(places: Started) -> None:
    ids = places.start(working())
    pid = places.report(ids[0])["pid"]
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline()[:1] == ["ray::PlaceActor"]:
                process.kill()
    (place,) = places.wait_for(ids, "ended")
    assert "worker process has died" in place.detail
    wait_until(lambda: is_over(pid))
    assert {"saved": 15} in places.lines(ids[0])


def test_a_place_that_cannot_start_has_ended_with_the_reason(places: Started, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    places.folder = tmp_path / "a_file"
    (place,) = places.wait_for(places.start(["true"]), "ended")
    assert "NotADirectoryError" in place.detail


def test_a_lost_node_is_noticed_and_its_command_saves_and_ends(places: Started, cluster: RayCluster) -> None:
    ids = places.start(working(), count=2)
    pids = {id: places.report(id)["pid"] for id in ids}
    places.wait_for(ids, "running", "running")
    cluster.daemons[1].kill()
    noticed = wait_until(lambda: "ended" in places.states(ids))
    assert noticed < 10, "a node that does not answer is lost after three checks in 1.5 seconds"
    states = dict(zip(ids, places.engine.places(ids), strict=True))
    (lost,) = (id for id, place in states.items() if place.state == "ended")
    (left,) = set(ids) - {lost}
    wait_until(lambda: is_over(pids[lost]))
    assert {"saved": 15} in places.lines(lost)
    assert not is_over(pids[left])

    (another,) = places.start(working())
    assert places.states([another]) == ["queued"]
    cluster.add_node(num_cpus=1)
    places.wait_for([another], "running")


def test_a_lost_head_is_an_error_with_the_next_step_and_a_new_head_takes_new_places(
    places: Started, cluster: RayCluster, tmp_path: Path
) -> None:
    ids = places.start(working())
    places.wait_for(ids, "running")
    cluster.head.kill()
    with pytest.raises(EngineError, match="start a new one and repeat the same command"):
        places.engine.places(ids)
    with pytest.raises(EngineError, match="start it with `ray start --head`"):
        places.engine.places(ids)
    with ray_cluster(tmp_path / "log.txt", [ONE_CPU]) as anew:
        engine = RayEngine(RaySettings(address=anew.address))
        try:
            assert [place.state for place in engine.places(ids)] == ["ended"]
            again = engine.start(working(), Needs(), 1, tmp_path / "again")
            wait_until(lambda: [place.state for place in engine.places(again)] == ["running"])
        finally:
            engine.close()


def test_a_cluster_that_is_started_here_outlives_its_engine_and_ends_with_its_last_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps the cluster's token there
    engine, other = RayEngine(), RayEngine()
    started = Started(engine, tmp_path)
    ids = started.start(working())
    started.wait_for(ids, "running")
    engine.close()
    try:
        assert [place.state for place in other.places(ids)] == ["running"], "another process finds it by the ids"
        other.stop(ids, grace_seconds=20)
        wait_until(lambda: is_over(started.report(ids[0])["pid"]))
        assert {"saved": 15} in started.lines(ids[0])
    finally:
        other.close()
    host, _, port = ids[0].partition("/")[0].partition(":")
    wait_until(lambda: not listens(host, int(port)))
    assert [place.state for place in RayEngine().places(ids)] == ["ended"]

"""Places of a real SLURM: run, limited, stopped, preempted, lost with their node."""

from __future__ import annotations

import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from lit_llm.launch.engine import EngineError, Needs
from lit_llm.launch.slurm import SlurmEngine
from lit_llm.launch.slurm_settings import SlurmSettings
from tests.launch.slurm_cluster import KILL_WAIT, SlurmCluster, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]

HELLO = "import os; print(os.environ['SLURMD_NODENAME'], os.environ['SLURM_ARRAY_TASK_ID'], os.getcwd())"
NAP = "import time; print(time.time(), flush=True); time.sleep(2); print(time.time())"
SAVES = """
import os, signal, sys, time
def save(number, frame):
    print(signal.Signals(number).name, flush=True)
    time.sleep({seconds})
    print("saved", flush=True)
    sys.exit(130)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
print("start on", os.environ["SLURMD_NODENAME"], flush=True)
time.sleep(300)
"""
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print('start', flush=True); time.sleep(300)"


class Started:
    """Places of a test, with what they have written."""

    def __init__(self, engine: SlurmEngine, code: str, needs: Needs, count: int, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.ids = engine.start([sys.executable, "-S", "-c", code], needs, count, folder)

    def log(self, number: int = 0) -> str:
        file = self.engine.log(self.ids[number], self.folder)
        return file.read_text() if file.exists() else ""

    def states(self) -> list[str]:
        return [place.state for place in self.engine.places(self.ids)]

    def wait(self, number: int, words: str) -> None:
        wait_for(lambda: words in self.log(number))

    def wait_for_end(self) -> None:
        wait_for(lambda: set(self.states()) == {"ended"})


@pytest.fixture
def start(slurm: SlurmCluster, tmp_path: Path) -> Callable[..., Started]:
    def starter(
        code: str, count: int = 1, needs: Needs = Needs(), folder: str = "100% of a, b", **settings: object
    ) -> Started:
        return Started(SlurmEngine(SlurmSettings(**settings)), code, needs, count, tmp_path / folder)

    return starter


def test_an_array_runs_its_command_on_both_nodes_in_the_current_folder(start, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    places = start(f"{HELLO}; import time; time.sleep(2)", 2, Needs(cpus=2))
    assert places.ids[0].endswith("_0")
    places.wait_for_end()
    words = [places.log(number).split() for number in (0, 1)]
    assert {node for node, _, _ in words} == {"n1", "n2"}
    assert [(task, folder) for _, task, folder in words] == [("0", str(tmp_path)), ("1", str(tmp_path))]
    assert [place.detail for place in places.engine.places(places.ids)] == ["COMPLETED", "COMPLETED"]


def test_no_more_places_run_at_once_than_the_limit(start):
    places = start(NAP, 3, max_running=1)
    wait_for(lambda: "running" in places.states())
    details = Counter(place.detail for place in places.engine.places(places.ids) if place.state == "queued")
    assert details == {"PENDING (JobArrayTaskLimit)": 2}
    places.wait_for_end()
    naps = sorted([float(word) for word in places.log(number).split()] for number in range(3))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(naps))


def test_a_stopped_place_saves_and_a_queued_one_ends(start):
    places = start(SAVES.format(seconds=1), 2, max_running=1)
    places.wait(0, "start")
    assert places.engine.places(places.ids)[0].detail.startswith("RUNNING on n")
    places.engine.stop(places.ids, KILL_WAIT)
    places.wait_for_end()
    assert places.log(0).splitlines()[-1] == "saved"
    assert "SIGTERM" in places.log(0)
    assert places.log(1) == ""
    places.engine.stop(places.ids, KILL_WAIT)  # nothing is left to stop


def test_a_place_may_save_for_longer_than_slurm_waits_with_others_and_a_deaf_one_is_killed(start):
    """SLURM kills five seconds after a cancellation here."""
    places = start(SAVES.format(seconds=KILL_WAIT + 4))
    places.wait(0, "start")
    deaf = start(DEAF, folder="deaf")
    wait_for(lambda: "running" in deaf.states())
    began = time.monotonic()
    places.engine.stop([*places.ids, "999999_0"], 4 * KILL_WAIT)
    deaf.engine.stop(deaf.ids, 1)
    deaf.wait_for_end()
    assert time.monotonic() - began > KILL_WAIT - 1
    places.wait_for_end()
    assert places.log().splitlines()[-1] == "saved"


def test_a_preempted_place_saves_and_starts_again(start, slurm):
    places = start(SAVES.format(seconds=1))
    places.wait(0, "start")
    slurm.call("scontrol", "requeue", places.ids[0])
    wait_for(lambda: places.states() == ["queued"])
    assert "saved" in places.log()
    slurm.call("scontrol", "update", f"JobId={places.ids[0]}", "StartTime=now")
    wait_for(lambda: places.log().count("start") == 2)
    assert places.states() == ["running"]


def test_a_place_saves_before_its_time_limit_and_that_of_a_dead_node_starts_again_on_another(start, slurm):
    """Two claims that each wait half a minute for SLURM, side by side."""
    limited = start(SAVES.format(seconds=1), 1, Needs(hours=2 / 60), signal_seconds=110, options=["--nodelist=n2"])
    limited.wait(0, "start on n2")
    lost = start(SAVES.format(seconds=1), 1, Needs(cpus=2), folder="lost")
    lost.wait(0, "start on n1")
    slurm.kill_node("n1")
    assert not slurm.processes("n1")
    wait_for(lambda: lost.states() == ["queued"])  # once SLURM has noticed
    limited.wait_for_end()
    assert limited.log().split()[-2:] == ["SIGUSR1", "saved"]
    wait_for(lambda: "start on n2" in lost.log())
    assert "saved" not in lost.log()


def test_a_place_gets_its_gpus(start):
    places = start(
        "import os; print(os.environ['SLURMD_NODENAME'], os.environ['SLURM_GPUS_ON_NODE'])",
        needs=Needs(gpus=2),
        gpu_type="toy",
    )
    places.wait_for_end()
    assert places.log().split() == ["n2", "2"]


@pytest.mark.parametrize(
    ("needs", "settings", "words"),
    [
        (Needs(), {}, None),
        (Needs(gpus=2, hours=1000, memory_gb=1.5), {"gpu_type": "toy"}, None),
        (
            Needs(cpus=4, memory_gb=64),
            {},
            "CPUs: a place needs 4, a node has at most 2; GB of memory: a place needs 64",
        ),
        (Needs(gpus=1), {"gpu_type": "a100"}, "a100 GPUs: a place needs 1, a node has at most 0"),
        (Needs(gpus=1), {"partition": "short"}, "partition short: GPUs: a place needs 1, a node has at most 0"),
        (Needs(gpus=0.5), {}, "whole GPUs"),
        (Needs(nodes=3), {}, "a place needs 3 in one partition, there are 2"),
        (Needs(hours=1), {"partition": "short"}, "hours: a place needs 1, the time limit is 0.5"),
        (Needs(), {"partition": "long"}, "no partition 'long'; .* one of: all, short"),
        (Needs(), {"options": ("--constraint=ib",)}, "Invalid feature specification"),
    ],
)
def test_an_obstacle_names_what_is_lacking(slurm, needs, settings, words):
    obstacle = SlurmEngine(SlurmSettings(**settings)).obstacle(needs)
    assert obstacle is None if words is None else re.search(words, obstacle), obstacle


def test_a_refusal_has_slurms_own_words(start):
    with pytest.raises(EngineError, match="Invalid job array specification.*MaxArraySize"):
        start(HELLO, 2000)


def test_an_absent_controller_is_an_error_and_no_end_of_places(slurm, tmp_path, monkeypatch):
    config = tmp_path / "slurm.conf"
    config.write_text(slurm.config.read_text().replace("SlurmctldPort=", "MessageTimeout=2\nSlurmctldPort=1#"))
    monkeypatch.setenv("SLURM_CONF", str(config))
    with pytest.raises(EngineError, match="Unable to contact.*scontrol ping"):
        SlurmEngine().places(["1_0"])

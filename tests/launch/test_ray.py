"""What the Ray launcher says and accepts, without a cluster."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_llm.launch.engine import EngineError, Needs
from lit_llm.launch.ray import RayEngine, lacking
from lit_llm.launch.ray_driver import reason
from lit_llm.launch.ray_settings import RaySettings
from lit_llm.launch.supervised import kill_session

SMALL = {"name": "10.0.0.2", "CPU": 4.0, "GPU": 0.0, "memory": 8e9}
LARGE = {"name": "10.0.0.3", "CPU": 2.0, "GPU": 1.0, "memory": 64e9}


@pytest.mark.parametrize(
    "needs",
    [Needs(cpus=4), Needs(cpus=2, gpus=1, memory_gb=64), Needs(gpus=0.25), Needs(hours=100)],
)
def test_nothing_is_lacking_where_one_node_has_it_all(needs: Needs) -> None:
    assert lacking(needs, [SMALL, LARGE], "10.0.0.1:6379") is None


@pytest.mark.parametrize(
    ("needs", "wanted"),
    [
        (Needs(cpus=5), "5 CPUs"),
        (Needs(cpus=4, gpus=1), "4 CPUs and 1 GPU"),  # each node has one of the two
        (Needs(gpus=2), "1 CPU and 2 GPUs"),
        (Needs(memory_gb=65), "1 CPU and 65 GB of memory"),
    ],
)
def test_an_obstacle_shows_what_is_wanted_beside_what_the_nodes_have(needs: Needs, wanted: str) -> None:
    assert lacking(needs, [SMALL, LARGE], "10.0.0.1:6379") == (
        f"no node of Ray on 10.0.0.1:6379 has {wanted}: 10.0.0.2 has 4 CPUs and 8 GB of memory; "
        "10.0.0.3 has 2 CPUs, 1 GPU and 64 GB of memory"
    )


def test_a_long_list_of_nodes_is_cut() -> None:
    obstacle = lacking(Needs(cpus=5), [SMALL] * 100, "10.0.0.1:6379")
    assert obstacle is not None
    assert obstacle.endswith("; and 92 more")


def test_fractions_of_several_gpus_are_refused_as_ray_does() -> None:
    assert lacking(Needs(gpus=1.0), [LARGE], "auto") is None
    assert lacking(Needs(gpus=1.5), [{**LARGE, "GPU": 8.0}], "auto") == "Ray gives out whole GPUs above 1, not 1.5"


def test_without_ray_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'lit-llm\[ray\]'"):
        RayEngine(RaySettings(address="auto")).obstacle(Needs())


def test_places_of_a_cluster_that_is_gone_have_ended() -> None:
    """Where a cluster was started for one command, and nothing listens at its address any more."""
    (place,) = RayEngine().places(["127.0.0.1:9/3f9c2a_0"])
    assert (place.id, place.state) == ("127.0.0.1:9/3f9c2a_0", "ended")


def test_a_place_s_log_has_its_number(tmp_path: Path) -> None:
    assert RayEngine().log("10.0.0.1:6379/3f9c2a_12", tmp_path) == tmp_path / "place-12.txt"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("The actor died.\n\tpid: 1\nThe actor is dead because its worker process has died. Worker exit type: "
         "INTENDED_USER_EXIT Worker exit detail: exit_actor() is called.", ""),
        ("The actor died.\n\tpid: 1\nThe actor is dead because its worker process has died. Some common causes "
         "include: (1)", "The actor is dead because its worker process has died."),
        ("The actor died because of an error raised in its creation task, ray::x\n  File 1\nOSError: no folder",
         "OSError: no folder"),
    ],
)  # fmt: skip
def test_ray_s_reason_is_one_line_and_empty_where_the_command_has_ended(message: str, line: str) -> None:
    """Messages of Ray 2.60, shortened."""
    assert reason(message) == line


def test_a_session_is_killed_with_the_process_groups_that_its_processes_have_made() -> None:
    shell = "set -m; sleep 600 & echo $!; wait"  # job control: a group for each job
    leader = subprocess.Popen(["bash", "-c", shell], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert leader.stdout is not None
    member = int(leader.stdout.readline())
    kill_session(leader.pid)
    assert leader.wait() == -9
    deadline = time.monotonic() + 10
    while (state := Path(f"/proc/{member}/stat")).exists() and " Z " not in state.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_launcher_imports_no_ray() -> None:
    program = "import sys, lit_llm.launch.ray, lit_llm.launch.ray_driver; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0

"""What is said to SLURM's programs and read from them; the programs are stand-ins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.config.section import validate
from lit_llm.config.tree import tree
from lit_llm.launch.engine import EngineError, Needs, Place
from lit_llm.launch.slurm import SlurmEngine, read_places
from lit_llm.launch.slurm_nodes import missing, read_partitions
from lit_llm.launch.slurm_settings import SlurmSettings

SINFO = """\
cpu*|64|256000|(null)|2-00:00:00|c1
cpu*|64|256000|(null)|2-00:00:00|c2
cpu*|128|512000|(null)|2-00:00:00|c3
gpu|32|1024000|gpu:a100:4(S:0-1),shard:8|12:00:00|g1
gpu|32|1024000|gpu:h100:8(IDX:0-7)|12:00:00|g2
debug|32|1024000|gpu:a100:4(S:0-1)|30:00|g1
old|8|16000|gpu:2|infinite|o1
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """program("sbatch", script): a stand-in on the PATH; returns the file for what it notes."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def write(name: str, script: str) -> Path:
        file, noted = tmp_path / "bin" / name, tmp_path / f"{name}.txt"
        file.write_text(f"#!/bin/sh\n{script.replace('NOTED', str(noted))}\n")
        file.chmod(0o755)
        return noted

    return write


def test_the_script_becomes_the_command_word_for_word(program, tmp_path):
    """By exec, so that a signal to the script is one to the command."""
    program("sbatch", "echo '4711;cluster'")
    words = ["two words", "$HOME", "a'b\"c", "", "line\nline", "*"]
    code = "import os, sys; print(os.getpid()); print(sys.argv[1:])"
    ids = SlurmEngine().start([sys.executable, "-c", code, *words], Needs(), 2, tmp_path / "new" / "folder")
    assert ids == ["4711_0", "4711_1"]
    script = subprocess.Popen(["/bin/sh", tmp_path / "new/folder/place.sh"], stdout=subprocess.PIPE, text=True)
    assert script.communicate()[0] == f"{script.pid}\n{words}\n"


def test_needs_and_settings_are_options_of_sbatch(program, tmp_path):
    noted = program("sbatch", """printf '%s\\n' "$@" > NOTED; echo 1""")
    settings = SlurmSettings(
        partition="gpu,old",
        account="lab",
        qos="high",
        gpu_type="a100",
        max_running=2,
        signal_seconds=60,
        options=["--constraint=ib&nvme", "--exclusive"],
    )
    needs = Needs(cpus=4, gpus=2, nodes=2, memory_gb=8, hours=1.51)
    folder = tmp_path / "50% done"
    SlurmEngine(settings).start(["true"], needs, 3, folder)
    assert set(noted.read_text().splitlines()) == {
        *("--parsable", "--array=0-2%2", "--requeue", "--open-mode=append", "--export=ALL", "--job-name=lit-llm"),
        *("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4", "--gres=gpu:a100:2", "--mem=7630M", "--time=91"),
        *("--partition=gpu,old", "--account=lab", "--qos=high", "--signal=B:USR1@60"),
        *("--constraint=ib&nvme", "--exclusive"),
        f"--output={tmp_path}/50%% done/place-%a.txt",  # SLURM reads %% as a percent sign
        str(folder / "place.sh"),
    }
    assert SlurmEngine().log("1_2", folder) == folder / "place-2.txt"


def test_an_allocation_that_lit_llm_runs_in_is_not_passed_on(program, tmp_path, monkeypatch):
    """`sbatch` inside a job would read SLURM_MEM_PER_NODE as an option of the new one."""
    noted = program("sbatch", "env > NOTED; echo 1")
    for name in ("SLURM_MEM_PER_NODE", "SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_CLUSTERS", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, "set")
    SlurmEngine().start(["true"], Needs(), 1, tmp_path)
    passed = {line.partition("=")[0] for line in noted.read_text().splitlines()}
    assert passed >= {"SLURM_CONF", "SBATCH_ACCOUNT", "MLFLOW_TRACKING_TOKEN"}
    assert not passed & {"SLURM_MEM_PER_NODE", "SBATCH_CLUSTERS"}


def test_states_of_squeue():
    """The states of `man squeue`, JOB STATE CODES, of 22.05."""
    ended = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT"
    running = "RUNNING COMPLETING RESIZING SIGNALING STAGE_OUT STOPPED SUSPENDED"
    queued = "PENDING CONFIGURING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT"
    for state, words in {"ended": ended, "running": running, "queued": queued}.items():
        assert {place.state for word in words.split() for place in read_places(f"1_0|{word}|None|n1\n")} == {state}
    text = "7_0|RUNNING|None|n1\n7_1|PENDING|Resources|\n7_2|PENDING|None|\n7_3|NODE_FAIL|NodeDown|n2\n"
    assert read_places(text) == [
        Place("7_0", "running", "RUNNING on n1"),
        Place("7_1", "queued", "PENDING (Resources)"),
        Place("7_2", "queued", "PENDING"),
        Place("7_3", "ended", "NODE_FAIL"),
    ]


def test_a_place_that_slurm_has_forgotten_has_ended(program):
    program("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert SlurmEngine().places(["7_0", "8_1"]) == [Place("7_0", "ended"), Place("8_1", "ended")]
    program("squeue", "echo '8_1|RUNNING|None|n1'")
    assert [place.state for place in SlurmEngine().places(["7_0", "8_1"])] == ["ended", "running"]


def test_errors_have_slurms_words_and_a_next_step(program, tmp_path, monkeypatch):
    program("squeue", "echo 'squeue: error: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    with pytest.raises(EngineError, match=r"Unable to contact slurm controller.*`scontrol ping`"):
        SlurmEngine().places(["7_0"])
    program("sbatch", "echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1")
    with pytest.raises(EngineError, match="QOSMaxSubmitJobPerUserLimit.*`squeue --me`"):
        SlurmEngine().start(["true"], Needs(), 1, tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="no program `sinfo` here"):
        SlurmEngine().obstacle(Needs())


@pytest.mark.parametrize(
    ("name", "needs", "gpu_type", "words"),
    [
        ("cpu", Needs(cpus=128, hours=48, memory_gb=500), None, None),
        ("cpu", Needs(nodes=3, cpus=64), None, None),
        (
            "cpu",
            Needs(cpus=256, hours=49),
            None,
            "CPUs: a place needs 256, a node has at most 128; hours: .* 49, .* 48",
        ),
        ("cpu", Needs(nodes=2, cpus=128), None, "nodes with 128 CPUs: a place needs 2 in one partition, there are 1"),
        ("gpu", Needs(gpus=8), None, None),
        ("gpu", Needs(gpus=4, hours=12), "a100", None),
        ("gpu", Needs(gpus=5), "a100", "a100 GPUs: a place needs 5, a node has at most 4"),
        ("gpu", Needs(nodes=2, gpus=4), "a100", "4 a100 GPUs: a place needs 2 in one partition, there are 1"),
        ("debug", Needs(hours=0.5), None, None),
        ("debug", Needs(hours=0.6), None, "hours: a place needs 0.6, the time limit is 0.5"),
        ("old", Needs(gpus=2, hours=10000), None, None),
        ("old", Needs(gpus=2, memory_gb=17), None, "GB of memory: a place needs 17, a node has at most 16.78"),
    ],
)
def test_what_nodes_lack(name, needs, gpu_type, words):
    partitions = read_partitions(SINFO)
    assert [each.name for each in partitions if each.is_default] == ["cpu"]
    found = missing(needs, [each for each in partitions if each.name == name], gpu_type)
    assert found is None if words is None else re.search(words, found), found


def test_several_partitions_are_not_added_up():
    partitions = [each for each in read_partitions(SINFO) if each.name in ("gpu", "old")]
    assert missing(Needs(gpus=8), partitions) is None
    assert missing(Needs(gpus=1, hours=24), partitions) is None
    found = missing(Needs(gpus=4, hours=24), partitions)
    assert found == "partition gpu and old: nodes with 1 CPUs, 4 GPUs: a place needs 1 in one partition, there are 0"


def test_options_that_lit_llm_sets_are_refused_all_at_once():
    options = ["--arr=0-5", "-p gpu", "--mem=3G", "--x\n--y", "--clusters=b", "--reservation=lab", "--mem-per-cpu=1G"]
    with pytest.raises(InputError) as refused:
        validate(SlurmSettings, tree({"options": options}))
    report = refused.value.report()
    assert "'--arr=0-5' is set by lit-llm itself" in report
    assert "'-p gpu': write an option of sbatch in one word" in report
    assert "'--mem=3G': set `launch.memory_gb` instead" in report
    assert "contains a line break" in report
    assert "'--clusters=b': run lit-llm on a machine that belongs" in report
    assert "5 problems" in report
    assert "options.0" in report

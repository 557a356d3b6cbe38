"""MLflow on a real server: it shows what the stages hold, also where it was gone for a while or came too late."""

from __future__ import annotations

import http.server
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import command, lit_llm

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before the import
os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"  # for the tests' own client
from mlflow import MlflowClient

from lit_llm.store.store import Stage, Store, read_metrics
from lit_llm.tracking.address import check_server
from lit_llm.tracking.mlflow_sync import MlflowSync, RunRecord

pytestmark = pytest.mark.xdist_group("mlflow-server")
Study = Callable[..., Path]
TWO = "arms: {red: {}, dec: {extends: decllm-tiny}}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """`mlflow server` with its own database and artifacts, which outlive it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self.port = folder, free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.folder}/m.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--serve-artifacts"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | quiet, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 2000
        while not self.is_ready():
            assert self.process.poll() is None, (self.folder / "log.txt").read_text()
            assert time.monotonic() < deadline, (self.folder / "log.txt").read_text()
            time.sleep(0.1)
        return self

    def is_ready(self) -> bool:
        from urllib.request import urlopen

        try:
            with urlopen(f"{self.address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, number)
            if number == signal.SIGKILL:
                self.process.wait(20)
                self.process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that stays: its start takes ten seconds."""
    server = Server(tmp_path_factory.mktemp("mlflow") / "server")
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Server]:
    """One that a test starts, kills and starts again."""
    server = Server(tmp_path / "server")
    try:
        yield server
    finally:
        server.kill()


HANGS = 400
"""Seconds after which a command hangs, as it would with MLflow's own seven retries of a request of two minutes."""


def started(path: Path, store: Store, address: str) -> subprocess.Popen[str]:
    """`lit-llm run` as a process."""
    line = command("run", path, "-j", 2, "--store", store.root, "--tracking", address)
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"COLUMNS": "400"}
    )


def run_in_a_process(path: Path, store: Store, address: str) -> tuple[int, str]:
    """(exit code, what was printed) of `lit-llm run`, where it may hang."""
    process = started(path, store, address)
    told, _ = process.communicate(timeout=HANGS)
    return process.returncode, told


def run(path: Path, store: Store, address: str) -> tuple[int, str]:
    """The same in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        ended = lit_llm("run", path, "-j", 2, "--store", store.root, "--tracking", address)
    return ended.returncode, ended.stderr + ended.stdout


def stages(store: Store) -> list[Stage]:
    return [store.stage(folder.name) for folder in sorted((store.root / "stages").iterdir())]


def search(address: str, study: str) -> tuple[list[Any], list[Any]]:
    """The parents and the children of a study."""
    client = MlflowClient(address)
    experiment = client.get_experiment_by_name(study)
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return parents, [run for run in found if run not in parents]


def flat(content: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(content, dict):
        return {k: v for key, item in content.items() for k, v in flat(item, f"{prefix}.{key}".lstrip(".")).items()}
    return {prefix: str(content)}


def assert_mirrored(address: str, study: str, store: Store) -> None:
    """One parent with the tables; a child for each stage with its parameters, its config.yaml and every point."""
    client = MlflowClient(address)
    [parent], children = search(address, study)
    assert parent.info.status == "FINISHED"
    for table in ("comparison.csv", "comparison.md", "comparison.json"):
        copy = Path(client.download_artifacts(parent.info.run_id, table))
        assert copy.read_bytes() == (store.study(study) / table).read_bytes()
    there = {run.data.tags["lit_llm.fingerprint"]: run for run in children}
    assert len(there) == len(children)
    assert sorted(there) == [stage.fingerprint for stage in stages(store)]
    for stage in stages(store):
        run = there[stage.fingerprint]
        result = stage.result()
        assert result is not None
        experiment = yaml.safe_load(stage.config_file.read_text())["experiment"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["lit_llm.seed"] == str(experiment["seed"])
        assert run.data.params == flat(experiment)
        copy = Path(client.download_artifacts(run.info.run_id, "config.yaml"))
        assert yaml.safe_load(copy.read_text()) == experiment
        expected: dict[str, list[tuple[int, float, int]]] = {}
        for line in read_metrics(stage.metrics_file):
            for name, value in line["metrics"].items():
                if value is not None:
                    expected.setdefault(name, []).append((line["step"], value, int(line["time"] * 1000)))
        assert len(expected["train/loss"]) >= 3
        assert run.data.metrics.keys() == expected.keys()
        for name, points in expected.items():
            history = client.get_metric_history(run.info.run_id, name)
            assert sorted((p.step, p.value, p.timestamp) for p in history) == points, name


@pytest.mark.slow
def test_a_study_on_a_server_holds_what_the_stages_on_disk_hold(
    write_study: Study, server: Server, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    code, told = run(write_study("served", TWO, seeds=[0, 1]), store, server.address)
    assert code == 0, told
    assert len(stages(store)) == 4
    assert "Nothing is lost" not in told
    assert f"charts: {server.address}\n" in told
    assert_mirrored(server.address, "served", store)
    assert not (store.root / "mlflow.db").exists()


def create(address: str, lock: Path, seed: int, barrier: Any, problems: Any) -> None:
    try:
        mirror = MlflowSync(address, study="twins", lock=lock)
        barrier.wait(60)
        mirror.sync([RunRecord("red", number % 3, f"f{number % 3}", "running") for number in range(seed, seed + 3)])
        problems.put(None)
    except BaseException as problem:
        problems.put(repr(problem))


def test_coordinators_of_one_store_create_no_run_twice(server: Server, tmp_path: Path) -> None:
    """A server knows no lock of ours; the store that the coordinators share does."""
    spawn = multiprocessing.get_context("spawn")
    problems, barrier = spawn.Queue(), spawn.Barrier(3)
    arguments = [(server.address, tmp_path / "mirror.lock", seed, barrier, problems) for seed in range(3)]
    processes = [spawn.Process(target=create, args=each) for each in arguments]
    for process in processes:
        process.start()
    assert [problems.get(timeout=400) for _ in processes] == [None] * 3
    for process in processes:
        process.join()
    parents, children = search(server.address, "twins")
    assert len(parents) == 1
    assert sorted(run.info.run_name for run in children) == [f"red/seed 00{seed}" for seed in range(3)]


# --- outages -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_comes_after_the_end_is_caught_up_by_the_same_command(
    write_study: Study, mortal: Server, tmp_path: Path
) -> None:
    path, store = write_study("late", TWO, seeds=[0, 1]), Store(tmp_path / "store")
    code, told = run_in_a_process(path, store, mortal.address)
    assert code == 0, told
    assert told.count("Nothing is lost") == 1
    assert "Connection refused" in told
    assert "the same command is given again" in told
    assert f"charts: {mortal.address} (behind)" in told
    before = {stage.fingerprint: stage.result() for stage in stages(store)}
    assert [result and result["state"] for result in before.values()] == ["done"] * 4
    mortal.start()
    code, told = run_in_a_process(path, store, mortal.address)
    assert code == 0, told
    assert "0 of 4 runs to do" in told
    assert "Nothing is lost" not in told
    assert {stage.fingerprint: stage.result() for stage in stages(store)} == before
    assert_mirrored(mortal.address, "late", store)


def longer(path: Path, steps: int) -> Path:
    path.write_text(path.read_text().replace("max_steps: 12", f"max_steps: {steps}"))
    return path


def wait_for(happens: Callable[[], bool], seconds: float, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def has_points(address: str, study: str) -> bool:
    try:
        return any("train/loss" in run.data.metrics for run in search(address, study)[1])
    except AssertionError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("back", ["within the run", "after the run"])
def test_a_server_killed_in_the_middle_is_caught_up_without_gap_or_duplicate(
    write_study: Study, mortal: Server, tmp_path: Path, back: str
) -> None:
    path, store = longer(write_study("killed", TWO, seeds=[0, 1]), 1500), Store(tmp_path / "store")
    mortal.start()
    process = started(path, store, mortal.address)
    try:
        wait_for(lambda: has_points(mortal.address, "killed"), HANGS, process)
        mortal.kill()
        held = sum(len(read_metrics(stage.metrics_file)) for stage in stages(store))
        wait_for(
            lambda: sum(len(read_metrics(stage.metrics_file)) for stage in stages(store)) > held + 20, HANGS, process
        )
        if back == "within the run":
            mortal.start()
            assert process.poll() is None, "the server came back too late to be within the run"
        told, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, told
    assert told.count("Nothing is lost") == 1
    if back == "within the run":
        assert told.count("MLflow is back and has caught up.") == 1
        assert "(behind)" not in told
    else:
        assert "(behind)" in told
        mortal.start()
        code, told = run_in_a_process(path, store, mortal.address)
        assert code == 0, told
        assert "0 of 4 runs to do" in told
    assert_mirrored(mortal.address, "killed", store)


@pytest.mark.slow
def test_a_server_that_hangs_delays_no_training_and_the_end_by_little(
    write_study: Study, mortal: Server, tmp_path: Path
) -> None:
    """It accepts connections and never answers: each request gives up after 10 s, in a thread of its own."""
    path, store = longer(write_study("hanging", TWO), 400), Store(tmp_path / "store")
    mortal.start()
    process = started(path, store, mortal.address)
    try:
        wait_for(lambda: has_points(mortal.address, "hanging"), HANGS, process)
        mortal.kill(signal.SIGSTOP)
        wait_for(lambda: all(stage.result() for stage in stages(store)), HANGS, process)
        told, _ = process.communicate(timeout=HANGS)
    finally:
        process.kill()
    assert process.returncode == 0, told
    assert told.count("Nothing is lost") == 1


# --- addresses -----------------------------------------------------------------------------------------------------


@pytest.fixture
def answering() -> Iterator[Callable[[int, bytes], str]]:
    """answering(status, body) is the address of a server which gives this answer to everything."""
    started: list[http.server.ThreadingHTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        started.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}"

    yield start
    for each in started:
        each.shutdown()
        each.server_close()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"<html>no such page", "answers, but not as an MLflow server .*404"),
        (404, b'{"detail": "Not Found"}', "answers, but not as an MLflow server .*Not Found"),
        (501, b"<html>Unsupported method ('POST')", "answers, but not as an MLflow server .*501"),
        (200, b"<html>Welcome", "answers, but not as an MLflow server .*JSON"),
        (401, b"You are not authenticated", "refuses access .*401.*MLFLOW_TRACKING_USERNAME"),
        (403, b"Invalid Host header", "refuses access .*403.*Invalid Host header"),
    ],
)
def test_what_answers_and_takes_no_records_is_refused(
    answering: Callable[[int, bytes], str], status: int, body: bytes, message: str
) -> None:
    address = answering(status, body)
    with pytest.raises(ValueError, match=message) as told:
        check_server(address.replace("//", "//user:secret@"))
    assert address in str(told.value)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_server_in_trouble_may_come_back(answering: Callable[[int, bytes], str], status: int) -> None:
    check_server(answering(status, b"<html>busy"))


def test_no_answer_is_no_error_and_a_real_server_is_none_either(server: Server) -> None:
    check_server(f"http://127.0.0.1:{free_port()}")
    check_server("http://no-such-host.invalid:5000")
    check_server(server.address)


@pytest.mark.parametrize(
    "address",
    ["localhost:5000", "http://", "http://:5000", "http://host:port", "http://host:99999", "ftp://host", "http:// x"],
)
def test_what_can_be_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="use sqlite:////absolute/path/mlflow.db or http"):
        MlflowSync(address, study="s")


@pytest.mark.parametrize("kind", ["malformed", "no MLflow"])
def test_a_wrong_address_is_one_message_before_anything_starts(
    write_study: Study, answering: Callable[[int, bytes], str], tmp_path: Path, kind: str
) -> None:
    address = "http://host:port" if kind == "malformed" else answering(404, b"<html>")
    store = Store(tmp_path / "store")
    code, told = run(write_study("nowhere", TWO), store, address)
    assert code == 2
    *_, message, last = told.splitlines()  # on a busy machine it is told before that arms are being built
    assert message.startswith("--tracking: ")
    assert address in message
    assert last == "1 problem, nothing was started."
    assert not store.root.exists()

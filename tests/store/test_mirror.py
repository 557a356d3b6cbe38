"""Copies of results at another address: whole, verified, and never copied twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.store.mirror import pull, push
from lit_llm.store.store import MetricsFile, Store

BUCKET = "results"


@pytest.fixture
def filled(tmp_path: Path) -> Store:
    """A store with two finished stages, one that is interrupted, and a study."""
    store = Store(tmp_path / "here").open()
    for name in ("a" * 16, "b" * 16, "c" * 16):
        stage = store.stage(name)
        with stage.claim():
            stage.set_state("running")
            metrics = MetricsFile(stage.metrics_file)
            metrics.append(1, {"val/target_nll": 1.5})
            metrics.close()
            if name.startswith("c"):
                stage.set_state("interrupted")
            else:
                stage.finish({"state": "done", "metrics": {"val/target_nll": 1.5}})
    folder = store.study("norms")
    (folder / "coordinators").mkdir(parents=True)
    (folder / "coordinators" / "host-1.lock").touch()
    (folder / "report.html").write_text("<p>Both norms help.</p>")
    return store


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """Address of a bucket on a server of this machine."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import s3fs

    patch = pytest.MonkeyPatch()
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    s3fs.S3FileSystem().mkdir(BUCKET)
    yield f"s3://{BUCKET}"
    server.stop()
    patch.undo()


@pytest.fixture(params=["folder", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "copies")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_finished_stages_and_studies_arrive_whole(filled: Store, address: str, tmp_path: Path) -> None:
    assert push(filled, address).stages == 2
    there = Store(tmp_path / "there")
    fetched = pull(there, address)
    assert fetched.stages == 2
    for name in ("a" * 16, "b" * 16):
        assert there.stage(name).status() == filled.stage(name).status()
        assert there.stage(name).result()["metrics"] == {"val/target_nll": 1.5}  # with its records verified
    assert there.stage("c" * 16).status()["state"] == "pending"
    assert (there.study("norms") / "report.html").read_text() == "<p>Both norms help.</p>"
    assert not (there.study("norms") / "coordinators").exists()


def test_nothing_is_copied_twice(filled: Store, address: str, tmp_path: Path) -> None:
    first = push(filled, address)
    assert first.files > 4
    assert push(filled, address).files == 0
    (filled.study("norms") / "report.html").write_text("<p>One norm helps.</p>")
    assert push(filled, address).files == 1
    there = Store(tmp_path / "there")
    pull(there, address)
    (there.study("norms") / "report.html").write_text("mine")
    assert pull(there, address).files == 0
    assert (there.study("norms") / "report.html").read_text() == "mine"


def test_a_copy_that_broke_off_is_completed(filled: Store, address: str, tmp_path: Path) -> None:
    """The result comes last, so a stage without one is copied again."""
    push(filled, address)
    there = Store(tmp_path / "there")
    pull(there, address)
    (there.stage("a" * 16).folder / "result.json").unlink()
    (there.stage("a" * 16).metrics_file).write_text("half")
    assert pull(there, address).stages == 1
    assert there.stage("a" * 16).status()["state"] == "done"


def test_unusable_addresses_are_named(filled: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nosuch://results: .*nosuch"):
        push(filled, "nosuch://results")
    with pytest.raises(InputError, match="has no copy of a store"):
        pull(filled, str(tmp_path / "empty"))


def test_nothing_is_written_outside_the_store(filled: Store, tmp_path: Path) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/hostile/stages/" + "a" * 16 + "/result.json", b"{}")
    fs.pipe_file("/hostile/studies/x/../../../outside", b"x")
    there = Store(tmp_path / "there")
    pull(there, "memory://hostile")
    assert not (tmp_path / "outside").exists()
    assert [path.name for path in there.root.rglob("*") if path.is_file()] == ["store.json", "result.json"]

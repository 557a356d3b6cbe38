"""A file is written whole, and one that is not what was written is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.store.files import Damaged, check_digest, file_digest, read_verified, replacing, with_digest
from lit_llm.store.store import MetricsFile, Stage, Store, read_json, write_json
from tests.damages import DAMAGES, damage, flipped

CONTENT = {"val/target_nll": 5.5625, "steps": 12, "list": [1, 2.5, None], "digest_of": {"a": "ü"}}


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A finished stage."""
    stage = Store(tmp_path / "store").open().stage("0123456789abcdef")
    file = MetricsFile(stage.metrics_file)
    file.append(12, {"val/target_nll": 5.5625})
    file.close()
    stage.losses_file.write_text('{"split": "test"}\n')
    stage.set_state("running")
    stage.finish({"state": "done", "metrics": {"val/target_nll": 5.5625}})
    return stage


def test_every_flipped_bit_of_a_signed_file_is_found(tmp_path: Path) -> None:
    """A digit that becomes another is still JSON, and a digest whose own name is flipped is one still."""
    path = tmp_path / "initial.json"
    write_json(path, CONTENT, signed=True)
    assert read_json(path) == CONTENT
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            path.write_bytes(flipped(whole, place, bit))
            with pytest.raises(Damaged, match=f"{path}: is damaged"):
                read_json(path)


def test_a_digest_before_yaml_is_a_comment(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(with_digest("stage: pretrain\nparent: ''\n"))
    assert read_verified(path).splitlines()[1:] == ["stage: pretrain", "parent: ''"]
    path.write_text(path.read_text().replace("pretrain", "finetune"))
    with pytest.raises(Damaged, match=r"config.yaml: is damaged"):
        read_verified(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{", "is damaged: Expecting property name"),
        (b"\xff\xfe", "is damaged: 'utf-8' codec"),
        (b"[1]", "is damaged: it holds no JSON object"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "state.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}: {message}"):
        read_json(path)


def test_a_file_that_has_its_own_key_of_that_name_keeps_it(tmp_path: Path) -> None:
    write_json(tmp_path / "meta.json", {"digest": "0123456789abcdef"})
    assert read_json(tmp_path / "meta.json") == {"digest": "0123456789abcdef"}


def test_a_file_that_was_not_touched_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 100)
    digest, reads = file_digest(path), []
    monkeypatch.setattr("lit_llm.store.files.file_digest", lambda path: reads.append(path) or digest)
    for _ in range(3):
        check_digest(path, digest)
    assert len(reads) == 1
    monkeypatch.undo()
    path.write_bytes(b"b" * 100)
    with pytest.raises(Damaged):
        check_digest(path, digest)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    """Whoever writes it: safetensors makes a file for its owner alone."""
    before = os.umask(umask)
    try:
        (tmp_path / "neighbour").touch()
        with replacing(tmp_path / "new") as work:
            work.unlink()
            os.close(os.open(work, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "neighbour").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["neighbour", "new"]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "losses.jsonl"])
def test_a_finished_stage_with_a_damaged_file_has_failed_and_names_it(stage: Stage, name: str, how: str) -> None:
    if (name, how) == ("result.json", "deleted"):
        pytest.skip("nothing tells it from a stage that has not finished")
    damage(stage.folder / name, how)
    status = stage.status()
    assert status["state"] == "failed"
    assert status["error"].startswith(f"{stage.folder / name}: ")
    assert status["error"].endswith("; `lit-llm run STUDY --rerun failed` computes it again")
    assert stage.result() is None
    stage.retry()
    assert stage.status() == {"state": "pending"}


@pytest.mark.parametrize("content", ["{}", '{"state": "dome"}', '{"metrics": {}}'])
def test_a_result_without_a_state_is_none(stage: Stage, content: str) -> None:
    (stage.folder / "result.json").write_text(content)
    assert stage.status()["state"] == "failed"
    assert "result.json: is damaged" in stage.status()["error"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_stage_whose_state_is_damaged_can_be_gone_on_with(tmp_path: Path, how: str) -> None:
    stage = Store(tmp_path).open().stage("0123456789abcdef")
    stage.set_state("failed", "it broke")
    damage(stage.folder / "state.json", how)
    status = stage.status()
    assert status["state"] == ("pending" if how == "deleted" else "interrupted")
    assert how == "deleted" or status["error"].startswith(f"{stage.folder}/state.json: ")
    with stage.claim():
        assert how == "deleted" or stage.status()["state"] == "running"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"done": 1}', '{"done": 1, "total": 0}', '{"done": "x", "total": 2}']
)
def test_progress_that_cannot_be_read_says_nothing(stage: Stage, content: str) -> None:
    stage.progress_file.write_text(content)
    assert stage.progress() is None
    stage.progress_file.write_text('{"done": 1, "total": 2}')
    assert stage.progress() == {"done": 1, "total": 2}


def test_what_was_mended_stands_in_the_result(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage.note("last.ckpt is damaged; starting over")
    stage.finish({"state": "done"})
    assert stage.status()["notes"] == ["last.ckpt is damaged; starting over"]
    assert capsys.readouterr().out == "last.ckpt is damaged; starting over\n"
    assert json.loads((stage.folder / "result.json").read_text())["notes"] == stage.notes

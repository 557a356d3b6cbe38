"""A disk that is full, read-only or gone: one clear line, every run saved, and the same command goes on."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm import cli
from lit_llm.config.problems import InputError
from lit_llm.store.disk import DiskError
from lit_llm.store.store import Stage, Store
from lit_llm.studies.disk_space import check_free_space
from lit_llm.studies.load import load_study
from lit_llm.studies.observer import Observer
from lit_llm.studies.run import Finished, run_study
from lit_llm.studies.runs import runs_of
from tests.studies import full_disk

Study = Callable[..., Path]
TWO = "arms: {red: {}, dec: {extends: decllm-tiny}}"


class Looking(Observer):
    """Does something once, when every stage of the store that it looks at has a checkpoint."""

    def __init__(self, stages: Callable[[], list[Stage]], then: Callable[[], None] = lambda: None) -> None:
        self.stages, self.then, self.messages = stages, then, list[str]()
        self.done = False

    def message(self, text: str) -> None:
        self.messages.append(text)

    def poll(self) -> None:
        if not self.done and all((stage.checkpoints / "last.ckpt").exists() for stage in self.stages()):
            self.done = True
            self.then()


def long(path: Path) -> Path:
    """Enough steps for the disk to fail in the middle."""
    text = path.read_text().replace("max_steps: 12", "max_steps: 400")
    path.write_text(text.replace("log_every: 4", "log_every: 4, checkpoint_every: 8"))
    return path


def stages_of(path: Path, store: Store) -> list[Stage]:
    return [run.last for run in runs_of(load_study(path), store)]


def execute(path: Path, store: Store, observer: Observer, tracking: Store | None = None) -> Finished:
    """tracking: the store of another, whose MLflow is there already."""
    address = f"sqlite:///{tracking.root}/mlflow.db" if tracking else None
    return run_study(load_study(path), store, observer=observer, max_parallel=2, tracking=address)


def states(stages: list[Stage]) -> list[str]:
    return [stage.status()["state"] for stage in stages]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.slow
def test_a_write_that_fails_in_the_coordinator_lets_every_run_save(write_study: Study, store: Store, code: int) -> None:
    path = long(write_study(f"full_{code}", TWO, seeds=[600 + code]))
    stages = stages_of(path, store)

    def fail() -> None:
        raise OSError(code, os.strerror(code), "/the/disk/file.json")

    with pytest.raises(DiskError) as caught:
        execute(path, store, Looking(lambda: stages, fail))
    assert str(caught.value).startswith(f"/the/disk/file.json: {os.strerror(code)}. What was running was asked to save")
    assert "\n" not in str(caught.value)
    assert states(stages) == ["interrupted"] * 2
    assert all((stage.checkpoints / "last.ckpt").exists() for stage in stages)
    if code == errno.ENOSPC:
        assert execute(path, store, Observer()).exit_code == 0


def test_a_write_that_fails_before_anything_was_started_is_an_input_error(
    write_study: Study, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/the/disk/runs.json")

    monkeypatch.setattr("lit_llm.studies.run.list_runs", fail)
    with pytest.raises(InputError, match=r"^--store: /the/disk/runs.json: Read-only file system$"):
        execute(write_study("read_only", TWO, seeds=[610]), store, Observer())


def test_a_run_whose_disk_is_full_fails_alone_and_the_next_command_goes_on_with_it(
    write_study: Study, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study("quota", TWO, seeds=[620])
    path.write_text(path.read_text().replace("log_every: 4", "log_every: 4, checkpoint_every: 8"))
    stages = stages_of(path, store)
    observer = Looking(lambda: stages)
    with monkeypatch.context() as patch:
        patch.setattr("lit_llm.studies.stage_executor.run_stage", full_disk.run_stage)
        finished = execute(path, store, observer)
    assert (states(stages), finished.exit_code) == (["interrupted", "done"], 1)
    assert any("red/seed 620: /" in text and "No space left on device" in text for text in observer.messages)
    assert "No space left on device" in stages[0].status()["error"]
    assert execute(path, store, Observer()).exit_code == 0


def test_a_store_that_vanishes_is_not_made_anew(write_study: Study, store: Store, tmp_path: Path) -> None:
    """Moved away, as an unmounted disk would be; what was trained lies where it is now, and is gone on with there."""
    execute(write_study("known", "arms: {red: {}}", seeds=[630]), store, Observer())  # MLflow's database is there
    place, moved = Store(tmp_path / "place"), Store(tmp_path / "moved")
    path = long(write_study("vanished", "arms: {red: {}}", seeds=[630]))
    stages = stages_of(path, place)
    with pytest.raises(DiskError, match=r"place: the store is gone"):
        execute(path, place, Looking(lambda: stages, lambda: place.root.rename(moved.root) and None), store)
    assert not place.root.exists()
    assert (moved.stage(stages[0].fingerprint).checkpoints / "last.ckpt").exists()


def test_a_disk_that_is_clearly_too_small_is_refused_with_the_numbers(
    write_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 runs' weights in float32, and of two at once three checkpoints of three floats a parameter (AdamW)."""
    path, store = long(write_study("large", "arms: {red: {}}", seeds=[0, 1, 2])), Store(tmp_path / "nowhere" / "store")
    ablation = load_study(path)
    from lit_llm.experiment.cost import cost_of

    parameters = cost_of(ablation.arms[0].experiment).parameters
    trained = [(run.experiment, "pretrain", run.last) for run in runs_of(ablation, store)]
    text = sum(
        file.stat().st_size for file in Path(ablation.arms[0].experiment.pretrain.data.corpus.files[0]).parent.iterdir()
    )
    least = 4 * parameters * (3 + 2 * 3 * 3) + text / 8 * 2
    monkeypatch.setattr("lit_llm.studies.disk_space.free_bytes", lambda _: least)
    check_free_space(store, trained, 2)
    monkeypatch.setattr("lit_llm.studies.disk_space.free_bytes", lambda _: least - 1)
    with pytest.raises(InputError, match=r"free, and at least .* weights of 3 stages, .* up to 2 at once"):
        check_free_space(store, trained, 2)
    with pytest.raises(InputError, match=r"free, and at least"):
        execute(path, store, Observer())
    assert not store.root.parent.exists()


def test_the_command_line_says_it_in_one_line_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write_study: Study
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise DiskError("/the/disk: No space left on device")

    monkeypatch.setattr("lit_llm.studies.run.run_study", fail)
    monkeypatch.setattr(sys, "argv", ["lit-llm", "run", str(write_study("line", TWO))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "/the/disk: No space left on device\n"

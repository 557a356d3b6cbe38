"""A training goes on from whole files alone, and what is damaged changes no bit of its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_llm.runs.run_one_stage import run_one
from lit_llm.store.files import Damaged, work_file
from lit_llm.store.store import Stage, Store
from lit_llm.training.checkpoints import check_checkpoint
from tests.damages import DAMAGES, copied, damage, flipped
from tests.stages_in_parts import numbers, prepared_stage, stops_after

OFTEN = ("pretrain.training.execution.checkpoint_every=4", "pretrain.training.execution.log_every=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Stage:
    """The stage as it ends when nothing goes wrong."""
    torch.set_num_threads(1)
    stage = prepared_stage(Store(tmp_path_factory.mktemp("whole")), corpus, "decllm-tiny", *OFTEN)
    assert run_one(stage.store.root, stage.fingerprint) == "done"
    return stage


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Stage:
    """The same, interrupted after step 9: a checkpoint of step 9, and the one before it, of step 8."""
    torch.set_num_threads(1)
    stage = prepared_stage(Store(tmp_path_factory.mktemp("stopped")), corpus, "decllm-tiny", *OFTEN)
    assert run_one(stage.store.root, stage.fingerprint, stops_after(9)) == "interrupted"
    return stage


@pytest.fixture
def stage(stopped: Stage, tmp_path: Path) -> Stage:
    """A copy of the interrupted stage, to be damaged."""
    return Store(copied(stopped.store.root, tmp_path / "store")).stage(stopped.fingerprint)


def assert_ends_like(stage: Stage, whole: Stage, steps: int) -> None:
    """Run it to its end, which is that of the other, after so many more steps."""
    asked: list[int] = []
    assert run_one(stage.store.root, stage.fingerprint, lambda: bool(asked.append(1))) == "done"
    assert len(asked) - 1 == steps - 1  # once before it begins, after all steps but the last
    assert numbers(stage) == numbers(whole)
    weights, expected = (load_file(one.checkpoints / "model.safetensors") for one in (stage, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    result, wanted = stage.result(), whole.result()
    assert result is not None
    assert wanted is not None
    assert {key: result[key] for key in ("steps", "tokens", "loss_tokens", "initial", "weights")} == {
        key: wanted[key] for key in ("steps", "tokens", "loss_tokens", "initial", "weights")
    }
    assert not list(stage.checkpoints.glob("*.ckpt"))


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    stage: Stage, whole: Stage, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    last = stage.checkpoints / "last.ckpt"
    damage(last, how)
    assert_ends_like(stage, whole, steps=14 - 8)
    notes = (stage.result() or {}).get("notes", [])
    if how != "deleted":
        assert len(notes) == 1
        assert notes[0].startswith(f"{last}: ")
        assert notes[0].endswith("; going on from previous.ckpt")
        assert capfd.readouterr().out.count(notes[0]) == 1  # into the log


def test_a_run_whose_checkpoints_are_both_damaged_starts_over(stage: Stage, whole: Stage) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        damage(stage.checkpoints / name, "cut")
    assert_ends_like(stage, whole, steps=14)
    (note,) = (stage.result() or {})["notes"]
    assert "last.ckpt: is damaged" in note
    assert "previous.ckpt: is damaged" in note
    assert note.endswith("; starting over")


def test_what_was_written_after_the_fall_is_kept_too(stage: Stage, whole: Stage) -> None:
    """Interrupted once more after a damaged checkpoint, and damaged again."""
    damage(stage.checkpoints / "last.ckpt", "flipped")
    assert run_one(stage.store.root, stage.fingerprint, stops_after(2)) == "interrupted"  # at step 10
    assert stage.status()["notes"]
    damage(stage.checkpoints / "last.ckpt", "emptied")
    assert_ends_like(stage, whole, steps=14 - 8)


def test_every_flipped_bit_of_a_checkpoint_is_found(stage: Stage) -> None:
    last = stage.checkpoints / "last.ckpt"
    check_checkpoint(last)
    content = last.read_bytes()
    for place in [*range(0, len(content), len(content) // 40), *range(len(content) - 80, len(content))]:
        last.write_bytes(flipped(content, place, bit=place % 8))
        with pytest.raises(Damaged, match="is damaged"):
            check_checkpoint(last)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Content, name, name on the disk: in another order a machine that goes down leaves a name without content."""
    import os

    from lit_llm.store import files

    calls: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        files.os, "fsync", lambda number: calls.append(os.readlink(f"/proc/self/fd/{number}")) or sync(number)
    )
    monkeypatch.setattr(Path, "replace", lambda path, to: calls.append(f"{path} -> {to}") or replace(path, to))
    stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny", *OFTEN)
    run_one(stage.store.root, stage.fingerprint, stops_after(2))
    last = stage.checkpoints / "last.ckpt"
    work = work_file(last)
    at = calls.index(f"{work} -> {last}")
    assert calls[at - 1] == str(work)
    assert calls[at + 1] == str(stage.checkpoints)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("metrics.jsonl", 14 - 9),
        ("state.json", 14 - 9),
        ("checkpoints/initial.json", 14 - 9),
        ("checkpoints/provenance.json", 14),
    ],
)
@pytest.mark.slow
def test_a_damaged_file_of_an_interrupted_stage_changes_nothing_of_its_end(
    stage: Stage, whole: Stage, name: str, steps: int, how: str
) -> None:
    """Metrics come from the checkpoint, the first loss is measured again; without its origin a run starts over."""
    damage(stage.folder / name, how)
    assert_ends_like(stage, whole, steps)


def test_a_flipped_digit_in_each_small_file_changes_nothing(stage: Stage, whole: Stage) -> None:
    for file in (stage.metrics_file, stage.checkpoints / "initial.json"):
        text = file.read_text()
        assert "5." in text
        file.write_text(text.replace("5.", "4."))
    (stage.folder / "state.json").write_text('{"state": "interrupt')
    assert_ends_like(stage, whole, steps=14 - 9)
    assert [note.rsplit("; ")[-1] for note in stage.status()["notes"]] == ["it is measured again"]

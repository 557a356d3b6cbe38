"""What is removed is what nobody needs: no study lists it, no process holds it. Everything else is left as it was."""

import os
import time

import pytest

from lit_llm.config.problems import InputError
from lit_llm.store.garbage_collection import find, list_runs, remove
from lit_llm.store.locks import locked
from lit_llm.store.store import Store

NEEDED, PARENT, ORPHAN, BUSY = "a" * 16, "b" * 16, "c" * 16, "d" * 16
LONG_AGO = time.time() - 7200


@pytest.fixture
def place(tmp_path):
    """A study that lists one stage, which goes back to another; and two stages that nobody lists."""
    store = Store(tmp_path / "store").open()
    for name in (NEEDED, PARENT, ORPHAN, BUSY):
        stage = store.stage(name)
        stage.checkpoints.mkdir(parents=True)
        stage.config_file.write_text(f"stage: finetune\nparent: {PARENT}\n" if name == NEEDED else "stage: pretrain\n")
        (stage.checkpoints / "model.safetensors").write_bytes(b"w" * 1000)
        stage.finish({"state": "done"})
    listed(store, "norms", NEEDED)
    return store


def listed(store, study, *fingerprints, overrides=(), source=__file__):
    runs = [{"arm": "red", "seed": seed, "fingerprint": name} for seed, name in enumerate(fingerprints)]
    list_runs(store, study, source, overrides, runs)


def old(path, content=b"x" * 10):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def found(store):
    return {str(item.path.relative_to(store.root)): item.kind for item in find(store).garbage}


def files(store):
    return {str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file()}


def test_a_stage_is_orphaned_when_no_study_lists_it_and_no_listed_stage_goes_back_to_it(place):
    assert found(place) == {f"stages/{ORPHAN}": "orphaned stage", f"stages/{BUSY}": "orphaned stage"}


def test_a_stage_in_use_is_not_listed_and_not_removed(place):
    before = find(place)
    with place.stage(BUSY).claim():
        assert found(place) == {f"stages/{ORPHAN}": "orphaned stage"}
        removed = remove(place, before.garbage)
    assert [item.path.name for item in removed] == [ORPHAN]
    assert place.stage(BUSY).result() is not None


def test_removing_takes_the_garbage_whole_and_leaves_every_other_file(place):
    before = files(place)
    size = sum((place.root / name).stat().st_size for name in before if f"stages/{ORPHAN}/" in name)
    orphan = next(item for item in find(place).garbage if item.path.name == ORPHAN)
    assert orphan.bytes == size
    remove(place, [orphan])
    gone = {name for name in before if name.startswith(f"stages/{ORPHAN}/")}
    assert len(gone) >= 3
    assert files(place) - {"gc.lock"} == before - gone - {"gc.lock"}
    assert sorted(folder.name for folder in (place.root / "stages").iterdir()) == [NEEDED, PARENT, BUSY]


def test_an_edited_study_gives_up_its_old_stages_unless_another_study_lists_them(place):
    listed(place, "masks", ORPHAN, BUSY)
    assert found(place) == {}
    listed(place, "masks", BUSY)
    assert list(found(place)) == [f"stages/{ORPHAN}"]
    listed(place, "others", ORPHAN)
    assert found(place) == {}


def test_what_an_override_computed_stands_beside_what_the_file_says(place):
    """A trial with -o does not make orphans of the study's own results, nor the other way round."""
    listed(place, "norms", ORPHAN, overrides=["seed=1"])
    listed(place, "norms", NEEDED)
    assert list(found(place)) == [f"stages/{BUSY}"]
    listed(place, "norms", BUSY, overrides=["seed=1"])
    assert list(found(place)) == [f"stages/{ORPHAN}"]


def test_two_files_whose_studies_have_one_name_keep_a_list_each(place, tmp_path):
    """As a/base.yaml and b/base.yaml do: an experiment's study is named after its file."""
    listed(place, "norms", ORPHAN, source=str(tmp_path / "b" / "base.yaml"))
    assert list(found(place)) == [f"stages/{BUSY}"]
    assert find(place).vanished == ((place.study("norms"), str(tmp_path / "b" / "base.yaml")),)


@pytest.mark.parametrize("text", ["{half a li", "[]", '{"lists": [{"overrides": []}]}', '{"lists": 3}'])
def test_a_list_that_cannot_be_read_is_none_and_the_next_run_writes_another(place, text):
    (place.study("norms") / "runs.json").write_text(text)
    assert find(place).unlisted == (place.study("norms"),)
    assert found(place) == {}
    listed(place, "norms", NEEDED)
    assert found(place).keys() == {f"stages/{ORPHAN}", f"stages/{BUSY}"}


def test_of_a_stage_that_is_a_link_only_the_link_is_removed(place, tmp_path):
    elsewhere = place.stage(ORPHAN).folder.rename(tmp_path / "elsewhere")
    place.stage(ORPHAN).folder.symlink_to(elsewhere)
    remove(place, find(place).garbage)
    assert sorted(folder.name for folder in (place.root / "stages").iterdir()) == [NEEDED, PARENT]
    assert (elsewhere / "result.json").exists()


def test_who_cannot_have_the_lists_is_told_so(place, monkeypatch):
    monkeypatch.setattr("lit_llm.store.garbage_collection.PATIENCE", 0.1)
    garbage = find(place).garbage
    with locked(place.root / "gc.lock"):
        for attempt in (lambda: remove(place, garbage), lambda: listed(place, "norms", BUSY)):
            with pytest.raises(InputError, match="is being cleared by another process"):
                attempt()


def test_a_stage_that_is_listed_between_the_look_and_the_removal_stays(place):
    seen = find(place).garbage
    listed(place, "masks", ORPHAN)
    assert [item.path.name for item in remove(place, seen)] == [BUSY]
    assert place.stage(ORPHAN).result() is not None


def test_while_a_study_has_no_list_no_stage_is_called_orphaned(place):
    folder = place.study("older")
    folder.mkdir()
    assert find(place).unlisted == (folder,)
    assert found(place) == {}


def test_an_optimiser_state_goes_once_there_is_a_result_and_not_before(place):
    listed(place, "norms", NEEDED, ORPHAN, BUSY)
    for name in (NEEDED, ORPHAN):
        (place.stage(name).checkpoints / "last.ckpt").write_bytes(b"o" * 5000)
    (place.stage(ORPHAN).folder / "result.json").unlink()
    items = find(place).garbage
    [state] = items
    assert state.path == place.stage(NEEDED).checkpoints / "last.ckpt"
    assert state.bytes == 5000
    remove(place, items)
    assert sorted(path.name for path in place.stage(NEEDED).checkpoints.iterdir()) == ["model.safetensors"]
    assert (place.stage(ORPHAN).checkpoints / "last.ckpt").exists()


def test_what_killed_processes_left_is_removed_once_it_is_old_and_nobody_works_there(place):
    listed(place, "norms", NEEDED, ORPHAN, BUSY)
    stage, data = place.stage(NEEDED), place.data
    leftovers = [
        old(stage.checkpoints / ".last.ckpt.another-host-4711"),
        old(stage.folder / ".state.json.another-host-4711"),
        old(stage.folder / "config.4711"),
        old(stage.folder / "metrics.tmp"),
    ]
    work = old(data / ".0123" / "train.bin").parent
    os.utime(work, (LONG_AGO, LONG_AGO))
    kept = [old(data / "0123" / "train.bin"), old(stage.folder / "metrics.jsonl"), old(data / "0123.lock")]
    (stage.folder / ".result.json.4712").write_text("{}")  # just written
    expected = {str(path.relative_to(place.root)) for path in [*leftovers, work]}
    assert found(place).keys() == expected
    with locked(data / "0123.lock"):
        assert found(place).keys() == expected - {"data/.0123"}
    with stage.claim():
        assert found(place).keys() == {"data/.0123"}
    remove(place, find(place).garbage)
    assert not any(path.exists() for path in [*leftovers, work])
    assert all(path.exists() for path in kept)
    assert stage.result() is not None


def test_the_finished_parts_of_an_interrupted_tokenisation_stay(place):
    """They are hours of work that the next run goes on from, however old they are."""
    listed(place, "norms", NEEDED, ORPHAN, BUSY)
    parts = [old(place.data / ".0123" / name) for name in ("00004.json", "00004.train.bin", "00004.validation.bin")]
    os.utime(parts[0].parent, (LONG_AGO, LONG_AGO))
    assert found(place) == {}
    remove(place, find(place).garbage)
    assert all(path.exists() for path in parts)


def test_a_removal_that_was_killed_halfway_is_finished_by_the_next(place):
    """The folder has lost its name before its first file goes, so no half of it is a stage."""
    place.stage(ORPHAN).folder.rename(place.root / "stages" / f".removed-{ORPHAN}")
    assert found(place) == {f"stages/{BUSY}": "orphaned stage", f"stages/.removed-{ORPHAN}": "leftover"}
    remove(place, find(place).garbage)
    assert sorted(folder.name for folder in (place.root / "stages").iterdir()) == [NEEDED, PARENT]


def test_a_folder_that_is_no_store_is_not_looked_through(tmp_path):
    (tmp_path / "stages" / "precious").mkdir(parents=True)
    with pytest.raises(InputError, match=f"{tmp_path} is no store"):
        find(Store(tmp_path))

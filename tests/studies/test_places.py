"""A study or a sweep on places of an engine: whole whatever happens to a place or to the follower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.launch.settings import LaunchSettings, launch_settings
from lit_llm.store.claims import last_claim
from lit_llm.store.store import Store, read_metrics
from lit_llm.studies import launched
from lit_llm.studies.launched import Places, cancel, living_places, requests_of
from lit_llm.studies.load import load_study
from lit_llm.studies.run import Finished, Observer, run_study
from tests.launch.process_engine import ProcessEngine
from tests.studies.test_run import TWO, Silent, Study, long


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ProcessEngine:
    engine = ProcessEngine()
    monkeypatch.setattr(launched, "engine_of", lambda *_: engine)
    monkeypatch.setattr(launched, "ENGINE_SECONDS", 0.2)
    monkeypatch.setattr(launched, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(launched, "TOP_UP_SECONDS", 1.0)
    return engine


def on_places(path: Path, store: Store, engine: ProcessEngine, observer: Observer, count: int = 2) -> Finished:
    settings = LaunchSettings()
    places = Places("slurm", engine, settings, settings.needs(jobs=1, threads=1), count)
    return run_study(load_study(path), store, observer=observer, max_parallel=1, places=places)


@pytest.mark.slow
def test_a_study_on_two_places_that_lose_one_computes_the_same(
    write_study: Study, store: Store, tmp_path: Path, engine: ProcessEngine
) -> None:
    path = write_study("placed", TWO, seeds=[500, 501])
    path.write_text(long(path.read_text(), 60))
    killed: list[str] = []

    class Killer(Silent):
        def poll(self) -> None:
            training = [run for run in self.runs if read_metrics(run.last.metrics_file)]
            if training and not killed:
                killed.append(next(iter(engine.processes)))
                engine.kill(killed[0])

    observer = Killer()
    finished = on_places(path, store, engine, observer)
    assert killed
    assert finished.exit_code == 0
    assert not finished.interrupted
    assert len(engine.requests) > 1  # one more place for the one that was lost
    local = run_study(load_study(path), Store(tmp_path / "local"), observer=Silent(), max_parallel=2)
    for here, there in zip(local.runs, finished.runs, strict=True):
        assert here.last.result()["weights"] == there.last.result()["weights"]


@pytest.mark.slow
def test_a_new_place_takes_over_what_a_dead_host_held(
    write_study: Study, tmp_path: Path, engine: ProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody of its host is left to see that it is dead, and the new place has not watched its lease before."""
    monkeypatch.setenv("LIT_LLM_LOCKS", "lease:4")
    store, engine.hosts = Store(tmp_path / "shared").open(), True
    path = write_study("hosts", "arms: {red: {}}", seeds=[506])
    path.write_text(long(path.read_text(), 60))

    killed: list[str] = []

    class Killer(Silent):
        def poll(self) -> None:
            if not killed and read_metrics(self.runs[0].last.metrics_file):
                killed.append(next(iter(engine.processes)))
                engine.kill(killed[0])

    finished = on_places(path, store, engine, Killer(), count=1)
    assert finished.exit_code == 0
    assert len(engine.requests) == 2
    assert last_claim(finished.runs[0].last.folder).generation == 2


def test_places_outlive_their_follower_and_are_followed_again(
    write_study: Study, store: Store, engine: ProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study("followed", TWO, seeds=[502])
    path.write_text(long(path.read_text(), 40))

    class Leaver(Silent):
        def poll(self) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_places(path, store, engine, Leaver(), count=1)
    folder = store.study("followed")
    ((_, living),) = living_places(folder, LaunchSettings())
    assert len(living) == 1
    assert on_places(path, store, engine, Silent(), count=1).exit_code == 0
    assert len(engine.requests) == 1
    assert len(requests_of(folder)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed", "known"), [("cancelled", 503, 1), ("cancelled_unknown", 505, 0)])
def test_cancelled_places_save_and_the_study_goes_on(
    write_study: Study, store: Store, engine: ProcessEngine, name: str, seed: int, known: int
) -> None:
    """Also places that `cancel` does not know, since the command that asked for them was killed."""
    path = write_study(name, TWO, seeds=[seed])
    path.write_text(long(path.read_text(), 300))
    folder, stopped = store.study(name), []

    class Canceller(Silent):
        def poll(self) -> None:
            if not stopped and any(read_metrics(run.last.metrics_file) for run in self.runs):
                if not known:
                    (folder / "places" / "1" / "places.json").unlink()
                stopped.append(cancel(folder, LaunchSettings(), 20.0))

    assert on_places(path, store, engine, Canceller(), count=1).exit_code == 130
    assert len(engine.requests) == 1  # nobody asks for a place in its stead
    assert stopped == [known]
    for process in engine.processes.values():
        assert process.wait(timeout=60) == 130
    names = [
        work["fingerprint"] for work in json.loads((folder / "places" / "1" / "manifest.json").read_text())["stages"]
    ]
    assert "interrupted" in {store.stage(name).status()["state"] for name in names}
    assert cancel(folder, LaunchSettings(), 20.0) == 0


def test_places_that_do_nothing_are_asked_for_three_times(
    write_study: Study, store: Store, engine: ProcessEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study("useless", TWO, seeds=[504])
    monkeypatch.setattr(launched.sys, "executable", "/bin/false")
    observer = Silent()
    finished = on_places(path, store, engine, observer, count=1)
    assert finished.exit_code == 1
    assert len(engine.requests) == 3
    assert "place-0.txt" in observer.messages[-1]


def test_what_no_place_can_serve_is_refused_before_anything_starts(
    write_study: Study, store: Store, engine: ProcessEngine
) -> None:
    path = write_study("wide", TWO, seeds=[505])
    settings = LaunchSettings(cpus=65)
    places = Places("slurm", engine, settings, settings.needs(jobs=1, threads=1), 1)
    with pytest.raises(InputError, match="at most 64 CPUs"):
        run_study(load_study(path), store, observer=Silent(), max_parallel=1, places=places)
    assert engine.requests == []


def test_settings_of_a_store_win_over_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "lit-llm").mkdir()
    (tmp_path / "lit-llm" / "settings.toml").write_text('[launch]\nlauncher = "slurm"\nplaces = 3\n')
    store = tmp_path / "store"
    store.mkdir()
    assert launch_settings(store).places == 3
    (store / "settings.toml").write_text("[launch]\nplaces = 5\n")
    both = launch_settings(store)
    assert (both.launcher, both.places) == ("slurm", 5)
    (store / "settings.toml").write_text("[launch]\nplace = 5\n")
    with pytest.raises(InputError, match=r"settings.toml: launch.place: unknown key - did you mean 'places'"):
        launch_settings(store)
    (store / "settings.toml").write_text("[launch\n")
    with pytest.raises(InputError, match="settings.toml: cannot be read"):
        launch_settings(store)

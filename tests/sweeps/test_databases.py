"""The trials in a database: PostgreSQL, MySQL (MariaDB) and sqlite do all that the journal does."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import optuna
import pytest

from lit_llm.config.problems import InputError
from lit_llm.config.tree import difference
from lit_llm.store.store import Store
from lit_llm.sweeps import storage
from lit_llm.sweeps.sweep import load_sweep
from lit_llm.sweeps.trials import Trials
from lit_llm.tracking.address import without_secrets
from tests.commands import lit_llm
from tests.sweeps.databases import (
    PASSWORD,
    USER,
    File,
    MariaDB,
    PostgreSQL,
    Server,
    free_port,
    open_and_tell,
    served,
    studies_in_dashboard,
)
from tests.sweeps.tiny_sweeps import ALONE, ONE, TWO, Coordinator, Seen, counted, longer, rates, sweep

Write = Callable[..., Path]
KINDS = ("postgresql", "mysql", "sqlite")
SERVERS = KINDS[:2]
UNTRAINED = "space: {model.feed_forward.d_ff: {int: [8, 64]}}\noptimize: [{metric: parameters, direction: minimize}]"


def kinds(names: Sequence[str] = KINDS, slow: Sequence[str] = ()) -> pytest.MarkDecorator:
    """Runs a test on these databases, each on one worker."""
    marks = {name: [pytest.mark.xdist_group(name), *([pytest.mark.slow] if name in slow else [])] for name in names}
    params = [pytest.param(name, marks=marks[name]) for name in names]
    return pytest.mark.parametrize("database", params, indirect=True)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in KINDS])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server | File]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if request.param == "sqlite":
        yield File(tmp_path_factory.mktemp("sqlite"))
        return
    driver = storage.DRIVERS[request.param]
    pytest.importorskip(driver, reason=f"needs {driver}: pip install 'lit-llm[{request.param}]'")
    with served(PostgreSQL if request.param == "postgresql" else MariaDB) as server:
        yield server


def seed(database: Server | File, number: int) -> int:
    """A seed of this test and database, whose stages no other one has trained."""
    return 500 + 20 * KINDS.index(database.kind) + number


def written(store: Store, name: str) -> str:
    """All that a sweep's folder holds as text."""
    return "".join(path.read_text() for path in store.study(name).rglob("*") if path.is_file())


@kinds(slow=KINDS)
def test_two_coordinators_share_one_budget_in_the_database_and_a_third_goes_on(
    write_sweep: Write, store: Store, database: Server | File, tmp_path: Path
) -> None:
    rest = f"{TWO}\n{rates()}\nseeds: [{seed(database, 0)}]\npruner: median\n{ALONE}"
    path = write_sweep(f"database_{database.kind}", rest, trials=4)
    both = [Coordinator(tmp_path, path, store.root, storage=database.url()) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0], "\n".join(one.output for one in both)
    begun = [name for one in both for name in one.begun]
    assert sorted(begun) == [f"{arm}/trial 00{number}" for arm in ("dec", "red") for number in range(4)]
    observer = Seen()
    path.write_text(path.read_text().replace("trials: 4", "trials: 5"))
    ended = sweep(path, store, observer, storage=database.url())
    assert sorted(observer.begun) == ["dec/trial 004", "red/trial 004"]
    for arm in ("red", "dec"):
        assert len({tuple(trial.point.items()) for trial in counted(ended, arm)}) == 5
        assert {trial.state for trial in counted(ended, arm)} <= {"done", "pruned"}
    assert not list(store.study(path.stem).glob("optuna.journal*"))
    assert PASSWORD not in written(store, path.stem)
    assert PASSWORD not in Trials(ended.search, store, database.url()).address
    assert not any(PASSWORD in one.output for one in both)


@kinds(slow=KINDS)
def test_a_trial_whose_coordinator_is_killed_is_ended_by_the_next(
    write_sweep: Write, store: Store, database: Server | File, tmp_path: Path
) -> None:
    path = write_sweep(f"killed_{database.kind}", f"{ONE}\n{rates()}\nseeds: [{seed(database, 1)}]\n{ALONE}", trials=1)
    fault = "Trials.finish = lambda *_, **__: die()"
    assert Coordinator(tmp_path, path, store.root, storage=database.url(), fault=fault).wait() == -signal.SIGKILL
    trials = Trials(load_sweep(path), store, database.url())
    assert [(trial.number, trial.state) for trial in trials.all()] == [(0, "running")]
    ended = sweep(path, store, storage=database.url())
    assert [(trial.number, trial.state) for trial in ended.trials] == [(0, "done")]


@kinds(slow=("mysql", "sqlite"))
def test_the_database_finds_what_the_file_finds(write_sweep: Write, store: Store, database: Server | File) -> None:
    """One at a time and with the same seed, the storage decides nothing."""
    rest = f"{ONE}\n{rates()}\nseeds: [{seed(database, 2)}]\npruner: successive_halving\n{ALONE}"
    url = database.url()
    stored = sweep(write_sweep(f"stored_{database.kind}", rest, trials=6), store, max_parallel=1, storage=url)
    # As if nobody had trained these before: what a stage has read already is counted, to its end.
    for trial in stored.trials:
        for name in trial.fingerprints:
            shutil.rmtree(store.stage(name).folder)
    filed = sweep(write_sweep(f"filed_{database.kind}", rest, trials=6), store, max_parallel=1)
    seen = [[(t.number, t.point, t.state, t.values, t.reports, t.tokens) for t in e.trials] for e in (stored, filed)]
    assert seen[0] == seen[1]


def test_the_trials_are_in_one_place(write_sweep: Write, store: Store, database: Server | File) -> None:
    """Whoever forgets the address is told where they are, without the password."""
    path = write_sweep(f"one_place_{database.kind}", f"{ONE}\n{UNTRAINED}\n{ALONE}", trials=1)
    sweep(path, store, storage=database.url())
    place = re.escape(without_secrets(database.url()))
    for other in (None, database.url("elsewhere")):
        with pytest.raises(InputError, match=f"are in {place}, not in") as told:
            sweep(path, store, storage=other)
        assert PASSWORD not in str(told.value)
    assert len(Trials(load_sweep(path), store, database.url()).all()) == 1


@kinds(SERVERS)
def test_a_database_that_cannot_be_used_is_told_without_the_password(
    write_sweep: Write, store: Store, database: Server
) -> None:
    path = write_sweep(f"nowhere_{database.kind}", f"{ONE}\n{UNTRAINED}\n{ALONE}", trials=1)
    of_password, of_name, of_port = database.refusals
    away = database.url(port=free_port())
    wrong = {
        database.url(password=PASSWORD[::-1]): of_password,
        database.url("nobodys"): of_name,
        away: of_port,
        database.url(password="p@ss/" + PASSWORD): "write %40 for an @",
        f"{database.kind}+nodriver://{USER}:{PASSWORD}@127.0.0.1/x": "cannot be used",
        f"oracle of {PASSWORD}": "cannot be used",
    }
    for url, reason in wrong.items():
        observer = Seen()
        with pytest.raises(InputError, match=reason) as told:
            sweep(path, store, observer, storage=url)
        assert observer.begun == []
        if url != f"oracle of {PASSWORD}":
            assert PASSWORD not in str(told.value)
            assert PASSWORD[::-1] not in str(told.value)
    shown = lit_llm("sweep", path, "--store", store.root, "--storage", away)
    assert shown.returncode == 2
    assert of_port in shown.stderr
    assert PASSWORD not in shown.stdout + shown.stderr
    # A mistake in the address is no decision about where the trials are.
    assert sweep(path, store, storage=database.url()).exit_code == 0


@kinds(SERVERS)
def test_the_password_may_be_kept_outside_of_the_address(
    database: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = database.password_elsewhere(tmp_path, monkeypatch)
    assert PASSWORD not in url
    assert storage.database(url).get_all_studies() is not None


@kinds(slow=("mysql", "sqlite"))
def test_trials_of_other_code_are_begun_anew_in_the_database(
    write_sweep: Write, store: Store, database: Server | File, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = f"{TWO}\n{rates()}\nseeds: [{seed(database, 4)}]\n{ALONE}"
    path = write_sweep(f"database_stale_{database.kind}", rest, trials=2)
    with monkeypatch.context() as patch:
        patch.setattr("lit_llm.sweeps.trials._provenance_digest", lambda *_: "older")
        sweep(path, store, storage=database.url())
    with pytest.raises(InputError, match="other code"):
        sweep(path, store, storage=database.url())
    anew = sweep(path, store, storage=database.url(), rerun="stale")
    for arm in ("red", "dec"):
        assert [trial.number for trial in counted(anew, arm)] == [0, 1]
        assert all(trial.origin not in ("", "older") for trial in counted(anew, arm))


@kinds(SERVERS, slow=("mysql",))
def test_a_database_that_goes_away_interrupts_and_nothing_is_lost(
    write_sweep: Write, store: Store, database: Server
) -> None:
    rest = f"{TWO}\n{rates()}\nseeds: [{seed(database, 5)}]\n{ALONE}"
    path = longer(write_sweep(f"gone_{database.kind}", rest, trials=2), 60)
    stopped: list[bool] = []
    observer = Seen()

    def stop() -> None:
        if len(observer.begun) >= 3 and not stopped:
            stopped.append(True)
            database.stop()

    observer.on_poll = stop
    try:
        ended = sweep(path, store, observer, storage=database.url())
    finally:
        if stopped:
            database.start()
    assert stopped
    assert ended.exit_code == 130
    (told,) = [message for message in observer.messages if "storage of the trials failed" in message]
    assert PASSWORD not in told
    again = sweep(path, store, storage=database.url())
    for arm in ("red", "dec"):
        assert [(trial.number, trial.state) for trial in counted(again, arm)] == [(0, "done"), (1, "done")]


def test_processes_may_open_a_new_database_together(database: Server | File) -> None:
    """Without a lock they fail where they make its tables."""
    database.create("together")
    url = database.url("together")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(open_and_tell, [url] * 3) == ["opened"] * 3
    assert len(optuna.load_study(study_name="shared", storage=storage.database(url)).trials) == 3


@kinds(["mysql"])
def test_a_lock_that_another_process_keeps_is_named(database: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(storage._LOCKS, "mysql", "SELECT GET_LOCK('lit-llm: tables', 0)")
    message = "cannot be used: another process has opened it"
    with storage._alone(storage.with_driver(database.url())), pytest.raises(InputError, match=message) as error:
        storage.database(database.url())
    assert PASSWORD not in str(error.value)
    assert storage.database(database.url()).get_all_studies() is not None


def test_names_that_differ_by_case_share_no_trials(write_sweep: Write, store: Store, database: Server | File) -> None:
    """MySQL takes such names for the same, unless the database was created otherwise."""
    names = (f"Letters_{database.kind}", f"letters_{database.kind}")
    first, second = (write_sweep(name, f"{ONE}\n{UNTRAINED}\n{ALONE}", trials=2) for name in names)
    sweep(first, store, storage=database.url())
    url = database.url()
    if database.kind == "mysql":
        assert Trials(load_sweep(second), store, url).of("red") == []
        with pytest.raises(InputError, match="create a database with COLLATE utf8mb4_bin"):
            sweep(second, store, storage=url)
        database.create("letters COLLATE utf8mb4_bin")
        url = database.url("letters")
    assert len(sweep(second, store, storage=url).trials) == 2
    assert len(Trials(load_sweep(first), store, database.url()).all()) == 2


def test_a_long_error_fits(write_sweep: Write, store: Store, database: Server | File) -> None:
    """MySQL takes no text over 64 KB, and Optuna writes a letter that is not ASCII in up to 12."""
    search = load_sweep(write_sweep(f"long_{database.kind}", f"{ONE}\n{UNTRAINED}\n{ALONE}", trials=1))
    trials = Trials(search, store, database.url())
    with trials.coordinating():
        trial = trials.next()
        assert trial is not None
        trials.finish(trial, "failed", error="\N{GRINNING FACE}" * 100_000)
    (ended,) = Trials(search, store, database.url()).all()
    assert ended.state == "failed"
    assert ended.error is not None
    assert ended.error.startswith("\N{GRINNING FACE}")


def test_what_is_stored_of_an_arm_does_not_grow_with_the_others(write_sweep: Write) -> None:
    """MySQL takes no text over 64 KB, which the experiments of 30 arms would fill."""
    few, many = (f"arms: {{{', '.join(f'arm{number}: {{}}' for number in range(count))}}}" for count in (1, 4))
    stored = [load_sweep(write_sweep("size", f"{arms}\n{UNTRAINED}\n{ALONE}")).identity("arm0") for arms in (few, many)]
    assert list(difference(*stored)) == ["arms"]
    assert len(json.dumps(stored[1])) - len(json.dumps(stored[0])) < 50


def test_the_dashboard_opens_the_trials(write_sweep: Write, store: Store, database: Server | File) -> None:
    """By the address that `report` prints, with the user and password that it leaves out."""
    search = load_sweep(write_sweep(f"shown_{database.kind}", f"{ONE}\n{UNTRAINED}\n{ALONE}"))
    trials = Trials(search, store, database.url())
    with trials.coordinating():
        pass
    address = trials.address.replace("://127", f"://{USER}:{PASSWORD}@127")
    assert f"{search.name}/red" in studies_in_dashboard(address)

"""The trials in PostgreSQL: a server of the test's own, with a password, on this machine."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lit_llm.config.problems import InputError
from lit_llm.store.store import Store
from lit_llm.sweeps.sweep import load_sweep
from lit_llm.sweeps.trials import Trials
from tests.sweeps.tiny_sweeps import ALONE, ONE, TWO, Coordinator, Seen, counted, longer, rates, sweep

pytestmark = pytest.mark.xdist_group("postgresql")
Write = Callable[..., Path]
USER, PASSWORD = "tuner", "xyzzy-4711"


def binaries() -> Path | None:
    """The folder of initdb and postgres: in PATH, or where Debian has them."""
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "initdb").exists()), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """Can be stopped and started again, with all that it holds."""

    folder: Path
    programs: Path
    owner: dict[str, object]
    """Of the process: it refuses to be root."""
    port: int
    process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "postgres", password: str = PASSWORD, port: int | None = None) -> str:
        return f"postgresql://{USER}:{password}@127.0.0.1:{port or self.port}/{database}"

    def start(self) -> None:
        import psycopg

        where = ["-D", str(self.folder / "data"), "-k", str(self.folder), "-p", str(self.port), "-h", "127.0.0.1"]
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [self.programs / "postgres", *where, "-F"],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self.owner,  # type: ignore[call-overload]
            )
        deadline = time.monotonic() + 200
        while True:
            try:
                return psycopg.connect(self.url(), connect_timeout=3).close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise AssertionError((self.folder / "log.txt").read_text()) from None
                time.sleep(0.1)

    def stop(self) -> None:
        """At once, whoever is connected."""
        assert self.process is not None
        self.process.terminate() if self.process.poll() is not None else self.process.send_signal(3)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    pytest.importorskip("psycopg", reason="needs psycopg: pip install 'psycopg[binary]'")
    programs = binaries()
    if programs is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    owner: dict[str, object] = {}
    folder = Path(tempfile.mkdtemp(prefix="lit-llm-postgresql-"))  # pytest's own folders are closed to others
    try:
        if os.getuid() == 0:
            try:
                account = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("PostgreSQL refuses to be run by root, and there is no user postgres")
            owner = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
            os.chown(folder, account.pw_uid, account.pw_gid)
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        subprocess.run(
            [
                *(programs / "initdb", "-D", folder / "data", "-U", USER, "-A", "scram-sha-256", "-N"),
                f"--pwfile={folder / 'password'}",
            ],
            check=True,
            capture_output=True,
            cwd=folder,
            **owner,  # type: ignore[call-overload]
        )
        made = Server(folder, programs, owner, free_port())
        made.start()
        yield made
        made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def written(store: Store, name: str) -> str:
    """All that a sweep's folder holds as text."""
    return "".join(path.read_text() for path in store.study(name).rglob("*") if path.is_file())


@pytest.mark.slow
def test_two_coordinators_share_one_budget_in_the_database_and_a_third_goes_on(
    write_sweep: Write, store: Store, server: Server, tmp_path: Path
) -> None:
    path = write_sweep("database", f"{TWO}\n{rates()}\nseeds: [500]\npruner: median\n{ALONE}", trials=4)
    both = [Coordinator(tmp_path, path, store.root, storage=server.url()) for _ in range(2)]
    assert [one.wait() for one in both] == [0, 0], "\n".join(one.output for one in both)
    begun = [name for one in both for name in one.begun]
    assert sorted(begun) == [f"{arm}/trial 00{number}" for arm in ("dec", "red") for number in range(4)]
    observer = Seen()
    path.write_text(path.read_text().replace("trials: 4", "trials: 5"))
    ended = sweep(path, store, observer, storage=server.url())
    assert sorted(observer.begun) == ["dec/trial 004", "red/trial 004"]
    for arm in ("red", "dec"):
        assert len({tuple(trial.point.items()) for trial in counted(ended, arm)}) == 5
        assert {trial.state for trial in counted(ended, arm)} <= {"done", "pruned"}
    assert not list(store.study("database").glob("optuna.journal*"))
    assert PASSWORD not in written(store, "database")
    assert PASSWORD not in Trials(ended.search, store, server.url()).address
    assert not any(PASSWORD in one.output for one in both)


def test_the_database_finds_what_the_file_finds(write_sweep: Write, store: Store, server: Server) -> None:
    """One at a time and with the same seed, the storage decides nothing."""
    rest = f"{ONE}\n{rates()}\nseeds: [501]\npruner: successive_halving\n{ALONE}"
    stored = sweep(write_sweep("stored", rest, trials=6), store, max_parallel=1, storage=server.url())
    # As if nobody had trained these before: what a stage has read already is counted, to its end.
    for trial in stored.trials:
        for name in trial.fingerprints:
            shutil.rmtree(store.stage(name).folder)
    filed = sweep(write_sweep("filed", rest, trials=6), store, max_parallel=1)
    seen = [[(t.number, t.point, t.state, t.values, t.reports, t.tokens) for t in e.trials] for e in (stored, filed)]
    assert seen[0] == seen[1]


def test_the_trials_are_in_one_place(write_sweep: Write, store: Store, server: Server) -> None:
    """Whoever forgets the address is told where they are, without the password."""
    path = write_sweep("one_place", f"{ONE}\n{rates()}\nseeds: [502]\n{ALONE}", trials=1)
    sweep(path, store, storage=server.url())
    for storage in (None, server.url("template1")):
        with pytest.raises(InputError, match=f"are in postgresql://127.0.0.1:{server.port}/postgres, not in") as told:
            sweep(path, store, storage=storage)
        assert PASSWORD not in str(told.value)
    assert len(Trials(load_sweep(path), store, server.url()).all()) == 1


def test_a_database_that_cannot_be_used_is_told_without_the_password(
    write_sweep: Write, store: Store, server: Server
) -> None:
    path = write_sweep("nowhere", f"{ONE}\n{rates()}\nseeds: [503]\n{ALONE}", trials=1)
    wrong = {
        server.url(password=PASSWORD[::-1]): "password authentication failed",
        server.url("nobodys"): "does not exist",
        server.url(port=free_port()): "refused",
        server.url(password="p@ss/" + PASSWORD): "cannot be used",
        f"postgresql+nodriver://{USER}:{PASSWORD}@127.0.0.1/x": "cannot be used",
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
    # A mistake in the address is no decision about where the trials are.
    assert sweep(path, store, storage=server.url()).exit_code == 0


def test_trials_of_other_code_are_begun_anew_in_the_database(
    write_sweep: Write, store: Store, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_sweep("database_stale", f"{TWO}\n{rates()}\nseeds: [504]\n{ALONE}", trials=2)
    with monkeypatch.context() as patch:
        patch.setattr("lit_llm.sweeps.trials._provenance_digest", lambda _: "older")
        sweep(path, store, storage=server.url())
    with pytest.raises(InputError, match="other code"):
        sweep(path, store, storage=server.url())
    anew = sweep(path, store, storage=server.url(), rerun="stale")
    for arm in ("red", "dec"):
        assert [trial.number for trial in counted(anew, arm)] == [0, 1]
        assert all(trial.origin not in ("", "older") for trial in counted(anew, arm))


def test_a_database_that_goes_away_interrupts_and_nothing_is_lost(
    write_sweep: Write, store: Store, server: Server
) -> None:
    path = longer(write_sweep("gone", f"{TWO}\n{rates()}\nseeds: [505]\n{ALONE}", trials=2), 60)
    stopped: list[bool] = []
    observer = Seen()

    def stop() -> None:
        if len(observer.begun) >= 3 and not stopped:
            stopped.append(True)
            server.stop()

    observer.on_poll = stop
    try:
        ended = sweep(path, store, observer, storage=server.url())
    finally:
        if stopped:
            server.start()
    assert stopped
    assert ended.exit_code == 130
    (told,) = [message for message in observer.messages if "storage of the trials failed" in message]
    assert PASSWORD not in told
    again = sweep(path, store, storage=server.url())
    for arm in ("red", "dec"):
        assert [(trial.number, trial.state) for trial in counted(again, arm)] == [(0, "done"), (1, "done")]

"""Databases for the trials of sweeps: servers of the test's own on this machine, with a password, and a file."""

from __future__ import annotations

import io
import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from lit_llm.sweeps import storage

USER, PASSWORD = "tuner", "xyzzy-4711"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def folder_of(program: str, *folders: Path) -> Path | None:
    """The folder of a program: in PATH, or where Debian has it."""
    found = shutil.which(program)
    candidates = [Path(found).parent] if found else list(folders)
    return next((folder for folder in reversed(candidates) if (folder / program).exists()), None)


@dataclass
class File:
    """An sqlite file."""

    folder: Path
    kind: ClassVar = "sqlite"

    def url(self, database: str = "trials") -> str:
        return f"sqlite:///{self.folder}/{database}.db"

    def create(self, database: str) -> None:
        """Nothing to do: whoever opens the file creates it."""


@dataclass
class Server:
    """Can be stopped and started again, with all that it holds."""

    folder: Path
    programs: Path
    owner: dict[str, object]
    """Of the processes, where the test is run by root: a server refuses to be."""
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    kind: ClassVar[str]
    refusals: ClassVar[tuple[str, str, str]]
    """What it says of a wrong password, of a database that does not exist, and of a port where nobody listens."""
    package: ClassVar[str]
    account: ClassVar[str]
    """Package of Debian that has it, and the user that this makes: they run it where the test is run by root."""

    @staticmethod
    def find() -> Path | None:
        """The folder of its programs."""
        raise NotImplementedError

    def initialise(self) -> None:
        raise NotImplementedError

    def command(self) -> Sequence[object]:
        """The command that serves."""
        raise NotImplementedError

    def url(
        self, database: str = "trials", password: str | None = PASSWORD, port: int | None = None, more: str = ""
    ) -> str:
        name = USER if password is None else f"{USER}:{password}"
        return f"{self.kind}://{name}@127.0.0.1:{port or self.port}/{database}{more}"

    def password_elsewhere(self, folder: Path, patch: pytest.MonkeyPatch) -> str:
        """An address without the password, which the driver finds where its users keep it."""
        raise NotImplementedError

    def run(self, *command: object) -> None:
        subprocess.run(
            [str(word) for word in command],
            check=True,
            capture_output=True,
            cwd=self.folder,
            **self.owner,  # type: ignore[call-overload]
        )

    def execute(self, statement: str, database: str) -> None:
        from sqlalchemy import create_engine, text

        engine = create_engine(storage.with_driver(self.url(database)), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def create(self, database: str) -> None:
        self.execute(f"CREATE DATABASE {database}", "trials")

    def start(self) -> None:
        from sqlalchemy.exc import OperationalError

        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                [str(word) for word in self.command()],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self.owner,  # type: ignore[call-overload]
            )
        deadline = time.monotonic() + 200
        while True:
            try:
                return self.execute("SELECT 1", "trials")
            except OperationalError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise AssertionError((self.folder / "log.txt").read_text()) from None
                time.sleep(0.1)

    def stop(self) -> None:
        """At once, whoever is connected."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(3)
        self.process.wait(30)


class PostgreSQL(Server):
    kind = "postgresql"
    package, account = "postgresql", "postgres"
    refusals = ("password authentication failed", "does not exist", "refused")

    @staticmethod
    def find() -> Path | None:
        return folder_of("initdb", *sorted(Path("/usr/lib/postgresql").glob("*/bin")))

    def initialise(self) -> None:
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        words = ("-D", self.folder / "data", "-U", USER, "-A", "scram-sha-256", "-N", f"--pwfile={secret}")
        self.run(self.programs / "initdb", *words)
        single = subprocess.run(
            [str(self.programs / "postgres"), "--single", "-D", str(self.folder / "data"), "postgres"],
            check=True,
            capture_output=True,
            input=b"CREATE DATABASE trials\n",
            cwd=self.folder,
            **self.owner,  # type: ignore[call-overload]
        )
        assert b"ERROR" not in single.stderr

    def command(self) -> Sequence[object]:
        where = ("-D", self.folder / "data", "-k", self.folder, "-p", self.port, "-h", "127.0.0.1")
        return (self.programs / "postgres", *where, "-F")

    def password_elsewhere(self, folder: Path, patch: pytest.MonkeyPatch) -> str:
        patch.setenv("PGPASSWORD", PASSWORD)
        return self.url(password=None)


class MariaDB(Server):
    """What Debian has for MySQL."""

    kind = "mysql"
    package, account = "mariadb-server", "mysql"
    refusals = ("Access denied", "Unknown database", "refused")

    @staticmethod
    def find() -> Path | None:
        return folder_of("mariadbd", Path("/usr/sbin"))

    def initialise(self) -> None:
        account = f"{USER}@'127.0.0.1'"
        statements = (
            f"CREATE USER IF NOT EXISTS {account} IDENTIFIED BY '{PASSWORD}';\nGRANT ALL ON *.* TO {account};\n"
        )
        (self.folder / "begin.sql").write_text(f"{statements}CREATE DATABASE IF NOT EXISTS trials;\n")
        (self.folder / "begin.sql").chmod(0o644)
        script = folder_of("mariadb-install-db", Path("/usr/bin"))
        assert script is not None
        self.run(script / "mariadb-install-db", "--no-defaults", *self._options(), "--skip-test-db")

    def _options(self) -> Sequence[object]:
        fast = ("--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0", "--innodb-log-file-size=4M")
        return (f"--datadir={self.folder / 'data'}", "--skip-name-resolve", *fast)

    def command(self) -> Sequence[object]:
        where = (f"--port={self.port}", "--bind-address=127.0.0.1", f"--socket={self.folder / 'socket'}")
        more = (f"--pid-file={self.folder / 'pid'}", f"--init-file={self.folder / 'begin.sql'}")
        return (self.programs / "mariadbd", "--no-defaults", *self._options(), *where, *more)

    def password_elsewhere(self, folder: Path, patch: pytest.MonkeyPatch) -> str:
        (folder / "my.cnf").write_text(f"[client]\npassword = {PASSWORD}\n")
        return self.url(password=None, more=f"?read_default_file={folder / 'my.cnf'}")


@contextmanager
def served(of: type[Server]) -> Iterator[Server]:
    """A new server, stopped and removed in the end. Skips where it is not installed."""
    programs = of.find()
    if programs is None:
        pytest.skip(f"needs {of.__name__}: apt-get install {of.package}")
    owner: dict[str, object] = {}
    folder = Path(tempfile.mkdtemp(prefix=f"lit-llm-{of.kind}-"))  # pytest's own folders are closed to others
    try:
        if os.getuid() == 0:
            try:
                entry = pwd.getpwnam(of.account)
            except KeyError:
                pytest.skip(f"{of.__name__} refuses to be run by root, and there is no user {of.account}")
            owner = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        server = of(folder, programs, owner)
        server.initialise()
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def open_and_tell(url: str) -> str:
    """What a process of a test does: open a database that may be new, and use it."""
    import optuna

    study = optuna.create_study(study_name="shared", storage=storage.database(url), load_if_exists=True)
    study.tell(study.ask(), 1.0)
    return "opened"


def studies_in_dashboard(address: object) -> list[str]:
    """Names of the studies that optuna-dashboard lists for a storage or its URL."""
    dashboard = pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
    environment = {"REQUEST_METHOD": "GET", "PATH_INFO": "/api/studies", "SERVER_NAME": "x", "SERVER_PORT": "1",
                   "wsgi.url_scheme": "http", "QUERY_STRING": ""}  # fmt: skip
    environment |= {"wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO()}
    body = list(dashboard.wsgi(address)(environment, lambda *_: None))
    return [study["study_name"] for study in json.loads(b"".join(body))["study_summaries"]]

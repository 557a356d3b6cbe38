"""Addresses of MLflow: the store's sqlite database by default, or a server."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # here, so that it also holds for the server of `ui_command`

LOCAL = "127.0.0.1"
"""Host of a server that answers only this machine."""
ALLOWED = "use sqlite:////absolute/path/mlflow.db or http(s)://host:port"


def default_tracking(store: Path) -> str:
    """Default address: sqlite in the store."""
    return sqlite_address(store.resolve() / "mlflow.db")


def sqlite_address(database: Path) -> str:
    """The address by which MLflow opens a database file.

    MLflow takes text after a '?' for parameters, so a folder with one is reached through a link.
    """
    folder = database.parent
    if "?" not in str(folder):
        return f"sqlite:///{database}"
    link = Path(tempfile.gettempdir()) / f"lit-llm-{os.getuid()}-{hashlib.sha256(bytes(folder)).hexdigest()[:16]}"
    with suppress(FileExistsError):
        link.symlink_to(folder)
    if link.readlink() != folder:
        raise ValueError(f"{link} is in the way: it should be a link to {folder}")
    return f"sqlite:///{link / database.name}"


def is_http(tracking: str) -> bool:
    return tracking.startswith(("http://", "https://"))


def resolved(tracking: str) -> tuple[str, Path | None]:
    """(address, file of sqlite or None), both absolute. Raises ValueError for an invalid address."""
    if tracking.startswith("sqlite:///") and tracking != "sqlite:///":
        database = Path(tracking.removeprefix("sqlite:///")).resolve()
        return sqlite_address(database), database
    try:
        parts = urlsplit(tracking)
        usable = is_http(tracking) and parts.hostname and parts.port != 0 and not re.search(r"\s", tracking)
    except ValueError:  # a port that is no number below 65536, half of an IPv6 address
        usable = False
    if not usable:
        raise ValueError(f"{without_secrets(tracking)!r}: {ALLOWED}")
    return tracking, None


SECRET_KEY = r"(?:[^=&?;\s'\"]*(?:pass|pwd|secret|token|key|auth|credential|signature)[^=&?;\s'\"]*|sig|pw)"
"""A key whose value may be a secret."""
SECRET = rf"{SECRET_KEY}=[^&;\s'\"]*"
"""A pair of a URL's query that may be a secret."""


def without_secrets(text: str) -> str:
    """A text without users, passwords and secret parameters in its URLs.

    Credentials belong into the environment or the driver's files: MLFLOW_TRACKING_TOKEN, PGPASSWORD, ~/.pgpass.
    """
    # Up to the last @ before a query, as a password may contain @ and slashes. An sqlite file's name may, too.
    secret = r"(sqlite:///[^\s'\"]*)|//(?:(?!\?\w+=)[^\s'\"])*@"
    text = re.sub(secret, lambda found: found[1] or "//", text)
    text = re.sub(rf"(?i)(?<=[?&;]){SECRET}(?:[&;]|(?=[\s'\"]|$))", "", text)
    return re.sub(r"(://[^\s'\"?]*)[?&]+(?=[\s'\"]|$)|(://[^\s'\"]*[^&])&+(?=[\s'\"]|$)", r"\1\2", text)


def few_retries() -> None:
    """Switch off MLflow's retries, which take minutes by default; the next sync retries instead.

    Waiting would delay Ctrl-C, and its output would break the live display. Settings of the user stay.
    """
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds


def check_server(tracking: str) -> None:
    """Request one experiment from an http address, within 10 s. Raises ValueError for an answer that is not MLflow's.

    No answer (refused, unknown host, too slow, 5xx) is no error: the server may come back and is caught up then.
    """
    if not is_http(tracking):
        return
    few_retries()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient(tracking).search_experiments(max_results=1)
    except MlflowException as problem:
        cause = problem.__cause__ or problem.__context__
        address = without_secrets(tracking)
        if isinstance(cause, ValueError):  # requests' InvalidURL
            raise ValueError(f"{address!r}: {ALLOWED}") from None
        if isinstance(cause, OSError):  # other failures of requests may pass
            return
        if problem.get_http_status_code() in (401, 403):
            raise ValueError(
                f"{address} refuses access ({reason(problem)}); "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from None
        raise ValueError(f"{address} answers, but not as an MLflow server ({reason(problem)}); {ALLOWED}") from None


def reason(problem: BaseException) -> str:
    """First line of an error, without passwords; the cause of a failed request."""
    line = without_secrets((str(problem) or type(problem).__name__).splitlines()[0])
    return re.sub(r".*\(Caused by (.*)\)$", r"\1", line)[:300]


def ui_command(tracking: str, port: int = 5000, host: str = LOCAL) -> list[str]:
    """The command that opens MLflow's UI: a quiet server for sqlite, or the browser for an http address."""
    if is_http(tracking):
        return [sys.executable, "-m", "webbrowser", tracking]
    # `mlflow ui` ignores MLFLOW_TRACKING_URI. One worker, because several race to migrate a fresh database.
    address = ["--backend-store-uri", tracking, "--host", host, "--port", str(port)]
    quietly = ["--uvicorn-opts", "--log-level warning"]
    return [sys.executable, "-m", "mlflow", "ui", *address, "--workers", "1", *quietly]


def taken(host: str, port: int) -> str:
    """Reason why a port cannot be served; '' where it can."""
    try:
        where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in where[:1]:
            with socket.socket(family, kind, protocol) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                server.bind(address)
                server.listen()
    except OSError as error:
        return error.strerror or str(error)
    return ""

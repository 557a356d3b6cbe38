"""Where MLflow records: the store's sqlite by default, or a server."""

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
"""Where a server answers this machine alone."""
ALLOWED = "use sqlite:////absolute/path/mlflow.db or http(s)://host:port"


def default_tracking(store: Path) -> str:
    """The address used unless the user names one: sqlite in the store."""
    return sqlite_address(store.resolve() / "mlflow.db")


def sqlite_address(database: Path) -> str:
    """The address by which MLflow opens a file. It takes what follows a '?' for parameters, so such a folder is
    reached through a link of another name."""
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
    """The address and, for sqlite, its file, both absolute. ValueError for what can be no address."""
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


SECRET = r"(?:[^=&?;\s'\"]*(?:pass|pwd|secret|token|key|auth|credential|signature)[^=&?;\s'\"]*|sig|pw)=[^&;\s'\"]*"
"""A pair of a URL's query that may be a secret."""


def without_secrets(text: str) -> str:
    """The text with user, password and secret parameters taken out of every URL in it.

    Credentials are for the environment or for the driver's own files: MLFLOW_TRACKING_TOKEN, PGPASSWORD, ~/.pgpass.
    """
    # To the last @ before a query: a password may hold one, and slashes.
    text = re.sub(r"//(?:(?!\?\w+=)[^\s'\"])*@", "//", text)
    text = re.sub(rf"(?i)(?<=[?&;]){SECRET}(?:[&;]|(?=[\s'\"]|$))", "", text)
    return re.sub(r"(://[^\s'\"?]*)[?&]+(?=[\s'\"]|$)|(://[^\s'\"]*[^&])&+(?=[\s'\"]|$)", r"\1\2", text)


def few_retries() -> None:
    """MLflow retries a request for minutes unless told otherwise; our next sync is the retry.

    Waits would hold up Ctrl-C, and what it prints would break the live display. What the user has set stays.
    """
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds


def check_server(tracking: str) -> None:
    """Ask an http address for one experiment, in at most 10 s. ValueError if something answers that takes no records.

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
        if isinstance(cause, OSError):  # every other failure of requests, which retries what a server may get over
            return
        if problem.get_http_status_code() in (401, 403):
            raise ValueError(
                f"{address} refuses access ({reason(problem)}); "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from None
        raise ValueError(f"{address} answers, but not as an MLflow server ({reason(problem)}); {ALLOWED}") from None


def reason(problem: BaseException) -> str:
    """The first line of what is wrong, without passwords; of a failed request, what caused it."""
    line = without_secrets((str(problem) or type(problem).__name__).splitlines()[0])
    return re.sub(r".*\(Caused by (.*)\)$", r"\1", line)[:300]


def ui_command(tracking: str, port: int = 5000, host: str = LOCAL) -> list[str]:
    """The command that opens MLflow's UI: a server for sqlite, which says only what goes wrong; the browser for an
    address that is one."""
    if is_http(tracking):
        return [sys.executable, "-m", "webbrowser", tracking]
    # `mlflow ui` ignores MLFLOW_TRACKING_URI. One worker, because several race to migrate a fresh database.
    address = ["--backend-store-uri", tracking, "--host", host, "--port", str(port)]
    quietly = ["--uvicorn-opts", "--log-level warning"]
    return [sys.executable, "-m", "mlflow", "ui", *address, "--workers", "1", *quietly]


def taken(host: str, port: int) -> str:
    """Why nothing can be served there; '' where it can."""
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

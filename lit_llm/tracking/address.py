"""Where MLflow records: the store's sqlite by default, or a server."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # here, so that it also holds for the server of `ui_command`

ALLOWED = "use sqlite:////absolute/path/mlflow.db or http(s)://host:port"


def default_tracking(store: Path) -> str:
    """The address used unless the user names one: sqlite in the store."""
    return f"sqlite:///{store.resolve() / 'mlflow.db'}"


def is_http(tracking: str) -> bool:
    return tracking.startswith(("http://", "https://"))


def resolved(tracking: str) -> tuple[str, Path | None]:
    """The address and, for sqlite, its file, both absolute. ValueError for what can be no address."""
    if tracking.startswith("sqlite:///") and tracking != "sqlite:///":
        database = Path(tracking.removeprefix("sqlite:///")).resolve()
        return f"sqlite:///{database}", database
    try:
        parts = urlsplit(tracking)
        usable = is_http(tracking) and parts.hostname and parts.port != 0 and not re.search(r"\s", tracking)
    except ValueError:  # a port that is no number below 65536, half of an IPv6 address
        usable = False
    if not usable:
        raise ValueError(f"{without_password(tracking)!r}: {ALLOWED}")
    return tracking, None


def without_password(text: str) -> str:
    return re.sub(r"//[^\s'\"]*@", "//", text)  # to the last @: a password may hold one, and slashes


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
        address = without_password(tracking)
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
    line = without_password((str(problem) or type(problem).__name__).splitlines()[0])
    return re.sub(r".*\(Caused by (.*)\)$", r"\1", line)[:300]


def ui_command(tracking: str, port: int = 5000) -> list[str]:
    """The command that opens MLflow's UI: a server on 127.0.0.1 for sqlite, the browser for an address that is one."""
    if is_http(tracking):
        return [sys.executable, "-m", "webbrowser", tracking]
    # `mlflow ui` ignores MLFLOW_TRACKING_URI. One worker, because several race to migrate a fresh database.
    address = ["--backend-store-uri", tracking, "--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", "mlflow", "ui", *address, "--workers", "1"]

"""Addresses: no secret of one is shown, and a port that is taken is known before anything is served."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lit_llm.cli import app
from lit_llm.cli.options import same_command
from lit_llm.config.problems import InputError
from lit_llm.tracking.address import taken, ui_command, without_secrets


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://user:p@ss/w@host/db", "postgresql://host/db"),
        ("postgresql://host/db?password=hunter2", "postgresql://host/db"),
        ("postgresql://host/db?password=hunter2&sslmode=require", "postgresql://host/db?sslmode=require"),
        ("postgresql://host/db?sslmode=require&PassWord=hunter2", "postgresql://host/db?sslmode=require"),
        ("'http://host:5?token=hunter2' refused", "'http://host:5' refused"),
        ("http://host/a?a=1&api_key=hunter2&b=2", "http://host/a?a=1&b=2"),
        ("http://host/a?access_token=hunter2&secret=hunter3", "http://host/a"),
        ("sqlite:////tmp/a b/mlflow.db", "sqlite:////tmp/a b/mlflow.db"),
        ("sqlite:////data/a@x/b@y.db, not http://user:p@host", "sqlite:////data/a@x/b@y.db, not http://host"),
        ("https://host/blob?sv=1&sig=hunter2", "https://host/blob?sv=1"),
        ("postgresql://host/db?user=a&pw=hunter2", "postgresql://host/db?user=a"),
        ("http://host/api?mail=me@example.org", "http://host/api?mail=me@example.org"),
        ("postgresql://user:p?a@host/db", "postgresql://host/db"),
        ("what? a=1", "what? a=1"),
    ],
)
def test_no_secret_of_an_address_is_shown(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_a_command_to_go_on_has_the_whole_path_quoted_and_no_secret(tmp_path: Path) -> None:
    said = same_command("run", "a study.yaml", ["a=[1, 2]"], tmp_path / "my mlruns", "http://u:p@h?token=x")
    assert said == f"lit-llm run 'a study.yaml' --store '{tmp_path}/my mlruns' --tracking http://h -o 'a=[1, 2]'"


def test_a_port_that_is_taken_is_told_with_a_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").touch()
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("a server was begun"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert "in use" in taken("127.0.0.1", port)
        said = CliRunner().invoke(app, ["ui", "--store", str(tmp_path), "--port", str(port)])
    assert isinstance(said.exception, InputError)
    assert "Address already in use); `--port " in str(said.exception)


def test_the_server_is_quiet_and_listens_where_it_is_told() -> None:
    command = ui_command("sqlite:////tmp/mlflow.db", 5001, "0.0.0.0")
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert command[command.index("--uvicorn-opts") + 1] == "--log-level warning"

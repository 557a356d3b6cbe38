"""A component in a package of its own: the one that the pages show, installed and used as a reader would."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.commands import command

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own-components.md").read_text()
FILES = dict(re.findall(r"```\w+ title=\"([^\"]+)\"\n(.*?)```", PAGE, re.S))
KEY = "temperature_attention"


def install(package: Path, site: Path) -> None:
    """By pip, without a network: its build backend is here."""
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-index", "--no-deps"]
    subprocess.run([*line, "--target", str(site), str(package)], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path of packages, with the package of the page."""
    package, site = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    for title, text in FILES.items():
        (package / title).parent.mkdir(exist_ok=True)
        (package / title).write_text(text)
    install(package, site)
    return site


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def lit_llm(installed: Path, tmp_path: Path) -> Command:
    """`lit-llm ARGUMENTS` in a process that has a copy of the package."""
    site = tmp_path / "site"
    shutil.copytree(installed, site)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join(filter(None, (str(site), str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(
            command(*arguments), capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
        )

    return run


@pytest.fixture
def study(tmp_path: Path, small_base: str) -> Path:
    """The page's study, small: one seed, two steps."""
    written = yaml.safe_load(FILES["temperature.yaml"])
    path = tmp_path / "temperature.yaml"
    path.write_text(yaml.safe_dump({**written, "seeds": [0], "base": yaml.safe_load(small_base)}))
    return path


def test_the_page_shows_a_complete_one_in_few_lines() -> None:
    code = [line for title, text in FILES.items() if title.endswith(".py") for line in text.splitlines()]
    assert len(code) < 60


@pytest.mark.slow
def test_it_is_planned_run_reported_and_stale_after_a_change(lit_llm: Command, study: Path, tmp_path: Path) -> None:
    planned = lit_llm("plan", study, "--json")
    assert planned.returncode == 0, planned.stderr
    plain, tempered = json.loads(planned.stdout)["arms"]
    assert tempered["name"].endswith("per_head")
    layers_times_heads = 4 * 2
    assert tempered["parameters"] == plain["parameters"] + layers_times_heads
    assert tempered["fingerprints"] != plain["fingerprints"]
    assert list(tempered["differs"]) == [f"model.decoder.{KEY}.kind"]

    store = tmp_path / "store"
    finished = lit_llm("run", study, "--store", store)
    assert finished.returncode == 0, finished.stderr
    assert KEY in lit_llm("report", study, "--store", store).stdout

    def stale() -> dict[str, bool]:
        runs = json.loads(lit_llm("status", study, "--json", "--store", store).stdout)["runs"]
        assert {run["state"] for run in runs} == {"done"}
        return {run["arm"].rpartition("=")[2]: run["stale"] for run in runs}

    assert stale() == {"baseline": False, "per_head": False}
    module = tmp_path / "site" / "learned_temperature" / "module.py"
    module.write_text(module.read_text() + "\n# A comment computes nothing.\n")
    assert stale() == {"baseline": False, "per_head": False}
    module.write_text(module.read_text().replace("torch.ones(config.heads)", "2 * torch.ones(config.heads)"))
    assert stale() == {"baseline": False, "per_head": True}


def test_the_schema_has_its_key(lit_llm: Command, study: Path) -> None:
    schema = json.loads(lit_llm("schema").stdout)
    jsonschema.validate(yaml.safe_load(study.read_text()), schema)
    wrong = yaml.safe_load(study.read_text())
    wrong["base"]["model"]["decoder"] = {KEY: {"kind": "for_all"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("COMPONENT = LayerComponent(", "COMPONENT = dict(", "is a dict, not a lit_llm.components.part.LayerComponent"),
        (
            "from typing",
            "import absent\nfrom typing",
            "cannot be loaded: ModuleNotFoundError",
        ),
        ('key="temperature_attention"', 'key="feed_forward"', "cannot have the key 'feed_forward'"),
        ('key="temperature_attention"', 'key="retention"', "two components have the key 'retention'"),
        ('role="mixer"', 'role="mixers"', "has the role 'mixers' - did you mean 'mixer'?"),
        ('"target_decoder"', '"targets"', "is for the stack 'targets'"),
        ('= "per_head"\n', "\n", "needs a `kind` with a default"),
        (
            "    return TemperatureAttention(",
            "    return values['no'] or TemperatureAttention(",
            "cannot be resolved: KeyError",
        ),
        (".module:TemperatureAttentionModule", ".gone:Module", "the module learned_temperature.gone:Module: cannot be"),
        (
            "(self.heads,)",
            "(self.heads, 2)",
            "its `shapes` say (2, 2) of decoder.layers.0.temperature_attention.temperature",
        ),
    ],
)
def test_a_package_that_cannot_be_used_is_named(
    lit_llm: Command, study: Path, tmp_path: Path, old: str, new: str, problem: str
) -> None:
    config = tmp_path / "site" / "learned_temperature" / "config.py"
    config.write_text(config.read_text().replace(old, new))
    ended = lit_llm("plan", study)
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False), ended.stderr
    assert problem in " ".join(ended.stderr.split())

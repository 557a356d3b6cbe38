"""What the README and the pages in `docs/` show is what the tool does."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import gzip
import importlib
import inspect
import json
import re
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import lit_llm
from lit_llm.bench import results
from lit_llm.bench.settings import BenchSettings
from lit_llm.cli import app
from lit_llm.components.attention.config import AttentionConfig
from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.report.tables.sweep import sweep_json, trial_json
from lit_llm.statistics.comparison import Comparison, Row
from lit_llm.statistics.item_differences import ItemComparison, ItemDifference, ItemTest
from lit_llm.statistics.signal_and_noise import DecisionAccuracy, SignalAndNoise
from lit_llm.statistics.two_studies import TwoStudies
from lit_llm.store.store import Store
from lit_llm.studies.load import load_study
from lit_llm.studies.metric_noise import MetricNoise
from lit_llm.studies.plan import plan
from lit_llm.studies.runs import runs_of
from lit_llm.studies.seeds_needed import PowerPlan
from lit_llm.studies.status import status_rows
from lit_llm.sweeps.sweep import is_sweep, load_sweep
from lit_llm.sweeps.trial import Trial
from tests.instructions import write_instructions

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CODE = "\n".join(path.read_text() for path in (ROOT / "lit_llm").rglob("*.py"))
FENCED = re.compile(r"^```.*?^```", re.S | re.M)


def snippets(language: str) -> list[object]:
    found = [
        (page.stem, text) for page in PAGES for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)
    ]
    return [pytest.param(text, id=f"{page}-{number}") for number, (page, text) in enumerate(found)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped studies, and the text that the pages speak of."""
    for name in ("ablations", "sweeps"):
        shutil.copytree(ROOT / name, tmp_path / name)
    data = tmp_path / "ablations" / "data"  # files are named from where the study lies
    data.mkdir()
    with gzip.open(data / "part.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"{n} words", "red_pajama_subset": "arxiv"}) + "\n" for n in range(100))
    (data / "train").mkdir()
    asked = [{"question": f"{n}?", "answer": f"{n}", "topic": "count"} for n in range(100)]
    with gzip.open(data / "train" / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in asked)
    for name in ("validation", "test"):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    write_instructions(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ablations"


@pytest.mark.parametrize("snippet", snippets("yaml"))
def test_every_study_and_sweep_on_the_pages_is_planned_and_fair(snippet: str, folder: Path) -> None:
    path = folder / "study.yaml"
    path.write_text(snippet)
    found = plan(load_sweep(path).ablation if is_sweep(str(path)) else load_study(path))
    assert len(found.arms) > 1
    assert not [finding for finding in found.findings if finding.kind in ("refused", "no_op", "confound")]


@pytest.mark.parametrize("snippet", snippets("python"))
def test_code_on_the_pages_stands_in_the_library(snippet: str) -> None:
    """An excerpt word for word; what a user would write, by its imports, and the names and keywords that it uses."""
    compile(snippet, "snippet", "exec")
    tree = ast.parse(snippet)
    if not any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.walk(tree)):
        assert snippet.strip() in CODE
        return
    assert list(Names().problems(tree)) == []


class Names:
    """Follows a snippet from top to bottom: what each name stands for, by imports and annotations, without running it.

    A value whose type is not known (a tensor's, a data frame's) is not followed further.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = dict(vars(builtins))
        self.types: dict[str, Any] = {}

    def problems(self, tree: ast.Module) -> Iterator[str]:
        for statement in tree.body:
            yield from self._statement(statement)

    def _statement(self, node: ast.stmt) -> Iterator[str]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = importlib.import_module(alias.name)
                name = alias.asname or alias.name.partition(".")[0]
                self.values[name] = module if alias.asname else importlib.import_module(name)
            return
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    yield f"{node.module} has no {alias.name}"
                self.values[alias.asname or alias.name] = getattr(module, alias.name, None)
            return
        if isinstance(node, ast.For):
            yield from self._expression(node.iter)
            self._bind(node.target, element(self._type(node.iter)))
            for inner in node.body:
                yield from self._statement(inner)
            return
        if isinstance(node, ast.If):
            yield from self._expression(node.test)
            for inner in (*node.body, *node.orelse):
                yield from self._statement(inner)
            return
        yield from self._expression(node)
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind(target, self._type(node.value))

    def _bind(self, target: ast.expr, kind: Any) -> None:
        names = [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]
        for index, name in enumerate(names):
            parts = typing.get_args(kind) if isinstance(target, ast.Tuple) else ()
            self.types[name] = parts[index] if index < len(parts) else None if parts else kind

    def _expression(self, tree: ast.AST) -> Iterator[str]:
        bound = {n.id for c in ast.walk(tree) if isinstance(c, ast.comprehension) for n in ast.walk(c.target)
                 if isinstance(n, ast.Name)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                if node.id not in self.values and node.id not in self.types and node.id not in bound:
                    yield f"{node.id} is not defined"
            elif isinstance(node, ast.Attribute):
                owner, value = self._type(node.value), self._value(node.value)
                if value is not None and not hasattr(value, node.attr):
                    yield f"{ast.unparse(node.value)} has no {node.attr}"
                elif value is None and isinstance(owner, type) and not has(owner, node.attr):
                    yield f"{owner.__name__} has no {node.attr}"
            elif isinstance(node, ast.Call) and (function := self._value(node.func) or self._method(node.func)):
                given = {keyword.arg for keyword in node.keywords if keyword.arg}
                known = parameters(function)
                if known is not None and given - known:
                    yield f"{ast.unparse(node.func)} takes no {', '.join(sorted(given - known))}"

    def _value(self, node: ast.expr) -> Any:
        """What an imported name, or an attribute of one, is."""
        if isinstance(node, ast.Name):
            return None if node.id in self.types else self.values.get(node.id)
        if isinstance(node, ast.Attribute):
            return getattr(self._value(node.value), node.attr, None)
        return None

    def _method(self, node: ast.expr) -> Any:
        owner = self._type(node.value) if isinstance(node, ast.Attribute) else None
        return getattr(owner, node.attr, None) if isinstance(owner, type) and isinstance(node, ast.Attribute) else None

    def _type(self, node: ast.expr) -> Any:
        """The type of an expression by annotations; None where there is none."""
        if isinstance(node, ast.Name):
            return self.types.get(node.id)
        if isinstance(node, ast.Call):
            function = self._value(node.func) or self._method(node.func)
            if inspect.isclass(function):
                return function
            return None if function is None else plain(hints(function).get("return"))
        if isinstance(node, ast.Attribute):
            owner = self._type(node.value)
            member = inspect.getattr_static(owner, node.attr, None) if isinstance(owner, type) else None
            if isinstance(member, property):
                return plain(hints(member.fget).get("return"))
            return plain(hints(owner).get(node.attr)) if isinstance(owner, type) else None
        if isinstance(node, ast.Subscript):
            return element(self._type(node.value))
        return None


def hints(of: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(of)
    except (NameError, TypeError):  # a name that is imported for type checkers alone
        return {}


def plain(kind: Any) -> Any:
    """A type, of an optional one the type itself."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    return parts[0] if type(None) in typing.get_args(kind) and len(parts) == 1 else kind


def element(kind: Any) -> Any:
    """The type of what a sequence holds."""
    return next(iter(typing.get_args(kind)), None)


def parameters(function: Any) -> set[str] | None:
    """Names that a call may give; None where any, or where it is not known."""
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return None if any(one.kind is one.VAR_KEYWORD for one in found.values()) else set(found)


def has(owner: type, name: str) -> bool:
    """Whether instances of a class have an attribute: one of the class, or one that its `__init__` sets."""
    if hasattr(owner, name) or (
        dataclasses.is_dataclass(owner) and name in {f.name for f in dataclasses.fields(owner)}
    ):
        return True
    if name in getattr(owner, "model_fields", ()):
        return True
    return owner.__module__.startswith("lit_llm") is False or f"self.{name}" in inspect.getsource(owner)


def test_the_check_of_names_finds_what_does_not_exist() -> None:
    """Not one of these passes."""
    begin = "from lit_llm.studies.load import load_study\nablation = load_study('a.yaml')\n"
    for line, problem in {
        "print(ablation.arms[0].title)": "Arm has no title",
        "for arm in ablation.arms:\n    print(arm.nmae)": "Arm has no nmae",
        "ablation.arms_of()": "Ablation has no arms_of",
        "load_study('a.yaml', override=[])": "load_study takes no override",
        "print(study)": "study is not defined",
        "from lit_llm.studies.load import load_studies": "lit_llm.studies.load has no load_studies",
    }.items():
        assert list(Names().problems(ast.parse(begin + line))) == [problem]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs both make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    """To a file, and where it names a heading, to a heading of that page."""
    links = re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]+))?\)", FENCED.sub("", page.read_text()))
    assert [link for link, _ in links if not (page.parent / link).exists()] == []
    targets = [(page.parent / link if link else page, anchor) for link, anchor in links if anchor]
    assert [(str(target), anchor) for target, anchor in targets if anchor not in anchors(target)] == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    def files(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for value in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from files(value)

    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == sorted(pages)


def test_every_page_that_code_or_a_message_names_exists() -> None:
    places = [*(ROOT / "lit_llm").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    places += [*(ROOT / "ablations").rglob("*.yaml"), *(ROOT / "sweeps").glob("*.yaml"), ROOT / "Makefile"]
    named = {name for path in places for name in re.findall(r"docs/[\w/-]+\.\w+", path.read_text())}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_command_on_the_pages_has_its_name_and_its_options() -> None:
    """`lit-llm store gc --yes` in a block of the shell or in code within a sentence."""
    text = "\n".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M))
    lines = [*re.findall(r"`lit-llm ([^`]+)`", FENCED.sub("", text)), *re.findall(r"^lit-llm (.+)$", blocks, re.M)]
    assert len(lines) > 60
    wrong = []
    for line in [line for line in lines if not line.startswith("COMMAND")]:
        words = line.partition(" #")[0].replace("[", " ").replace("]", " ").split()
        command: Any = get_command(app)
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            command = command.commands.get(words.pop(0))
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} \
            if command is not None else set()  # fmt: skip
        options = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
        if command is None or {*options} - known - {"--help"}:
            wrong.append(line)
    assert wrong == []


def keys(content: Any) -> Iterator[str]:
    """Every key of plain data, but for those that are names of a study's own: arms, factors, configuration keys."""
    for name, value in content.items() if isinstance(content, dict) else ():
        yield name
        if name not in ("differs", "derived", "fingerprints", "factors", "machine"):
            yield from keys(value)
    for value in content if isinstance(content, list) else ():
        yield from keys(value)


def test_the_page_of_json_names_every_key(tmp_path: Path) -> None:
    """Of a plan, a state, a comparison, a benchmark and an event: a key that is added to one is added to the page."""
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", (ROOT / "docs" / "json.md").read_text()))))
    ablation = load_study(ROOT / "ablations" / "quickstart.yaml")
    found = set(keys(plan(ablation, built=False).as_json()))
    found |= {key for row in status_rows(runs_of(ablation, Store(tmp_path / "store"))) for key in row}
    of_bench = (results.Bench, results.Comparison, results.Measured, results.Quartiles, results.Machine)
    of_noise = (MetricNoise, SignalAndNoise, DecisionAccuracy, ItemComparison, ItemDifference, ItemTest)
    of_studies = (Comparison, Row, PowerPlan, TwoStudies, *of_noise)
    for kind in (*of_studies, *of_bench, results.Ceilings, BenchSettings):
        found |= {field.name for field in dataclasses.fields(kind)}
    search = load_sweep(ROOT / "sweeps" / "quickstart.yaml")
    found |= trial_json(search, Trial("red", 0, {}, "done")).keys() | sweep_json(search, []).keys()
    events = re.findall(r'\.write\(\s*"(\w+)"', (ROOT / "lit_llm/report/progress/json_lines.py").read_text())
    assert {*found, *events} - named == set()


def test_the_gallery_has_every_shipped_study_with_its_question() -> None:
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    shipped = [*(ROOT / "ablations").glob("*.yaml"), *(ROOT / "sweeps").glob("*.yaml")]
    for path in [path for path in shipped if not path.stem.endswith("-paper")]:
        row = next(line for line in gallery.splitlines() if f"](../{path.relative_to(ROOT).as_posix()})" in line)
        assert yaml.safe_load(path.read_text())["question"] in row
    siblings = gallery.partition("\n## The same studies")[2].partition("\n## ")[0]
    for path in shipped:
        if path.stem.endswith("-paper"):
            assert re.search(rf"\b{path.stem.removesuffix('-paper')}\b", siblings), path.stem


def test_there_is_one_version() -> None:
    (declared,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.M)
    printed = CliRunner().invoke(app, ["--version"]).stdout
    assert lit_llm.__version__ == declared == cited
    assert printed == f"lit-llm {declared}\n"


def test_an_attention_resolves_every_key_that_can_be_written() -> None:
    """A key that is left out of the resolved form would be outside a run's identity."""
    assert AttentionConfig.model_fields.keys() <= ResolvedAttention.model_fields.keys()

"""The digest of code changes with what it computes, and with nothing else."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.config.code_digest import digest_of_code
from lit_llm.runs.provenance import CODE, COMPUTES

PACKAGE = Path(__file__).parents[2] / "lit_llm"

SHAPES = "RATIO = 4\n\n\ndef width(d_model: int) -> int:\n    return RATIO * d_model\n"
LAYER = '''
"""A layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from toy.model.shapes import width
from toy.store import Store

if TYPE_CHECKING:
    from toy.report import Table


class Layer:
    """Its module."""

    size: int = 3
    """Rows."""

    def forward(self, x: float) -> float:
        return math.sqrt(width(1) * x)  # the root
'''


@pytest.fixture
def digest(tmp_path: Path) -> Callable[..., str]:
    """digest({old: new}, {path: text}): of a package of two modules, with texts exchanged and files put beside them."""

    def write(exchanged: dict[str, str] | None = None, files: dict[str, str] | None = None) -> str:
        shutil.rmtree(tmp_path / "toy", ignore_errors=True)
        for path, text in {"model/shapes.py": SHAPES, "model/layer.py": LAYER, "store.py": "", **(files or {})}.items():
            for old, new in (exchanged or {}).items():
                text = text.replace(old, new)
            file = tmp_path / "toy" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return digest_of_code(tmp_path / "toy", ["model"])

    return write


@pytest.mark.parametrize(
    "exchanged",
    [
        {"  # the root": ""},
        {"# the root": "# of the width"},
        {'"""A layer."""': '"""A layer\nof two lines."""\n\n# and a comment\n'},
        {'    """Its module."""\n': "", '    """Rows."""\n': ""},
        {"    from toy.report import Table": "    from toy.report import Page\n    from toy.runs import Run"},
        {"math.sqrt(width(1) * x)": "math.sqrt(\n            (width(1) * x)\n        )"},
        {"from toy.model.shapes import width\nfrom toy.store import Store\n":
         "from toy.storage import Store\nfrom toy.model.shapes import width\n"},
    ],
)  # fmt: skip
def test_what_computes_nothing_changes_no_digest(digest: Callable[..., str], exchanged: dict[str, str]) -> None:
    assert digest(exchanged) == digest()


@pytest.mark.parametrize(
    "exchanged",
    [
        {"RATIO = 4": "RATIO = 8"},
        {"RATIO = 4": "RATIO = 4.0"},
        {"sqrt": "cbrt"},
        {"* x": "+ x"},
        {"size: int = 3": "size: int = 2"},
        {"import math": "import cmath as math"},
        {"import Store": "import Shelf as Store"},
        {"(self, x: float)": "(self, x: float = 1.0)"},
        {"(self, x: float)": "(self, *, x: float)"},
        {"    def forward": "    @staticmethod\n    def forward"},
        {"return RATIO": "global RATIO\n    return RATIO"},
        {"from toy.store import Store\n": "Store = 1\nfrom toy.store import Store\n"},
    ],
)
def test_what_computes_otherwise_changes_the_digest(digest: Callable[..., str], exchanged: dict[str, str]) -> None:
    assert digest(exchanged) != digest()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("f()(1)", "f(1)()"),
        ("f(x)(**k)", "f(x, **k)()"),
        ("f(x)(a=1)", "f(x, a=1)()"),
        ("x: (yield) = 3", "x: (yield 3)"),
        ("x = 'a'", "x = b'a'"),
        ("f = 1; from toy.store import f", "from toy.store import f; f = 1"),
        ("from toy.store import f; from toy.model.shapes import width as f",
         "from toy.model.shapes import width as f; from toy.store import f"),
    ],
)  # fmt: skip
def test_programs_of_like_parts_differ(digest: Callable[..., str], one: str, other: str) -> None:
    line = {"RATIO = 4": f"RATIO = 4\ndef g():\n    {one}"}
    assert digest(line) == digest(line) != digest({"RATIO = 4": f"RATIO = 4\ndef g():\n    {other}"})


def test_a_module_moves_without_a_change_of_the_digest(digest: Callable[..., str], tmp_path: Path) -> None:
    whole = digest()
    (tmp_path / "toy" / "model" / "parts").mkdir()
    (tmp_path / "toy" / "model" / "shapes.py").rename(tmp_path / "toy" / "model" / "parts" / "sizes.py")
    layer = tmp_path / "toy" / "model" / "layer.py"
    layer.write_text(layer.read_text().replace("toy.model.shapes", "toy.model.parts.sizes"))
    assert digest_of_code(tmp_path / "toy", ["model"]) == whole
    assert digest_of_code(tmp_path / "toy", ["model/layer.py", "model/parts"]) == whole


def test_a_name_imported_from_other_code_changes_the_digest(digest: Callable[..., str]) -> None:
    beside = {"model/others.py": SHAPES.replace("4", "2")}
    assert digest(None, beside) != digest({"toy.model.shapes": "toy.model.others"}, beside)
    as_modules = {"from toy.model.shapes import width": "from toy.model import shapes", "width(1)": "shapes.width(1)"}
    assert digest({**as_modules, "RATIO = 4": "RATIO = 5"}) != digest(as_modules) != digest()


def test_a_circle_of_imports_has_a_digest(digest: Callable[..., str]) -> None:
    circle = {"RATIO = 4": "from toy.model.layer import Layer\nRATIO = 4"}
    assert digest(circle) == digest(circle) != digest({"RATIO = 4": "from toy.model.layer import Layer\nRATIO = 5"})


def test_a_digest_is_taken_once_from_equal_sources(
    digest: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = digest()
    assert [file.read_text() for file in (tmp_path / "cache").rglob("code/*")] == [first]
    monkeypatch.setattr("lit_llm.config.code_digest.ast.parse", lambda _: pytest.fail("parsed again"))
    assert digest() == first
    monkeypatch.undo()
    assert digest({"RATIO = 4": "RATIO = 5"}) != first


def test_our_own_code_may_be_commented_and_laid_out_anew(tmp_path: Path) -> None:
    copy = shutil.copytree(PACKAGE, tmp_path / "lit_llm", ignore=shutil.ignore_patterns("__pycache__"))
    assert digest_of_code(copy, COMPUTES) == CODE
    for file in copy.rglob("*.py"):
        file.write_text("# anew\n" + ast.unparse(ast.parse(file.read_bytes())))
    assert digest_of_code(copy, COMPUTES) == CODE
    changed = copy / "components" / "norm" / "module.py"
    changed.write_text(changed.read_text().replace("eps", "epsilon"))
    assert digest_of_code(copy, COMPUTES) != CODE


def test_compiled_code_counts_without_its_comments(digest: Callable[..., str]) -> None:
    kernel = "// A sum.\nfloat sum(float a) { return a + 1; }\n"
    with_kernel = digest(files={"model/sum.cpp": kernel})
    assert with_kernel != digest()
    assert with_kernel == digest(files={"model/sum.cpp": "float sum(float a)\n{ return a + 1; }  // the sum\n"})
    assert with_kernel != digest(files={"model/sum.cpp": kernel.replace("1", "2")})
    assert digest(files={"kernel.cpp": kernel}) == digest()

"""What the contract in pyproject.toml calls free of torch is so indirectly, too."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOADED = """
import importlib, sys
for name in sys.argv[2:]:
    importlib.import_module(name)
    loaded = [heavy for heavy in sys.argv[1].split(",") if heavy in sys.modules]
    if loaded:
        sys.exit(f"{name} loads {', '.join(loaded)}")
"""


def modules(pattern: str) -> list[str]:
    """The modules that an entry of a contract means: itself and all below it; `*` is any one name."""
    places = ROOT.glob(pattern.replace(".", "/")), ROOT.glob(pattern.replace(".", "/") + ".py")
    files = [
        file for place in places for found in place for file in ([found] if found.is_file() else found.rglob("*.py"))
    ]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in sorted(files)]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def test_no_module_of_the_contract_loads_torch() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [each for each in contracts if each["type"] == "forbidden"]
    names = {pattern: modules(pattern) for pattern in contract["source_modules"]}
    assert all(names.values()), "a module of the contract is gone"
    every = [name for found in names.values() for name in found]
    command = [sys.executable, "-c", LOADED, ",".join(contract["forbidden_modules"]), *every]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr

"""Which tasks lm-evaluation-harness has, by name: looked up before anything is trained. Loads no torch.

The harness reads all of its 14,000 files of YAML to know its names, which takes some seconds. Most names stand in a
line of their own (`task: boolq`), which is found in a fraction of one; the harness is asked for the others.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from lit_llm.config.problems import InputError, Problem
from lit_llm.evaluation.config import TasksConfig
from lit_llm.evaluation.suites import SUITES

NOT_INSTALLED = "needs lm-evaluation-harness: pip install 'lit-llm[eval]'"
_NAME = re.compile(r"^(?:task|group|tag):[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)


def check_names(config: TasksConfig, tell: Callable[[str], None] = lambda _: None) -> None:
    """Raise InputError for the names that neither a suite nor the folder nor the harness has, and for a harness that is
    not installed; at the keys of the section (`names.0`).

    tell: told what is done where it takes some seconds.
    """
    package = find_spec("lm_eval")
    if package is None or package.origin is None:
        raise InputError(Problem(NOT_INSTALLED, "names"))
    asked_of(config.names, config.shots)
    written_in = {name: place for place, wanted in enumerate(config.names) for name in SUITES.get(wanted, [wanted])}
    own = _spelled(Path(config.folder)) if config.folder else frozenset()
    missing = [name for name in written_in if name not in own]
    if missing:
        spelled = _spelled_by_the_harness(Path(package.origin).parent / "tasks")
        missing = [name for name in missing if name not in spelled]
    if not missing:
        return
    tell(f"looking for {', '.join(missing)} in lm-evaluation-harness, which takes some seconds ...")
    known = _indexed(config.folder)
    if wrong := [Problem(no_task(name, known), f"names.{written_in[name]}") for name in missing if name not in known]:
        raise InputError(*wrong)


def asked_of(tasks: Sequence[str], shots: int | Mapping[str, int] | None) -> dict[str, int | None]:
    """Shots by name, suites taken apart; None where the task's own are meant. Raises InputError at `shots`."""
    asked: dict[str, int | None] = {}
    for name in tasks:
        asked |= dict(SUITES.get(name, {name: None}))
    if isinstance(shots, int):
        return dict.fromkeys(asked, shots)
    if wrong := [name for name in shots or {} if name not in asked]:
        raise InputError(Problem(f"{wrong[0]!r} is not among the tasks{_near(wrong[0], asked)}", "shots"))
    return asked | dict(shots or {})


def no_task(name: str, known: Iterable[str]) -> str:
    """What is said of a name that is none of the harness's `known` ones."""
    return f"{name!r} is no task{_near(name, [*known, *SUITES]) or '; `lm-eval ls tasks` lists them'}"


def _near(name: str, options: Iterable[str]) -> str:
    """The harness has 14,000 names: too many to list them."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" - did you mean {near[0]!r}?" if near else ""


def _spelled(folder: Path) -> frozenset[str]:
    """Names that stand in a line of their own in the task files of a folder."""
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("*.yaml"))
    return frozenset(name for text in texts for name in _NAME.findall(text))


_spelled_by_the_harness = cache(_spelled)


@cache
def _indexed(folder: str | None) -> frozenset[str]:
    """All that the harness knows, with the task files of a folder."""
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager(include_path=folder).all_tasks)

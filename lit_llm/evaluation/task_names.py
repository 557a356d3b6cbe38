"""Task names of lm-evaluation-harness, checked before anything is trained. Loads no torch.

The harness parses its 14,000 YAML files to list its task names, which takes some seconds. Most names stand alone in a
line (`task: boolq`), which a search of the files finds in a fraction of a second; the harness is asked for the others.
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


def check_names(config: TasksConfig, log: Callable[[str], None] = lambda _: None) -> None:
    """Raise InputError, at the keys of the section (`names.0`), for unknown tasks or if the harness is not installed.

    Known are the names of suites, of the task files in the section's folder, and of the harness.
    log: called with a message before a search that takes some seconds.
    """
    package = find_spec("lm_eval")
    if package is None or package.origin is None:
        raise InputError(Problem(NOT_INSTALLED, "names"))
    shots_by_task(config.names, config.shots)
    written_in = {name: place for place, wanted in enumerate(config.names) for name in SUITES.get(wanted, [wanted])}
    in_folder = _spelled(Path(config.folder)) if config.folder else frozenset()
    missing = [name for name in written_in if name not in in_folder]
    if missing:
        spelled = _spelled_by_the_harness(Path(package.origin).parent / "tasks")
        missing = [name for name in missing if name not in spelled]
    if not missing:
        return
    log(f"looking for {', '.join(missing)} in lm-evaluation-harness, which takes some seconds ...")
    indexed = _indexed(config.folder)
    if wrong := [
        Problem(no_task(name, indexed), f"names.{written_in[name]}") for name in missing if name not in indexed
    ]:
        raise InputError(*wrong)


def shots_by_task(tasks: Sequence[str], shots: int | Mapping[str, int] | None) -> dict[str, int | None]:
    """{task: shots} with suites expanded; None stands for the task's default. Raises InputError at `shots`."""
    shots_of: dict[str, int | None] = {}
    for name in tasks:
        shots_of |= dict(SUITES.get(name, {name: None}))
    if isinstance(shots, int):
        return dict.fromkeys(shots_of, shots)
    if wrong := [name for name in shots or {} if name not in shots_of]:
        raise InputError(Problem(f"{wrong[0]!r} is not among the tasks{_suggestion(wrong[0], shots_of)}", "shots"))
    return shots_of | dict(shots or {})


def no_task(name: str, names: Iterable[str]) -> str:
    """Error message for a name that is not among `names`, those of the harness."""
    return f"{name!r} is no task{_suggestion(name, [*names, *SUITES]) or '; `lm-eval ls tasks` lists them'}"


def _suggestion(name: str, options: Iterable[str]) -> str:
    """Suffix of a message with the nearest name; the harness has 14,000, too many to list them."""
    near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" - did you mean {near[0]!r}?" if near else ""


def _spelled(folder: Path) -> frozenset[str]:
    """Names that stand alone in a line of the task files of a folder."""
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("*.yaml"))
    return frozenset(name for text in texts for name in _NAME.findall(text))


_spelled_by_the_harness = cache(_spelled)


@cache
def _indexed(folder: str | None) -> frozenset[str]:
    """All task names of the harness, together with the task files of a folder."""
    from lm_eval.tasks import TaskManager

    return frozenset(TaskManager(include_path=folder).all_tasks)

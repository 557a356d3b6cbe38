"""The harness's tasks, guarded against documents that they cannot read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_llm.config.problems import InputError, Problem
from lit_llm.evaluation.harness.model import HarnessModel
from lit_llm.evaluation.task_names import no_task


def load_tasks(shots_of: Mapping[str, int | None], include_path: Path | None, seed: int) -> dict[str, Any]:
    """Tasks and groups in the harness's form. shots_of: {task: shots, None for the task's default}."""
    from lm_eval.tasks import TaskManager

    options = {"include_path": str(include_path)} if include_path else {}
    manager = TaskManager(include_defaults=False, **options)
    if not set(shots_of) <= set(manager.all_tasks):
        manager = TaskManager(**options)  # takes some seconds
    wrong = [Problem(no_task(name, manager.all_tasks), "tasks") for name in shots_of if name not in manager.all_tasks]
    if wrong:
        raise InputError(*wrong)
    whole: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}, "group_map": {}}
    problems = []
    for name, shots in shots_of.items():
        try:
            part = manager.load(name)
        except Exception as error:  # of the network, of the Hub, of `datasets`, of the task's own code
            problems.append(_not_loaded(name, error))
            continue
        for task in part["tasks"].values():
            problems += _set_shots(task, shots, seed)
        for key, merged in whole.items():
            merged.update(part[key])
    if problems:
        raise InputError(*problems)
    return whole


def _not_loaded(name: str, error: Exception) -> Problem:
    cause = "its data cannot be reached" if isinstance(error, OSError) else "the harness cannot load it"
    return Problem(f"{name!r}: {cause} ({_reason(error)})", "tasks")


def _set_shots(task: Any, shots: int | None, seed: int) -> list[Problem]:
    task_shots = task.get_config("num_fewshot")
    if shots is None or task_shots == 0:
        shots = task_shots or 0
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=seed)
    pool = len(task.sampler.df) if hasattr(task, "sampler") else 0
    if shots > pool:
        return [Problem(f"{task.task_name!r} has {pool} examples to draw {shots} shots from", "shots")]
    return []


class Guard:
    """Leaves out documents of a task that cannot be read or scored, for which the harness ends in a traceback.

    It replaces the task's methods that read a document.
    """

    def __init__(self, name: str, task: Any, harness: HarnessModel) -> None:
        self.unreadable: dict[int, str] = {}
        """{number of a document in its task: reason why it is left out}."""
        self._name, self._task, self._harness = name, task, harness
        self._failed: Exception | None = None
        """Error raised by the context of the current document."""
        self._number, self._scored, self._built = 0, 0, False
        """Number of the current document, documents scored under this filter, and whether the requests are built."""
        self._original = {
            method: getattr(task, method)
            for method in (
                "build_all_requests",
                "doc_iterator",
                "doc_to_prefix",
                "fewshot_context",
                "construct_requests",
                "process_results",
            )
        }
        for method in self._original:
            setattr(task, method, getattr(self, method))

    def build_all_requests(self, **options: Any) -> None:
        try:
            self._original["build_all_requests"](**options)
        except ValueError:
            if self._task.instances:
                raise
            raise self._no_documents() from None
        self._built = True

    def doc_iterator(self, **options: Any) -> Iterator[tuple[int, Any]]:
        self._scored = 0
        for number, document in self._original["doc_iterator"](**options):
            if number not in self.unreadable:
                self._number, self._failed = number, None
                yield number, document
        if self._built and not self._scored:
            raise self._no_documents()

    def doc_to_prefix(self, document: Any) -> Any:
        return self._try("doc_to_prefix", None, document)

    def fewshot_context(self, *arguments: Any, **options: Any) -> Any:
        return self._try("fewshot_context", "", *arguments, **options)

    def _try(self, method: str, otherwise: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return self._original[method](*arguments, **options)
        except Exception as error:  # of the task's templates, on whatever the document holds
            self._failed = self._failed or error
            return otherwise

    def construct_requests(self, doc: Any, ctx: Any, **options: Any) -> list[Any]:
        number = options["metadata"][1]
        try:
            if self._failed:
                raise self._failed
            made = self._original["construct_requests"](doc=doc, ctx=ctx, **options)
            requests = made if isinstance(made, list) else [made]
            if not requests:
                raise ValueError("it has no choices")
            for request in requests:
                self._harness.check(request)
            self._task.doc_to_target(doc)  # is kept in the row of the question
        except Exception as error:
            self.unreadable[number] = _reason(error)
            return []
        finally:
            self._failed = None
        return requests

    def process_results(self, document: Any, results: Any) -> Any:
        try:
            scores = self._original["process_results"](document, results)
        except Exception as error:
            self.unreadable[self._number] = _reason(error)
            return {}
        self._scored += 1
        return scores

    def _no_documents(self) -> InputError:
        if not self.unreadable:
            return InputError(Problem(f"{self._name!r} has no documents", "tasks"))
        number, reason = min(self.unreadable.items())
        message = f"none of the documents of {self._name!r} can be read, the first ({number}) because: {reason}"
        return InputError(Problem(message, "tasks"))


def _reason(error: Exception) -> str:
    message = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__}: {message}"

"""What a user adds to Lightning's Trainer in runs: callbacks, loggers, plugins, a strategy, a profiler.

They come from Python, by `run_study(..., trainer=TrainerParts(...))`, or from the section `[trainer]` of the user's
settings file; never from a study's file. Each run makes its own objects, in its own process. Loads no torch.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llm.config.problems import InputError, Problem
from lit_llm.config.trainer_settings import FACTORY
from lit_llm.config.user_settings import user_file
from lit_llm.launch.process import Task, pickled_call
from lit_llm.launch.settings import trainer_settings
from lit_llm.runs.part_names import code_digest, factory_of, name_of

if TYPE_CHECKING:
    from lit_llm.training.additions import TrainerAdditions

Part = Any
"""An object that can be pickled; a factory, called without arguments; a factory's name, "package.module:Factory"; or a
mapping of `factory`, its name, and its arguments."""
OBSERVERS = {"DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "RichModelSummary"}
OBSERVERS |= {"RichProgressBar", "TQDMProgressBar"}
"""Names of Lightning's callbacks that do not change the training."""
SILENT = {"loggers", "profiler"}
"""Fields whose parts change no training. They often have keys and addresses as arguments."""


@dataclass(frozen=True)
class TrainerParts:
    """Additions to Lightning's Trainer in every run.

    A callback that may change the training (all but Lightning's own observers), a plugin and a strategy are part of a
    result's provenance: results that differ in them are not compared.
    """

    callbacks: Sequence[Part] = ()
    """Callbacks. Their `on_validation_...` hooks are called around each evaluation of a run, with its metrics in
    `trainer.callback_metrics`."""
    loggers: Sequence[Part] = ()
    """Loggers, which get the lines of metrics.jsonl. One with a `save_dir` that is not given writes beside them."""
    plugins: Sequence[Part] = ()
    """Plugins, such as a precision or an input and output of checkpoints."""
    strategy: Part | None = None
    """Strategy in place of the one that `training.execution` sets."""
    profiler: Part | None = None
    """Profiler. One with a `dirpath` that is not given writes beside metrics.jsonl."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("callbacks", "loggers", "plugins"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                problems.append(
                    Problem(f"is one {type(value).__name__}: give a list of parts, {name}=[...]", f"trainer.{name}")
                )
        if problems:
            raise InputError(*problems)

    def __bool__(self) -> bool:
        return any(self._named())

    def __add__(self, other: TrainerParts) -> TrainerParts:
        """Both; the other's strategy and profiler win."""
        return TrainerParts(
            (*self.callbacks, *other.callbacks),
            (*self.loggers, *other.loggers),
            (*self.plugins, *other.plugins),
            self.strategy if other.strategy is None else other.strategy,
            self.profiler if other.profiler is None else other.profiler,
        )

    def _named(self) -> Iterator[tuple[str, Part]]:
        """(field, part) of each part."""
        for field in fields(self):
            value = getattr(self, field.name)
            for part in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
                if part is not None:
                    yield field.name, part

    def names(self) -> dict[str, list[str]]:
        """{field: names of its parts}, for the provenance; with their arguments where these may change the training."""
        named: dict[str, list[str]] = {}
        for field, part in self._named():
            named.setdefault(field, []).append((factory_of if field in SILENT else name_of)(part))
        return named

    def may_change(self) -> list[str]:
        """Names of the parts that may change the training."""
        changing = [part for part in self.callbacks if _short_name(part) not in OBSERVERS]
        strategy = [] if self.strategy is None else [self.strategy]
        return [name_of(part) for part in (*changing, *self.plugins, *strategy)]

    def check(self) -> None:
        """Import each factory, pickle each object, and read their code anew. Raises InputError with every problem."""
        code_digest.cache_clear()
        problems = [
            Problem(text, f"trainer.{field}") for field, part in self._named() if (text := _problem(field, part))
        ]
        if problems:
            raise InputError(*problems)

    def build(self, folder: Path) -> TrainerAdditions:
        """The objects for one training. folder: where loggers and profilers write."""
        from lit_llm.training.additions import TrainerAdditions

        def made(parts: Sequence[Part]) -> tuple[Any, ...]:
            return tuple(_made(part, folder) for part in parts if part is not None)

        (strategy,) = made([self.strategy]) or (None,)
        (profiler,) = made([self.profiler]) or (None,)
        return TrainerAdditions(
            made(self.callbacks), made(self.loggers), made(self.plugins), strategy, profiler, folder
        )


_given = TrainerParts()


@contextmanager
def given(parts: TrainerParts) -> Iterator[None]:
    """Context in which Python adds these parts to those of the settings, in this process."""
    global _given
    before, _given = _given, parts
    try:
        yield
    finally:
        _given = before


def in_force() -> TrainerParts:
    """The parts of a run that this process computes or looks at. Raises InputError for wrong settings."""
    return of_settings() + _given


def of_settings() -> TrainerParts:
    """The parts of the user's settings file. Raises InputError for wrong settings."""
    file = user_file()
    return _of_settings(file, file.stat().st_mtime_ns) if file.is_file() else TrainerParts()


@lru_cache(maxsize=1)
def _of_settings(file: Path, changed: int) -> TrainerParts:
    """Parts of the user's settings, read again where the file has changed."""
    settings = trainer_settings()
    return TrainerParts(**{field.name: getattr(settings, field.name) for field in fields(TrainerParts)})


def _short_name(part: Part) -> str:
    """Name of the class of one of Lightning's own parts; '' for others."""
    name = factory_of(part)
    return name.rpartition(":")[2] if name.startswith(("lightning.", "pytorch_lightning.")) else ""


def _problem(field: str, part: Part) -> str:
    """Reason why a run could not make a part, or ''."""
    try:
        if isinstance(part, str | Mapping):
            _factory(part)
            if field not in SILENT:
                name_of(part)
        else:
            pickled_call(Task("part", len, (part,)))
            if field not in SILENT and name_of(pickle.loads(pickle.dumps(part))) != name_of(part):
                raise InputError(
                    f"{factory_of(part)} has another content in each process, by which no result could be compared; "
                    'make it in a function of a module, and name that: "package.module:make_it"'
                )
    except InputError as error:
        return str(error)
    except ValueError as error:
        advice = 'define it in a module that can be imported, or name a factory there: "package.module:make_it"'
        shown = part if inspect.isclass(part) or inspect.isroutine(part) else type(part)
        name = getattr(shown, "__qualname__", str(shown))
        return f"{name} cannot be sent to the processes of the runs ({error.__cause__}); {advice}"
    return ""


def _factory(part: str | Mapping[str, Any]) -> Callable[..., Any]:
    """Import a factory by its name. Raises InputError where that fails."""
    name = part if isinstance(part, str) else str(part.get(FACTORY))
    module, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for each in attribute.split("."):
            found = getattr(found, each)
    except Exception as error:  # the user's own code, which may fail in any way
        raise InputError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise InputError(f"{name} is no class or function, but {type(found).__name__}")
    return found


def _made(part: Part, folder: Path) -> Any:
    """The object of a part. Folders that a factory asks for and is not given are those of the run."""
    if isinstance(part, str | Mapping):
        arguments = {} if isinstance(part, str) else {key: value for key, value in part.items() if key != FACTORY}
        part = partial(_factory(part), **arguments)
    if not (isinstance(part, partial) or inspect.isclass(part) or inspect.isroutine(part)):
        return part
    accepted, given = inspect.signature(part).parameters, getattr(part, "keywords", {})
    places = {"save_dir": str(folder), "dirpath": str(folder), "filename": "profile"}
    if _short_name(part) == "ModelCheckpoint":
        places = {}  # it has a folder beside the first logger's files
    return part(**{key: value for key, value in places.items() if key in accepted and key not in given})

"""Checks before training: kernels, and tasks, texts and held-out data that evaluations will need hours later."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from lit_llm.config.problems import InputError, Problem, collect_errors
from lit_llm.config.tree import split_path
from lit_llm.data.record_files import SKIPPED
from lit_llm.evaluation.task_names import check_names
from lit_llm.launch.devices import visible_gpus
from lit_llm.runs.fingerprints import digest_of_examples, digests_of_texts, identity_of_data
from lit_llm.runs.leaks import leaks_of, prepared_examples, same_tokenizer, texts_of
from lit_llm.store.store import Store, read_json
from lit_llm.studies.audit.findings import Finding
from lit_llm.studies.load import Ablation, Arm
from lit_llm.training.kernels import kernel_obstacle


def check_kernels(ablation: Ablation, arms: Collection[str] | None = None) -> None:
    """Raise InputError where a training of these arms, or of all, wants kernels or devices that this machine lacks."""
    problems: list[Problem] = []
    for arm in ablation.arms:
        for stage in arm.experiment.trained if arms is None or arm.name in arms else ():
            execution = arm.experiment.section(stage).training.execution
            gpus = visible_gpus() if execution.accelerator != "cpu" else []
            with collect_errors(problems), _errors_located(arm, f"{stage}.training.execution"):
                if gpus and len(gpus) < execution.devices:
                    raise InputError(Problem(f"{execution.devices}, but this machine has {len(gpus)} GPUs", "devices"))
            with collect_errors(problems), _errors_located(arm, f"{stage}.training.execution"):
                if obstacle := kernel_obstacle(execution.kernels, on_gpu=bool(gpus)):
                    raise InputError(Problem(obstacle, "kernels"))
    if problems:
        raise InputError(*problems)


def check_tasks(ablation: Ablation, log: Callable[[str], None] = lambda _: None) -> None:
    """Raise InputError for tasks that do not exist, and where the harness is not installed.

    log: called with one line about a step that takes some seconds.
    """
    problems: list[Problem] = []
    for arm in ablation.arms:
        if (evaluate := arm.experiment.evaluate) is not None and evaluate.tasks is not None:
            with collect_errors(problems), _errors_located(arm, "evaluate.tasks"):
                check_names(evaluate.tasks, log)
    if problems:
        raise InputError(*problems)


def check_texts(ablation: Ablation) -> None:
    """Raise InputError with every problem of the arms' text files, at the lines that name them."""
    problems: list[Problem] = []
    for arm in ablation.arms:
        try:
            identity_of_data(arm.experiment)
            digest_of_examples(arm.experiment)
            digests_of_texts(arm.experiment)
        except InputError as error:
            for problem in error.problems:
                key = problem.key if problem.key.startswith(_WHOLE_KEYS) else f"pretrain.data.{problem.key}"
                location = arm.keys.location_of(split_path(key.split(":")[0]))
                problems.append(replace(problem, key=key, location=problem.location or location))
    if problems:
        raise InputError(*problems)


_WHOLE_KEYS = ("finetune.", "evaluate.")
"""Beginnings of keys that problems already name in full."""


def check_held_out(ablation: Ablation, store: Store) -> None:
    """Raise InputError for evaluations of longer texts than are held out. Skips texts that are not tokenised yet."""
    from lit_llm.data.prepare import is_prepared, open_prepared

    problems: list[Problem] = []
    for arm in ablation.arms:
        data, evaluate = arm.experiment.pretrain.data, arm.experiment.evaluate
        if evaluate is None or not is_prepared(store.data, digest := identity_of_data(arm.experiment).digest):
            continue
        held_out = {
            source.name: source.count(source.evaluated_split(evaluate.split))
            for source in open_prepared(data, store.data, digest).sources
        }
        with collect_errors(problems), _errors_located(arm, "evaluate"):
            if too_short := evaluate.too_short(data.sequence_length, held_out):
                raise InputError(*(Problem(message, key) for key, message in too_short))
    if problems:
        raise InputError(*problems)


def check_leaks(ablation: Ablation, store: Store) -> None:
    """Raise InputError for documents in both training and evaluation, and for embeddings of another tokenizer.

    Skips texts that are not tokenised yet.
    """
    problems = [
        Problem(f"{arm.name}: {problem.message}", problem.key, arm.keys.location_of(split_path(problem.key)))
        for arm, problem in _leaks(ablation, store)
    ]
    if problems:
        raise InputError(*problems)


def text_findings(ablation: Ablation, store: Store) -> list[Finding]:
    """Findings from tokenised texts: leaks, documents left out (near-duplicates, unreadable ones), lost bytes."""
    findings = [Finding("refused", arm.name, problem.key, problem.message) for arm, problem in _leaks(ablation, store)]
    seen: set[str] = set()
    for arm in ablation.arms:
        findings += _untrained_tokenizers(arm, store)
        of_examples = digest_of_examples(arm.experiment)
        if of_examples not in seen and (examples := prepared_examples(arm.experiment, store)) is not None:
            seen.add(of_examples)
            findings += _left_out(arm, "finetune.data.examples", examples.skipped)
        digest = identity_of_data(arm.experiment).digest
        if digest in seen:
            continue
        seen.add(digest)
        if lost := sum(_counted(arm, store, digest, "lost_bytes").values()):
            whole = sum(_counted(arm, store, digest, "bytes").values())
            message = (
                f"drops or does not know {lost:,} of the text's {whole:,} bytes ({lost / whole:.2%}), so there are "
            )
            findings.append(Finding("note", arm.name, "pretrain.data.tokenizer", message + "no bits per byte"))
        findings += _left_out(arm, "pretrain.data.corpus", _counted(arm, store, digest, "skipped"))
        counts = _counted(arm, store, digest, "near_duplicates")
        if any(counts.values()):
            listed = " and ".join(f"{count} {split}" for split, count in counts.items() if count)
            message = f"{listed} documents are left out: near-duplicates of documents that another split holds out"
            findings.append(Finding("note", arm.name, "pretrain.data.near_duplicates", message))
    return findings


def _left_out(arm: Arm, key: str, skipped: Mapping[str, int]) -> Iterator[Finding]:
    for what, count in skipped.items():
        if count:
            yield Finding("note", arm.name, key, f"{count:,} {SKIPPED[what]} are left out")


def _leaks(ablation: Ablation, store: Store) -> Iterator[tuple[Arm, Problem]]:
    """Leaks, each once, with the first arm that has it."""
    seen = set()
    for arm in ablation.arms:
        if (texts := texts_of(arm.experiment)) not in seen:
            seen.add(texts)
            for problem in leaks_of(arm.experiment, store):
                yield arm, problem


def _untrained_tokenizers(arm: Arm, store: Store) -> Iterator[Finding]:
    for given in (arm.experiment.adapt.experiments if arm.experiment.adapt else {}).values():
        if same_tokenizer(arm.experiment, given.seeded(arm.experiment.seed), store) is None:
            message = "its source's tokenizer is to be trained on other text: the run is refused if it becomes another"
            yield Finding("note", arm.name, "adapt.from", message)


def _counted(arm: Arm, store: Store, digest: str, key: str) -> dict[str, int]:
    """Counts of a tokenised text under `key`, by split or by kind; empty where it is not tokenised yet."""
    from lit_llm.data.prepare import is_prepared, open_prepared

    if not is_prepared(store.data, digest):
        return {}
    total: dict[str, int] = {}
    for source in open_prepared(arm.experiment.pretrain.data, store.data, digest).sources:
        for split, count in (read_json(source.folder / "meta.json") or {}).get(key, {}).items():
            total[split] = total.get(split, 0) + count
    return total


@contextmanager
def _errors_located(arm: Arm, section: str) -> Iterator[None]:
    """Context that adds the section, file and line to the keys of an InputError."""
    try:
        yield
    except InputError as error:
        keys = [f"{section}.{problem.key}" for problem in error.problems]
        marks = [arm.keys.location_of(split_path(key)) for key in keys]
        located = zip(error.problems, keys, marks, strict=True)
        raise InputError(*(Problem(problem.message, key, location) for problem, key, location in located)) from None

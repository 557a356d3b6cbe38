"""Check of the free disk space before a study runs. Loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from lit_llm.config.problems import InputError, Problem
from lit_llm.data.sources import open_sources
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import Trained
from lit_llm.models.resolve import resolve_model
from lit_llm.runs.fingerprints import digest_of_data
from lit_llm.store.disk import free_bytes
from lit_llm.store.store import Stage, Store
from lit_llm.training.memory import checkpoint_bytes, weights_bytes

BYTES_OF_TEXT = 8
"""Bytes of text per token: more than any tokenizer has on average."""


def check_free_space(
    store: Store,
    stages: Iterable[tuple[Experiment, Trained, Stage]],
    max_parallel: int,
    trunks: Collection[str] = (),
) -> None:
    """Raise InputError, with the numbers, where the disk is clearly too small for the stages without a result.

    It counts a lower bound: the weights of these stages, the checkpoints of the largest `max_parallel` of them, and
    the tokens of texts that are not tokenised yet.

    Args:
        stages: stages that train, as (experiment, section, place in the store).
        trunks: fingerprints of those that keep their last checkpoint.
    """
    todo = {stage.fingerprint: (one, after, stage) for one, after, stage in stages if stage.result() is None}
    weights, checkpoints, sizes = 0.0, list[float](), dict[str, tuple[float, float, int]]()
    for experiment, after, stage in todo.values():
        training = experiment.section(after).training
        key = f"{experiment.model.model_dump_json()} {training.model_dump_json()}"
        if key not in sizes:
            model = resolve_model(experiment.model)
            # The last and the one before are kept until the next is whole.
            written = min(3, (training.max_steps - 1) // training.execution.checkpoint_every)
            sizes[key] = weights_bytes(model), checkpoint_bytes(model, training), written
        kept = [stage.checkpoints / name for name in ("last.ckpt", "previous.ckpt")]
        of_weights, of_checkpoint, count = sizes[key]
        weights += of_weights + of_checkpoint * (stage.fingerprint in trunks)
        on_disk = sum(file.stat().st_size for file in kept if file.exists())
        checkpoints.append(max(0.0, count * of_checkpoint - on_disk))
    running = sum(sorted(checkpoints, reverse=True)[:max_parallel])
    texts = _bytes_of_tokens({digest_of_data(one): one for one, *_ in todo.values()}, store.data)
    needed, free = weights + running + texts, free_bytes(store.root)
    if needed > free:
        message = (
            f"{store.root} has {_size(free)} free, and at least {_size(needed)} are needed: {_size(weights)} for the "
            f"weights of {len(todo)} stage{'s' if len(todo) > 1 else ''}, {_size(running)} for checkpoints of up to "
            f"{max_parallel} at once, {_size(texts)} for tokenised text; `lit-llm store gc` removes what "
            "no study needs, or give another --store"
        )
        raise InputError(Problem(message, "--store"))


def _bytes_of_tokens(experiments: dict[str, Experiment], folder: Path) -> float:
    """Bytes that the texts without tokens will take once tokenised."""
    from lit_llm.data.prepare import is_prepared

    return sum(
        sum(source.size for source in open_sources(experiment.pretrain.data.corpus).values()) / BYTES_OF_TEXT * 2
        for digest, experiment in experiments.items()
        if not is_prepared(folder, digest)
    )


def _size(count: float) -> str:
    unit = next(unit for unit in ("GB", "MB", "kB") if count >= {"GB": 1e9, "MB": 1e6, "kB": 0}[unit])
    return f"{count / {'GB': 1e9, 'MB': 1e6, 'kB': 1e3}[unit]:.3g} {unit}"

"""Warm start of an adapted pretraining: weights of its sources, and the position in the text where they stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from lit_llm.config.problems import InputError, Problem
from lit_llm.experiment.schema import Checkpoint, Experiment
from lit_llm.huggingface.checkpoint import digest_of_checkpoint, open_checkpoint
from lit_llm.models.adapt import Side, adapted
from lit_llm.models.build import build_model
from lit_llm.models.families import DecoderOnly, LanguageModel
from lit_llm.runs.provenance import weights_digest
from lit_llm.runs.stage_config import StageConfig
from lit_llm.runs.trained_model import open_finished
from lit_llm.store.store import Store
from lit_llm.training.module import WarmStart

if TYPE_CHECKING:
    from torch import Tensor


def load_source_weights(model: LanguageModel, frozen: StageConfig, store: Store) -> tuple[WarmStart | None, str | None]:
    """Give a new model the weights of its experiment's sources. Returns (warm start for training, digest of weights).

    (None, None) without an adaptation. Raises InputError for a source that is not finished, or a checkpoint that has
    changed since the configuration was read.
    """
    experiment, adapt = frozen.experiment, frozen.experiment.adapt
    if adapt is None:
        return None, None
    source_models: dict[str, LanguageModel] = {}
    digests: dict[str, str | None] = {}
    for side in (*adapt.experiments, *adapt.sides):
        name, given = frozen.origins[side], adapt.sides[side]
        if name not in source_models:
            if isinstance(given, Checkpoint):
                source_models[name] = _checkpoint(given)
            else:
                finished = open_finished(store, name)
                source_models[name], digests[name] = finished.model, finished.weights
    states: dict[Side, dict[str, Tensor]] = {
        side: source_models[frozen.origins[side]].state_dict() for side in adapt.sides
    }
    adaptation = experiment.adaptation
    model.load_state_dict(adapted(adaptation, states), strict=False)
    teacher = cast(DecoderOnly, source_models[frozen.origins["decoder"]]) if adapt.distill else None
    if teacher is not None:
        teacher.eval().requires_grad_(False)
    warm_start = WarmStart(frozenset(adaptation.newly_initialised), adapt.warmup_steps, teacher, adapt.distill)
    return warm_start, weights_digest(list(digests.values()))


def _checkpoint(given: Checkpoint) -> LanguageModel:
    folder = Path(given.checkpoint)
    if digest_of_checkpoint(folder) != given.digest:
        raise InputError(Problem(f"{folder} is not what it was when this run was planned", "adapt.from"))
    config, state = open_checkpoint(folder)
    model = build_model(config)
    model.load_state_dict(state)
    return model


def windows_before(experiment: Experiment) -> int:
    """Windows of the same text that the sources have read, where an adapted model goes on.

    A run from scratch with the steps of both then reads the same windows. With two sources the larger number counts.
    Sources with another text, or other windows, count zero.
    """
    data, before = experiment.pretrain.data, 0
    for source in (experiment.adapt.experiments if experiment.adapt else {}).values():
        given = source.pretrain.data
        same = ("corpus", "tokenizer", "validation_fraction", "test_fraction", "near_duplicates", "sequence_length")
        if all(getattr(given, key) == getattr(data, key) for key in same):
            read = source.pretrain.sequences(source.pretrain.training.max_steps)
            before = max(before, read + windows_before(source.seeded(experiment.seed)))
    return before

"""Checker that compares what arms compute, each built small, with the same input and the same parameters.

One map for all arms of a study shrinks widths and drops repeated layers. It keeps order and equality, so arms that
differ still differ when small. Norms, positions and masks stay as they are. In float64 two ways to compute one function
differ by 1e-15, and the smallest intended difference, another eps under a norm, by 1e-7.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llm.data.batches import WindowCollator
from lit_llm.models.build import bare_model, generator, initialise
from lit_llm.models.families import LanguageModel
from lit_llm.models.layer import Layer
from lit_llm.models.resolve import resolve_model
from lit_llm.models.resolved import ResolvedModel
from lit_llm.objectives.base import EOD, Lengths
from lit_llm.objectives.collate import Batch
from lit_llm.objectives.config import Objective, PrefixLM
from lit_llm.studies.load import Arm

SHORT, LONGEST = 32, 2048
"""Tokens of the first windows, and at most of the second ones, which confirm equal nats. The finding says where the
arms' own windows are longer."""
WIDTHS = {"d_model": 8, "vocabulary": 16, "d_ff": 8, "head_dim": 4, "value_dim": 4}
"""{size to shrink: its smallest value}: below 4 a head has one frequency or none."""
HEADS = ("heads", "kv_heads", "groups")
"""Counts that are divided by one number, so that groups stay; none above 1 becomes 1."""
CLOSE = 1e-9
"""Relative difference below which two numbers count as equal."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch with one thread, for products too small to share among cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class EquivalenceChecker:
    """The arms of a study, each built small when needed; arms with equal networks share one."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        full = [resolve_model(arm.experiment.model) for arm in arms]
        leasts = WIDTHS | {"vocabulary": WIDTHS["vocabulary"] + max(map(_extra_ids, arms))}
        for part in (part for model in full for part in model.parts):
            leasts |= {key: max(least, leasts.get(key, 0)) for key, least in part.smallest.items()}
        widths = {key: _small(sorted(set(_sizes(full, key))), least) for key, least in leasts.items()}
        each = math.gcd(*(count for key in HEADS for count in _sizes(full, key)))
        few = min(count for key in HEADS for count in _sizes(full, key))
        share = max(part for part in range(1, each + 1) if each % part == 0 and (part == 1 or few // part > 1))
        widths |= {key: {count: count // share for count in _sizes(full, key)} for key in HEADS}
        depths = _small(sorted({len(run) for model in full for run in _all_runs(model)}), 1)
        self._small = {arm.name: _shrunk(model, widths, depths) for arm, model in zip(arms, full, strict=True)}
        self._text = min(self._small[arm.name].vocabulary - _extra_ids(arm) for arm in arms)
        """Number of ids of the common text; the ids of each arm's objective follow them."""
        self._built: dict[ResolvedModel, LanguageModel] = {}
        alike: dict[Any, Arm] = {}
        self._first = {arm.name: alike.setdefault(self._computes(arm), arm) for arm in arms}
        """{arm: first arm with the same small network and batches}, which is computed for all of them."""
        self._lengths = {arm.name: _lengths(arm) for arm in alike.values()}
        self._nats: dict[tuple[str, int], float] = {}

    def model(self, arm: Arm) -> LanguageModel:
        """An arm's network, built small."""
        small = self._small[arm.name]
        if small not in self._built:
            self._built[small] = build_small(small)
        return self._built[small]

    def _computes(self, arm: Arm) -> tuple[Any, ...]:
        """All that decides what the checker computes for an arm."""
        pretrain = arm.experiment.pretrain
        return self._small[arm.name], pretrain.objective, pretrain.masks, pretrain.data.sequence_length

    def same_function(self, one: Arm, other: Arm) -> bool:
        """True where two arms assign the same nats to the same targets, with the same gradients.

        A parameter that only one of them has must have no effect. Both must have windows of one length.
        """
        one, other = self._first[one.name], self._first[other.name]
        if one is other:
            return True
        if self._lengths[one.name] != self._lengths[other.name]:  # few windows of two mixtures may coincide
            return False
        if _training_only(self._small[one.name]) != _training_only(self._small[other.name]):
            return False
        if not all(_close(self.nats(one, k), self.nats(other, k)) for k in range(2)):
            return False
        # A long prefix or attention window differs only on windows of the real length.
        window = min(one.experiment.pretrain.data.sequence_length, LONGEST)
        with one_thread():
            for k in range(2):
                pairs = [(self.model(arm), self.batch(arm, window, 1, k)) for arm in (one, other)]
                with torch.no_grad():
                    nats = [_nats(*pair).item() for pair in pairs]
                if not _close(*nats) or not _equal_gradients(*(_gradients(*pair) for pair in pairs)):
                    return False
        return True

    def nats(self, arm: Arm, k: int) -> float:
        """Nats per target on short batch `k`."""
        if (arm.name, k) not in self._nats:
            with one_thread(), torch.no_grad():
                self._nats[arm.name, k] = _nats(self.model(arm), self.batch(arm, SHORT, 4, k)).item()
        return self._nats[arm.name, k]

    def batch(self, arm: Arm, window: int, rows: int, k: int) -> Batch:
        """Random windows, the same for all arms, collated as in this arm's training."""
        pretrain = arm.experiment.pretrain
        objective = _for_window(pretrain.objective, pretrain.data.sequence_length, window)
        if objective.problem(window):  # too short for it
            window, objective = pretrain.data.sequence_length, pretrain.objective
        random = np.random.default_rng(k)
        tokens_BT = random.integers(2, self._text, size=(rows, window))
        # Documents end in every other row: these rows show intra-document masks, the others long windows.
        ends_BT = random.random((rows, window)) < 1 / 8
        ends_BT[(np.arange(rows) + k) % 2 == 0] = False
        tokens_BT[ends_BT] = EOD
        collator = WindowCollator(objective, arm.experiment.model.family, pretrain.masks, self._text)
        return collator.batch(tokens_BT, k * rows)


def build_small(small: ResolvedModel) -> LanguageModel:
    """A model in float64 with noise on every parameter, as a scale of one would hide a difference."""
    with torch.random.fork_rng(devices=[]):  # the meta device would cost a second for the first model
        model = bare_model(small).double().eval()
    initialise(model, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            moved = torch.empty_like(parameter).normal_(0.0, 0.25, generator=generator(0, f"{name}, moved"))
            parameter.add_(moved)
    return model


def _nats(model: LanguageModel, batch: Batch) -> Tensor:
    """Nats per target, in float64, unlike `target_loss`, which sums in float32."""
    counted = batch.weights.flatten() > 0
    hidden_ND = model.hidden(**batch.inputs).flatten(0, 1)[counted]
    return F.cross_entropy(model.unembedding(hidden_ND), batch.targets.flatten()[counted])


def _gradients(model: LanguageModel, batch: Batch) -> dict[str, Tensor]:
    """{parameter: gradient of the nats}."""
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(_nats(model, batch), list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def _equal_gradients(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """True where two sets of gradients are equal; a parameter that only one of them has needs a zero gradient."""
    largest = max(float(gradient.abs().max()) for gradient in (*gradients.values(), *expected.values()))
    for name in {*gradients, *expected}:
        left, right = gradients.get(name), expected.get(name)
        if left is not None and right is not None and left.shape != right.shape:
            return False
        change = (left if left is not None else 0) - (right if right is not None else 0)
        if float(torch.as_tensor(change).abs().max()) > CLOSE * largest:
            return False
    return True


def _training_only(model: ResolvedModel) -> list[Any]:
    """Settings that act in training alone, and so show in no nats."""
    parts = [part for layer in model.layers for _, part in layer.parts]
    scaling = [model.parametrization, model.output.future_tokens]
    return [*scaling, *(getattr(part, key) for part in parts for key in part.training_only)]


def _close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=CLOSE, abs_tol=CLOSE)


def _lengths(arm: Arm) -> list[tuple[float, Lengths]]:
    length = arm.experiment.pretrain.data.sequence_length
    return arm.experiment.pretrain.objective.lengths(length)


def _extra_ids(arm: Arm) -> int:
    """Largest number of ids that an arm's objective adds to the text, on any window of the check."""
    objective, length = arm.experiment.pretrain.objective, arm.experiment.pretrain.data.sequence_length
    windows = {SHORT, min(length, LONGEST), length if objective.problem(SHORT) else SHORT}
    return max(sum(objective.extra_ids(window).values()) for window in windows)


def _for_window(objective: Objective, length: int, window: int) -> Objective:
    """The objective for a shorter window; a prefix keeps its share."""
    if window == length:
        return objective
    resolved = objective.resolved(length)
    if isinstance(resolved, PrefixLM) and isinstance(resolved.split, int):
        return PrefixLM(split=max(1, min(window - 1, resolved.split * window // length)))
    return resolved


# --- small ---------------------------------------------------------------------------------------------------------


def _small(sizes: Sequence[int], least: int) -> dict[int, int]:
    """{size: a small one}: keeps order, equality and parity, and sizes up to `least`."""
    smaller: dict[int, int] = {}
    last = 0
    for size in sizes:
        wanted = max(last + 1, min(size, least))
        smaller[size] = last = wanted + (size - wanted) % 2
    return smaller


def _sizes(models: Iterable[ResolvedModel], key: str) -> Iterator[int]:
    for model in models:
        if key in type(model).model_fields:
            yield getattr(model, key)
        for layer in model.layers:
            yield from (getattr(part, key) for _, part in layer.parts if hasattr(part, key))


def _runs(layers: Iterable[Layer]) -> list[list[Layer]]:
    """Equal layers that follow each other."""
    return [list(run) for _, run in itertools.groupby(layers)]


def _all_runs(model: ResolvedModel) -> list[list[Layer]]:
    return [run for stack in _stack_runs(model) for run in stack]


def _stack_runs(model: ResolvedModel) -> tuple[list[list[Layer]], list[list[Layer]]]:
    """Runs of equal layers of the encoder and of the decoder; of pairs of layers, where the stacks are tied."""
    if not model.tie_layers:
        return _runs(model.encoder), _runs(model.decoder)
    pairs = [list(run) for _, run in itertools.groupby(zip(model.encoder, model.decoder, strict=True))]
    encoder, decoder = ([[pair[side] for pair in run] for run in pairs] for side in (0, 1))
    return encoder, decoder


def _shrunk(model: ResolvedModel, widths: dict[str, dict[int, int]], depths: dict[int, int]) -> ResolvedModel:
    def sized(section: Any) -> Any:
        update = {key: small[getattr(section, key)] for key, small in widths.items() if hasattr(section, key)}
        return section.model_copy(update=update)

    @cache
    def layer(full: Layer) -> Layer:
        return Layer(parts=tuple((name, sized(part)) for name, part in full.parts))

    def stack(runs: list[list[Layer]]) -> tuple[Layer, ...]:
        return tuple(layer(run[0]) for run in runs for _ in range(depths[len(run)]))

    encoder, decoder = (stack(runs) for runs in _stack_runs(model))
    update: dict[str, Any] = {"encoder": encoder, "decoder": decoder}
    if rows := model.embedding.max_positions:
        # Rows that no text reads change nothing, and the checked windows may be longer than the arms' own.
        update["embedding"] = model.embedding.model_copy(update={"max_positions": max(rows, 2 * LONGEST)})
    return sized(model).model_copy(update=update)

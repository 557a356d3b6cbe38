"""Settings without effect: a clip that never clips, a z-loss below the last bit of a float32 loss.

Different configurations may train alike, and small networks do not show it all: training settings act only in
training. The thresholds here are arithmetic. Values beyond them change nothing that float32 keeps, or nothing that a
training meets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from math import ceil
from typing import Any

from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.config.problems import some
from lit_llm.config.tree import leaves, under
from lit_llm.experiment.schema import Experiment
from lit_llm.experiment.training_sections import FinetuneConfig, PretrainConfig
from lit_llm.models.resolve import resolve_model
from lit_llm.models.resolved import ResolvedModel
from lit_llm.studies.audit.findings import Finding, differs
from lit_llm.studies.load import Ablation, Arm
from lit_llm.training.averaging import ExponentialAverage
from lit_llm.training.config import TrainingConfig
from lit_llm.training.optimizers.config import GroupFactors, Optimizer
from lit_llm.training.optimizers.multipliers import decays, effective_factors
from lit_llm.training.schedules import Schedule

ROUNDING = 2.0**-25
"""Half of the distance from 1 to the float32 below it: a smaller change of a number is rounded away."""
NEVER_CLIPS = 1000.0
"""Gradient norm that no training comes near: that of a mean loss per token is a few units at first, and a run whose
norm stays above 100 has diverged."""
LOG_NORMALISER = 10.0
"""The z-loss is z times the square of the log-normaliser, whose gradient is 2 z times it: about ln(22,000)."""
FAR_SOFTCAP = 1e4
"""Softcap that bends no score: it moves 100, more than trained attention reaches, by 0.003%."""
_POINTS = 512
"""Largest number of steps at which two schedules, or two averages of the weights, are compared."""


def no_effect(ablation: Ablation) -> Iterator[Finding]:
    """No-op arms, which differ from another arm only in settings without effect, and notes on these settings.

    Arms with differences in their networks are compared by `probe`, which builds them.
    """
    reasons = {arm.name: dict(_reasons(arm.experiment)) for arm in ablation.arms}
    rules = {tuple(_rules(stage.training) for _, stage in _stages(arm.experiment)) for arm in ablation.arms}
    if len(rules) == 1 and not any(reasons.values()):
        return  # the usual case, in studies of any size
    alike: dict[str, list[Arm]] = {}
    for arm in ablation.arms:
        alike.setdefault(_effective(arm), []).append(arm)
    for group in alike.values():
        for number, arm in enumerate(group):
            # The baseline, or the first arm of the same comparison; with other baselines each may be needed.
            others = [other for other in group if other is not arm and other.name == arm.baseline]
            others += [other for other in group[:number] if other.baseline == arm.baseline]
            keys = _differing(arm, others[0]) if others else []
            if keys:
                said = {**reasons[others[0].name], **reasons[arm.name]}
                why = [f"{key} {said[key]}" for key in keys if key in said]
                addresses = [f"{section}.schedule" for section, _ in _stages(arm.experiment)]
                if any(under(key, *addresses) for key in keys):
                    why.append("the learning rate is the same in every step")
                why = why or ["they are the same in effect"]
                message = f"trains as {others[0].name} does, in spite of {some(keys)}: {'; '.join(why)}"
                yield Finding("no_op", arm.name, "", message)
            for key, reason in reasons[arm.name].items():
                if key not in keys:
                    yield Finding("note", arm.name, key, reason)


def _effective(arm: Arm) -> str:
    """The configuration as JSON, with equal values for all without effect, and rules as the numbers that they give.

    The model is resolved, as one key may repeat a default or cancel another.
    """
    values = {key: value for key, value in leaves(arm.flat) if not under(key, "model")}
    model = resolve_model(arm.experiment.model)
    for key in _ineffective_keys(arm.experiment):
        values[key] = None
    for section, stage in _stages(arm.experiment):
        values = {key: value for key, value in values.items() if not under(key, f"{section}.execution")}
        numbers = _numbers(section, stage.training, model)
        values = {key: value for key, value in values.items() if not under(key, *numbers)} | numbers
    values = {key: value for key, value in values.items() if value or key.split(".")[-1] not in _OFF}
    network = {**model.model_dump(mode="json"), "output": model.output.model_dump(mode="json")}
    return json.dumps({**values, "model": _without_far_softcaps(network)}, sort_keys=True)


_DROPOUTS = ("dropout", "attention_dropout", "feed_forward_dropout")
_OFF = ("clip_norm", "z_loss", "weight_decay", *_DROPOUTS)
"""Settings of a training for which an absent key, a null and a zero are one."""


def _without_far_softcaps(part: Any) -> Any:
    """A resolved model as plain data, without softcaps that have no effect."""
    if isinstance(part, list):
        return [_without_far_softcaps(each) for each in part]
    if not isinstance(part, dict):
        return part
    return {
        key: _without_far_softcaps(value)
        for key, value in part.items()
        if key != "softcap" or (value is not None and value < FAR_SOFTCAP)
    }


def _ineffective_keys(experiment: Experiment) -> Iterator[str]:
    """Keys of the training whose values have no effect."""
    for section, stage in _stages(experiment):
        yield from (key for key, _ in _ineffective_training(section, stage.training))


def _stages(experiment: Experiment) -> Iterator[tuple[str, PretrainConfig | FinetuneConfig]]:
    """(address of its training, stage) of each stage that trains."""
    yield "pretrain.training", experiment.pretrain
    if experiment.finetune is not None:
        yield "finetune.training", experiment.finetune


def _rules(training: TrainingConfig) -> tuple[Any, ...]:
    """Settings of which different values may give the same numbers in every step."""
    factors = (frozenset(getattr(training.optimizer, key).items()) for key in GroupFactors.model_fields)
    return training.schedule, training.weight_averaging, *factors


def _numbers(section: str, training: TrainingConfig, model: ResolvedModel) -> dict[str, Any]:
    """{key: numbers that the rules under it give}."""
    numbers: dict[str, Any] = {f"{section}.schedule": _factors(training.schedule, training.max_steps)}
    # The weights that `last_k` takes differ in all its settings, and lie between the steps compared here.
    if isinstance(training.weight_averaging, ExponentialAverage):
        numbers[f"{section}.weight_averaging"] = _shares(training.weight_averaging, training.max_steps)
    for key, factors in effective_factors(model, training.optimizer).items():
        numbers[f"{section}.optimizer.{key}"] = factors
    return numbers


@lru_cache(maxsize=4096)
def _factors(schedule: Schedule, max_steps: int) -> tuple[float, ...]:
    """Factors of the peak learning rate, at evenly spread steps."""
    return tuple(round(schedule.factor(step, max_steps), 9) for step in _spread(max_steps))


@lru_cache(maxsize=4096)
def _shares(averaging: ExponentialAverage, max_steps: int) -> tuple[float, ...]:
    """Shares of the weights in their average, after evenly spread steps."""
    return tuple(averaging.share(step + 1, max_steps) for step in _spread(max_steps))


def _spread(max_steps: int) -> list[int]:
    """The first steps, evenly spread ones and the last."""
    steps = {*range(min(max_steps, _POINTS // 2)), *range(0, max_steps, max(1, max_steps // _POINTS)), max_steps - 1}
    return sorted(steps)


def _differing(arm: Arm, twin: Arm) -> list[str]:
    """Keys in which two arms differ, without those of their execution."""
    machine = [f"{section}.execution" for section, _ in _stages(arm.experiment)]
    return [key for key in differs(arm, twin) if not under(key, *machine)]


def _reasons(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """(key, why it has no effect)."""
    for section, stage in _stages(experiment):
        yield from _ineffective_training(section, stage.training)
        yield from _ineffective_groups(f"{section}.optimizer", stage.training.optimizer, experiment)
    yield from _ineffective_attention(experiment)


def _ineffective_training(key: str, training: TrainingConfig) -> Iterator[tuple[str, str]]:
    if training.clip_norm is not None and training.clip_norm >= NEVER_CLIPS:
        yield f"{key}.clip_norm", f"of {training.clip_norm:g} never clips: no gradient's norm comes near it"
    if training.z_loss > 0 and 2 * training.z_loss * LOG_NORMALISER < ROUNDING:
        yield f"{key}.z_loss", f"of {training.z_loss:g} is lost in rounding: loss and gradient are float32"
    decay, rate = training.optimizer.weight_decay, training.optimizer.lr
    if 0 < decay * rate < ROUNDING:
        message = f"of {decay:g} takes {decay * rate:.2g} of a weight in a step, which float32 rounds to nothing"
        yield f"{key}.optimizer.weight_decay", message
    for name in _DROPOUTS:
        if 0 < (rate := getattr(training, name)) < ROUNDING:
            yield f"{key}.{name}", f"of {rate:g} drops fewer than one entry in ten million"
    averaging = training.weight_averaging
    if isinstance(averaging, ExponentialAverage) and (reason := averaging.unreached(training.max_steps)):
        yield f"{key}.weight_averaging.decay", reason


def _ineffective_groups(key: str, optimizer: Optimizer, experiment: Experiment) -> Iterator[tuple[str, str]]:
    """(key, reason) of factors of groups without which every parameter has the same ones."""
    for name in GroupFactors.model_fields:
        factors = getattr(optimizer, name)
        for group, factor in factors.items():
            others = {other: value for other, value in factors.items() if other != group}
            model, without = resolve_model(experiment.model), optimizer.model_copy(update={name: others})
            if effective_factors(model, without) != effective_factors(model, optimizer):
                continue
            if name == "weight_decay_groups" and not decays(optimizer):
                yield f"{key}.{name}.{group}", f"of {factor:g} multiplies a weight decay of 0"
            else:
                yield f"{key}.{name}.{group}", f"of {factor:g} changes nothing: each parameter has the same without it"


def _ineffective_attention(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """(key, reason) of windows longer than any text, and of softcaps far above all scores."""
    model, longest = resolve_model(experiment.model), _longest(experiment)
    attentions = dict.fromkeys(part for part in model.parts if isinstance(part, ResolvedAttention))
    windows = {attention.window for attention in attentions if attention.window is not None}
    for window in sorted(window for window in windows if window >= longest):
        yield "model.attention.window", f"of {window} is no window: the longest text has {longest} tokens"
    caps = {attention.softcap for attention in attentions if attention.softcap is not None}
    for cap in sorted(cap for cap in caps if cap >= FAR_SOFTCAP):
        yield "model.attention.softcap", f"of {cap:g} bends no score that training meets"
    if (bound := model.output.softcap) is not None and bound >= FAR_SOFTCAP:
        yield "model.output.softcap", f"of {bound:g} bends no logit that training meets"


def _longest(experiment: Experiment) -> int:
    """Tokens of the longest text that a stage or an evaluation puts through the model."""
    trained = experiment.pretrain.data.sequence_length
    lengths = [trained, *(ceil(of.read) for of in experiment.pretrain.objective.extremes(trained))]
    if (tuned := experiment.finetune) is not None:
        lengths.append(tuned.data.input_length + tuned.data.target_length)
    if (evaluate := experiment.evaluate) is not None:
        if evaluate.extrapolation is not None:
            lengths += [times * trained for times in evaluate.extrapolation.lengths]
        if evaluate.likelihood is not None:
            lengths.append(evaluate.likelihood.span(trained)[0])
        if evaluate.tasks is not None:
            lengths.append(evaluate.tasks.max_length or trained)
    return max(lengths)

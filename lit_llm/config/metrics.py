"""Metrics: name, direction, unit and comparability of each number that is tracked or compared.

Names of a split begin with `val/` or `test/`, those of evaluations with `eval/<kind>/`. After finetuning all of them
begin with `finetune/`. A source of a mixture or a task follows the name: `val/target_nll/arxiv`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["lower", "higher"]


@dataclass(frozen=True)
class Metric:
    """One number, without its split or stage."""

    name: str
    direction: Direction | None
    """Better direction; None: neither."""
    unit: str
    families: Literal["all", "causal", "encoder_only"] = "all"
    """The families that have it. causal: those that continue a prefix token by token."""
    across_objectives: bool = True
    """Whether it compares models that were trained on different objectives."""
    across_tokenizers: bool = False
    """Whether it compares models that read different tokens."""


TARGET_NLL = Metric("target_nll", "lower", "nats per token", "causal")
MASKED_NLL = Metric("masked_nll", "lower", "nats per token", "encoder_only")
PERPLEXITY = Metric("perplexity", "lower", "e^(nats per token)", "causal")
BITS_PER_BYTE = Metric("bits_per_byte", "lower", "bits per byte", "causal", across_tokenizers=True)
OBJECTIVE_LOSS = Metric("objective_loss", "lower", "nats per token", across_objectives=False)
ANSWER_ACCURACY = Metric("answer_accuracy", "higher", "share of answer tokens", "causal")
"""Share of a synthetic task's answer tokens that are the most probable ones; only models of such tasks have it."""
OF_SPLITS = (TARGET_NLL, MASKED_NLL, PERPLEXITY, BITS_PER_BYTE, ANSWER_ACCURACY, OBJECTIVE_LOSS)
"""Metrics of each split."""

NLL = Metric("nll", "lower", "nats per token", "causal")
"""Loss of an evaluation's documents or examples."""
MEANS = tuple(
    Metric(f"mean_over_{what}", "lower", "nats per token", "causal") for what in ("sources", "corpora", "tasks")
)

TRAIN_LOSS = Metric("train/loss", "lower", "nats per token", across_objectives=False)
LEARNING_RATE = Metric("train/lr", None, "")
LOSSES_AHEAD = tuple(
    Metric(f"train/loss_ahead_{distance}", "lower", "nats per token", across_objectives=False)
    for distance in range(2, 10)
)
"""Losses of the second, third, ... token on, in the last step; only models with `output.future_tokens` have them."""
TEACHER_DIVERGENCE = Metric("train/teacher_divergence", "lower", "nats per token")
GRAD_NORM = Metric("stability/grad_norm", None, "")
LOSS_SPIKES = Metric("stability/loss_spikes", None, "spikes", across_tokenizers=True)
MAX_GRAD_NORM = Metric("stability/max_grad_norm", None, "", across_tokenizers=True)
MAX_ATTENTION_LOGIT = Metric("stability/max_attention_logit", None, "", across_tokenizers=True)
BUSIEST_EXPERT = Metric("stability/busiest_expert", None, "share of choices", across_tokenizers=True)
EXPERT_ENTROPY = Metric("stability/expert_entropy", None, "share of the largest entropy", across_tokenizers=True)
"""Of the last step, in the layer whose experts have the least equal shares; only models with experts have them."""
TOKENS_PER_SECOND = Metric("throughput/tokens_per_second", "higher", "tokens per second")
FLOPS_PER_SECOND = Metric("throughput/flops_per_second", "higher", "FLOPs per second", across_tokenizers=True)
MFU = Metric("throughput/mfu", "higher", "share of the device's peak", across_tokenizers=True)
OF_TRAINING = (LOSS_SPIKES, MAX_GRAD_NORM, MAX_ATTENTION_LOGIT, BUSIEST_EXPERT, EXPERT_ENTROPY, TOKENS_PER_SECOND)
"""Metrics of a whole training, besides those of its splits."""

SCORES = frozenset({"acc", "acc_all", "acc_norm", "exact_match", "f1", "mcc", "bleu", "chrf", "chrf++", "likelihood"})
"""lm-evaluation-harness's names of scores that are better when higher."""

SPLITS = {"validation": "val/", "test": "test/"}
"""{split: prefix of its metrics}."""
THROUGHPUT = "throughput/"
FINETUNED, EVALUATED = "finetune/", "eval/"
"""Prefixes of metrics after finetuning, and of evaluations."""

_OF_STEPS = (
    TRAIN_LOSS,
    *LOSSES_AHEAD,
    LEARNING_RATE,
    TEACHER_DIVERGENCE,
    GRAD_NORM,
    *OF_TRAINING,
    FLOPS_PER_SECOND,
    MFU,
)
_BY_NAME = {metric.name: metric for metric in (*OF_SPLITS, NLL, *MEANS, *_OF_STEPS)}


def on_validation(metric: Metric) -> str:
    """Name of a metric on the validation split, by which choices are made."""
    return f"{SPLITS['validation']}{metric.name}"


def on_test(metric: Metric) -> str:
    """Name of a metric on the test split, for final tables."""
    return f"{SPLITS['test']}{metric.name}"


def metric_of(name: str) -> Metric | None:
    """The metric of a tracked name, whatever its stage, split or source; None for other names."""
    of_steps = _BY_NAME.get(name.removeprefix(FINETUNED))
    return of_steps or next((_BY_NAME[part] for part in name.split("/") if part in _BY_NAME), None)


def direction(name: str) -> Direction | None:
    """Better direction of a tracked name: losses lower, scores of tasks and speed higher; None for others."""
    parts = name.split("/")
    if "tasks" in parts and SCORES & {*parts}:
        return "higher"
    metric = metric_of(name)
    return metric.direction if metric else None

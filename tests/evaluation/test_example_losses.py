"""Losses on held-out examples: what a plain forward pass gives for each alone, whatever the batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lit_llm.evaluation.examples import HeldOutExamples, summary
from lit_llm.objectives.config import BOS, EOD, MasksConfig
from tests.tiny_models import PAPER_NORMS, VOCABULARY, build


class Made:
    """Random examples in place of tokenised ones."""

    tasks = ("short", "long")
    lost_bytes = 0

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.pairs = []
        for number in range(30):
            source, target = random.integers(0, 9 if number % 2 else 30), random.integers(1, 9)
            ids = random.integers(2, VOCABULARY, size=source + target)
            self.pairs.append((ids[:source], np.append(ids[source:], EOD)))

    def count(self, split: str) -> int:
        assert split == "validation"
        return len(self.pairs)

    def read(self, split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
        return self.pairs[number]

    def task_of(self, split: str) -> np.ndarray:
        return np.array([0 if number % 2 else 1 for number in range(30)])


def alone(model, family, source, target, open_prefix):
    """Nats of one example by the whole logits of an unbatched forward pass."""
    source, target = torch.tensor(source), torch.tensor(target)
    begun = torch.cat([torch.tensor([BOS]), target[:-1]])
    if family == "redllm":
        logits = model((source if len(source) else torch.tensor([EOD]))[None], begun[None])[0]
    else:
        row = torch.cat([torch.tensor([BOS]), source, target[:-1]])
        logits = model(row[None], len(source) + 1 if open_prefix else None)[0, len(source) :]
    return F.cross_entropy(logits, target, reduction="sum").item()


@pytest.mark.parametrize(("family", "open_prefix"), [("decllm", False), ("decllm", True), ("redllm", False)])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_every_example_has_the_nats_of_a_plain_forward_pass(family, open_prefix, batch_tokens):
    model, made = build(family, *PAPER_NORMS[family]), Made()
    masks = MasksConfig(prefix="bidirectional" if open_prefix else "causal")
    lengths = np.arange(VOCABULARY) % 5
    rows = HeldOutExamples(made, 30, masks, lengths).rows(model, batch_tokens)
    with torch.no_grad():
        expected = [alone(model, family, *pair, open_prefix) for pair in made.pairs]
    assert [row["nats"] for row in rows] == pytest.approx(expected, abs=1e-5)  # the loss is in float32
    assert [row["tokens"] for row in rows] == [len(target) for _, target in made.pairs]
    assert [row["bytes"] for row in rows] == [int(lengths[target].sum()) for _, target in made.pairs]
    found = summary(rows)
    tokens = sum(len(target) for _, target in made.pairs)
    assert found["nll"] == pytest.approx(sum(expected) / tokens, rel=1e-5)
    bits = sum(expected) / math.log(2) / sum(row["bytes"] for row in rows)
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    short = [number for number in range(30) if number % 2]
    mean = sum(expected[n] for n in short) / sum(len(made.pairs[n][1]) for n in short)
    assert found["nll/short"] == pytest.approx(mean, rel=1e-5)
    assert found["mean_over_tasks"] == pytest.approx((found["nll/short"] + found["nll/long"]) / 2)


def test_fewer_examples_are_spread_evenly():
    held_out = HeldOutExamples(Made(), 10, MasksConfig(), None)
    assert held_out.places == list(range(0, 30, 3))
    assert held_out.bytes == [None] * 10

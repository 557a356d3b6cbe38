"""Dropout: where it is, what it depends on, and where there is none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.feed_forward.module import FeedForward
from lit_llm.components.masks import AttentionMask, KernelMask
from lit_llm.config.problems import InputError
from lit_llm.evaluation.final import FinalEvaluation
from lit_llm.evaluation.likelihood import Validation
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model, generator
from lit_llm.models.families import LanguageModel
from lit_llm.objectives.collate import Batch
from lit_llm.runs.run_one_stage import run_one
from lit_llm.store.store import Store
from lit_llm.training.config import TrainingConfig
from lit_llm.training.module import LitModel
from lit_llm.training.stability import largest_attention_logit
from tests.stages_in_parts import prepared_stage
from tests.training.test_step import SMALL, fitted, uneven_batch

FAMILIES = ["decllm", "redllm"]


def batch_of(family: str) -> Batch:
    return uneven_batch("decoder" if family == "decllm" else "encoder_decoder")


def model_of(family: str) -> LanguageModel:
    return build_model(load_experiment(f"{family}-tiny", SMALL).model)


def drops(model: nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


@contextmanager
def dropped(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What the dropouts set to zero, in the order of their calls."""
    found: list[torch.Tensor] = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found.append((output == 0) & (inputs[0] != 0))

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, nn.Dropout)]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_dropout_nothing_is_drawn_and_training_computes_what_evaluation_does(family: str) -> None:
    model, inputs = model_of(family), batch_of(family).inputs
    before = torch.get_rng_state()
    training = model.train().hidden(**inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(training, model.eval().hidden(**inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_branch_is_dropped_before_it_is_added(family: str) -> None:
    """Where layers drop all of it, what is left is the embedding: the residual stream itself is not dropped."""
    model, batch = model_of(family).train(), batch_of(family)
    drops(model, 1.0)
    model.dropout.p = 0.0
    tokens = batch.inputs["tokens_BT" if family == "decllm" else "target_BT"]
    assert torch.equal(model.hidden(**batch.inputs), model.decoder.norm(model.embedding(tokens)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_embeddings_are_dropped(family: str) -> None:
    model, batch = model_of(family).train(), batch_of(family)
    model.dropout.p = 1.0
    assert not model.hidden(**batch.inputs).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_share_p_of_the_entries_is_dropped_in_each_place(family: str) -> None:
    """One place for the embeddings of each stack, two in a layer, three in one with cross-attention."""
    model, batch = model_of(family).train(), batch_of(family)
    drops(model, 0.25)
    with dropped(model) as masks:
        model.hidden(**batch.inputs)
    layers = len(model.decoder.layers)
    assert len(masks) == (1 + 2 * layers if family == "decllm" else 2 + 2 * layers + 3 * layers)
    for mask in masks:
        share, deviation = mask.float().mean().item(), (0.25 * 0.75 / mask.numel()) ** 0.5
        assert abs(share - 0.25) < 5 * deviation


def masks_of_a_step(
    seed: int = 0, steps: int = 0, rank: int = 0, micro_batch: int | None = None, noise: int = 0
) -> list[torch.Tensor]:
    """What is dropped in one training step after `steps` others."""

    class Placed(LitModel):
        global_step, global_rank = steps, rank

    config: dict[str, Any] = {"max_steps": 100, "dropout": 0.25, "execution": {"micro_batch_size": micro_batch}}
    lit = Placed(model_of("decllm"), TrainingConfig.model_validate(config), seed)
    torch.manual_seed(noise)
    with dropped(lit.model) as masks:
        fitted(lit, uneven_batch("decoder"))
    return masks


def test_what_is_dropped_depends_on_seed_step_micro_batch_and_rank_alone() -> None:
    """Not on what else was drawn before: a resumed run, and an arm of the same shapes, drop the same."""
    base = masks_of_a_step()
    again = masks_of_a_step(noise=1)
    assert all(torch.equal(one, two) for one, two in zip(base, again, strict=True))
    # The first mask of each micro-batch of two examples: four draws that differ.
    pieces = [mask for mask in masks_of_a_step(micro_batch=2) if mask.shape[0] == 2][:: len(base)]
    others = [masks_of_a_step(seed=1), masks_of_a_step(steps=1), masks_of_a_step(rank=1)]
    assert len(pieces) == 4
    for one, two in [
        *itertools.combinations(pieces, 2),
        *itertools.combinations([masks[0] for masks in (base, *others)], 2),
    ]:
        assert not torch.equal(one, two)


def test_a_step_leaves_the_global_generator_as_it_was() -> None:
    after = []
    for dropout in (0.0, 0.25):
        lit = LitModel(model_of("decllm"), TrainingConfig(max_steps=1, dropout=dropout))
        torch.manual_seed(3)
        fitted(lit, uneven_batch("decoder"))
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


def test_the_probe_of_the_logits_sees_no_dropout_and_leaves_the_model_in_training() -> None:
    model, batch = model_of("decllm").train(), uneven_batch("decoder")
    without = largest_attention_logit(model, batch)
    drops(model, 0.5)
    assert largest_attention_logit(model, batch) == without
    assert all(module.training for module in model.modules())


def test_evaluation_during_training_has_no_dropout(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def watch(kind: type[Validation] | type[FinalEvaluation]) -> None:
        call: Any = kind.__call__

        def watched(self: Any, model: LanguageModel) -> dict[str, float]:
            with dropped(model) as masks:
                found: dict[str, float] = call(self, model)
            seen.append(any(mask.any() for mask in masks))
            return found

        monkeypatch.setattr(kind, "__call__", watched)

    watch(Validation)
    watch(FinalEvaluation)
    stage = prepared_stage(Store(tmp_path), corpus, "redllm-tiny", "pretrain.training.dropout=0.5")
    assert run_one(tmp_path, stage.fingerprint) == "done"
    assert seen == [False] * 4  # once before the first step, and the last reads more windows


def test_a_run_draws_from_its_own_seed_once_for_each_micro_batch(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, str]] = []

    def noted(seed: int, name: str) -> torch.Generator:
        drawn.append((seed, name))
        return generator(seed, name)

    monkeypatch.setattr("lit_llm.training.module.generator", noted)
    options = ["seed=3", "pretrain.training.dropout=0.5", "pretrain.training.execution.micro_batch_size=2"]
    stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny", *options)
    assert run_one(tmp_path, stage.fingerprint) == "done"
    assert drawn == [(3, f"dropout/{step}/{micro_batch}/0") for step in range(14) for micro_batch in range(2)]


@pytest.mark.parametrize("value", ["1", "-0.1", "1.5"])
def test_a_dropout_outside_its_range_is_refused_by_its_key(value: str) -> None:
    with pytest.raises(InputError, match=r"pretrain\.training\.dropout: .*(less than 1|greater than or equal to 0)"):
        load_experiment("decllm-tiny", [f"pretrain.training.dropout={value}"])


# --- inside attention and feed-forward -------------------------------------------------------------------------------

TOKENS = 128
"""Tokens of the rows below, as many as a head has entries."""
DOCUMENTS = torch.tensor([[0] * 50 + [1] * 78, [0] * TOKENS])
MASKS: dict[str, AttentionMask] = {
    "causal": AttentionMask(causal=True),
    "prefix": AttentionMask(causal=True, prefix=8),
    "prefixes": AttentionMask(causal=True, prefix=torch.tensor([3, 9])),
    "full": AttentionMask(),
    "padding": AttentionMask(key_lengths=torch.tensor([TOKENS, 13])),
    "documents": AttentionMask(causal=True, documents=(DOCUMENTS, DOCUMENTS)),
    "document without keys": AttentionMask(documents=(DOCUMENTS, DOCUMENTS + torch.tensor([[0], [1]]))),
    "band": AttentionMask(causal=True, window=(3, 1)),
}


@pytest.mark.parametrize("case", [*MASKS, "scores", "bias", "shared heads"])
def test_attention_drops_weights_after_the_softmax(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are the unit vectors, so the output is the weights: of those that are seen, a share p is zero, and the
    others are 1 / (1 - p) times the softmax. Judge: the same call in evaluation, which has no dropout.
    """
    monkeypatch.setattr("lit_llm.components.attention.dot_product.suits_blocks", suits := Mock(return_value=False))
    torch.manual_seed(0)
    mask, p = MASKS.get(case, AttentionMask(causal=True)), 0.25
    q, k = (torch.randn(2, heads, TOKENS, TOKENS, dtype=torch.float64) for heads in (4, 2 if "shared" in case else 4))
    v = torch.eye(TOKENS, dtype=torch.float64).expand_as(k)
    bias = torch.randn(4, TOKENS, TOKENS, dtype=torch.float64) if case == "bias" else None
    cap = 2.0 if case == "scores" else None
    like = torch.float64, torch.device("cpu")
    kernel = KernelMask(mask, (TOKENS, TOKENS), like, scores=cap is not None, bias=bias is not None)
    assert case not in ("causal", "band", "scores") or kernel.kernel == case
    attention = DotProduct(None, cap)
    attention.dropout = p
    dropped = attention(q, k, v, kernel, bias)
    assert not suits.called, "blocks of queries have no dropout"
    weights = attention.eval()(q, k, v, kernel, bias)
    seen, left = weights > 0, dropped != 0
    assert not (left & ~seen).any()
    assert_close(dropped[left], weights[left] / (1 - p))
    count = int(seen.sum())
    assert abs((seen & ~left).sum() / count - p) < 5 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("convolution", ["", "hidden"])
def test_a_feed_forward_network_drops_what_its_last_matrix_reads(activation: str, convolution: str) -> None:
    overrides = [f"model.feed_forward.activation={activation}", f"model.feed_forward.convolution=[{convolution}]"]
    model = build_model(load_experiment("decllm-tiny", [*SMALL, *overrides]).model)
    LitModel(model.train(), TrainingConfig(max_steps=1, feed_forward_dropout=0.5))
    read: list[torch.Tensor] = []
    down = cast(FeedForward, model.decoder.layers[0].feed_forward).down
    hook = down.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    tokens = torch.randint(2, 1024, (2, 11))
    torch.manual_seed(0)
    model(tokens)
    model.eval()(tokens)
    hook.remove()
    dropped, whole = read
    left = dropped != 0
    assert_close(dropped[left], 2 * whole[left])
    count = int((whole != 0).sum())
    assert abs(float((whole[~left] != 0).sum()) / count - 0.5) < 5 * (0.25 / count) ** 0.5


@pytest.mark.parametrize("key", ["attention_dropout", "feed_forward_dropout"])
def test_each_of_them_is_drawn_by_seed_and_step_and_leaves_the_global_generator(key: str) -> None:
    losses, states = [], []
    for noise, rate in ((0, 0.25), (1, 0.25), (1, 0.0)):
        lit = LitModel(model_of("redllm"), TrainingConfig.model_validate({"max_steps": 1, key: rate}))
        torch.manual_seed(noise)
        fitted(lit, uneven_batch("encoder_decoder"))
        states.append(torch.get_rng_state())
        assert lit.report is not None
        losses.append(lit.report.loss)
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(states[1], states[2])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["pretrain.training.attention_dropout=0.1", "pretrain.training.execution.kernels=flex"],
            r"execution\.kernels: FlexAttention has no dropout .* set kernels to auto in all arms",
        ),
        (
            ["pretrain.training.attention_dropout=0.1", "model.decoder.mamba2={}"],
            r"attention_dropout: no part of this model's layers has it",
        ),
    ],
)
def test_dropout_that_no_kernel_or_part_has_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_experiment("decllm-tiny", overrides)

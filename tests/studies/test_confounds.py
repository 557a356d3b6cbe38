"""What changes along with a factor is said, with the key, both values and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lit_llm.models import resolve as resolution
from lit_llm.studies.audit.differing_keys import audit
from lit_llm.studies.load import load_study
from tests.equal_budgets import others

Study = Callable[..., Path]


@pytest.fixture
def confounds(write_study: Study) -> Callable[..., dict[str, str]]:
    """{key: message} of the confounds of a small study (d_model 16, 2 heads) with these factors."""

    def of(factors: str, *overrides: str, allow: str = "") -> dict[str, str]:
        rest = f"grid: {{factors: {{{factors}}}}}\n{allow}"
        found = audit(load_study(write_study("along", rest), overrides), built=False)
        return {finding.key: finding.message for finding in found if finding.kind == "confound"}

    return of


def test_the_width_of_a_head_follows_from_d_model_and_says_so(confounds) -> None:
    """head_dim = d_model / heads, where it is not written down."""
    assert confounds("model.d_model: [16, 32]") == {
        "model.attention.head_dim": "8 → 16, though no factor sets it; set it to hold it, or `allow` it"
    }
    assert confounds("model.d_model: [16, 32]", "model.attention.head_dim=8") == {}


def test_more_heads_are_narrower_and_as_many_keys_and_values_are_no_number_of_their_own(confounds) -> None:
    factor = "model.attention.heads: [2, 4]"
    assert {key: text.split(",")[0] for key, text in confounds(factor).items()} == {"model.attention.head_dim": "8 → 4"}
    assert confounds(factor, "model.attention.head_dim=8") == {}
    assert confounds(factor, "model.attention.head_dim=8", "model.attention.kv_heads=2") == {}


def test_one_place_that_changes_is_named_by_its_own_address(confounds) -> None:
    factor = "model.decoder.cross_attention.heads: [2, 4]"
    assert confounds(factor).keys() == {"model.decoder.cross_attention.head_dim"}
    factor = "model.encoder.attention.heads: [2, 4]"
    assert confounds(factor).keys() == {"model.encoder.attention.head_dim"}


def test_what_a_bundle_declares_is_no_confound(confounds) -> None:
    bundle = "size: {{s: {{model.d_model: 16, {key}: 8}}, l: {{model.d_model: 32, {key}: 16}}}}"
    assert confounds(bundle.format(key="model.attention.head_dim")) == {}
    assert confounds(bundle.format(key="model.feed_forward.d_ff")).keys() == {"model.attention.head_dim"}


def test_a_confound_may_be_allowed_with_a_reason(write_study: Study) -> None:
    factors = "grid: {factors: {model.d_model: [16, 32]}}"
    allow = "allow: [{key: model.attention.head_dim, because: heads grow with the model}]"
    (finding,) = others(audit(load_study(write_study("reason", f"{factors}\n{allow}")), built=False))
    assert finding.kind == "allowed"
    assert finding.message == "8 → 16, though no factor sets it; allowed because heads grow with the model"


@pytest.mark.parametrize(
    "factor",
    [
        "model.attention.qkv_norm: [[q, k, v], []]",  # without a norm its eps and its scale have no effect
        "model.attention.output_norm: [head, none]",
        "model.attention.rope: [continuous, none]",  # nor has theta without positions
        "model.attention: [{heads: 2}, {heads: 4}]",
        "model.decoder.layer_ranges.0.cross_attention.rope: [none, restart]",
        "split: {a: {model.encoder.layers: 2, model.decoder.layers: 2}, b: {model.encoder.layers: 3, "
        "model.decoder.layers: 1}}",
        "model.tie_embeddings: [all, inputs, none]",
        "model.norm.function: [rms_norm, layer_norm]",
        "pretrain.training.optimizer.lr: [1e-3, 1e-2]",
    ],
)
def test_a_factor_that_changes_only_itself_has_none(confounds, factor: str) -> None:
    scaled = "model.attention.qkv_norm_scale=true", "model.attention.output_norm_scale=true"
    assert confounds(factor, *(scaled if "rope" not in factor else ())) == {}


def test_a_named_arm_says_what_it_sets_and_another_family_brings_its_own_model(write_study: Study) -> None:
    arms = "{a: {}, b: {model: {d_model: 32}}, dec: {extends: decllm-tiny, model: {d_model: 32}}}"
    found = [f for f in audit(load_study(write_study("own", f"arms: {arms}")), built=False) if f.kind == "confound"]
    assert [(finding.arm, finding.key) for finding in found] == [("b", "model.attention.head_dim")]


def test_a_range_of_layers_covers_another_share_of_a_deeper_stack(confounds) -> None:
    ranged = "model.decoder.layer_ranges={0-1: {cross_attention: {rope: none}}}"
    assert confounds("model.decoder.layers: [2, 4]", ranged) == {
        "model.decoder.layer_ranges.0-1": "covers 2 of 4 layers, 2 of 2 in baseline; make it part of the level, or "
        "`allow` it"
    }
    assert confounds("model.encoder.layers: [2, 4]", ranged) == {}


def test_a_resolution_that_lets_one_key_change_another_is_found(confounds, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output norm off, and the positions of that attention are gone."""
    original = resolution.resolve_attention

    def resolve(values: dict[str, object], d_model: int, cross: bool) -> resolution.ResolvedAttention:
        lost = values["output_norm"] == "none"
        return original(values | {"rope": "none"} if lost else values, d_model, cross)

    monkeypatch.setattr(resolution, "resolve_attention", resolve)
    found = confounds("model.attention.output_norm: [head, none]")
    assert found.keys() == {"model.attention.rope"}
    assert found["model.attention.rope"].startswith("continuous → none, though no factor sets it")


def test_the_stacks_of_a_decoder_decoder_have_addresses_of_their_own(write_study: Study) -> None:
    """Halved heads: their width follows, in both stacks alike or in one."""

    def keys(factor: str, *more: str) -> set[str]:
        rest = f"grid: {{factors: {{{factor}}}}}"
        found = audit(load_study(write_study("along", rest, extends="yoco-tiny"), more), built=False)
        return {finding.key for finding in found if finding.kind == "confound"}

    assert keys("model.attention.heads: [2, 4]") == {"model.attention.head_dim"}
    assert keys("model.self_decoder.self_attention.heads: [2, 4]") == {"model.self_decoder.self_attention.head_dim"}
    assert keys("model.cross_decoder.cross_attention.heads: [2, 4]") == {"model.cross_decoder.cross_attention.head_dim"}
    assert keys("model.self_decoder.retention.heads: [1, 2]") == {
        "model.self_decoder.retention.head_dim",
        "model.self_decoder.retention.value_dim",
    }
    assert keys("model.attention.window: [8, 16]") == set()
    window = "{0: {self_attention: {window: 3}}}"
    assert keys("model.self_decoder.layers: [2, 3]", f"model.self_decoder.layer_ranges={window}") == {
        "model.self_decoder.layer_ranges.0"
    }


def test_a_block_that_holds_the_whole_sequence_is_refused_or_allowed(write_study: Study) -> None:
    """No later block would read the encoder of a double decoder."""
    warmed = "pretrain.training.sequence_warmup={begin: 32, steps: 8}"

    def kinds(block: int, rest: str = "", *overrides: str) -> list[str]:
        path = write_study("blocks", f"arms: {{a: {{}}}}\n{rest}", extends="doubledecoder-tiny", allow_budgets=not rest)
        study = load_study(path, [f"model.block={block}", "pretrain.data.sequence_length=64", *overrides])
        return [finding.kind for finding in audit(study, built=False) if finding.key == "model.block"]

    assert (kinds(63), kinds(64)) == ([], ["refused"])
    assert kinds(64, "allow: [{key: model.block, because: the encoder is not read}]") == ["allowed"]
    assert (kinds(31, "", warmed), kinds(32, "", warmed)) == ([], ["refused"])

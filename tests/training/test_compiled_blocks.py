"""Compiled blocks: one graph for each kind of block, whatever the lengths, and the gradient of the eager model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.testing import assert_close

from lit_llm.components.attention import query_blocks
from lit_llm.components.layer_part import LayerPart
from lit_llm.components.loss.module import LossWeights, target_loss
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.runs.run_one_stage import run_one
from lit_llm.store.store import Store
from lit_llm.training import compiled_blocks
from lit_llm.training.compiled_blocks import GRAPHS, compile_blocks
from lit_llm.training.config import TrainingConfig
from lit_llm.training.module import LitModel
from tests.stages_in_parts import numbers, prepared_stage, stops_after
from tests.tiny_models import build, ids
from tests.training.test_step import SMALL, uneven_batch

LENGTHS = [(12, 23), (17, 12), (30, 30)]
"""Tokens of source and target, and of a decoder-only row, in three batches."""


@pytest.fixture(autouse=True)
def without_graphs() -> Iterator[None]:
    """No graphs of other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def text(**more: Any) -> list[dict[str, Any]]:
    """Rows of a decoder-only model, alike but for their length. A function gets the length."""
    return [
        {
            "tokens_BT": ids(3, tokens),
            **{key: value(tokens) if callable(value) else value for key, value in more.items()},
        }
        for tokens, _ in LENGTHS
    ]


def pairs(ragged: bool = False, cut: bool = False) -> list[dict[str, Any]]:
    """Sources and targets of an encoder-decoder."""
    batches = []
    for source, target in LENGTHS:
        batch = {"source_BS": ids(3, source), "target_BT": ids(3, target)}
        if ragged:
            batch["source_lengths"] = torch.tensor([source, source - 2, source - 5])
        if cut:
            batch |= {"documents_BS": documents(source), "documents_BT": documents(target)}
        batches.append(batch)
    return batches


def documents(tokens: int) -> Tensor:
    """Two documents in each of three rows."""
    return (torch.arange(tokens) * 2 // tokens).expand(3, -1).contiguous()


def ragged(tokens: int) -> Tensor:
    """A length for each of three rows."""
    return torch.tensor([4, tokens // 2, tokens - 3])


CONVOLUTIONS = ["attention.convolution=[input, qkv]", "feed_forward.convolution=[input, hidden]"]
CASES: dict[str, tuple[str, list[str], list[dict[str, Any]], int]] = {
    "causal": ("decllm", [], text(), 1),
    "documents": ("decllm", [], text(documents_BT=documents), 1),
    "prefix of one length": ("decllm", [], text(prefix_length=4), 1),
    "prefix of other lengths": ("decllm", [], text(prefix_length=lambda tokens: tokens // 2), 1),
    "prefix of each row": ("decllm", [], text(prefix_length=ragged), 1),
    "open tokens": ("decllm", [], text(open_BT=lambda t: torch.arange(t).expand(3, -1) < 5, documents_BT=documents), 1),
    "window": ("decllm", ["attention.window=4"], text(), 1),
    "window and documents": ("decllm", ["attention.window=4"], text(documents_BT=documents), 1),
    "softcap, grouped heads": ("decllm", ["attention.softcap=4.0", "attention.kv_heads=2"], text(), 1),
    "gated": ("decllm", ["attention.gate=per_head", "attention.output_norm=head"], text(), 1),
    "value residual": ("decllm", ["attention.value_residual=learned"], text(), 2),
    "convolutions": ("decllm", CONVOLUTIONS, text(documents_BT=documents), 1),
    "rotated in part": ("decllm", ["attention.rope_fraction=0.5"], text(), 1),
    "alibi": ("decllm", ["attention.relative_bias=alibi", "attention.rope=none"], text(), 1),
    "shared bias": ("decllm", ["attention.relative_bias=shared", "attention.window=4"], text(), 1),
    "bias of each layer": ("decllm", ["attention.relative_bias=per_layer"], text(), 1),
    "post norm": ("decllm", ["norm.placement=post", "norm.function=layer_norm"], text(), 1),
    "parallel": ("decllm", ["norm.placement=parallel", "feed_forward.bias=true"], text(), 1),
    "sandwich norm": ("decllm", ["norm.placement=sandwich", "attention.qkv_norm=[q, k, v]"], text(), 1),
    "first layer without norm": ("decllm", ["norm.skip_first=true"], text(), 2),
    "partial": ("decllm", ["decoder.partial_attention=palm"], text(source_length=lambda tokens: tokens // 3), 1),
    "partial of each row": ("decllm", ["decoder.partial_attention=palm"], text(source_length=ragged), 1),
    "yoco": ("yoco", [], text(), 2),
    "redllm": ("redllm", ["attention.output_norm=head"], pairs(), 2),
    "double decoder": ("double", ["attention.output_norm=head"], text(documents_BT=documents), 2),
    "tied layers": ("redllm", ["tie_layers=true"], pairs(), 2),
    "redllm, ragged": ("redllm", ["attention.output_norm=concat"], pairs(ragged=True), 2),
    "redllm, documents": ("redllm", ["norm.scale=false"], pairs(cut=True), 2),
    "merged": ("redllm", ["decoder.cross_attention_mode=merged"], pairs(ragged=True), 2),
}
"""{case: (family, overrides, batches, kinds of blocks)}."""
FAST = ["causal", "prefix of each row", "window and documents", "softcap, grouped heads", "yoco", "merged"]
"""Cases of every test run; tracing takes some seconds each."""


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients since the last call."""
    taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return taken


def step(model: LanguageModel, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """(a sum over the hidden states with random weights, its gradients)."""
    hidden_BTD = model.hidden(**batch)
    torch.manual_seed(1)
    total = (hidden_BTD * torch.randn_like(hidden_BTD)).sum()
    total.backward()
    return total.item(), gradients(model)


def check(eager: LanguageModel, batches: list[dict[str, Any]], vary: bool = True) -> list[int]:
    """Compare a compiled copy with a model in float64. Returns the number of graphs after each batch."""
    compiled, counter = copy.deepcopy(eager), CompileCounter()
    compile_blocks(compiled.train(), vary, counter)
    graphs = []
    for batch in batches:
        wanted, expected = step(eager.train(), batch)
        total, found = step(compiled, batch)
        assert total == pytest.approx(wanted, rel=1e-10)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)
        graphs.append(counter.frame_count)
    return graphs


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_block_is_one_graph_for_every_length_with_the_eager_gradient(case: str) -> None:
    """Judges: dynamo's counter and autograd. Traced whole, so that a break of the graph is an error."""
    family, overrides, batches, kinds = CASES[case]
    assert check(build(family, *overrides), batches) == [kinds] * len(batches)


def test_the_loss_is_one_graph_for_any_number_of_targets() -> None:
    """Judge: torch's cross-entropy and logsumexp in float64, and autograd."""
    counter, model = CompileCounterWithBackend("aot_eager"), build("decllm").double()
    torch.manual_seed(0)
    compile_blocks(model, True, counter)
    weights = LossWeights(squares=0.1)
    for tokens in (5, 8, 31):
        hidden_BTD, targets_BT = torch.randn(2, tokens, model.config.d_model).double(), ids(2, tokens)
        places_N = torch.arange(0, 2 * tokens, 2)
        states = [hidden_BTD.clone().requires_grad_() for _ in range(2)]
        losses = target_loss(states[0], model.unembedding, (targets_BT, places_N), weights)
        logits_NV = model.unembedding(states[1]).flatten(0, 1)[places_N]
        nats = F.cross_entropy(logits_NV, targets_BT.flatten()[places_N], reduction="sum")
        expected = nats + 0.1 * logits_NV.logsumexp(-1).square().sum()
        assert_close(losses.objective, expected, check_dtype=False, rtol=1e-6, atol=0)
        found, wanted = (
            torch.autograd.grad(each, [state, model.unembedding.weight_VD])
            for each, state in zip((losses.objective, expected), states, strict=True)
        )
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # the loss sums in float32
    assert counter.frame_count == 1


@pytest.mark.parametrize(("precision", "rounding"), [("bf16", 1e-2), ("fp32", 1e-6)])
def test_attention_by_query_blocks_is_one_call_in_a_graph_of_every_length(
    precision: str, rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_blocks, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(query_blocks, "has_avx512", lambda: True)
    monkeypatch.setattr(query_blocks, "CAUSAL_ROWS", range(11, 21))
    monkeypatch.setattr(query_blocks, "NARROWEST", 8)
    eager = build("decllm").float().train()
    compiled, counter = copy.deepcopy(eager), CompileCounterWithBackend("eager")
    compile_blocks(compiled, True, counter)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        for tokens in (12, 17, 20):
            batch = {"tokens_BT": ids(3, tokens)}
            found, expected = (torch.cat([g.flatten() for g in step(m, batch)[1].values()]) for m in (compiled, eager))
            assert (found - expected).norm() < rounding * expected.norm()
    (graph,) = counter.graphs
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("lit_llm.block_attention.default") == 1
    assert not any("bmm" in name or "softmax" in name for name in names)


def test_an_encoder_alone_is_one_graph_for_each_kind_of_layer() -> None:
    """ModernBERT's first layer has no norm, and its layers alternate between a window and all tokens."""
    model = build_model(load_experiment("modernbert-tiny", [*SMALL, "model.vocabulary=1025"]).model).double()
    kinds = len({(block.parts, repr(block)) for block in model.encoder.layers})
    batches = [{"tokens_BT": torch.randint(2, 1024, (3, tokens))} for tokens in (40, 41, 60)]
    graphs = check(model, batches)
    assert graphs == [graphs[0]] * 3
    assert kinds <= graphs[0] <= 2 * kinds


@pytest.mark.parametrize(
    "mixer",
    ["retention", *(pytest.param(mixer, marks=pytest.mark.slow) for mixer in ("gla", "gated_deltanet", "mamba2"))],
)
def test_a_mixer_with_a_state_is_one_graph_for_rows_of_one_length(mixer: str) -> None:
    model = build("yoco", f"self_decoder.{mixer}={{chunk: 4}}")
    assert check(model, [{"tokens_BT": ids(3, 14)} for _ in range(3)], vary=False) == [2, 2, 2]


def test_a_smaller_last_micro_batch_is_one_more_graph() -> None:
    rows = [{"tokens_BT": ids(count, 14), "prefix_length": 5} for count in (3, 3, 2, 3, 2)]
    assert check(build("decllm"), rows, vary=False) == [1, 1, 2, 2, 2]


def test_a_length_that_equals_a_width_at_first_is_no_other_graph() -> None:
    """Heads have 8 entries, the model is 32 wide, and 12 tokens are both source and target of the first batch."""
    batches = [{"source_BS": ids(3, s), "target_BT": ids(3, t)} for s, t in ((32, 32), (8, 4), (12, 12), (9, 32))]
    assert check(build("redllm"), batches) == [2] * 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_drops_the_eager_entries_with_checkpointing_too(checkpointing: bool) -> None:
    """`aot_eager` splits forward and backward as inductor does. Equal losses only if equal entries are dropped."""
    found = []
    for compiled in (False, True):
        model = build("decllm", "norm.scale=true")
        rates = dict.fromkeys(("dropout", "attention_dropout", "feed_forward_dropout"), 0.3)
        config = {"max_steps": 1, **rates, "execution": {"activation_checkpointing": checkpointing}}
        LitModel(model, TrainingConfig.model_validate(config))
        if compiled:
            compile_blocks(model, True, CompileCounterWithBackend("aot_eager"))
        torch.manual_seed(3)
        batch = {"tokens_BT": torch.randint(2, 61, (3, 12))}
        found.append(step(model.train(), batch))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-10)
    for name, gradient in found[0][1].items():
        assert_close(found[1][1][name], gradient, rtol=1e-9, atol=1e-12)


def test_evaluation_is_eager_and_names_do_not_change() -> None:
    model = build("decllm")
    names, counter = list(model.state_dict()), CompileCounter()
    compile_blocks(model, True, counter)
    with torch.no_grad():
        model.eval()(ids(2, 9))
        model.train()(ids(2, 9))
    assert counter.frame_count == 0
    model(ids(2, 9))
    assert counter.frame_count == 1
    assert list(model.state_dict()) == names


def test_a_part_that_breaks_the_graph_ends_the_run_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("decllm").train()
    feed_forward = type(model.decoder.layers[0].part("feed_forward"))
    forward = feed_forward.forward

    def breaking(self: LayerPart, x_BTD: Tensor, inputs: None = None) -> Tensor:
        return forward(self, x_BTD, inputs) if x_BTD.sum() > 0 else x_BTD

    monkeypatch.setattr(feed_forward, "forward", breaking)
    compile_blocks(model, True, "eager")
    with pytest.raises(RuntimeError, match=r"could not be compiled \(.*\); set training.execution.kernels to auto"):
        model(ids(2, 9))


def test_more_graphs_than_foreseen_end_the_run() -> None:
    """torch's default goes on eagerly, without a word."""
    model = build("decllm").train()
    compile_blocks(model, False, "eager")
    for tokens in range(4, 4 + 2 * GRAPHS):
        model(ids(2, tokens))
    with pytest.raises(RuntimeError, match="could not be compiled"):
        model(ids(2, 40))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master"])
def test_inductor_computes_the_eager_loss_and_gradient(precision: str) -> None:
    """In bfloat16 the judge is the float32 gradient: compiled blocks are no farther from it than eager ones."""
    batch = uneven_batch("decoder").inputs

    def gradient(kernels: str, precision: str) -> Tensor:
        model = build_model(load_experiment("decllm-tiny", [*SMALL, "model.decoder.layers=1"]).model).train()
        if precision == "bf16_master":
            model.to(torch.bfloat16)
        if kernels == "compiled":
            compile_blocks(model, True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            _, taken = step(model, batch)
        return torch.cat([each.float().flatten() for each in taken.values()])

    exact, compiled = gradient("auto", "fp32"), gradient("compiled", precision)
    if precision == "fp32":
        assert (compiled - exact).norm() <= 1e-5 * exact.norm()
    else:
        assert 0 < (compiled - exact).norm() <= 1.3 * (gradient("auto", precision) - exact).norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["pretrain.training.execution.micro_batch_size=3"],
        [
            "pretrain.objective={kind: prefix_lm, split: random}",
            "pretrain.masks.prefix=bidirectional",
            "pretrain.training.dropout=0.2",
        ],
    ],
    ids=["one length", "other lengths"],
)
def test_a_resumed_compiled_run_ends_with_the_same_bits(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """Each part begins without graphs, as a new process does, and once without torch's cache of compiled code."""
    torch.set_num_threads(1)
    overrides = ["pretrain.training.execution.kernels=compiled", "model.decoder.layers=1", *overrides]
    whole = prepared_stage(Store(tmp_path / "whole"), corpus, "decllm-tiny", *overrides)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    assert run_one(whole.folder.parents[1], whole.fingerprint) == "done"
    assert (whole.result() or {})["provenance"]["kernels"] == "compiled"

    parts = prepared_stage(Store(tmp_path / "parts"), corpus, "decllm-tiny", *overrides)
    for cache, stop, state in (("cache", stops_after(5), "interrupted"), ("empty", stops_after(), "done")):
        torch._dynamo.reset()
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / cache))
        assert run_one(parts.folder.parents[1], parts.fingerprint, stop) == state
    assert numbers(parts) == numbers(whole)
    weights, expected = (load_file(stage.checkpoints / "model.safetensors") for stage in (parts, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_stage_compiles_as_its_configuration_says(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(compiled_blocks, "compile_blocks", lambda model, lengths_vary: asked.append(lengths_vary))
    cases = [("half", "compiled"), ("random", "compiled"), ("half", "auto")]
    for number, (split, kernels) in enumerate(cases):
        stage = prepared_stage(
            Store(tmp_path / str(number)), corpus, "decllm-tiny", "pretrain.training.max_steps=3",
            f"pretrain.objective={{kind: prefix_lm, split: {split}}}", f"pretrain.training.execution.kernels={kernels}",
        )  # fmt: skip
        assert run_one(stage.folder.parents[1], stage.fingerprint) == "done"
        assert (stage.result() or {})["provenance"]["kernels"] == kernels
    assert asked == [False, True]


def test_without_a_compiler_a_stage_is_eager_and_says_so_once(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result is comparable with those of `auto`, whose numbers it has."""
    torch.set_num_threads(1)
    monkeypatch.setenv("CXX", "no-such-compiler")
    stages = [
        prepared_stage(
            Store(tmp_path / kernels), corpus, "decllm-tiny", f"pretrain.training.execution.kernels={kernels}"
        )
        for kernels in ("auto", "compiled")
    ]
    for stage in stages:
        assert run_one(stage.folder.parents[1], stage.fingerprint) == "done"
    assert numbers(stages[0]) == numbers(stages[1])
    assert (stages[1].result() or {})["provenance"]["kernels"] == "auto"
    notes = [note for note in stages[1].status()["notes"] if "compiled" in note]
    assert len(notes) == 1
    assert "no-such-compiler" in notes[0]

"""`kernels: flex` computes masked attention in training steps alone, and is refused where it cannot be computed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from lit_llm.experiment.load import load_experiment
from lit_llm.models.families import LanguageModel
from lit_llm.models.stacks import Stack
from lit_llm.runs.kernels import kernels_note
from lit_llm.runs.run_one_stage import run_one
from lit_llm.store.store import Store
from lit_llm.training import compiled_blocks
from lit_llm.training.compiled_blocks import compile_attention
from lit_llm.training.kernels import flex_obstacle
from tests.flex_on_cpu import gradients_allowed
from tests.stages_in_parts import numbers, prepared_stage
from tests.tiny_models import build
from tests.training.test_compiled_blocks import CASES, step

WIDE = "attention.head_dim=16"
"""Heads for which there are kernels."""
BY_TORCH = ["causal", "shared bias", "bias of each layer"]
"""Cases that FlexAttention does not compute."""
BY_FLEX = [
    "open tokens", "window and documents", "softcap, grouped heads", "alibi", "partial of each row", "yoco",
    "redllm, ragged", "redllm, documents", "merged", "double decoder",
]  # fmt: skip
FAST = ["causal", "bias of each layer", "window and documents", "alibi", "yoco", "merged"]


@pytest.fixture(scope="module")
def counter() -> Iterator[CompileCounterWithBackend]:
    with gradients_allowed() as counts:
        yield counts


def with_flex(model: LanguageModel, counter: CompileCounterWithBackend, recompute: bool = False) -> LanguageModel:
    copied = copy.deepcopy(model).train()
    compile_attention(copied, True, counter)
    for module in copied.modules():
        if isinstance(module, Stack):
            module.recompute = recompute
    counter.clear()
    return copied


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in BY_TORCH + BY_FLEX]
)
def test_a_model_has_the_gradient_of_the_other_kernels(case: str, counter: CompileCounterWithBackend) -> None:
    """In float64 and by torch's formulas; FlexAttention takes part where a mask, a cap or ALiBi is to be computed."""
    family, overrides, batches, _ = CASES[case]
    model = build(family, *overrides, WIDE)
    wanted, expected = step(model.train(), batches[0])
    for recompute in (False, True) if case == "window and documents" else (False,):
        total, found = step(with_flex(model, counter, recompute), batches[0])
        assert bool(counter.frame_count) == (case in BY_FLEX)
        assert total == pytest.approx(wanted, rel=1e-10)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(found[name], gradient, rtol=1e-8, atol=1e-11)


def test_evaluations_and_narrow_heads_are_left_to_the_other_kernels(counter: CompileCounterWithBackend) -> None:
    family, overrides, batches, _ = CASES["documents"]
    model = with_flex(build(family, *overrides, WIDE), counter)
    model.eval()(**batches[0])
    narrow = with_flex(build(family, *overrides), counter)
    narrow(**batches[0])
    assert counter.frame_count == 0


def test_what_is_left_to_the_other_kernels_is_said_in_a_line() -> None:
    flex = "pretrain.training.execution.kernels=flex"
    assert kernels_note(load_experiment("decllm-tiny", [flex, "model.attention.window=8"]), "pretrain") == ""
    learned = load_experiment("redllm-tiny", [flex, "model.attention.relative_bias=shared"])
    note = kernels_note(learned, "pretrain")
    assert note.startswith("2 of 3 kinds of attention are not computed by FlexAttention: the gradient of a learned")
    narrow = load_experiment("decllm-tiny", [flex, "model.attention.head_dim=8"])
    assert "heads of 8 entries" in kernels_note(narrow, "pretrain")


def test_the_obstacles_name_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "run it on a GPU, or set kernels to auto in all arms" in flex_obstacle(on_gpu=False)
    for installed, obstacle in ((True, ""), (False, "pip install triton")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, there=installed: there or None)
        assert obstacle in flex_obstacle(on_gpu=True)
        assert bool(flex_obstacle(on_gpu=True)) == bool(obstacle)


@pytest.mark.slow
def test_a_stage_trains_with_flex_and_says_so(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, counter: CompileCounterWithBackend
) -> None:
    """Judge: the training by the other kernels, which rounds otherwise."""
    monkeypatch.setattr(compiled_blocks, "kernel_obstacle", lambda kernels, on_gpu: "")
    monkeypatch.setattr(compiled_blocks, "compile_attention", partial(compile_attention, backend=counter))
    counter.clear()
    stages = {}
    for kernels in ("auto", "flex"):
        stages[kernels] = prepared_stage(
            Store(tmp_path / kernels), corpus, "decllm-tiny", "pretrain.masks.intra_document=true",
            "pretrain.training.max_steps=4", f"model.{WIDE}", f"pretrain.training.execution.kernels={kernels}",
        )  # fmt: skip
        assert run_one(stages[kernels].folder.parents[1], stages[kernels].fingerprint) == "done"
        assert (stages[kernels].result() or {})["provenance"]["kernels"] == kernels
    assert counter.frame_count == 1
    for (_, found), (_, wanted) in zip(numbers(stages["flex"]), numbers(stages["auto"]), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)

"""`kernels: liger` is taken in training steps alone, and like `flex` and `fla` refused where it cannot be computed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lit_llm.components import liger
from lit_llm.components.liger import liger_kernels
from lit_llm.config.problems import InputError
from lit_llm.studies.load import load_study
from lit_llm.studies.preflight import check_kernels
from lit_llm.training.kernels import kernel_obstacle
from lit_llm.training.module import LitModel
from tests.commands import lit_llm
from tests.training.test_step import stepped, uneven_batch

FUNCTIONS = ("rms_norm", "rotate", "gated", "target_loss")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions of `liger` that were called. Ours compute in their place, as Liger's need a GPU."""
    from lit_llm.components.embedding.module import Unembedding
    from lit_llm.components.loss.module import LossWeights, target_loss
    from lit_llm.components.norm.module import rms_norm
    from lit_llm.components.rope import rotate

    names: list[str] = []

    def loss(hidden_ND: torch.Tensor, output: tuple, targets_N: torch.Tensor, squares: float) -> tuple:
        targets = targets_N[None], torch.arange(len(targets_N))
        return tuple(target_loss(hidden_ND[None], Unembedding(*output), targets, LossWeights(squares=squares)))[:3]

    def spied(name: str, function: Callable) -> Callable:
        def spy(*arguments: object) -> object:
            names.append(name)
            with liger_kernels(False):
                return function(*arguments)

        return spy

    ours = (rms_norm, rotate, lambda _, gate, up: torch.nn.functional.silu(gate) * up, loss)
    for name, function in zip(FUNCTIONS, ours, strict=True):
        monkeypatch.setattr(liger, name, spied(name, function))
    return names


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_liger_computes_the_steps_that_ask_for_it_and_nothing_else(family: str, called: list[str]) -> None:
    """Judge: the gradient by ours, to the bit. Checkpointed layers are computed again in the backward pass."""
    batch = uneven_batch("decoder" if family == "decllm" else "encoder_decoder")
    _, wanted = stepped(family, batch, z_loss=1e-3)
    assert not called
    lit, found = stepped(family, batch, z_loss=1e-3, execution={"kernels": "liger"})
    once = {name: called.count(name) for name in FUNCTIONS}
    assert all(once.values())
    assert once["target_loss"] == 1
    called.clear()
    _, again = stepped(family, batch, z_loss=1e-3, execution={"kernels": "liger", "activation_checkpointing": True})
    assert called.count("gated") == 2 * once["gated"]
    assert called.count("target_loss") == 1
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name
        assert torch.equal(again[name], gradient), name
    called.clear()
    assert isinstance(lit, LitModel)
    with torch.no_grad():
        lit.model.eval().hidden(**batch.inputs)
    assert not called, "evaluations"


def test_after_an_error_the_kernels_are_ours() -> None:
    with pytest.raises(ZeroDivisionError), liger_kernels(True):
        1 / (not liger.uses_liger())
    assert not liger.uses_liger()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the packages that are absent; none at first. Triton's interpreter is off."""
    absent, find = set[str](), importlib.util.find_spec

    def found(name: str) -> object:
        if name not in ("triton", "liger_kernel", "fla"):
            return find(name)
        return None if name in absent else find("sys")

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", found)
    return absent


@pytest.mark.parametrize(("kernels", "own_package"), [("liger", "liger_kernel"), ("fla", "fla")])
def test_the_obstacles_name_the_next_step(
    kernels: str, own_package: str, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernel_obstacle(kernels, on_gpu=True) == ""
    assert "need a CUDA device" in kernel_obstacle(kernels, on_gpu=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel_obstacle(kernels, on_gpu=False) == ""
    for package in ("triton", own_package):
        installed.clear()
        installed.add(package)
        assert "pip install -e '.[gpu]'" in kernel_obstacle(kernels, on_gpu=True)


@pytest.mark.parametrize(
    ("triton", "capability", "refused"),
    [
        ("3.3.1", (9, 0), False),
        ("3.4.0", (9, 0), True),
        ("3.7.0+git9844da95", (9, 0), True),
        ("3.7.1", (9, 0), False),
        ("3.6.0", (8, 0), False),
        ("3.6.0", (10, 0), False),
    ],
)
def test_fla_is_refused_on_hopper_by_the_tritons_that_it_refuses_itself(
    triton: str, capability: tuple[int, int], refused: bool, installed: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its first backward pass would raise an error (`chunk_bwd_dqkwg`)."""
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    obstacle = kernel_obstacle("fla", on_gpu=True)
    assert bool(obstacle) == refused
    assert not refused or (triton in obstacle and "install triton 3.7.1 or later" in obstacle)
    assert kernel_obstacle("liger", on_gpu=True) == ""


@pytest.mark.parametrize(
    ("kernels", "message"),
    [("liger", "need a CUDA device"), ("flex", "trains on a CUDA device"), ("fla", "need a CUDA device")],
)
def test_a_study_that_cannot_have_its_kernels_is_refused_before_anything_starts(
    kernels: str,
    message: str,
    write_study: Callable[..., Path],
    tmp_path: Path,
    installed: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lit_llm.studies.preflight.visible_gpus", list)
    arms = f"arms:\n  red: {{}}\n  fast: {{pretrain: {{training: {{execution: {{kernels: {kernels}}}}}}}}}"
    path = write_study("fused", arms)
    done = lit_llm("run", path, "--store", tmp_path / "store")
    assert done.returncode == 2
    printed = " ".join(done.stderr.split())
    assert "pretrain.training.execution.kernels" in printed
    assert message in printed
    assert not (tmp_path / "store").exists()
    monkeypatch.setattr("lit_llm.studies.preflight.visible_gpus", lambda: ["0"])
    check_kernels(load_study(path, ["pretrain.training.execution.accelerator=auto"]))
    with pytest.raises(InputError, match=message):
        check_kernels(load_study(path, ["pretrain.training.execution.accelerator=cpu"]))


def test_a_stage_that_cannot_have_liger_fails_with_the_reason(
    installed: set[str], tmp_path: Path, corpus: Path
) -> None:
    from lit_llm.runs.run_one_stage import run_one
    from lit_llm.store.store import Store
    from tests.stages_in_parts import prepared_stage

    how = [f"pretrain.training.execution.{key}" for key in ("accelerator=cpu", "kernels=liger")]
    stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny", *how)
    assert run_one(stage.folder.parents[1], stage.fingerprint) == "failed"
    assert "need a CUDA device" in str(stage.status())

"""The parts of a training step: their FLOPs against the formulas, their times against the clock."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from lit_llm.components.attention import module as attention_module
from lit_llm.components.norm import module as norm_module
from lit_llm.components.rope import rotate
from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.runs import step_profile
from lit_llm.runs.step_profile import WAITING, profile_step
from lit_llm.training.module import LitModel
from tests.commands import lit_llm

D, D_FF, LAYERS, V, T, B = 32, 64, 2, 258, 16, 2
SMALL = [
    f"model.d_model={D}",
    f"model.feed_forward.d_ff={D_FF}",
    f"model.vocabulary={V}",
    f"pretrain.data.sequence_length={T}",
    f"pretrain.data.batch_size={B}",
    "pretrain.data.tokenizer=bytes",
    "pretrain.training.stability.logit_every=0",
]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    trace = tmp_path_factory.mktemp("trace") / "step.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_profile, "product_ceiling", lambda *_: 1e12)
        patch.setattr(step_profile, "copy_ceiling", lambda *_: 1e10)
        experiment = load_experiment("decllm-tiny", [*SMALL, f"model.decoder.layers={LAYERS}"])
        return profile_step(experiment, "pretrain", 2, trace), trace


def test_the_products_of_each_part_have_the_flops_of_the_formula(profiled):
    """A forward and two backward products for each matrix, a multiply-add as 2."""
    flops = {part.name: part.flops for part in profiled[0].parts if part.flops and part.name != "attention"}
    each = 3 * 2 * B * T
    assert flops == {
        "projections": each * LAYERS * 4 * D * D,
        "feed forward": each * LAYERS * 3 * D * D_FF,
        "loss": each * V * D,
    }


def test_compiled_blocks_are_not_profiled_and_the_message_says_how():
    experiment = load_experiment("decllm-tiny", ["pretrain.training.execution.kernels=compiled"])
    with pytest.raises(InputError, match=r"-o pretrain\.training\.execution\.kernels=auto"):
        profile_step(experiment, "pretrain", 2)


def test_the_parts_add_up_to_the_step_and_each_has_taken_time(profiled):
    result, _ = profiled
    assert sum(part.seconds for part in result.parts) == pytest.approx(result.seconds, rel=1e-6)
    assert result.parts[-1].name == WAITING
    seconds = {part.name: part.seconds for part in result.parts}
    wanted = {"attention", "projections", "feed forward", "norms", "rotation", "loss", "clipping", "optimiser", "data"}
    assert wanted | {"embedding"} <= seconds.keys()
    assert all(seconds[name] > 0 for name in wanted)
    assert all(0 <= part.product_seconds <= part.seconds for part in result.parts)


def test_the_trace_shows_the_parts(profiled):
    names = {event.get("name") for event in json.loads(profiled[1].read_text())["traceEvents"]}
    assert {"part: loss", "part: attention", "part: feed forward", "aten::mm"} <= names


def test_afterwards_nothing_is_hooked_or_replaced(profiled):
    assert attention_module.rotate is rotate
    assert attention_module.rms_norm is norm_module.rms_norm
    for method in (LitModel._losses, LitModel._clip):
        assert method.__qualname__ == f"LitModel.{method.__name__}"
        assert not hasattr(method, "__wrapped__")


def test_recomputed_layers_count_for_their_parts(monkeypatch):
    """One forward pass more: four products for each matrix of a layer in place of three."""
    monkeypatch.setattr(step_profile, "product_ceiling", lambda *_: 1e12)
    monkeypatch.setattr(step_profile, "copy_ceiling", lambda *_: 1e10)
    overrides = [*SMALL, f"model.decoder.layers={LAYERS}", "pretrain.training.execution.activation_checkpointing=true"]
    parts = profile_step(load_experiment("decllm-tiny", overrides), "pretrain", 1).parts
    flops = {part.name: part.flops for part in parts}
    assert flops["projections"] == 4 * 2 * B * T * LAYERS * 4 * D * D


def test_on_a_gpu_a_kernel_counts_once_for_the_operation_that_launched_it():
    def event(name, device_type, microseconds, parent=None):
        return SimpleNamespace(
            name=name,
            device_type=device_type,
            cpu_parent=parent,
            sequence_nr=-1,
            self_device_time_total=microseconds,
            self_cpu_time_total=1.0,
            flops=0,
        )

    loss = event("part: loss", DeviceType.CPU, 0.0)
    events: list[Any] = [
        loss,
        event("aten::mm", DeviceType.CPU, 50.0, loss),
        event("Optimizer.step#AdamW.step", DeviceType.CPU, 30.0),
        event("gemm_kernel", DeviceType.CUDA, 50.0),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, 30.0),
    ]
    parts = {part.name: part.seconds for part in step_profile._parts(events, {}, (1, 1e-4), on_gpu=True)}
    assert parts == pytest.approx({"loss": 50e-6, "optimiser": 30e-6, WAITING: 20e-6})


def test_a_component_is_a_part_by_its_own_name():
    model = build_model(load_experiment("yoco-tiny", ["model.self_decoder.retention={}"]).model)
    names = {name for _, name in step_profile._named_parts(model)}
    assert names == {"embedding", "norms", "retention", "feed forward", "projections", "attention", "attention, other"}


def test_profile_prints_a_table_and_its_json(monkeypatch):
    monkeypatch.setattr(step_profile, "product_ceiling", lambda *_: 2e9)
    monkeypatch.setattr(step_profile, "copy_ceiling", lambda *_: 1e10)
    overrides = [word for override in SMALL for word in ("-o", override)]
    shown = lit_llm("profile", "decllm-tiny", *overrides, "--steps", 1)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[1].split() == ["part", "ms", "share", "FLOP/s", "of", "products", "of", "ceiling"]
    assert any(line.startswith("step") and "100%" in line for line in lines)
    assert "2GFLOP/s in a product" in shown.stdout
    as_json = lit_llm("profile", "redllm-tiny", *overrides, "--steps", 1, "--json")
    assert {part["name"] for part in json.loads(as_json.stdout)["parts"]} > {"attention", "loss"}


def test_a_training_that_is_not_there_is_named():
    refused = lit_llm("profile", "decllm-tiny", "--stage", "finetune")
    assert refused.returncode == 2
    assert "'finetune' is no training of decllm-tiny - allowed here: pretrain" in refused.stderr

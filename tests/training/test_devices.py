"""Several devices train as one does: the judge is the curve of one process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_llm.experiment.load import load_experiment
from lit_llm.training.config import TrainingConfig
from lit_llm.training.devices import shard
from lit_llm.training.memory import block_parameters, sharded_state_bytes
from tests.training.rank_processes import Case, Run, on_ranks, train, train_all

# Ranks share two cores with the other tests: one worker at a time.
pytestmark = pytest.mark.xdist_group("ranks")

MICRO = {"micro_batch_size": 1, "activation_checkpointing": True}
FEW = [
    # Five rows for two ranks: three and two, each a micro-batch.
    Case("micro_batches", rows=5, training={"execution": MICRO, "z_loss": 1e-3}),
    Case("fewer_rows_than_ranks", rows=1, training={"execution": MICRO}),
    Case("thaws", "redllm-tiny", warmup_steps=3),
    Case("merged", "t5gemma2-tiny", training={"clip_norm": None}, strategies=("fsdp",)),
    # Shares are those of a micro-batch, which is one row here, however many ranks there are.
    Case(
        "experts",
        "redllm-tiny",
        ("model.encoder.experts={count: 4, balance: bias}", "model.decoder.experts={count: 3, shared_d_ff: 8}"),
        {"execution": {"micro_batch_size": 1}},
        rows=5,
    ),
    Case("muon", "redllm-tiny", training={"optimizer": {"kind": "muon"}}, within=1e-3, strategies=("fsdp",)),
    Case("factored", training={"optimizer": {"kind": "adafactor_factored", "weight_decay": 0.1}}, strategies=("fsdp",)),
    Case("masters", training={"precision": "bf16_master"}, within=1e-2, strategies=("fsdp",)),
    Case("average", "redllm-tiny", training={"weight_averaging": {"kind": "ema", "decay": 0.7}}),
]
"""Those of the fast suite."""
MANY = [
    Case("decllm"),
    Case("redllm", "redllm-tiny"),
    Case("yoco", "yoco-tiny"),
    Case("double_decoder", "doubledecoder-tiny"),
    Case("retention", "yoco-tiny", ("model.self_decoder.retention=gated",)),
    Case(
        "mixers", model=('model.decoder.layer_ranges={"0": {gla: {}}, "1": {gated_deltanet: {}}, "2": {mamba2: {}}}',)
    ),
    Case("partial_attention", model=("model.decoder.partial_attention=palm", "pretrain.objective=prefix_lm")),
    Case("value_residual", "redllm-tiny", ("model.attention.value_residual=learned",)),
    Case(
        "convolutions",
        "redllm-tiny",
        ("model.attention.convolution=[input, qkv]", "model.feed_forward.convolution=[input, hidden]"),
    ),
    Case("tied_layers", "redllm-tiny", ("model.tie_layers=true",), strategies=("ddp",)),
    Case("future_tokens", "redllm-tiny", ("model.output.future_tokens=2",)),
    Case("modernbert", "modernbert-tiny"),
    Case("t5gemma", "t5gemma-tiny"),
    Case("ul2", "ul2-tiny"),
    Case("untied", "redllm-tiny", ("model.tie_embeddings=none",)),
    Case("adafactor", training={"optimizer": {"kind": "adafactor", "weight_decay": 0.1}}),
    Case("factored", training={"optimizer": {"kind": "adafactor_factored"}}, strategies=("ddp",)),
    Case("muon", training={"optimizer": {"kind": "muon"}}, within=1e-3),
    Case("8_bit", training={"optimizer": {"kind": "adamw_8bit"}}, strategies=("ddp",)),
    Case("masters", training={"precision": "bf16_master"}, within=1e-2, strategies=("ddp",)),
    Case("masters_muon", training={"precision": "bf16_master", "optimizer": {"kind": "muon"}}, within=1e-2),
    Case(
        "average_of_masters",
        training={"precision": "bf16_master", "weight_averaging": {"kind": "last_k", "k": 2, "every": 2}},
        within=1e-2,
    ),
    Case("bf16", training={"precision": "bf16"}, within=1e-2),
    Case("teacher", "redllm-tiny", distill=True),
    Case("rezero_mup", model=("model.residual=rezero", "model.parametrization={kind: mup, base_width: 8}")),
]


@cache
def alone(case: Case) -> dict[str, Any]:
    """The same training in this process."""
    with tempfile.TemporaryDirectory() as folder:
        trained: dict[str, Any] = train(case, Path(folder))
        return trained


def runs_of(cases: Sequence[Case]) -> list[Run]:
    return [Run(case, strategy) for case in cases for strategy in case.strategies]


def check_equal(trained: dict[str, Any], case: Case) -> None:
    """Losses within the case's bound; norms, which scale with the gradient, within ten times of it."""
    judge = alone(case)
    assert trained["train"] == pytest.approx(judge["train"], rel=case.within)
    assert trained["validation"] == pytest.approx(judge["validation"], rel=case.within)
    assert trained["norm"] == pytest.approx(judge["norm"], rel=10 * case.within)
    assert trained["teacher"] == pytest.approx(judge["teacher"], rel=10 * case.within)
    assert trained["logit"] == pytest.approx(judge["logit"], rel=10 * case.within)
    assert trained["busiest"] == pytest.approx(judge["busiest"], rel=10 * case.within)
    assert trained["loss_tokens"] == judge["loss_tokens"]
    assert trained["weights"].keys() == judge["weights"].keys()


@pytest.fixture(scope="module")
def few() -> list[Any]:
    trained: list[Any] = on_ranks(2, train_all, runs_of(FEW))[0]
    return trained


@pytest.mark.parametrize("number", range(len(runs_of(FEW))), ids=[f"{r.case.name}_{r.strategy}" for r in runs_of(FEW)])
def test_two_ranks_train_as_one_process_does(few: list[Any], number: int) -> None:
    check_equal(few[number], runs_of(FEW)[number].case)


@pytest.mark.slow
def test_two_ranks_train_every_family_by_every_optimiser_as_one_process_does() -> None:
    runs = runs_of(MANY)
    for run, trained in zip(runs, on_ranks(2, train_all, runs)[0], strict=True):
        try:
            check_equal(trained, run.case)
        except AssertionError as error:
            raise AssertionError(f"{run.case.name} by {run.strategy}") from error


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_any_number_of_devices_and_any_strategy(tmp_path: Path) -> None:
    """Written by two ranks after step 3 of 6, by FSDP2 or DDP: the rest is that of a training without a stop."""
    optimizers = ("adamw", "adafactor_factored", "muon")
    cases = [
        Case(kind, training={"optimizer": {"kind": kind}}, within=1e-3 if kind == "muon" else 1e-5)
        for kind in optimizers
    ]
    averaged = {"weight_averaging": {"kind": "ema", "decay": 0.7}}
    cases += [Case("masters", training={"precision": "bf16_master", **averaged}, within=1e-2)]
    written = [Run(case, "fsdp", tmp_path / case.name, 3) for case in cases]
    written.append(Run(cases[0], "ddp", tmp_path / "ddp", 3))
    for run in written:
        assert run.folder is not None
        run.folder.mkdir()
    assert on_ranks(2, train_all, written)[0] == [("interrupted", 3)] * len(written)
    by_one = tmp_path / "one"
    by_one.mkdir()
    assert train(cases[2], by_one, stop_after=3) == ("interrupted", 3)
    resumed = []
    for number, run in enumerate([*written, Run(cases[2], "fsdp", by_one)]):
        assert run.folder is not None
        for strategy in ("fsdp", "ddp")[number % 2 :]:
            copy = run.folder.with_name(f"{run.folder.name}_on_four_{strategy}")
            shutil.copytree(run.folder, copy)
            resumed.append(Run(run.case, strategy, copy))
    for run, trained in zip(resumed, on_ranks(4, train_all, resumed)[0], strict=True):
        check_equal(trained, run.case)
    for run in written:
        assert run.folder is not None
        check_equal(train(run.case, run.folder), run.case)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_device_has_nothing_to_share(tmp_path: Path, strategy: str) -> None:
    trained, judge = train(FEW[0], tmp_path, strategy=strategy), alone(FEW[0])
    assert trained["train"] == judge["train"]


def test_one_device_is_deaf_to_the_variables_of_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning refuses these, or takes this process for a later rank that writes nothing."""
    cluster = {
        "SLURM_NTASKS": "2", "SLURM_JOB_NAME": "study", "SLURM_JOB_ID": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1", "SLURM_NODELIST": "node[1-2]", "SLURM_STEP_ID": "0", "RANK": "1", "LOCAL_RANK": "1",
        "WORLD_SIZE": "2", "NODE_RANK": "1", "GROUP_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "1",
    }  # fmt: skip
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    assert train(FEW[0], tmp_path)["train"] == alone(FEW[0])["train"]


def test_moments_in_8_bits_cannot_be_sharded() -> None:
    """Refused where the configuration is read, with the next step; also within Muon, and not on one device."""
    for optimizer in ({"kind": "adamw_8bit"}, {"kind": "muon", "adamw": {"kind": "adamw_8bit"}}):
        several = {"devices": 2, "strategy": "fsdp"}
        settings: dict[str, Any] = {"max_steps": 1, "schedule": {"kind": "constant"}, "optimizer": optimizer}
        with pytest.raises(ValueError, match="fsdp does not work with adamw_8bit.*use `strategy: ddp`"):
            TrainingConfig.model_validate({**settings, "execution": several})
        for execution in ({**several, "devices": 1}, {**several, "strategy": "ddp"}):
            TrainingConfig.model_validate({**settings, "execution": execution})


def counted_bytes(group: Any, preset: str) -> tuple[int, int]:
    """Bytes of this rank's parameters, gradients and moments after a step, and of what it has whole within a block."""
    from lit_llm.models.build import build_model
    from lit_llm.training.optimizers.build import build_optimizer
    from lit_llm.training.optimizers.config import AdamW
    from lit_llm.training.optimizers.shards import local_rows

    with group.connected("cpu"):
        model = build_model(load_experiment(preset).model)
        shard(model, torch.distributed.init_device_mesh("cpu", (group.ranks,)))
        optimizer, largest = build_optimizer(AdamW(), model), 0

        def count(*_: Any) -> None:
            nonlocal largest
            whole = [p for p in model.parameters() if local_rows(p) is p and p.untyped_storage().size()]
            largest = max(largest, sum(p.numel() * p.element_size() for p in whole))

        for block in model.decoder.layers:
            block.register_forward_hook(count, prepend=True)
        model.hidden(torch.randint(2, 200, (2, 8))).sum().backward()
        optimizer.step()
        held = [local_rows(t) for p in model.parameters() for t in (p, p.grad) if t is not None]
        held += [local_rows(v) for state in optimizer.state.values() for v in state.values() if v.dim()]
        return sum(t.numel() * t.element_size() for t in held), largest


@pytest.mark.slow
def test_a_sharded_state_takes_the_bytes_of_the_plan() -> None:
    """The state of both ranks is that of one device; beside it a rank has what is outside of blocks, and a block."""
    from lit_llm.models.cost import count_parameters
    from lit_llm.models.resolve import resolve_model

    model = resolve_model(load_experiment("decllm-tiny").model)
    counted = on_ranks(2, counted_bytes, "decllm-tiny")
    parameters, blocks = count_parameters(model).total, block_parameters(model)
    assert sum(state for state, _ in counted) == 16 * parameters
    outside = parameters - sum(blocks)
    assert {whole for _, whole in counted} == {4 * (outside + max(blocks))}
    config = TrainingConfig(max_steps=1)
    # Parameters and gradients of two blocks, since the next is gathered meanwhile.
    whole = 2 * 4 * (outside + sum(sorted(blocks)[-2:]))
    assert sharded_state_bytes(model, config, 2, synchronised=True) == 8 * parameters + whole
    assert sharded_state_bytes(model, config, 2, synchronised=False) - 8 * parameters == whole / 2 + 4 * parameters

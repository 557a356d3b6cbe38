"""Interrupted and resumed equals uninterrupted, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lit_llm.runs.run_one_stage import run_one
from lit_llm.store.store import Store, read_json, write_json
from lit_llm.training import stability, throughput
from tests.stages_in_parts import numbers, prepared_stage, stops_after

GROWING = "pretrain.training.sequence_warmup={begin: 8, steps: 8}"
MASTERS = "pretrain.training.precision=bf16_master"
# Masks, objectives and rows differ between families, and optimisers and averages do not.
RESUMED = {
    "plain": ("both", []),
    "random_split_micro_batches_groups": ("both", [
        "pretrain.objective={kind: prefix_lm, split: random}", "pretrain.training.execution.micro_batch_size=3",
        "pretrain.training.optimizer.lr_groups={embeddings: 0.1}",
        "model.parametrization={kind: mup, base_width: 16, base_head_dim: 4}",
    ]),
    "workers_bf16": ("dec", ["pretrain.training.execution.workers=2", "pretrain.training.precision=bf16"]),
    "dropout_checkpointing": ("both", [
        "pretrain.training.dropout=0.2", "pretrain.training.attention_dropout=0.1",
        "pretrain.training.feed_forward_dropout=0.1", "pretrain.training.execution.micro_batch_size=3",
        "pretrain.training.execution.activation_checkpointing=true",
    ]),
    "masters_growing_rows": ("both", [MASTERS, "pretrain.training.dropout=0.2", GROWING]),
    "masters_muon": ("red", [MASTERS, "pretrain.training.optimizer=muon", "model.norm.scale=true"]),
    "adafactor_wsd": ("dec", [
        "pretrain.training.optimizer=adafactor", "pretrain.training.schedule={kind: wsd, decay_steps: 5}"
    ]),
    "factored": ("red", ["pretrain.training.optimizer=adafactor_factored"]),
    "8_bit": ("dec", ["pretrain.training.optimizer=adamw_8bit", "model.feed_forward.d_ff=512"]),
    "muon": ("dec", ["pretrain.training.optimizer=muon", "model.norm.scale=true"]),
    "ema_masters": ("red", ["pretrain.training.weight_averaging=ema", MASTERS]),
    "last_k": ("dec", ["pretrain.training.weight_averaging={kind: last_k, k: 4, every: 3}"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        pytest.param(f"{family}llm-tiny", overrides, id=f"{name}-{family}llm")
        for name, (families, overrides) in RESUMED.items()
        for family in (("dec", "red") if families == "both" else (families,))
    ],
)
def test_two_interruptions_change_no_bit(tmp_path: Path, corpus: Path, preset: str, overrides: list[str]) -> None:
    """The batches, the optimiser's moments, spike statistics and metrics all go on where they stopped."""
    torch.set_num_threads(1)
    whole = prepared_stage(Store(tmp_path / "whole"), corpus, preset, *overrides)
    assert run_one(whole.folder.parents[1], whole.fingerprint) == "done"

    parts = prepared_stage(Store(tmp_path / "parts"), corpus, preset, *overrides)
    root = parts.folder.parents[1]
    assert run_one(root, parts.fingerprint, stops_after(5)) == "interrupted"
    assert parts.status()["state"] == "interrupted"
    assert run_one(root, parts.fingerprint, stops_after(4)) == "interrupted"
    assert run_one(root, parts.fingerprint) == "done"

    assert numbers(parts) == numbers(whole)
    weights, expected = (load_file(stage.checkpoints / "model.safetensors") for stage in (parts, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    result, wanted = parts.result(), whole.result()
    assert result is not None
    assert wanted is not None
    assert [result[key] for key in ("steps", "tokens", "loss_tokens", "flops")] == [
        wanted[key] for key in ("steps", "tokens", "loss_tokens", "flops")
    ]


def test_the_loss_at_initialisation_is_measured_once_and_kept_over_a_resume(tmp_path: Path, corpus: Path) -> None:
    """A mark in its place shows that nothing measures it again; other code begins anew, and does."""
    whole = prepared_stage(Store(tmp_path / "whole"), corpus, "redllm-tiny")
    run_one(whole.folder.parents[1], whole.fingerprint)
    measured = (whole.result() or {})["initial"]
    assert measured["val/target_nll"] > (whole.result() or {})["metrics"]["val/target_nll"]
    for code, expected in (("this", {"val/target_nll": 123.0}), ("other", measured)):
        parts = prepared_stage(Store(tmp_path / code), corpus, "redllm-tiny")
        root = parts.folder.parents[1]
        assert run_one(root, parts.fingerprint, stops_after(5)) == "interrupted"
        kept = parts.checkpoints / "initial.json"
        assert read_json(kept) == measured
        kept.write_text('{"val/target_nll": 123.0}')
        note = parts.checkpoints / "provenance.json"
        if code == "other":
            write_json(note, {**(read_json(note) or {}), "threads": 2}, signed=True)
        assert run_one(root, parts.fingerprint) == "done"
        assert (parts.result() or {})["initial"] == expected


def test_the_first_step_is_a_training_step_with_dropout(tmp_path: Path, corpus: Path) -> None:
    """The model is evaluated before it: of two that begin equal, the one with dropout has another first loss."""
    losses = []
    for dropout in (0.0, 0.5):
        more = [f"pretrain.training.dropout={dropout}", "pretrain.training.execution.log_every=1"]
        stage = prepared_stage(Store(tmp_path / str(dropout)), corpus, "decllm-tiny", *more)
        run_one(stage.folder.parents[1], stage.fingerprint)
        losses.append(numbers(stage)[0][1]["train/loss"])
    assert losses[0] != losses[1]


def test_a_run_is_given_up_at_the_evaluation_that_is_judged_and_can_be_gone_on_with(
    tmp_path: Path, corpus: Path
) -> None:
    """Evaluations come after steps 5, 9 and 14: the judge sees the first two, and no step is made after its yes."""
    torch.set_num_threads(1)
    whole = prepared_stage(Store(tmp_path / "whole"), corpus, "redllm-tiny")
    run_one(whole.folder.parents[1], whole.fingerprint)
    shown = [(step, found["val/target_nll"]) for step, found in numbers(whole) if "val/target_nll" in found]
    assert [step for step, _ in shown] == [5, 9, 14]

    parts = prepared_stage(Store(tmp_path / "parts"), corpus, "redllm-tiny")
    root, seen = parts.folder.parents[1], []

    def judge(step: int, found: dict[str, float]) -> bool:
        seen.append((step, found["val/target_nll"]))
        return step == 9

    assert run_one(root, parts.fingerprint, should_prune=judge) == "interrupted"
    assert seen == shown[:2]
    assert parts.status()["error"] == "pruned at step 9"
    assert numbers(parts)[-1][0] == 9
    assert run_one(root, parts.fingerprint, should_prune=judge) == "done"
    assert seen == shown[:2]
    assert numbers(parts) == numbers(whole)


def test_work_after_the_last_checkpoint_is_done_again_and_written_once(tmp_path: Path, corpus: Path) -> None:
    """A killed run has metrics beyond its last checkpoint; the resumed one overwrites them with equal ones."""
    torch.set_num_threads(1)
    every = "pretrain.training.execution.checkpoint_every=4"
    whole = prepared_stage(Store(tmp_path / "whole"), corpus, "redllm-tiny", every)
    run_one(whole.folder.parents[1], whole.fingerprint)
    killed = prepared_stage(Store(tmp_path / "killed"), corpus, "redllm-tiny", every)

    def die() -> bool:
        if next(calls) == 8:
            raise KeyboardInterrupt  # not an Exception: leaves no state behind, as a kill does
        return False

    calls = iter(range(100))
    with pytest.raises(BaseException):  # noqa: B017 - Lightning turns it into its own
        run_one(killed.folder.parents[1], killed.fingerprint, die)
    assert (killed.checkpoints / "last.ckpt").exists()
    assert run_one(killed.folder.parents[1], killed.fingerprint) == "done"
    assert numbers(killed) == numbers(whole)


def test_a_finished_stage_is_never_run_again(tmp_path: Path, corpus: Path) -> None:
    stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny")
    assert run_one(tmp_path, stage.fingerprint) == "done"
    before = stage.metrics_file.stat().st_mtime_ns
    assert run_one(tmp_path, stage.fingerprint) == "done"
    assert stage.metrics_file.stat().st_mtime_ns == before
    assert not (stage.checkpoints / "last.ckpt").exists()


def test_a_run_that_does_not_fit_into_memory_says_so(tmp_path: Path, corpus: Path) -> None:
    """A hundred terabytes of parameters: the allocator refuses, and the refusal is told apart from a fault."""
    wide = ["model.d_model=4000000", "model.attention.heads=2", "model.feed_forward.d_ff=4000000"]
    stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny", *wide)
    assert run_one(tmp_path, stage.fingerprint) == "out_of_memory"
    assert stage.status()["state"] == "out_of_memory"
    assert stage.result() is None


def test_a_learning_rate_beyond_reason_diverges_as_a_result(tmp_path: Path, corpus: Path) -> None:
    stage = prepared_stage(
        Store(tmp_path), corpus, "decllm-tiny", "pretrain.training.optimizer.lr=1e20", "model.attention.qkv_norm=[]"
    )
    assert run_one(tmp_path, stage.fingerprint) == "diverged"
    result = stage.result()
    assert result is not None
    assert result["steps"] < 14
    assert "step" in result["error"] or "above its first value" in result["error"]


def test_a_checkpoint_of_other_code_is_not_gone_on_from(tmp_path: Path, corpus: Path) -> None:
    """Half a run by one code and half by another would be stamped as wholly the second's."""
    stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny")
    assert run_one(tmp_path, stage.fingerprint, stops_after(5)) == "interrupted"
    note = stage.checkpoints / "provenance.json"
    write_json(note, {**(read_json(note) or {}), "threads": 2}, signed=True)
    steps = []

    def count() -> bool:
        steps.append(1)
        return False

    assert run_one(tmp_path, stage.fingerprint, count) == "done"
    assert len(steps) == 1 + 13  # asked once before it begins and after all steps but the last: from the start


def test_a_run_over_a_mixture_resumes_bit_for_bit(tmp_path: Path, corpus: Path) -> None:
    """Sources, their passes and their validation go on where they stopped, whatever the loader's workers."""
    torch.set_num_threads(1)
    sources = ", ".join(
        f'{name}: {{corpus: {{kind: text, files: ["{corpus}/{some}*.txt"]}}, weight: {weight}}}'
        for name, some, weight in (("first", "[01]", 2), ("second", "[23]", 1))
    )
    mixture = f"pretrain.data.corpus={{kind: mixture, sources: {{{sources}}}}}"
    untested = "pretrain.data.test_fraction=0"  # some sources have no such document
    whole = prepared_stage(Store(tmp_path / "whole"), corpus, "redllm-tiny", mixture, untested)
    assert run_one(whole.folder.parents[1], whole.fingerprint) == "done"
    parts = prepared_stage(
        Store(tmp_path / "parts"), corpus, "redllm-tiny", mixture, untested, "pretrain.training.execution.workers=2"
    )
    assert parts.fingerprint == whole.fingerprint
    root = parts.folder.parents[1]
    assert run_one(root, parts.fingerprint, stops_after(5)) == "interrupted"
    assert run_one(root, parts.fingerprint) == "done"
    assert numbers(parts) == numbers(whole)
    weights, expected = (load_file(stage.checkpoints / "model.safetensors") for stage in (parts, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    found = (whole.result() or {})["metrics"]
    mean = (667 * found["val/target_nll/first"] + 333 * found["val/target_nll/second"]) / 1000
    assert found["val/target_nll"] == pytest.approx(mean, rel=1e-12)


def test_looks_at_the_logits_are_no_part_of_a_step(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that these looks alone move by more than a thousandth, the steps take some thousandths."""
    clock, looks = [0.0], []

    def now() -> float:
        clock[0] += 0.001
        return clock[0]

    def look(*_: object) -> float:
        clock[0] += 100
        looks.append(clock[0])
        return 1.0

    monkeypatch.setattr(stability, "largest_attention_logit", look)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=now))
    stage = prepared_stage(Store(tmp_path), corpus, "decllm-tiny", "pretrain.training.stability.logit_every=2")
    assert run_one(stage.folder.parents[1], stage.fingerprint, stops_after(5)) == "interrupted"
    state = torch.load(stage.checkpoints / "last.ckpt", weights_only=False)["callbacks"]
    assert looks
    assert state["Throughput"]["seconds"] < 1

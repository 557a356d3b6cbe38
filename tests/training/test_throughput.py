"""The share of a device's peak: known for matrix products in bfloat16, on devices that we know."""

from __future__ import annotations

import pytest
import torch

from lit_llm.training.throughput import StepCost, Throughput


@pytest.mark.parametrize(
    ("precision", "device", "share"),
    [("bf16", "NVIDIA H200", 0.5), ("bf16_master", "NVIDIA H200", 0.5), ("fp32", "NVIDIA H200", None),
     ("bf16_master", "NVIDIA H300", None)],
)  # fmt: skip
def test_mfu_is_the_useful_flops_over_the_peak_of_bfloat16(
    precision: str, device: str, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """989 TFLOP/s dense is the data sheet's; a step of 989 TFLOPs that takes two seconds makes half of it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    throughput = Throughput(StepCost(1000, 989e12), precision)
    throughput.load_state_dict({"seconds": 10.0, "batches": 4, "steps": 4, "warm_seconds": 8.0})
    metrics = throughput.metrics(torch.device("cuda"))
    assert metrics["throughput/tokens_per_second"] == 500
    assert metrics.get("throughput/mfu") == (None if share is None else pytest.approx(share))

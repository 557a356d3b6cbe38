"""A GPU computes what the CPU computes in float64: losses, gradients, cached decoding; to the precision asked for."""

from __future__ import annotations

import pytest
import torch

from lit_llm.generation import Sampling, generate
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.training.stability import largest_attention_logit
from tests.gpu.gpu_cases import CASES, CUDA, batch_of, gradients, loss_of, model_of, off, small

pytestmark = pytest.mark.gpu

EPS = {"fp32": 1e-4, "bf16": 3e-2, "bf16_master": 3e-2}
"""Largest distance of a loss; a gradient, which has gone through every layer twice, may be off by ten times that."""


def backward(
    case: str, precision: str, device: torch.device, dtype: torch.dtype, *overrides: str
) -> tuple[torch.Tensor, LanguageModel]:
    experiment = small(case, *overrides)
    model = model_of(experiment, dtype).to(device)
    batch = batch_of(experiment).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        loss = loss_of(model, batch, experiment.pretrain.training.z_loss)
    loss.backward()
    return loss, model


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_master"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_float64_on_the_cpu(case: str, precision: str) -> None:
    wanted_loss, judge = backward(case, "fp32", torch.device("cpu"), torch.float64)
    dtype = torch.bfloat16 if precision == "bf16_master" else torch.float32
    loss, model = backward(case, precision, CUDA, dtype)
    assert loss.dtype == torch.float32
    assert off(loss, wanted_loss) < EPS[precision]
    found, wanted = gradients(model), gradients(judge)
    assert found.keys() == wanted.keys()
    if precision != "fp32":  # no further off than the CPU in that precision, whose draws of roundings are others
        _, peer = backward(case, precision, torch.device("cpu"), dtype)
        assert all_off(found, wanted) < max(10 * EPS[precision], 2 * all_off(gradients(peer), wanted))
    else:
        far = {name: distance for name in wanted if (distance := off(found[name], wanted[name])) > 10 * EPS["fp32"]}
        assert not far


def all_off(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The distance of the whole gradient."""
    return off(*(torch.cat([each[name].flatten() for name in wanted]) for each in (found, wanted)))


PROMPTS = [[5, 9, 13, 2, 7, 30, 8], [], [4, 17, 60], list(range(3, 40)), [16, 2, 4]]
DECODING = [case for case in CASES if case not in ("modernbert", "decllm, z-loss") and "documents" not in case]


@pytest.mark.parametrize("case", DECODING)
def test_what_is_generated_with_a_cache_is_what_the_cpu_generates(case: str) -> None:
    """Greedy, in float64, so that no argmax hangs on a rounding; the CPU's cache is tested against recomputation."""
    model = model_of(small(case), torch.float64)
    options = {"max_new_tokens": 24, "stop": (), "batch_size": 3}
    wanted = generate(model, PROMPTS, **options)
    found = generate(model.to(CUDA), PROMPTS, **options)
    assert [each.tokens for each in found] == [each.tokens for each in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.log_probabilities == pytest.approx(theirs.log_probabilities, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", DECODING)
def test_the_cache_gives_the_probabilities_of_one_pass_over_everything(case: str, dtype: torch.dtype) -> None:
    """In the precisions that the GPU's fused kernels have."""
    model = model_of(small(case), dtype).to(CUDA).eval()
    prompt = PROMPTS[3]
    (found,) = generate(model, [prompt], max_new_tokens=24, stop=())
    begin = torch.tensor([[1]], device=CUDA)
    answer, asked = torch.tensor([found.tokens], device=CUDA), torch.tensor([prompt], device=CUDA)
    with torch.no_grad():
        if model.config.encoder:
            logits_TV = model(asked, torch.cat([begin, answer[:, :-1]], dim=1))[0]
        else:
            read = torch.cat([begin, asked, answer[:, :-1]], dim=1)
            inputs = {"source_length": 1 + len(prompt)} if case == "partial attention" else {}
            logits_TV = model(read, **inputs)[0, len(prompt) :]
    wanted_T = logits_TV.float().log_softmax(-1).gather(-1, answer[0, :, None])[:, 0]
    assert found.log_probabilities == pytest.approx(wanted_T.tolist(), abs=1e-4 if dtype == torch.float32 else 0.15)


def test_what_is_drawn_depends_on_the_seed_and_not_on_the_device() -> None:
    model = model_of(small("redllm"), torch.float64)
    options = {"max_new_tokens": 24, "stop": (), "sampling": Sampling(temperature=1.0, top_p=0.9, seed=4)}
    wanted = generate(model, PROMPTS, **options)
    found = generate(model.to(CUDA), PROMPTS, **options)
    assert [each.tokens for each in found] == [each.tokens for each in wanted]


@pytest.mark.parametrize("case", ["decllm", "redllm", "yoco, retention", "modernbert"])
def test_a_model_begins_with_the_same_bits_on_every_device(case: str) -> None:
    config = small(case).model
    for (name, ours), theirs in zip(
        build_model(config, seed=3).named_parameters(),
        build_model(config, seed=3, device="cuda").parameters(),
        strict=True,
    ):
        assert theirs.is_cuda
        assert torch.equal(ours, theirs.cpu()), name


@pytest.mark.parametrize(
    "case", ["decllm", "decllm, softcap", "decllm, learned bias", "redllm, any split", "modernbert"]
)
def test_the_largest_attention_logit_is_the_same(case: str) -> None:
    experiment = small(case)
    model, batch = model_of(experiment), batch_of(experiment)
    wanted = largest_attention_logit(model, batch)
    assert largest_attention_logit(model.to(CUDA), batch.to(CUDA)) == pytest.approx(wanted, rel=1e-4)

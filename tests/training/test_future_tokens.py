"""Multi-token prediction (arXiv 2404.19737) by parallel layers beside the last one, in training alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.cost import Shape, count_parameters, forward_flops, train_flops
from lit_llm.objectives.collate import collate, collate_packed
from lit_llm.objectives.config import MasksConfig
from lit_llm.store.store import read_metrics
from lit_llm.training.memory import activation_bytes
from tests.models.test_training_memory import WIDE, loss_of, recorded, training
from tests.tiny_models import build, config, ids, resolved
from tests.training.rank_processes import Case, train
from tests.training.test_step import SMALL, stepped, uneven_batch

TWO = "output.future_tokens=2"


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_a_layer_with_the_last_ones_parameters_has_its_states(family: str) -> None:
    """So each stands beside the last layer: it reads the same states, and the same norm stands behind it."""
    model = build(family, TWO, "decoder.layers=3", "attention.value_residual=fixed").train()
    model.decoder.future[1].load_state_dict(model.decoder.layers[-1].state_dict())
    inputs = (ids(2, 7), ids(2, 5))[: 2 if family == "redllm" else 1]
    hidden_BTD = model.hidden(*inputs)
    one, other = model.decoder.take_future_states()
    assert_close(other, hidden_BTD)
    assert not torch.allclose(one, hidden_BTD)
    assert model.decoder.take_future_states() == []


@pytest.mark.parametrize("family", ["decllm", "redllm"])
def test_the_losses_of_the_tokens_ahead_are_added_to_the_objective(family: str) -> None:
    """L = Σ_i L_i, equation 2, each a sum over its targets divided by the number of next tokens."""
    batch = uneven_batch("decoder" if family == "decllm" else "encoder_decoder")
    lit, gradients = stepped(family, batch, f"model.{TWO}", execution={"micro_batch_size": 3})
    model = build_model(load_experiment(f"{family}-tiny", [*SMALL, f"model.{TWO}"]).model).train()
    states = [model.hidden(**batch.inputs), *model.decoder.take_future_states()]
    losses, counts = [], []
    for ahead, states_BTD in enumerate(states):
        logits, targets = [], []
        for row, counted in enumerate(batch.weights.tolist()):
            for place in range(len(counted) - ahead):
                if counted[place] and counted[place + ahead]:
                    logits.append(model.logits(states_BTD[row, place]))
                    targets.append(batch.targets[row, place + ahead])
        losses.append(F.cross_entropy(torch.stack(logits), torch.stack(targets), reduction="sum"))
        counts.append(len(targets))
    (sum(losses) / counts[0]).backward()
    assert counts[0] > counts[1] > counts[2]
    for name, parameter in model.named_parameters():
        assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert lit.report is not None
    assert lit.report.loss == pytest.approx(float(losses[0]) / counts[0], rel=1e-5), "that of the next token alone"
    wanted = [float(loss) / count for loss, count in zip(losses[1:], counts[1:], strict=True)]
    assert lit.report.losses_ahead == pytest.approx(wanted, rel=1e-5)


def test_targets_ahead_are_in_the_same_row_and_document() -> None:
    masks = MasksConfig(intra_document=True)
    batch = collate([np.array([5])], [np.array([6, 0, 7, 8, 9])], "decoder", masks)
    targets, places = batch.ahead(1)
    # <s> 5 6 0 | 7 8 predict 5 6 0 7 8 9; the first is the source, and 7 is predicted by the token before it.
    assert places.tolist() == [1, 2, 4]
    assert targets[0, places].tolist() == [0, 7, 9]
    sources, answers = [np.array([5]), np.array([6])], [np.array([7, 8]), np.array([9, 10, 11])]
    packed = collate_packed(sources, [*answers], "decoder", MasksConfig())
    assert [packed.targets.flatten()[place].item() for place in packed.ahead(1)[1]] == [7, 9, 10]
    assert packed.ahead(9)[1].tolist() == []


def test_evaluation_and_generation_leave_the_layers_out() -> None:
    plain, model, tokens = build("decllm"), build("decllm", TWO), ids(2, 9)
    assert_close(model(tokens), plain(tokens), rtol=0, atol=0)
    assert model.decoder.take_future_states() == []
    with torch.no_grad():
        model.train()(tokens)
    assert model.decoder.take_future_states() == []


def test_parameters_and_flops_count_in_training_alone() -> None:
    plain, model = resolved("redllm"), resolved("redllm", TWO)
    counted = count_parameters(model)
    assert counted.total == sum(parameter.numel() for parameter in build("redllm", TWO).parameters())
    assert counted.active == count_parameters(plain).total
    shape = Shape(12, 9, 9)
    assert forward_flops(model, shape) == forward_flops(plain, shape)
    measured = []
    for overrides in ([], [TWO]):
        module = build("redllm", *overrides).train()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            hidden = module.hidden(ids(1, 12), ids(1, 9))
            for states in (hidden, *module.decoder.take_future_states()):
                module.logits(states)
        measured.append(counter.get_total_flops())
    # The counter does not see the causal mask, which hides 36 of 81 pairs of each self-attention.
    hidden_pairs = 2 * 4 * 32 * 36
    assert train_flops(model, shape) - train_flops(plain, shape) == 3 * (measured[1] - measured[0] - hidden_pairs)


@pytest.mark.parametrize("recompute", [False, True])
def test_training_memory_has_the_layers_and_their_gradients_of_the_loss(recompute: bool) -> None:
    """What two further tokens add, against the storages that autograd keeps of a forward pass and its losses."""
    kept = []
    shape, one = Shape(0, 160, 160), training(activation_checkpointing=recompute)
    for overrides in ([], [TWO]):
        model = build("decllm", *WIDE, "decoder.layers=3", *overrides, double=False).train()
        model.decoder.recompute = recompute
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with recorded("fp32") as saved:
            hidden = model.hidden(ids(1, 160))
            losses = [loss_of(model, states, 160) for states in (hidden, *model.decoder.take_future_states())]
            found = {each.tensor.untyped_storage().data_ptr(): each.tensor.untyped_storage() for each in saved}
        assert all(loss.requires_grad for loss in losses)
        kept.append(sum(storage.nbytes() for address, storage in found.items() if address not in parameters))
    plain, with_two = (
        activation_bytes(resolved("decllm", *WIDE, "decoder.layers=3", *o), one, shape) for o in ([], [TWO])
    )
    assert with_two - plain == pytest.approx(kept[1] - kept[0], rel=0.03)


def test_the_losses_are_logged_by_name(tmp_path: Path) -> None:
    train(Case("ahead", "decllm-tiny", (f"model.{TWO}",)), tmp_path)
    for line in read_metrics(tmp_path / "metrics.jsonl"):
        found = {name: value for name, value in line["metrics"].items() if name.startswith("train/loss_ahead")}
        assert found.keys() == {"train/loss_ahead_2", "train/loss_ahead_3"}
        assert all(0 < value < 20 for value in found.values())


@pytest.mark.parametrize("family", ["yoco-tiny", "modernbert-tiny"])
def test_families_without_such_a_last_layer_are_refused(family: str) -> None:
    with pytest.raises(InputError, match="layers for further tokens"):
        load_experiment(family, [f"model.{TWO}"])


def test_a_model_without_it_does_not_name_it() -> None:
    assert "future" not in str(resolved("decllm", "output.softcap=3.0").model_dump())
    assert config("decllm", TWO) != config("decllm")

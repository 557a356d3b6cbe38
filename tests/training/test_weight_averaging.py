"""Averages of weights: judged by torch's AveragedModel, by formulas, and by the weights that trainings pass through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from lit_llm.config.problems import InputError
from lit_llm.experiment.load import load_experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.models.resolve import resolve_model
from lit_llm.objectives.config import MasksConfig
from lit_llm.studies.matching import matched
from lit_llm.training.averaging import ExponentialAverage, LastWeights
from lit_llm.training.config import TrainingConfig
from lit_llm.training.fit import StepCost, TrainResult, fit
from lit_llm.training.memory import average_bytes, checkpoint_bytes, state_bytes
from lit_llm.training.module import LitModel
from lit_llm.training.optimizers.averaged_weights import AveragedWeights
from tests.training.rank_processes import SMALL, UnevenBatches

EMA: dict[str, Any] = {"kind": "ema", "decay": 0.9, "warmup": False}
LAST: dict[str, Any] = {"kind": "last_k", "k": 3, "every": 2}
STEPS = ["pretrain.training.max_steps=300", "pretrain.training.schedule=constant"]


def steps_of(averaging: ExponentialAverage | LastWeights, steps: int, each: Callable[[int, nn.Module], None]) -> Any:
    """The optimiser after so many steps of random gradients; each: called after every step."""
    torch.manual_seed(0)
    module = nn.Linear(3, 5)
    optimizer = AveragedWeights(
        list(module.parameters()), torch.optim.SGD(module.parameters(), lr=0.1), averaging, steps
    )
    for step in range(1, steps + 1):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        each(step, module)
    return optimizer


@pytest.mark.parametrize("averaging", [ExponentialAverage(decay=0.9, warmup=False), LastWeights(k=4, every=3)])
def test_the_average_is_that_of_torchs_averaged_model(averaging: ExponentialAverage | LastWeights) -> None:
    """AveragedModel is updated after each step; for the last weights after steps 5, 8, 11 and 14 of 14."""
    ema = isinstance(averaging, ExponentialAverage)
    peer: list[AveragedModel] = []

    def update(step: int, module: nn.Module) -> None:
        if not peer:
            peer.append(AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9) if ema else None))
        if ema or step in (5, 8, 11, 14):
            peer[0].update_parameters(module)

    optimizer = steps_of(averaging, 14, update)
    for average, expected in zip(optimizer.averages, peer[0].module.parameters(), strict=True):
        assert_close(average, expected.detach(), rtol=1e-6, atol=1e-7)


def test_an_early_average_forgets_sooner() -> None:
    """d is (1 + t) / (10 + t) until that is 0.9: up to step 80."""
    averages: list[torch.Tensor] = []

    def update(step: int, module: nn.Module) -> None:
        weight = next(module.parameters()).detach().double()
        d = min(0.9, (1 + step) / (10 + step))
        averages.append(weight if step == 1 else d * averages[-1] + (1 - d) * weight)

    optimizer = steps_of(ExponentialAverage(decay=0.9), 100, update)
    assert_close(optimizer.averages[0].double(), averages[-1], rtol=1e-5, atol=1e-6)


class Training:
    """A training of a few steps at a constant rate, and the weights that its evaluations see."""

    def __init__(self, folder: Path, steps: int, averaging: dict[str, Any] | None, precision: str = "fp32") -> None:
        torch.set_num_threads(1)
        self.seen: list[dict[str, torch.Tensor]] = []
        experiment = load_experiment("decllm-tiny", SMALL)
        settings = {
            "max_steps": steps, "schedule": "constant", "optimizer": {"lr": 0.01}, "precision": precision,
            "weight_averaging": averaging,
        }  # fmt: skip
        self.result: TrainResult = fit(
            build_model(experiment.model, seed=1),
            TrainingConfig.model_validate(settings),
            UnevenBatches(experiment.model.family, 3, MasksConfig()),
            step_cost=StepCost(1, 1.0),
            evaluate=self.look,
            evaluate_times=steps,
            metrics_file=folder / "metrics.jsonl",
            checkpoints=folder,
        )

    def look(self, model: LanguageModel) -> dict[str, float]:
        self.seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {}


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, torch.Tensor]]]:
    """{precision: float32 weights after steps 1 to 6 of a training without an average}."""
    kept: dict[str, list[dict[str, torch.Tensor]]] = {}

    def weights(precision: str) -> list[dict[str, torch.Tensor]]:
        if precision not in kept:  # masters are seen at the end alone, so each number of steps is a training
            folder = tmp_path_factory.mktemp(precision)
            kept[precision] = [Training(folder, steps, None, precision).result.weights for steps in range(1, 7)]
        return kept[precision]

    return weights


@pytest.mark.parametrize("precision", ["fp32", "bf16_master"])
@pytest.mark.parametrize("averaging", [EMA, LAST], ids=["ema", "last_k"])
def test_evaluations_see_the_average_and_it_is_what_a_training_returns(
    tmp_path: Path, passed: Any, averaging: dict[str, Any], precision: str
) -> None:
    """Judge: the weights of trainings without an average. The last three are those after steps 2, 4 and 6."""
    trained, weights = Training(tmp_path, 6, averaging, precision), passed(precision)
    for name in weights[0]:
        average, averages = weights[0][name].double(), []
        for step, now in enumerate((step_weights[name].double() for step_weights in weights), start=1):
            if averaging is EMA:
                average = average if step == 1 else 0.9 * average + 0.1 * now
            elif step == 1:
                average = now
            elif step % 2 == 0:
                average = torch.stack([weights[taken - 1][name].double() for taken in range(2, step + 1, 2)]).mean(0)
            averages.append(average)
        for step, (seen, expected) in enumerate(zip(trained.seen, averages, strict=True), start=1):
            low = precision == "bf16_master" and step < 6  # until the last step bfloat16 parameters are evaluated
            assert_close(seen[name].double(), expected, rtol=1e-2 if low else 1e-5, atol=1e-3 if low else 1e-7)
        assert trained.result.weights[name].dtype == torch.float32
        assert_close(trained.result.weights[name].double(), averages[-1], rtol=1e-5, atol=1e-7)


def test_an_average_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    """Losses of the steps to the bit: evaluations put the average into the parameters and take it out again."""
    losses = []
    for averaging in (None, EMA):
        folder = tmp_path / str(averaging is None)
        folder.mkdir()
        losses.append(Training(folder, 6, averaging).result.metrics["train/loss"])
    assert losses[0] == losses[1]


def test_before_there_is_an_average_an_evaluation_leaves_the_parameters_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters are read again on both sides of the evaluations after steps 2 to 5, and not after step 1."""
    reads: list[int] = []
    read = LitModel._read_parameters

    def counted(lit: LitModel) -> None:
        reads.append(lit.global_step)
        read(lit)

    monkeypatch.setattr(LitModel, "_read_parameters", counted)
    Training(tmp_path, 6, LAST)
    assert reads == [2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("reached", range(1, 15))
def test_a_training_that_ends_early_says_how_many_weights_its_average_has(reached: int) -> None:
    """Of steps 5, 8, 11 and 14."""
    taken = sum(step <= reached for step in (5, 8, 11, 14))
    message = "" if taken == 4 else f"its average has {taken} of 4 weights"
    assert LastWeights(k=4, every=3).shortfall(reached, 14) == message
    assert ExponentialAverage().shortfall(reached, 14) == ""


def test_a_decay_is_reached_where_the_warm_up_gives_the_same_number() -> None:
    """(1 + 890) / (10 + 890) is 0.99."""
    averaging = ExponentialAverage(decay=0.99)
    assert averaging.unreached(889) == "of 0.99 is not reached in 889 steps: its warm-up ends at 0.99"
    assert averaging.unreached(890) == ExponentialAverage(decay=0.99, warmup=False).unreached(10) == ""


def test_the_plan_counts_four_bytes_for_each_parameter() -> None:
    experiment = load_experiment("redllm-tiny", ["pretrain.training.weight_averaging=ema"])
    training, model = experiment.pretrain.training, build_model(experiment.model)
    parameters = list(model.parameters())
    assert training.weight_averaging is not None
    optimizer = AveragedWeights(parameters, torch.optim.SGD(parameters), training.weight_averaging, 1)
    counted = sum(average.numel() * average.element_size() for average in optimizer.averages)
    resolved, without = resolve_model(experiment.model), training.model_copy(update={"weight_averaging": None})
    assert average_bytes(resolved, training) == counted
    assert state_bytes(resolved, training) - state_bytes(resolved, without) == counted
    assert checkpoint_bytes(resolved, training) - checkpoint_bytes(resolved, without) == counted


@pytest.mark.parametrize(
    ("averaging", "message"),
    [
        ("{kind: last_k, every: 75}", r"weight_averaging\.every: 5 weights 75 steps apart begin before .*every: 74"),
        ("{kind: last_k, k: 400, every: 1}", r"weight_averaging\.every: .*write k: 300 or less"),
        ("{kind: last_k}", r"weight_averaging\.every: is needed"),
        ("{kind: ema, decay: 1}", r"weight_averaging\.decay: "),
        ("swa", r"weight_averaging\.kind: 'swa' is not possible"),
    ],
)
def test_averages_that_cannot_be_are_refused_by_their_key(averaging: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_experiment("redllm-tiny", [f"pretrain.training.weight_averaging={averaging}", *STEPS])


def test_branches_of_a_trunk_have_no_average() -> None:
    keys = [*STEPS, "pretrain.training.schedule={kind: wsd, decay_steps: 100, branch_at: [200]}"]
    load_experiment("redllm-tiny", keys)
    with pytest.raises(InputError, match=r"weight_averaging: branches share a trunk's weights, and not their average"):
        load_experiment("redllm-tiny", [*keys, "pretrain.training.weight_averaging=ema"])


def test_weights_of_a_training_that_is_shortened_to_match_are_nearer_to_each_other() -> None:
    """Half the steps, half the distance."""
    averaging = "pretrain.training.weight_averaging={kind: last_k, k: 5, every: 60}"
    long = load_experiment("decllm-tiny", [averaging, *STEPS])
    short = load_experiment("decllm-tiny", [*STEPS, "pretrain.training.max_steps=150"])
    found = matched(long, short, "tokens").experiment.pretrain.training
    assert found.max_steps == 150
    assert found.weight_averaging == LastWeights(k=5, every=30)

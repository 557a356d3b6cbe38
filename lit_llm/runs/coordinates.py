"""Coordinate check: the size of activations by width or depth, before and after a few training steps.

Yang et al., arXiv 2203.03466, appendix D.1. Under a parametrization that carries learning rates over, neither the
entries of an activation nor their changes in training depend on the width. Where they grow with it, a wider model
needs a smaller learning rate; where changes vanish, a part stops learning.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llm.components.attention.dot_product import DotProduct
from lit_llm.components.experts.module import Router
from lit_llm.components.loss.module import LossWeights, target_loss
from lit_llm.config.problems import InputError, Problem
from lit_llm.config.section import validate
from lit_llm.config.tree import tree
from lit_llm.experiment.schema import Experiment
from lit_llm.models.build import build_model
from lit_llm.models.families import LanguageModel
from lit_llm.models.resolve import STACKS
from lit_llm.models.stacks import Block
from lit_llm.objectives.collate import Batch
from lit_llm.runs.step_timing import RandomBatches
from lit_llm.training.balance import ExpertBalance
from lit_llm.training.optimizers.build import build_optimizer, set_learning_rate

Axis = Literal["width", "depth"]
Grow = Literal["heads", "head_dim"]
PROBED_ROWS, PROBED_POSITIONS = 4, 256
"""Sequences of the batch whose activations are kept, and positions of them whose targets' logits are. The logits of all
other tokens would hide those: few of their updates add up."""
EMBEDDING, LOGITS = "embedding", "logits"


@dataclass(frozen=True)
class Sized:
    """An experiment at one size."""

    axis: Axis
    size: int
    """d_model, or the layers of all stacks together."""
    experiment: Experiment


@dataclass(frozen=True)
class Coordinate:
    """Size of one part's activations in one model."""

    axis: Axis
    size: int
    seed: int
    step: int
    """Training steps before the measurement."""
    part: str
    scale: float
    """Root mean square of the entries, over all layers of the part."""
    change: float
    """Root mean square of their differences from step 0, on the same tokens."""


# --- sizes -----------------------------------------------------------------------------------------------------------


def at_width(experiment: Experiment, d_model: int, grow: Grow = "heads") -> Sized:
    """The experiment with all widths in proportion to d_model. Raises InputError where one is no whole number.

    grow: heads: more heads of the same head_dim; head_dim: as many heads, each wider.
    """
    factor = Fraction(d_model, experiment.model.d_model)
    keys = {
        "d_model",
        "d_ff",
        "shared_d_ff",
        *(("heads", "kv_heads", "groups") if grow == "heads" else ("head_dim", "value_dim")),
    }
    values = _times(experiment.model.model_dump(mode="json"), factor, keys, f"--widths {d_model}")
    return Sized("width", d_model, _with_model(experiment, values))


def at_depth(experiment: Experiment, factor: Fraction) -> Sized:
    """The experiment with `factor` times the layers in each stack. Raises InputError where that is no whole number."""
    values = experiment.model.model_dump(mode="json")
    for side in STACKS:
        stack = values.get(side)
        if stack is not None and stack["layer_ranges"] and factor != 1:
            raise InputError(
                Problem("names layers, and other depths have others; leave them out", f"{side}.layer_ranges")
            )
    values = _times(values, factor, {"layers"}, f"--depths {factor}")
    layers = sum(values[side]["layers"] for side in STACKS if values.get(side) is not None)
    return Sized("depth", layers, _with_model(experiment, values))


def _times(values: Any, factor: Fraction, keys: set[str], option: str) -> Any:
    """A section as plain data with some of its whole numbers multiplied."""
    if not isinstance(values, dict):
        return values
    changed = {}
    for key, value in values.items():
        if key in keys and isinstance(value, int):
            product = value * factor
            if product.denominator != 1 or product < 1:
                message = (
                    f"{key} {value} times {factor} is {float(product):g}, which is no whole number; choose another"
                )
                raise InputError(Problem(message, option))
            changed[key] = int(product)
        else:
            changed[key] = _times(value, factor, keys, option)
    return changed


def _with_model(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    model = validate(type(experiment.model), tree(values), ("model",))
    return experiment.model_copy(update={"model": model})


class ZipfBatches(RandomBatches):
    """Batches of random tokens with frequencies like those of words, 1 / rank (Zipf's law).

    As in text, gradients then have directions in common, along which updates add up.
    """

    def _ids(self, size: int | tuple[int, int]) -> Any:
        import numpy as np

        shares = 1.0 / np.arange(1, self.vocabulary - 1)
        return 2 + self.random.choice(self.vocabulary - 2, size=size, p=shares / shares.sum())


# --- measurement -----------------------------------------------------------------------------------------------------


def measure_coordinates(
    sized: Sequence[Sized], steps: int, seeds: Sequence[int], log: Callable[[int, str], None] = lambda done, name: None
) -> list[Coordinate]:
    """The coordinates of every part, at each size and seed, before training and after each step.

    A model trains on one batch of `ZipfBatches` at its peak learning rate: no warm-up, clipping or dropout, in float32.
    log: called with the number of trained models and the name of the next one.
    """
    measured = list[Coordinate]()
    for number, (one, seed) in enumerate((one, seed) for one in sized for seed in seeds):
        log(number, f"{one.axis} {one.size}, seed {seed}")
        torch.set_num_threads(one.experiment.pretrain.training.execution.threads)
        measured += _measure(one, steps, seed)
    return measured


def _measure(one: Sized, steps: int, seed: int) -> Iterator[Coordinate]:
    model = build_model(one.experiment.model, seed=seed)
    batch = ZipfBatches(one.experiment, "pretrain")[0]
    probe = next(batch.micro_batches(PROBED_ROWS))
    training = one.experiment.pretrain.training
    optimizer, balance = build_optimizer(training.optimizer, model), ExpertBalance(model)
    weights = LossWeights(squares=training.z_loss)
    set_learning_rate(optimizer.param_groups, 1.0)
    routers = {module: module.weight.detach().clone() for module in model.modules() if isinstance(module, Router)}
    start = _activations(model, probe, routers)
    for step in range(steps + 1):
        if step:
            _train(model, batch, optimizer, balance, weights)
        now = _activations(model, probe, routers) if step else start
        for part, tensors in now.items():
            pairs = [*zip(tensors, start[part], strict=True)]
            changes = [after - before for after, before in pairs]
            yield Coordinate(one.axis, one.size, seed, step, part, _rms(tensors), _rms(changes))


def _train(
    model: LanguageModel, batch: Batch, optimizer: torch.optim.Optimizer, balance: ExpertBalance, weights: LossWeights
) -> None:
    """One step on the objective of training: with z-loss, the losses of further tokens and the balance of experts."""
    balance.begin()
    hidden_BTD = model.hidden(**batch.inputs)
    objective = target_loss(hidden_BTD, model.unembedding, (batch.targets, batch.places), weights).objective
    if model.config.output.future_tokens:
        for number, states_BTD in enumerate(model.decoder.take_future_states()):
            losses = target_loss(states_BTD, model.unembedding, batch.ahead(number + 1), weights)
            objective = objective + losses.objective
    if balance.layers:
        objective = objective + balance.loss(batch)
    (objective / batch.total).backward()
    optimizer.step()
    balance.step_biases(balance.take_choices(batch.targets.device).tolist())
    optimizer.zero_grad()


def _rms(tensors: Sequence[Tensor]) -> float:
    entries = sum(tensor.numel() for tensor in tensors)
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors) / entries)


@torch.no_grad()
def _activations(model: LanguageModel, probe: Batch, routers: Mapping[Router, Tensor]) -> dict[str, list[Tensor]]:
    """{part: its outputs}, one for each layer. routers: their matrices before training."""
    kept = defaultdict[str, list[Tensor]](list)
    model.eval()
    with _kept_outputs(model, kept, routers):
        hidden_BTD = model.hidden(**probe.inputs)
    places_N = probe.places[:PROBED_POSITIONS]
    logits_NV = model.logits(hidden_BTD.flatten(0, 1)[places_N])
    kept[LOGITS].append(logits_NV.gather(1, probe.targets.flatten()[places_N, None]))
    model.train()
    return dict(kept)


@contextmanager
def _kept_outputs(
    model: LanguageModel, kept: dict[str, list[Tensor]], routers: Mapping[Router, Tensor]
) -> Iterator[None]:
    """Context in which forward passes put the outputs of the parts into `kept`."""
    running = ""
    """Name of the stack whose block runs: tied stacks share the modules of their parts."""

    def runs(name: str) -> Callable[..., None]:
        def set_running(*_: object) -> None:
            nonlocal running
            running = name

        return set_running

    def keep(name: str, stack: str = "") -> Callable[..., None]:
        def kept_output(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if stack in ("", running):
                kept[name].append(output.detach().clone())

        return kept_output

    def keep_scores(name: str, stack: str) -> Callable[..., None]:
        def kept_scores(module: DotProduct, inputs: Any) -> None:
            if running == stack:  # of one sequence: H x T x S numbers for each layer
                kept[name].append(module.scores(inputs[0][:1], inputs[1][:1]))

        return kept_scores

    def keep_logits(name: str, stack: str) -> Callable[..., None]:
        def kept_logits(module: Router, inputs: Any) -> None:
            if running == stack:  # what the moved matrix adds shows that the router itself learns
                kept[name].append(F.linear(inputs[0], module.weight))
                kept[f"{name} update"].append(F.linear(inputs[0], module.weight - routers[module]))

        return kept_logits

    with ExitStack() as stack:
        stack.callback(model.dropout.register_forward_hook(keep(EMBEDDING)).remove)
        for name, side in model.named_children():
            if not isinstance(layers := getattr(side, "layers", None), nn.ModuleList):
                continue
            for block in layers:
                assert isinstance(block, Block)
                stack.callback(block.register_forward_pre_hook(runs(name)).remove)
                for part in block.parts:
                    module = block.part(part)
                    stack.callback(module.register_forward_hook(keep(f"{name} {part}", name)).remove)
                    for inner in module.modules():
                        if isinstance(inner, DotProduct):
                            hook = inner.register_forward_pre_hook(keep_scores(f"{name} {part} scores", name))
                            stack.callback(hook.remove)
                        if isinstance(inner, Router):
                            hook = inner.register_forward_pre_hook(keep_logits(f"{name} {part} router", name))
                            stack.callback(hook.remove)
            stack.callback(layers[-1].register_forward_hook(keep(f"{name} residual stream")).remove)
        yield

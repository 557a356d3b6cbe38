"""Factors by which a parameter multiplies its optimiser's settings. Loads no torch.

mup and completep for AdamW: table 8 of arXiv 2203.03466 and table 1 of arXiv 2505.01618 (alpha 1). For Muon: an update
should have a spectral norm that grows as sqrt(outputs / inputs) (arXiv 2310.17813, condition 1). Muon's has one that
depends on its `scaling` alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lit_llm.components.parametrization.config import Parametrization
from lit_llm.models.parameter_groups import parameter_groups
from lit_llm.models.parameters import parameter_shapes
from lit_llm.models.resolved import ResolvedModel
from lit_llm.models.scaling import ParameterRole, parameter_roles
from lit_llm.training.optimizers.config import Adafactor, FactoredAdafactor, GroupFactors, Muon, Optimizer, shape_factor


class Multipliers(NamedTuple):
    """Factors of one parameter's settings."""

    lr: float = 1.0
    """Of the learning rate."""
    weight_decay: float = 1.0
    """Of the weight decay, which each step multiplies by the learning rate."""
    eps: float = 1.0
    """Of AdamW's epsilon."""


def optimizer_problem(rules: Parametrization, optimizer: Optimizer) -> str:
    """Reason why an optimiser cannot train a model of this parametrization, or ''."""
    if rules.kind == "standard" or not isinstance(optimizer, Adafactor | FactoredAdafactor):
        return ""
    return f"{optimizer.kind} has no rule in {rules.kind}: its step is relative to the parameter; use adamw or muon"


def group_problems(model: ResolvedModel, optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    """(key in the optimiser, message) of groups that a model does not have, and of decays where nothing decays."""
    factors = {key: getattr(optimizer, key) for key in GroupFactors.model_fields}
    if not any(factors.values()):
        return
    groups = sorted({group for of_parameter in parameter_groups(model).values() for group in of_parameter})
    with_matrices = {group for of_matrix in _groups_of_matrices(model) for group in of_matrix}
    for key, names in factors.items():
        for name in names:
            if name not in groups:
                yield f"{key}.{name}", f"matches no parameter; this model has the groups {', '.join(groups)}"
            elif key == "weight_decay_groups" and name not in with_matrices:
                message = "has scales and biases alone, which no decay reaches; groups with matrices are "
                yield f"{key}.{name}", message + ", ".join(sorted(with_matrices))


def _groups_of_matrices(model: ResolvedModel) -> set[tuple[str, ...]]:
    """Groups of the parameters that decay."""
    shapes = parameter_shapes(model)
    return {groups for name, groups in parameter_groups(model).items() if len(shapes[name]) >= 2}


def decays(optimizer: Optimizer) -> bool:
    """True for an optimiser with weight decay, of any of its parameters."""
    return bool(optimizer.weight_decay or (isinstance(optimizer, Muon) and optimizer.adamw.weight_decay))


def effective_factors(model: ResolvedModel, optimizer: Optimizer) -> dict[str, dict[str, float]]:
    """{lr_groups, weight_decay_groups: {groups of parameters: factor}} of the factors that change something.

    Without factors of 1, and without those of the weight decay where there is none.
    """
    factors: dict[str, dict[str, float]] = {key: {} for key in GroupFactors.model_fields}
    if optimizer.lr_groups:
        factors["lr_groups"] = _other_than_one(set(parameter_groups(model).values()), optimizer.lr_groups)
    if optimizer.weight_decay_groups and decays(optimizer):
        of_decay = _other_than_one(_groups_of_matrices(model), optimizer.weight_decay_groups)
        factors["weight_decay_groups"] = of_decay
    return factors


def _other_than_one(groups: set[tuple[str, ...]], factors: Mapping[str, float]) -> dict[str, float]:
    found = {"/".join(each): _factor(each, factors) for each in groups}
    return {name: factor for name, factor in found.items() if factor != 1}


def multipliers_of(model: ResolvedModel, optimizer: Optimizer) -> Mapping[str, Multipliers]:
    """{name: multipliers} of the parameters that have some: by the parametrization, times those of their groups."""
    multipliers: dict[str, Multipliers] = {}
    if model.parametrization.kind != "standard":
        multipliers = {name: _multipliers(name, role, optimizer) for name, role in parameter_roles(model).items()}
    if not (optimizer.lr_groups or optimizer.weight_decay_groups):
        return multipliers
    for name, groups in parameter_groups(model).items():
        lr, weight_decay = (_factor(groups, of) for of in (optimizer.lr_groups, optimizer.weight_decay_groups))
        rules = multipliers.get(name, Multipliers())
        multipliers[name] = rules._replace(lr=rules.lr * lr, weight_decay=rules.weight_decay * weight_decay)
    return multipliers


def _factor(groups: Sequence[str], factors: Mapping[str, float]) -> float:
    """Factor of a parameter in these groups, the more general first: that of its most specific group."""
    return next((factors[group] for group in reversed(groups) if group in factors), 1.0)


def _multipliers(name: str, role: ParameterRole, optimizer: Optimizer) -> Multipliers:
    if isinstance(optimizer, Muon) and role.is_product and name.startswith(STACKS):
        lr = _muon_lr(role, optimizer.scaling)
        return Multipliers(lr, 1 / lr)
    return _adamw(role)


STACKS = ("encoder.", "decoder.")
"""Beginnings of the names whose matrices Muon trains."""


def _adamw(role: ParameterRole) -> Multipliers:
    """AdamW's: each entry of an update is about the learning rate, whatever its gradient's size.

    With m times as many aligned inputs an output changes m times as much, hence lr / m; lr times decay stays. Gradients
    fall as 1 / m of the outputs, since logits are divided by m, and those of a residual branch as 1 / l, and epsilon
    with them.
    """
    fall = (role.inputs if role.kind == "output" else role.outputs) * role.depth
    if not role.is_product:
        return Multipliers(eps=1 / fall)
    return Multipliers(1 / role.inputs, role.inputs, 1 / fall)


def _muon_lr(role: ParameterRole, scaling: str) -> float:
    """Muon's: sqrt(outputs / inputs) over its factor by shape, both relative to the base model's matrix."""
    rows, columns = role.shape
    base = shape_factor(scaling, rows / role.outputs, columns / role.inputs)
    return math.sqrt(role.outputs / role.inputs) * base / shape_factor(scaling, rows, columns)

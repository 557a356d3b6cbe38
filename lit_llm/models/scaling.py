"""Factors and initial values that depend on a model's width and depth. Loads no torch.

`docs/scaling.md` has the rules of `parametrization` in a table; `training/optimizers/multipliers.py` those of the
optimisers. m is a width over the base model's, l a stack's layers over the base model's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from lit_llm.components.attention.resolved import ResolvedAttention
from lit_llm.components.initialisation.config import FixedStd
from lit_llm.components.part import MatrixKind, Part, TensorShape
from lit_llm.components.residual.config import DeepNorm, deepnorm
from lit_llm.models.parameters import INPUT_TABLES, OF_LAYER, parameter_shapes
from lit_llm.models.resolve import resolve_model
from lit_llm.models.resolved import ResolvedModel

if TYPE_CHECKING:
    from lit_llm.models.sections import AnyModel

ParameterKind = Literal["embedding", "output", "vector"] | MatrixKind
"""Role of a parameter. embedding: tables of tokens and positions; output: the output's matrix; vector: biases, scales
and learned factors."""
PRODUCTS: tuple[ParameterKind, ...] = ("query", "key", "value", "up", "out", "hidden", "readout", "input")
"""Matrices that multiply states. Both sides grow with the width, but for a readout's outputs and an input's inputs."""


class ParameterRole(NamedTuple):
    """Role of a parameter, on which its initial values and learning rate depend."""

    kind: ParameterKind
    shape: TensorShape
    inputs: float = 1.0
    """Width multiplier m of its inputs."""
    outputs: float = 1.0
    """Width multiplier m of its outputs."""
    depth: float = 1.0
    """Depth multiplier l of its stack; 1 outside of the layers."""
    side: str = "decoder"
    """Its stack, or the one that it serves: encoder or decoder."""
    part: Part | None = None
    """The part of a layer that it belongs to."""

    @property
    def is_product(self) -> bool:
        return self.kind in PRODUCTS


def parameter_roles(model: ResolvedModel) -> dict[str, ParameterRole]:
    """{name: role} of every parameter, in the order of `parameter_shapes`."""
    return {name: _role(name, shape, model) for name, shape in parameter_shapes(model).items()}


def _role(name: str, shape: TensorShape, model: ResolvedModel) -> ParameterRole:
    rules = model.parametrization
    side = "encoder" if name.startswith("encoder") or model.family == "encoder_only" else "decoder"
    width = rules.width_multiplier(model.width(side))
    if name in INPUT_TABLES:
        return ParameterRole("embedding", shape, outputs=width)
    if name == "output.weight":
        return ParameterRole("output", shape, inputs=width)
    if (match := OF_LAYER.fullmatch(name)) is None:
        return ParameterRole(_kind_outside(name, shape, model), shape, width, width, side=side)
    layers = getattr(model, side)
    part, depth = layers[int(match[1] or -1)].part(match[2]), rules.depth_multiplier(len(layers))
    if len(shape) < 2 or part is None:
        return ParameterRole("vector", shape, width, width, depth, side)
    kind = part.matrix_kind(match[3])
    inputs = rules.width_multiplier(model.width("encoder")) if match[3] in part.source_matrices else width
    inputs, outputs = 1.0 if kind == "input" else inputs, 1.0 if kind == "readout" else width
    return ParameterRole(kind, shape, inputs, outputs, depth, side, part)


def _kind_outside(name: str, shape: TensorShape, model: ResolvedModel) -> ParameterKind:
    """Role of a parameter outside of the layers."""
    if len(shape) < 2:
        return "vector"
    side, _, inner = name.partition(".")
    if inner.startswith("shared_kv.") and model.shared_kv is not None:
        return model.shared_kv.matrix_kind(inner.removeprefix("shared_kv."))
    for layer in getattr(model, side, ()):
        for _, part in layer.parts:
            if inner in part.stack_shapes(model.widths(side)):
                return part.matrix_kind(inner)
    return "hidden"


# --- initial values --------------------------------------------------------------------------------------------------


def initial_deviations(model: ResolvedModel) -> dict[str, float]:
    """{name: standard deviation of the initial values} of every matrix and table.

    That of the base model by `initialisation`; for matrices with m times as many inputs over sqrt(m), for readouts over
    m, and with DeepNorm times its beta for W_v, W_o and the feed-forward network.
    """
    return {
        name: _base_deviation(role, model) * _beta(role, model) * _width_factor(role)
        for name, role in parameter_roles(model).items()
        if role.kind != "vector"
    }


def _width_factor(role: ParameterRole) -> float:
    """Deviation over the base model's. A readout's changes line up with its own rows, so these are 1 / m, not less."""
    if role.kind == "readout":
        return 1 / role.inputs
    return role.inputs**-0.5 if role.is_product else 1.0


def _base_deviation(role: ParameterRole, model: ResolvedModel) -> float:
    """Standard deviation in the base model; with the standard parametrization that is the model itself."""
    rules = model.initialisation
    if isinstance(rules, FixedStd):
        if rules.kind == "depth_scaled" and role.kind == "out":
            branches = sum(len(layer.parts) for layer in getattr(model, role.side))
            return rules.std * (branches / role.depth) ** -0.5
        return rules.std
    if rules.kind == "t5" and role.kind in ("embedding", "output"):
        return 1.0
    if role.kind == "table":  # as in T5, by the width of the residual stream
        return float((model.width(role.side) / role.inputs) ** -0.5)
    growth = role.outputs if role.kind == "embedding" else role.inputs
    inputs = role.shape[-1] / growth  # an embedding's rows are d_model wide
    if rules.kind == "t5" and role.kind == "query" and isinstance(role.part, ResolvedAttention):
        # T5's scores are not divided by sqrt(head_dim), but its W_q is.
        size = role.part.head_dim
        return float((inputs * size) ** -0.5 / (size**-0.5 if role.part.scale is None else role.part.scale))
    return float(inputs**-0.5)


def _beta(role: ParameterRole, model: ResolvedModel) -> float:
    constants = deepnorm_of(model, role.side) if role.kind in ("value", "out", "up") else None
    return 1.0 if constants is None else constants.beta


# --- factors of the forward pass -------------------------------------------------------------------------------------


def output_multiplier(model: ResolvedModel) -> float:
    """Factor of the states from which logits are made: 1 / m, and T5's 1 / sqrt(d_model) for tied embeddings."""
    if model.initialisation.kind == "t5" and model.tie_embeddings in ("all", "decoder"):
        return float(model.d_model**-0.5)
    return 1.0 / model.parametrization.width_multiplier(model.d_model)


def embedding_multiplier(model: ResolvedModel, width: int) -> float:
    """Factor of scaled embeddings of this width: the root of the base model's."""
    return float((model.parametrization.base_width or width) ** 0.5)


def deepnorm_of(model: ResolvedModel, side: str) -> DeepNorm | None:
    """DeepNorm's constants of a stack; None without DeepNorm."""
    if model.residual.kind != "deepnorm":
        return None
    encoder, decoder = len(model.encoder), len(model.decoder)
    if side == "encoder":
        return deepnorm(encoder, decoder=decoder)
    return deepnorm(decoder, encoder=encoder)


def residual_factors(model: ResolvedModel, side: str) -> tuple[float, float]:
    """(factor of the residual stream, factor of what a branch adds to it) in the layers of a stack."""
    constants = deepnorm_of(model, side)
    branch = 1.0 / model.parametrization.depth_multiplier(len(getattr(model, side)))
    return (1.0 if constants is None else constants.alpha), branch


# --- refusals --------------------------------------------------------------------------------------------------------


def scaling_problems(config: AnyModel) -> Iterator[tuple[str, str]]:
    """(key, message) of settings of residual, initialisation and parametrization that do not fit the model."""
    kind, residual, placement = config.parametrization.kind, config.residual.kind, config.norm.placement
    if kind != "standard" and config.initialisation.kind == "t5":
        yield "initialisation", f"t5 has no rule by width; with {kind} use fan_in, fixed_std or depth_scaled"
    if kind == "completep" and placement == "post":
        yield "parametrization", "completep divides branches of a stream that no norm interrupts; use another placement"
    if kind == "completep" and residual != "none":
        yield "residual", f"{residual}: completep multiplies the branches itself; leave one of them out"
    unscaled = {part.unscaled for part in resolve_model(config).parts} - {""} if kind != "standard" else set()
    if unscaled:
        yield "parametrization", f"{kind} has no rule for {', '.join(sorted(unscaled))}; use standard, or other layers"
    if residual == "deepnorm":
        yield from _deepnorm_problems(config)


def _deepnorm_problems(config: AnyModel) -> Iterator[tuple[str, str]]:
    if config.norm.placement != "post":
        yield "residual", f"deepnorm is norm(a x + f(x)): it needs `norm.placement: post`, not {config.norm.placement}"
    if config.family == "encoder_decoder" and config.tie_layers:
        yield (
            "residual",
            "deepnorm has no constants for layers that encoder and decoder share; use rezero or layer_scale",
        )
    if config.family == "decoder_decoder":
        yield "residual", "deepnorm has no constants for a decoder_decoder; use rezero or layer_scale"
        return
    model = resolve_model(config)
    for side, layers in model.stacks:
        parts = 3 if side == "decoder" and model.encoder else 2
        if any(len(layer.parts) != parts for layer in layers):
            message = f"deepnorm has constants for layers of {parts} parts, and some of the {side} have others"
            yield "residual", f"{message}; use rezero or layer_scale"

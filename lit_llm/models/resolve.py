"""Resolve a model section into one explicit config per layer, or find its problems."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from lit_llm.components.attention.resolve import resolve_attention
from lit_llm.components.attention.resolved import Place, ResolvedAttention
from lit_llm.components.feed_forward.config import FeedForwardConfig
from lit_llm.components.parametrization.config import Parametrization
from lit_llm.components.part import Defaults, Part
from lit_llm.components.registry import COMPONENTS
from lit_llm.config.section import Section, set_fields
from lit_llm.config.tree import KIND
from lit_llm.models.layer import Layer
from lit_llm.models.layers_together import (
    block_problem,
    convolution_problem,
    tying_problem,
    value_residual_problem,
    with_first_values,
)
from lit_llm.models.resolved import ResolvedModel

if TYPE_CHECKING:
    from lit_llm.models.sections import AnyModel

P = TypeVar("P", bound=Part)

STACKS = ("encoder", "decoder", "self_decoder", "cross_decoder")
"""Keys of the stacks of layers of all families."""


_RESOLVED: dict[int, tuple[AnyModel, ResolvedModel]] = {}
"""Cache of resolved models by the config's id, which is unique while the config is held here."""
MOST_RESOLVED = 4096


def resolve_model(config: AnyModel) -> ResolvedModel:
    """Apply all overrides. Configs that are the same function resolve to equal models."""
    if id(config) not in _RESOLVED:
        if len(_RESOLVED) >= MOST_RESOLVED:
            _RESOLVED.clear()
        _RESOLVED[id(config)] = config, _resolve(config)
    return _RESOLVED[id(config)][1]


def _resolve(config: AnyModel) -> ResolvedModel:
    encoder, *decoder = (_layers(config, side) for side in STACKS)
    widths, depths = {config.d_model, _width(config, "encoder")}, {len(encoder), sum(map(len, decoder))} - {0}
    return ResolvedModel(
        family=config.family,
        d_model=config.d_model,
        vocabulary=config.vocabulary,
        tie_embeddings=config.tie_embeddings,
        norm=config.norm,
        embedding=config.embedding.resolved(beside_source=config.family in ("encoder_decoder", "double_decoder")),
        output=config.output,
        residual=config.residual,
        initialisation=config.initialisation,
        parametrization=config.parametrization.resolved(widths, depths),
        encoder_d_model=_width(config, "encoder") if _width(config, "encoder") != config.d_model else None,
        tie_layers=getattr(config, "tie_layers", False),
        block=getattr(config, "block", None),
        encoder=encoder,
        decoder=tuple(layer for layers in decoder for layer in layers),
    )


def _layers(config: Any, side: str) -> tuple[Layer, ...]:
    """Layers of a stack. Layers with the same overrides are one object, since a study resolves thousands of layers."""
    stack, alike = getattr(config, side, None), dict[tuple[str, ...], Layer]()
    layers = []
    for index in range(stack.layers if stack else 0):
        overridden = tuple(address for address, _ in _levels(stack, side, index))
        if overridden not in alike:
            alike[overridden] = _layer(config, side, index)
        layers.append(alike[overridden])
    return with_first_values(tuple(layers))


def _width(config: Any, side: str) -> int:
    stack_width: int | None = getattr(getattr(config, side, None), "d_model", None)
    return stack_width or config.d_model


def _layer(config: Any, side: str, index: int) -> Layer:
    components = _components(config, side, index)
    mixers = [(key, part) for key, part in components.items() if COMPONENTS[key].role == "mixer"]
    parts = mixers or [("self_attention", _attention(config, side, index, SELF_ATTENTION_KEY[side]))]
    if _cross_attention_mode(config, side, index) == "separate":
        parts.append(("cross_attention", _attention(config, side, index, "cross_attention")))
    parts += [(key, part) for key, part in components.items() if COMPONENTS[key].role == "added"]
    networks = [(key, part) for key, part in components.items() if COMPONENTS[key].role == "feed_forward"]
    parts += networks or [("feed_forward", _feed_forward(config, side, index))]
    return Layer(parts=tuple(parts))


def _feed_forward(config: Any, side: str, index: int) -> Part:
    levels = [part for _, part in _levels(getattr(config, side), side, index)]
    return FeedForwardConfig.model_validate(_merged_values(config.feed_forward, levels, "feed_forward"))


def _components(config: Any, side: str, index: int) -> dict[str, Part]:
    """{key: part} of the components set for a layer. Raises ValueError where two replace the same part."""
    written = {key: part for key in COMPONENTS if (part := _component(config, side, index, key)) is not None}
    mixer = next((key for key in written if COMPONENTS[key].role == "mixer"), None)
    if mixer and _cross_attention_mode(config, side, index) == "merged":
        raise ValueError(
            f"{mixer} stands in place of self-attention, which reads the source where cross_attention_mode is merged: "
            f"layer {index} would read no source"
        )
    for role in ("mixer", "feed_forward"):
        several = [key for key in written if COMPONENTS[key].role == role]
        if len(several) > 1:
            place = "self-attention" if role == "mixer" else "the feed-forward network"
            raise ValueError(f"{' and '.join(several)} both stand in place of {place} in layer {index}")
    return written


def _component(config: Any, side: str, index: int, key: str) -> Part | None:
    levels = [part for _, part in _levels(getattr(config, side), side, index)]
    written = [section for level in levels if (section := getattr(level, key, None)) is not None]
    if not written:
        return None
    values: dict[str, Any] = {}
    for section in written:
        values |= set_fields(section)
    attention, feed_forward = (_fields(default) for default in (config.attention, config.feed_forward))
    defaults = Defaults(attention, feed_forward, _width(config, side), causal=side != "encoder")
    try:
        return _with_scores(COMPONENTS[key].resolve(values, defaults), config)
    except ValueError:
        raise
    except Exception as error:  # another package's own code
        raise ValueError(f"{key} cannot be resolved: {type(error).__name__}: {error}") from error


SELF_ATTENTION_KEY = {
    "encoder": "attention",
    "decoder": "self_attention",
    "self_decoder": "self_attention",
    "cross_decoder": "cross_attention",
}
"""{stack: key of its layers' attention within the row}, which becomes `Layer.self_attention`."""


def _with_scores(part: P, config: Any) -> P:
    """The part with its attention scores as the model's parametrization has them."""
    rules: Parametrization = config.parametrization
    return part if rules.kind == "standard" else part.at_base_head_dim(rules.base_head_dim)


def _cross_attention_mode(config: Any, side: str, index: int) -> str:
    """How a layer reads the source: separate, merged or none."""
    stack = getattr(config, side)
    if "cross_attention_mode" not in type(stack).model_fields:
        return "none"
    modes = [
        part.cross_attention_mode for _, part in _levels(stack, side, index) if part.cross_attention_mode is not None
    ]
    return str(modes[-1]) if modes else "separate"


def _attention(config: Any, side: str, index: int, name: str, levels: int | None = None) -> ResolvedAttention:
    """A layer's attention. levels: only so many of those that override the defaults, the least specific first."""
    overriding = [part for _, part in _levels(getattr(config, side), side, index)][:levels]
    values = _merged_values(config.attention, overriding, name)
    place: Place = "merged" if _cross_attention_mode(config, side, index) == "merged" else "self"
    if name == "cross_attention":
        place = "shared" if side == "cross_decoder" else "cross"
    return _with_scores(resolve_attention(values, _width(config, side), place), config)


def _levels(stack: Any, side: str, index: int) -> list[tuple[str, Any]]:
    """Pairs (address, section) that may override a layer's defaults, the most specific last."""
    ranges = [(name, part) for name, part in stack.layer_ranges.items() if index in layer_range(name)]
    return [(side, stack), *((f"{side}.layer_ranges.{name}", part) for name, part in ranges)]


def _merged_values(default: Section, levels: list[Any], name: str) -> dict[str, Any]:
    values = _fields(default)
    for level in levels:
        values |= _overrides(getattr(level, name))
    return values


def _fields(section: Section) -> dict[str, Any]:
    return {key: getattr(section, key) for key in type(section).model_fields}


def _overrides(section: Section | None) -> dict[str, Any]:
    """{key: value} that a section sets, without its kind, which overrides nothing."""
    return {key: value for key, value in set_fields(section).items() if key != KIND}


@lru_cache(maxsize=4096)
def layer_range(name: str) -> range:
    """`"2-5"` as range(2, 6), `"3"` as range(3, 4), `"0-21/3"` as range(0, 22, 3). Raises ValueError otherwise."""
    match = re.fullmatch(r"(\d+)(?:-(\d+)(?:/([1-9]\d*))?)?", name)
    if match is None:
        raise ValueError(f"{name!r} is not a range of layers such as '3', '0-2' or '0-21/3'")
    first = int(match[1])
    return range(first, int(match[2] or first) + 1, int(match[3] or 1))


def resolution_problems(config: Any) -> Iterator[tuple[str, str]]:
    """Pairs (key, message) of everything that prevents this model from being built."""
    all_buildable = True
    for side in STACKS:
        stack = getattr(config, side, None)
        if stack is None:
            continue
        ranges_fine = True
        for name in stack.layer_ranges:
            problem = _range_problem(name, stack.layers)
            if problem:
                ranges_fine = False
                yield f"{side}.layer_ranges.{name}", problem
        if not ranges_fine:
            all_buildable = False
            continue
        clash = _range_conflict(stack.layer_ranges)
        if clash:
            yield f"{side}.layer_ranges", clash
        yield from _source_problems(config, stack) if side == "decoder" else ()
        buildable = True
        names = [name for name in (*_ATTENTIONS, *COMPONENTS) if name in type(stack).model_fields]
        alike = {tuple(address for address, _ in _levels(stack, side, index)): index for index in range(stack.layers)}
        for index, name in itertools.product(alike.values(), names):
            try:
                if name in COMPONENTS:
                    _component(config, side, index, name)
                else:
                    _attention(config, side, index, name)
            except ValueError as error:
                buildable = False
                yield _error_address(config, side, index, name), str(error)
        if buildable:
            try:
                for index in alike.values():
                    _components(config, side, index)
            except ValueError as error:
                buildable = False
                yield side, str(error)
        all_buildable = all_buildable and buildable
        if buildable and (problem := _bias_problem(config, side)):
            yield f"{side}.{SELF_ATTENTION_KEY[side]}", problem
        if buildable and (problem := value_residual_problem(_layers(config, side))):
            yield f"{side}.{SELF_ATTENTION_KEY[side]}", problem
        if buildable and getattr(config, "block", None) and (problem := block_problem(_layers(config, side))):
            yield side, problem
    if config.output.future_tokens and config.family not in ("decoder", "encoder_decoder"):
        message = f"layers for further tokens stand behind a decoder's last but one, and this model is {config.family}"
        yield "output.future_tokens", message
    if all_buildable and getattr(config, "tie_layers", False):
        if (width := _width(config, "encoder")) != config.d_model:
            yield "tie_layers", f"the encoder is {width} wide and the decoder {config.d_model}"
        elif problem := tying_problem(_layers(config, "encoder"), _layers(config, "decoder")):
            yield "tie_layers", problem
    if all_buildable and (problem := convolution_problem(_layers(config, "cross_decoder"))):
        yield "cross_decoder.feed_forward", problem
    if all_buildable and (problem := _sharing_problem(config)):
        yield "cross_decoder.cross_attention", problem


def _source_problems(config: Any, stack: Any) -> Iterator[tuple[str, str]]:
    """Problems of how a decoder reads its source, as pairs (key, message)."""
    if "cross_attention_mode" not in type(stack).model_fields:
        return
    reads = [_cross_attention_mode(config, "decoder", index) for index in range(stack.layers)]
    if set(reads) == {"none"}:
        yield "decoder.cross_attention_mode", "no layer reads the source; leave out the encoder: `family: decoder`"
    widths = _width(config, "encoder"), config.d_model
    if widths[0] != widths[1]:
        differ = f"the encoder is {widths[0]} wide and the decoder {widths[1]}"
        if config.tie_embeddings in ("all", "inputs"):
            yield "tie_embeddings", f"{config.tie_embeddings}: {differ}; decoder or none do not share their inputs"
        if "merged" in reads:
            yield "decoder.cross_attention_mode", f"merged: {differ}, and one W_k and W_v read both"


def _sharing_problem(config: Any) -> str:
    """Reason why the layers of a cross-decoder cannot share their keys and values, or ''."""
    attentions = [attention for layer in _layers(config, "cross_decoder") if (attention := layer.self_attention)]
    for index, attention in enumerate(attentions):
        if attention.shared != attentions[0].shared:
            needed = "the same kv_heads, head_dim, rope with all of its keys, biases and norms of keys and values"
            return f"all layers share one pair of keys and values and need {needed}; layer {index} differs from layer 0"
    return ""


def _bias_problem(config: Any, side: str) -> str:
    """Reason why the layers of a stack cannot share one relative bias, or ''."""
    parts = [part for layer in _layers(config, side) for _, part in layer.parts]
    attentions = [part for part in parts if isinstance(part, ResolvedAttention) and part.place == "self"]
    kinds = {each.relative_bias for each in attentions}
    if (
        "shared" in kinds
        and len({(each.heads, each.relative_buckets, each.relative_distance) for each in attentions}) > 1
    ):
        return "relative_bias shared: all layers of a stack need the same heads, relative_buckets and relative_distance"
    return ""


_ATTENTIONS = ("attention", "self_attention", "cross_attention")


def _error_address(config: Any, side: str, index: int, name: str) -> str:
    """The address that brings in the problem of a layer's component or attention; of a component the most specific."""
    levels = _levels(getattr(config, side), side, index)
    if name in COMPONENTS:
        addresses = [address for address, part in levels if _overrides(getattr(part, name))]
        return f"{addresses[-1]}.{name}" if addresses else "attention"
    problems = []
    for count in range(len(levels) + 1):
        try:
            _attention(config, side, index, name, count)
            problems.append("")
        except ValueError as error:
            problems.append(str(error))
    first = next(count for count in range(len(problems)) if set(problems[count:]) == {problems[-1]})
    return f"{levels[first - 1][0]}.{name}" if first else "attention"


def _range_problem(name: str, layers: int) -> str:
    try:
        wanted = layer_range(name)
    except ValueError as error:
        return str(error)
    if not wanted:
        return f"{name!r} runs backwards"
    return "" if wanted[-1] < layers else f"the stack has the layers 0-{layers - 1} only"


def _range_conflict(ranges: Mapping[str, Section]) -> str:
    """Message for two ranges that set the same key in the same layer, or ''. Neither range is more specific."""
    setters: dict[str, list[tuple[str, int]]] = {}
    for name, part in ranges.items():
        layers = sum(1 << index for index in layer_range(name))  # a bit for each
        for component in type(part).model_fields:
            section = getattr(part, component)
            for key in _overrides(section) if isinstance(section, Section) else [""] * (section is not None):
                address = f"{component}.{key}".strip(".")
                for other, others in setters.get(address, ()):
                    if both := layers & others:
                        first = (both & -both).bit_length() - 1
                        return f"{other!r} and {name!r} both set {address} of layer {first}"
                setters.setdefault(address, []).append((name, layers))
    return ""

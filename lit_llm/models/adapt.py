"""Warm start of a model from others: a decoder adapted into an encoder-decoder, or into another decoder.

T5Gemma (arXiv 2504.06225, section 2), layer by layer:

    source (decoder)                         target (encoder-decoder)
    embedding ─────────────────────────────▶ embedding, encoder_embedding
    layers.i ─┬─ self_attention ───────────▶ encoder.layers.i.self_attention   (its mask is opened)
              ├─ feed_forward ─────────────▶ encoder.layers.i.feed_forward
              ├─ self_attention ───────────▶ decoder.layers.i.self_attention   (merged: nothing is new, T5Gemma 2)
              ├─ self_attention ───────────▶ decoder.layers.i.cross_attention  (new where a width differs)
              └─ feed_forward ─────────────▶ decoder.layers.i.feed_forward     (new where a matrix is)
    norm ──────────────────────────────────▶ encoder.norm, decoder.norm
    output, or embedding where it is tied ─▶ output

A norm is copied with the part before or after it. Within a family every parameter keeps its name: a causal decoder
becomes one with a bidirectional prefix, or the reverse, by masks and objective alone (arXiv 2204.05832).

A stack shallower than its source's takes evenly spread layers, including the first and the last. A deeper one is
refused: it could only repeat layers, which is a different method.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_llm.components.part import TRAINED_BUFFERS
from lit_llm.components.registry import COMPONENTS
from lit_llm.config.section import Section
from lit_llm.models.parameters import parameter_shapes
from lit_llm.models.resolved import ResolvedModel
from lit_llm.models.scaling import output_multiplier

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["encoder", "decoder"]
"""Side of a source: the encoder's source gives the encoder's parameters, the decoder's source all others."""
Sources = Mapping[Side, ResolvedModel]
FAMILIES = ("decoder", "encoder_decoder", "encoder_only", "double_decoder")
"""Families that can be adapted; into a different family, only a decoder can."""


@dataclass(frozen=True)
class Adaptation:
    """Origin of each parameter of a target."""

    taken: Mapping[str, tuple[Side, str]]
    """{name: (side of the source, name in the source)}."""
    newly_initialised: tuple[str, ...]
    """Names of the parameters without a source, which are initialised as in a model from scratch."""
    left: tuple[str, ...]
    """Names of the sources' unused parameters."""


def adaptation_of(target: ResolvedModel, sources: Sources) -> Adaptation:
    """Origin of each parameter of the target. Loads no torch. Raises ValueError with `problem_of`'s reason."""
    if problem := problem_of(target, sources):
        raise ValueError(f"the {problem[0]}'s source {problem[1]}")
    return _adaptation(target, sources)


def problem_of(target: ResolvedModel, sources: Sources) -> tuple[Side, str] | None:
    """(side, reason why its source cannot be adapted into the target), or None. Loads no torch."""
    for side, source in sources.items():
        if target.family not in FAMILIES or (source.family != target.family and source.family != "decoder"):
            return side, f"is of family {source.family}, which cannot be made into one of family {target.family}"
        if source.vocabulary != target.vocabulary:
            rows = f"{source.vocabulary} rows, this model's {target.vocabulary}"
            return side, f"has another vocabulary: its embedding has {rows}"
        for stack in ("encoder", "decoder"):
            layers, depth = len(getattr(target, stack)), _source_depth(stack, target, source)
            if _side(stack) == side and layers > depth:
                return side, f"has {depth} layers for the {layers} of the {stack}, and none is taken twice"
    adaptation = _adaptation(target, sources)
    for side in sources:
        inside = [
            name
            for name in (*adaptation.taken, *adaptation.newly_initialised)
            if _side(name) == side and ".layers." in name
        ]
        if inside and not any(name in adaptation.taken for name in inside):
            return side, f"gives nothing to the {side}'s layers: no part of theirs has the shape of one of its own"
    return None


def _adaptation(target: ResolvedModel, sources: Sources) -> Adaptation:
    shapes, source_shapes = (
        parameter_shapes(target),
        {side: parameter_shapes(source) for side, source in sources.items()},
    )
    origins = {name: (_side(name), _source_name(name, target, sources[_side(name)])) for name in shapes}
    lacking = {
        name for name, (side, origin_name) in origins.items() if source_shapes[side].get(origin_name) != shapes[name]
    }
    # These parts are taken whole or not at all, with their norms.
    drawn = {
        name.partition(part)[0] + part
        for part in (".cross_attention", *(f".{key}" for key in _networks()))
        for name in lacking
        if f"{part}." in name and len(shapes[name]) > 1 and ".convolution." not in name
    }
    lacking |= {name for name in shapes if name.startswith(tuple(drawn))}
    taken = {name: origin for name, origin in origins.items() if name not in lacking}
    used = set(taken.values())
    left = {
        origin_name: None
        for side in sources
        for origin_name in source_shapes[side]
        if not _is_used(side, origin_name, sources, used)
    }
    return Adaptation(taken, tuple(name for name in shapes if name in lacking), tuple(left))


def _networks() -> list[str]:
    """Names of the feed-forward network and of the components that stand in its place."""
    return ["feed_forward", *(key for key, component in COMPONENTS.items() if component.role == "feed_forward")]


Altered = tuple[str, Any, Any]
"""(key, its value in the source, its value here)."""


def altered(target: ResolvedModel, sources: Sources) -> tuple[Altered, ...]:
    """Settings that differ between the target and the source of its parameters, once for all layers.

    Shapes alone do not show them: matrices may be equal in size with other heads, another activation or another norm.
    Keys are `attention.qkv_norm` where all attentions differ so, else `encoder.self_attention.qkv_norm`.
    """
    changes: dict[Altered, dict[str, None]] = {}
    compared = dict[str, None]()
    taken = adaptation_of(target, sources).taken
    for stack in ("encoder", "decoder"):
        source, layers = sources[_side(stack)], getattr(target, stack)
        source_layers = getattr(source, _source_stack(stack, target, source))
        for index, place in enumerate(layers_taken(len(layers), len(source_layers)) if layers else ()):
            for part, part_config in layers[index].parts:
                source_part = "self_attention" if part == "cross_attention" and source.family != target.family else part
                old = source_layers[place].part(source_part)
                if old is None or not any(name.startswith(f"{stack}.layers.{index}.{part}.") for name in taken):
                    continue
                compared[f"{stack}.{part}"] = None
                for key, before, after in _differing_settings(old, part_config):
                    changes.setdefault((key, before, after), {})[f"{stack}.{part}"] = None
    for (key, before, after), places in [*changes.items()]:
        for general in ("attention", "feed_forward"):
            if {*places} == {where for where in compared if where.endswith(general)}:
                changes[key, before, after] = {general: None}
    for source in {id(source): source for source in sources.values()}.values():
        for part in ("norm", "embedding", "output", "residual", "parametrization"):
            for change in _differing_settings(getattr(source, part), getattr(target, part)):
                changes.setdefault(change, {})[part] = None
        # Parametrizations differ by a key of their own.
        factors = output_multiplier(source), output_multiplier(target)
        if source.parametrization == target.parametrization and factors[0] != factors[1]:
            changes.setdefault(("multiplier", *factors), {})["output"] = None
    return tuple((f"{place}.{key}", old, new) for (key, old, new), places in changes.items() for place in places)


def _differing_settings(old: Section, new: Section) -> Iterator[Altered]:
    for key in type(new).model_fields:
        if key == "place":  # which the names of the parts say
            continue
        before, after = getattr(old, key, None), getattr(new, key)
        # Zero where there is no such norm and no RoPE, which another key says.
        absent = key in ("norm_eps", "rope_theta") and 0 in (before, after)
        if before != after and not absent:
            yield key, before, after


def _is_used(side: Side, name: str, sources: Sources, used: set[tuple[Side, str]]) -> bool:
    """True where a source's parameter is used; for a source of both sides, on either side."""
    sides = [other for other in sources if sources[other] is sources[side]]
    return any((other, name) in used for other in sides)


def _side(name: str) -> Side:
    return "encoder" if name.startswith("encoder") else "decoder"


def _source_stack(stack: str, target: ResolvedModel, source: ResolvedModel) -> str:
    """Stack of the source from which a stack of the target is taken."""
    return stack if source.family == target.family else "decoder"


def _source_depth(stack: str, target: ResolvedModel, source: ResolvedModel) -> int:
    return len(getattr(source, _source_stack(stack, target, source)))


def layers_taken(layers: int, of: int) -> list[int]:
    """Indices of the source's layers, among `of`, from which `layers` layers are taken."""
    return [round(index * (of - 1) / max(1, layers - 1)) for index in range(layers)]


def _source_name(name: str, target: ResolvedModel, source: ResolvedModel) -> str:
    """Name in the source of the parameter that a target's is taken from; the source need not have it."""
    other = source.family != target.family
    stack, _, inside = name.partition(".")
    if name == "output.weight" and source.tie_embeddings in ("all", "decoder"):
        return "embedding.weight"
    if stack.startswith(("encoder_embedding", "encoder_position_embedding")):
        shared = name == "encoder_embedding.weight" and source.tie_embeddings in ("all", "inputs")
        return name.removeprefix("encoder_") if other or shared else name
    if stack not in ("encoder", "decoder"):
        return name
    if other and stack == "encoder" and ("relative_bias" in name or ".convolution." in name):
        return ""  # what is causal has no distances to later tokens
    if match := re.match(r"layers\.(\d+)\.(.*)", inside):
        place = layers_taken(len(getattr(target, stack)), _source_depth(stack, target, source))[int(match[1])]
        inside = f"layers.{place}.{match[2]}"
    if other:
        inside = inside.replace("cross_attention", "self_attention")
    return f"{_source_stack(stack, target, source)}.{inside}"


def adapted(adaptation: Adaptation, states: Mapping[Side, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{name: value} of every parameter of the target that has a source, and of trained buffers of its module.

    states: the sources' state dicts.
    """
    values = {name: states[side][source_name] for name, (side, source_name) in adaptation.taken.items()}
    for name, (side, source_name) in adaptation.taken.items():
        module, source_module = (each.rpartition(".")[0] for each in (name, source_name))
        for buffer in TRAINED_BUFFERS:
            if (value := states[side].get(f"{source_module}.{buffer}")) is not None:
                values[f"{module}.{buffer}"] = value
    return values

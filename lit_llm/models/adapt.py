"""Which values a model takes over from others: a decoder made into an encoder-decoder, or into another decoder.

T5Gemma (arXiv 2504.06225, section 2), layer by layer:

    source (decoder)                         target (encoder-decoder)
    embedding ─────────────────────────────▶ embedding, encoder_embedding
    layers.i ─┬─ self_attention ───────────▶ encoder.layers.i.self_attention   (its mask is opened)
              ├─ feed_forward ─────────────▶ encoder.layers.i.feed_forward
              ├─ self_attention ───────────▶ decoder.layers.i.self_attention   (merged: nothing is fresh, T5Gemma 2)
              ├─ self_attention ───────────▶ decoder.layers.i.cross_attention  (fresh where a width differs)
              └─ feed_forward ─────────────▶ decoder.layers.i.feed_forward     (fresh where a matrix is)
    norm ──────────────────────────────────▶ encoder.norm, decoder.norm
    output, or embedding where it is tied ─▶ output

A norm goes with what it stands before or after. Within a family everything keeps its name: a causal decoder becomes one
with an open prefix, or the other way round, by masks and objective alone (arXiv 2204.05832).

A stack shallower than its source's takes evenly spread layers, the first and the last among them. A deeper one is
refused: its surplus could only repeat layers, which is another method with a question of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_llm.config.section import Section
from lit_llm.models.parameters import parameter_shapes
from lit_llm.models.resolve import ResolvedModel

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["encoder", "decoder"]
"""Whose source: the encoder's gives what only the encoder has, the decoder's all else."""
Sources = Mapping[Side, ResolvedModel]
FAMILIES = ("decoder", "encoder_decoder", "encoder_only")
"""Those that are taken over at all; from another family than one's own, only a decoder."""


@dataclass(frozen=True)
class Adaptation:
    """Where each parameter of a target comes from."""

    taken: Mapping[str, tuple[Side, str]]
    """{name: (whose source, its name there)}."""
    newly_initialised: tuple[str, ...]
    """Names of the parameters that no source gives: they start as in a model from scratch."""
    left: tuple[str, ...]
    """Names of the sources' parameters that the model does not use."""


def adaptation_of(target: ResolvedModel, sources: Sources) -> Adaptation:
    """Where each parameter of the target starts from. Loads no torch. Raises ValueError with `problem_of`'s reason."""
    if problem := problem_of(target, sources):
        raise ValueError(f"the {problem[0]}'s source {problem[1]}")
    return _adaptation(target, sources)


def problem_of(target: ResolvedModel, sources: Sources) -> tuple[Side, str] | None:
    """(side, why its source cannot be adapted into the target), or None. Loads no torch."""
    for side, source in sources.items():
        if target.family not in FAMILIES or (source.family != target.family and source.family != "decoder"):
            return side, f"is of family {source.family}, which cannot be made into one of family {target.family}"
        if source.vocabulary != target.vocabulary:
            rows = f"{source.vocabulary} rows, this model's {target.vocabulary}"
            return side, f"has another vocabulary: its embedding has {rows}"
        for stack in ("encoder", "decoder"):
            layers, given = len(getattr(target, stack)), _depth(stack, target, source)
            if _side(stack) == side and layers > given:
                return side, f"has {given} layers for the {layers} of the {stack}, and none is taken twice"
    found = _adaptation(target, sources)
    for side in sources:
        inside = [
            name for name in (*found.taken, *found.newly_initialised) if _side(name) == side and ".layers." in name
        ]
        if inside and not any(name in found.taken for name in inside):
            return side, f"gives nothing to the {side}'s layers: no part of theirs has the shape of one of its own"
    return None


def _adaptation(target: ResolvedModel, sources: Sources) -> Adaptation:
    shapes, given = parameter_shapes(target), {side: parameter_shapes(source) for side, source in sources.items()}
    origins = {name: (_side(name), _origin(name, target, sources[_side(name)])) for name in shapes}
    lacking = {name for name, (side, there) in origins.items() if given[side].get(there) != shapes[name]}
    # Half of one of these would be neither the old one nor a new one, and its norms are of no use without it.
    drawn = {
        name.partition(part)[0] + part
        for part in (".cross_attention", ".feed_forward")
        for name in lacking
        if f"{part}." in name and len(shapes[name]) > 1
    }
    lacking |= {name for name in shapes if name.startswith(tuple(drawn))}
    taken = {name: origin for name, origin in origins.items() if name not in lacking}
    used = set(taken.values())
    left = {there: None for side in sources for there in given[side] if not _used(side, there, sources, used)}
    return Adaptation(taken, tuple(name for name in shapes if name in lacking), tuple(left))


Altered = tuple[str, Any, Any]
"""(key, its value in the source, its value here)."""


def altered(target: ResolvedModel, sources: Sources) -> tuple[Altered, ...]:
    """How the parameters that are taken over are used otherwise than in their source, once for all layers alike.

    The shapes do not tell: of heads of another number, another activation or another norm the matrices may be as large.
    Keys are `attention.output_norm` where all attentions differ so, else `encoder.self_attention.output_norm`.
    """
    found: dict[Altered, dict[str, None]] = {}
    compared = dict[str, None]()
    taken = adaptation_of(target, sources).taken
    for stack in ("encoder", "decoder"):
        source, layers = sources[_side(stack)], getattr(target, stack)
        given = getattr(source, _stack(stack, target, source))
        for index, place in enumerate(layers_taken(len(layers), len(given)) if layers else ()):
            for part, own in layers[index].parts:
                there = "self_attention" if part == "cross_attention" and source.family != target.family else part
                old = given[place].part(there)
                if old is None or not any(name.startswith(f"{stack}.layers.{index}.{part}.") for name in taken):
                    continue
                compared[f"{stack}.{part}"] = None
                for key, before, after in _differing(old, own):
                    found.setdefault((key, before, after), {})[f"{stack}.{part}"] = None
    for (key, before, after), places in [*found.items()]:
        for general in ("attention", "feed_forward"):
            if {*places} == {where for where in compared if where.endswith(general)}:
                found[key, before, after] = {general: None}
    for source in {id(source): source for source in sources.values()}.values():
        for part in ("norm", "embedding", "output"):
            for change in _differing(getattr(source, part), getattr(target, part)):
                found.setdefault(change, {})[part] = None
    return tuple((f"{place}.{key}", old, new) for (key, old, new), places in found.items() for place in places)


def _differing(old: Section, new: Section) -> Iterator[Altered]:
    for key in type(new).model_fields:
        if key == "place":  # which the names of the parts say
            continue
        before, after = getattr(old, key, None), getattr(new, key)
        # Zero where there is no such norm and no RoPE, which another key says.
        absent = key in ("norm_eps", "rope_theta") and 0 in (before, after)
        if before != after and not absent:
            yield key, before, after


def _used(side: Side, name: str, sources: Sources, used: set[tuple[Side, str]]) -> bool:
    """Whether something is made of a parameter; of one source for both sides, on either."""
    same = [other for other in sources if sources[other] is sources[side]]
    return any((other, name) in used for other in same)


def _side(name: str) -> Side:
    return "encoder" if name.startswith("encoder") else "decoder"


def _stack(stack: str, target: ResolvedModel, source: ResolvedModel) -> str:
    """The stack of the source that gives this one of the target."""
    return stack if source.family == target.family else "decoder"


def _depth(stack: str, target: ResolvedModel, source: ResolvedModel) -> int:
    return len(getattr(source, _stack(stack, target, source)))


def layers_taken(layers: int, of: int) -> list[int]:
    """The layers of a source with `of` of them that `layers` layers are taken from."""
    return [round(index * (of - 1) / max(1, layers - 1)) for index in range(layers)]


def _origin(name: str, target: ResolvedModel, source: ResolvedModel) -> str:
    """What a parameter is taken from: a name that the source need not have."""
    other = source.family != target.family
    stack, _, inside = name.partition(".")
    if name == "output.weight" and source.tie_embeddings in ("all", "decoder"):
        return "embedding.weight"
    if stack.startswith("encoder_embedding"):
        shared = name == "encoder_embedding.weight" and source.tie_embeddings in ("all", "inputs")
        return name.removeprefix("encoder_") if other or shared else name
    if stack not in ("encoder", "decoder"):
        return name
    if other and stack == "encoder" and "relative_bias" in name:
        return ""  # a causal bias knows no distances to tokens ahead
    if found := re.match(r"layers\.(\d+)\.(.*)", inside):
        place = layers_taken(len(getattr(target, stack)), _depth(stack, target, source))[int(found[1])]
        inside = f"layers.{place}.{found[2]}"
    if other:
        inside = inside.replace("cross_attention", "self_attention")
    return f"{_stack(stack, target, source)}.{inside}"


def adapted(adaptation: Adaptation, states: Mapping[Side, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """{name: value} of every parameter of the target that is taken over. states: the sources' state dicts."""
    return {name: states[side][there] for name, (side, there) in adaptation.taken.items()}

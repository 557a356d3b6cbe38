"""Components that a study can write into the layers of a stack: built-in ones, and those of installed packages.

Loads no torch. A package adds a component by an entry point:

    [project.entry-points."lit_llm.components"]
    my_mixer = "my_package.my_mixer:COMPONENT"        # a LayerComponent
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

from lit_llm.components.experts.resolved import EXPERTS
from lit_llm.components.gated_deltanet.resolved import GATED_DELTANET
from lit_llm.components.gla.resolved import GLA
from lit_llm.components.mamba2.resolved import MAMBA2
from lit_llm.components.part import ROLES, STACKS, LayerComponent, Part
from lit_llm.components.partial_attention.resolved import PARTIAL_ATTENTION
from lit_llm.components.retention.resolved import RETENTION
from lit_llm.config.problems import InputError, Problem, did_you_mean
from lit_llm.config.tree import KIND

GROUP = "lit_llm.components"
"""Group of the entry points by which installed packages register components."""
TAKEN = {"layers", "layer_ranges", "d_model", "attention", "self_attention", "cross_attention", "feed_forward"}
TAKEN |= {"cross_attention_mode", "norm", "dropout", "part", "parts", "placement", "prepare", "new_cache", "forward"}
"""Reserved names in a stack or in a layer, which no component can have."""


def _installed() -> Iterator[tuple[str, LayerComponent]]:
    """(package, component) of installed packages. Raises InputError where one cannot be loaded or used."""
    for entry in entry_points(group=GROUP):
        name = f"the component {entry.name} ({entry.value})"
        try:
            component = entry.load()
        except Exception as error:  # the package's own code, which may fail in any way
            raise InputError(Problem(f"cannot be loaded: {type(error).__name__}: {error}", name)) from error
        if problem := _problem(component):
            raise InputError(Problem(problem, name))
        yield entry.module.partition(".")[0], component


def _problem(component: object) -> str:
    """Reason why an object is no valid component, or ''."""
    if not isinstance(component, LayerComponent):
        return f"is a {type(component).__name__}, not a lit_llm.components.part.LayerComponent"
    if component.key in TAKEN or not component.key.isidentifier():
        return f"cannot have the key {component.key!r}"
    kind = component.override.model_fields.get(KIND)
    if kind is None or kind.is_required():
        return f"its section {component.override.__name__} needs a `{KIND}` with a default"
    if component.role not in ROLES:
        return f"has the role {component.role!r}{did_you_mean(component.role, ROLES)}"
    for stack in component.stacks:
        if stack not in STACKS:
            return f"is for the stack {stack!r}{did_you_mean(stack, STACKS)}"
    return ""


def _all() -> tuple[dict[str, LayerComponent], dict[str, str]]:
    every = (RETENTION, GLA, GATED_DELTANET, MAMBA2, PARTIAL_ATTENTION, EXPERTS)
    ours = {component.key: component for component in every}
    others, packages = dict[str, LayerComponent](), dict[str, str]()
    for package, component in _installed():
        if component.key in ours or component.key in others:
            raise InputError(f"two components have the key {component.key!r}; uninstall one of their packages")
        others[component.key], packages[component.key] = component, package
    # Sorted by key: the names of entry points must not change a model.
    return {**ours, **{key: others[key] for key in sorted(others)}}, packages


COMPONENTS, PACKAGES = _all()
"""{key: component}, and {key: package} of the components of other packages."""


def components_of(stack: str) -> list[LayerComponent]:
    """Components that the layers of a stack may have; see `LayerComponent.stacks`."""
    return [component for component in COMPONENTS.values() if stack in component.stacks]


def modules_of_parts() -> list[str]:
    """Python modules of the parts of layers, other packages' included. The fork server imports them in advance."""
    modules, classes = set[str](), [Part]
    while classes:
        classes += (part := classes.pop()).__subclasses__()
        places = [*getattr(part, "modules", {}).values(), getattr(part, "module", None)]
        modules |= {place.partition(":")[0] for place in places if isinstance(place, str)}
    return sorted(modules)

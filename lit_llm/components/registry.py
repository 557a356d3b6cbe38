"""Components that a study can write into the layers of a stack: ours, and those of installed packages. Loads no torch.

A package of yours adds one by an entry point, which is read wherever its environment is used:

    [project.entry-points."lit_llm.components"]
    my_mixer = "my_package.my_mixer:COMPONENT"        # a LayerComponent
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

from lit_llm.components.part import LayerComponent
from lit_llm.components.partial_attention.resolved import PARTIAL_ATTENTION
from lit_llm.components.retention.resolved import RETENTION
from lit_llm.config.problems import InputError, Problem
from lit_llm.config.tree import KIND

OURS = __name__.partition(".")[0]
GROUP = f"{OURS}.components"
"""Entry points under which installed packages name their components."""
TAKEN = {"layers", "layer_ranges", "d_model", "attention", "self_attention", "cross_attention", "feed_forward"}
TAKEN |= {"cross_attention_mode"}
"""Keys of a stack that no component can have."""


def _installed() -> Iterator[LayerComponent]:
    """The components of installed packages. Raises InputError where one cannot be loaded or used."""
    for entry in sorted(entry_points(group=GROUP)):
        try:
            component = entry.load()
        except Exception as error:  # the package's own code, which may fail in any way
            raise InputError(
                Problem(
                    f"cannot be loaded: {type(error).__name__}: {error}", f"the component {entry.name} ({entry.value})"
                )
            ) from error
        if problem := _problem(component):
            raise InputError(Problem(problem, f"the component {entry.name} ({entry.value})"))
        yield component


def _problem(component: object) -> str:
    """Why this is no component that can be used, or ''."""
    if not isinstance(component, LayerComponent):
        return f"is a {type(component).__name__}, not a lit_llm.components.part.LayerComponent"
    if component.key in TAKEN or not component.key.isidentifier():
        return f"cannot have the key {component.key!r}"
    if KIND not in component.override.model_fields:
        return f"its section {component.override.__name__} needs a `kind` with a default"
    return ""


def _all() -> dict[str, LayerComponent]:
    components = {component.key: component for component in (RETENTION, PARTIAL_ATTENTION)}
    for component in _installed():
        if component.key in components:
            raise InputError(f"two components have the key {component.key!r}; uninstall one of their packages")
        components[component.key] = component
    return components


COMPONENTS = _all()
"""{key: component}."""


def installed_components() -> list[LayerComponent]:
    """Those of other packages."""
    return [component for component in COMPONENTS.values() if component.package != OURS]


def components_of(stack: str) -> list[LayerComponent]:
    """Those that the layers of a stack may have; see `LayerComponent.stacks`."""
    return [component for component in COMPONENTS.values() if stack in component.stacks]
